"""The commands of `mm-data` that make datasets from datasets: convert, merge, shuffle."""

from pathlib import Path
from typing import Annotated

import typer

from minimind_data.dataset.format import Manifest
from minimind_data.dataset.merging import MergeOptions
from minimind_data.dataset.merging import merge as merge_datasets
from minimind_data.dataset.shuffling import ShuffleOptions
from minimind_data.dataset.shuffling import shuffle as shuffle_dataset
from minimind_data.interchange.conversion import ConvertOptions, ConvertSummary
from minimind_data.interchange.conversion import convert as convert_dataset
from minimind_data.interchange.formats import FORMAT_NAMES, SHARDS
from minimind_data.reporting import ByteProgress, counted

_FORMATS = ", ".join(FORMAT_NAMES)


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A dataset, or token files of another project.", readable=False
        ),
    ],
    options: ConvertOptions,
    source_format: Annotated[
        str,
        typer.Option("--from", metavar="FORMAT", help="Format of SOURCE; auto detects it from the content."),
    ] = "auto",
    target_format: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help=f"Format to write: {_FORMATS}.")
    ] = SHARDS,
) -> None:
    """Convert a dataset from or to another project's format."""
    summary = convert_dataset(
        source, options, source_format=source_format, target_format=target_format, progress=ByteProgress
    )
    _print_summary(options.out, summary)


def merge(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR",
            help="Datasets with the same tokenizer, in the order of the result.",
            readable=False,
        ),
    ],
    options: MergeOptions,
) -> None:
    """Merge datasets.

    Shards are hard-linked where possible.
    """
    _print_manifest(options.out, merge_datasets(folders, options, progress=ByteProgress))


def shuffle(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the dataset.", readable=False)],
    options: ShuffleOptions,
) -> None:
    """Put documents into a random order, decided by a seed."""
    _print_manifest(options.out, shuffle_dataset(folder, options, progress=ByteProgress))


def _print_manifest(out: Path, manifest: Manifest) -> None:
    print(
        f"{out}: {counted(manifest.num_documents, 'document')}, {counted(manifest.num_tokens, 'token')} in "
        f"{counted(len(manifest.shards), 'shard')} ({manifest.dtype})"
    )
    print(f"  fingerprint  {manifest.fingerprint[:16]}…")


def _print_summary(out: Path, summary: ConvertSummary) -> None:
    kind = summary.source_format if summary.target_format == SHARDS else summary.target_format
    unit = "shard" if summary.target_format == SHARDS else "file"
    print(
        f"{out}: {counted(summary.documents, 'document')}, {counted(summary.tokens, 'token')} in "
        f"{counted(summary.files, unit)} ({summary.source_format} to {summary.target_format})"
    )
    if summary.separator_id is not None:
        print(f"  cut          at every id {summary.separator_id}")
    if summary.bos_added:
        print(
            f"  framed       {counted(summary.bos_added, 'document')} came without BOS, {summary.eos_added:,} without EOS; added"
        )
    elif summary.eos_added:
        print(f"  framed       {counted(summary.eos_added, 'document')} came without EOS; added")
    if summary.empty:
        print(f"  left out     {counted(summary.empty, 'document')} without any token but BOS and EOS")
    if summary.divided:
        print(
            f"  divided      {counted(summary.divided, 'document')} that contain the separator id; readers of {kind} split each of them"
        )

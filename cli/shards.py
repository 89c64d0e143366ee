"""The commands of mm-data that make datasets out of datasets: merge, shuffle."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Self

import typer

from minimind_data.format import Manifest
from minimind_data.merge import MergeOptions
from minimind_data.merge import merge as merge_datasets
from minimind_data.progress import ByteProgress
from minimind_data.shuffle import ShuffleOptions
from minimind_data.shuffle import shuffle as shuffle_dataset

from .options import command


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    for function in (merge, shuffle):
        command(app)(function)


def merge(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Datasets of one tokenizer, in the order of the result."),
    ],
    options: MergeOptions,
) -> None:
    """Put several datasets together into one; shards are linked where they can be."""
    with _Bar("merge") as bar:
        manifest = merge_datasets(folders, options, progress=bar.start)
    _print_made(options.out, manifest)


def shuffle(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the dataset.")],
    options: ShuffleOptions,
) -> None:
    """Write the documents of a dataset in a random order that the seed decides."""
    with _Bar("shuffle") as bar:
        manifest = shuffle_dataset(folder, options, progress=bar.start)
    _print_made(options.out, manifest)


class _Bar:
    """A progress bar that begins when the work knows its size."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: ByteProgress | None = None

    def start(self, num_bytes: int) -> Callable[[int, int], None]:
        self._bar = ByteProgress(self._title, num_bytes, "tokens")
        return self._bar.add

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _print_made(out: Path, manifest: Manifest) -> None:
    print(
        f"{out}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens in {len(manifest.shards)} shards "
        f"({manifest.dtype})"
    )
    print(f"  fingerprint  {manifest.fingerprint[:16]}…")

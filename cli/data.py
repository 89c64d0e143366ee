"""`mm-data`: make datasets and inspect them. Each command parses arguments, calls one function and prints its result."""

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from minimind_data.build.pipeline import commit as commit_slices
from minimind_data.build.pipeline import tokenize as build_dataset
from minimind_data.build.plan import TokenizeOptions
from minimind_data.build.publish import Summary
from minimind_data.dataset.format import SET_ASIDE_NAME, VALIDATION_NAME, Manifest
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.verification import verify as verify_dataset
from minimind_data.errors import UserError
from minimind_data.inputs.spec import RecordSpec
from minimind_data.inputs.splits import texts_of
from minimind_data.permutation import MAX_SEED
from minimind_data.reporting import ByteProgress, counted
from minimind_data.tokenizer.training import train_tokenizer as run_training
from minimind_data.windows.base import Layout, LongDocuments
from minimind_train.batches.options import DataOptions, OrderOptions, WindowOptions, read_sources
from minimind_train.order.sample_order import OrderKind
from minimind_train.order.skips import Skips
from minimind_train.training.options import TrainingOptions

from . import rearrange
from .flags import in_flags
from .options import OptionsGiven, command, make_app, option_of, refuse_idle
from .stats import stats
from .window import window

app = make_app("Turn text into memory-mapped shards, and inspect them.")
_PROBLEMS_SHOWN = 10
_NAMES_SHOWN = 12
_MAX_INT64 = 2**63 - 1

_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the dataset.", readable=False)]
_Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")
]


@command(app)
def tokenize(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="JSON lines, Parquet or text, also .gz and .zst: files, folders, globs, s3://…, or - for standard input.",
        ),
    ],
    options: TokenizeOptions,
) -> None:
    """Turn text into a dataset.

    After an interruption, run the same command again: it makes only what is missing. With more inputs, it makes only their shards.
    """
    try:
        summary = build_dataset(inputs, options, say=_say, progress=ByteProgress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted; finished shards are kept, run the same command again for the rest"
        ) from None
    _print_summary(options.out, summary)


@command(app)
def commit(folder: _Folder) -> None:
    """Join the slices that `tokenize --task` made."""
    _print_summary(folder, commit_slices(folder, say=_say, progress=ByteProgress))


def _print_summary(out: Path, summary: Summary) -> None:
    manifest = summary.manifest
    rate = f", {summary.input_bytes / 1e6 / summary.seconds:.1f} MB/s" if summary.seconds else ""
    read = f"  read       {summary.input_bytes / 1e6:.1f} MB in {summary.seconds:.1f} s{rate}"
    if manifest is None:
        print(
            f"{out}: {counted(summary.made_shards, 'split')} of this slice made; when all slices are done, run `mm-data commit {out}`"
        )
        print(read)
        return
    size = (
        f"{counted(manifest.num_documents, 'document')}, {counted(manifest.num_tokens, 'token')} in "
        f"{counted(len(manifest.shards), 'shard')}"
    )
    if summary.already_done:
        print(f"{out}: already done, nothing to do ({size})")
        return
    print(f"{out}: {size} ({manifest.dtype})" + (f"\n{read}" if summary.input_bytes else ""))
    if summary.backend:
        print(
            f"  encoder    {summary.backend.name}; {counted(summary.compared, 'document')} compared with tokenizers"
        )
    if summary.kept_shards:
        print(f"  kept       {counted(summary.kept_shards, 'shard')} from the previous run")
    if (part := summary.validation) is not None:
        print(
            f"  validation {counted(part.num_documents, 'document')}, {counted(part.num_tokens, 'token')} in {out / VALIDATION_NAME}"
        )
    if manifest.options["dedup"] != "none":
        print(
            f"  duplicates {counted(manifest.duplicates, 'document')} left out, because their text came before"
        )
    if manifest.empty_texts:
        print(f"  empty      {counted(manifest.empty_texts, 'record')} with an empty text, skipped")
    _print_doubts(manifest)
    if manifest.set_aside:
        print(
            f"  set aside  {counted(manifest.set_aside, 'bad record')}, with the reason, in {out / SET_ASIDE_NAME}"
        )
    for difference in summary.differences:
        print(f"  different  {difference}: encoded again with tokenizers")


def _print_doubts(manifest: Manifest) -> None:
    """Print what should be checked in the records."""
    if manifest.forms:
        print(f"  read as    {_listed(manifest.forms)}")
    if manifest.unread:
        print(
            f"  not read   {_listed(manifest.unread)}: fields that nothing reads, and how often each occurs"
        )
    if different := manifest.different_prompts:
        print(
            f"  prompts    {counted(different, 'pair')} with different prompts in chosen and rejected; please check them"
        )
    if unlearned := manifest.unlearned:
        print(
            f"  unlearned  {counted(unlearned, 'conversation')} with an answer that is not learned: its first or last token also "
            "covers text around it"
        )


def _listed(counts: dict[str, int]) -> str:
    """Write counts by their names, the first of them."""
    some = ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:_NAMES_SHOWN])
    more = len(counts) - _NAMES_SHOWN
    return some + (f" and {more:,} more" if more > 0 else "")


@command(app, "train-tokenizer")
def train_tokenizer(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT", help="Inputs as for tokenize, but not standard input.")
    ],
    out: Annotated[Path, typer.Option(help="The tokenizer.json to write, or a folder for it.")],
    records: RecordSpec,
    vocab_size: Annotated[int, typer.Option(help="Vocabulary size, including the 36 special tokens.")] = 6400,
) -> None:
    """Train a tokenizer on text.

    Byte-pair encoding, with MiniMind's special tokens and chat template.
    """
    size = run_training(texts_of(inputs, records), out, vocab_size=vocab_size)
    print(f"{out}: {size:,} entries")


@command(app)
def info(folder: _Folder, as_json: _Json = False) -> None:
    """Show what a dataset holds."""
    manifest = ShardSet.open(folder).manifest
    num_bytes = manifest.num_bytes
    facts = {
        "kind": manifest.kind,
        "documents": manifest.num_documents,
        "tokens": manifest.num_tokens,
        "shards": len(manifest.shards),
        "dtype": manifest.dtype,
        "bytes": num_bytes,
        "empty_texts": manifest.empty_texts,
        "set_aside": manifest.set_aside,
        "duplicates": manifest.duplicates,
        "different_prompts": manifest.different_prompts,
        "unlearned": manifest.unlearned,
        "unread": manifest.unread,
        "forms": manifest.forms,
        "chat_template": manifest.tokenizer_config_sha256 is not None,
        "tokenizer": asdict(manifest.tokenizer),
        "options": manifest.options,
        "inputs": [asdict(entry) for entry in manifest.inputs],
        "fingerprint": manifest.fingerprint,
    }
    if as_json:
        _print_json(facts)
        return
    print(
        f"{folder}: {manifest.kind} dataset, {counted(manifest.num_documents, 'document')}, {counted(manifest.num_tokens, 'token')}"
    )
    print(f"  shards       {len(manifest.shards)} of {manifest.dtype}, {num_bytes / 1e6:,.1f} MB")
    ids = manifest.tokenizer
    print(
        f"  tokenizer    {ids.vocab_size:,} entries, BOS {ids.bos_id}, EOS {ids.eos_id}, PAD {ids.pad_id}, {ids.sha256[:12]}…"
    )
    options = ", ".join(f"{name} {value}" for name, value in manifest.options.items() if value is not None)
    print(f"  options      {options}")
    print(
        f"  left out     {counted(manifest.empty_texts, 'empty text')}, {counted(manifest.set_aside, 'bad record')}, "
        f"{counted(manifest.duplicates, 'duplicate')}"
    )
    if manifest.has_masks:
        print(
            f"  in doubt     {facts['different_prompts']:,} pairs with different prompts, {facts['unlearned']:,} conversations "
            "with an answer that is not learned"
        )
    if manifest.forms:
        print(f"  read as      {_listed(manifest.forms)}")
    if manifest.unread:
        print(f"  not read     {_listed(manifest.unread)}")
    print(f"  fingerprint  {manifest.fingerprint[:16]}…")
    for entry in manifest.inputs:
        print(f"  input        {entry.path}, {entry.bytes / 1e6:,.1f} MB, {entry.sha256[:12]}…")


@command(app)
def verify(folder: _Folder, as_json: _Json = False) -> None:
    """Recompute every checksum, to find any flipped byte.

    The validation part in DIR/val and the packing plans are read too.
    """
    verdict = verify_dataset(folder, progress=ByteProgress)
    if as_json:
        _print_json({"ok": not verdict.problems, **asdict(verdict)})
    elif not verdict.problems:
        parts = ["its validation part"] if len(verdict.folders) > 1 else []
        parts += [counted(verdict.plans, "packing plan")] if verdict.plans else []
        also = f", {' and '.join(parts)} included" if parts else ""
        print(
            f"{folder}: intact ({counted(verdict.files, 'file')}, {verdict.bytes / 1e6:,.1f} MB, all checksums match{also})"
        )
    if verdict.problems:
        shown, more = verdict.problems[:_PROBLEMS_SHOWN], len(verdict.problems) - _PROBLEMS_SHOWN
        sentences = [*shown, *([f"and {more:,} more"] if more > 0 else []), *verdict.remedies]
        raise UserError("; ".join(sentences))


command(app)(window)


@command(app)
def locate(
    options_given: OptionsGiven,
    position: Annotated[int, typer.Option(help="Samples consumed since the run began.")],
    folders: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DIR",
            help="Folder of the dataset; of a mixture, each NAME=DIR:WEIGHT, as for mm-train pretrain --shards.",
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a run, in place of DIR and the options of the order: what the run reads there, "
            "with all its changes."
        ),
    ] = None,
    seq_len: Annotated[int | None, option_of(WindowOptions, "seq_len")] = None,
    layout: Annotated[Layout, option_of(WindowOptions, "layout")] = WindowOptions.layout,
    long_documents: Annotated[
        LongDocuments, option_of(WindowOptions, "long_documents")
    ] = WindowOptions.long_documents,
    order: Annotated[OrderKind, option_of(OrderOptions, "order")] = OrderOptions.order,
    shuffle_block: Annotated[
        int, option_of(OrderOptions, "shuffle_block", min=1)
    ] = OrderOptions.shuffle_block,
    seed: Annotated[int, option_of(TrainingOptions, "seed")] = TrainingOptions.seed,
    as_json: _Json = False,
) -> None:
    """Show which window is at a position, and where."""
    from minimind_train.batches.datasets import Datasets
    from minimind_train.batches.positions import window_at
    from minimind_train.run.location import data_at

    if not 0 <= position <= _MAX_INT64:
        raise UserError(f"--position counts samples, from 0 to 2^63 - 1, not {position}")
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"--seed must be from 0 to 2^64 - 1, not {seed}")
    if run:
        _refuse_beside_run(options_given - {"run", "position", "as_json"})
        data, seed = data_at(run, position)
    elif not folders or seq_len is None:
        raise typer.BadParameter("pass DIR and --seq-len, or --run with the folder of a run")
    else:
        refuse_idle(options_given, layout)
        try:
            read_sources(folders)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        try:
            data = DataOptions(
                shards=tuple(folders),
                layout=layout,
                long_documents=long_documents,
                seq_len=seq_len,
                order=order,
                shuffle_block=shuffle_block,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
    datasets = Datasets.open(data.shards)
    windows, ordered = datasets.windows_and_order(data, seed=seed, say=_say)
    skips = Skips.of(data.skip_positions)
    place = window_at(ordered, windows, position) | (
        {"left_out": True} if not skips.count(position, position + 1) else {}
    )
    if as_json:
        _print_json({"position": position, **place})
        return
    part, whole = (f"part {place['part']}, ", "") if "part" in place else ("", f" of {len(windows):,}")
    print(
        f"position {position:,}: {part}epoch {place['epoch']}, window {place['window']:,}{whole}, "
        f"shard {place['shard']}, offset {place['offset']:,}{', left out' if 'left_out' in place else ''}"
    )
    folder = {source.name: source.folder for source in datasets.sources}[place.get("part", "")]
    print(f"show it with: {_window_command(folder, place['window'], data)}")


def _refuse_beside_run(names: frozenset[str]) -> None:
    """Refuse options that a run leaves no room for.

    Raises:
        typer.BadParameter: there are some.
    """
    if names:
        quoted_names = ", ".join(
            "DIR" if name == "folders" else f"--{name.replace('_', '-')}" for name in sorted(names)
        )
        raise typer.BadParameter(f"--run already decides the order; leave out {quoted_names}")


def _window_command(folder: Path, window: int, data: WindowOptions) -> str:
    """Return the command that shows a window."""
    words = ["mm-data", "window", str(folder), str(window)]
    words += ["--seq-len", str(data.seq_len), "--layout", data.layout]
    if data.layout == "pack":
        words += ["--long-documents", data.long_documents]
    return shlex.join(words)


command(app)(stats)
rearrange.register(app)


def _say(sentence: str) -> None:
    print(in_flags(sentence), file=sys.stderr)


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, ensure_ascii=False))


def main() -> None:
    """Run `mm-data`."""
    app()


if __name__ == "__main__":
    main()

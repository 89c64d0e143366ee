"""`mm-data`: make datasets and inspect them. Each command parses arguments, calls one function and prints its result."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from minimind_data.build.pipeline import commit as commit_slices
from minimind_data.build.pipeline import tokenize as build_dataset
from minimind_data.build.plan import TokenizeOptions
from minimind_data.build.publish import Summary
from minimind_data.dataset.format import SET_ASIDE_NAME, TOKENIZER_NAME, VALIDATION_NAME, Kind, Manifest
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.verification import verify as verify_dataset
from minimind_data.errors import UserError
from minimind_data.inputs.spec import RecordSpec
from minimind_data.inputs.splits import texts_of
from minimind_data.reporting import ByteProgress, counted
from minimind_data.tokenizer.naming import description_of, name_of, summary_of
from minimind_data.tokenizer.training import train_tokenizer as run_training

from .flags import in_flags
from .options import AsJson, command, make_app, option_of

app = make_app(
    "Turn text into memory-mapped shards, and inspect them.",
    {
        "window": "window",
        "locate": "locate",
        "stats": "stats",
        "convert": "rearrange",
        "merge": "rearrange",
        "shuffle": "rearrange",
    },
)
_PROBLEMS_SHOWN = 10
_NAMES_SHOWN = 12

_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the dataset.", readable=False)]


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
    Options that shape the dataset keep the values that it was made with, unless you pass them.
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
    taken = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in summary.options_taken.items())
    options = f"\n  options    as the dataset has them: {taken}" if taken else ""
    if summary.already_done:
        print(f"{out}: already done, nothing to do ({size}){options}")
        return
    frame = ", documents without BOS" if manifest.stores_no_bos else ""
    print(f"{out}: {size} ({manifest.dtype}{frame})" + (f"\n{read}" if summary.input_bytes else "") + options)
    if "tokenizer" not in summary.options_taken:
        print(f"  tokenizer  {summary_of(manifest.tokenizer)}")
    if summary.backend:
        print(
            f"  encoder    {summary.backend.name}; {counted(summary.compared, 'document')} compared with tokenizers"
        )
    if summary.kept_shards:
        print(f"  kept       {counted(summary.kept_shards, 'shard')} from the previous run")
    _print_parts(out, summary, manifest)
    for difference in summary.differences:
        print(f"  different  {difference}: encoded again with tokenizers")


def _print_parts(out: Path, summary: Summary, manifest: Manifest) -> None:
    """Print what became of the records that are not in the training part, and what should be checked in the others."""
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
    kind: Annotated[Kind, option_of(TokenizeOptions, "kind")] = TokenizeOptions.kind,
    vocab_size: Annotated[int, typer.Option(help="Vocabulary size, including the 36 special tokens.")] = 6400,
) -> None:
    """Train a tokenizer on text or conversations.

    Byte-pair encoding, with minimind-3's special tokens and the chat template of the tokenizer `default`. Of conversations it learns
    the texts that this template makes, roles and tools included, without the special tokens.
    """
    size = run_training(texts_of(inputs, records, kind, say=_say), out, vocab_size=vocab_size)
    print(f"{out}: {size:,} entries")


@command(app)
def info(folder: _Folder, as_json: AsJson = False) -> None:
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
        "tokenizer_name": name_of(manifest.tokenizer),
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
    tokenizer_json = (folder / TOKENIZER_NAME).read_text("utf-8")
    print(f"  tokenizer    {description_of(manifest.tokenizer, tokenizer_json)}")
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
def verify(folder: _Folder, as_json: AsJson = False) -> None:
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


def _say(sentence: str) -> None:
    print(in_flags(sentence), file=sys.stderr)


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, ensure_ascii=False))


def main() -> None:
    """Run `mm-data`."""
    app()


if __name__ == "__main__":
    main()

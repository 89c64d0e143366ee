"""`mm-data stats`: statistics of a dataset for the terminal, as JSON, and as an HTML page."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.report.page import DEFAULT_WINDOWS, check_page_place, write_page
from minimind_data.report.statistics import DEFAULT_SEQ_LENS
from minimind_data.report.statistics import stats as describe
from minimind_data.reporting import ByteProgress, counted
from minimind_data.tokenizer.loading import load_tokenizer
from minimind_train.batches.options import WindowOptions

from .options import AsJson, option_of

_BAR_COLUMNS = 28
_MAX_ROWS = 24


def stats(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the dataset.")],
    seq_len: Annotated[
        list[int] | None,
        option_of(
            WindowOptions,
            "seq_len",
            note="Repeatable: windows of each length are counted.",
            default=" ".join(map(str, DEFAULT_SEQ_LENS)),
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write a self-contained HTML page with plots, and windows to browse."
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option(min=1, help="Windows on the page for each layout and window length.")
    ] = DEFAULT_WINDOWS,
    as_json: AsJson = False,
) -> None:
    """Show lengths of documents, and what each layout wastes.

    With --html also write a page with windows to browse.
    """
    if html is not None:
        check_page_place(html)
    shards = ShardSet.open(folder)
    tokenizer = load_tokenizer(folder)
    seq_lens = tuple(dict.fromkeys(seq_len or DEFAULT_SEQ_LENS))
    numbers = describe(shards, tokenizer, seq_lens, ByteProgress).as_dict()
    if as_json:
        print(json.dumps(numbers, ensure_ascii=False))
    else:
        print("\n".join(_lines(folder, numbers)))
    if html is not None:
        size = write_page(html, numbers, shards, tokenizer, num_windows=windows)
        print(f"{html}: {size / 1e6:.1f} MB, open it in any browser", file=sys.stderr)


def _lines(folder: Path, numbers: dict[str, Any]) -> Iterator[str]:
    text, lengths = numbers["text"], numbers["lengths"]
    percentiles = lengths["percentiles"]
    yield f"{folder}:"
    counts = [counted(numbers[name], name.removesuffix("s")) for name in ("documents", "tokens", "shards")]
    yield f"  {counts[0]}, {counts[1]} in {counts[2]}"
    yield f"  text         {text['characters_per_token']:.2f} characters a token, {text['bytes_per_token']:.2f} bytes a token"
    if text["estimated_from_documents"] is None:
        yield f"               ({text['characters']:,} characters)"
    else:
        yield f"               (estimated from {text['estimated_from_documents']:,} documents)"
    if numbers["kind"] != "pretrain":
        yield f"  learned      {numbers['learned_tokens']:,} tokens, {_percent(numbers['learned_tokens'] / numbers['tokens'])} of all"
    yield f"  vocabulary   {text['ids_used']:,} of {numbers['vocab_size']:,} entries occur"
    yield f"  lengths      {lengths['shortest']:,} to {lengths['longest']:,} tokens, mean {lengths['mean']:,.1f}"
    yield f"               5% up to {percentiles['5']:,}, half up to {percentiles['50']:,}, 95% up to {percentiles['95']:,}"
    yield ""
    yield f"{'tokens':>23}  {'documents' if numbers['kind'] == 'pretrain' else 'conversations':>13}"
    yield from _histogram(_merged(lengths["histogram"]))
    yield ""
    yield f"{'window':>8}  {'layout':<7} {'windows':>15}  {'padding':>8}  {'tokens lost':>11}  {'documents cut':>13}"
    for number, waste in enumerate(numbers["layouts"]):
        first = not number or numbers["layouts"][number - 1]["seq_len"] != waste["seq_len"]
        shares = (_percent(waste[name]) for name in ("padding_share", "unused_share", "cut_share"))
        padding, lost, cut = shares
        yield (
            f"{waste['seq_len'] if first else '':>8}  {waste['layout']:<7} {waste['windows']:>15,}  {padding:>8}  "
            f"{lost:>11}  {cut:>13}"
        )
    yield ""
    yield "padding: share of positions; lost: tokens in no window; cut: documents cut"


def _merged(bins: list[dict[str, int]]) -> list[dict[str, int]]:
    """Join neighbouring bins until they fit a screen."""
    step = -(-len(bins) // _MAX_ROWS)
    return [
        {
            "from": group[0]["from"],
            "to": group[-1]["to"],
            "documents": sum(one["documents"] for one in group),
        }
        for group in (bins[start : start + step] for start in range(0, len(bins), step))
    ]


def _histogram(bins: list[dict[str, int]]) -> Iterator[str]:
    most = max(one["documents"] for one in bins)
    total = sum(one["documents"] for one in bins)
    full, halves = ("█", "▌") if _shows("█▌") else ("#", "")
    for one in bins:
        span = f"{one['from']:,}" + (f" - {one['to']:,}" if one["to"] > one["from"] else "")
        columns = one["documents"] * _BAR_COLUMNS * 2 / most
        bar = full * int(columns // 2) + (halves if columns % 2 >= 1 else "")
        if one["documents"] and not bar:
            bar = halves or "."
        share = _percent(one["documents"] / total) if one["documents"] else ""
        yield f"{span:>23}  {one['documents']:>13,}  {bar:<{_BAR_COLUMNS}}  {share:>6}".rstrip()


def _percent(share: float) -> str:
    """Format a share; a small one is not shown as zero."""
    if 0 < share < 0.001:
        return "<0.1%"
    return f"{share:.1%}"


def _shows(characters: str) -> bool:
    """Tell whether stdout can show these characters."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True

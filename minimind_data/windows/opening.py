"""open_windows(): the windows of a dataset in one layout, and a sentence on what the layout does to its tokens."""

from collections.abc import Iterator

from minimind_data.dataset.format import TokenizerInfo
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.reporting import Say, counted, say_nothing
from minimind_data.windows.base import Layout, LongDocuments, Windows
from minimind_data.windows.concat import ConcatWindows
from minimind_data.windows.pack import PackWindows
from minimind_data.windows.pack_plan import open_plan
from minimind_data.windows.pad import PadWindows, PairWindows

MAX_SEQ_LEN = 2**24
"""A longer window is a typing error: 16 million tokens are 128 MiB in int64."""

_VERBS = {"concat": "cut", "pad": "padded", "pack": "packed"}


def open_windows(
    shards: ShardSet,
    *,
    layout: Layout,
    seq_len: int,
    labels: bool = False,
    documents_apart: bool = False,
    long_documents: LongDocuments = "cut",
    say: Say | None = None,
) -> Windows:
    """Open the windows of a dataset: samples of `seq_len` tokens, addressed by number.

    Args:
        shards: the dataset.
        layout: `concat`, `pad` or `pack`.
        seq_len: L, tokens of `input_ids`.
        labels: give unshifted `labels` in place of shifted `targets`.
        documents_apart: give `position_ids`, and no target that is the first token of another document.
        long_documents: `pack` only: what is done with documents that are longer than a window.
        say: takes a sentence when windows are planned for the first time, and sentences on what is cut, left out or padded, and
            on how many windows of a masked dataset have nothing to learn; these are counted only where this is given.

    Raises:
        UserError: the dataset has no such window, or their plan cannot be written.
    """
    _check_length(layout, seq_len, shards.manifest.tokenizer)
    windows: Windows
    if shards.manifest.kind == "dpo":
        if layout != "pad":
            raise UserError(
                "holds pairs (dpo), a window of which is one pair",
                where=shards.folder,
                remedy=f"take `layout` pad, not {layout}",
                option="layout",
            )
        windows = PairWindows(shards, seq_len, labels=labels)
    elif layout == "concat":
        windows = ConcatWindows(shards, seq_len, labels=labels, documents_apart=documents_apart)
    elif layout == "pad":
        windows = PadWindows(shards, seq_len, labels=labels, documents_apart=documents_apart)
    else:
        plan = open_plan(shards, seq_len if labels else seq_len + 1, long_documents, say or say_nothing)
        windows = PackWindows(shards, seq_len, plan, labels=labels, documents_apart=documents_apart)
    if not len(windows):
        if layout == "pack":
            raise UserError(
                f"none of its {shards.num_documents:,} documents fits a window of {seq_len} tokens",
                where=shards.folder,
                remedy="take a longer `seq_len`, or `long_documents` cut or fragment",
                option="seq_len",
            )
        raise UserError(
            f"{shards.num_tokens:,} tokens in {shards.num_documents:,} documents make no {layout} window of {seq_len} tokens",
            where=shards.folder,
            remedy="take a shorter `seq_len` or more text",
            option="seq_len",
        )
    if say is not None:
        for line in _description(windows):
            say(line)
    return windows


def _check_length(layout: Layout, seq_len: int, tokenizer: TokenizerInfo) -> None:
    first = "a token" if tokenizer.bos_id is None else "BOS"
    if layout != "concat" and seq_len < 2:
        raise UserError(f"`seq_len` {seq_len} is too short for layout {layout}: {first} and EOS alone take 2")
    if seq_len < 1:
        raise UserError(f"`seq_len` must be at least 1, not {seq_len}")
    if seq_len > MAX_SEQ_LEN:
        raise UserError(f"`seq_len` must be at most {MAX_SEQ_LEN:,} tokens, not {seq_len:,}")


def _description(windows: Windows) -> Iterator[str]:
    """Yield what a layout makes of a dataset, a sentence each, so that nothing is lost silently."""
    leftover = f"{counted(windows.unused_tokens, 'token')} in no window"
    if isinstance(windows, ConcatWindows):
        if windows.unused_tokens:
            yield f"{windows.shards.folder}: cut every {counted(windows.seq_len, 'token')}; at the end, {leftover}"
    else:
        yield _filled(windows, leftover)
    if unlearned := windows.count_unlearned():
        yield (
            f"{windows.shards.folder}: in {unlearned:,} of {len(windows):,} windows of {windows.seq_len} tokens nothing is learned, "
            "because no answer begins before their end; a longer `seq_len` reaches such answers"
        )


def _filled(windows: Windows, leftover: str) -> str:
    filled = 1 - windows.padding / max(1, windows.num_places)
    text = f"{windows.shards.folder}: {_VERBS[windows.layout]}, {filled:.2%} of all positions filled"
    if isinstance(windows, PackWindows) and windows.plan.num_long:
        fate = {"cut": "cut to one", "fragment": "spread over several", "drop": "left out"}
        many = counted(windows.plan.num_long, "document")
        text += f"; {many} longer than a window {fate[windows.plan.long_documents]}, {leftover}"
    elif windows.unused_tokens:
        text += f"; documents longer than a window cut to one, {leftover}"
    return text

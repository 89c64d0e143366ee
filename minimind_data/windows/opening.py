"""Windows over a ShardSet: fixed-length samples, addressed by number, each at the cost of one gather.

With sequence length L:

- `concat`: window k is the tokens [kL, kL + L] of the stream: L + 1 tokens at stride L, so every token is a target once.
- `pad`: window k is document k, cut to BOS + its first tokens + EOS where it is longer, then PAD. Unshifted at L = 340
  it is MiniMind's `PretrainDataset(max_length=340)`, id for id.
- `pack`: whole documents that together fill a window, then PAD; `pack_plan.py` says which. A document that alone is longer
  than a window is `cut` as in `pad`, goes on in other windows (`fragment`), or is left out (`drop`).

A sample is `input_ids` and `targets`, both int64 [L]: `targets[t]` is what follows `input_ids[t]`, -100 where nothing is to
be learned. For loops that shift inside the model (Hugging Face, MiniMind) a sample is `input_ids` and `labels`, both cut
from L tokens, unshifted. Which windows come when is not this module's business.

Where documents are kept apart, the step from one into the next is no target: the first token of a document that follows
another in a window is -100. That is always so in `pack`, whose documents are neighbours by length alone, and in all layouts with
`documents_apart`, which also gives `position_ids`, int64 [L], beginning again from 0 with each document: all that attention
inside documents needs.

In a dataset of conversations (`sft`) every target that its mask does not mark is -100, in all layouts, and a conversation that is
cut has no EOS put at its end: unshifted `pad` at L is MiniMind's `SFTDataset(max_length=L)`, id for id and label for label. In a
dataset of pairs (`dpo`) a window is a pair, padded; a sample is `chosen_input_ids`, `chosen_targets`, `rejected_input_ids` and
`rejected_targets`, each int64 [L].

A window of `pack` holds L + 1 tokens (L unshifted), so its last token is only a target, as in the other layouts.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import IGNORED
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.reporting import Announce, counted
from minimind_data.windows.base import Layout
from minimind_data.windows.best_fit import LongDocuments
from minimind_data.windows.concat import ConcatWindows
from minimind_data.windows.pack import PackWindows
from minimind_data.windows.pack_plan import open_plan
from minimind_data.windows.pad import PadWindows, PairWindows
from minimind_data.windows.segments import Segments

_DONE = {"concat": "cut", "pad": "padded", "pack": "packed"}

__all__ = ["IGNORED", "MAX_SEQ_LEN", "Layout", "LongDocuments", "Windows", "open_windows"]

MAX_SEQ_LEN = 2**24
"""A longer window is a slip of the keyboard: 16 million tokens, in int64 128 MiB."""


class Windows(Protocol):
    """What a training loop needs of a layout."""

    @property
    def shards(self) -> ShardSet:
        """The dataset."""
        ...

    @property
    def layout(self) -> Layout:
        """The layout's name."""
        ...

    @property
    def seq_len(self) -> int:
        """Tokens of `input_ids` in a window."""
        ...

    @property
    def labels(self) -> bool:
        """Whether samples are unshifted (`input_ids`, `labels`) rather than shifted (`input_ids`, `targets`)."""
        ...

    @property
    def documents_apart(self) -> bool:
        """Whether samples have `position_ids`, and no target that is the first token of another document."""
        ...

    @property
    def unused_tokens(self) -> int:
        """Tokens of the dataset that stand in no window as a target, cut off or left over at the end."""
        ...

    @property
    def num_places(self) -> int:
        """Input positions of all windows."""
        ...

    @property
    def padding(self) -> int:
        """Input positions, over all windows, that hold PAD."""
        ...

    def __len__(self) -> int:
        """Return the number of windows."""
        ...

    def fetch(self, windows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return a batch: `input_ids`, `targets` (or `labels`), and `position_ids` where documents are kept apart.

        Of pairs: `chosen_input_ids`, `chosen_targets`, `rejected_input_ids`, `rejected_targets` (or `…_labels`). Each is int64 [len(windows), seq_len].
        """
        ...

    @property
    def shard_sets(self) -> tuple[ShardSet, ...]:
        """The datasets that windows are cut from: this one."""
        ...

    def will_need(self, windows: NDArray[np.int64]) -> None:
        """Tell the system that a batch of windows is read soon; see `read_ahead.ReadAhead`."""
        ...

    def count_unlearned(self) -> int:
        """Count the windows in which nothing is learned, reading all masks; without masks there are none."""
        ...

    def segments(self, windows: NDArray[np.int64]) -> Segments:
        """Return which documents stand where in a batch of windows, without reading a token."""
        ...

    def document_ids(self, window: int) -> NDArray[np.int64]:
        """Return, for each input position of a window, the number of its document, -1 for PAD: int64 [seq_len]."""
        ...

    def locate(self, window: int) -> tuple[str, int]:
        """Return (shard name, token offset) of the first token of a window."""
        ...

    def window_of(self, shard: str, offset: int) -> int:
        """Return the window that holds this token of this shard."""
        ...


def open_windows(
    shards: ShardSet,
    *,
    layout: Layout,
    seq_len: int,
    labels: bool = False,
    documents_apart: bool = False,
    long_documents: LongDocuments = "cut",
    announce: Announce | None = None,
) -> Windows:
    """Lay windows of `seq_len` tokens over a dataset.

    Args:
        shards: the dataset.
        layout: `concat`, `pad` or `pack`.
        seq_len: L, tokens of `input_ids`.
        labels: give unshifted `labels` in place of shifted `targets`.
        documents_apart: give `position_ids`, and no target that is the first token of another document.
        long_documents: `pack` only: what becomes of a document that alone is longer than a window.
        announce: told, in a sentence, when windows are planned first, what is cut, left out or padded, and in how many of a masked
            dataset nothing is learned; these are counted only where this is given.

    Raises:
        UserError: the dataset has no such window, or their plan cannot be written.
    """
    _check_length(layout, seq_len)
    say = announce or _silent
    windows: ConcatWindows | PadWindows | PackWindows
    if shards.manifest.kind == "dpo":
        if layout != "pad":
            raise UserError(
                f"{shards.folder}: holds pairs (dpo), a window of which is one pair; take --layout pad, not {layout}"
            )
        windows = PairWindows(shards, seq_len, labels=labels)
    elif layout == "concat":
        windows = ConcatWindows(shards, seq_len, labels=labels, documents_apart=documents_apart)
    elif layout == "pad":
        windows = PadWindows(shards, seq_len, labels=labels, documents_apart=documents_apart)
    else:
        plan = open_plan(shards, seq_len if labels else seq_len + 1, long_documents, say)
        windows = PackWindows(shards, seq_len, plan, labels=labels, documents_apart=documents_apart)
    if not len(windows):
        raise UserError(
            f"{shards.folder}: {shards.num_tokens:,} tokens in {shards.num_documents:,} documents make no {layout} window of "
            f"{seq_len} tokens; take a shorter --seq-len or more text"
            if layout != "pack"
            else f"{shards.folder}: none of its {shards.num_documents:,} documents fits a window of {seq_len} tokens; take a "
            "longer --seq-len, or --long-documents cut or fragment"
        )
    if announce is not None:
        for line in _account(windows):
            announce(line)
    return windows


def _check_length(layout: Layout, seq_len: int) -> None:
    if layout != "concat" and seq_len < 2:
        raise UserError(f"seq_len {seq_len} is too short for layout {layout}: BOS and EOS alone take 2")
    if seq_len < 1:
        raise UserError(f"seq_len must be at least 1, not {seq_len}")
    if seq_len > MAX_SEQ_LEN:
        raise UserError(f"seq_len must be at most {MAX_SEQ_LEN:,} tokens, not {seq_len:,}")


def _silent(_: str) -> None:
    """Say nothing."""


def _account(windows: ConcatWindows | PadWindows | PackWindows) -> Iterator[str]:
    """Say what a layout makes of a dataset, so that nothing is lost without a word."""
    lost = f"{counted(windows.unused_tokens, 'token')} in no window"
    if isinstance(windows, ConcatWindows):
        if windows.unused_tokens:
            yield f"{windows.shards.folder}: cut every {counted(windows.seq_len, 'token')}; at the end, {lost}"
    else:
        yield _filled(windows, lost)
    if unlearned := windows.count_unlearned():
        yield (
            f"{windows.shards.folder}: in {unlearned:,} of {len(windows):,} windows of {windows.seq_len} tokens nothing is learned, "
            "because no answer begins before the end; a longer --seq-len reaches such answers"
        )


def _filled(windows: PadWindows | PackWindows, lost: str) -> str:
    filled = 1 - windows.padding / max(1, windows.num_places)
    text = f"{windows.shards.folder}: {_DONE[windows.layout]}, {filled:.2%} of all places filled"
    if isinstance(windows, PackWindows) and windows.plan.num_long:
        fate = {"cut": "cut to one", "fragment": "spread over several", "drop": "left out"}
        many = counted(windows.plan.num_long, "document")
        text += f"; {many} longer than a window {fate[windows.plan.long_documents]}, {lost}"
    elif windows.unused_tokens:
        text += f"; documents longer than a window cut to one, {lost}"
    return text

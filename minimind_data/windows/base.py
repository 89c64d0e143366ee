"""Windows: samples of fixed length over a dataset, addressed by number.

With sequence length L:

- `concat`: window k is the tokens [kL, kL + L] of the stream: L + 1 tokens at stride L, so every token is a target once.
- `pad`: window k is document k, cut to its first tokens + EOS where it is longer, then PAD. Unshifted at L = 340
  it is MiniMind's `PretrainDataset(max_length=340)`, id for id.
- `pack`: whole documents that together fill a window, then PAD; `pack_plan.py` says which. A document that alone is longer
  than a window is `cut` as in `pad`, continues in other windows (`fragment`), or is left out (`drop`).

A sample is `input_ids` and `targets`, both int64 [L]: `targets[t]` is what follows `input_ids[t]`, -100 where nothing is to
be learned. For loops that shift inside the model (Hugging Face, MiniMind) a sample is `input_ids` and `labels`, both cut
from L tokens, unshifted. A shifted window is cut from L + 1 tokens, the last of which is only a target. Which windows come when is
decided elsewhere.

Where documents are kept apart, the step from one into the next is no target: the first token of a document that follows
another in a window is -100. That is always so in `pack`, whose documents are neighbours by length alone, and in all layouts with
`documents_apart`, which also gives `position_ids`, int64 [L], starting again from 0 in each document: all that attention
inside documents needs.

In a dataset of conversations (`sft`) every target that its mask does not mark is -100, in all layouts, and a conversation that is
cut has no EOS put at its end: unshifted `pad` at L is MiniMind's `SFTDataset(max_length=L)`, id for id and label for label. In a
dataset of pairs (`dpo`) a window is a pair, padded; a sample is `chosen_input_ids`, `chosen_targets`, `rejected_input_ids` and
`rejected_targets` (or `…_labels`), each int64 [L].
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import IGNORED, MaskArray, TokenArray
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.reporting import counted
from minimind_data.windows.segments import Segments

Layout = Literal["concat", "pad", "pack"]

LongDocuments = Literal["cut", "fragment", "drop"]
"""What `pack` does with a document that is longer than a window: its first tokens and EOS fill one window (`cut`, as in `pad`), it
continues in further windows (`fragment`), or it is left out (`drop`)."""

_COUNTED_WINDOWS = 1024
"""How many windows' masks are read at a time while they are counted."""


class WindowSource(Protocol):
    """What a loader reads batches from: the windows of one dataset, or of several as if they were one."""

    @property
    def labels(self) -> bool:
        """Whether samples are unshifted (`input_ids`, `labels`) rather than shifted (`input_ids`, `targets`)."""
        ...

    @property
    def shard_sets(self) -> tuple[ShardSet, ...]:
        """The datasets that windows are cut from."""
        ...

    def __len__(self) -> int:
        """Return the number of windows."""
        ...

    def fetch(self, windows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return a batch, each array int64 [len(windows), seq_len]."""
        ...

    def will_need(self, windows: NDArray[np.int64]) -> None:
        """Tell the system that a batch is read soon, so that it reads ahead; see `ReadAhead`."""
        ...


class Windows(ABC):
    """The windows of one dataset in one layout, a `WindowSource`; `open_windows` makes them.

    A layout says which tokens a window has; how they become a sample is the same for all.

    Attributes:
        layout: the layout's name.
        shards: the dataset.
        seq_len: L, tokens of `input_ids` in a window.
        labels: whether samples are unshifted (`input_ids`, `labels`) rather than shifted (`input_ids`, `targets`).
        documents_apart: whether samples have `position_ids`, and no target that is the first token of another document.
        width: tokens that a window is cut from: L + 1, or L where samples are unshifted.
    """

    layout: ClassVar[Layout]

    def __init__(self, shards: ShardSet, seq_len: int, *, labels: bool, documents_apart: bool) -> None:
        self.shards = shards
        self.seq_len = seq_len
        self.labels = labels
        self.documents_apart = documents_apart
        self.width = seq_len if labels else seq_len + 1
        info = shards.manifest.tokenizer
        self._masked = shards.manifest.has_masks
        # A PAD inside a text is no target either, as in MiniMind; unless PAD is the same token as EOS or BOS, which must be
        # learned.
        self._ignored_id = info.pad_id if info.pad_id not in (info.bos_id, info.eos_id) else None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of windows."""

    def __getitem__(self, window: int | slice) -> dict[str, NDArray[np.int64]]:
        """Return the sample of a window, each array int64 [seq_len]; for a slice a batch, each [B, seq_len].

        Raises:
            IndexError: there is no such window; negative numbers count from the end.
        """
        if isinstance(window, slice):
            return self.fetch(np.arange(len(self))[window])
        try:
            number = range(len(self))[window]
        except IndexError:
            raise IndexError(f"window {window} asked for, and there are {len(self)}") from None
        return {name: rows[0] for name, rows in self.fetch(np.array([number])).items()}

    def __iter__(self) -> Iterator[dict[str, NDArray[np.int64]]]:
        """Iterate over the samples of all windows, in their order on disk."""
        return (self[number] for number in range(len(self)))

    def __repr__(self) -> str:
        kind = "labels" if self.labels else "targets"
        apart = ", documents apart" if self.documents_apart else ""
        return (
            f"{type(self).__name__}({str(self.shards.folder)!r}: {counted(len(self), 'window')} of {self.seq_len:,} tokens "
            f"with {kind}{apart})"
        )

    @property
    @abstractmethod
    def unused_tokens(self) -> int:
        """Tokens of the dataset that stand in no window as a target, cut off or left over at the end."""

    @property
    @abstractmethod
    def padding(self) -> int:
        """Input positions, over all windows, that hold PAD."""

    @abstractmethod
    def fetch(self, windows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return a batch, each array int64 [len(windows), seq_len].

        Args:
            windows: int64 [B], their numbers.

        Returns:
            `input_ids`, `targets` (or `labels`), and `position_ids` where documents are kept apart. Of pairs: `chosen_input_ids`,
            `chosen_targets`, `rejected_input_ids`, `rejected_targets` (or `…_labels`).

        Raises:
            IndexError: there is no such window.
        """

    @abstractmethod
    def segments(self, windows: NDArray[np.int64]) -> Segments:
        """Return which documents stand where in a batch of windows, without reading a token."""

    @abstractmethod
    def window_of(self, shard: str, offset: int) -> int:
        """Return the window that holds this token of this shard.

        Raises:
            UserError: there is no such token, or it stands in no window.
        """

    @abstractmethod
    def _mask(self, windows: NDArray[np.int64]) -> MaskArray:
        """Return the loss mask of a batch, uint8 [B, width]; 0 where there is PAD."""

    @property
    def num_places(self) -> int:
        """Input positions of all windows."""
        return len(self) * self.seq_len

    @property
    def shard_sets(self) -> tuple[ShardSet, ...]:
        """The datasets that windows are cut from: this one."""
        return (self.shards,)

    def will_need(self, windows: NDArray[np.int64]) -> None:
        """Tell the system that a batch is read soon, so that it reads ahead; see `ReadAhead`."""
        segments = self.segments(windows)
        present = segments.lengths > 0
        starts = segments.starts[present]
        self.shards.will_need(starts, starts + segments.lengths[present])

    def document_ids(self, window: int) -> NDArray[np.int64]:
        """Return, for each input position of a window, the number of its document, -1 for PAD: int64 [seq_len]."""
        ids: NDArray[np.int64] = self.segments(np.array([window])).document_ids(self.seq_len)[0]
        return ids

    def locate(self, window: int) -> tuple[str, int]:
        """Return (shard name, token offset) of the first token of a window."""
        return self.shards.name_and_offset(int(self.segments(np.array([window])).starts[0]))

    def count_unlearned(self) -> int:
        """Count the windows in which nothing is learned, reading all masks; without masks there are none."""
        if not self._masked:
            return 0
        return sum(int(np.count_nonzero(~self._have_targets(batch))) for batch in self._numbers())

    def any_learned(self) -> bool:
        """Tell whether something is learned in any window, reading masks, or lengths of documents, up to the first one."""
        if self._masked:
            return any(bool(self._have_targets(batch).any()) for batch in self._numbers())
        runs_on = self.layout == "concat" and not self.documents_apart
        if runs_on or self.shards.manifest.tokenizer.bos_id is not None:
            return True
        # Without BOS a document may be its EOS alone, and nothing stands before that.
        return any(bool((self.segments(batch).lengths > 1).any()) for batch in self._numbers())

    def _numbers(self) -> Iterator[NDArray[np.int64]]:
        """Yield the numbers of all windows, as many at a time as have their masks read at once."""
        for first in range(0, len(self), _COUNTED_WINDOWS):
            yield np.arange(first, min(first + _COUNTED_WINDOWS, len(self)))

    def _have_targets(self, windows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which windows of a masked dataset have a target, bool [B]."""
        have: NDArray[np.bool_] = (self._mask(windows)[:, 1:] != 0).any(axis=1)
        return have

    def _sample(
        self, tokens: TokenArray, ignored: NDArray[np.bool_] | None, segments: Segments | None
    ) -> dict[str, NDArray[np.int64]]:
        """Return the batch of [B, width] tokens; `ignored` [B, width] marks those that are no target."""
        first = 0 if self.labels else 1
        input_ids = tokens[:, : self.seq_len].astype(np.int64)
        learned = tokens[:, first:].astype(np.int64)
        if ignored is not None:
            learned[ignored[:, first:]] = IGNORED
        sample = {"input_ids": input_ids, "labels" if self.labels else "targets": learned}
        if self.documents_apart and segments is not None:
            sample["position_ids"] = segments.position_ids(self.seq_len)
        return sample

    def _padding(self, rows: TokenArray, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of [B, width] tokens are no target; the first `lengths` [B] of each row are text, the rest is PAD."""
        if self._ignored_id is not None:
            ignored: NDArray[np.bool_] = rows == self._ignored_id
            return ignored
        return np.arange(self.width) >= lengths[:, None]

    def _spans(self, sequences: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (global number of the first token, length in tokens) of sequences, both int64 [B].

        A document is one sequence, unless it is a pair.
        """
        owners = np.searchsorted(self.shards.sequence_starts, sequences, side="right") - 1
        return self.shards.sequence_spans(owners, sequences - self.shards.sequence_starts[owners])

    def _check(self, windows: NDArray[np.int64], count: int) -> None:
        if len(windows) and (windows.min() < 0 or windows.max() >= count):
            raise IndexError(f"windows {windows.min()}…{windows.max()} asked for, and there are {count}")


def ignore_first_tokens(ignored: NDArray[np.bool_], segments: Segments) -> None:
    """Mark the first token of every segment that follows another in its window: it is no target.

    Args:
        ignored: bool [B, width], changed in place.
        segments: of the same windows.
    """
    inside = segments.columns > 0
    ignored[segments.rows[inside], segments.columns[inside]] = True

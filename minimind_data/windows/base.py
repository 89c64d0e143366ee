"""The base of all layouts: from the tokens and masks of windows to samples.

Which tokens a window has is each layout's business (`layouts.py`, `pairs.py`); what a sample is, is said in `windows.py`.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import IGNORED, MaskArray, TokenArray
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.windows.segments import Segments

Layout = Literal["concat", "pad", "pack"]

"""The target of a position at which nothing is learned; PyTorch's default `ignore_index`."""

_COUNTED_WINDOWS = 1024

"""Windows whose masks are looked at a time."""


class WindowsBase:
    """What all layouts share: they cut `width` tokens and make a sample of them."""

    layout: Layout

    def __init__(self, shards: ShardSet, seq_len: int, *, labels: bool, documents_apart: bool) -> None:
        self.shards = shards
        self.seq_len = seq_len
        self.labels = labels
        self.documents_apart = documents_apart
        self.width = seq_len if labels else seq_len + 1
        info = shards.manifest.tokenizer
        self._masked = shards.manifest.has_masks
        # A PAD that stands inside a text is ignored too, as MiniMind does; unless PAD is EOS or BOS by another name, which
        # must be learned.
        self._ignored_id = info.pad_id if info.pad_id not in (info.bos_id, info.eos_id) else None

    def __len__(self) -> int:
        """Return the number of windows."""
        raise NotImplementedError

    @property
    def num_places(self) -> int:
        """Input positions of all windows."""
        return len(self) * self.seq_len

    def count_unlearned(self) -> int:
        """Count the windows in which nothing is learned, reading all masks; without masks there are none."""
        if not self._masked:
            return 0
        batches = range(0, len(self), _COUNTED_WINDOWS)
        numbers = (np.arange(first, min(first + _COUNTED_WINDOWS, len(self))) for first in batches)
        return sum(int(np.count_nonzero(~self._learns(batch))) for batch in numbers)

    def _learns(self, windows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which windows of a masked dataset have a target, bool [B]."""
        learns: NDArray[np.bool_] = (self._mask(windows)[:, 1:] != 0).any(axis=1)
        return learns

    def _mask(self, windows: NDArray[np.int64]) -> MaskArray:
        """Return the mask of a batch, uint8 [B, width]; 0 where there is PAD."""
        raise NotImplementedError

    def segments(self, windows: NDArray[np.int64]) -> Segments:
        """Return the documents of a batch; see `Windows.segments`."""
        raise NotImplementedError

    @property
    def shard_sets(self) -> tuple[ShardSet, ...]:
        """The dataset, as one of one."""
        return (self.shards,)

    def will_need(self, windows: NDArray[np.int64]) -> None:
        """Tell the system that windows are read soon; see `Windows.will_need`."""
        segments = self.segments(windows)
        there = segments.lengths > 0
        starts = segments.starts[there]
        self.shards.will_need(starts, starts + segments.lengths[there])

    def document_ids(self, window: int) -> NDArray[np.int64]:
        """Return the document of each input position; see `Windows.document_ids`."""
        found: NDArray[np.int64] = self.segments(np.array([window])).document_ids(self.seq_len)[0]
        return found

    def locate(self, window: int) -> tuple[str, int]:
        """Return where a window begins; see `Windows.locate`."""
        return self.shards.name_and_offset(int(self.segments(np.array([window])).starts[0]))

    def _sample(
        self, tokens: TokenArray, ignored: NDArray[np.bool_] | None, segments: Segments | None
    ) -> dict[str, NDArray[np.int64]]:
        """Make a batch of [B, width] tokens; `ignored` [B, width] marks those that are no target."""
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
        """Mark what is no target in [B, width] tokens of which the first `lengths` [B] of each row are text."""
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
            raise IndexError(f"windows {windows.min()}…{windows.max()} asked for, there are {count}")


def mark_steps(ignored: NDArray[np.bool_], segments: Segments) -> None:
    """Mark the first token of every segment that follows another."""
    inside = segments.columns > 0
    ignored[segments.rows[inside], segments.columns[inside]] = True

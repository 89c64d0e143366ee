"""Layout `pad`: one document a window, cut or padded to length. In a dataset of pairs (`dpo`) both sides of a pair, each so."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import MaskArray, TokenArray
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.windows.base import Windows
from minimind_data.windows.segments import Segments

SIDES = ("chosen", "rejected")
"""The two conversations of a pair, in the order in which they are stored."""


class PadWindows(Windows):
    """One document a window, cut or padded to length."""

    layout = "pad"

    def __init__(self, shards: ShardSet, seq_len: int, *, labels: bool, documents_apart: bool) -> None:
        super().__init__(shards, seq_len, labels=labels, documents_apart=documents_apart)
        self._counted: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Return the number of documents."""
        return self.shards.num_documents

    @property
    def unused_tokens(self) -> int:
        """Tokens cut off documents that are longer than a window; all indexes are read when this is first asked for."""
        return self._count()[0]

    @property
    def padding(self) -> int:
        """Input positions that hold PAD; all indexes are read when this is first asked for."""
        return self._count()[1]

    def _count(self) -> tuple[int, int]:
        if self._counted is None:
            unused = padding = 0
            for shard in self.shards:
                lengths = shard.lengths.astype(np.int64)
                unused += int(np.maximum(lengths - self.width, 0).sum())
                padding += int(np.maximum(self.seq_len - lengths, 0).sum())
            self._counted = unused, padding
        return self._counted

    def fetch(self, windows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return a batch, a document each."""
        self._check(windows, len(self))
        starts, lengths = self._spans(windows)
        segments = self._segments(windows, starts, lengths) if self.documents_apart else None
        return self._sample(*self._padded(starts, lengths), segments)

    def _padded(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> tuple[TokenArray, NDArray[np.bool_]]:
        """Return (tokens, which of them are no target), both [B, width], of sequences with these first tokens and lengths."""
        info = self.shards.manifest.tokenizer
        rows = np.empty((len(starts), self.width), self.shards.dtype)
        self._cut(self.shards.rows, starts, lengths, rows)
        rows[np.arange(self.width) >= lengths[:, None]] = info.pad_id
        if self._masked:
            return rows, self._cut_mask(starts, lengths) == 0
        rows[lengths > self.width, -1] = info.eos_id
        return rows, self._padding(rows, lengths)

    def _cut_mask(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> MaskArray:
        mask = np.empty((len(starts), self.width), np.uint8)
        self._cut(self.shards.mask_rows, starts, lengths, mask)
        mask[np.arange(self.width) >= lengths[:, None]] = 0
        return mask

    def _cut(
        self,
        rows_of: Callable[[NDArray[np.int64], int], NDArray[Any]],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        rows: NDArray[Any],
    ) -> None:
        """Fill `rows` [B, width] with the first elements of sequences; what follows their ends is undefined."""
        if self.width > self.shards.num_tokens:
            for row, start, length in zip(rows, starts, np.minimum(lengths, self.width), strict=True):
                row[:length] = rows_of(np.array([start]), int(length))[0]
            return
        # A full row is read for each sequence. The last ones of the dataset have too little after them: their rows are read from
        # further in front and shifted.
        shift = np.maximum(starts + self.width - self.shards.num_tokens, 0)
        rows[:] = rows_of(starts - shift, self.width)
        for place in np.flatnonzero(shift):
            rows[place] = np.roll(rows[place], -shift[place])

    def _mask(self, windows: NDArray[np.int64]) -> MaskArray:
        return self._cut_mask(*self._spans(windows))

    def segments(self, windows: NDArray[np.int64]) -> Segments:
        """Return the documents of a batch, each cut off where its window ends."""
        self._check(windows, len(self))
        return self._segments(windows, *self._spans(windows))

    def _segments(
        self, windows: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> Segments:
        present = lengths > 0
        return Segments(
            shape=(len(windows), self.width),
            rows=np.flatnonzero(present),
            columns=np.zeros(np.count_nonzero(present), np.int64),
            lengths=np.minimum(lengths, self.width)[present],
            documents=windows[present],
            starts=starts[present],
        )

    def locate(self, window: int) -> tuple[str, int]:
        """Return (shard name, token offset) of the document's first token."""
        starts, _ = self._spans(np.array([window]))
        return self.shards.name_and_offset(int(starts[0]))

    def window_of(self, shard: str, offset: int) -> int:
        """Return the document that holds a token, also one that is cut off."""
        self.shards.token_at(shard, offset)
        index = self.shards.index_of(shard)
        return int(self.shards.document_starts[index]) + self.shards.shard(index).sequence_of(offset)


class PairWindows(PadWindows):
    """One pair a window.

    A sample has `chosen_input_ids`, `chosen_targets`, `rejected_input_ids` and `rejected_targets` (`…_labels`, unshifted), each
    int64 [L]. Where there is one answer for a window, that of the chosen conversation is given: `segments`, `document_ids`, `locate`.
    """

    def __init__(self, shards: ShardSet, seq_len: int, *, labels: bool) -> None:
        super().__init__(shards, seq_len, labels=labels, documents_apart=False)

    @property
    def num_places(self) -> int:
        """Input positions of all windows, both sides."""
        return len(SIDES) * super().num_places

    def fetch(self, windows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return a batch, both sides of a pair each."""
        self._check(windows, len(self))
        sample: dict[str, Any] = {}
        for place, side in enumerate(SIDES):
            one_side = self._sample(*self._padded(*self._spans(len(SIDES) * windows + place)), None)
            sample |= {f"{side}_{name}": array for name, array in one_side.items()}
        return sample

    def segments(self, windows: NDArray[np.int64]) -> Segments:
        """Return the chosen sequences of a batch."""
        self._check(windows, len(self))
        return self._segments(windows, *self._spans(len(SIDES) * windows))

    def will_need(self, windows: NDArray[np.int64]) -> None:
        """Tell the system that both sides of these pairs are read soon."""
        self._check(windows, len(self))
        starts, lengths = self._spans((len(SIDES) * windows[:, None] + np.arange(len(SIDES))).ravel())
        self.shards.will_need(starts, starts + lengths)

    def locate(self, window: int) -> tuple[str, int]:
        """Return (shard name, token offset) of the chosen sequence's first token."""
        starts, _ = self._spans(np.array([len(SIDES) * window]))
        return self.shards.name_and_offset(int(starts[0]))

    def window_of(self, shard: str, offset: int) -> int:
        """Return the pair that holds a token on either side."""
        self.shards.token_at(shard, offset)
        index = self.shards.index_of(shard)
        sequence = int(self.shards.sequence_starts[index]) + self.shards.shard(index).sequence_of(offset)
        return sequence // len(SIDES)

    def _have_targets(self, windows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return in which pairs both sides have a target, as the loss compares them: bool [B]."""
        both = np.ones(len(windows), np.bool_)
        for place in range(len(SIDES)):
            both &= (self._cut_mask(*self._spans(len(SIDES) * windows + place))[:, 1:] != 0).any(axis=1)
        return both

"""The layouts concat, pad and pack: which tokens each takes into which window.

`windows.py` says what the layouts are, and opens them; what they share is in `window_base.py`, windows of pairs are in `pairs.py`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimind_data.errors import UserError
from minimind_data.format import MaskArray, TokenArray
from minimind_data.pack_plan import PackPlan
from minimind_data.segments import Segments, spread
from minimind_data.shards import ShardSet
from minimind_data.window_base import WindowsBase, mark_steps

_COPIED_TOKENS = (64, 8, 1)
"""A segment is copied in blocks of the greatest of these that it is not shorter than."""


class ConcatWindows(WindowsBase):
    """The token stream cut every L tokens; texts run on from window to window."""

    layout = "concat"
    padding = 0

    def __len__(self) -> int:
        """Return the number of full windows."""
        return max(0, (self.shards.num_tokens - (self.width - self.seq_len)) // self.seq_len)

    @property
    def unused_tokens(self) -> int:
        """Tokens after the last full window."""
        return self.shards.num_tokens - (len(self) * self.seq_len + self.width - self.seq_len)

    def rows(self, windows: NDArray[np.int64]) -> TokenArray:
        """Return the tokens of windows as they are on disk: uint16 or int32 [B, width]."""
        self._check(windows, len(self))
        return self.shards.rows(windows * self.seq_len, self.width)

    def will_need(self, windows: NDArray[np.int64]) -> None:
        """Tell the system that windows are read soon; see `Windows.will_need`."""
        self._check(windows, len(self))
        starts = windows * self.seq_len
        self.shards.will_need(starts, starts + self.width)

    def fetch(self, windows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return a batch; see `Windows.fetch`."""
        rows = self.rows(windows)
        ignored = self._mask(windows) == 0 if self._masked else None
        if not self.documents_apart:
            return self._sample(rows, ignored, None)
        segments = self.segments(windows)
        if ignored is None:
            ignored = np.zeros(rows.shape, np.bool_)
        mark_steps(ignored, segments)
        return self._sample(rows, ignored, segments)

    def _mask(self, windows: NDArray[np.int64]) -> MaskArray:
        return self.shards.mask_rows(windows * self.seq_len, self.width)

    def segments(self, windows: NDArray[np.int64]) -> Segments:
        """Return the documents of a batch; see `Windows.segments`. Those that begin or end outside are cut off there."""
        self._check(windows, len(self))
        begins = windows * self.seq_len
        ends = begins + self.width
        owners, sequences = self.shards.sequences_at(np.concatenate([begins, ends - 1]))
        first, last = np.split(self.shards.document_starts[owners] + sequences, 2)
        rows, parts = spread(last - first + 1)
        documents = first[rows] + parts
        starts, lengths = self._spans(documents)
        stops = np.minimum(starts + lengths, ends[rows])
        starts = np.maximum(starts, begins[rows])
        there = stops > starts  # a document without a token stands nowhere
        rows, starts = rows[there], starts[there]
        return Segments(
            shape=(len(windows), self.width),
            rows=rows,
            columns=starts - begins[rows],
            lengths=stops[there] - starts,
            documents=documents[there],
            starts=starts,
        )

    def locate(self, window: int) -> tuple[str, int]:
        """Return where a window begins; see `Windows.locate`."""
        return self.shards.name_and_offset(window * self.seq_len)

    def window_of(self, shard: str, offset: int) -> int:
        """Return the window that holds a token; see `Windows.window_of`.

        Raises:
            UserError: no such token, or it lies in the tail that fills no window.
        """
        window = self.shards.token_at(shard, offset) // self.seq_len
        if window >= len(self):
            raise UserError(
                f"{shard}:{offset} lies in the last {self.unused_tokens} tokens, which fill no window of {self.seq_len}"
            )
        return window


class PadWindows(WindowsBase):
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
        """Tokens cut off documents that are longer than a window; counted over all indexes when first asked for."""
        return self._count()[0]

    @property
    def padding(self) -> int:
        """Input positions that hold PAD; counted likewise."""
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
        """Return a batch; see `Windows.fetch`."""
        self._check(windows, len(self))
        starts, lengths = self._spans(windows)
        segments = self._segments(windows, starts, lengths) if self.documents_apart else None
        return self._sample(*self._padded(starts, lengths), segments)

    def _padded(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> tuple[TokenArray, NDArray[np.bool_]]:
        """Return (tokens, whether they are no target), both [B, width], of sequences of these tokens."""
        info = self.shards.manifest.tokenizer
        rows = np.empty((len(starts), self.width), self.shards.dtype)
        self._cut(self.shards.rows, self.shards.slice, starts, lengths, rows)
        rows[np.arange(self.width) >= lengths[:, None]] = info.pad_id
        if self._masked:
            return rows, self._cut_mask(starts, lengths) == 0
        rows[lengths > self.width, -1] = info.eos_id
        return rows, self._padding(rows, lengths)

    def _cut_mask(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> MaskArray:
        mask = np.empty((len(starts), self.width), np.uint8)
        self._cut(self.shards.mask_rows, self.shards.mask_slice, starts, lengths, mask)
        mask[np.arange(self.width) >= lengths[:, None]] = 0
        return mask

    def _cut(
        self,
        rows_of: Callable[[NDArray[np.int64], int], NDArray[Any]],
        slice_of: Callable[[int, int], NDArray[Any]],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        rows: NDArray[Any],
    ) -> None:
        """Fill `rows` [B, width] with the first elements of sequences; what is behind their ends is anything."""
        if self.width > self.shards.num_tokens:
            for row, start, length in zip(rows, starts, np.minimum(lengths, self.width), strict=True):
                row[:length] = slice_of(int(start), int(start + length))
            return
        # A full row for each; the last sequences of the dataset have nothing behind them, so their rows begin earlier and are
        # moved.
        shift = np.maximum(starts + self.width - self.shards.num_tokens, 0)
        rows[:] = rows_of(starts - shift, self.width)
        for place in np.flatnonzero(shift):
            rows[place] = np.roll(rows[place], -shift[place])

    def _mask(self, windows: NDArray[np.int64]) -> MaskArray:
        return self._cut_mask(*self._spans(windows))

    def segments(self, windows: NDArray[np.int64]) -> Segments:
        """Return the documents of a batch; see `Windows.segments`."""
        self._check(windows, len(self))
        return self._segments(windows, *self._spans(windows))

    def _segments(
        self, windows: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> Segments:
        there = lengths > 0
        return Segments(
            shape=(len(windows), self.width),
            rows=np.flatnonzero(there),
            columns=np.zeros(np.count_nonzero(there), np.int64),
            lengths=np.minimum(lengths, self.width)[there],
            documents=windows[there],
            starts=starts[there],
        )

    def locate(self, window: int) -> tuple[str, int]:
        """Return where a window begins; see `Windows.locate`."""
        starts, _ = self._spans(np.array([window]))
        return self.shards.name_and_offset(int(starts[0]))

    def window_of(self, shard: str, offset: int) -> int:
        """Return the document that holds a token; see `Windows.window_of`."""
        self.shards.token_at(shard, offset)
        index = self.shards.index_of(shard)
        return int(self.shards.document_starts[index]) + self.shards.shard(index).sequence_of(offset)


class PackWindows(WindowsBase):
    """Whole documents that together fill a window."""

    layout = "pack"

    def __init__(
        self, shards: ShardSet, seq_len: int, plan: PackPlan, *, labels: bool, documents_apart: bool
    ) -> None:
        super().__init__(shards, seq_len, labels=labels, documents_apart=documents_apart)
        self.plan = plan

    def __len__(self) -> int:
        """Return the number of windows."""
        return self.plan.num_windows

    @property
    def unused_tokens(self) -> int:
        """Tokens of documents longer than a window that are cut off or left out."""
        return self.plan.unused_tokens

    @property
    def padding(self) -> int:
        """Input positions that hold PAD."""
        # In shifted windows the last of `width` tokens is no input.
        in_last_column = 0 if self.labels else self.plan.full_windows
        return len(self) * self.seq_len - (self.plan.num_tokens - in_last_column)

    def fetch(self, windows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return a batch; see `Windows.fetch`."""
        segments, cut = self._segments(windows)
        info = self.shards.manifest.tokenizer
        rows = np.full(segments.shape, info.pad_id, self.shards.dtype)
        _copy(self.shards.rows, segments, rows)
        if self._masked:
            ignored = self._copied_mask(segments) == 0
        else:
            rows[segments.rows[cut], -1] = info.eos_id
            ignored = self._padding(rows, segments.filled)
        mark_steps(ignored, segments)
        return self._sample(rows, ignored, segments)

    def _copied_mask(self, segments: Segments) -> MaskArray:
        mask = np.zeros(segments.shape, np.uint8)
        _copy(self.shards.mask_rows, segments, mask)
        return mask

    def _mask(self, windows: NDArray[np.int64]) -> MaskArray:
        return self._copied_mask(self.segments(windows))

    def segments(self, windows: NDArray[np.int64]) -> Segments:
        """Return the documents of a batch; see `Windows.segments`."""
        return self._segments(windows)[0]

    def window_of(self, shard: str, offset: int) -> int:
        """Return the window that holds a token; see `Windows.window_of`.

        Raises:
            UserError: no such token, or its document is left out.
        """
        token = self.shards.token_at(shard, offset)
        (owner,), (sequence,) = self.shards.sequences_at(np.array([token]))
        document = int(self.shards.document_starts[owner] + sequence)
        (start,), (length,) = self._spans(np.array([document]))
        fragment = 0
        if self.plan.long_documents == "fragment":
            fragment = max(0, min(int(token - start), int(length) - 2)) // (self.width - 1)
        window = self.plan.window_of(document, fragment)
        if window is None:
            raise UserError(
                f"{shard}:{offset} is a token of document {document}, which is longer than a window and left out "
                "(--long-documents drop)"
            )
        return window

    def _segments(self, windows: NDArray[np.int64]) -> tuple[Segments, NDArray[np.intp]]:
        """Return the segments of a batch, and which of them lack the end of their document, EOS."""
        self._check(windows, len(self))
        begins = self.plan.offsets[windows]
        counts = self.plan.offsets[windows + 1] - begins
        rows, parts = spread(counts)
        places = begins[rows] + parts
        documents = self.plan.documents[places].astype(np.int64)
        starts, left = self._spans(documents)
        if self.plan.fragments is not None:
            before = self.plan.fragments[places].astype(np.int64) * (self.width - 1)
            starts, left = starts + before, left - before
        lengths = np.minimum(left, self.width)
        # Columns count from the row's own first segment.
        ends = np.cumsum(lengths)
        columns = ends - lengths
        columns -= columns[(np.cumsum(counts) - counts)[rows]]
        cut = left > self.width if self.plan.long_documents == "cut" else np.zeros(len(left), np.bool_)
        segments = Segments(
            shape=(len(windows), self.width),
            rows=rows,
            columns=columns,
            lengths=lengths,
            documents=documents,
            starts=starts,
        )
        return segments, np.flatnonzero(cut)


def _copy(
    read: Callable[[NDArray[np.int64], int], NDArray[Any]], segments: Segments, rows: NDArray[Any]
) -> None:
    """Copy the tokens of segments, or their mask, into their places in `rows` [B, width].

    A segment is copied in blocks, the last of which ends with it and overlaps the one before: so a batch takes one gather for
    each size of block, and no block reaches beyond its segment.
    """
    width = rows.shape[1]
    places = segments.rows * width + segments.columns
    longest = width
    for block in _COPIED_TOKENS:
        here = np.flatnonzero((segments.lengths >= block) & (segments.lengths <= longest))
        longest = block - 1
        if not len(here):
            continue
        wholes, parts = spread(-(-segments.lengths[here] // block))
        wholes = here[wholes]
        shifts = np.minimum(parts * block, segments.lengths[wholes] - block)
        blocks = np.ndarray(
            (rows.size - block + 1, block), rows.dtype, buffer=rows, strides=(rows.itemsize, rows.itemsize)
        )
        blocks[places[wholes] + shifts] = read(segments.starts[wholes] + shifts, block)

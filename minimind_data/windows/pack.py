"""Layout `pack`: whole documents that together fill a window, as the packing plan says (`pack_plan`)."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import FormatError, MaskArray
from minimind_data.dataset.plan_file import PACK_FOLDER_NAME
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.windows.base import Windows, ignore_first_tokens
from minimind_data.windows.pack_plan import PackPlan
from minimind_data.windows.segments import Segments, spread

_COPIED_TOKENS = (64, 8, 1)
"""Block sizes: a segment is copied in blocks of the largest size that is no longer than the segment."""


class PackWindows(Windows):
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
        # In shifted windows the last of `width` tokens is only a target.
        in_last_column = 0 if self.labels else self.plan.full_windows
        return len(self) * self.seq_len - (self.plan.num_tokens - in_last_column)

    def fetch(self, windows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return a batch, as many documents each as share a window."""
        segments, cut = self._segments(windows)
        info = self.shards.manifest.tokenizer
        rows = np.full(segments.shape, info.pad_id, self.shards.dtype)
        _copy(self.shards.rows, segments, rows)
        if self._masked:
            ignored = self._copied_mask(segments) == 0
        else:
            rows[segments.rows[cut], -1] = info.eos_id
            ignored = self._padding(rows, segments.filled)
        ignore_first_tokens(ignored, segments)
        return self._sample(rows, ignored, segments)

    def _copied_mask(self, segments: Segments) -> MaskArray:
        mask = np.zeros(segments.shape, np.uint8)
        _copy(self.shards.mask_rows, segments, mask)
        return mask

    def _mask(self, windows: NDArray[np.int64]) -> MaskArray:
        return self._copied_mask(self.segments(windows))

    def segments(self, windows: NDArray[np.int64]) -> Segments:
        """Return the documents of a batch, as the plan has them."""
        return self._segments(windows)[0]

    def window_of(self, shard: str, offset: int) -> int:
        """Return the window that holds a token; the whole plan is searched for its document.

        Raises:
            UserError: there is no such token, or its document is left out.
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
                f"{shard}:{offset} is a token of document {document}, which is longer than a window and left "
                "out (`long_documents` drop)",
                option="long_documents",
            )
        return window

    def _segments(self, windows: NDArray[np.int64]) -> tuple[Segments, NDArray[np.intp]]:
        """Return the segments of a batch, and the numbers of those whose document is cut, so that its EOS is missing."""
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
        # Columns are counted from the first segment of the same row.
        ends = np.cumsum(lengths)
        columns = ends - lengths
        columns -= columns[(np.cumsum(counts) - counts)[rows]]
        if (lengths < 0).any() or (columns + lengths > self.width).any():
            raise FormatError(
                "its plan of windows is of other documents",
                where=self.shards.folder,
                remedy=f"delete {PACK_FOLDER_NAME} in that folder: the plan is made again when it is needed",
            )
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

    A segment is copied in blocks; the last one ends where the segment ends and overlaps the block before it. So a batch takes one gather
    for each block size, and no block reaches beyond its segment.
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

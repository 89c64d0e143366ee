"""assign_documents(): which document of each length goes into which window, so that windows follow the corpus.

`bin_packing.py` says how many windows hold so many documents of this length and so many of that. Here documents are assigned to them:

- documents of one length are taken in the order of the corpus;
- the windows of every pattern are spread evenly from the first window to the last, so that all lengths are used up at the same
  pace, and documents that share a window stand near each other in the corpus;
- windows are sorted by their first documents, `_BLOCK_WINDOWS` of them at a time;
- inside a window documents stand in the order of the corpus: sorted by length, long texts would always come first.

Nothing here is random and nothing depends on the machine. Memory holds one block of documents or windows at a time; the documents
sorted by length, 4 bytes each, lie in a temporary file without a name.
"""

import contextlib
import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import REMAKE, FormatError
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.files import is_disk_full
from minimind_data.windows.base import LongDocuments
from minimind_data.windows.bin_packing import Packing
from minimind_data.windows.segments import spread

_BLOCK_DOCUMENTS = 2**20
_BLOCK_FRAGMENTS = 2**22
"""How many documents are read at a time, and how many fragments of them at most."""
_BLOCK_WINDOWS = 2**16
_BLOCK_SEGMENTS = 2**22
"""How many windows are sorted at a time, and about how many segments in them at most. The order of windows depends on both."""
_DOCUMENT_BITS = 45
_PLACE_BITS = 24
"""A key and the number that it belongs to are sorted as one integer: the number in this many low bits, the key above them."""
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class SegmentCounts:
    """The segments of a dataset, counted by length."""

    shards: ShardSet
    width: int
    long_documents: LongDocuments
    histogram: NDArray[np.int64]
    """Segments of 0, 1, …, width tokens: int64 [width + 1]; there are none of 0."""
    num_long: int
    """Documents longer than a window."""
    unused_tokens: int
    """Tokens that stand in no window because their document is cut or dropped."""

    @property
    def fragmented(self) -> bool:
        """Whether there are segments that are not the first part of their document."""
        return self.long_documents == "fragment" and self.num_long > 0


@dataclass(frozen=True, kw_only=True)
class WindowBlock:
    """Some consecutive windows, and the documents in them."""

    sizes: NDArray[np.int64]
    """Segments in each: int64 [B]."""
    documents: NDArray[np.int64]
    """The document of each segment, window by window: int64 [S]."""
    fragments: NDArray[np.int64] | None
    """Which part of its document it is: int64 [S]; None where all are part 0."""


def count_segments(shards: ShardSet, width: int, long_documents: LongDocuments) -> SegmentCounts:
    """Count the segments of every length.

    Raises:
        FormatError: a shard's index is damaged.
    """
    histogram = np.zeros(width + 1, np.int64)
    num_long = num_tokens = 0
    for first, lengths in _documents(shards):
        num_long += int(np.count_nonzero(lengths > width))
        # Neighbouring fragments share a token, which is counted once.
        for segments in _segments(first, lengths, width, long_documents):
            histogram += np.bincount(segments.lengths, minlength=width + 1)
            num_tokens += int(segments.lengths.sum() - np.count_nonzero(segments.fragments))
    return SegmentCounts(
        shards=shards,
        width=width,
        long_documents=long_documents,
        histogram=histogram,
        num_long=num_long,
        unused_tokens=shards.num_tokens - num_tokens,
    )


def assign_documents(counts: SegmentCounts, packing: Packing, folder: Path) -> Iterator[WindowBlock]:
    """Assign all segments to the windows of a packing, and yield these in order.

    Args:
        counts: the segments.
        packing: `best_fit` of their histogram.
        folder: where the temporary file may be.

    Raises:
        OSError: there is no room for it.
    """
    first_places = np.cumsum(counts.histogram) - counts.histogram
    num_segments = int(counts.histogram.sum())
    number = "<u4" if counts.shards.num_documents <= 2**32 else "<u8"
    with (
        _scratch(folder, num_segments, number) as documents,
        _scratch(folder, num_segments if counts.fragmented else 0, "<u4") as fragments,
    ):
        free = first_places.copy()
        for first, lengths in _documents(counts.shards):
            for segments in _segments(first, lengths, counts.width, counts.long_documents):
                order, places = _next_places(segments.lengths, free)
                documents[places] = segments.documents[order]
                if counts.fragmented:
                    fragments[places] = segments.fragments[order]
        next_places = first_places.copy()
        for windows, lengths in _window_blocks(packing):
            order, places = _next_places(lengths, next_places)
            chosen = np.empty(len(lengths), np.int64)
            chosen[order] = documents[places]
            parts = None
            if counts.fragmented:
                parts = np.empty(len(lengths), np.int64)
                parts[order] = fragments[places]
            yield _in_order(windows, chosen, parts)


@dataclass(frozen=True, kw_only=True)
class _Segments:
    """A block of segments in the order of the corpus, each array int64 [S]."""

    lengths: NDArray[np.int64]
    documents: NDArray[np.int64]
    fragments: NDArray[np.int64]


def _documents(shards: ShardSet) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield (number of the first document, lengths int64 [B]) of every block of documents."""
    for index, entry in enumerate(shards.manifest.shards):
        if not entry.written.sequences:
            continue
        shard = shards.open_shard(index)
        num_tokens = 0
        for start in range(0, entry.written.sequences, _BLOCK_DOCUMENTS):
            lengths = shard.lengths[start : start + _BLOCK_DOCUMENTS].astype(np.int64)
            num_tokens += int(lengths.sum())
            if int(lengths.min()) < 0:
                break
            yield int(shards.document_starts[index]) + start, lengths
        if num_tokens != entry.written.tokens:
            raise FormatError(
                f"damaged (its lengths do not sum up to {entry.written.tokens:,} tokens)",
                where=f"{shards.folder / entry.name}.idx",
                remedy=REMAKE,
            )


def _segments(
    first: int, lengths: NDArray[np.int64], width: int, long_documents: LongDocuments
) -> Iterator[_Segments]:
    """Yield the segments of the documents from number `first` on, which have these lengths."""
    if long_documents != "fragment" or int(lengths.max()) <= width:
        documents = np.flatnonzero((lengths > 0) & ((lengths <= width) | (long_documents == "cut")))
        yield _Segments(
            lengths=np.minimum(lengths[documents], width),
            documents=first + documents,
            fragments=np.zeros(len(documents), np.int64),
        )
        return
    counts = np.maximum(-(-(lengths - 1) // (width - 1)), np.minimum(lengths, 1))
    # A block of documents may have any number of segments, so it is divided where there are too many.
    blocks = np.cumsum(counts) // _BLOCK_FRAGMENTS
    for chosen in np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(blocks)) + 1):
        wholes, fragments = spread(counts[chosen])
        documents = chosen[wholes]
        left = lengths[documents] - fragments * (width - 1)
        yield _Segments(lengths=np.minimum(left, width), documents=first + documents, fragments=fragments)


def _next_places(
    lengths: NDArray[np.int64], following: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the next place for each of these segments among those of its length.

    Args:
        lengths: int64 [S].
        following: int64 [width + 1], the next free place of each length; changed in place.

    Returns:
        (the segments sorted by length, equal ones in the order in which they came; the place of each), both int64 [S].
    """
    order = _argsort(lengths)
    keys = lengths[order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    counts = np.diff(starts, append=len(keys))
    present = keys[starts]
    places = np.arange(len(keys)) + np.repeat(following[present] - starts, counts)
    following[present] += counts
    return order, places


def _argsort(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a stable argsort of values from 0 to 2^39, several times as fast as numpy's."""
    if len(values) >= 1 << _PLACE_BITS:
        return np.argsort(values, kind="stable")
    return np.sort(values << _PLACE_BITS | np.arange(len(values))) & ((1 << _PLACE_BITS) - 1)


def _window_blocks(packing: Packing) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (the window of each segment, counted within the block; its length), both int64 [S], for one block of windows at a time."""
    num_segments = int(packing.windows @ packing.segments)
    num_blocks = max(-(-packing.num_windows // _BLOCK_WINDOWS), -(-num_segments // _BLOCK_SEGMENTS))
    patterns = np.arange(len(packing.windows))
    # Window j of a pattern stands at the fraction (j + phase) / windows of the way from the first window to the last. With one phase for
    # all, patterns of a single window would all stand at the same place; multiples of the golden ratio spread them.
    phases = (patterns * _GOLDEN_RATIO) % 1.0
    before = np.zeros(len(patterns), np.int64)
    num_runs = np.diff(packing.run_starts)
    for block in range(num_blocks):
        until = np.ceil(packing.windows * ((block + 1) / num_blocks) - phases).astype(np.int64)
        until = packing.windows if block == num_blocks - 1 else np.clip(until, before, packing.windows)
        wholes, parts = spread(until - before)
        if not len(wholes):
            continue
        times = (before[wholes] + parts + phases[wholes]) / packing.windows[wholes]
        pattern = wholes[_argsort((times * 2**_PLACE_BITS).astype(np.int64))]
        before = until
        windows, runs = spread(num_runs[pattern])
        runs += packing.run_starts[pattern[windows]]
        counts = packing.run_counts[runs]
        yield np.repeat(windows, counts), np.repeat(packing.run_lengths[runs], counts)


def _in_order(
    windows: NDArray[np.int64], documents: NDArray[np.int64], fragments: NDArray[np.int64] | None
) -> WindowBlock:
    """Return windows sorted by their first documents, and the documents sorted inside each."""
    starts = np.flatnonzero(np.diff(windows, prepend=-1))
    firsts = np.minimum.reduceat(documents, starts)
    order = _argsort(firsts - firsts.min())
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    sizes = np.diff(starts, append=len(windows))[order]
    keys = ranks[windows] << _DOCUMENT_BITS | documents
    if fragments is None:
        keys.sort()
    else:
        by_key = np.argsort(keys, kind="stable")
        keys, fragments = keys[by_key], fragments[by_key]
    return WindowBlock(sizes=sizes, documents=keys & ((1 << _DOCUMENT_BITS) - 1), fragments=fragments)


@contextlib.contextmanager
def _scratch(folder: Path, count: int, dtype: str) -> Iterator[NDArray[Any]]:
    """Yield an array in a temporary file, or in memory where the file system cannot reserve room for it.

    Room is reserved because writing to the map of a file on a full disk would kill the process.
    """
    num_bytes = count * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        reserved = False
        if num_bytes and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                reserved = True
            except OSError as error:
                if is_disk_full(error):
                    raise
        yield (
            np.frombuffer(mmap.mmap(file.fileno(), num_bytes), dtype) if reserved else np.empty(count, dtype)
        )

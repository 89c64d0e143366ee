"""assign_documents(): which document of each length goes into which window, so that windows follow the corpus.

`packing.py` says how many windows hold so many documents of this length and so many of that. Here documents are assigned to them:

- those of one length are taken in the order of the corpus;
- the windows of every pattern are spread evenly from the first window to the last, so that all lengths are used up at the same
  pace, and documents that share a window were not far apart;
- windows are put in the order of their first documents, `_BLOCK_WINDOWS` of them at a time;
- inside a window documents stand in the order of the corpus: sorted by length, long texts would always come first.

Nothing here is random and nothing depends on the machine. Memory holds a block of documents or windows at a time; the documents
sorted by length, 4 bytes each, lie in a nameless file.
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
from minimind_data.windows.best_fit import LongDocuments, Packing
from minimind_data.windows.segments import spread

_BLOCK_DOCUMENTS = 2**20
_BLOCK_FRAGMENTS = 2**22
"""Documents that are read at a time, and at most so many fragments of them."""
_BLOCK_WINDOWS = 2**16
_BLOCK_SEGMENTS = 2**22
"""Windows that are put in order at a time, and about so many segments in them at most. The order depends on these two."""
_DOCUMENT_BITS = 45
_PLACE_BITS = 24
"""Numbers are sorted together with what they belong to, as one integer: the key above so many bits, the number below."""
_GOLDEN = (math.sqrt(5) - 1) / 2


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
        """Whether a segment may be another part of its document than the first."""
        return self.long_documents == "fragment" and self.num_long > 0


@dataclass(frozen=True, kw_only=True)
class WindowBlock:
    """Some windows in a row, and the documents in them."""

    sizes: NDArray[np.int64]
    """Segments in each: int64 [B]."""
    documents: NDArray[np.int64]
    """The document of each segment, window by window: int64 [S]."""
    fragments: NDArray[np.int64] | None
    """Which part of its document it is: int64 [S]; None where all are the part 0."""


def count_segments(shards: ShardSet, width: int, long_documents: LongDocuments) -> SegmentCounts:
    """Count the segments of every length.

    Raises:
        FormatError: a shard's index is damaged.
    """
    histogram = np.zeros(width + 1, np.int64)
    num_long = num_tokens = 0
    for first, lengths in _documents(shards):
        num_long += int(np.count_nonzero(lengths > width))
        # Each step from a token to the next counts once, also where fragments share a token; so does each document's first.
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


def assign_documents(found: SegmentCounts, packing: Packing, folder: Path) -> Iterator[WindowBlock]:
    """Assign all segments to the windows of a packing, and yield these in order.

    Args:
        found: the segments.
        packing: `best_fit` of their histogram.
        folder: where the nameless file may be.

    Raises:
        OSError: it has no room there.
    """
    first_places = np.cumsum(found.histogram) - found.histogram
    num_segments = int(found.histogram.sum())
    number = "<u4" if found.shards.num_documents <= 2**32 else "<u8"
    with (
        _scratch(folder, num_segments, number) as documents,
        _scratch(folder, num_segments if found.fragmented else 0, "<u4") as fragments,
    ):
        free = first_places.copy()
        for first, lengths in _documents(found.shards):
            for segments in _segments(first, lengths, found.width, found.long_documents):
                order, places = _next_places(segments.lengths, free)
                documents[places] = segments.documents[order]
                if found.fragmented:
                    fragments[places] = segments.fragments[order]
        taken = first_places.copy()
        for windows, lengths in _window_blocks(packing):
            order, places = _next_places(lengths, taken)
            chosen = np.empty(len(lengths), np.int64)
            chosen[order] = documents[places]
            parts = None
            if found.fragmented:
                parts = np.empty(len(lengths), np.int64)
                parts[order] = fragments[places]
            yield _ordered(windows, chosen, parts)


@dataclass(frozen=True, kw_only=True)
class _Segments:
    """A block of segments, in the order of the corpus; all int64 [S]."""

    lengths: NDArray[np.int64]
    documents: NDArray[np.int64]
    fragments: NDArray[np.int64]


def _documents(shards: ShardSet) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield (number of the first document, lengths int64 [B]) of every block of documents."""
    for index, entry in enumerate(shards.manifest.shards):
        if not entry.sequences:
            continue
        shard = shards.open_shard(index)
        num_tokens = 0
        for start in range(0, entry.sequences, _BLOCK_DOCUMENTS):
            lengths = shard.lengths[start : start + _BLOCK_DOCUMENTS].astype(np.int64)
            num_tokens += int(lengths.sum())
            if int(lengths.min()) < 0:
                break
            yield int(shards.document_starts[index]) + start, lengths
        if num_tokens != entry.tokens:
            raise FormatError(
                f"{shards.folder / entry.name}.idx: damaged (its lengths do not sum up to {entry.tokens:,} tokens); {REMAKE}"
            )


def _segments(
    first: int, lengths: NDArray[np.int64], width: int, long_documents: LongDocuments
) -> Iterator[_Segments]:
    """Yield what documents from number `first` on, of these lengths, make."""
    if long_documents != "fragment" or int(lengths.max()) <= width:
        documents = np.flatnonzero((lengths > 0) & ((lengths <= width) | (long_documents == "cut")))
        yield _Segments(
            lengths=np.minimum(lengths[documents], width),
            documents=first + documents,
            fragments=np.zeros(len(documents), np.int64),
        )
        return
    counts = np.maximum(-(-(lengths - 1) // (width - 1)), np.minimum(lengths, 1))
    # A block of documents may have any number of segments, so it is cut where these get too many.
    blocks = np.cumsum(counts) // _BLOCK_FRAGMENTS
    for chosen in np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(blocks)) + 1):
        wholes, fragments = spread(counts[chosen])
        documents = chosen[wholes]
        left = lengths[documents] - fragments * (width - 1)
        yield _Segments(lengths=np.minimum(left, width), documents=first + documents, fragments=fragments)


def _next_places(
    lengths: NDArray[np.int64], following: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give each of these segments the next place among those of its length.

    Args:
        lengths: int64 [S].
        following: int64 [width + 1], the next place of each length; moved on.

    Returns:
        (the segments, by length and then as they came; the places of these), both int64 [S].
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
    """Return the order of values from 0 to 2^39, equal ones as they came: several times as fast as a stable argsort."""
    if len(values) >= 1 << _PLACE_BITS:
        return np.argsort(values, kind="stable")
    return np.sort(values << _PLACE_BITS | np.arange(len(values))) & ((1 << _PLACE_BITS) - 1)


def _window_blocks(packing: Packing) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (window of each segment, counted within the block; its length), both int64 [S], a block of windows at a time."""
    num_segments = int(packing.windows @ packing.segments)
    num_blocks = max(-(-packing.num_windows // _BLOCK_WINDOWS), -(-num_segments // _BLOCK_SEGMENTS))
    patterns = np.arange(len(packing.windows))
    # Window j of a pattern stands at (j + phase) / windows of the whole. With one phase for all, patterns of one window would
    # all stand at the same place; multiples of the golden ratio spread them.
    phases = (patterns * _GOLDEN) % 1.0
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


def _ordered(
    windows: NDArray[np.int64], documents: NDArray[np.int64], fragments: NDArray[np.int64] | None
) -> WindowBlock:
    """Put windows in the order of their first documents, and documents in order inside each."""
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
    """Give an array in a nameless file, or in memory where the file system reserves no room.

    Room is reserved, because writing to a map of a file on a full disk would kill the process.
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

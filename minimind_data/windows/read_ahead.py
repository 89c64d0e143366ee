"""ReadAhead: reading windows from a slow disk before they are needed.

A gather from memory maps waits for one page after the other, while a disk serves dozens at once as quickly as one. So the system is told
beforehand (`madvise`) which windows are read: all of this batch, and those of a later one. It reads them in the meantime. Left
to itself it would read far around each window, since it cannot know that the next one is somewhere else.

Windows are small, and a disk is faster when it reads in order. So where memory can hold the whole dataset, a stretch of it is asked for
beside each batch that is scattered over the dataset, front to back, until everything has been read.

Where everything is in the page cache, asking is useless and costs more than a gather. Each thread's counters say whether
a batch came from a disk; after one that did not, nothing is asked for until one does.
"""

import itertools
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.shard import Shard
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.windows.base import WindowSource

_CHUNK_BYTES = 2**20
_WINDOWS_PER_CHUNK = 32
"""Beside a batch of 64 windows of 1 KiB, which takes 64 reads of some 4 KiB, 2 MiB are read in order: that takes about as long."""
_NEAR_WINDOWS = 64
_THREAD = getattr(resource, "RUSAGE_THREAD", None)


class ReadAhead:
    """Fetches batches, all in one thread, and asks the system for them beforehand while they come from a disk."""

    def __init__(self, windows: WindowSource) -> None:
        self._windows = windows
        self._waits = _THREAD is not None
        self._begun = False
        self._rest: Iterator[tuple[Shard, int, int]] | None = None

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        """Pickle as a new one: another process may find something else in the page cache."""
        return (type(self), (self._windows,))

    def fetch(
        self, windows: NDArray[np.int64], later: Callable[[], NDArray[np.int64]] | None = None
    ) -> dict[str, NDArray[np.int64]]:
        """Return a batch, as `WindowSource.fetch` does.

        Args:
            windows: int64 [B], the batch.
            later: returns the windows of a later batch; called only where they are to be read ahead.
        """
        before = _disk_reads()
        if self._waits:
            self._ask(windows)
            # Somebody waits for the first batch; what comes later can be asked for beside the second.
            if self._begun:
                if later is not None:
                    self._ask(later())
                if _are_scattered(windows):
                    self._read_on(-(-len(windows) // _WINDOWS_PER_CHUNK))
        batch = self._windows.fetch(windows)
        self._begun = True
        self._waits = _disk_reads() != before
        return batch

    def _ask(self, windows: NDArray[np.int64]) -> None:
        if len(windows):
            self._windows.will_need(windows)

    def _read_on(self, num_chunks: int) -> None:
        if self._rest is None:
            self._rest = _chunks(self._windows.shard_sets)
        for shard, start, stop in itertools.islice(self._rest, num_chunks):
            shard.will_need(start, stop)


def _are_scattered(windows: NDArray[np.int64]) -> bool:
    """Tell whether a batch comes from all over the dataset; windows in blocks bring their neighbours with them anyway."""
    return len(windows) > 1 and bool(np.median(np.diff(np.sort(windows))) > _NEAR_WINDOWS)


def _chunks(shard_sets: tuple[ShardSet, ...]) -> Iterator[tuple[Shard, int, int]]:
    """Yield all of the datasets as (shard, first token, token after the last), or nothing where they would not fit in memory."""
    if 2 * sum(shards.num_tokens * shards.dtype.itemsize for shards in shard_sets) > _available_bytes():
        return
    for shards in shard_sets:
        step = _CHUNK_BYTES // shards.dtype.itemsize
        for shard in shards:
            for start in range(0, len(shard.tokens), step):
                yield shard, start, start + step


def _disk_reads() -> int:
    """Return how often this thread has read from disks: page faults that had to read, and blocks; 0 where the system does not say."""
    if _THREAD is None:
        return 0
    usage = resource.getrusage(_THREAD)
    return usage.ru_majflt + usage.ru_inblock


def _available_bytes() -> int:
    """Return the bytes of memory that are available without pushing anything else out; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024

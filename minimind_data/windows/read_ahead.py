"""ReadAhead: windows from a disk that takes its time.

A gather from memory maps waits for one page after the other, while a disk serves dozens at once as quickly as one. So windows that will be
read are named to the system beforehand (`madvise`), all of a batch and those of a batch that comes later; it reads them meanwhile. Left
alone it would read far around each, since it cannot know that the next is somewhere else.

Windows are small, and a disk gives more by the row. So where memory holds the whole dataset, some of it is asked for in order beside each
batch that is scattered over it, until all has been.

A system that has everything in its page cache need not be told, and telling it costs more than a gather. Each thread's counters say whether
a batch came from a disk; when one did not, nothing is asked for any more, until one does.
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
"""A batch of 64 windows of 1 KiB, which are as many reads of some 4 KiB, is accompanied by 2 MiB in a row: about as long a wait."""
_NEAR_WINDOWS = 64
_THREAD = getattr(resource, "RUSAGE_THREAD", None)


class ReadAhead:
    """Fetches batches, all by one thread, and asks for them beforehand while they come from a disk."""

    def __init__(self, windows: WindowSource) -> None:
        self._windows = windows
        self._waits = _THREAD is not None
        self._begun = False
        self._rest: Iterator[tuple[Shard, int, int]] | None = None

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        """Pickle as a new one: what is in the page cache is not the same elsewhere."""
        return (type(self), (self._windows,))

    def fetch(
        self, windows: NDArray[np.int64], later: Callable[[], NDArray[np.int64]] | None = None
    ) -> dict[str, NDArray[np.int64]]:
        """Return a batch, as `WindowSource.fetch` does.

        Args:
            windows: int64 [B], the batch.
            later: says which windows are read some batches later; called only where that matters.
        """
        before = _disk_reads()
        if self._waits:
            self._ask(windows)
            # The first batch is what somebody waits for; whatever comes later may be asked for with the second.
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
    """Whether a batch comes from all over the dataset; one that does not, as in a shuffle of blocks, brings its neighbours with it."""
    return len(windows) > 1 and bool(np.median(np.diff(np.sort(windows))) > _NEAR_WINDOWS)


def _chunks(shard_sets: tuple[ShardSet, ...]) -> Iterator[tuple[Shard, int, int]]:
    """All of the datasets, as (shard, first token, the one behind the last), unless memory would not hold them."""
    if 2 * sum(shards.num_tokens * shards.dtype.itemsize for shards in shard_sets) > _available_bytes():
        return
    for shards in shard_sets:
        step = _CHUNK_BYTES // shards.dtype.itemsize
        for shard in shards:
            for start in range(0, len(shard.tokens), step):
                yield shard, start, start + step


def _disk_reads() -> int:
    """What this thread has waited for or asked of disks: page faults that had to read, and blocks; 0 where the system does not say."""
    if _THREAD is None:
        return 0
    usage = resource.getrusage(_THREAD)
    return usage.ru_majflt + usage.ru_inblock


def _available_bytes() -> int:
    """Memory that can be had without anything else being pushed out; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024

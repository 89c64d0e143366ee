"""The windows of several datasets as if they were those of one."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.windows.base import Windows


class MixedWindows:
    """The windows of all parts as one list, a `WindowSource`, numbered part after part as in `MixtureOrder`."""

    def __init__(self, names: Sequence[str], parts: Sequence[Windows]) -> None:
        self.names = tuple(names)
        self.parts = tuple(parts)
        self.seq_len = parts[0].seq_len
        self.labels = parts[0].labels
        self._starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of windows of all parts."""
        return int(self._starts[-1])

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={part!r}" for name, part in zip(self.names, self.parts, strict=True))
        return f"MixedWindows({parts})"

    def fetch(self, windows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return a batch, with one gather for each part that is in it."""
        if len(windows) and (windows.min() < 0 or windows.max() >= len(self)):
            raise IndexError(f"windows {windows.min()}…{windows.max()} asked for, there are {len(self)}")
        owners = np.searchsorted(self._starts, windows, side="right") - 1
        batch: dict[str, NDArray[np.int64]] = {}
        for part in np.unique(owners).tolist() or [0]:  # a batch of no windows has arrays too
            here = owners == part
            for name, rows in self.parts[part].fetch(windows[here] - self._starts[part]).items():
                batch.setdefault(name, np.empty((len(windows), *rows.shape[1:]), rows.dtype))[here] = rows
        return batch

    @property
    def shard_sets(self) -> tuple[ShardSet, ...]:
        """The datasets of the parts."""
        return tuple(part.shards for part in self.parts)

    def will_need(self, windows: NDArray[np.int64]) -> None:
        """Tell the system that a batch is read soon, each part for itself."""
        owners = np.searchsorted(self._starts, windows, side="right") - 1
        for part in np.unique(owners).tolist():
            self.parts[part].will_need(windows[owners == part] - self._starts[part])

    def locate(self, window: int) -> tuple[str, int]:
        """Return (PART/SHARD, token offset) of the first token of a window."""
        part = int(np.searchsorted(self._starts, window, side="right")) - 1
        shard, offset = self.parts[part].locate(window - int(self._starts[part]))
        return f"{self.names[part]}/{shard}", offset

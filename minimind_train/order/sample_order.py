"""Which sample comes when: the order of a run, as arithmetic on its position.

A **position** counts samples from the beginning of the run, across epochs. It is the one number that a run stores of its way through the
data. `SampleOrder` turns positions into windows and back, and `rank_positions` is a rank's share of a global batch. Neither knows of
devices, micro-batches or prefetching, so none of these can change the order.
"""

import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from minimind_data.permutation import Permutation
from minimind_train.order.block_permutation import BlockPermutation

__all__ = ["OrderKind", "SampleOrder", "check_range", "check_shares", "rank_positions"]

OrderKind = Literal["shuffled", "sequential"]

_permutation: Final = lru_cache(maxsize=16)(Permutation)
_block_permutation: Final = lru_cache(maxsize=16)(BlockPermutation)
"""Cached, so that keys are mixed once: successive batches touch one or two epochs."""


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """The order of one dataset's windows: `epoch, i = divmod(position, num_windows)`, then a permutation of the epoch.

    Attributes:
        num_windows: n, the windows of the dataset; every epoch visits each once.
        seed: decides the shuffle. Sequential order ignores it.
        kind: `shuffled`, differently in each epoch, or `sequential`, as in the shards.
        block: number of neighbouring windows that stay together in the shuffle, see `block_permutation`; 1 shuffles single windows.
            Sequential order ignores it.
    """

    num_windows: int
    seed: int = 0
    kind: OrderKind = "shuffled"
    block: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(OrderKind):
            raise ValueError(f"`order` must be shuffled or sequential, not {self.kind!r}")
        if self.num_windows < 1:
            raise ValueError(
                "there are no windows to put in order: the dataset is empty, or shorter than one window"
            )
        if self.block < 1:
            raise ValueError(f"`shuffle_block` must be at least 1, not {self.block}")
        Permutation(self.num_windows, self.seed, 0)  # refuses what it cannot take

    def described(self, position: int) -> dict[str, Any]:  # noqa: ARG002 - the same everywhere, as against a mixture
        """What decides the order before a position, as JSON holds it: what a saved position must agree in."""
        description = {"num_windows": self.num_windows, "seed": self.seed, "order": self.kind}
        return description | ({"shuffle_block": self.block} if self.block > 1 else {})

    def windows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows at these positions, which may lie in any epochs and in any order."""
        positions = np.asarray(positions, np.int64)
        if positions.size == 0:
            return np.empty_like(positions)
        if positions.min() < 0:
            raise ValueError(f"a position counts samples from 0, and cannot be {positions.min()}")
        epochs, indices = np.divmod(positions, self.num_windows)
        if self.kind == "sequential":
            return indices
        first = int(epochs.flat[0])
        if (epochs == first).all():  # nearly always
            return self._permutation(first)[indices]
        windows = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            windows[here] = self._permutation(epoch)[indices[here]]
        return windows

    def window(self, position: int) -> tuple[int, int]:
        """The epoch of a position and the window that stands there."""
        if position < 0:
            raise ValueError(f"a position counts samples from 0, and cannot be {position}")
        epoch, index = divmod(operator.index(position), self.num_windows)
        return epoch, index if self.kind == "sequential" else self._permutation(epoch)[index]

    def position_of(self, window: int, epoch: int = 0) -> int:
        """The position at which an epoch visits a window."""
        if not 0 <= window < self.num_windows:
            raise ValueError(f"window {window} is outside 0 to {self.num_windows - 1}")
        if epoch < 0:
            raise ValueError(f"epochs count from 0, and cannot be {epoch}")
        index = window
        if self.kind == "shuffled":
            index = self._permutation(epoch).inverse(window)
        return epoch * self.num_windows + operator.index(index)

    def _permutation(self, epoch: int) -> Permutation | BlockPermutation:
        if self.block == 1:
            return _permutation(self.num_windows, self.seed, epoch)
        return _block_permutation(self.num_windows, self.block, self.seed, epoch)


def rank_positions(start: int, stop: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """A rank's share of the global batch [start, stop): every `world_size`-th position, beginning with the `rank`-th.

    The shares of all ranks are the batch, each position once. When the batch is short, shares differ by one, and may be empty.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to world_size - 1, not {rank} of {world_size}")
    if not 0 <= start <= stop:
        raise ValueError(
            f"a batch is a range of positions [start, stop) from 0 upwards, not [{start}, {stop})"
        )
    return np.arange(start + rank, stop, world_size, dtype=np.int64)


def check_shares(global_batch: int, rank: int, world_size: int) -> None:
    """Refuse a global batch that its ranks cannot share.

    Raises:
        ValueError: there is no such rank, or fewer samples than ranks.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to world_size - 1, not {rank} of {world_size}")
    if global_batch < world_size:
        raise ValueError(
            f"`global_batch` must be at least one sample for each of {world_size} ranks, not {global_batch}"
        )


def check_range(start: int, stop: int) -> None:
    """Refuse a range of positions that begins before 0 or runs backwards.

    Raises:
        ValueError: it does.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"positions count from 0 and a run goes forward, not from {start} to {stop}")

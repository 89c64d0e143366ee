"""A shuffled order for slow disks: blocks of neighbours are shuffled, and so are the windows inside each block.

`BlockPermutation(n, block, seed, epoch)` is a bijection of range(n), computed per index. It consists of a `Permutation` of the blocks, and
one for each block of the windows in it. A run then reads one block after the other, so a disk reads `block` neighbouring windows before it
has to seek. The last block may be shorter. It is shuffled among the others all the same, and what comes after it stands that much earlier.

Smaller blocks shuffle better: samples that are neighbours in the shards stay within a block of each other.
"""

import operator
from functools import lru_cache
from typing import Final, overload

import numpy as np
from numpy.typing import NDArray

from minimind_data.permutation import Permutation
from minimind_train.order.seeds import derive_seed

__all__ = ["BlockPermutation"]

_inside: Final = lru_cache(maxsize=256)(Permutation)
"""Cached, as successive batches touch few blocks."""


class BlockPermutation:
    """The shuffle of range(n) in blocks for a seed and an epoch; indexed by an int or an array of int64."""

    def __init__(self, n: int, block: int, seed: int, epoch: int) -> None:
        self._n, self._block = operator.index(n), operator.index(block)
        if self._block < 1:
            raise ValueError(f"a block has at least 1 window, not {block}")
        num_blocks = -(-self._n // self._block)
        self._blocks = Permutation(num_blocks, derive_seed("blocks", seed), epoch)
        self._seed = derive_seed("inside", seed, epoch)
        # The last block, its slot among the shuffled ones, and how many windows it is short of a full block.
        self._last = num_blocks - 1
        self._short_slot = self._blocks.inverse(self._last)
        self._missing = num_blocks * self._block - self._n

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[np.int64]: ...

    def __getitem__(self, index: int | NDArray[np.int64]) -> int | NDArray[np.int64]:
        if not isinstance(index, np.ndarray):
            return int(self[np.array([operator.index(index)], np.int64)][0])
        self._check(index)
        end_of_short = (self._short_slot + 1) * self._block - self._missing
        slots, offsets = np.divmod(np.where(index < end_of_short, index, index + self._missing), self._block)
        blocks = self._blocks[slots]
        return blocks * self._block + self._each(blocks, offsets, inverse=False)

    @overload
    def inverse(self, value: int) -> int: ...
    @overload
    def inverse(self, value: NDArray[np.int64]) -> NDArray[np.int64]: ...

    def inverse(self, value: int | NDArray[np.int64]) -> int | NDArray[np.int64]:
        """The index at which `value` stands: `p.inverse(p[i]) == i`."""
        if not isinstance(value, np.ndarray):
            return int(self.inverse(np.array([operator.index(value)], np.int64))[0])
        self._check(value)
        blocks, offsets = np.divmod(value, self._block)
        slots = self._blocks.inverse(blocks)
        index = slots * self._block + self._each(blocks, offsets, inverse=True)
        return np.where(slots > self._short_slot, index - self._missing, index)

    def _each(
        self, blocks: NDArray[np.int64], offsets: NDArray[np.int64], *, inverse: bool
    ) -> NDArray[np.int64]:
        """Permute the offsets within blocks, each by its own block's permutation."""
        permuted = np.empty_like(offsets)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            size = self._block - (self._missing if block == self._last else 0)
            permutation = _inside(size, self._seed, block)
            permuted[here] = permutation.inverse(offsets[here]) if inverse else permutation[offsets[here]]
        return permuted

    def _check(self, numbers: NDArray[np.int64]) -> None:
        if numbers.size and (numbers.min() < 0 or numbers.max() >= self._n):
            raise IndexError(f"indices {numbers.min()} to {numbers.max()} are not all in range({self._n})")

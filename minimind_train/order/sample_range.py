"""The samples of a range of positions: what a run or a step is to learn, as arithmetic on the numbers of its samples."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minimind_train.order.mixture import Order
from minimind_train.order.sample_order import check_range
from minimind_train.order.skips import NO_SKIPS, Skips

__all__ = ["SampleRange"]


@dataclass(frozen=True, kw_only=True)
class SampleRange:
    """The samples at the positions from `start` to `stop` - 1, without those that are left out; numbered from 0.

    Attributes:
        order: which window stands at which position.
        start: the first position.
        stop: the position after the last.
        skips: positions that are left out.
    """

    order: Order
    start: int
    stop: int
    skips: Skips = NO_SKIPS

    def __post_init__(self) -> None:
        check_range(self.start, self.stop)

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.skips.count(self.start, self.stop)

    def position_after(self, num_samples: int) -> int:
        """Return the position after so many samples of the range; `start` itself for none."""
        return self.skips.after(self.start, num_samples)

    def positions(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of samples by their numbers, int64 of the same shape."""
        return self.skips.kept(numbers + self.skips.kept_before(self.start))

    def windows(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the windows of samples by their numbers, int64 of the same shape."""
        return self.order.windows(self.positions(numbers))

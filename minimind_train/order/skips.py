"""Positions that a run leaves out, for example those on which it diverged, as arithmetic.

A range A:B leaves out the positions A to B - 1 for good. Their samples are not learned, but no other sample moves up: every position means
what it meant before. Global batches are made of the positions that are kept, so they keep their size.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_POSITION", "NO_SKIPS", "Skips"]

MAX_POSITION = 2**62
"""Beyond any position that a run can reach."""

_RANGE = re.compile(r"([0-9]{1,19}):([0-9]{1,19})")


@dataclass(frozen=True)
class Skips:
    """Ranges of positions that are left out.

    Attributes:
        ranges: (first, last + 1) of each, ascending, with at least one kept position between two.
    """

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, texts: Iterable[str]) -> Self:
        """Read ranges written A:B, in any order; they may overlap.

        Raises:
            ValueError: one of them is not a range.
        """
        ranges: list[tuple[int, int]] = []
        for text in texts:
            match = _RANGE.fullmatch(text)
            first, stop = map(int, match.groups()) if match else (0, 0)
            if not first < stop <= MAX_POSITION:
                raise ValueError(
                    f"`skip_positions` must be A:B, which leaves out the positions A to B - 1, such as 64000:64256, not {text!r}"
                )
            ranges.append((first, stop))
        merged: list[tuple[int, int]] = []
        for first, stop in sorted(ranges):
            if merged and first <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((first, stop))
        return cls(tuple(merged))

    def as_texts(self) -> tuple[str, ...]:
        """Return the ranges as `of` reads them."""
        return tuple(f"{first}:{stop}" for first, stop in self.ranges)

    def kept_before(self, position: int) -> int:
        """Return the number of kept positions before this one."""
        return position - sum(min(stop, position) - first for first, stop in self.ranges if first < position)

    def count(self, start: int, stop: int) -> int:
        """Return the number of kept positions in [start, stop)."""
        return self.kept_before(stop) - self.kept_before(start)

    def kept(self, numbers: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return kept positions by their number among all kept ones: int64 of the same shape."""
        numbers = np.asarray(numbers, np.int64)
        if not self.ranges:
            return numbers
        lengths = np.array([stop - first for first, stop in self.ranges], np.int64)
        skipped = np.cumsum(np.concatenate([[0], lengths]))
        # The number, among kept positions, of the first one after each range: the start of the range less all that is skipped before.
        num_before = np.array([first for first, _ in self.ranges], np.int64) - skipped[:-1]
        positions: NDArray[np.int64] = numbers + skipped[np.searchsorted(num_before, numbers, side="right")]
        return positions

    def after(self, start: int, num_samples: int) -> int:
        """Return the position after so many kept ones from `start` on; `start` itself for none."""
        if not num_samples:
            return start
        return int(self.kept([self.kept_before(start) + num_samples - 1])[0]) + 1


NO_SKIPS = Skips()

"""best_fit(): which lengths share a window, planned on the histogram of lengths alone.

Documents of one length are interchangeable to a planner. So it works on the number of documents of each length, and its result is how
many windows are filled in which way (a *pattern*: so many documents of this length, so many of that). The rule is best fit
decreasing: the longest first, each into the fullest window that still has room for it. Documents of one length that go into
windows with the same room go there all at once. So the time grows with the number of distinct lengths, at most 2,048 in windows of
2,048 tokens, and not with the number of documents, even if there are a billion.

Where only a few lengths remain, none of them very short, best fit leaves a gap in many windows that nothing fits into. So
the planning is done a second time, looking one length ahead: where the gap would be lost, another length is mixed in so that the window
is filled exactly, if any length allows that. The plan with fewer windows is taken.

Which document of a length goes where is decided in `assignment.py`.

Best fit decreasing never takes more than 11/9 of the fewest windows possible, plus 4 (Johnson, "Near-optimal bin packing
algorithms", 1973); with many short documents among the long ones it takes hardly more than tokens / width.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_TRIED_COUNTS = 64
"""How many counts of the longer of two lengths are tried when they are mixed."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How many windows have which pattern. A pattern is a list of runs, each so many segments of one length."""

    width: int
    "Sequence length: tokens in a window."
    windows: NDArray[np.int64]
    """How many windows each pattern has: int64 [P]."""
    run_starts: NDArray[np.int64]
    """Where the runs of each pattern begin, ending with R: int64 [P + 1]."""
    run_lengths: NDArray[np.int64]
    """Tokens of each segment of a run, descending within a pattern: int64 [R]."""
    run_counts: NDArray[np.int64]
    """Segments of a run, in one window: int64 [R]."""

    @property
    def num_windows(self) -> int:
        """Windows of all patterns."""
        return int(self.windows.sum())

    @property
    def segments(self) -> NDArray[np.int64]:
        """Segments in a window of each pattern: int64 [P]."""
        return _summed(self.run_counts, self.run_starts)

    @property
    def filled(self) -> NDArray[np.int64]:
        """Tokens in a window of each pattern: int64 [P]."""
        return _summed(self.run_counts * self.run_lengths, self.run_starts)

    def padding(self, seq_len: int) -> NDArray[np.int64]:
        """Return how many of the first `seq_len` positions of a window of each pattern are empty: int64 [P]."""
        return np.maximum(seq_len - self.filled, 0)


def _summed(values: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.diff(np.concatenate([[0], np.cumsum(values)])[starts])


def best_fit(histogram: NDArray[np.int64]) -> Packing:
    """Fill windows: best fit decreasing, looking one length ahead where that takes fewer windows.

    Args:
        histogram: int64 [width + 1], how many segments have 0, 1, …, width tokens; those of 0 tokens are left out.
    """
    plain, exact = (_Filling(histogram, look_ahead=look_ahead).packing() for look_ahead in (False, True))
    return exact if exact.num_windows < plain.num_windows else plain


class _Filling:
    """Windows while they are filled; all windows with the same content are one group.

    A group remembers what was put in last and which group it was before that, so its content is a chain. When something is put
    into some windows of a group, these become a group of their own.

    Args:
        histogram: see `best_fit`.
        look_ahead: mix another length in where the gap in a window would be too small for anything that is still to come.
    """

    def __init__(self, histogram: NDArray[np.int64], *, look_ahead: bool) -> None:
        self._width = len(histogram) - 1
        self._look_ahead = look_ahead
        self._left = histogram.copy()
        self._left[0] = 0
        # By group: the group it was before (-1: empty windows), what was put in then, and how many windows it still has.
        self._before: list[int] = []
        self._runs: list[tuple[int, int]] = []
        self._windows: list[int] = []
        self._by_room: dict[int, list[int]] = {}
        self._rooms: list[int] = []
        """The keys of `_by_room`, ascending, for a binary search for the least room that is enough."""
        lengths = np.flatnonzero(self._left)
        self._least = int(lengths[0]) if len(lengths) else 0
        for length in lengths[::-1].tolist():
            self._place(length)

    def _place(self, length: int) -> None:
        """Put in all segments of a length; all longer ones are in already."""
        while count := int(self._left[length]):
            at = bisect_left(self._rooms, length)
            room = self._rooms[at] if at < len(self._rooms) else self._width
            group = self._by_room[room][-1] if at < len(self._rooms) else -1
            # Put in one at a time, segments would all go to the same window until its room is less than `length`, since it is the
            # best fit all that time. So windows take `each` of them at once; what remains goes into one more.
            each = min(room // length, count)
            runs = [(length, each)]
            if self._look_ahead and 0 < room - each * length < self._least:
                runs = self._exact_fill(room, length) or runs
            windows = min(int(self._left[run_length]) // times for run_length, times in runs)
            if group >= 0:
                windows = min(windows, self._windows[group])
                self._take(group, windows, room)
            for number, (run_length, times) in enumerate(runs, 1):
                self._left[run_length] -= windows * times
                room -= run_length * times
                group = self._add(group, (run_length, times), windows if number == len(runs) else 0, room)

    def _exact_fill(self, room: int, length: int) -> list[tuple[int, int]] | None:
        """Return two runs that fill a room to the last token, with as many of `length` as possible, or None."""
        others = np.flatnonzero(self._left[:length])[::-1]
        most = min(room // length, int(self._left[length]))
        firsts = np.arange(most, max(0, most - _TRIED_COUNTS), -1)
        rests = room - length * firsts[:, None]
        fits = (rests % others == 0) & (rests // others <= self._left[others])
        (solutions,) = np.nonzero(fits.ravel())
        if not len(solutions):
            return None
        first, other = divmod(int(solutions[0]), len(others))
        return [(length, int(firsts[first])), (int(others[other]), int(rests[first, 0] // others[other]))]

    def _take(self, group: int, windows: int, room: int) -> None:
        self._windows[group] -= windows
        if not self._windows[group]:
            self._by_room[room].pop()
            if not self._by_room[room]:
                del self._by_room[room]
                del self._rooms[bisect_left(self._rooms, room)]

    def _add(self, before: int, run: tuple[int, int], windows: int, room: int) -> int:
        self._before.append(before)
        self._runs.append(run)
        self._windows.append(windows)
        group = len(self._windows) - 1
        if room and windows:
            if room not in self._by_room:
                self._by_room[room] = []
                insort(self._rooms, room)
            self._by_room[room].append(group)
        return group

    def packing(self) -> Packing:
        """Return what the groups hold."""
        starts, runs, windows = [0], [], []
        for last, count in enumerate(self._windows):
            if not count:
                continue
            content = []
            group = last
            while group >= 0:
                content.append(self._runs[group])
                group = self._before[group]
            runs += content[::-1]
            starts.append(len(runs))
            windows.append(count)
        table = np.array(runs, np.int64).reshape(-1, 2)
        return Packing(
            width=self._width,
            windows=np.array(windows, np.int64),
            run_starts=np.array(starts, np.int64),
            run_lengths=np.ascontiguousarray(table[:, 0]),
            run_counts=np.ascontiguousarray(table[:, 1]),
        )

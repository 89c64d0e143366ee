"""best_fit(): which lengths share a window, planned on the histogram of lengths alone.

Documents of one length are alike to a planner, so it works on how many there are of each length, and its result is how many
windows are filled in which way (a *pattern*: so many documents of this length, so many of that). The rule is best fit
decreasing: the longest first, each into the fullest window that still has room for it. Documents of one length that go into
windows with the same room go there all at once, so the time grows with the number of distinct lengths, of which a window of
2,048 tokens knows 2,048, and not with the number of documents, be it a billion.

Where all that is left to come is of a few lengths, none very short, best fit leaves a rest in many windows that nothing fits. So
it is done a second time, with a look ahead: where the rest would be lost, another length is mixed in so that the window comes out
even, if one of the lengths can. The plan with fewer windows is taken.

Which document of a length goes where is decided in `pack_plan.py`.

Best fit decreasing never takes more than 11/9 of the fewest windows possible, plus 4 (Johnson, "Near-optimal bin packing
algorithms", 1973); with many short documents among the long ones it takes hardly more than tokens / width.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

LongDocuments = Literal["cut", "fragment", "drop"]
"""What becomes of a document that alone is longer than a window: its first tokens and EOS fill one window (`cut`, as layout
`pad` does), it goes on in further windows (`fragment`), or it is left out (`drop`)."""
_MIXTURES = 64
"""How many numbers of the longer of two lengths are tried."""
LONG_DOCUMENTS: tuple[LongDocuments, ...] = get_args(LongDocuments)


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Windows by pattern. A pattern is a list of runs: so many segments of one length."""

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
        """Return how many of the first `seq_len` places of a window of each pattern hold nothing: int64 [P]."""
        return np.maximum(seq_len - self.filled, 0)


def _summed(values: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.diff(np.concatenate([[0], np.cumsum(values)])[starts])


def best_fit(histogram: NDArray[np.int64]) -> Packing:
    """Fill windows: best fit decreasing, looking one length ahead where that takes fewer windows.

    Args:
        histogram: int64 [width + 1], how many segments have 0, 1, …, width tokens; those of none take no place.
    """
    plain, even = (_Filling(histogram, look_ahead=look_ahead).packing() for look_ahead in (False, True))
    return even if even.num_windows < plain.num_windows else plain


class _Filling:
    """Windows that are being filled, all those with the same content as one group.

    A group remembers what was put in last and which group it was before that, so content is a chain. When something is put
    into some windows of a group, they become a group of their own.

    Args:
        histogram: see `best_fit`.
        look_ahead: mix another length in where the rest of a window would be too small for anything that is still to come.
    """

    def __init__(self, histogram: NDArray[np.int64], *, look_ahead: bool) -> None:
        self._width = len(histogram) - 1
        self._look_ahead = look_ahead
        self._left = histogram.copy()
        self._left[0] = 0
        # By group: the group it was before (-1: empty windows), what was put in then, and how many windows are in it still.
        self._before: list[int] = []
        self._runs: list[tuple[int, int]] = []
        self._windows: list[int] = []
        self._by_room: dict[int, list[int]] = {}
        self._rooms: list[int] = []
        """The keys of `_by_room`, ascending: where a search for the least room begins."""
        lengths = np.flatnonzero(self._left)
        self._least = int(lengths[0]) if len(lengths) else 0
        for length in lengths[::-1].tolist():
            self._place(length)

    def _place(self, length: int) -> None:
        """Put in all segments of a length; the longer ones are in."""
        while count := int(self._left[length]):
            at = bisect_left(self._rooms, length)
            room = self._rooms[at] if at < len(self._rooms) else self._width
            group = self._by_room[room][-1] if at < len(self._rooms) else -1
            # One by one, a window would take one after the other until its room is less than `length`, being the best fit all
            # that time. So windows take `each` at once; what is left in the end goes into one more.
            each = min(room // length, count)
            runs = [(length, each)]
            if self._look_ahead and 0 < room - each * length < self._least:
                runs = self._even(room, length) or runs
            windows = min(int(self._left[run_length]) // times for run_length, times in runs)
            if group >= 0:
                windows = min(windows, self._windows[group])
                self._take(group, windows, room)
            for number, (run_length, times) in enumerate(runs, 1):
                self._left[run_length] -= windows * times
                room -= run_length * times
                group = self._add(group, (run_length, times), windows if number == len(runs) else 0, room)

    def _even(self, room: int, length: int) -> list[tuple[int, int]] | None:
        """Return two runs that fill a room to the last token, with as many of `length` as can be, or None."""
        others = np.flatnonzero(self._left[:length])[::-1]
        most = min(room // length, int(self._left[length]))
        firsts = np.arange(most, max(0, most - _MIXTURES), -1)
        rests = room - length * firsts[:, None]
        fits = (rests % others == 0) & (rests // others <= self._left[others])
        found = np.flatnonzero(fits)
        if not len(found):
            return None
        first, other = divmod(int(found[0]), len(others))
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

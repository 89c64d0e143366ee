"""Several datasets in one order: which part a position is taken from, and which of its windows, by arithmetic.

A **pattern** of `period` positions repeats. In each period every part has its **share**, a whole number of positions, spread as evenly as
possible: after any number of positions, the windows taken from a part differ from its exact share by less than one (Tijdeman, "The
chairman assignment problem", 1980, whose bound of 1 - 1/(2k - 2) for k parts is the best possible). So a division and a look into
the pattern say how many windows of a part were taken before a position. The next one is what the part's own `SampleOrder` has at that
number: each part has its own epochs, shuffled by its own seed.

When the shares change during a run, a new **stage** (`MixtureStage`) begins. It notes how many windows were taken from each part until
then, so that every part goes on where it was.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from minimind_train.order.sample_order import OrderKind, SampleOrder
from minimind_train.order.seeds import derive_seed

MAX_PERIOD: Final = 10_000
"""The longest pattern. Weights that no shorter one meets exactly are met to one part in ten thousand."""

MAX_PARTS: Final = 100
"""More datasets than this are better merged."""

_Ints = NDArray[np.int64]


def shares_of(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Return the share of each part, in windows of a period, for weights in windows.

    They are exact where a period of at most `MAX_PERIOD` can be. Otherwise each is less than one window of `MAX_PERIOD` off; only a part
    that would get no window at all is given one, as long as it has any weight.

    Raises:
        ValueError: a weight is negative, all are 0, or there are more than `MAX_PARTS`.
    """
    if not 1 <= len(weights) <= MAX_PARTS:
        raise ValueError(f"a mixture has 1 to {MAX_PARTS} parts, not {len(weights)}")
    total = sum(weights)
    if min(weights) < 0 or not total:
        raise ValueError("the weights of a mixture are 0 or more, and one at least is more")
    exact_shares = [weight / total for weight in weights]
    period = math.lcm(*(share.denominator for share in exact_shares))
    if period <= MAX_PERIOD:
        return tuple(int(share * period) for share in exact_shares)
    shares = [max(share > 0, math.floor(share * MAX_PERIOD)) for share in exact_shares]
    while (missing := MAX_PERIOD - sum(shares)) != 0:  # at most once for each part
        sign = 1 if missing > 0 else -1
        free = [part for part, share in enumerate(exact_shares) if share and (sign > 0 or shares[part] > 1)]
        most = max(free, key=lambda part: sign * (exact_shares[part] * MAX_PERIOD - shares[part]))
        shares[most] += sign
    divisor = math.gcd(*shares)
    return tuple(share // divisor for share in shares)


@dataclass(frozen=True, kw_only=True)
class MixtureStage:
    """The shares that hold from a position on.

    Attributes:
        start: the position.
        shares: windows of each part in a period.
        taken: windows taken from each part before `start`.
    """

    start: int
    shares: tuple[int, ...]
    taken: tuple[int, ...]

    def __post_init__(self) -> None:
        if min(self.start, *self.shares, *self.taken) < 0 or self.period > MAX_PERIOD:
            raise ValueError(
                f"a stage of a mixture has a start, counts and shares of 0 or more, the shares at most {MAX_PERIOD} together, not {self}"
            )

    @property
    def period(self) -> int:
        """Positions after which the pattern repeats."""
        return sum(self.shares)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return what `values` was made from, as JSON gives it back."""
        return cls(start=int(values["start"]), shares=tuple(values["shares"]), taken=tuple(values["taken"]))

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {"start": self.start, "shares": list(self.shares), "taken": list(self.taken)}


@dataclass(frozen=True, kw_only=True)
class PartWindow:
    """The window of a mixture that stands at a position."""

    part: int
    epoch: int
    """The epoch of the part, from 0."""
    window: int
    """The window's number in the part."""


@lru_cache(maxsize=16)
def _pattern(shares: tuple[int, ...]) -> tuple[_Ints, _Ints]:
    """Return (the part at each slot of a period, how many earlier slots are the same part's), both int64 [period].

    A part may have a slot once it is far enough behind its share, and must have it before it is too far behind. Of the parts that may,
    each slot goes to the one that must the soonest.
    """
    period, taken = sum(shares), [0] * len(shares)
    active = [part for part, share in enumerate(shares) if share]
    slack = 2 * len(active) - 2
    parts, numbers = np.zeros(period, np.int64), np.zeros(period, np.int64)
    if len(active) == 1:
        parts[:] = active[0]
        numbers[:] = np.arange(period)
        return parts, numbers
    for slot in range(period):
        chosen, chosen_deadline = -1, 0
        for part in active:
            share = shares[part]
            if slack * ((slot + 1) * share - period * taken[part]) < period:
                continue
            deadline = slack * (taken[part] + 1) - 1  # in units of period / (slack * share)
            if chosen < 0 or deadline * shares[chosen] < chosen_deadline * share:
                chosen, chosen_deadline = part, deadline
        parts[slot], numbers[slot] = chosen, taken[chosen]
        taken[chosen] += 1
    assert tuple(taken) == shares
    return parts, numbers


@dataclass(frozen=True, kw_only=True)
class MixtureOrder:
    """The order of a mixture. Its windows are those of all parts, numbered part after part.

    Attributes:
        names: of the parts, ascending, so that how they are listed changes nothing.
        parts: the order of each.
        stages: which shares hold from where on; the first begins at 0.
        seed: of the run; the parts' are mixed from it.
        kind: of all parts.
    """

    names: tuple[str, ...]
    parts: tuple[SampleOrder, ...]
    stages: tuple[MixtureStage, ...]
    seed: int = 0
    kind: OrderKind = "shuffled"

    def __post_init__(self) -> None:
        if list(self.names) != sorted(set(self.names)) or len(self.names) != len(self.parts):
            raise ValueError(f"the parts of a mixture have names of their own, ascending, not {self.names}")
        starts = [stage.start for stage in self.stages]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise ValueError(f"the stages of a mixture begin at 0 and then later and later, not at {starts}")
        for stage in self.stages:
            if not len(stage.shares) == len(stage.taken) == len(self.parts) or stage.period < 1:
                raise ValueError(f"a stage has a share and a count for each of {len(self.parts)} parts")

    @classmethod
    def of(
        cls,
        num_windows: Mapping[str, int],
        *,
        seed: int,
        kind: OrderKind = "shuffled",
        block: int = 1,
        stages: Sequence[MixtureStage],
    ) -> Self:
        """Return the order of parts with so many windows each."""
        names = tuple(sorted(num_windows))
        orders = (
            SampleOrder(num_windows=num_windows[name], seed=derive_seed(seed, name), kind=kind, block=block)
            for name in names
        )
        return cls(names=names, parts=tuple(orders), stages=tuple(stages), seed=seed, kind=kind)

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{name} {order.num_windows:,}" for name, order in zip(self.names, self.parts, strict=True)
        )
        stages = ", ".join(
            f"{':'.join(map(str, stage.shares))} from position {stage.start:,}" for stage in self.stages
        )
        return f"MixtureOrder(windows: {parts}; shares: {stages}; {self.kind}, seed={self.seed})"

    @property
    def num_windows(self) -> int:
        """The windows of all parts together."""
        return int(self.starts[-1])

    @cached_property
    def starts(self) -> _Ints:
        """The number of each part's first window, ending with the number of windows: int64 [parts + 1]."""
        return np.cumsum([0, *(order.num_windows for order in self.parts)], dtype=np.int64)

    def described(self, position: int) -> dict[str, Any]:
        """What decides the order before a position; see `SampleOrder.described`."""
        before = [stage.as_dict() for stage in self.stages if stage.start < max(position, 1)]
        sizes = {name: part.num_windows for name, part in zip(self.names, self.parts, strict=True)}
        description = self.parts[0].described(position) | {"num_windows": sizes, "seed": self.seed}
        return description | {"stages": before}

    def windows(self, positions: _Ints) -> _Ints:
        """The windows at these positions, which may come in any order."""
        positions = np.asarray(positions, np.int64)
        owners, numbers = self._parts_at(positions)
        windows = np.empty_like(positions)
        for part in np.unique(owners).tolist():
            here = owners == part
            windows[here] = self.parts[part].windows(numbers[here]) + self.starts[part]
        return windows

    def window(self, position: int) -> PartWindow:
        """The part that a position is taken from, and its window there."""
        (owner,), (number,) = self._parts_at(np.array([position], np.int64))
        epoch, window = self.parts[owner].window(int(number))
        return PartWindow(part=int(owner), epoch=epoch, window=window)

    def taken(self, position: int) -> tuple[int, ...]:
        """How many windows are taken from each part before a position."""
        if position < 0:
            raise ValueError(f"a position counts samples from 0, and cannot be {position}")
        stage = next(stage for stage in reversed(self.stages) if stage.start <= position)
        periods, rest = divmod(position - stage.start, stage.period)
        parts, _ = _pattern(stage.shares)
        in_last_period = np.bincount(parts[:rest], minlength=len(self.parts)).tolist()
        return tuple(
            before + periods * share + more
            for before, share, more in zip(stage.taken, stage.shares, in_last_period, strict=True)
        )

    def reweighted(self, position: int, shares: tuple[int, ...]) -> Self:
        """Return the order in which other shares hold from a position on, while every part goes on where it was.

        What was to hold from there on or later holds no longer.
        """
        stages = tuple(stage for stage in self.stages if stage.start < position)
        taken = self.taken(position)
        return replace(self, stages=(*stages, MixtureStage(start=position, shares=shares, taken=taken)))

    def _parts_at(self, positions: _Ints) -> tuple[_Ints, _Ints]:
        """Return (the part at each position, how many of its windows were taken before), both int64 of the positions' shape."""
        if positions.size and positions.min() < 0:
            raise ValueError(f"a position counts samples from 0, and cannot be {positions.min()}")
        starts = np.array([stage.start for stage in self.stages], np.int64)
        stage_numbers = np.searchsorted(starts, positions, side="right") - 1
        owners, numbers = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(stage_numbers).tolist():
            stage, here = self.stages[number], stage_numbers == number
            parts, before = _pattern(stage.shares)
            periods, slots = np.divmod(positions[here] - stage.start, stage.period)
            owner = parts[slots]
            owners[here] = owner
            shares, taken = np.array(stage.shares, np.int64), np.array(stage.taken, np.int64)
            numbers[here] = taken[owner] + periods * shares[owner] + before[slots]
        return owners, numbers


Order = SampleOrder | MixtureOrder

"""Mixtures: every part as often as its share says, after any number of positions; its own windows in its own order."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_train.order.mixture import MAX_PARTS, MAX_PERIOD, MixtureOrder, MixtureStage, shares_of
from minimind_train.order.sample_order import SampleOrder
from minimind_train.order.seeds import derive_seed


def mixture(sizes, shares, seed=7, kind="shuffled"):
    first = MixtureStage(start=0, shares=tuple(shares), taken=(0,) * len(shares))
    return MixtureOrder.of(sizes, seed=seed, kind=kind, stages=[first])


def owners(order, positions):
    return np.searchsorted(order.starts, order.windows(np.asarray(positions)), side="right") - 1


SHARES = st.lists(st.integers(0, 60), min_size=1, max_size=7).filter(any)


@given(shares=SHARES)
def test_at_every_prefix_a_part_is_as_near_to_its_share_as_can_be(shares):
    order = mixture({f"part-{i}": 10**6 for i in range(len(shares))}, shares)
    period, active = sum(shares), sum(share > 0 for share in shares)
    turns = owners(order, np.arange(2 * period))
    given_so_far = np.cumsum(turns[:, None] == np.arange(len(shares)), axis=0)
    wanted = np.arange(1, 2 * period + 1)[:, None] * np.array(shares) / period
    bound = 1 - 1 / (2 * active - 2) if active > 1 else 0
    assert np.abs(given_so_far - wanted).max() <= bound + 1e-9
    assert given_so_far[period - 1].tolist() == shares
    assert (turns[:period] == turns[period:]).all()


@given(shares=SHARES, start=st.integers(0, 10**9), far=st.sampled_from([0, 10**9, 10**15]))
def test_far_on_too_the_share_is_within_one_window_of_the_wanted_one(shares, start, far):
    """From any position on, over one period and over a part of it, counted turn by turn."""
    order = mixture({f"part-{i}": 10**9 + 7 * i for i in range(len(shares))}, shares)
    period, begin = sum(shares), start + far
    turns = owners(order, begin + np.arange(period))
    counts = np.cumsum(turns[:, None] == np.arange(len(shares)), axis=0)
    assert counts[-1].tolist() == shares  # every period gives exactly the shares, wherever it begins
    for place in {0, period // 3, period - 1, period}:
        given_so_far = order.taken(begin + place)
        for share, taken in zip(shares, given_so_far, strict=True):
            assert abs(taken - Fraction((begin + place) * share, period)) < 1
    before, after = (np.array(order.taken(begin + place)) for place in (0, period))
    assert (after - before).tolist() == shares


@settings(deadline=None)
@given(shares=SHARES, data=st.data())
def test_every_part_goes_through_its_own_order_without_a_gap(shares, data):
    sizes = {f"part-{i}": data.draw(st.integers(1, 40)) for i in range(len(shares))}
    order = mixture(sizes, shares)
    windows = order.windows(np.arange(300))
    turns = owners(order, np.arange(300))
    for part, name in enumerate(order.names):
        own = SampleOrder(num_windows=sizes[name], seed=derive_seed(7, name))
        mine = windows[turns == part] - order.starts[part]
        assert mine.tolist() == own.windows(np.arange(len(mine))).tolist()


@settings(max_examples=40)
@given(shares=SHARES, changes=st.lists(st.tuples(st.integers(0, 80), SHARES), max_size=4))
def test_new_shares_leave_every_part_where_it_is(shares, changes):
    k = len(shares)
    order, begins = mixture({f"part-{i}": 11 for i in range(k)}, shares), 0
    for gap, other in changes:
        begins += gap
        order = order.reweighted(begins, tuple((other * k)[:k]) if any((other * k)[:k]) else (1,) * k)
    turns = owners(order, np.arange(begins + 100))
    windows = order.windows(np.arange(begins + 100))
    for part in range(k):
        mine = windows[turns == part] - order.starts[part]
        assert mine.tolist() == order.parts[part].windows(np.arange(len(mine))).tolist()
    for position in (0, 1, begins, begins + 57):
        counts = Counter(turns[:position].tolist())
        assert order.taken(position) == tuple(counts[part] for part in range(k))


def test_shares_that_change_twice_at_one_position_are_those_of_the_last_word():
    order = mixture({"a": 9, "b": 9}, (1, 1)).reweighted(40, (3, 1)).reweighted(60, (1, 9))
    assert order.reweighted(40, (1, 3)) == mixture({"a": 9, "b": 9}, (1, 1)).reweighted(40, (1, 3))
    assert order.reweighted(0, (1, 3)).stages == (MixtureStage(start=0, shares=(1, 3), taken=(0, 0)),)


@given(position=st.integers(0, 10**15), shares=SHARES)
def test_any_position_costs_what_the_first_does_and_agrees_with_its_neighbours(position, shares):
    order = mixture({f"part-{i}": 10**9 + i for i in range(len(shares))}, shares)
    there = order.window(position)
    before, after = order.taken(position), order.taken(position + 1)
    assert [b - a for a, b in zip(before, after, strict=True)] == [
        int(part == there.part) for part in range(len(shares))
    ]
    own = order.parts[there.part]
    assert own.window(before[there.part]) == (there.epoch, there.window)
    (window,) = order.windows(np.array([position]))
    assert window == order.starts[there.part] + there.window


def test_positions_may_come_in_any_order_across_stages():
    order = mixture({"a": 5, "b": 7, "c": 3}, (5, 3, 1)).reweighted(50, (1, 0, 1)).reweighted(111, (0, 4, 3))
    positions = np.random.default_rng(0).permutation(300)
    expected = [order.starts[p.part] + p.window for p in map(order.window, range(300))]
    assert order.windows(positions).tolist() == [expected[p] for p in positions]
    assert order.windows(np.array([], np.int64)).size == 0


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        (["0.7", "0.3"], (7, 3)),
        (["7", "3"], (7, 3)),
        (["1"], (1,)),
        (["0", "5"], (0, 1)),
        (["1/3", "2/3"], (1, 2)),
        (["0.25", "0.25", "0.5"], (1, 1, 2)),
        (["0.1234", "0.8766"], (617, 4383)),
        (["1e-9", "1"], (1, 9999)),
    ],
)
def test_weights_become_whole_shares(weights, shares):
    assert shares_of([Fraction(weight) for weight in weights]) == shares


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=20).filter(any))
def test_shares_are_near_the_weights_and_no_part_is_forgotten(weights):
    shares = shares_of([Fraction(weight) for weight in weights])
    period = sum(shares)
    assert 1 <= period <= MAX_PERIOD
    assert math.gcd(*shares) == 1
    assert [share > 0 for share in shares] == [weight > 0 for weight in weights]
    for share, weight in zip(shares, weights, strict=True):
        wanted = Fraction(weight, sum(weights))
        assert abs(Fraction(share, period) - wanted) < Fraction(len(weights), MAX_PERIOD)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=30).filter(lambda w: min(w) * MAX_PERIOD >= sum(w))
)
def test_in_every_period_a_part_is_within_one_window_of_its_weight(weights):
    """Also where no pattern is short enough to meet the weights exactly; but a part that is due less than once in the longest gets one."""
    shares = shares_of([Fraction(weight) for weight in weights])
    for share, weight in zip(shares, weights, strict=True):
        assert abs(Fraction(share) - Fraction(weight, sum(weights)) * sum(shares)) < 1


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([1, MAX_PERIOD - 1], (1, MAX_PERIOD - 1)),  # the longest pattern that is exact
        ([1, MAX_PERIOD], (1, MAX_PERIOD - 1)),
        (
            [MAX_PERIOD - 2, 1, 2],
            (MAX_PERIOD - 3, 1, 2),
        ),  # one window over: the part that is the most ahead of its share has one fewer
        ([19, 99_981], (1, 4_999)),  # 1.9 and 9,998.1 windows: the one that is missing goes to the first
        (
            [4, 4, 20, 99_972],
            (1, 1, 1, 9_997),
        ),  # 0.4, 0.4, 2 and 9,997.2: one is too many, and the third has the least below its share
        ([1] * MAX_PARTS, (1,) * MAX_PARTS),
        ([0] * (MAX_PARTS - 1) + [5], (0,) * (MAX_PARTS - 1) + (1,)),
    ],
)
def test_at_the_limits_weights_become_the_nearest_shares(weights, shares):
    assert shares_of([Fraction(weight) for weight in weights]) == shares


def test_seeds_of_parts_have_nothing_to_do_with_each_other():
    seeds = {derive_seed(seed, name) for seed in range(20) for name in ("a", "b", "1", "")}
    assert len(seeds) == 80
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_what_makes_no_mixture_is_refused():
    with pytest.raises(ValueError, match="one at least is more"):
        shares_of([Fraction(0), Fraction(0)])
    with pytest.raises(ValueError, match="0 or more"):
        shares_of([Fraction(-1), Fraction(2)])
    for count in (0, MAX_PARTS + 1):
        with pytest.raises(ValueError, match=f"1 to 100 parts, not {count}"):
            shares_of([Fraction(1)] * count)
    good = mixture({"a": 1, "b": 1}, (1, 1))
    with pytest.raises(ValueError, match="ascending"):
        MixtureOrder(names=("b", "a"), parts=good.parts, stages=good.stages)
    with pytest.raises(ValueError, match="begin at 0"):
        MixtureOrder(names=good.names, parts=good.parts, stages=())
    with pytest.raises(ValueError, match="a share and a count for each of 2 parts"):
        MixtureOrder(
            names=good.names, parts=good.parts, stages=(MixtureStage(start=0, shares=(1,), taken=(0,)),)
        )
    with pytest.raises(ValueError, match="a share and a count for each of 2 parts"):
        good.reweighted(5, (0, 0))
    for call in (good.window, good.taken, lambda position: good.windows(np.array([2, position, 1]))):
        for position in (-1, -5):
            with pytest.raises(ValueError, match=f"cannot be {position}"):
                call(position)


def test_it_has_the_windows_of_all_parts_and_says_what_decides_the_order_before_a_position():
    order = mixture({"b": 21, "a": 30}, (1, 2), seed=1).reweighted(24, (2, 1))
    assert order.num_windows == 51
    assert order.starts.tolist() == [0, 30, 51]
    first, second = (
        {"start": start, "shares": list(shares), "taken": list(taken)}
        for start, shares, taken in ((0, (1, 2), (0, 0)), (24, (2, 1), (8, 16)))
    )
    expected = {"num_windows": {"a": 30, "b": 21}, "seed": 1, "order": "shuffled", "stages": [first]}
    for position in (0, 1, 24):
        assert order.described(position) == expected
    assert order.described(25) == {**expected, "stages": [first, second]}
    in_blocks = MixtureOrder.of({"a": 30, "b": 21}, seed=1, block=4, stages=order.stages)
    assert in_blocks.described(0) == {**expected, "shuffle_block": 4}


def test_by_default_it_is_shuffled_by_seed_0():
    order = MixtureOrder(
        names=("a",), parts=(SampleOrder(num_windows=1),), stages=mixture({"a": 1}, (1,)).stages
    )
    assert (order.seed, order.kind) == (order.parts[0].seed, order.parts[0].kind) == (0, "shuffled")


def test_a_stretch_comes_back_from_json():
    stage = MixtureStage(start=5, shares=(1, 2), taken=(2, 3))
    assert MixtureStage.of(stage.as_dict()) == stage


def test_the_order_of_a_mixture_is_pinned():
    order = mixture({"en": 1_000, "zh": 5_000}, (3, 7), seed=42).reweighted(1_000_000, (1, 1))
    assert owners(order, np.arange(10)).tolist() == GOLDEN_TURNS
    assert order.windows(np.array([0, 1, 2, 999_999, 1_000_000, 10**9])).tolist() == GOLDEN_WINDOWS


GOLDEN_TURNS = [1, 0, 1, 1, 0, 1, 1, 1, 0, 1]
GOLDEN_WINDOWS = [5110, 599, 2805, 4978, 873, 682]


def test_what_it_says_of_itself():
    order = MixtureOrder.of(
        {"zh": 1200, "en": 30}, seed=7, stages=(MixtureStage(start=0, shares=(1, 3), taken=(0, 0)),)
    ).reweighted(4000, (1, 1))
    assert repr(order) == (
        "MixtureOrder(windows: en 30, zh 1,200; shares: 1:3 from position 0, 1:1 from position 4,000; shuffled, seed=7)"
    )

"""Ranges of positions that are left out: the rest is what it was, in order, each once."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minimind_train.order.skips import MAX_POSITION, NO_SKIPS, Skips

RANGES = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 20)), max_size=6)


def skips_of(ranges):
    return Skips.of(f"{first}:{first + length}" for first, length in ranges)


@given(ranges=RANGES)
def test_what_is_kept_is_what_is_in_no_range(ranges):
    skips = skips_of(ranges)
    kept = [p for p in range(200) if not any(first <= p < first + length for first, length in ranges)]
    assert skips.kept(np.arange(len(kept))).tolist() == kept
    assert [skips.kept_before(p) for p in range(200)] == [sum(k < p for k in kept) for p in range(200)]


@given(ranges=RANGES, start=st.integers(0, 120), batches=st.lists(st.integers(0, 9), max_size=9))
def test_batches_of_any_size_are_the_kept_positions_one_after_the_other(ranges, start, batches):
    skips, position, seen = skips_of(ranges), start, []
    for size in batches:
        first = skips.kept_before(position)
        seen += skips.kept(np.arange(first, first + size)).tolist()
        behind = skips.after(position, size)
        assert skips.count(position, behind) == size
        assert behind == (seen[-1] + 1 if size else position)
        position = behind
    first = skips.kept_before(start)
    assert seen == skips.kept(np.arange(first, first + sum(batches))).tolist()


@given(ranges=RANGES)
@example(ranges=[(0, 5), (5, 2), (8, 1)])
def test_ranges_are_written_as_they_are_read_and_never_touch(ranges):
    skips = skips_of(ranges)
    assert Skips.of(skips.as_texts()) == skips == Skips.of([*skips.as_texts(), *skips.as_texts()])
    edges = [edge for pair in skips.ranges for edge in pair]
    assert edges == sorted(set(edges))


def test_far_away_it_is_the_same_arithmetic():
    skips = Skips.of(["1000000000000:2000000000000", f"{MAX_POSITION - 1}:{MAX_POSITION}"])
    assert skips.kept([10**12 - 1, 10**12]).tolist() == [10**12 - 1, 2 * 10**12]
    assert skips.after(10**12 - 2, 3) == 2 * 10**12 + 1
    assert skips.count(0, 3 * 10**12) == 2 * 10**12
    assert NO_SKIPS.kept([5]).tolist() == [5]
    assert MAX_POSITION == 2**62


@pytest.mark.parametrize(
    "text", ["5", "5:5", "6:5", ":5", "5:", "-1:5", "1:2:3", f"0:{MAX_POSITION + 1}", "a:b", "1:9" * 9]
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ValueError, match="A:B, which leaves out the positions A to B - 1"):
        Skips.of([text])

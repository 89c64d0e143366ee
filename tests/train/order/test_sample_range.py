"""The samples of a range are those at its positions that are not left out, in order, numbered from 0."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind_train.order.sample_order import SampleOrder
from minimind_train.order.sample_range import SampleRange
from minimind_train.order.skips import Skips

ORDER = SampleOrder(num_windows=23, seed=4)


@given(
    start=st.integers(0, 60),
    length=st.integers(0, 60),
    left_out=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 20)), max_size=4),
)
def test_its_samples_are_those_at_the_positions_that_are_kept(start, length, left_out):
    skips = Skips.of(f"{first}:{first + count}" for first, count in left_out)
    samples = SampleRange(order=ORDER, start=start, stop=start + length, skips=skips)
    kept = [
        position
        for position in range(start, start + length)
        if not any(first <= position < first + count for first, count in left_out)
    ]
    numbers = np.arange(len(samples))
    assert len(samples) == len(kept)
    assert samples.positions(numbers).tolist() == kept
    assert samples.windows(numbers).tolist() == [ORDER.window(position)[1] for position in kept]
    assert samples.position_after(0) == start
    assert [samples.position_after(number + 1) for number in range(len(kept))] == [
        position + 1 for position in kept
    ]


def test_a_range_that_goes_backwards_is_refused():
    with pytest.raises(ValueError, match="goes forward, not from 5 to 4"):
        SampleRange(order=ORDER, start=5, stop=4)

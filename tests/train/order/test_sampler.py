"""The order of samples: every one once an epoch, whatever the ranks, the batches and the place where a run begins."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind_data.permutation import Permutation
from minimind_train.order.sample_order import SampleOrder, check_range, check_shares, rank_positions

KINDS = ("shuffled", "sequential")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 7, 256, 257, 1_000])
def test_every_epoch_visits_every_window_once(n, kind):
    order = SampleOrder(num_windows=n, seed=3, kind=kind)
    epochs = order.windows(np.arange(4 * n)).reshape(4, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    if kind == "sequential":
        assert (epochs == np.arange(n)).all()
    elif n >= 7:
        assert len({epoch.tobytes() for epoch in epochs}) == 4


def test_a_window_is_looked_for_in_the_first_epoch_and_the_seed_is_0_where_nothing_is_said():
    order = SampleOrder(num_windows=300)
    assert (order.seed, order.kind, order.block) == (0, "shuffled", 1)
    assert [order.position_of(window) for window in order.windows(np.arange(300)).tolist()] == list(
        range(300)
    )


def test_the_order_is_the_permutation_of_each_epoch():
    order = SampleOrder(num_windows=300, seed=8)
    for epoch in range(3):
        expected = Permutation(300, 8, epoch)[np.arange(300)]
        assert (order.windows(np.arange(300) + 300 * epoch) == expected).all()


@given(n=st.integers(1, 10**12), kind=st.sampled_from(KINDS), data=st.data())
def test_positions_and_windows_lead_to_each_other(n, kind, data):
    order = SampleOrder(num_windows=n, seed=1, kind=kind)
    positions = data.draw(st.lists(st.integers(0, 10**6 * n), min_size=1, max_size=8))
    windows = order.windows(np.array(positions)).tolist()
    for position, window in zip(positions, windows, strict=True):
        epoch, same = order.window(position)
        assert (epoch, same) == (position // n, window)
        assert order.position_of(window, epoch) == position


def test_positions_may_come_in_any_order_and_shape_from_any_epochs():
    order = SampleOrder(num_windows=11, seed=2)
    positions = np.random.default_rng(0).permutation(55).reshape(5, 11)
    windows = order.windows(positions)
    assert windows.shape == (5, 11)
    assert windows.dtype == np.int64
    assert windows.ravel().tolist() == [order.window(int(p))[1] for p in positions.ravel()]
    assert order.windows(np.array([], np.int64)).tolist() == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch", [(0, 24), (5, 29), (17, 18), (3, 10), (9, 9)])
def test_ranks_partition_every_batch(world_size, batch):
    shares = [rank_positions(*batch, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(*batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for rank, share in enumerate(shares):
        assert share.dtype == np.int64
        assert share.tolist() == list(range(*batch))[rank::world_size]


def test_a_run_that_changes_the_global_batch_goes_on_at_the_same_sample():
    order = SampleOrder(num_windows=10, seed=0)
    position, seen = 0, []
    for batch in (4, 4, 3, 3, 7, 1, 8):
        seen += order.windows(np.arange(position, position + batch)).tolist()
        position += batch
    assert seen == order.windows(np.arange(30)).tolist()


def test_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="no windows"):
        SampleOrder(num_windows=0)
    with pytest.raises(ValueError, match="shuffled or sequential, not 'random'"):
        SampleOrder(num_windows=1, kind="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be"):
        SampleOrder(num_windows=1, seed=-1)
    order = SampleOrder(num_windows=10)
    with pytest.raises(ValueError, match="cannot be -1"):
        order.windows(np.array([3, -1]))
    with pytest.raises(ValueError, match="cannot be -1"):
        order.window(-1)
    with pytest.raises(ValueError, match="window 10 is outside 0 to 9"):
        order.position_of(10)
    with pytest.raises(ValueError, match="window -1 is outside 0 to 9"):
        order.position_of(-1)
    with pytest.raises(ValueError, match="epochs count from 0"):
        order.position_of(1, -1)
    with pytest.raises(ValueError, match="rank must be"):
        rank_positions(0, 10, 2, 2)
    with pytest.raises(ValueError, match="range of positions"):
        rank_positions(10, 9, 0, 1)
    for start in (-3, -1):
        with pytest.raises(ValueError, match="range of positions"):
            rank_positions(start, 9, 0, 1)
    with pytest.raises(ValueError, match="goes forward, not from 5 to 4"):
        check_range(5, 4)
    with pytest.raises(ValueError, match="positions count from 0"):
        check_range(-3, 4)


def test_ranks_share_a_batch_that_has_a_sample_for_each():
    check_shares(4, 0, 4)
    check_shares(4, 3, 4)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"rank must be from 0 to world_size - 1, not {rank} of 4"):
            check_shares(4, rank, 4)
    with pytest.raises(ValueError, match="one sample for each of 4 ranks, not 3"):
        check_shares(3, 0, 4)


def test_a_range_of_positions_may_be_empty_and_begins_at_0_or_later():
    check_range(0, 0)
    check_range(0, 5)
    check_range(5, 5)
    with pytest.raises(ValueError, match="positions count from 0"):
        check_range(-1, 0)
    assert rank_positions(0, 0, 0, 1).tolist() == []
    with pytest.raises(ValueError, match="rank must be"):
        rank_positions(0, 10, -1, 2)


def test_the_order_is_pinned():
    order = SampleOrder(num_windows=1_000_003, seed=42)
    positions = np.array([0, 1, 2, 1_000_002, 1_000_003, 5_000_000])
    assert order.windows(positions).tolist() == [446676, 560421, 969048, 231033, 626705, 863387]

"""BlockPermutation: a shuffle that stays in blocks, and still has everything once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind_train.order.block_permutation import BlockPermutation
from minimind_train.order.sample_order import SampleOrder


@pytest.mark.parametrize("n", range(1, 41))
def test_every_small_n_and_block_is_a_bijection_with_its_inverse(n):
    for block in range(1, n + 3):
        for epoch in range(3):
            permutation = BlockPermutation(n, block, 5, epoch)
            values = permutation[np.arange(n)]
            assert sorted(values.tolist()) == list(range(n)), (n, block, epoch)
            assert permutation.inverse(values).tolist() == list(range(n)), (n, block, epoch)


@pytest.mark.parametrize(
    ("n", "block"), [(1_000, 7), (1_000, 10), (999, 300), (70_001, 256), (70_001, 257), (65_537, 1_024)]
)
def test_every_block_is_read_as_one_and_shuffled_inside(n, block):
    values = BlockPermutation(n, block, 1, 0)[np.arange(n)]
    blocks = values // block
    begins = np.flatnonzero(np.diff(blocks, prepend=-1))
    assert len(begins) == -(-n // block)  # each is entered once
    order = blocks[begins]
    assert sorted(order.tolist()) == list(range(len(begins)))
    assert order.tolist() != sorted(order.tolist())
    insides = {
        tuple(values[b : b + block] % block)
        for b in begins
        if b + block <= n and blocks[b] == blocks[min(n, b + block) - 1]
    }
    assert len(insides) > 0.9 * (len(begins) - 1)  # no two are shuffled alike


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {
        BlockPermutation(100, 10, seed, epoch)[np.arange(100)].tobytes()
        for seed in range(9)
        for epoch in range(9)
    }
    assert len(orders) == 81


@given(n=st.integers(1, 10**12), block=st.integers(1, 10**6), data=st.data())
def test_far_away_it_is_the_same_arithmetic(n, block, data):
    permutation = BlockPermutation(n, block, 3, 2)
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    values = permutation[np.array(indices)]
    assert permutation.inverse(values).tolist() == indices
    assert [permutation[index] for index in indices] == values.tolist()
    assert [permutation.inverse(value) for value in values.tolist()] == indices
    assert ((values >= 0) & (values < n)).all()


def test_an_order_in_blocks_visits_every_window_once_an_epoch():
    order = SampleOrder(num_windows=53, seed=3, block=8)
    epochs = order.windows(np.arange(4 * 53)).reshape(4, 53)
    assert (np.sort(epochs, axis=1) == np.arange(53)).all()
    assert len({epoch.tobytes() for epoch in epochs}) == 4
    for position in range(0, 200, 7):
        epoch, window = order.window(position)
        assert order.windows(np.array([position])).tolist() == [window]
        assert order.position_of(window, epoch) == position
    assert order.described(0)["shuffle_block"] == 8
    alone = {"num_windows": 53, "seed": 3, "order": "shuffled"}
    assert SampleOrder(num_windows=53, seed=3).described(0) == alone  # as it was before there were blocks
    assert SampleOrder(num_windows=53, seed=3, block=2).described(0) == {**alone, "shuffle_block": 2}


def test_blocks_of_one_are_the_order_that_there_was_before():
    positions = np.arange(3_000)
    plain = SampleOrder(num_windows=1_000, seed=3)
    assert SampleOrder(num_windows=1_000, seed=3, block=1) == plain
    assert (
        SampleOrder(num_windows=1_000, seed=3, block=2).windows(positions) != plain.windows(positions)
    ).any()


def test_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="`shuffle_block` must be at least 1, not 0"):
        SampleOrder(num_windows=5, block=0)
    with pytest.raises(ValueError, match="at least 1 window, not 0"):
        BlockPermutation(5, 0, 0, 0)
    permutation = BlockPermutation(5, 2, 0, 0)
    for wrong in (-1, 5):
        for ask in (permutation.__getitem__, permutation.inverse):
            with pytest.raises(IndexError, match=r"not all in range\(5\)"):
                ask(wrong)
            for numbers in ([2, wrong], [wrong, 2], [2, wrong, 4]):
                with pytest.raises(IndexError, match=f"indices {min(numbers)} to {max(numbers)} are not all"):
                    ask(np.array(numbers))


def test_it_is_as_long_as_what_it_puts_in_order_and_of_nothing_there_is_nothing():
    permutation = BlockPermutation(5, 2, 0, 0)
    assert len(permutation) == 5
    assert (
        permutation[np.array([], np.int64)].tolist()
        == permutation.inverse(np.array([], np.int64)).tolist()
        == []
    )


def test_the_order_in_blocks_is_pinned():
    permutation = BlockPermutation(1_000_003, 1_000, 42, 1)
    assert permutation[np.array([0, 1, 999, 1_000, 500_000, 1_000_002])].tolist() == GOLDEN
    assert BlockPermutation(10, 4, 42, 0)[np.arange(10)].tolist() == GOLDEN_SMALL


GOLDEN = [778439, 778955, 778422, 635979, 369207, 136085]
GOLDEN_SMALL = [8, 9, 7, 6, 4, 5, 1, 0, 3, 2]

"""Laws, edges, quality and golden values of the shuffle.

The quality tests are statistics that are standard normal for a random permutation. The seeds are fixed, so they never fail by
chance; the bound of 4.5 standard deviations leaves room for another choice of constants. Two shuffles that are in use elsewhere
and known to be poor are put through the same statistics, to show that these can see.
"""

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minimind_data.permutation import MAX_LENGTH, MAX_SEED, Permutation

BOUND = 4.5
HUGE = (10**6, 10**9, 10**12, 2**40 - 1, 2**40, 2**40 + 1, MAX_LENGTH)


def shuffle(n: int, seed: int = 0, epoch: int = 0) -> NDArray[np.int64]:
    return Permutation(n, seed, epoch)[np.arange(n)]


# Laws


def assert_bijection(n: int, seed: int) -> None:
    values = shuffle(n, seed)
    assert (np.bincount(values, minlength=n) == 1).all(), f"not a bijection at {n}"
    assert (Permutation(n, seed, 0).inverse(values) == np.arange(n)).all(), f"no inverse at {n}"


def test_is_a_bijection_at_every_small_length():
    for n in range(1, 601):
        assert_bijection(n, seed=n % 3)


@pytest.mark.parametrize("k", range(9, 18))
def test_is_a_bijection_around_every_power_of_two(k):
    for n in (2**k - 1, 2**k, 2**k + 1):
        for seed in range(2):
            assert_bijection(n, seed)


@pytest.mark.parametrize("n", HUGE)
def test_is_injective_and_undone_by_its_inverse_at_huge_lengths(n):
    permutation = Permutation(n, 3, 5)
    indices = np.unique(np.r_[0:50_000, n - 50_000 : n, np.random.default_rng(0).integers(0, n, 50_000)])
    values = permutation[indices]
    assert len(np.unique(values)) == len(indices)
    assert values.min() >= 0
    assert values.max() < n
    assert (permutation.inverse(values) == indices).all()


@given(
    n=st.integers(1, MAX_LENGTH),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**64 - 1),
    data=st.data(),
)
def test_integers_and_arrays_agree(n, seed, epoch, data):
    permutation = Permutation(n, seed, epoch)
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    values = permutation[np.array(indices)]
    assert values.tolist() == [permutation[i] for i in indices]
    assert permutation.inverse(values).tolist() == [permutation.inverse(int(v)) for v in values] == indices


def test_keeps_shape_and_type_and_its_argument():
    for n in (100, 10**6):
        permutation = Permutation(n, 0, 0)
        indices = np.arange(12).reshape(3, 4)
        assert permutation[indices].shape == (3, 4)
        assert permutation[indices].dtype == np.int64
        assert (indices == np.arange(12).reshape(3, 4)).all()
        assert permutation[np.array([], np.int64)].shape == (0,)
        assert type(permutation[np.int64(3)]) is int
        assert permutation[np.array([3], np.int32)].tolist() == [permutation[3]]
    assert len(Permutation(10**12, 0, 0)) == 10**12


def test_refuses_what_it_cannot_permute():
    for n in (0, -1, MAX_LENGTH + 1):
        with pytest.raises(ValueError, match="length from 1 to 2\\^62"):
            Permutation(n, 0, 0)
    assert MAX_LENGTH == 2**62
    assert MAX_SEED == 2**64 - 1
    for seed, epoch, name in ((-1, 0, "seed"), (MAX_SEED + 1, 0, "seed"), (0, -1, "epoch")):
        with pytest.raises(ValueError, match=f"{name} must be from 0"):
            Permutation(10, seed, epoch)
    for n in (10, 1000):
        for index in (-1, n):
            with pytest.raises(IndexError, match="range"):
                Permutation(n, 0, 0)[index]
            with pytest.raises(IndexError, match="range"):
                Permutation(n, 0, 0)[np.array([0, index])]
        with pytest.raises(TypeError, match="integers"):
            Permutation(n, 0, 0)[np.array([0.5])]


@pytest.mark.parametrize("n", [255, 256, 257, 300, 511, 513, 1_000])
def test_one_index_is_sent_where_an_array_sends_it(n):
    permutation = Permutation(n, 2, 1)
    values = permutation[np.arange(n)].tolist()
    assert [permutation[index] for index in range(n)] == values
    assert [permutation.inverse(value) for value in values] == list(range(n))


def test_it_says_what_it_is():
    permutation = Permutation(10, 3, 4)
    assert (len(permutation), permutation.seed, permutation.epoch) == (10, 3, 4)
    assert repr(permutation) == "Permutation(n=10, seed=3, epoch=4)"


GOLDEN = {
    (10, 0, 0): [2, 9, 0, 7, 3],
    (256, 0, 0): [107, 55, 104, 184, 133],
    (257, 0, 0): [178, 136, 215, 256, 52],
    (65_537, 1, 0): [21603, 59939, 25697, 14695, 15061],
    (65_537, 0, 1): [57002, 62364, 24225, 14873, 49052],
    (10**9, 42, 7): [928318936, 535315351, 284960809, 147234863, 853426311],
    (10**12, 2**64 - 1, 3): [233728192837, 957754527049, 142257816619, 167682576060, 806279420476],
    (2**62, 0, 2**64 - 1): [
        3603189441845211019,
        3094457955928805012,
        4390387334293595442,
        1409703689112241861,
        2104675533200252717,
    ],
}


@pytest.mark.parametrize(("key", "values"), GOLDEN.items())
def test_the_order_is_pinned(key, values):
    permutation = Permutation(*key)
    assert [permutation[i] for i in range(len(permutation) - 5, len(permutation))] == values


# Quality


def standard(chi_square: float, freedom: int) -> float:
    return (chi_square - freedom) / math.sqrt(2 * freedom)


def uniform(counts: NDArray[np.int64]) -> float:
    """How far counts are from equal, in standard deviations."""
    expected = counts.sum() / counts.size
    return standard(float(((counts - expected) ** 2 / expected).sum()), counts.size - 1)


def statistics(order: NDArray[np.int64]) -> dict[str, float]:
    """What distinguishes one permutation from a random one, each in standard deviations."""
    n = len(order)
    found = {}
    for lag in sorted({1, 2, 3, 2 ** (n.bit_length() // 2)}):
        here, there = order[:-lag], order[lag:]
        found[f"correlation at lag {lag}"] = float(np.corrcoef(here, there)[0, 1]) * math.sqrt(n - lag)
        for m in (2, 3, 4, 8, 16):
            joint = np.bincount(here % m * m + there % m, minlength=m * m)
            found[f"residues mod {m} at lag {lag}"] = uniform(joint)
        differences = np.bincount(((there - here) % n) * 64 // n, minlength=64)
        found[f"differences at lag {lag}"] = uniform(differences)
    for m in (2, 3, 4, 8, 16):
        joint = np.bincount(np.arange(n) % m * m + order % m, minlength=m * m)
        found[f"index and value mod {m}"] = uniform(joint)
    moved = int(np.abs(order - np.arange(n)).sum())
    found["distance moved"] = (moved - (n * n - 1) / 3) / math.sqrt((n + 1) * (2 * n * n + 7) / 45)
    blocks = np.bincount(np.arange(n) * 16 // n * 16 + order * 16 // n, minlength=256)
    found["block to block"] = uniform(blocks)
    return found


def worst(order: NDArray[np.int64]) -> tuple[str, float]:
    return max(statistics(order).items(), key=lambda item: abs(item[1]))


@pytest.mark.parametrize("n", [4_096, 6_401, 65_536, 65_537, 99_999, 131_071])
def test_an_epoch_looks_like_a_random_permutation(n):
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**63, 12)):
        name, value = worst(shuffle(n, seed, epoch))
        assert abs(value) < BOUND, name


def feistel_linear_modulo_a_power_of_two(n: int) -> NDArray[np.int64]:
    """Four rounds whose function only multiplies and adds, so that no high bit ever reaches a low one."""
    half = math.ceil((n - 1).bit_length() / 2)
    keys = [int(key) for key in np.random.default_rng(0).integers(0, 2**30, 8)]

    def network(i: int) -> int:
        left, right = i >> half, i & (2**half - 1)
        for multiplier, addend in zip(keys[::2], keys[1::2], strict=True):
            left, right = right, left ^ (((multiplier | 1) * right + addend) & (2**half - 1))
        return left << half | right

    def walk(i: int) -> int:
        i = network(i)
        while i >= n:
            i = network(i)
        return i

    return np.array([walk(i) for i in range(n)])


def affine(n: int) -> NDArray[np.int64]:
    factor = next(f for f in range(int(n * 0.618), n) if math.gcd(f, n) == 1)
    return (np.arange(n) * factor + 12_345) % n


def shuffled_blocks(n: int) -> NDArray[np.int64]:
    """Blocks shuffled, and inside each block the order kept: what reads fast and mixes little."""
    blocks = np.array_split(np.arange(n), 500)
    return np.concatenate([blocks[b] for b in np.random.default_rng(0).permutation(500)])


@pytest.mark.parametrize("bad", [feistel_linear_modulo_a_power_of_two, affine, shuffled_blocks])
@pytest.mark.parametrize("n", [65_537, 99_999])
def test_the_statistics_see_a_bad_shuffle(bad: Callable[[int], NDArray[np.int64]], n: int):
    order = bad(n)
    assert (np.sort(order) == np.arange(n)).all()
    _, value = worst(order)
    assert abs(value) > 4 * BOUND


def test_the_statistics_pass_a_random_permutation():
    for seed in range(3):
        name, value = worst(np.random.default_rng(seed).permutation(65_537))
        assert abs(value) < BOUND, name


@pytest.mark.parametrize("n", [10**9, 10**12])
def test_neighbours_are_strangers_at_huge_lengths(n):
    permutation = Permutation(n, 0, 0)
    starts = np.random.default_rng(1).integers(0, n - 2**21, 200_000)
    for lag in (1, 2, 2**10, 2 ** (n.bit_length() // 2)):
        here, there = permutation[starts], permutation[starts + lag]
        for m in (2, 3, 4, 8, 16):
            assert abs(uniform(np.bincount(here % m * m + there % m, minlength=m * m))) < BOUND
            assert abs(uniform(np.bincount(starts % m * m + here % m, minlength=m * m))) < BOUND
        assert abs(uniform(np.bincount(here * 64 // n * 64 + there * 64 // n, minlength=64 * 64))) < BOUND
        assert abs(float(np.corrcoef(here, there)[0, 1])) * math.sqrt(len(starts)) < BOUND


# All seeds and epochs together


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_permutation_of_a_few_is_equally_frequent(n):
    rounds = 100 * math.factorial(n)
    for orders in (
        Counter(tuple(shuffle(n, seed).tolist()) for seed in range(rounds)),
        Counter(tuple(shuffle(n, 9, epoch).tolist()) for epoch in range(rounds)),
    ):
        counts = np.array([orders[order] for order in permutations(range(n))])
        assert counts.sum() == rounds
        assert abs(uniform(counts)) < BOUND


@pytest.mark.parametrize("n", [7, 16])
def test_every_ordered_pair_is_equally_frequent_at_neighbouring_places(n):
    counts = np.zeros((n, n), np.int64)
    for seed in range(6_000):
        order = shuffle(n, seed)
        np.add.at(counts, (order[:-1:2], order[1::2]), 1)  # disjoint pairs, so nearly independent
    assert np.trace(counts) == 0
    assert abs(uniform(counts[~np.eye(n, dtype=bool)])) < BOUND


@pytest.mark.parametrize("n", [256, 257, 300, 1_000])
def test_pairs_are_equally_frequent_on_both_sides_of_the_table(n):
    cells = 12
    counts = np.zeros((3, cells, cells), np.int64)
    halves_apart = 2 ** (n.bit_length() // 2)  # same x, another y
    close = 0
    for seed in range(8_000):
        a, b, c, d = Permutation(n, seed, 0)[np.array([0, 1, halves_apart, n - 1])].tolist()
        for table, other in enumerate((b, c, d)):
            counts[table, a * cells // n, other * cells // n] += 1
            close += abs(a - other) <= 2
    sizes = np.bincount(np.arange(n) * cells // n)
    chance = (np.outer(sizes, sizes) - np.diag(sizes)) / (n * (n - 1))
    for table in counts:
        expected = table.sum() * chance
        assert abs(standard(float(((table - expected) ** 2 / expected).sum()), cells * cells - 1)) < BOUND
    expected_close = counts.sum() * (4 * n - 6) / (n * (n - 1))
    assert abs(close - expected_close) / math.sqrt(expected_close) < BOUND


@pytest.mark.parametrize("n", [100, 1_000, 10**12])
def test_the_first_and_last_window_are_equally_often_any(n):
    ends = np.array([0, n - 1])
    by_seed = np.array([Permutation(n, seed, 0)[ends] for seed in range(4_000)])
    by_epoch = np.array([Permutation(n, 0, epoch)[ends] for epoch in range(4_000)])
    for values in (by_seed[:, 0], by_seed[:, 1], by_epoch[:, 0], by_epoch[:, 1]):
        assert abs(uniform(np.bincount(values * 50 // n, minlength=50))) < BOUND


@pytest.mark.parametrize("n", [200, 5_000])
def test_fixed_points_and_meetings_of_epochs_are_as_rare_as_chance(n):
    rounds = 1_500
    orders = [shuffle(n, 4, epoch) for epoch in range(rounds)]
    other_seeds = [shuffle(n, seed, 0) for seed in range(5, 5 + rounds)]
    fixed = sum(int((order == np.arange(n)).sum()) for order in orders)
    meetings = sum(int((a == b).sum()) for a, b in pairwise(orders))
    crossings = sum(int((a == b).sum()) for a, b in zip(orders, other_seeds, strict=True))
    for count in (fixed, meetings, crossings):  # each Poisson with mean 1 a permutation
        assert abs(count - rounds) < BOUND * math.sqrt(rounds)
    correlations = [float(np.corrcoef(a, b)[0, 1]) for a, b in pairwise(orders)]
    assert abs(sum(correlations)) * math.sqrt(n / rounds) < BOUND
    assert max(map(abs, correlations)) * math.sqrt(n) < BOUND


def test_seed_and_epoch_are_not_interchangeable():
    orders = {shuffle(100, seed, epoch).tobytes() for seed in range(30) for epoch in range(30)}
    assert len(orders) == 900

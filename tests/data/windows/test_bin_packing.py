"""Packing: exactly best fit decreasing, in time that grows with the distinct lengths only."""

from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_data.windows.bin_packing import best_fit


def reference(lengths, width):
    """Best fit decreasing, one segment at a time; return the windows as sorted lists of lengths."""
    rooms, windows = [], []
    for length in sorted(lengths, reverse=True):
        at = bisect_left(rooms, (length, 0))
        room, number = rooms.pop(at) if at < len(rooms) else (width, len(windows))
        if number == len(windows):
            windows.append([])
        windows[number].append(length)
        insort(rooms, (room - length, number))
    return windows


def histogram_of(lengths, width):
    return np.bincount(np.array(lengths, np.int64), minlength=width + 1)


def patterns_of(packing):
    return [
        [
            int(length)
            for run in range(packing.run_starts[number], packing.run_starts[number + 1])
            for length in [packing.run_lengths[run]] * int(packing.run_counts[run])
        ]
        for number in range(len(packing.windows))
    ]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_it_is_best_fit_decreasing_or_better(data):
    width = data.draw(st.integers(1, 60))
    few = data.draw(st.lists(st.integers(1, width), min_size=1, max_size=6))
    lengths = data.draw(st.lists(st.one_of(st.integers(1, width), st.sampled_from(few)), max_size=200))
    packing = best_fit(histogram_of(lengths, width))
    patterns = patterns_of(packing)
    filled = np.repeat(packing.filled, packing.windows)
    plain = reference(lengths, width)
    assert packing.num_windows <= len(plain)
    if packing.num_windows == len(plain):
        # Which of two windows with equal room takes the next segment is open; the rooms that are left are not.
        assert sorted(filled.tolist()) == sorted(map(sum, plain))
    assert filled.max(initial=0) <= width
    placed = [
        length
        for pattern, count in zip(patterns, packing.windows, strict=True)
        for length in pattern * int(count)
    ]
    assert sorted(placed) == sorted(lengths)
    assert packing.segments.tolist() == [len(pattern) for pattern in patterns]
    for seq_len in (width, width - 1):
        assert packing.padding(seq_len).tolist() == [max(0, seq_len - sum(pattern)) for pattern in patterns]


def test_patterns_can_be_read():
    packing = best_fit(histogram_of([10] * 3 + [7] * 2 + [5, 4, 3, 3, 3, 1], 10))
    assert list(zip(patterns_of(packing), packing.windows.tolist(), strict=True)) == [
        ([10], 3),
        ([7, 3], 2),
        ([3], 1),
        ([5, 4, 1], 1),
    ]


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        ([2], [10**12]),
        ([341], [10**12]),
        ([171], [10**12]),
        ([2, 170, 171, 340], [10**11, 10**12, 10**9 + 7, 10**10]),
    ],
)
def test_a_trillion_documents_are_a_few_patterns(lengths, counts):
    histogram = np.zeros(342, np.int64)
    histogram[lengths] = counts
    packing = best_fit(histogram)
    assert len(packing.windows) < 12
    assert int(packing.windows @ packing.segments) == sum(counts)
    assert int(packing.windows @ packing.filled) == int(np.arange(342) @ histogram)


def test_a_rest_that_nothing_fits_is_avoided():
    lengths = [26] * 1900 + [20] * 2000
    packing = best_fit(histogram_of(lengths, 512))
    assert packing.num_windows == -(-sum(lengths) // 512)
    assert packing.num_windows < len(reference(lengths, 512))


@pytest.mark.parametrize("width", [341, 513, 2048])
@pytest.mark.parametrize(
    ("draw", "fill"),
    [
        (lambda source: np.exp(source.normal(5.3, 1.0, 10**6)), 0.999),
        (lambda source: 20 * (1 + source.pareto(1.2, 10**6)), 0.997),
    ],
)
def test_text_fills_its_windows(width, draw, fill):
    lengths = draw(np.random.default_rng(0)).astype(np.int64)
    packing = best_fit(histogram_of(np.clip(lengths, 3, width), width))
    assert (packing.windows @ packing.filled) / (packing.num_windows * width) > fill


def test_nothing_makes_no_window():
    packing = best_fit(np.zeros(8, np.int64))
    assert packing.num_windows == 0
    assert packing.filled.tolist() == packing.segments.tolist() == []

"""What the order of samples costs, and how good the shuffle is.

    python benchmarks/order.py

The first table has the time to make the permutation of an epoch, to jump to one position, and to get a batch of 256 (both at random
positions of the epoch), and the memory for all of this. Its last line is the stored list that the permutation replaces, at a length
where that is bearable. The second table has measures of quality, each beside the value for a random permutation.
"""

import argparse
import math
import time
import timeit
import tracemalloc
from collections.abc import Callable

import numpy as np

from minimind_data.permutation import Permutation
from minimind_train.order.sample_order import SampleOrder

BATCH = 256


def microseconds(run: Callable[[], object], number: int = 1_000) -> float:
    return min(timeit.repeat(run, number=number, repeat=7)) / number * 1e6


def peak_bytes(run: Callable[[], object]) -> int:
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def cost(n: int) -> None:
    order = SampleOrder(num_windows=n, seed=0)
    positions = np.random.default_rng(0).integers(0, n, BATCH) + 3 * n
    position = int(positions[0])
    window = order.window(position)[1]

    def everything() -> None:
        fresh = Permutation(n, 1, 3)
        fresh[positions - 3 * n]
        fresh.inverse(window)

    print(
        f"{n:>26,} {microseconds(lambda: Permutation(n, 0, 3)):12.1f} {microseconds(lambda: order.window(position)):12.1f} "
        f"{microseconds(lambda: order.position_of(window, 3)):12.1f} {microseconds(lambda: order.windows(positions)):12.1f} "
        f"{peak_bytes(everything) / 1024:9.0f} KiB"
    )


def quality(n: int, num_pairs: int = 1_000_000) -> None:
    permutation = Permutation(n, 0, 0)
    # A small epoch is taken whole: a position that is drawn twice would count its pair twice.
    here_at = (
        np.arange(n - 1) if n - 1 <= num_pairs else np.random.default_rng(1).integers(0, n - 1, num_pairs)
    )
    here, there = permutation[here_at], permutation[here_at + 1]
    joint = np.bincount(here % 16 * 16 + there % 16, minlength=256)
    chi_square = float(((joint - num_pairs / 256) ** 2 / (num_pairs / 256)).sum())
    figures = (
        (
            "neighbours of one parity",
            float((here % 2 == there % 2).mean()) * 100,
            50.0,
            50 / math.sqrt(num_pairs),
            "%",
        ),
        (
            "correlation of neighbours",
            float(np.corrcoef(here, there)[0, 1]),
            0.0,
            1 / math.sqrt(num_pairs),
            "",
        ),
        (
            "mean distance moved / n",
            float(np.abs(here - here_at).mean() / n),
            1 / 3,
            math.sqrt(1 / 18 / num_pairs),
            "",
        ),
        ("residues mod 16, chi-square", chi_square, 255.0, math.sqrt(510), ""),
    )
    for name, measured, expected, deviation, unit in figures:
        print(
            f"{n:>26,}   {name:28} {measured:10.4f}{unit:1} {expected:10.4f}{unit:1} {(measured - expected) / deviation:+12.2f}"
        )


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(
        f"{'n':>26} {'make, us':>12} {'jump, us':>12} {'inverse, us':>12} {f'{BATCH}, us':>12} {'memory':>13}"
    )
    for n in (200, 10**6, 10**9, 10**12):
        cost(n)
    started = time.perf_counter()
    peak = peak_bytes(lambda: np.random.default_rng(0).permutation(10**7))
    seconds = time.perf_counter() - started
    print(f"{'10,000,000 as a list':>26} {seconds * 1e6:12.0f} {'':38} {peak / 1024:9.0f} KiB")
    print()
    print(f"{'n':>26}   {'':28} {'measured':>11} {'random':>11} {'deviations':>12}")
    for n in (10**6 + 1, 10**9, 10**12):
        quality(n)


if __name__ == "__main__":
    main()

"""Packing: how full windows get, and how long planning takes for a hundred million documents.

    python benchmarks/packing.py [--seq-len 512] [--documents 100000000] [--dataset DIR]

Fill is tokens / (windows x width), over a million documents of each distribution of lengths. Beside it are the fill that plain best
fit decreasing, one document at a time, reaches on 20,000 of them, compared with the histogram's on the same 20,000; and the fill that
no packing can exceed, by the bound of Martello and Toth ("Lower bounds and reduction procedures for the bin packing problem", 1990),
which uses that two documents longer than half a window cannot share one. Then the plan of a dataset with that many documents is made
and opened again. Only its indexes are real, its tokens are a hole in a sparse file. Peak memory is that of this process, up to then.
"""

import argparse
import hashlib
import resource
import sys
import tempfile
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import describe_machine
from numpy.typing import NDArray

from minimind_data.dataset.format import (
    IndexHeader,
    Manifest,
    ShardEntry,
    ShardOrigin,
    TokenizerInfo,
    WrittenShard,
    index_bytes,
)
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.windows.bin_packing import best_fit
from minimind_data.windows.pack_plan import open_plan

_SHARD_DOCUMENTS = 2_000_000
_SAMPLED = 20_000

Draw = Callable[[np.random.Generator, int, int], NDArray[np.float64]]
LENGTHS: dict[str, Draw] = {
    "lognormal, half up to 200": lambda source, n, _: np.exp(source.normal(np.log(200), 1.0, n)),
    "lognormal, half up to 600": lambda source, n, _: np.exp(source.normal(np.log(600), 1.2, n)),
    "uniform": lambda source, n, width: source.uniform(3, width, n),
    "all equal, a third": lambda _, n, width: np.full(n, width / 3),
    "all equal, 0.6": lambda _, n, width: np.full(n, 0.6 * width),
    "short and long": lambda source, n, width: np.where(
        source.random(n) < 0.7, source.normal(30, 8, n), source.normal(0.8 * width, 0.1 * width, n)
    ),
    "heavy tail": lambda source, n, _: 20 * (1 + source.pareto(1.2, n)),
}


def histogram_of(lengths: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    return np.bincount(np.clip(lengths, 3, width), minlength=width + 1)


def one_at_a_time(lengths: NDArray[np.int64], width: int) -> int:
    """Return the number of windows of plain best fit decreasing."""
    rooms: list[int] = []
    windows = 0
    for length in np.sort(np.clip(lengths, 3, width))[::-1].tolist():
        at = bisect_left(rooms, length)
        windows += at == len(rooms)
        room = rooms.pop(at) if at < len(rooms) else width
        insort(rooms, room - length)
    return windows


def fewest(histogram: NDArray[np.int64]) -> int:
    """Return a lower bound of the windows of any packing."""
    width = len(histogram) - 1
    count = np.concatenate([[0], np.cumsum(histogram)])
    tokens = np.concatenate([[0], np.cumsum(histogram * np.arange(width + 1))])

    def of(values: NDArray[np.int64], low: int, high: int) -> int:  # lengths from low to high, both included
        return int(values[high + 1] - values[low]) if high >= low else 0

    best = -(-int(tokens[-1]) // width)
    for least in range(width // 2 + 1):
        alone, half = of(count, width - least + 1, width), of(count, width // 2 + 1, width - least)
        room = half * width - of(tokens, width // 2 + 1, width - least)
        more = max(0, -(-(of(tokens, least, width // 2) - room) // width))
        best = max(best, alone + half + more)
    return best


def row(name: str, lengths: NDArray[np.int64], width: int) -> str:
    histogram = histogram_of(lengths, width)
    start = time.perf_counter()
    packing = best_fit(histogram)
    seconds = time.perf_counter() - start
    tokens = int(packing.windows @ packing.filled)
    sample = lengths[:_SAMPLED]
    here, plain = best_fit(histogram_of(sample, width)).num_windows, one_at_a_time(sample, width)
    return (
        f"{name:28} {tokens / packing.num_windows / width:8.3%} {tokens / fewest(histogram) / width:8.3%} "
        f"{len(packing.windows):9,} {seconds * 1e3:8.1f} ms {here:9,} {plain:9,}"
    )


def make_indexes(folder: Path, num_documents: int, width: int) -> ShardSet:
    """Write a dataset with real indexes and no tokens."""
    (folder / "tokenizer.json").write_bytes(b"{}")
    source = np.random.default_rng(0)
    entries = []
    for number in range(-(-num_documents // _SHARD_DOCUMENTS)):
        count = min(_SHARD_DOCUMENTS, num_documents - number * _SHARD_DOCUMENTS)
        draw = LENGTHS["lognormal, half up to 200"]
        lengths = np.clip(draw(source, count, width), 3, 100_000).astype(np.int64)
        name = f"lengths-{number:05d}"
        header = IndexHeader(dtype="uint16", num_sequences=count, num_documents=count)
        (folder / f"{name}.idx").write_bytes(index_bytes(header, lengths, np.arange(count + 1)))
        num_tokens = int(lengths.sum())
        with (folder / f"{name}.bin").open("wb") as file:
            file.truncate(2 * num_tokens)
        entries.append(
            ShardEntry(
                name=name,
                written=WrittenShard(
                    documents=count,
                    sequences=count,
                    tokens=num_tokens,
                    bytes=2 * num_tokens,
                    sha256="",
                    index_sha256="",
                ),
                origin=ShardOrigin(input=0, input_start=0, input_stop=0, input_sha256=""),
            )
        )
    info = TokenizerInfo(
        sha256=hashlib.sha256(b"{}").hexdigest(), vocab_size=6400, bos_id=1, eos_id=2, pad_id=0
    )
    manifest = Manifest(
        kind="pretrain", dtype="uint16", tokenizer=info, options={}, inputs=(), shards=tuple(entries)
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return ShardSet.open(folder)


def peak_mib() -> float:
    """Return the peak memory of this process, including mapped pages that the kernel could drop."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def own_mib() -> float | None:
    """Return the memory of this process that is not mapped from a file, now."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--documents", type=int, default=100_000_000, help="0: no dataset is planned")
    parser.add_argument("--dataset", type=Path, action="append", default=[], help="a real one; repeat")
    arguments = parser.parse_args()
    width = arguments.seq_len + 1
    print(describe_machine())
    print(f"windows of {width} tokens (inputs and the last target)")
    print(
        f"{'lengths':28} {'fill':>8} {'at most':>8} {'patterns':>9} {'planned in':>11} {'20,000:':>9} {'plain':>9}"
    )
    source = np.random.default_rng(0)
    for name, draw in LENGTHS.items():
        print(row(name, draw(source, 1_000_000, width).astype(np.int64), width))
    for folder in arguments.dataset:
        lengths = np.concatenate([shard.lengths for shard in ShardSet.open(folder)]).astype(np.int64)
        print(row(f"{folder.name}, {len(lengths):,} documents", source.permutation(lengths), width))
    if arguments.documents:
        with tempfile.TemporaryDirectory() as folder:
            shards = make_indexes(Path(folder), arguments.documents, width)
            before, own = peak_mib(), own_mib()
            start = time.perf_counter()
            plan = open_plan(shards, width, "cut")
            seconds = time.perf_counter() - start
            start = time.perf_counter()
            open_plan(shards, width, "cut")
            opened = time.perf_counter() - start
            size = sum(path.stat().st_size for path in (Path(folder) / ".mm-pack").iterdir())
            fill = plan.num_tokens / plan.num_windows / width
            per = arguments.documents / 1e8
            print(
                f"{arguments.documents:,} documents, {plan.num_windows:,} windows, {fill:.3%} filled: planned in {seconds:.1f} s "
                f"({seconds / per:.1f} s for 10^8), opened again in {opened:.2f} s, {size / 2**20:,.0f} MiB on disk"
            )
            print(
                f"memory: peak {peak_mib():,.0f} MiB, {before:,.0f} before; own {own_mib()} MiB after, {own} before"
            )


if __name__ == "__main__":
    main()

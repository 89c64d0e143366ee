"""Windows that are not in the page cache: how fast they are read in a full shuffle, and with --shuffle-block.

    python benchmarks/cold_reads.py [--megabytes 1024] [--seq-len 512] [--batch 64] [--batches 200] [--block 1 64 1024 16384]
                                    [--folder DIR]

The script writes a dataset of random tokens into a temporary folder (under DIR, to choose a disk). For each block size it drops
the pages from the cache (posix_fadvise), maps the files again and reads batches from the beginning of an epoch. Beside the speed
it prints what the kernel read from the disk. If that is nothing, the disk has a cache of its own, or is no disk, and the line
says so.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import describe_machine
from page_cache import drop_pages
from windows import make_dataset

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.windows.opening import open_windows
from minimind_train.order.sample_order import SampleOrder

_SHARDS = 4


def bytes_from_disk() -> int | None:
    """Return the bytes that the kernel has read from disks for this process; None if it does not say."""
    try:
        counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return None
    return int(counters["read_bytes"])


def read(folder: Path, block: int, seq_len: int, batch: int, batches: int) -> tuple[float, int | None]:
    """Return (seconds, bytes read from the disk) of some batches of an epoch."""
    windows = open_windows(ShardSet.open(folder), layout="concat", seq_len=seq_len)
    order = SampleOrder(num_windows=len(windows), seed=1, block=block)
    before, start = bytes_from_disk(), time.perf_counter()
    for number in range(batches):
        windows.fetch(order.windows(np.arange(number * batch, (number + 1) * batch)))
    seconds, after = time.perf_counter() - start, bytes_from_disk()
    return seconds, None if before is None or after is None else after - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--block", type=int, nargs="+", default=[1, 64, 1024, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    print(describe_machine())
    used = options.batches * options.batch * options.seq_len * 2
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary) / "data"
        make_dataset(folder, _SHARDS, options.megabytes * 500_000)
        print(
            f"{options.megabytes:,} MB of tokens, of which {used / 1e6:,.1f} MB are read, {options.rounds} rounds each"
        )
        print(f"{'block':>8} {'MB/s':>22} {'million tokens/s':>22} {'read from disk':>18}")
        for block in options.block:
            speeds, disk = [], []
            for _ in range(options.rounds):
                drop_pages(folder)
                seconds, from_disk = read(folder, block, options.seq_len, options.batch, options.batches)
                speeds.append(used / seconds / 1e6)
                disk.append(from_disk)
            median, low, high = sorted(speeds)[len(speeds) // 2], min(speeds), max(speeds)
            disk_reads = "unknown" if None in disk else f"{sum(filter(None, disk)) / len(disk) / 1e6:,.1f} MB"
            warm = "  (nothing: not a cold read)" if not any(disk) else ""
            print(
                f"{block:>8,} {f'{median:,.1f} ({low:,.1f}-{high:,.1f})':>22} {median / 2:>22,.1f} {disk_reads:>18}{warm}"
            )


if __name__ == "__main__":
    main()

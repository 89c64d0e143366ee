"""Random windows read from memory maps: tokens a second, with one shard and with three hundred.

    python benchmarks/windows.py [--tokens 60000000] [--seq-len 512] [--batch 64]

The baseline, in the same run, is one strided numpy view over one memory map of the same tokens, which is the cost of a gather and
nothing else. `fetch` adds the two int64 arrays that a training loop needs, `apart` the position ids for documents that are kept apart.
Document lengths are lognormal, so that `pack` has something to pack. The page cache is warm.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
from machine import describe_machine
from numpy.typing import NDArray

from minimind_data.dataset.format import Manifest, ShardEntry, ShardOrigin, TokenizerInfo
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.writer import ShardWriter
from minimind_data.windows.base import Layout
from minimind_data.windows.opening import open_windows

_DOCUMENT_TOKENS = 300
"""The mean."""
_ROUNDS = 7
_BATCHES = 1500


def make_dataset(folder: Path, num_shards: int, num_tokens: int) -> ShardSet:
    """Write a dataset of random tokens."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(b"{}")
    source = np.random.default_rng(0)
    entries = []
    for index in range(num_shards):
        documents = num_tokens // num_shards // _DOCUMENT_TOKENS
        lengths = np.exp(source.normal(np.log(_DOCUMENT_TOKENS) - 0.5, 1.0, documents)).astype(np.int64) + 2
        stops = np.cumsum(lengths)
        tokens = source.integers(3, 6400, stops[-1]).astype("<u2")
        tokens[stops - lengths], tokens[stops - 1] = 1, 2
        with ShardWriter(folder, f"random-{index:05d}", "uint16") as writer:
            writer.append(tokens, lengths)
            written = writer.commit()
        origin = ShardOrigin(input=0, input_start=0, input_stop=0, input_sha256="")
        entries.append(ShardEntry(name=f"random-{index:05d}", written=written, origin=origin))
    info = TokenizerInfo(
        sha256=hashlib.sha256(b"{}").hexdigest(), vocab_size=6400, bos_id=1, eos_id=2, pad_id=0
    )
    manifest = Manifest(
        kind="pretrain", dtype="uint16", tokenizer=info, options={}, inputs=(), shards=tuple(entries)
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return ShardSet.open(folder)


def million_tokens_a_second(
    read: Callable[[NDArray[np.int64]], object], batches: list[NDArray[np.int64]], seq_len: int
) -> float:
    """Return the median over rounds."""
    speeds = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        for batch in batches:
            read(batch)
        speeds.append(len(batches) * len(batches[0]) * seq_len / (time.perf_counter() - start) / 1e6)
    return statistics.median(speeds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=60_000_000)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    seq_len = arguments.seq_len
    print(describe_machine())
    print(
        f"{arguments.tokens / 1e6:.0f} M tokens, windows of {seq_len}, batches of {arguments.batch}; M tokens/s, median of {_ROUNDS}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for num_shards in (1, 300):
            shards = make_dataset(Path(folder) / str(num_shards), num_shards, arguments.tokens)
            start = time.perf_counter()
            shards = ShardSet.open(shards.folder)
            opened = time.perf_counter() - start
            source = np.random.default_rng(1)
            for layout in get_args(Layout):
                windows = open_windows(shards, layout=layout, seq_len=seq_len)
                apart = open_windows(shards, layout=layout, seq_len=seq_len, documents_apart=True)
                batches = [source.integers(0, len(windows), arguments.batch) for _ in range(_BATCHES)]
                row = f"{num_shards:4} shards, {layout:6}  fetch {million_tokens_a_second(windows.fetch, batches, seq_len):6.0f}"
                row += f"  apart {million_tokens_a_second(apart.fetch, batches, seq_len):6.0f}"
                if layout == "concat":
                    starts = [batch * seq_len for batch in batches]
                    width = seq_len + 1
                    rows = million_tokens_a_second(
                        lambda batch, shards=shards, width=width: shards.rows(batch, width), starts, seq_len
                    )
                    row += f"  rows {rows:6.0f}"
                    if num_shards == 1:
                        view = np.lib.stride_tricks.sliding_window_view(shards.shard(0).tokens, width)
                        row += f"  one plain strided view {million_tokens_a_second(lambda batch, view=view: view[batch], starts, seq_len):6.0f}"
                    row += f"  opened in {opened * 1e3:.1f} ms"
                print(row)


if __name__ == "__main__":
    main()

"""Our StepLoader over windows of layout concat in a full shuffle; one step is one batch.

A grown dataset is one shard of documents of 2^30 tokens in a sparse file.
"""

import hashlib
import shutil
from collections.abc import Iterator

import numpy as np
from load_task import LoadTask, run
from torch import Tensor

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
from minimind_data.dataset.writer import ShardWriter
from minimind_data.windows.base import Windows
from minimind_data.windows.opening import open_windows
from minimind_train.batches.steps import BatchDivision, StepLoader
from minimind_train.order.sample_order import OrderKind, SampleOrder
from minimind_train.order.sample_range import SampleRange

_SHARD_TOKENS = 20_000_000
"""What a split of 64 MiB of text makes."""
_GROWN_DOCUMENT_TOKENS = 2**30
_TOKEN_BYTES = 2
_UNKNOWN = ShardOrigin(input=0, input_start=0, input_stop=0, input_sha256="")


def write(task: LoadTask) -> None:
    lengths = np.fromfile(task.lengths, np.int64)
    stops = np.cumsum(lengths)
    tokens = task.tokens
    cuts = np.searchsorted(stops, np.arange(_SHARD_TOKENS, stops[-1], _SHARD_TOKENS))
    entries, begun = [], 0
    for number, documents in enumerate(np.split(np.arange(len(lengths)), cuts)):
        name = f"text-{number:05d}"
        stop = int(stops[documents[-1]])
        with ShardWriter(task.folder, name, "uint16") as writer:
            writer.append(tokens[begun:stop], lengths[documents])
            entries.append(ShardEntry(name=name, written=writer.commit(), origin=_UNKNOWN))
        begun = stop
    _finish(task, entries)


def grow(task: LoadTask) -> None:
    name, tokens = "text-00000", task.num_windows * task.seq_len + 1
    count = -(-tokens // _GROWN_DOCUMENT_TOKENS)
    lengths = np.full(count, _GROWN_DOCUMENT_TOKENS)
    lengths[-1] -= lengths.sum() - tokens
    header = IndexHeader(dtype="uint16", num_sequences=count, num_documents=count)
    (task.folder / f"{name}.idx").write_bytes(index_bytes(header, lengths, np.arange(count + 1)))
    with (task.folder / f"{name}.bin").open("wb") as file:
        file.write(np.array([task.bos_id], "<u2").tobytes())
        file.seek((tokens - 1) * _TOKEN_BYTES)
        file.write(np.array([task.eos_id], "<u2").tobytes())
    written = WrittenShard(
        documents=count,
        sequences=count,
        tokens=tokens,
        bytes=tokens * _TOKEN_BYTES,
        sha256="",
        index_sha256="",
    )
    _finish(task, [ShardEntry(name=name, written=written, origin=_UNKNOWN)])


def _finish(task: LoadTask, entries: list[ShardEntry]) -> None:
    shutil.copyfile(task.tokenizer, task.folder / "tokenizer.json")
    info = TokenizerInfo(
        sha256=hashlib.sha256(task.tokenizer.read_bytes()).hexdigest(),
        vocab_size=task.vocab_size,
        bos_id=task.bos_id,
        eos_id=task.eos_id,
        pad_id=0,
    )
    manifest = Manifest(
        kind="pretrain", dtype="uint16", tokenizer=info, options={}, inputs=(), shards=tuple(entries)
    )
    (task.folder / "manifest.json").write_text(manifest.to_json())


def opened(task: LoadTask, block: int = 1, kind: OrderKind = "shuffled") -> tuple[Windows, SampleOrder]:
    windows = open_windows(ShardSet.open(task.folder), layout="concat", seq_len=task.seq_len)
    return windows, SampleOrder(num_windows=len(windows), seed=42, block=block, kind=kind)


def batches(
    task: LoadTask, start: int, block: int = 1, kind: OrderKind = "shuffled"
) -> Iterator[tuple[Tensor, Tensor]]:
    windows, order = opened(task, block, kind)
    position, stop = start * task.batch, len(windows) // task.batch * task.batch
    with StepLoader(
        windows,
        SampleRange(order=order, start=position, stop=stop),
        BatchDivision(global_batch=task.batch, micro_batch=task.batch),
    ) as steps:
        for step in steps:
            (micro_batch,) = step.micro_batches
            yield micro_batch["input_ids"], micro_batch["targets"]


if __name__ == "__main__":
    run(write=write, batches=batches, grow=grow)

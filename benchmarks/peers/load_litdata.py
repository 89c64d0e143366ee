"""litdata: chunks of 64 MB by its Cache, with which optimize() writes, read by StreamingDataset with its shuffle and StreamingDataLoader.

Blocks are 513 tokens, of which 512 are inputs and 512 are targets. The last token of a block is not an input, and no block crosses the
end of a chunk. It shuffles chunks, and blocks inside a chunk. In a grown dataset, all chunks are one file under many names.
"""

import json
import os
from collections.abc import Iterator

import numpy as np
import torch
from litdata import StreamingDataLoader, StreamingDataset, TokensLoader
from litdata.streaming import Cache
from load_task import LoadTask, run
from torch import Tensor

_TOKENS_AT_A_TIME = 2**20
_GROWN_CHUNK_TOKENS = 30_000_000
_CHUNKS = "chunks"


def write(task: LoadTask) -> None:
    write_chunks(task, task.tokens)


def write_chunks(task: LoadTask, tokens: np.ndarray) -> None:
    cache = Cache(str(task.folder / _CHUNKS), chunk_bytes="64MB", item_loader=TokensLoader())
    for number, start in enumerate(range(0, len(tokens), _TOKENS_AT_A_TIME)):
        cache[number] = torch.from_numpy(np.array(tokens[start : start + _TOKENS_AT_A_TIME]))
    cache.done()
    cache.merge()


def grow(task: LoadTask) -> None:
    write_chunks(task, task.tokens[:_GROWN_CHUNK_TOKENS])
    folder = task.folder / _CHUNKS
    index = json.loads((folder / "index.json").read_text())
    chunk = max(index["chunks"], key=lambda chunk: chunk["dim"])
    blocks = chunk["dim"] // (task.seq_len + 1)
    grown = []
    for number in range(-(-task.num_windows // blocks)):
        name = f"chunk-grown-{number}.bin"
        os.link(folder / chunk["filename"], folder / name)
        grown.append({**chunk, "filename": name})
    index["chunks"] = grown
    (folder / "index.json").write_text(json.dumps(index))


def batches(task: LoadTask, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    dataset = StreamingDataset(
        str(task.folder / _CHUNKS), item_loader=TokensLoader(block_size=task.seq_len + 1), shuffle=True
    )
    loader = StreamingDataLoader(dataset, batch_size=task.batch, num_workers=task.workers, drop_last=True)
    if start:
        state = loader.state_dict()
        for part in (state, state["dataset"]):
            part["num_samples_yielded"] = start * task.batch
        state["dataset"]["sample_in_epoch"] = start * task.batch
        state["current_epoch"] = state["dataset"]["current_epoch"] = 1
        loader.load_state_dict(state)
    for rows in loader:
        yield rows[:, :-1].long().contiguous(), rows[:, 1:].long().contiguous()


if __name__ == "__main__":
    run(write=write, batches=batches, grow=grow)

"""MosaicML Streaming: each window is a sample, `ndarray:uint16`, by MDSWriter; StreamingDataset with its shuffle, and StreamingDataLoader.

The shuffle is py1e, its default. In a grown dataset, all shards are one file under many names. A state is that of the loader.
"""

import itertools
import json
import os
from collections.abc import Iterator

import numpy as np
import torch
from load_task import LoadTask, run
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch import Tensor

_FOLDER = "mds"
_GROWN_SHARD_WINDOWS = 60_000
"""In 64 MB, which is where MDSWriter begins another shard."""


class Windows(StreamingDataset):
    def __getitem__(self, at: int) -> Tensor:
        return torch.from_numpy(super().__getitem__(at)["tokens"].astype(np.int64))


def write(task: LoadTask) -> None:
    write_windows(task, None)


def write_windows(task: LoadTask, count: int | None) -> None:
    with MDSWriter(out=str(task.folder / _FOLDER), columns={"tokens": "ndarray:uint16"}) as writer:
        for window in itertools.islice(task.windows(), count):
            writer.write({"tokens": window})


def grow(task: LoadTask) -> None:
    write_windows(task, _GROWN_SHARD_WINDOWS)
    folder = task.folder / _FOLDER
    index = json.loads((folder / "index.json").read_text())
    shard = max(index["shards"], key=lambda shard: shard["samples"])
    grown = []
    for number in range(-(-task.num_windows // shard["samples"])):
        name = f"grown-{number:06d}.mds"
        os.link(folder / shard["raw_data"]["basename"], folder / name)
        grown.append({**shard, "raw_data": {**shard["raw_data"], "basename": name}})
    (folder / "index.json").write_text(json.dumps({**index, "shards": grown}))


def batches(task: LoadTask, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    clean_stale_shared_memory()  # of a run that ended before its workers
    windows = Windows(
        local=str(task.folder / _FOLDER), shuffle=True, batch_size=task.batch, num_canonical_nodes=1
    )
    loader = StreamingDataLoader(windows, batch_size=task.batch, num_workers=task.workers, drop_last=True)
    if start:
        loader.load_state_dict({**loader.state_dict(), "epoch": 0, "sample_in_epoch": start * task.batch})
    for rows in loader:
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


if __name__ == "__main__":
    run(write=write, batches=batches, grow=grow)

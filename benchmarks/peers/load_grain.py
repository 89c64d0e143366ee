"""grain: a MapDataset with its own shuffle over a random-access source, in batches that are converted to int64 as a whole.

grain reads anything with `__len__` and `__getitem__`, here one memory map. Without workers its threads are off, as its documentation
recommends for data in memory; with workers they are on. A state is that of its iterator.
"""

from collections.abc import Iterator

import grain
import numpy as np
import torch
from load_task import LoadTask, run
from sparse import sparse_stream
from torch import Tensor


class Source:
    def __init__(self, task: LoadTask) -> None:
        self.tokens = np.memmap(task.folder / "tokens.bin", np.uint16, "r")
        self.seq_len = task.seq_len

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, window: int) -> np.ndarray:
        start = window * self.seq_len
        return self.tokens[start : start + self.seq_len + 1]


def write(task: LoadTask) -> None:
    task.tokens.tofile(task.folder / "tokens.bin")


def grow(task: LoadTask) -> None:
    sparse_stream(task.folder / "tokens.bin", task.num_windows * task.seq_len + 1)


def pair(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))


def batches(task: LoadTask, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    windows = grain.MapDataset.source(Source(task)).shuffle(seed=42)
    threads = (
        grain.ReadOptions() if task.workers else grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)
    )
    dataset = windows.to_iter_dataset(threads)
    dataset = dataset.batch(task.batch, drop_remainder=True)
    if task.workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=task.workers))
    iterator = iter(dataset.map(pair))
    if start:
        assert not task.workers, "the state of several workers holds one count for each"
        iterator.set_state({"next_index": start * task.batch})
    return iterator


if __name__ == "__main__":
    run(write=write, batches=batches, grow=grow)

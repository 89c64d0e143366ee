"""torch's DataLoader over a map-style dataset on one memory map, in the order of a list from torch.randperm.

torch has no state to resume from. So this does the cheapest that a user can do: make the same list again and cut off its beginning.
"""

from collections.abc import Iterator

import numpy as np
import torch
from load_task import LoadTask, run
from sparse import sparse_stream
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Windows(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, task: LoadTask) -> None:
        self.tokens = np.memmap(task.folder / "tokens.bin", np.uint16, "r")
        self.seq_len = task.seq_len

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, window: int) -> tuple[Tensor, Tensor]:
        start = window * self.seq_len
        row = torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))
        return row[:-1], row[1:]


def write(task: LoadTask) -> None:
    task.tokens.tofile(task.folder / "tokens.bin")


def grow(task: LoadTask) -> None:
    sparse_stream(task.folder / "tokens.bin", task.num_windows * task.seq_len + 1)


def batches(task: LoadTask, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    windows = Windows(task)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(42)).tolist()
    loader = DataLoader(
        windows,
        batch_size=task.batch,
        sampler=order[start * task.batch :],
        num_workers=task.workers,
        drop_last=True,
    )
    return map(tuple, loader)


if __name__ == "__main__":
    run(write=write, batches=batches, grow=grow)

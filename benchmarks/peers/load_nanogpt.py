"""nanoGPT's get_batch, in our version: a memory map opened again for each batch, and windows drawn at random with replacement.

There is no order and no epoch, so there is no state to resume from: a resume in the middle of an epoch draws again from the start.
"""

from collections.abc import Iterator

import numpy as np
import torch
from load_task import LoadTask, run
from sparse import sparse_stream
from torch import Tensor


def write(task: LoadTask) -> None:
    task.tokens.tofile(task.folder / "tokens.bin")


def grow(task: LoadTask) -> None:
    sparse_stream(task.folder / "tokens.bin", task.num_windows * task.seq_len + 1)


def get_batch(task: LoadTask) -> tuple[Tensor, Tensor]:
    tokens = np.memmap(task.folder / "tokens.bin", np.uint16, "r")
    places = torch.randint(len(tokens) - task.seq_len, (task.batch,))

    def rows(shift: int) -> Tensor:
        return torch.stack(
            [
                torch.from_numpy(tokens[place + shift : place + shift + task.seq_len].astype(np.int64))
                for place in places
            ]
        )

    return rows(0), rows(1)


def batches(task: LoadTask, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    torch.manual_seed(1337 + start)
    while True:
        yield get_batch(task)


if __name__ == "__main__":
    run(write=write, batches=batches, grow=grow)

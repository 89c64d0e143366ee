"""Our WindowDataset and ResumableBatchSampler in torch's DataLoader, as in any training loop."""

from collections.abc import Iterator

from load_ours import grow, opened, write
from load_task import LoadTask, run
from torch import Tensor
from torch.utils.data import DataLoader

from minimind_train.batches.torch_loader import ResumableBatchSampler, WindowDataset


def batches(task: LoadTask, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    windows, order = opened(task)
    sampler = ResumableBatchSampler(order, task.batch, start=start * task.batch, drop_last=True)
    loader = DataLoader(WindowDataset(windows), sampler=sampler, batch_size=None, num_workers=task.workers)
    return ((batch["input_ids"], batch["targets"]) for batch in loader)


if __name__ == "__main__":
    run(write=write, batches=batches, grow=grow)

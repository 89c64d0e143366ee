"""datatrove: DatatroveFolderDataset over files of its TokenizedFile writer, in torch's DataLoader, one window after the other.

Its documentation recommends to shuffle documents while they are tokenized, and to read windows in the order of the files: reads at
random are slow, and a second epoch repeats the first. So this measures no shuffle at all, and a state is the number of the next
window. A window is 513 tokens at a stride of 513; the last token is not an input.
"""

from collections.abc import Iterator

from datatrove.pipeline.tokens.tokenizer import TokenizedFile
from datatrove.utils.dataset import DatatroveFolderDataset
from load_task import LoadTask, run
from sparse import sparse_stream
from torch import Tensor
from torch.utils.data import DataLoader

_NAME = "tokens.ds"


def write(task: LoadTask) -> None:
    file = TokenizedFile(str(task.folder), _NAME, save_index=True, token_size=2)
    for document in task.documents():
        file.write_bytes(document.tobytes())
    file.close()


def grow(task: LoadTask) -> None:
    sparse_stream(task.folder / _NAME, task.num_windows * (task.seq_len + 1))


def batches(task: LoadTask, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    windows = DatatroveFolderDataset(str(task.folder), task.seq_len, filename_pattern="*.ds", recursive=False)
    loader = DataLoader(
        windows,
        batch_size=task.batch,
        sampler=range(start * task.batch, len(windows)),
        num_workers=task.workers,
        drop_last=True,
    )
    for batch in loader:
        rows = batch["input_ids"]
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


if __name__ == "__main__":
    run(write=write, batches=batches, grow=grow)

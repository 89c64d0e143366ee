"""MiniMind's own loader, in our version: texts in `datasets`, tokenized in __getitem__, cut and padded to length, and a batch sampler
that walks through the batches that are done.

As in MiniMind: `load_dataset("json")`, the tokenizer of `transformers` called for each text with truncation, BOS and EOS around it,
torch.randperm(n).tolist() for the order, and labels that equal the inputs. A grown dataset is the same few texts under higher numbers,
so only the order and the walk grow.
"""

from collections.abc import Iterator, Sequence

import datasets
import torch
from datasets import load_dataset
from load_task import LoadTask, run
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer

_LENGTH_NAME = "num_windows"


def texts(task: LoadTask) -> datasets.Dataset:
    """Return the texts, in an Arrow file that the first call makes."""
    return load_dataset(
        "json", data_files=str(task.text), split="train", cache_dir=str(task.folder / "arrow")
    )


class Texts(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, task: LoadTask) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(str(task.tokenizer.parent))
        self.bos_id, self.eos_id, self.pad_id = task.bos_id, task.eos_id, self.tokenizer.pad_token_id
        self.seq_len = task.seq_len
        self.samples = texts(task)
        grown = task.folder / _LENGTH_NAME
        self.length = int(grown.read_text()) if grown.exists() else len(self.samples)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        text = self.samples[index % len(self.samples)]["text"]
        encoded = self.tokenizer(
            str(text), add_special_tokens=False, max_length=self.seq_len - 2, truncation=True
        )
        ids = [self.bos_id, *encoded.input_ids, self.eos_id]
        input_ids = torch.tensor(ids + [self.pad_id] * (self.seq_len - len(ids)), dtype=torch.long)
        labels = input_ids.clone()
        labels[input_ids == self.pad_id] = -100
        return input_ids, labels


class PassingOver:
    """Batches of an order, the first `done` of which are collated and thrown away."""

    def __init__(self, order: Sequence[int], batch: int, done: int) -> None:
        self.order, self.batch, self.done = order, batch, done

    def __iter__(self) -> Iterator[list[int]]:
        passed, batch = 0, []
        for window in self.order:
            batch.append(window)
            if len(batch) < self.batch:
                continue
            if passed < self.done:
                passed += 1
            else:
                yield batch
            batch = []

    def __len__(self) -> int:
        return max(0, len(self.order) // self.batch - self.done)


def write(task: LoadTask) -> None:
    texts(task)


def grow(task: LoadTask) -> None:
    (task.folder / _LENGTH_NAME).write_text(str(task.num_windows))
    write(task)


def batches(task: LoadTask, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    samples = Texts(task)
    torch.manual_seed(42)
    order = torch.randperm(len(samples)).tolist()
    loader = DataLoader(
        samples, batch_sampler=PassingOver(order, task.batch, start), num_workers=task.workers
    )
    return map(tuple, loader)


if __name__ == "__main__":
    run(write=write, batches=batches, grow=grow, is_shifted=False)

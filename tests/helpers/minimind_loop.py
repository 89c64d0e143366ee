"""MiniMind's loop in small, written down from what its `lm_dataset.py` and `train_pretrain.py` do, with nothing of ours in it.

The samples of a file, the batches of an epoch, what a batch adds to the gradient, when the weights are updated and by which learning
rate. The model is whatever gives logits for ids; the optimizer is left out, as nothing depends on which one it is.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

NO_TARGET = -100
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Samples:
    """Samples of one length: ids and labels, int64 [N, L]. The label at a place is its own id, or -100: shifting is the model's."""

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, indices: Sequence[int]) -> "Samples":
        """Return some of them."""
        return Samples(self.ids[indices], self.labels[indices])

    @property
    def inputs(self) -> Tensor:
        """What goes into the model for the sake of a loss: all ids but the last."""
        return self.ids[:, :-1]

    @property
    def targets(self) -> Tensor:
        """What is learned at each of `inputs`."""
        return self.labels[:, 1:]


def tokenizer_in(folder: Path):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def text_samples(texts: Sequence[str], tokenizer, max_seq_len: int) -> Samples:
    """BOS, the first tokens of the text, EOS, and PAD up to `max_seq_len`; PAD is no target, whoever wrote it."""
    rows = []
    for text in texts:
        tokens = tokenizer(
            text, add_special_tokens=False, max_length=max_seq_len - 2, truncation=True
        ).input_ids
        rows.append([tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id])
    ids = _padded(rows, tokenizer.pad_token_id, max_seq_len)
    return Samples(ids, ids.masked_fill(ids == tokenizer.pad_token_id, NO_TARGET))


def chat_samples(
    conversations: Sequence[list[dict]],
    tokenizer,
    max_seq_len: int,
    keeps_empty_thought: Callable[[str], bool] = lambda _: True,
) -> Samples:
    """What the chat template writes, cut and padded; targets are the answers, each with the mark that ends it."""
    begin = tokenizer(f"{tokenizer.bos_token}assistant\n", add_special_tokens=False).input_ids
    end = tokenizer(f"{tokenizer.eos_token}\n", add_special_tokens=False).input_ids
    rows = []
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        if not keeps_empty_thought(text):
            text = text.replace(EMPTY_THOUGHT, "")
        rows.append(tokenizer(text).input_ids[:max_seq_len])
    ids = _padded(rows, tokenizer.pad_token_id, max_seq_len)
    labels = torch.full_like(ids, NO_TARGET)
    for row, label in zip(ids.tolist(), labels, strict=True):
        place = 0
        while place < max_seq_len:
            if row[place : place + len(begin)] != begin:
                place += 1
                continue
            first = last = place + len(begin)
            while last < max_seq_len and row[last : last + len(end)] != end:
                last += 1
            label[first : last + len(end)] = torch.tensor(row[first : last + len(end)])
            place = last + len(end)
    return Samples(ids, labels)


def _padded(rows: list[list[int]], pad: int, length: int) -> Tensor:
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])


@dataclass(frozen=True)
class Update:
    """One step of the optimizer."""

    micro_batches: list[list[int]]
    """The samples of each batch whose gradients it adds up."""
    strength: float
    """What its gradient is worth beside that of a whole update: the mean over fewer batches, not divided by fewer."""
    rate: float
    """The learning rate, as a share of the peak."""


def updates(num_samples: int, *, batch_size: int, accumulation_steps: int, epochs: int) -> Iterator[Update]:
    """The updates of a run on one process: samples in a new order in each epoch, and the rest of an epoch in an update of its own."""
    iterations = math.ceil(num_samples / batch_size)
    for epoch in range(epochs):
        order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(42 + epoch))
        batches = [batch.tolist() for batch in order.split(batch_size)]
        for first in range(0, iterations, accumulation_steps):
            micro_batches = batches[first : first + accumulation_steps]
            number = epoch * iterations + first + len(micro_batches)
            yield Update(
                micro_batches,
                strength=len(micro_batches) / accumulation_steps,
                rate=0.1 + 0.45 * (1 + math.cos(math.pi * number / (epochs * iterations))),
            )


def loss_of(logits_of: Callable[[Tensor], Tensor], samples: Samples) -> Tensor:
    """The loss of one batch: the mean over its own targets, however few they are."""
    learned = samples.targets != NO_TARGET
    end = int(learned.any(0).nonzero().max()) + 1  # what stands behind the last target changes nothing
    logits = logits_of(samples.inputs[:, :end])[learned[:, :end]]
    return functional.cross_entropy(logits, samples.targets[learned])


def gradient(
    logits_of: Callable[[Tensor], Tensor],
    weights: list[Tensor],
    batches: list[Samples],
    accumulation_steps: int,
) -> Tensor:
    """The gradient of an update, over all weights: the sum over its batches, each loss divided by `accumulation_steps`."""
    loss = sum(loss_of(logits_of, batch) / accumulation_steps for batch in batches)
    return torch.cat([one.flatten() for one in torch.autograd.grad(loss, weights)])


def balance_of(scores: Tensor) -> Tensor:
    """How unevenly the experts are used by the tokens of one micro-batch, one expert a token: scores [..., E] after the softmax."""
    scores = scores.flatten(0, -2)
    load = functional.one_hot(scores.argmax(-1), scores.shape[-1]).float().mean(0)
    return (load * scores.mean(0)).sum() * scores.shape[-1]

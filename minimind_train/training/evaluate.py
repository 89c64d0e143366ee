"""Evaluation on a dataset that is not trained on: loss, perplexity and bits per byte; for pairs, the loss and metrics of their objective.

The windows are the same every time, so evaluations of a run, or of two runs, can be compared. **loss** is the mean over all learned
targets, in nats, and **perplexity** is its exponential. **bits per byte** is the loss of all targets in bits, over the bytes of their text
in UTF-8; it does not depend on the vocabulary. Special tokens are not text: they add to the bits but not to the bytes.

An evaluation changes nothing in a run: it draws no random number, moves no weight, and leaves the model in training mode.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minimind_data.dataset.format import IGNORED
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.reporting import Say
from minimind_data.tokenizer.loading import Tokenizer, cached_tokenizer
from minimind_data.tokenizer.token_bytes import token_bytes_of
from minimind_data.windows.base import Windows, WindowSource
from minimind_data.windows.opening import open_windows
from minimind_train.batches.trimming import trimmed
from minimind_train.objectives.objective import Objective
from minimind_train.training.learner import Compute

__all__ = ["Evaluation", "Evaluator", "open_evaluator", "validation"]

_MAX_EXPONENT = 700.0
"""A perplexity above its exponential is no float; for a model that bad the loss says enough."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The numbers of an evaluation."""

    loss: float
    """Nats per learned target; of pairs, the objective's loss per pair."""
    perplexity: float | None = None
    """For text only, as are the three below."""
    bits_per_byte: float | None = None
    targets: int | None = None
    """Learned targets."""
    bytes: int | None = None
    """Bytes of their text."""
    pairs: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Other metrics of the objective, as means over the pairs."""

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers that there are, by name."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        del values["metrics"]
        return {**values, **self.metrics}

    def __str__(self) -> str:
        """Return the numbers in one line."""
        if self.pairs is not None:
            means = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in self.metrics.items())
            return f"loss {self.loss:.4f}, {means} ({self.pairs:,} pairs)"
        return (
            f"loss {self.loss:.4f}, perplexity {self.perplexity:,.2f}, {self.bits_per_byte:.4f} bits a byte "
            f"({self.targets:,} targets, {self.bytes:,} bytes)"
        )


class Evaluator:
    """Evaluates models on fixed windows of a dataset.

    Args:
        windows: the dataset's windows, in the layout and length that the model was trained with.
        tokenizer: the dataset's, for counting the bytes of its text; None for pairs, which have no bits per byte.
        num_windows: how many of the windows, spread evenly; None takes all.
        batch_size: windows in one forward pass.
        compute: where the model is. If there are several ranks, each evaluates its share of the batches.

    Attributes:
        windows: the windows passed.
        samples: where batches are read from: the windows, or a `WindowSource` that adds to them.

    Raises:
        UserError: there is no text in these windows.
    """

    def __init__(
        self,
        windows: Windows,
        tokenizer: Tokenizer | None,
        *,
        num_windows: int | None,
        batch_size: int,
        compute: Compute,
    ) -> None:
        self.windows = windows
        self.samples: WindowSource = windows
        self._count = min(num_windows or len(windows), len(windows))
        self._batch_size = batch_size
        self._compute = compute
        self._bytes_of = _byte_counter(tokenizer) if tokenizer else None
        self._num_bytes: int | None = None  # the same every time, so counted once
        if self._bytes_of and not any(self._bytes_of(samples) for samples in self._batches()):
            raise UserError(
                f"the {self._count:,} windows for validation hold no text",
                where=windows.shards.folder,
                remedy="take more of them or another dataset",
            )

    @property
    def num_windows(self) -> int:
        """How many windows are evaluated."""
        return self._count

    @property
    def windows_key(self) -> str:
        """Names the dataset and the windows taken from it; only losses with the same key can be compared."""
        windows = self.windows
        return f"{windows.shards.manifest.fingerprint[:16]} {self._count} {windows.layout} {windows.seq_len}"

    def measure(self, objective: Objective, *, report: Callable[[int], object] | None = None) -> Evaluation:
        """Evaluate the objective's model, and leave it in the mode that it was in.

        Args:
            objective: over the model.
            report: called after each batch with its number of windows.

        Raises:
            UserError: the loss is not finite.
        """
        was_training = objective.training
        objective.eval()
        loss_sum, num_terms, num_bytes = 0.0, 0, 0
        metric_sums: dict[str, float] = {}
        try:
            with torch.no_grad(), self._compute.forward():
                for samples, counts in self._own_batches():
                    tensors = {
                        name: torch.from_numpy(array).to(self._compute.device)
                        for name, array in samples.items()
                    }
                    losses = objective(tensors)
                    if report:
                        report(len(next(iter(samples.values()))))
                    for name, value in losses.metrics.items():
                        metric_sums[name] = metric_sums.get(name, 0.0) + float(value) * counts
                    if not counts:
                        continue
                    loss_sum += float(losses.summed)
                    num_terms += objective.num_terms(samples)
                    if self._bytes_of and self._num_bytes is None:
                        num_bytes += self._bytes_of(samples)
        finally:
            objective.train(was_training)
        loss_sum, terms, text_bytes, *sums = self._compute.world.all_reduce_sum(
            (loss_sum, num_terms, num_bytes, *metric_sums.values())
        )
        num_terms, num_bytes = int(terms), int(text_bytes)
        if self._num_bytes is None:
            self._num_bytes = num_bytes
        loss = loss_sum / num_terms
        if not math.isfinite(loss):
            raise UserError(
                f"the model's loss on it is {loss}",
                where=self.windows.shards.folder,
                remedy="go back to an earlier checkpoint",
            )
        if not self._bytes_of:
            means = {name: value / num_terms for name, value in zip(metric_sums, sums, strict=True)}
            return Evaluation(loss=loss, pairs=num_terms, metrics=means)
        return Evaluation(
            loss=loss,
            perplexity=math.exp(min(loss, _MAX_EXPONENT)),
            bits_per_byte=loss_sum / math.log(2) / self._num_bytes,
            targets=num_terms,
            bytes=self._num_bytes,
        )

    def _batches(self) -> Iterator[dict[str, NDArray[np.int64]]]:
        return map(self._batch_at, self._firsts)

    def _own_batches(self) -> Iterator[tuple[dict[str, NDArray[np.int64]], bool]]:
        """Yield this rank's batches, and whether they count; one that does not makes up for a pass that only other ranks have."""
        world = self._compute.world
        own = self._firsts[world.rank :: world.size]
        for first in own:
            yield self._batch_at(first), True
        if len(own) * world.size < len(self._firsts):
            yield self._batch_at(0), False

    @property
    def _firsts(self) -> range:
        """The first of the windows of each batch."""
        return range(0, self._count, self._batch_size)

    def _batch_at(self, first: int) -> dict[str, NDArray[np.int64]]:
        numbers = np.arange(first, min(first + self._batch_size, self._count), dtype=np.int64)
        # Outside of training no expert is balanced, so trimming changes nothing for experts either.
        return trimmed(self.samples.fetch(numbers * len(self.samples) // self._count))


def open_evaluator(
    shards: ShardSet,
    *,
    num_windows: int | None,
    batch_size: int,
    compute: Compute,
    say: Say,
    **options: Any,
) -> Evaluator:
    """Return the evaluator of a dataset; `options` are those of `open_windows`, the others those of `Evaluator`.

    Raises:
        UserError: the dataset has no such window, or there is no text in them.
    """
    windows = open_windows(shards, say=say, **options)
    tokenizer = None
    if shards.manifest.kind != "dpo":
        text = shards.tokenizer_json
        tokenizer = cached_tokenizer(text, shards.manifest.tokenizer)
    return Evaluator(windows, tokenizer, num_windows=num_windows, batch_size=batch_size, compute=compute)


def validation(
    evaluator: Evaluator | None, objective: Objective, *, every: int, total_steps: int
) -> Callable[[int], dict[str, Any]]:
    """Return the validation that a loop calls after each step: where it is due, it evaluates and returns the metrics.

    Without an evaluator it never is.
    """

    def validate(step: int) -> dict[str, Any]:
        if evaluator is None or (step % every and step != total_steps):
            return {}
        evaluation = evaluator.measure(objective).as_dict()
        return {f"val_{name}": value for name, value in evaluation.items()}

    return validate


def _byte_counter(tokenizer: Tokenizer) -> Callable[[dict[str, NDArray[np.int64]]], int]:
    """Return a function that counts the bytes of text in a batch's targets: by a table where tokens are bytes, else by decoding."""
    token_bytes = token_bytes_of(tokenizer)
    if not token_bytes.is_exact:
        return lambda samples: sum(
            _decoded_bytes(tokenizer, *row)
            for row in zip(samples["input_ids"], samples["targets"], strict=True)
        )
    num_bytes = token_bytes.num_bytes
    num_bytes[sorted(token_bytes.special)] = 0

    def count(samples: dict[str, NDArray[np.int64]]) -> int:
        targets = samples["targets"]
        return int(num_bytes[targets[targets != IGNORED]].sum())

    return count


def _decoded_bytes(tokenizer: Tokenizer, input_ids: NDArray[np.int64], targets: NDArray[np.int64]) -> int:
    """Return how many bytes the targets of a window add to the text before them."""
    learned = np.flatnonzero(targets != IGNORED)
    if not learned.size:
        return 0
    # Decoded with the token before them, as many decoders drop a leading space.
    before = [int(input_ids[learned[0]])]
    text, text_before = (
        tokenizer.reference.decode(ids, skip_special_tokens=True)
        for ids in (before + targets[learned].tolist(), before)
    )
    return len(text.encode()) - len(text_before.encode())

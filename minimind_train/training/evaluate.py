"""How well a model knows a text that it does not learn: loss, perplexity and bits per byte; of pairs, what their objective measures.

The windows are the same every time, so two numbers can be compared, and so can two runs. **loss** is the mean over all learned
targets, in nats; **perplexity** is its exponential. **bits per byte** is what the model needs for the text, all targets together, over
the bytes of the text in UTF-8; it does not depend on the vocabulary. Special tokens are no text: they cost bits and count no bytes.

Measuring leaves no trace in a run: it draws no random number, moves no weight, and puts the model back into training.
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
"""Above it a perplexity is no float; a model that bad is told by its loss."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What came out."""

    loss: float
    """Nats per learned target; of pairs, the objective's loss per pair."""
    perplexity: float | None = None
    """As the three below, of text alone."""
    bits_per_byte: float | None = None
    targets: int | None = None
    """Learned targets."""
    bytes: int | None = None
    """Of their text."""
    pairs: int | None = None
    measures: Mapping[str, float] = field(default_factory=dict)
    """What else the objective measures, as means over the pairs."""

    def as_dict(self) -> dict[str, Any]:
        """Return what there is, by name."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        del values["measures"]
        return {**values, **self.measures}

    def __str__(self) -> str:
        """Say it in a line."""
        if self.pairs is not None:
            means = ", ".join(
                f"{name.replace('_', ' ')} {value:.4f}" for name, value in self.measures.items()
            )
            return f"loss {self.loss:.4f}, {means} ({self.pairs:,} pairs)"
        return (
            f"loss {self.loss:.4f}, perplexity {self.perplexity:,.2f}, {self.bits_per_byte:.4f} bits a byte "
            f"({self.targets:,} targets, {self.bytes:,} bytes)"
        )


class Evaluator:
    """Measures models on fixed windows of a dataset.

    Args:
        windows: the dataset, cut as the model is used to.
        tokenizer: the dataset's, which tells how many bytes its text has; None for pairs, which are not measured by the byte.
        num_windows: how many of the windows, spread evenly; None takes all.
        batch: windows that go through the model at once.
        compute: where the model is, and the ranks that take the batches in turn.

    Attributes:
        windows: as they were given.
        samples: where samples are read: the windows, or what gives more for each of them.

    Raises:
        UserError: there is no text in these windows.
    """

    def __init__(
        self,
        windows: Windows,
        tokenizer: Tokenizer | None,
        *,
        num_windows: int | None,
        batch: int,
        compute: Compute,
    ) -> None:
        self.windows = windows
        self.samples: WindowSource = windows
        self._count = min(num_windows or len(windows), len(windows))
        self._batch = batch
        self._compute = compute
        self._bytes_of = _byte_counter(tokenizer) if tokenizer else None
        self._num_bytes: int | None = None  # the same every time, so counted once
        if self._bytes_of and not any(self._bytes_of(samples) for samples in self._batches()):
            raise UserError(
                f"{windows.shards.folder}: the {self._count:,} windows to measure on hold no text; take more of them or another dataset"
            )

    @property
    def num_windows(self) -> int:
        """How many windows are measured."""
        return self._count

    @property
    def measures_on(self) -> str:
        """What losses can be compared: a name of the dataset and of the windows that are taken of it."""
        windows = self.windows
        return f"{windows.shards.manifest.fingerprint[:16]} {self._count} {windows.layout} {windows.seq_len}"

    def measure(self, objective: Objective, *, report: Callable[[int], object] | None = None) -> Evaluation:
        """Return what the objective's model makes of the windows; it is left in the mode that it was in.

        Args:
            objective: with the model.
            report: told after each batch how many windows it had.

        Raises:
            UserError: the loss is not finite.
        """
        was_training = objective.training
        objective.eval()
        loss_sum, num_terms, num_bytes = 0.0, 0, 0
        measured: dict[str, float] = {}
        try:
            with torch.no_grad(), self._compute.forward():
                for samples, counts in self._own_batches():
                    tensors = {
                        name: torch.from_numpy(array).to(self._compute.device)
                        for name, array in samples.items()
                    }
                    found = objective(tensors)
                    if report:
                        report(len(next(iter(samples.values()))))
                    for name, value in found.measures.items():
                        measured[name] = measured.get(name, 0.0) + float(value) * counts
                    if not counts:
                        continue
                    loss_sum += float(found.summed)
                    num_terms += objective.num_terms(samples)
                    if self._bytes_of and self._num_bytes is None:
                        num_bytes += self._bytes_of(samples)
        finally:
            objective.train(was_training)
        loss_sum, terms, text_bytes, *sums = self._compute.world.all_reduce_sum(
            (loss_sum, num_terms, num_bytes, *measured.values())
        )
        num_terms, num_bytes = int(terms), int(text_bytes)
        if self._num_bytes is None:
            self._num_bytes = num_bytes
        loss = loss_sum / num_terms
        if not math.isfinite(loss):
            raise UserError(
                f"{self.windows.shards.folder}: the model's loss there is {loss}; go back to an earlier checkpoint"
            )
        if not self._bytes_of:
            means = {name: value / num_terms for name, value in zip(measured, sums, strict=True)}
            return Evaluation(loss=loss, pairs=num_terms, measures=means)
        return Evaluation(
            loss=loss,
            perplexity=math.exp(min(loss, _MAX_EXPONENT)),
            bits_per_byte=loss_sum / math.log(2) / self._num_bytes,
            targets=num_terms,
            bytes=self._num_bytes,
        )

    def _batches(self) -> Iterator[dict[str, NDArray[np.int64]]]:
        return map(self._fetched, self._firsts)

    def _own_batches(self) -> Iterator[tuple[dict[str, NDArray[np.int64]], bool]]:
        """Yield this rank's batches, and whether they count: in a pass that all ranks make together, each needs one to make."""
        world = self._compute.world
        own = self._firsts[world.rank :: world.size]
        for first in own:
            yield self._fetched(first), True
        if len(own) * world.size < len(self._firsts):
            yield self._fetched(0), False

    @property
    def _firsts(self) -> range:
        """The first of the windows of each batch."""
        return range(0, self._count, self._batch)

    def _fetched(self, first: int) -> dict[str, NDArray[np.int64]]:
        numbers = np.arange(first, min(first + self._batch, self._count), dtype=np.int64)
        # Nothing is balanced outside of training, so what is trimmed changes nothing, with experts either.
        return trimmed(self.samples.fetch(numbers * len(self.samples) // self._count))


def open_evaluator(
    shards: ShardSet,
    *,
    num_windows: int | None,
    batch: int,
    compute: Compute,
    say: Say,
    **options: Any,
) -> Evaluator:
    """Return what measures on a dataset; `options` are those of `open_windows`, the others those of `Evaluator`.

    Raises:
        UserError: the dataset has no such window, or there is no text in them.
    """
    windows = open_windows(shards, say=say, **options)
    tokenizer = None
    if shards.manifest.kind != "dpo":
        text = shards.tokenizer_json
        tokenizer = cached_tokenizer(text, shards.manifest.tokenizer)
    return Evaluator(windows, tokenizer, num_windows=num_windows, batch=batch, compute=compute)


def validation(
    evaluator: Evaluator | None, objective: Objective, *, every: int, total_steps: int
) -> Callable[[int], dict[str, Any]]:
    """Return what a loop calls after each step: it measures where that is due, and returns what metrics say of it.

    Without an evaluator it never does.
    """

    def validate(step: int) -> dict[str, Any]:
        if evaluator is None or (step % every and step != total_steps):
            return {}
        evaluation = evaluator.measure(objective).as_dict()
        return {f"val_{name}": value for name, value in evaluation.items()}

    return validate


def _byte_counter(tokenizer: Tokenizer) -> Callable[[dict[str, NDArray[np.int64]]], int]:
    """Return what counts the bytes of the text in a batch's targets: exactly where tokens are bytes, else by decoding."""
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
    """Return the bytes that the targets of a window add to what stands before them."""
    learned = np.flatnonzero(targets != IGNORED)
    if not learned.size:
        return 0
    # With the token before them, as many decoders leave out a space at the beginning.
    before = [int(input_ids[learned[0]])]
    whole, begun = (
        tokenizer.reference.decode(ids, skip_special_tokens=True)
        for ids in (before + targets[learned].tolist(), before)
    )
    return len(whole.encode()) - len(begun.encode())

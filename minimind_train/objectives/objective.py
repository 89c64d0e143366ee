"""Objectives: from a micro-batch, through the model, to sums of losses that are added up over micro-batches and ranks.

An objective is a module that holds the model, so that what wraps modules (data parallelism, sharding) wraps one forward pass and
knows where it begins and ends. It gives sums, never means: the loop divides by what the whole global batch has, over all
micro-batches and ranks, so that cutting a batch differently changes nothing but rounding.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from minimind_train.batches.samples import num_targets
from minimind_train.model.transformer import MiniMind
from minimind_train.objectives.losses import summed_cross_entropy


class MicroLoss(NamedTuple):
    """The losses of one micro-batch; every tensor is a float32 scalar on the model's device."""

    summed: Tensor
    """The sum of the losses at its terms; the loop divides by the terms of the step."""
    auxiliary: Tensor | None = None
    """A further loss, the mean over the micro-batch's windows; it counts by their share of the step's windows."""
    measures: Mapping[str, Tensor] = {}
    """Further sums over the terms, logged as means; no gradient is taken of them."""


class Objective(nn.Module):
    """The base class of objectives: a module that holds the model, and returns losses in place of logits.

    Args:
        model: what is learned.
    """

    def __init__(self, model: MiniMind) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # a new module would say that it trains, whatever its parts do

    def forward(self, micro_batch: Mapping[str, Tensor]) -> MicroLoss:
        """Return the losses of a micro-batch, int64 tensors [B, seq_len] by name."""
        raise NotImplementedError

    @staticmethod
    def num_terms(samples: Mapping[str, NDArray[np.int64]]) -> int:
        """Return how many terms the sum over these samples has."""
        raise NotImplementedError


class NextToken(Objective):
    """Cross-entropy of the next token, where there is one to learn: pre-training, and SFT with its mask in the targets."""

    def forward(self, micro_batch: Mapping[str, Tensor]) -> MicroLoss:
        """Take `input_ids`, `targets` and, where documents are kept apart, `position_ids`, int64 [B, seq_len] each."""
        hidden, balance = self.model.hidden_and_balance(
            micro_batch["input_ids"], position_ids=micro_batch.get("position_ids")
        )
        return MicroLoss(
            summed_cross_entropy(hidden, self.model.head_weight, micro_batch["targets"]), auxiliary=balance
        )

    @staticmethod
    def num_terms(samples: Mapping[str, NDArray[np.int64]]) -> int:
        """Return the number of learned targets."""
        return num_targets(samples)

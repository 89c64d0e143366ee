"""Objectives: they put a micro-batch through the model and return sums of losses, to be added up over micro-batches and ranks.

An objective is a module that holds the model, so that what wraps modules (data parallelism, sharding) wraps the whole forward pass.
It returns sums, never means: the loop divides by the number of terms of the whole global batch, over all
micro-batches and ranks, so that dividing a batch differently changes nothing but rounding.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from minimind_train.batches.arrays import num_targets
from minimind_train.model.transformer import MiniMind
from minimind_train.objectives.losses import summed_cross_entropy


class MicroLoss(NamedTuple):
    """The losses of one micro-batch; every tensor is a float32 scalar on the model's device."""

    summed: Tensor
    """The sum of the losses of its terms (targets, or pairs); the loop divides by the number of terms of the step."""
    auxiliary: Tensor | None = None
    """A further loss, the mean over the windows of the micro-batch; it is weighted by their share of the windows of the step."""
    metrics: Mapping[str, Tensor] = {}
    """Further sums over the terms, logged as means; they have no gradient."""


class Objective(nn.Module, ABC):
    """The base class of objectives: a module that holds the model, and returns losses in place of logits.

    Args:
        model: the model that is trained.
    """

    def __init__(self, model: MiniMind) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # a new module is in training mode, whatever mode its parts are in

    @abstractmethod
    def forward(self, micro_batch: Mapping[str, Tensor]) -> MicroLoss:
        """Return the losses of a micro-batch, int64 tensors [B, seq_len] by name."""

    @staticmethod
    @abstractmethod
    def num_terms(samples: Mapping[str, NDArray[np.int64]]) -> int:
        """Return how many terms the summed loss of these samples has."""


class NextToken(Objective):
    """Cross-entropy of the next token: pre-training, and SFT, whose targets have the loss mask applied."""

    def forward(self, micro_batch: Mapping[str, Tensor]) -> MicroLoss:
        """Return the losses of `input_ids`, `targets` and, where documents are kept apart, `position_ids`, int64 [B, seq_len] each."""
        hidden, balance = self.model.hidden_and_balance(
            micro_batch["input_ids"], position_ids=micro_batch.get("position_ids")
        )
        return MicroLoss(
            summed_cross_entropy(hidden, self.model.head_weight, micro_batch["targets"]), auxiliary=balance
        )

    @staticmethod
    def num_terms(samples: Mapping[str, NDArray[np.int64]]) -> int:
        """Return the number of targets that are not ignored."""
        return num_targets(samples)

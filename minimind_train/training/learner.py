"""What learns on one rank: the objective over its model, the optimizer, and where and in what precision they compute."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from minimind_train.model.config import Dtype
from minimind_train.model.precision import LossScale, autocast
from minimind_train.model.transformer import MiniMind
from minimind_train.objectives.objective import Objective
from minimind_train.parallel.sharding import is_sharded
from minimind_train.parallel.world import ALONE, World
from minimind_train.training.options import OptimizerOptions


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where a rank computes, in what precision, and with which other ranks."""

    device: torch.device
    dtype: Dtype
    """Of matrix products, resolved."""
    world: World = ALONE

    def forward(self) -> AbstractContextManager[object]:
        """Return the context of a forward pass."""
        return autocast(self.dtype, self.device)


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What learns on one rank, and what is needed to move its weights."""

    objective: Objective
    """Over the model, as it is for a world of one rank."""
    wrapped: nn.Module
    """What a step calls: the objective, wrapped by `parallelize` where there are several ranks."""
    optimizer: Optimizer
    """Of the model's parameters."""
    optim: OptimizerOptions
    """The schedule of the learning rate, and the clipping of the gradient."""
    scale: LossScale | None = None
    """Of the loss, in fp16; else None."""
    compute: Compute

    @property
    def model(self) -> MiniMind:
        """The model whose weights move."""
        return self.objective.model

    @property
    def is_sharded(self) -> bool:
        """Whether every rank holds a part of each weight."""
        return is_sharded(next(self.model.parameters()))

"""One objective on several ranks: how the passes of each become one gradient.

`ddp`: every rank has all weights, and gradients are averaged over the ranks while the last backward pass of a step still runs. The step
multiplies its losses by the number of ranks, so that averages are sums.
"""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minimind_train.distributed import World
from minimind_train.objective import Objective


def shared_out(objective: Objective, world: World, device: torch.device) -> nn.Module:
    """Return what a step calls in place of the objective, so that the gradients of all ranks are added up.

    Args:
        objective: on `device`, with the same weights on every rank.
        world: the ranks.
        device: of this rank.
    """
    if world.size == 1:
        return objective
    return DistributedDataParallel(
        objective,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # the gradients are not held a second time
    )


def gradients_added_up(objective: nn.Module, *, wanted: bool) -> AbstractContextManager[object]:
    """Return the context of a forward and backward pass: whether the gradients of the ranks are added up in it."""
    if isinstance(objective, DistributedDataParallel) and not wanted:
        return objective.no_sync()
    return contextlib.nullcontext()

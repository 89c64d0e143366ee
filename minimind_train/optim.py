"""How the weights move: AdamW over all of them, MiniMind's cosine schedule, clipping of the gradient.

The learning rate is a function of the step, so nothing about it is stored.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

_MAX_STEPS = 10**12  # an exact number as a float too


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule; the defaults are MiniMind's pre-training."""

    learning_rate: Annotated[float, "Learning rate at its peak; it ends at a tenth of it."] = 5e-4
    warmup_steps: Annotated[int, "Steps over which the learning rate rises from zero."] = 0
    weight_decay: Annotated[float, "AdamW's weight decay, on all weights."] = 0.01
    beta1: Annotated[float, "AdamW's memory of the gradient."] = 0.9
    beta2: Annotated[float, "AdamW's memory of the squared gradient."] = 0.999
    eps: Annotated[float, "AdamW's guard against division by zero."] = 1e-8
    grad_clip: Annotated[float, "Longest gradient norm that is let through; 0 lets all through."] = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")
        if not 0 <= self.warmup_steps <= _MAX_STEPS:
            raise ValueError(f"warmup_steps must be from 0 to {_MAX_STEPS}, not {self.warmup_steps}")
        for name in ("weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative or without end, but is {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of `step`, counted from 1 to `total_steps`.

    Half a cosine from just under the peak down to a tenth of it, scaled up linearly during the warm-up.

    Raises:
        ValueError: `step` is not one of the run's steps.
    """
    if not 1 <= step <= total_steps:
        raise ValueError(f"step {step} is not between 1 and {total_steps}")
    rate = config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * step / total_steps)))
    return rate * step / config.warmup_steps if step < config.warmup_steps else rate


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over all parameters of `model`; the loop sets the learning rate before each step.

    The fused kernel is the fastest on CPU and CUDA alike, gives the same bits every time, and its state (`step`,
    `exp_avg`, `exp_avg_sq`) is plain float32 tensors.
    """
    fused = all(parameter.device.type in {"cpu", "cuda"} for parameter in model.parameters())
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused,
    )


def clip_gradients(parameters: Iterable[Tensor], max_norm: float, *, scale: float = 1.0) -> Tensor:
    """Scale the gradients down to a joint norm of `max_norm` at most (0: any), and return the norm they had.

    Gradients that were computed of `scale` times the loss are divided by it first.
    """
    parameters = list(parameters)
    if scale != 1:
        torch._foreach_mul_([each.grad for each in parameters if each.grad is not None], 1 / scale)
    return nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)

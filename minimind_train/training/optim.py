"""The optimizer: AdamW or Muon, MiniMind's cosine schedule, clipping of the gradient.

Muon (https://kellerjordan.github.io/posts/muon/) updates a matrix by its momentum, with all singular values brought near 1. It is for the
matrices inside the layers; embeddings, the output matrix, norms and routers always use AdamW. Muon's updates are scaled as in
https://arxiv.org/abs/2502.16982, 2.2, to about the size of AdamW's, so both share one learning rate, one schedule and one weight decay.

The learning rate is a function of the step, so no state of a schedule is stored.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from minimind_data.errors import UserError
from minimind_train.parallel.sharding import whole
from minimind_train.training.options import OptimizerOptions


def learning_rate(step: int, total_steps: int, config: OptimizerOptions) -> float:
    """Return the learning rate of `step`, counted from 1 to `total_steps`.

    Half a cosine, from just below the peak down to a tenth of it, times a linear rise during the warmup.

    Raises:
        ValueError: `step` is not one of the run's steps.
    """
    if not 1 <= step <= total_steps:
        raise ValueError(f"step {step} is not between 1 and {total_steps}")
    rate = config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * step / total_steps)))
    return rate * step / config.warmup_steps if step < config.warmup_steps else rate


def make_optimizer(model: nn.Module, config: OptimizerOptions) -> Optimizer:
    """Return the optimizer of all trainable parameters of `model`; the learning rate is set before each step.

    AdamW's fused kernel is the fastest on CPU and CUDA alike, gives the same bits every time, and its state (`step`, `exp_avg`,
    `exp_avg_sq`) is plain float32 tensors, as Muon's (`momentum_buffer`) is.

    Raises:
        UserError: this torch has no Muon.
    """
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {
        name for name in learned if config.optimizer == "muon" and _is_hidden_matrix(name, learned[name])
    }
    adamw = AdamW(
        [parameter for name, parameter in learned.items() if name not in matrices],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=all(parameter.device.type in {"cpu", "cuda"} for parameter in learned.values()),
    )
    if not matrices:
        return adamw
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise UserError(
            f"`optimizer` muon needs torch 2.9 or newer, and this is {torch.__version__}",
            remedy="update torch, or take `optimizer` adamw",
            option="optimizer",
        )
    return _CombinedOptimizer(
        muon(
            [learned[name] for name in learned if name in matrices],
            lr=config.learning_rate,
            momentum=config.muon_momentum,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        adamw,
    )


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    return ".layers." in name and parameter.ndim == 2 and not name.endswith(".mlp.gate.weight")


class _CombinedOptimizer(Optimizer):
    """Several optimizers that step, save and restore as one.

    It owns the groups of parameters and the state; each of the optimizers updates its own groups.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self._optimizers = optimizers

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all weights."""
        assert closure is None
        groups = iter(self.param_groups)
        for each in self._optimizers:
            # Loading a state replaces both, so they are passed on before each step.
            each.param_groups, each.state = [next(groups) for _ in each.param_groups], self.state
            each.step()


def clip_gradients(parameters: Iterable[Tensor], max_norm: float, *, scale: float = 1.0) -> Tensor:
    """Scale the gradients down to a total norm of at most `max_norm` (0: no limit), and return the norm that they had.

    Gradients of a loss that was multiplied by `scale` are divided by it first.
    """
    parameters = list(parameters)
    if scale != 1:
        torch._foreach_mul_([each.grad for each in parameters if each.grad is not None], 1 / scale)
    return whole(nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))

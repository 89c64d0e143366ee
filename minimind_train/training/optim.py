"""How the weights move: AdamW or Muon, MiniMind's cosine schedule, clipping of the gradient.

Muon (https://kellerjordan.github.io/posts/muon/) moves a matrix by its momentum with all singular values brought near 1. It is
made for the matrices inside of layers; embeddings, the output matrix, norms and routers are AdamW's in either case. Its steps are
scaled as in https://arxiv.org/abs/2502.16982, 2.2, to about the size of AdamW's, so one learning rate, one schedule and one weight
decay are for both.

The learning rate is a function of the step, so nothing about it is stored.
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

    Half a cosine from just under the peak down to a tenth of it, scaled up linearly during the warm-up.

    Raises:
        ValueError: `step` is not one of the run's steps.
    """
    if not 1 <= step <= total_steps:
        raise ValueError(f"step {step} is not between 1 and {total_steps}")
    rate = config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * step / total_steps)))
    return rate * step / config.warmup_steps if step < config.warmup_steps else rate


def make_optimizer(model: nn.Module, config: OptimizerOptions) -> Optimizer:
    """Return the optimizer of all parameters of `model` that are learned; the loop sets the learning rate before each step.

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
    return _Together(
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


class _Together(Optimizer):
    """Optimizers that are one to whoever steps, saves and restores them.

    The groups of parameters and the state are this one's; the parts only know how to move what is theirs.
    """

    def __init__(self, *parts: Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all weights."""
        assert closure is None
        groups = iter(self.param_groups)
        for part in self._parts:
            # Both are other objects once a state has been loaded.
            part.param_groups, part.state = [next(groups) for _ in part.param_groups], self.state
            part.step()


def clip_gradients(parameters: Iterable[Tensor], max_norm: float, *, scale: float = 1.0) -> Tensor:
    """Scale the gradients down to a joint norm of `max_norm` at most (0: any), and return the norm they had.

    Gradients that were computed of `scale` times the loss are divided by it first.
    """
    parameters = list(parameters)
    if scale != 1:
        torch._foreach_mul_([each.grad for each in parameters if each.grad is not None], 1 / scale)
    return whole(nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))

"""One optimizer step: the gradient of a global batch, clipped, and one update of the weights by it.

The loss of a step is the sum over all terms of the global batch divided by their number, so cutting the batch into micro-batches, or dividing it
among ranks, changes nothing but rounding. Ranks exchange a few numbers on the host: how many terms they have before the passes, their sums of
losses after them. Gradients are averaged once, in the last pass.
"""

import math
from dataclasses import dataclass

import torch

from minimind_train.batches.steps import StepBatch
from minimind_train.objectives.objective import MicroLoss
from minimind_train.training.data_parallel import gradient_sync
from minimind_train.training.learner import Learner
from minimind_train.training.optim import clip_gradients


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step gave, over all ranks."""

    loss: float
    """Mean over the terms of the global batch."""
    grad_norm: float | None
    """Before clipping; None where it overflowed in fp16, so that the step moved nothing."""
    auxiliary: float | None
    """Mean over the windows of the global batch; None where the objective has none."""
    metrics: dict[str, float]
    """Other metrics of the objective: means over the terms."""
    num_targets: int
    """Learned targets of the global batch."""
    num_tokens: int
    """Positions of the global batch that went through the model, PAD included."""


class NotFiniteError(Exception):
    """The loss or the gradient of a step is not finite, so no rank updated its weights; the message is a clause that says which of them."""


def take_step(learner: Learner, batch: StepBatch, *, rate: float) -> StepResult:
    """Update the weights by one global batch.

    Args:
        learner: whose weights are updated. Its loss scale counts the step.
        batch: this rank's share of the step's samples.
        rate: the learning rate.

    Raises:
        NotFiniteError: the loss or the gradient is not finite. Weights and optimizer are those of the step before.
    """
    objective, optimizer, scale = learner.wrapped, learner.optimizer, learner.scale
    world, forward = learner.compute.world, learner.compute.forward()
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    num_terms, num_windows, num_targets, num_tokens = map(
        int, world.all_reduce_sum((batch.num_terms, batch.num_windows, batch.num_targets, batch.num_tokens))
    )
    num_terms = max(num_terms, 1)  # a batch of nothing but padding has loss 0, not 0/0
    factor = scale.value if scale else 1.0
    sums: dict[str, torch.Tensor] = {"loss": torch.zeros((), device=next(objective.parameters()).device)}
    # The padding batch comes first: all ranks wait for the last pass, so that one should be of use.
    passes = [(batch.padding_batch, 0)] if batch.padding_batch is not None else []
    passes += [(micro_batch, 1) for micro_batch in batch.micro_batches]
    for number, (micro_batch, counts) in enumerate(passes, 1):
        with gradient_sync(objective, enabled=number == len(passes)):
            with forward:
                losses: MicroLoss = objective(micro_batch)
                share = counts * len(next(iter(micro_batch.values()))) / num_windows
                learned = _add_losses(sums, losses, counts=counts, num_terms=num_terms, share=share)
            # Ranks average their gradients. (torch leaves `backward` untyped.)
            (learned * (factor * world.size)).backward()  # type: ignore[no-untyped-call]
    norm = clip_gradients(objective.parameters(), learner.optim.grad_clip, scale=factor)
    # All numbers come to the host together, because each such trip waits for the device.
    *values, norm_here = torch.stack((*sums.values(), norm)).tolist()
    here = dict(zip(sums, world.all_reduce_sum(values), strict=True))
    learned_here = here["loss"] + here.get("auxiliary", 0.0)
    skipped = scale is not None and scale.skips(learned_here, norm_here)
    if not skipped:
        _refuse_nonfinite(learned_here, norm_here)
        optimizer.step()
    return StepResult(
        loss=here["loss"],
        grad_norm=None if skipped else norm_here,
        auxiliary=here.get("auxiliary"),
        metrics={
            name.removeprefix("metric "): value for name, value in here.items() if name.startswith("metric ")
        },
        num_targets=num_targets,
        num_tokens=num_tokens,
    )


def _add_losses(
    sums: dict[str, torch.Tensor], losses: MicroLoss, *, counts: int, num_terms: int, share: float
) -> torch.Tensor:
    """Add the losses of a pass to the sums of the step, and return the loss to compute gradients of, float32 [].

    Args:
        sums: by name, on the device.
        losses: of one micro-batch.
        counts: 1, or 0 for a padding batch.
        num_terms: terms of the whole step.
        share: the share of this micro-batch in the step's windows; 0 for a padding batch.
    """
    learned = losses.summed * counts / num_terms
    _add(sums, "loss", learned)
    for name, value in losses.metrics.items():
        _add(sums, f"metric {name}", value * counts / num_terms)
    if losses.auxiliary is not None:
        auxiliary = losses.auxiliary * share
        _add(sums, "auxiliary", auxiliary)
        learned = learned + auxiliary
    return learned


def _add(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    value = value.detach().float()
    sums[name] = sums[name] + value if name in sums else value


def _refuse_nonfinite(loss: float, norm: float) -> None:
    if not math.isfinite(loss):
        raise NotFiniteError(f"the loss is {loss}")
    if not math.isfinite(norm):
        raise NotFiniteError(f"the gradient's norm is {norm}")

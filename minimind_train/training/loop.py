"""The only training loop: step after step, with metrics, validation, checkpoints and requests to stop in between.

A phase (pre-training, …) brings its objective and the batches; one step is in `step`. No random state is carried from step to step, so a run that
resumes at step s does what an uninterrupted one does.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from minimind_train.batches.steps import StepLoader
from minimind_train.model.precision import LossScale, autocast
from minimind_train.order.sample_order import SampleCursor
from minimind_train.order.seeds import derive_seed
from minimind_train.parallel.interrupt import Stop, StopRequest
from minimind_train.parallel.world import ALONE, World
from minimind_train.progress import Progress, Say
from minimind_train.run_folder.metrics import Records
from minimind_train.training.nonfinite import NonfiniteGuard
from minimind_train.training.optim import learning_rate
from minimind_train.training.options import (
    OptimizerOptions,
    TrainingOptions,
)
from minimind_train.training.step import NotFiniteError, StepResult, take_step
from minimind_train.training.wrapping import settle


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """How a run ended."""

    step: int
    total_steps: int
    cursor: int
    loss: float | None
    """Loss of the last step; None where there was no step to do."""
    stopped_by: Stop | None = None
    """The request that stopped the run early, or None."""
    rank: int = 0
    """The rank that returns this outcome; only rank 0 prints it."""


class Save(Protocol):
    """Called after each step; see `saver.Saver.after_step`."""

    def __call__(self, record: Mapping[str, Any], *, leaving: bool) -> None:
        """Save a checkpoint if one is due after the step of this record of metrics, or if the run is `leaving` its loop."""


def run(
    objective: nn.Module,
    optimizer: Optimizer,
    batches: StepLoader,
    *,
    step: int,
    cursor: SampleCursor,
    total_steps: int,
    config: TrainingOptions,
    optim: OptimizerOptions,
    device: torch.device,
    metrics: Records,
    save: Save,
    guard: NonfiniteGuard,
    describe: Callable[[int], dict[str, Any]],
    validate: Callable[[int], dict[str, Any]] = lambda _: {},
    on_step: Callable[[int], None] = lambda _: None,
    scale: LossScale | None = None,
    say: Say,
    world: World = ALONE,
) -> RunOutcome:
    """Train until the batches end or something asks to stop.

    Args:
        objective: what is learned, over the model that is moved in place; see `take_step`.
        optimizer: over the model's parameters.
        batches: this rank's share of the global batches from the cursor on, counting the objective's terms.
        step: optimizer steps that are already done.
        cursor: samples that they consumed; advanced after each step.
        total_steps: steps of the whole run, for the schedule.
        config: with `dtype` resolved.
        optim: the schedule and the clipping.
        device: where the model is.
        metrics: takes a line for each logged step.
        save: called after each step.
        guard: decides about a step whose loss or gradient is not finite.
        describe: what metrics say of a cursor besides its position: epoch, perhaps shard and offset.
        validate: called with each finished step; what it returns goes into the step's line of metrics, which is then written.
        on_step: called with each finished step, once its line is written.
        scale: of the loss, in fp16.
        say: takes lines for the user.
        world: the ranks that learn together; all stop after the same step, and only the first shows its progress.

    Raises:
        UserError: the loss or the gradient is not finite and the run does not bear that, so the weights are those of the step
            before; or it cannot be saved.
    """
    objective.train()
    forward = autocast(config.dtype, device)
    loss: float | None = None
    num_tokens, seconds = 0, 0.0
    stopping: Stop | None = None
    shown = Progress(step=step, total_steps=total_steps, say=say, visible=world.is_main)
    tells = world.is_main and not world.launched  # else the launching process has said it
    with StopRequest(config.max_hours, tell=tells) as request, shown as progress:
        then = time.perf_counter()
        for number, batch in enumerate(batches):
            if number == 0:
                settle(objective, batch.stand_in or batch.micro_batches[-1], forward)
            step += 1
            rate = learning_rate(step, total_steps, optim)
            # Before each step, from nothing but its number: dropout after a resume is what it would have been.
            torch.manual_seed(derive_seed(config.seed, step, batches.rank))
            try:
                result = take_step(
                    objective,
                    optimizer,
                    batch,
                    rate=rate,
                    grad_clip=optim.grad_clip,
                    forward=forward,
                    scale=scale,
                    world=world,
                )
            except NotFiniteError as error:
                guard.handle(error, step, batch, positions=batches.positions(batch), forward=forward)
                found: dict[str, Any] = {"skipped": str(error)}
            else:
                loss, found = result.loss, _told(result)
                num_tokens += result.num_tokens
            cursor.advance(batch.stop - batch.start)
            seconds += time.perf_counter() - then
            skipped = guard.skipped + (scale.skipped_steps if scale else 0)
            record = {
                "step": step,
                "position": cursor.position,
                **describe(cursor.position),
                **found,
                "lr": rate,
                **({} if scale is None else {"loss_scale": scale.value}),
                **({"skipped_steps": skipped} if scale or skipped else {}),
                "tokens_per_second": round(num_tokens / seconds, 1),
            }
            measured = validate(step)
            record |= measured
            logged = (
                bool(measured)
                or "skipped" in found
                or step % config.log_every == 0
                or step in {1, total_steps}
            )
            if logged:
                metrics.write(record)
                num_tokens, seconds = 0, 0.0
            progress.update(record, logged=logged)
            on_step(step)
            # Asked once: what comes after this line ends the next step, saved like this one.
            stopping = world.agreed_stop(request.stop)
            save(record, leaving=bool(stopping) or step == total_steps)
            then = time.perf_counter()  # neither validation, excerpts nor saving is counted as training
            if stopping:
                break
    stopped_by = stopping if step < total_steps else None
    return RunOutcome(
        step=step,
        total_steps=total_steps,
        cursor=cursor.position,
        loss=loss,
        stopped_by=stopped_by,
        rank=world.rank,
    )


def _told(result: StepResult) -> dict[str, Any]:
    """Return what metrics say of a step that moved the weights, or of one that fp16 makes up for by a smaller scale."""
    return {
        "loss": result.loss,
        **({} if result.grad_norm is None else {"grad_norm": result.grad_norm}),
        "targets": result.num_targets,
        **({} if result.auxiliary is None else {"auxiliary_loss": result.auxiliary}),
        **result.measures,
    }

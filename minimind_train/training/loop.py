"""The only training loop: step after step, with metrics, validation, checkpoints and requests to stop in between.

A phase (pre-training, …) brings its objective and the batches; one step is in `step`. No random state is carried from step to step, so a run
that resumes at step s does what an uninterrupted one does.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from minimind_train.batches.steps import StepLoader
from minimind_train.order.seeds import derive_seed
from minimind_train.parallel.interrupt import Stop, StopRequest, never
from minimind_train.progress import TrainingProgress
from minimind_train.run_folder.metrics import Records
from minimind_train.training.data_parallel import settle
from minimind_train.training.learner import Learner
from minimind_train.training.nonfinite import NonfiniteGuard
from minimind_train.training.optim import learning_rate
from minimind_train.training.options import TrainingOptions
from minimind_train.training.step import NotFiniteError, StepResult, take_step


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """How a run ended."""

    step: int
    total_steps: int
    position: int
    """Of the next sample."""
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


def nothing(_: int) -> dict[str, Any]:
    """Be the hook of a run that does nothing there."""
    return {}


def ignore(_: dict[str, Any]) -> None:
    """Be what watches a run that nobody watches."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What the caller of a run wants to know and to say after each step."""

    on_step: Callable[[dict[str, Any]], object] = ignore
    """Called with the step's record of metrics, also where the step is not logged."""
    stop: Callable[[], bool] = never
    """Asked after `on_step`: whether to save and stop."""


UNWATCHED = Watch()


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a run does besides learning. The loop calls these with each finished step, in this order."""

    guard: NonfiniteGuard
    """Decides about a step whose loss or gradient is not finite."""
    describe: Callable[[int], Mapping[str, Any]]
    """Returns what metrics say of a position besides its number: the epoch, perhaps shard and offset."""
    validate: Callable[[int], Mapping[str, Any]] = nothing
    """Measures the model where that is due; what it returns goes into the step's line of metrics, which is then written."""
    metrics: Records
    """Takes a line for each logged step."""
    show_excerpts: Callable[[int], object] = nothing
    """Lets the model write where that is due."""
    watch: Watch = UNWATCHED
    """Is told of the step, and may ask to stop."""
    save: Save
    """Saves a checkpoint where one is due."""


def run(
    learner: Learner, batches: StepLoader, progress: TrainingProgress, options: TrainingOptions, hooks: Hooks
) -> RunOutcome:
    """Train until the batches end or something asks to stop; all ranks stop after the same step.

    Args:
        learner: what learns; its weights are moved in place.
        batches: this rank's share of the global batches from the run's position on, counting the objective's terms.
        progress: the steps that are done and those of the whole run, for the schedule.
        options: of the run.
        hooks: what is done after each step.

    Raises:
        UserError: the loss or the gradient is not finite and the run is to stop then, so the weights are those of the step before;
            or a checkpoint cannot be saved.
    """
    world, scale = learner.compute.world, learner.scale
    first_step, total_steps, position = progress.step + 1, progress.total_steps, batches.samples.start
    loss: float | None = None
    stopping: Stop | None = None
    learner.wrapped.train()
    acknowledges = world.is_main and not world.launched  # else the launching process does
    with StopRequest(options.max_hours, hooks.watch.stop, acknowledges=acknowledges) as request, progress:
        throughput = _Throughput()
        for step, batch in enumerate(batches, first_step):
            if step == first_step:
                settle(learner, batch.padding_batch or batch.micro_batches[-1])
            rate = learning_rate(step, total_steps, learner.optim)
            # Before each step, from nothing but its number: dropout after a resume is what it would have been.
            torch.manual_seed(derive_seed(options.seed, step, world.rank))
            try:
                result = take_step(learner, batch, rate=rate)
            except NotFiniteError as error:
                hooks.guard.handle(error, step, batch, positions=batches.positions(batch))
                numbers: dict[str, Any] = {"skipped": str(error)}
                throughput.add(0)
            else:
                loss, numbers = result.loss, _numbers(result)
                throughput.add(result.num_tokens)
            position = batch.stop
            skipped_steps = hooks.guard.skipped + (scale.skipped_steps if scale else 0)
            record = {
                "step": step,
                "position": position,
                **hooks.describe(position),
                **numbers,
                "lr": rate,
                **({} if scale is None else {"loss_scale": scale.value}),
                **({"skipped_steps": skipped_steps} if scale or skipped_steps else {}),
                "tokens_per_second": throughput.per_second,
            }
            validation = hooks.validate(step)
            record |= validation
            logged = (
                bool(validation)
                or "skipped" in numbers
                or step % options.log_every == 0
                or step in {1, total_steps}
            )
            if logged:
                hooks.metrics.write(record)
                throughput.reset()
            progress.update(record, logged=logged)
            hooks.show_excerpts(step)
            hooks.watch.on_step(dict(record))
            # Asked once: a request that comes after this line ends the next step, which is then saved like this one.
            stopping = world.agreed_stop(request.stop)
            hooks.save(record, leaving=bool(stopping) or step == total_steps)
            if stopping:
                break
            throughput.resume()
    return RunOutcome(
        step=progress.step,
        total_steps=total_steps,
        position=position,
        loss=loss,
        stopped_by=stopping if progress.step < total_steps else None,
        rank=world.rank,
    )


class _Throughput:
    """Tokens per second of training since the last line of metrics; validation, excerpts and saving are not counted."""

    def __init__(self) -> None:
        self.reset()
        self.resume()

    def reset(self) -> None:
        """Begin to count anew."""
        self._num_tokens, self._seconds = 0, 0.0

    def resume(self) -> None:
        """Go on with the clock."""
        self._start = time.perf_counter()

    def add(self, num_tokens: int) -> None:
        """Stop the clock after a step of so many tokens."""
        self._num_tokens += num_tokens
        self._seconds += time.perf_counter() - self._start

    @property
    def per_second(self) -> float:
        """Tokens per second."""
        return round(self._num_tokens / self._seconds, 1)


def _numbers(result: StepResult) -> dict[str, Any]:
    """Return what metrics say of a step that moved the weights, or of one that fp16 makes up for by a smaller scale."""
    return {
        "loss": result.loss,
        **({} if result.grad_norm is None else {"grad_norm": result.grad_norm}),
        "targets": result.num_targets,
        **({} if result.auxiliary is None else {"auxiliary_loss": result.auxiliary}),
        **result.metrics,
    }

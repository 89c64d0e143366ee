"""One rank of a run: build what learns, restore what the run begins from, and train.

With one process there is one rank. Where a run begins, and by which options, is decided in `entry`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from minimind_data.errors import UserError
from minimind_data.windows.base import Windows, WindowSource
from minimind_train.batches.datasets import Datasets
from minimind_train.batches.mixed_windows import MixedWindows
from minimind_train.batches.steps import BatchDivision, StepLoader
from minimind_train.model.compiling import compile_layers, recompute_activations, user_error_on_failed_compile
from minimind_train.model.precision import allow_tf32
from minimind_train.order.sample_range import SampleRange
from minimind_train.parallel.devices import user_error_on_out_of_memory
from minimind_train.parallel.world import ALONE, World
from minimind_train.progress import Say, TrainingProgress
from minimind_train.run.capacity import refuse_oversized
from minimind_train.run.data import RunData
from minimind_train.run.excerpts import Excerpts
from minimind_train.run.initial import InitialWeights
from minimind_train.run.introduction import introduction
from minimind_train.run.learner import build_learner
from minimind_train.run.options import RunOptions, recorded
from minimind_train.run.phases import PHASES
from minimind_train.run.reconcile import with_stages
from minimind_train.run_folder.checkpoint import Checkpoint, CheckpointState, best_of
from minimind_train.run_folder.metrics import FILE_NAME, MetricsLog, NoMetrics
from minimind_train.run_folder.record import load_run_tokenizer
from minimind_train.run_folder.saver import Saver, Snapshot
from minimind_train.run_folder.tensors import tensors_of
from minimind_train.training import loop
from minimind_train.training.evaluate import validation
from minimind_train.training.learner import Compute, Learner
from minimind_train.training.nonfinite import NonfiniteGuard
from minimind_train.training.tracking import TrackedRun, Trackers

__all__ = ["RankJob", "Start"]


@dataclass(frozen=True, kw_only=True)
class Start:
    """From where on a run trains, and by which options. Rank 0 decides it for all ranks."""

    options: RunOptions
    """Resolved."""
    checkpoint: Checkpoint | None
    """The one that the run is resumed from; None for a new run."""
    step: int
    position: int


class RankJob:
    """One rank of a run, with resolved options and opened data, before its model is built.

    Args:
        options: the run's, resolved.
        datasets: the run's, opened.
        origin: the initial weights of the run.
        say: takes lines for the user.
        world: the ranks.

    Raises:
        UserError: the run cannot be trained here; see `capacity`.
    """

    def __init__(
        self,
        options: RunOptions,
        datasets: Datasets,
        origin: InitialWeights,
        *,
        say: Say,
        world: World,
    ) -> None:
        training = options.training
        self.compute = Compute(device=world.device(training.device), dtype=training.dtype, world=world)
        refuse_oversized(options, datasets, self.compute)
        self.phase = PHASES[options.command]
        self.run = training.run
        self.datasets = datasets
        self.origin = origin
        self.say = say
        self.data = RunData(options, datasets, say)
        self.options = with_stages(options, self.data.stages)
        self.evaluator = self.data.evaluator(self.compute)
        if training.saving.save_best and not self.evaluator:
            raise UserError(
                "`save_best` needs something to measure on",
                remedy="pass `val_shards`, or leave it out",
                option="save_best",
            )
        self._windows_key = self.evaluator.windows_key if self.evaluator else None

    def reweight(self, position: int) -> None:
        """Let new weights of a mixture hold from a position on."""
        self.data.reweight(position)
        self.options = with_stages(self.options, self.data.stages)

    @user_error_on_failed_compile()
    @user_error_on_out_of_memory(
        "go on with `resume` and a smaller `micro_batch`, or free some memory; earlier checkpoints are intact"
    )
    def train(
        self,
        start: Start,
        before_steps: Callable[[], None] = lambda: None,
        watch: loop.Watch = loop.UNWATCHED,
    ) -> loop.RunOutcome:
        """Build the learner and train.

        Args:
            start: where the run begins.
            before_steps: called once the learner has been built on all ranks.
            watch: what the caller does after each step.
        """
        training, compute = self.options.training, self.compute
        step, position, world = start.step, start.position, compute.world
        end, total_steps = self.data.end(step, position)
        if step >= total_steps:
            self.say(f"{self.run}: finished already, {step} steps; nothing to do")
            return loop.RunOutcome(
                step=step, total_steps=total_steps, position=position, loss=None, rank=world.rank
            )
        torch.set_num_threads(training.threads)
        allow_tf32(compute.device, allowed=training.tf32)
        learner = build_learner(self.options, self.origin, start.checkpoint, compute)
        world.barrier()  # so that a run that does not fit some rank is left as it was
        before_steps()
        progress = TrainingProgress(step=step, total_steps=total_steps, say=self.say, visible=world.is_main)
        for line in introduction(self.options, self.data, learner, progress, position):
            self.say(line)
        if training.compile:
            compile_layers(learner.model)
        if training.activation_checkpointing:
            recompute_activations(learner.model)
        windows = self._window_source(self.data.windows)
        if self.evaluator:
            self.evaluator.samples = self._window_source(self.evaluator.windows)
        self.origin.release()
        division = BatchDivision(
            global_batch=training.global_batch,
            micro_batch=training.micro_batch,
            rank=world.rank,
            world_size=world.size,
        )
        batches = StepLoader(
            windows,
            SampleRange(order=self.data.order, start=position, stop=end, skips=self.data.skips),
            division,
            device=compute.device,
            num_terms=learner.objective.num_terms,
            trim=not self.options.model.balances_experts,
        )
        with batches, self._hooks(learner, progress, start.checkpoint, watch) as hooks:
            return loop.run(learner, batches, progress, training, hooks)

    def _window_source(self, windows: Windows | MixedWindows) -> WindowSource:
        return self.phase.samples(windows, self.options, self.origin, self.compute.device, self.say)

    @contextlib.contextmanager
    def _hooks(
        self, learner: Learner, progress: TrainingProgress, latest: Checkpoint | None, watch: loop.Watch
    ) -> Iterator[loop.Hooks]:
        """Open what runs after each step: validation, metrics and their trackers, excerpts, checkpoints."""
        training, world, step = self.options.training, self.compute.world, progress.step
        guard = NonfiniteGuard(
            learner,
            training.on_nonfinite,
            run=self.run,
            skipped=latest.state.skipped_steps if latest else 0,
            say=self.say,
        )
        best = best_of(self.run, last_step=step, measured_on=self._windows_key) if latest else None
        # If weights are sharded, all ranks write a checkpoint together, else rank 0 alone.
        writers = world.with_own_group() if learner.is_sharded else ALONE if world.is_main else None
        tracked_run = TrackedRun(
            folder=self.run,
            project=training.tracking.track_project,
            options=recorded(self.options),
            step=step,
        )
        names = training.tracking.track if world.is_main else ()
        with (
            MetricsLog(self.run / FILE_NAME, last_step=step) if world.is_main else NoMetrics() as metrics,
            Saver(
                self.run,
                training.saving,
                self._snapshot(learner, guard, metrics),
                best=best,
                writers=writers,
                say=self.say,
            ) as saver,
            Trackers(metrics, names, tracked_run, self.say) as trackers,
        ):
            if world.is_main and latest:
                self._say_lost_metrics(latest.state, metrics.num_lines)
            show_excerpts: Callable[[int], object] = loop.nothing
            if training.excerpts.sample_every:
                tokenizer = load_run_tokenizer(self.run, self.datasets.tokenizer)
                excerpts = Excerpts(learner, training.excerpts, tokenizer, say=self.say, show=trackers.text)
                show_excerpts = excerpts.after_step
            yield loop.Hooks(
                guard=guard,
                describe=self.data.describe,
                validate=validation(
                    self.evaluator,
                    learner.objective,
                    every=self.options.validation.val_every,
                    total_steps=progress.total_steps,
                ),
                metrics=trackers,
                show_excerpts=show_excerpts,
                watch=watch,
                save=saver.after_step,
            )

    def _snapshot(self, learner: Learner, guard: NonfiniteGuard, metrics: MetricsLog | NoMetrics) -> Snapshot:
        options, scale = recorded(self.options), learner.scale

        def state(record: Mapping[str, Any]) -> CheckpointState:
            return CheckpointState(
                step=record["step"],
                position=record["position"],
                config=options,
                dataset=self.datasets.fingerprint,
                metrics_lines=metrics.num_lines,
                loss_scale=scale.state_dict() if scale else None,
                skipped_steps=guard.skipped,
                val_loss=record.get("val_loss"),
                val_on=self._windows_key if "val_loss" in record else None,
            )

        tensors = partial(tensors_of, learner.model, learner.optimizer)
        return Snapshot(tensors=tensors, state=state, flush=metrics.sync)

    def _say_lost_metrics(self, state: CheckpointState, num_lines: int) -> None:
        if (missing_lines := state.metrics_lines - num_lines) > 0:
            self.say(
                f"{self.run / FILE_NAME}: {missing_lines} of the {state.metrics_lines} lines up to step {state.step} are gone or broken; "
                "training goes on the same without them; to have them again, put them back from a backup while the run is stopped"
            )

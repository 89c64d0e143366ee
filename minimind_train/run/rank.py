"""One rank of a run: build the model, restore what the run begins from, and run the loop.

With one process there is one rank. Where a run begins, and by which options, is decided in `entry`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from minimind_data.errors import UserError
from minimind_data.windows.base import Windows, WindowSource
from minimind_train.batches.datasets import Datasets
from minimind_train.batches.samples import MixedWindows
from minimind_train.batches.steps import StepLoader
from minimind_train.model.compiling import compile_layers, recompute_activations, user_error_on_failed_compile
from minimind_train.model.config import parameter_line
from minimind_train.model.lora import adapters_of, add_adapters
from minimind_train.model.precision import LossScale, allow_tf32, autocast
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.objectives.objective import Objective
from minimind_train.order.sample_order import SampleCursor
from minimind_train.parallel.devices import user_error_on_out_of_memory
from minimind_train.parallel.world import ALONE, World
from minimind_train.progress import Say
from minimind_train.run.data import RunData
from minimind_train.run.fitting import refuse_unfit
from minimind_train.run.initial import InitialWeights
from minimind_train.run.options import RunOptions, recorded
from minimind_train.run.phases import PHASES
from minimind_train.run.reconcile import with_stages
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.checkpoint import Checkpoint, CheckpointState
from minimind_train.run_folder.metrics import FILE_NAME, MetricsLog, NoMetrics
from minimind_train.run_folder.record import load_run_tokenizer
from minimind_train.run_folder.saver import Saver
from minimind_train.run_folder.tensors import tensors_of
from minimind_train.training import loop
from minimind_train.training.evaluate import validation
from minimind_train.training.excerpts import Excerpts
from minimind_train.training.nonfinite import NonfiniteGuard
from minimind_train.training.optim import make_optimizer
from minimind_train.training.tracking import TrackedRun, Trackers
from minimind_train.training.wrapping import parallelize, unsharded

__all__ = ["RankJob", "Start"]


@dataclass(frozen=True, kw_only=True)
class Start:
    """From where on a run trains, and by which options: what rank 0 finds out, and all ranks go by."""

    options: RunOptions
    """With nothing left to be resolved."""
    found: Checkpoint | None
    step: int
    cursor: int


@dataclass(frozen=True, kw_only=True)
class _Learner:
    """What learns on this rank."""

    model: MiniMind
    objective: Objective
    """Over the model, as it is for a world of one rank."""
    wrapped: nn.Module
    """What a step calls: the objective, wrapped for several ranks where there are several."""
    optimizer: Optimizer
    scale: LossScale | None
    """The loss scale; None except in fp16."""


class RankJob:
    """One rank of a run, with resolved options and opened data, before its model is built.

    Args:
        options: the run's, resolved.
        shards: the datasets.
        origin: the weights that the run began from.
        say: takes lines for the user.
        world: the ranks.

    Raises:
        UserError: the run cannot be trained here; see `fitting`.
    """

    def __init__(
        self,
        options: RunOptions,
        shards: Datasets,
        origin: InitialWeights,
        *,
        say: Say,
        world: World,
    ) -> None:
        self.device = world.device(options.training.device)
        refuse_unfit(options, shards, self.device, world)
        self.phase = PHASES[options.command]
        self.world = world
        self.sharded = world.size > 1 and options.training.parallel == "fsdp"
        self.run = options.training.run
        self.shards = shards
        self.origin = origin
        self.say = say
        self.data = RunData(options, shards, say)
        self.options = with_stages(options, self.data.stages)
        self.evaluator = self.data.evaluator(self.device, world)
        if options.training.saving.save_best and not self.evaluator:
            raise UserError("--save-best needs something to measure on; pass --val-shards, or leave it out")
        self._measured_on = self.evaluator.measures_on if self.evaluator else None

    def reweight(self, cursor: int) -> None:
        """Let other weights of a mixture hold from the cursor on."""
        self.data.reweight(cursor)
        self.options = with_stages(self.options, self.data.stages)

    @user_error_on_failed_compile()
    @user_error_on_out_of_memory(
        "go on with --resume and a smaller --micro-batch, or free some memory; earlier checkpoints are intact"
    )
    def train(self, start: Start, before_steps: Callable[[], None] = lambda: None) -> loop.RunOutcome:
        """Build what learns, put what it begins from into it, and run the loop.

        Args:
            start: where it goes on.
            before_steps: runs once all of that fits.
        """
        training, world = self.options.training, self.world
        found, step, cursor = start.found, start.step, start.cursor
        end, total_steps = self.data.end(step, cursor)
        if step >= total_steps:
            self.say(f"{self.run}: finished already, {step} steps; nothing to do")
            return loop.RunOutcome(
                step=step, total_steps=total_steps, cursor=cursor, loss=None, rank=world.rank
            )
        torch.set_num_threads(training.threads)
        allow_tf32(self.device, allowed=training.tf32)
        learner = self._learner(found)
        world.barrier()  # for all ranks: what does not fit one of them leaves the run as it was
        before_steps()
        self._introduce(learner.model, step, total_steps, cursor)
        if training.compile:
            compile_layers(learner.model)
        if training.activation_checkpointing:
            recompute_activations(learner.model)
        samples = self._samples(self.data.windows)
        validate = self._validation(learner.objective, total_steps)
        self.origin.release()
        guard = NonfiniteGuard(
            learner.objective,
            training.on_nonfinite,
            run=self.run,
            command=self.options.command,
            skipped=found.state.skipped_steps if found else 0,
            say=self.say,
            world=world,
        )
        best = checkpoint.best_of(self.run, last_step=step, measured_on=self._measured_on) if found else None
        with (
            MetricsLog(self.run / FILE_NAME, last_step=step) if world.is_main else NoMetrics() as metrics,
            self._batches(samples, learner.objective, start=cursor, stop=end) as batches,
            self._saver(learner, metrics, guard, best=best) as saver,
            self._trackers(metrics, step) as trackers,
        ):
            if world.is_main and found:
                self._say_what_metrics_lost(found.state, metrics.num_lines)
            return loop.run(
                learner.wrapped,
                learner.optimizer,
                batches,
                step=step,
                cursor=SampleCursor(cursor),
                total_steps=total_steps,
                config=training,
                optim=self.options.optim,
                device=self.device,
                metrics=trackers,
                on_step=self._excerpts(learner, trackers),
                save=saver.after_step,
                guard=guard,
                describe=self.data.describe,
                validate=validate,
                scale=learner.scale,
                say=self.say,
                world=world,
            )

    def _learner(self, found: Checkpoint | None) -> _Learner:
        """Build the model, its objective and its optimizer, in the state of a checkpoint where there is one."""
        training, world = self.options.training, self.world
        model = MiniMind(self.options.model)
        lora = self.options.lora
        why = f"{self.run} learns adapters alone" if found else f"{self.run} has no checkpoint yet"
        # Rank 0's weights become those of all ranks in `parallelize`.
        weights = self.origin.weights(why) if world.is_main and (found is None or lora.lora_rank) else None
        if weights:
            model.load_state_dict(weights.tensors)
        else:
            initialize(model, training.seed)
        if lora.lora_rank:
            add_adapters(model, lora, training.seed)
        if not self.sharded:
            model.to(self.device)
        objective = self.phase.objective(model, self.options, self.origin)
        wrapped = parallelize(objective, world, self.device, parallel=training.parallel, dtype=training.dtype)
        optimizer = make_optimizer(model, self.options.optim)
        if found:
            found.restore(model, optimizer)
        scale = LossScale(**(found and found.state.loss_scale) or {}) if training.dtype == "fp16" else None
        return _Learner(model=model, objective=objective, wrapped=wrapped, optimizer=optimizer, scale=scale)

    def _batches(self, samples: WindowSource, objective: Objective, *, start: int, stop: int) -> StepLoader:
        training = self.options.training
        return StepLoader(
            samples,
            self.data.order,
            start=start,
            stop=stop,
            global_batch=training.global_batch,
            micro_batch=training.micro_batch,
            rank=self.world.rank,
            world_size=self.world.size,
            device=self.device,
            skips=self.data.skips,
            num_terms=objective.num_terms,
            trim=not self.options.model.balances_experts,
        )

    def _validation(self, objective: Objective, total_steps: int) -> Callable[[int], dict[str, Any]]:
        if not self.evaluator:
            return lambda _: {}
        self.evaluator.samples = self._samples(self.evaluator.windows)
        every = self.options.validation.val_every
        return validation(self.evaluator, objective, every=every, total_steps=total_steps)

    def _say_what_metrics_lost(self, state: CheckpointState, num_lines: int) -> None:
        if (lost := state.metrics_lines - num_lines) > 0:
            self.say(
                f"{self.run / FILE_NAME}: {lost} of the {state.metrics_lines} lines up to step {state.step} are gone or broken; "
                "training goes on the same without them; to have them again, put them back from a backup while the run is stopped"
            )

    def _samples(self, windows: Windows | MixedWindows) -> WindowSource:
        return self.phase.samples(windows, self.options, self.origin, self.device, self.say)

    def _trackers(self, metrics: MetricsLog | NoMetrics, step: int) -> Trackers:
        config = self.options.training.tracking
        run = TrackedRun(
            folder=self.run, project=config.track_project, options=recorded(self.options), step=step
        )
        return Trackers(metrics, config.track if self.world.is_main else (), run, self.say)

    def _excerpts(self, learner: _Learner, trackers: Trackers) -> Callable[[int], None]:
        def tell(step: int, name: str, prompt: str, text: str) -> None:
            self.say(f"step {step}  after {prompt!r}: {text!r}")
            trackers.text(step, name, prompt + text)

        config, info = self.options.training.excerpts, self.shards.tokenizer
        if not config.sample_every:
            return lambda _: None
        tokenizer = load_run_tokenizer(self.run, info).reference
        forward = autocast(self.options.training.dtype, self.device)
        around = partial(unsharded, learner.objective, forward)
        return Excerpts(
            learner.model, config, tokenizer=tokenizer, info=info, tell=tell, around=around
        ).after_step

    def _saver(
        self,
        learner: _Learner,
        metrics: MetricsLog | NoMetrics,
        guard: NonfiniteGuard,
        *,
        best: CheckpointState | None,
    ) -> Saver:
        options, scale = recorded(self.options), learner.scale

        def state(record: Mapping[str, Any]) -> CheckpointState:
            return CheckpointState(
                step=record["step"],
                cursor=record["position"],
                config=options,
                dataset=self.shards.fingerprint,
                metrics_lines=metrics.num_lines,
                loss_scale=scale.state_dict() if scale else None,
                skipped_steps=guard.skipped,
                val_loss=record.get("val_loss"),
                val_on=self._measured_on if "val_loss" in record else None,
            )

        return Saver(
            self.run,
            self.options.training.saving,
            tensors=partial(tensors_of, learner.model, learner.optimizer),
            state=state,
            before=metrics.sync,
            best=math.inf if best is None or best.val_loss is None else best.val_loss,
            writers=self._writers(),
            say=self.say,
        )

    def _writers(self) -> World | None:
        """Return the ranks that write a checkpoint together with this one: all where each holds a part of it, else rank 0."""
        if self.sharded:
            return self.world.with_own_group()
        return ALONE if self.world.is_main else None

    def _introduce(self, model: MiniMind, step: int, total_steps: int, cursor: int) -> None:
        training, processes = self.options.training, self.world.size
        where = (
            self.device.type
            if processes == 1
            else f"{self.device.type}, {processes} processes by {training.parallel},"
        )
        self.say(parameter_line(self.options.model))
        if self.options.lora.lora_rank:
            learned = sum(each.numel() for each in model.parameters() if each.requires_grad)
            self.say(
                f"{learned / 1e6:.2f}M parameters of adapters are learned, in {len(adapters_of(model))} matrices"
            )
        self.say(
            f"{self.run}: on {where} in {training.dtype}, {len(self.data.windows):,} windows of "
            f"{self.data.windows.seq_len} tokens"
        )
        for line in self.data.introduce(cursor):
            self.say(line)
        again = f"going on after step {step} of {total_steps}" if step else f"step 1 of {total_steps}"
        place = "".join(
            f", {name} {value}" for name, value in self.data.describe(cursor).items() if name != "epochs"
        )
        self.say(f"{again} at position {cursor}{place}")

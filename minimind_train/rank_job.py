"""One rank of a run, from wherever it begins: the model is made, what it begins from is put into it, and the loop has it.

With one process there is one rank. Where a run begins, and by which options, is found out in `job`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic

import torch

from minimind_data.errors import UserError
from minimind_data.windows import Windows
from minimind_train import checkpoint, loop
from minimind_train.checkpoint import Checkpoint, CheckpointState
from minimind_train.config import ConfigT, recorded, with_stages
from minimind_train.devices import out_of_memory_is_plain
from minimind_train.distributed import ALONE, World
from minimind_train.evaluate import validation
from minimind_train.excerpts import Excerpts
from minimind_train.fitting import refuse_unfit
from minimind_train.layerwise import compile_layers, failing_to_compile_is_plain, recompute_activations
from minimind_train.lora import adapters_of, add_adapters
from minimind_train.metrics import FILE_NAME, MetricsLog, NoMetrics
from minimind_train.model import MiniMind, initialize
from minimind_train.model_config import parameter_line
from minimind_train.nonfinite import NonfiniteGuard
from minimind_train.objective import Objective
from minimind_train.optim import make_optimizer
from minimind_train.parallel import parallelize, unsharded
from minimind_train.parts import Datasets, MixedWindows, Samples
from minimind_train.phase import Phase
from minimind_train.precision import LossScale, allow_tf32, autocast
from minimind_train.progress import Say
from minimind_train.run_data import RunData
from minimind_train.runs import load_run_tokenizer
from minimind_train.sampler import SampleCursor
from minimind_train.saver import Saver
from minimind_train.start import InitialWeights
from minimind_train.step_loader import StepLoader
from minimind_train.tensors import Tensors, tensors_of
from minimind_train.tracking import TrackedRun, Trackers

__all__ = ["RankJob", "Start"]


@dataclass(frozen=True, kw_only=True)
class Start(Generic[ConfigT]):
    """From where on a run trains, and by which options: what rank 0 finds out, and all ranks go by."""

    config: ConfigT
    """With nothing left to be resolved."""
    found: Checkpoint | None
    step: int
    cursor: int


class RankJob(Generic[ConfigT]):
    """One rank of a run, with the options resolved and the data open, from wherever it begins."""

    def __init__(
        self,
        phase: Phase[ConfigT],
        config: ConfigT,
        shards: Datasets,
        origin: InitialWeights,
        *,
        say: Say,
        world: World,
    ) -> None:
        self.device = world.device(config.training.device)
        refuse_unfit(config, shards, self.device, world)
        self.phase = phase
        self.world = world
        self.sharded = world.size > 1 and config.training.parallel == "fsdp"
        self.run = config.training.run
        self.shards = shards
        self.origin = origin
        self.say = say
        self.data = RunData(config, shards, say)
        self.config = with_stages(config, self.data.stages)
        self.evaluator = self.data.evaluator(self.device, world)
        if config.training.saving.save_best and not self.evaluator:
            raise UserError("--save-best needs something to measure on; pass --val-shards, or leave it out")
        self._measured_on = self.evaluator.measures_on if self.evaluator else None

    def reweight(self, cursor: int) -> None:
        """Let other weights of a mixture hold from the cursor on."""
        self.data.reweight(cursor)
        self.config = with_stages(self.config, self.data.stages)

    @failing_to_compile_is_plain()
    @out_of_memory_is_plain(
        "go on with --resume and a smaller --micro-batch, or free some memory; earlier checkpoints are intact"
    )
    def train(self, start: Start[ConfigT], before_steps: Callable[[], None] = lambda: None) -> loop.Outcome:
        """Build the model, put what it begins from into it, and hand all to the loop.

        Args:
            start: where it goes on.
            before_steps: runs once all of that fits.
        """
        training, world = self.config.training, self.world
        found, step, cursor = start.found, start.step, start.cursor
        end, total_steps = self.data.end(step, cursor)
        if step >= total_steps:
            self.say(f"{self.run}: finished already, {step} steps; nothing to do")
            return loop.Outcome(step=step, total_steps=total_steps, cursor=cursor, loss=None, rank=world.rank)
        torch.set_num_threads(training.threads)
        allow_tf32(self.device, allowed=training.tf32)
        model = MiniMind(self.config.model)
        lora = self.config.lora
        why = f"{self.run} learns adapters alone" if found else f"{self.run} has no checkpoint yet"
        # Rank 0 gives its weights to all.
        weights = self.origin.weights(why) if world.is_main and (found is None or lora.lora_rank) else None
        if weights:
            model.load_state_dict(weights.tensors)
        else:
            initialize(model, training.seed)
        if lora.lora_rank:
            add_adapters(model, lora, training.seed)
        if not self.sharded:
            model.to(self.device)
        objective = self.phase.objective(model, self.config, self.origin)
        learner = parallelize(objective, world, self.device, parallel=training.parallel, dtype=training.dtype)
        optimizer = make_optimizer(model, self.config.optim)
        if found:
            found.restore(model, optimizer)
        world.barrier()  # for all ranks: what does not fit one of them leaves the run as it was
        before_steps()
        self._introduce(model, step, total_steps, cursor)
        place = SampleCursor(cursor)
        scale = LossScale(**(found and found.state.loss_scale) or {}) if training.dtype == "fp16" else None
        if training.compile:
            compile_layers(model)
        if training.activation_checkpointing:
            recompute_activations(model)
        samples = self._samples(self.data.windows)
        measure = {}
        if self.evaluator:
            every = self.config.validation.val_every
            self.evaluator.samples = self._samples(self.evaluator.windows)
            measure["validate"] = validation(self.evaluator, objective, every=every, total_steps=total_steps)
        self.origin.release()
        guard = NonfiniteGuard(
            objective,
            training.on_nonfinite,
            run=self.run,
            command=self.phase.command,
            skipped=found.state.skipped_steps if found else 0,
            say=self.say,
            world=world,
        )

        with (
            MetricsLog(self.run / FILE_NAME, last_step=step) if world.is_main else NoMetrics() as metrics,
            StepLoader(
                samples,
                self.data.order,
                start=cursor,
                stop=end,
                global_batch=training.global_batch,
                micro_batch=training.micro_batch,
                rank=world.rank,
                world_size=world.size,
                device=self.device,
                skips=self.data.skips,
                num_terms=objective.num_terms,
            ) as batches,
            self._saver(
                partial(tensors_of, model, optimizer),
                metrics,
                guard,
                scale,
                best=checkpoint.best_of(self.run, last_step=step, measured_on=self._measured_on)
                if found
                else None,
            ) as saver,
            self._trackers(metrics, step) as trackers,
        ):
            if world.is_main and found and (lost := found.state.metrics_lines - metrics.num_lines) > 0:
                self.say(
                    f"{self.run / FILE_NAME}: {lost} of the {found.state.metrics_lines} lines up to step {step} are gone or broken; "
                    "training goes on the same without them; to have them again, put them back from a backup while the run is stopped"
                )
            return loop.run(
                learner,
                optimizer,
                batches,
                step=step,
                cursor=place,
                total_steps=total_steps,
                config=training,
                optim=self.config.optim,
                device=self.device,
                metrics=trackers,
                look=self._excerpts(model, objective, trackers),
                save=saver.after_step,
                guard=guard,
                describe=self.data.describe,
                **measure,
                scale=scale,
                say=self.say,
                world=world,
            )

    def _samples(self, windows: Windows | MixedWindows) -> Samples:
        return self.phase.samples(windows, self.config, self.origin, self.device, self.say)

    def _trackers(self, metrics: MetricsLog | NoMetrics, step: int) -> Trackers:
        config = self.config.training.tracking
        run = TrackedRun(
            folder=self.run, project=config.track_project, options=recorded(self.config), step=step
        )
        return Trackers(metrics, config.track if self.world.is_main else (), run, self.say)

    def _excerpts(self, model: MiniMind, objective: Objective, trackers: Trackers) -> Callable[[int], None]:
        def tell(step: int, name: str, prompt: str, text: str) -> None:
            self.say(f"step {step}  after {prompt!r}: {text!r}")
            trackers.text(step, name, prompt + text)

        config, info = self.config.training.excerpts, self.shards.tokenizer
        if not config.sample_every:
            return lambda _: None
        tokenizer = load_run_tokenizer(self.run, info).reference
        forward = autocast(self.config.training.dtype, self.device)
        around = partial(unsharded, objective, forward)
        return Excerpts(model, config, tokenizer=tokenizer, info=info, tell=tell, around=around).after_step

    def _saver(
        self,
        tensors: Callable[[], Tensors],
        metrics: MetricsLog | NoMetrics,
        guard: NonfiniteGuard,
        scale: LossScale | None,
        *,
        best: CheckpointState | None,
    ) -> Saver:
        options = recorded(self.config)

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
            self.config.training.saving,
            tensors=tensors,
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
        training, processes = self.config.training, self.world.size
        where = (
            self.device.type
            if processes == 1
            else f"{self.device.type}, {processes} processes by {training.parallel},"
        )
        self.say(parameter_line(self.config.model))
        if self.config.lora.lora_rank:
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

"""A run of any phase: begun, gone on with, and handed to the loop.

A run is what `config.json` says, from the first step to the last. A phase brings its options and its objective; which options
`--resume` may change is in `config`.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal

import torch

from minimind_data.errors import UserError
from minimind_data.files import disk_full_is_plain
from minimind_data.format import FormatError
from minimind_data.shards import ShardSet
from minimind_data.windows import Windows
from minimind_train import checkpoint, loop, runs
from minimind_train.checkpoint import Checkpoint, CheckpointState
from minimind_train.config import (
    WEIGHTS,
    ConfigT,
    PhaseConfig,
    reconciled,
    record_of,
    recorded,
    resolved,
    with_stretches,
)
from minimind_train.course import Course
from minimind_train.description import describe
from minimind_train.devices import out_of_memory_is_plain, refuse_too_large
from minimind_train.distributed import ALONE, World, joined, launched_place
from minimind_train.evaluate import validation
from minimind_train.excerpts import Excerpts
from minimind_train.finished import note_finish, refuse_idle_changes, refuse_repetition
from minimind_train.launch import together
from minimind_train.layerwise import compile_layers, failing_to_compile_is_plain, recompute_activations
from minimind_train.lora import adapters_of, add_adapters
from minimind_train.metrics import FILE_NAME, MetricsLog, NoMetrics
from minimind_train.model import MiniMind, initialize
from minimind_train.model_config import parameter_line
from minimind_train.nonfinite import Tolerance
from minimind_train.objective import Objective
from minimind_train.optim import make_optimizer
from minimind_train.parallel import model_by_itself, shared_out
from minimind_train.parts import Datasets, MixedWindows, Samples, words_of
from minimind_train.precision import LossScale, allow_tf32, autocast
from minimind_train.progress import Say, say_on_stderr
from minimind_train.runs import RunRecord, load_run_tokenizer, moved_cursor
from minimind_train.sampler import SampleCursor
from minimind_train.saver import Saver
from minimind_train.start import Origin, begun_from
from minimind_train.step_loader import StepLoader
from minimind_train.tracking import TrackedRun, Trackers

__all__ = ["Phase", "begin", "resume"]


def _as_they_are(windows: Samples, *_: object) -> Samples:
    return windows


@dataclass(frozen=True, kw_only=True)
class Phase(Generic[ConfigT]):
    """What distinguishes one kind of training from another."""

    command: str
    """What `mm-train` calls it, and what the run's record says."""
    dataset: Literal["pretrain", "sft", "dpo"]
    """The kind of dataset that it learns."""
    config: type[ConfigT]
    """Its options; made without arguments, they are its defaults."""
    objective: Callable[[MiniMind, ConfigT, Origin], Objective]
    """What it learns by, over a model and by options that are resolved."""
    samples: Callable[[Windows | MixedWindows, ConfigT, Origin, torch.device, Say], Samples] = _as_they_are
    """What it learns from windows, where that is more than the dataset has."""


def begin(
    phase: Phase[ConfigT],
    config: ConfigT,
    say: Say = say_on_stderr,
    *,
    given: Collection[str] | None = None,
) -> loop.Outcome:
    """Begin a run and train until it ends or a signal stops it.

    Args:
        phase: what kind of training.
        config: its options.
        say: takes lines for the user; of several processes, that of rank 0 calls it.
        given: which of them the user wrote, by flat name; by default those that are not as without a word.

    Raises:
        UserError: the run cannot be made or cannot go on; the message says why and what to do.
    """
    prepare = partial(_beginning, phase, config, say, given=given)
    return _among_ranks(phase, prepare, nproc=config.training.nproc)


def resume(
    phase: Phase[ConfigT],
    run: Path,
    given: Mapping[str, Any],
    *,
    allow_change: Collection[str] = (),
    say: Say = say_on_stderr,
) -> loop.Outcome:
    """Go on with a run from its newest whole checkpoint.

    Args:
        phase: what kind of training the run is.
        run: its folder.
        given: the options that the user wrote, by flat name; `resume_from` moves the cursor.
        allow_change: names of options that may differ from what the run was begun with.
        say: takes lines for the user; of several processes, that of rank 0 calls it.

    Raises:
        UserError: there is no run, or an option differs that must not; the message shows both sides.
    """
    prepare = partial(_going_on, phase, run, given, say, allow_change=allow_change)
    recorded_nproc = RunRecord.read(run).options.get("nproc", 1) if launched_place() is None else 1
    return _among_ranks(phase, prepare, nproc=given.get("nproc", recorded_nproc))


@dataclass(frozen=True, kw_only=True)
class _Start(Generic[ConfigT]):
    """From where on a run trains, and by which options: what rank 0 finds out, and all ranks go by."""

    config: ConfigT
    """With nothing left to be resolved."""
    found: Checkpoint | None
    step: int
    cursor: int


_Prepared = tuple["_Job[ConfigT]", _Start[ConfigT], Callable[[], None]]
"""What trains, from where on, and what is to be done once all of that fits."""


def _among_ranks(
    phase: Phase[ConfigT],
    prepare: Callable[[World], AbstractContextManager[_Prepared[ConfigT]]],
    *,
    nproc: int,
) -> loop.Outcome:
    """Be the rank that this process was started as, or start ranks, or be the only one."""
    work = partial(_train_as_rank, phase, prepare)
    place = launched_place()
    if place is None and nproc > 1:
        return together(work, nproc)
    if place is not None and nproc > 1:
        raise UserError(
            f"--nproc {nproc} under torchrun, which starts the processes itself; leave one of the two out"
        )
    world = World(place or ALONE.place)
    with joined(world):
        return work(world)


def _train_as_rank(
    phase: Phase[ConfigT],
    prepare: Callable[[World], AbstractContextManager[_Prepared[ConfigT]]],
    world: World,
) -> loop.Outcome:
    """Prepare the run, or wait for what rank 0 has prepared, and train."""
    if world.leads:
        with contextlib.ExitStack() as held:
            with world.leading():
                job, start, before_steps = held.enter_context(prepare(world))
            outcome = job.train(world.told(start), before_steps)
            if outcome.step >= outcome.total_steps:
                note_finish(job.run, outcome.step)
            return outcome
    start = world.told(None)
    run = start.config.training.run
    if not (run / runs.CONFIG_NAME).is_file():
        raise UserError(
            f"{run.absolute()}: rank {world.rank} does not see the run that rank 0 has there; take a --run in a folder that all "
            "machines share"
        )
    shards = _open_shards(start.config.data.shards)
    origin = Origin(start.config, _say_nothing)
    return _Job(phase, start.config, shards, origin, say=_say_nothing, world=world).train(start)


@contextlib.contextmanager
def _beginning(
    phase: Phase[ConfigT], config: ConfigT, say: Say, world: World, *, given: Collection[str] | None
) -> Iterator[_Prepared[ConfigT]]:
    """Make the run folder, and hold its lock."""
    run = config.training.run
    runs.refuse_occupied(run)
    shards = Datasets.open(config.data.shards)
    _refuse_other_kind(phase, shards.sets)
    config, weights = begun_from(config, shards, given, say)
    job = _Job(phase, resolved(config, shards), shards, Origin(config, say, weights), say=say, world=world)
    start = _Start(config=job.config, found=None, step=0, cursor=job.course.first_position())
    with disk_full_is_plain(run):
        run.mkdir(parents=True, exist_ok=True)
    with disk_full_is_plain(run), runs.lock(run):
        runs.refuse_occupied(run)
        runs.create(
            run,
            record_of(phase.command, job.config, shards),
            shards.folder,
            describe(phase.command, job.config),
        )
        yield job, start, lambda: None


@contextlib.contextmanager
def _going_on(
    phase: Phase[ConfigT],
    run: Path,
    given: Mapping[str, Any],
    say: Say,
    world: World,
    *,
    allow_change: Collection[str],
) -> Iterator[_Prepared[ConfigT]]:
    """Find out where the run is, and hold the lock of its folder."""
    RunRecord.read(run)  # before the lock, which would leave its file in any folder
    with disk_full_is_plain(run), runs.lock(run):
        record = RunRecord.read(run)
        if record.command != phase.command:
            raise UserError(
                f"{run}: a run of `mm-train {record.command}`, not of {phase.command}; resume it with that command"
            )
        runs.clean(run)
        found = checkpoint.load_latest(run, say)
        step = found.state.step if found else 0
        if not found:
            refuse_repetition(run, record)
            say(f"{run}: no checkpoint yet, so the run begins again")
        shards = _open_shards(words_of(given.get("shards", record.options["shards"])))
        kept = record.without_moves_after(step)
        config, new_record = reconciled(
            phase.config, run, kept, given, shards, step=step, allow_change=allow_change
        )
        _refuse_other_kind(phase, shards.sets)
        job = _Job(phase, config, shards, Origin(config, say), say=say, world=world)
        if "from_weight" in given:
            job.origin.weights("--from-weight says where they are now")
        cursor = kept.cursor_at(step, found.state.cursor if found else job.course.first_position())
        if "resume_from" in given:
            moved = job.course.position_of(given["resume_from"], cursor=cursor)
            new_record = new_record.changed([moved_cursor(step, cursor, moved)])
            cursor = moved
        if any(change.name == WEIGHTS for change in new_record.changes[len(kept.changes) :]):
            job.reweight(cursor)
            new_record = replace(new_record, options=recorded(job.config))
        new_record = replace(new_record.placed(step, cursor), finished=record.finished)
        described = describe(phase.command, job.config, new_record.changes)
        update = partial(runs.update, run, record, new_record, shards.folder, described)
        if found and step >= job.course.end(step, cursor)[1]:
            refuse_idle_changes(run, step, new_record.changes[len(kept.changes) :])
            update()  # of the end itself
        yield job, _Start(config=job.config, found=found, step=step, cursor=cursor), update


class _Job(Generic[ConfigT]):
    """One rank of a run, with the options resolved and the data open, from wherever it begins."""

    def __init__(
        self,
        phase: Phase[ConfigT],
        config: ConfigT,
        shards: Datasets,
        origin: Origin,
        *,
        say: Say,
        world: World,
    ) -> None:
        self.device = world.device(config.training.device)
        _refuse_unfit(config, shards, self.device, world)
        self.phase = phase
        self.world = world
        self.sharded = world.size > 1 and config.training.parallel == "fsdp"
        self.run = config.training.run
        self.shards = shards
        self.origin = origin
        self.say = say
        self.course = Course(config, shards, say)
        self.config = with_stretches(config, self.course.stretches)
        self.evaluator = self.course.evaluator(self.device, world)
        if config.training.saving.save_best and not self.evaluator:
            raise UserError("--save-best needs something to measure on; pass --val-shards, or leave it out")
        self._measured_on = self.evaluator.measures_on if self.evaluator else None

    def reweight(self, cursor: int) -> None:
        """Let other weights of a mixture hold from the cursor on."""
        self.course.reweight(cursor)
        self.config = with_stretches(self.config, self.course.stretches)

    @failing_to_compile_is_plain()
    @out_of_memory_is_plain(
        "go on with --resume and a smaller --micro-batch, or free some memory; earlier checkpoints are intact"
    )
    def train(self, start: _Start[ConfigT], before_steps: Callable[[], None] = lambda: None) -> loop.Outcome:
        """Build the model, put what it begins from into it, and hand all to the loop.

        Args:
            start: where it goes on.
            before_steps: runs once all of that fits.
        """
        training, world = self.config.training, self.world
        found, step, cursor = start.found, start.step, start.cursor
        end, total_steps = self.course.end(step, cursor)
        if step >= total_steps:
            self.say(f"{self.run}: finished already, {step} steps; nothing to do")
            return loop.Outcome(step=step, total_steps=total_steps, cursor=cursor, loss=None, rank=world.rank)
        torch.set_num_threads(training.threads)
        allow_tf32(training.tf32, self.device)
        model = MiniMind(self.config.model)
        lora = self.config.lora
        why = f"{self.run} learns adapters alone" if found else f"{self.run} has no checkpoint yet"
        # Rank 0 gives its weights to all.
        weights = self.origin.weights(why) if world.leads and (found is None or lora.lora_rank) else None
        if weights:
            model.load_state_dict(weights.tensors)
        else:
            initialize(model, training.seed)
        if lora.lora_rank:
            add_adapters(model, lora, training.seed)
        if not self.sharded:
            model.to(self.device)
        objective = self.phase.objective(model, self.config, self.origin)
        learner = shared_out(objective, world, self.device, parallel=training.parallel, dtype=training.dtype)
        optimizer = make_optimizer(model, self.config.optim)
        if found:
            found.restore(model, optimizer)
        world.wait()  # for all ranks: what does not fit one of them leaves the run as it was
        before_steps()
        self._introduce(model, step, total_steps, cursor)
        place = SampleCursor(cursor)
        scale = LossScale(**(found and found.state.loss_scale) or {}) if training.dtype == "fp16" else None
        if training.compile:
            compile_layers(model)
        if training.activation_checkpointing:
            recompute_activations(model)
        samples = self._samples(self.course.windows)
        measure = {}
        if self.evaluator:
            every = self.config.validation.val_every
            self.evaluator.samples = self._samples(self.evaluator.windows)
            measure["validate"] = validation(self.evaluator, objective, every=every, total_steps=total_steps)
        self.origin.release()
        tolerance = Tolerance(
            objective,
            training.on_nonfinite,
            run=self.run,
            command=self.phase.command,
            skipped=found.state.skipped_steps if found else 0,
            say=self.say,
            world=world,
        )

        with (
            MetricsLog(self.run / FILE_NAME, last_step=step) if world.leads else NoMetrics() as metrics,
            StepLoader(
                samples,
                self.course.order,
                start=cursor,
                stop=end,
                global_batch=training.global_batch,
                micro_batch=training.micro_batch,
                rank=world.rank,
                world_size=world.size,
                device=self.device,
                skips=self.course.skips,
                num_terms=objective.num_terms,
            ) as batches,
            self._saver(
                partial(checkpoint.tensors_of, model, optimizer),
                metrics,
                tolerance,
                scale,
                best=checkpoint.best_of(self.run, last_step=step, measured_on=self._measured_on)
                if found
                else None,
            ) as saver,
            self._trackers(metrics, step) as trackers,
        ):
            if world.leads and found and (lost := found.state.metrics_lines - metrics.num_lines) > 0:
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
                tolerance=tolerance,
                describe=self.course.describe,
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
        return Trackers(metrics, config.track if self.world.leads else (), run, self.say)

    def _excerpts(self, model: MiniMind, objective: Objective, trackers: Trackers) -> Callable[[int], None]:
        def tell(step: int, name: str, prompt: str, text: str) -> None:
            self.say(f"step {step}  after {prompt!r}: {text!r}")
            trackers.text(step, name, prompt + text)

        config, info = self.config.training.excerpts, self.shards.tokenizer
        if not config.sample_every:
            return lambda _: None
        tokenizer = load_run_tokenizer(self.run, info).reference
        forward = autocast(self.config.training.dtype, self.device)
        around = partial(model_by_itself, objective, forward)
        return Excerpts(model, config, tokenizer=tokenizer, info=info, tell=tell, around=around).after_step

    def _saver(
        self,
        tensors: Callable[[], checkpoint.Tensors],
        metrics: MetricsLog | NoMetrics,
        tolerance: Tolerance,
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
                loss_scale=scale.told() if scale else None,
                skipped_steps=tolerance.skipped,
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
            return self.world.on_another_line()
        return ALONE if self.world.leads else None

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
            f"{self.run}: on {where} in {training.dtype}, {len(self.course.windows):,} windows of "
            f"{self.course.windows.seq_len} tokens"
        )
        for line in self.course.introduce(cursor):
            self.say(line)
        again = f"going on after step {step} of {total_steps}" if step else f"step 1 of {total_steps}"
        place = "".join(
            f", {name} {value}" for name, value in self.course.describe(cursor).items() if name != "epochs"
        )
        self.say(f"{again} at position {cursor}{place}")


def _refuse_other_kind(phase: Phase[Any], sets: Sequence[ShardSet]) -> None:
    for shards in sets:
        kind = shards.manifest.kind
        if kind != phase.dataset:
            raise UserError(
                f"{shards.folder}: a dataset of kind {kind}, and `mm-train {phase.command}` learns kind {phase.dataset}; make one by "
                f"`mm-data tokenize --kind {phase.dataset}`, or train on this one by `mm-train {kind}`"
            )


def _open_shards(words: Sequence[str]) -> Datasets:
    try:
        return Datasets.open(words)
    except FormatError as error:
        raise UserError(f"{error}; if the dataset has moved, say where by --shards") from None


def _say_nothing(_: str) -> None:
    """Take a line that rank 0 says too."""


def _refuse_unfit(config: PhaseConfig, shards: Datasets, device: torch.device, world: World) -> None:
    if config.training.global_batch < world.size:
        raise UserError(
            f"--global-batch {config.training.global_batch} has no sample for some of {world.size} processes; take a larger one, "
            "or fewer processes"
        )
    vocab_size, room = shards.tokenizer.vocab_size, config.model.vocab_size
    if vocab_size > room:
        raise UserError(
            f"{shards.folder}: a vocabulary of {vocab_size} entries does not fit a model of {room}; start a new run"
        )
    if config.data.seq_len > config.model.longest_sequence:
        raise UserError(
            f"--seq-len {config.data.seq_len} is longer than the model's --max-position-embeddings "
            f"{config.model.longest_sequence}; change one of them"
        )
    size = config.model.num_parameters
    what = f"{size / 1e6:,.1f} M parameters, their gradients and the optimizer's averages"
    least = 12 if config.optim.optimizer == "muon" else 16
    if config.lora.lora_rank:
        least, what = 4, f"{size / 1e6:,.1f} M parameters"
    share = world.size if config.training.parallel == "fsdp" else 1
    on_one_device = world.place.local_size if device.type == "cpu" else 1
    refuse_too_large(
        what,
        least * size * on_one_device // share,
        device,
        "take a smaller --hidden-size or --num-hidden-layers, or more devices with --parallel fsdp",
    )
    # Two int64 a token, and its position where documents are kept apart.
    samples = (24 if config.data.document_mask else 16) * config.training.global_batch * config.data.seq_len
    refuse_too_large("the samples of a step", samples, torch.device("cpu"), "take a smaller --global-batch")

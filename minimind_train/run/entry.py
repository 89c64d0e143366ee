"""A run of any phase: `begin` a new one, `resume` one, or whichever it takes, on one rank or several.

Rank 0 decides how the run begins (options, checkpoint, position) and holds the lock of its folder; then every rank trains, see `rank`. The
options say which phase it is; `reconcile` says which of them a resume may change.
"""

import contextlib
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minimind_data.dataset.format import FormatError, Manifest
from minimind_data.errors import UserError
from minimind_data.files import user_error_on_full_disk
from minimind_data.options import flatten
from minimind_data.tokenizer.loading import cached_tokenizer
from minimind_train.batches.datasets import Datasets
from minimind_train.batches.options import source_texts
from minimind_train.parallel.interrupt import never
from minimind_train.parallel.launch import launch_ranks
from minimind_train.parallel.world import ALONE, World, process_group, torchrun_place
from minimind_train.progress import Say, say_on_stderr
from minimind_train.run.excerpts import prompts_of
from minimind_train.run.initial import InitialWeights, with_initial_weights
from minimind_train.run.options import RunOptions, kind_of, options_of, recorded, refuse_unknown
from minimind_train.run.phases import refuse_other_kind
from minimind_train.run.rank import RankJob, Start
from minimind_train.run.reconcile import reconciled, record_of, refuse_idle_changes, resolved
from minimind_train.run.toml import describe
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder import record as runs
from minimind_train.run_folder.places import PLACES, with_present_places
from minimind_train.run_folder.record import WEIGHTS, RunRecord, move
from minimind_train.training import loop

__all__ = ["begin", "begin_or_resume", "resume"]

OnStep = Callable[[dict[str, Any]], object]


def begin(
    options: RunOptions,
    say: Say = say_on_stderr,
    *,
    on_step: OnStep = loop.ignore,
    stop: Callable[[], bool] = never,
    names_given: Collection[str] | None = None,
    world: World | None = None,
) -> loop.RunOutcome:
    """Begin a run and train until it ends, or a signal or `stop` stops it; the step is then finished and saved.

    Args:
        options: of a phase, such as `PretrainOptions.of(shards="data", run="runs/first")`.
        say: takes lines for the user; of several processes, that of rank 0 calls it.
        on_step: called with the record of each finished step, which has its `step`, its `loss` and what else metrics.jsonl says; of
            several processes, by rank 0.
        stop: asked after each step, likewise, whether to save and stop.
        names_given: which of the options the user wrote, by flat name; by default, those that differ from their defaults.
        world: the ranks, where they have joined already and this process is one of them; by default, `nproc` are started.

    Raises:
        UserError: the run cannot begin, or cannot go on; the message says why and what to do.
    """
    prepare = partial(_prepare_new, options, say, names_given=names_given)
    watch = loop.Watch(on_step=on_step, stop=stop)
    return _run_on_ranks(prepare, watch, nproc=options.training.nproc, world=world)


def resume(
    run: Path | str,
    options_given: Mapping[str, Any] = MappingProxyType({}),
    *,
    command: str | None = None,
    allow_change: Collection[str] = (),
    reweight: bool = False,
    say: Say = say_on_stderr,
    on_step: OnStep = loop.ignore,
    stop: Callable[[], bool] = never,
    world: World | None = None,
) -> loop.RunOutcome:
    """Resume a run from its newest complete checkpoint.

    Args:
        run: its folder.
        options_given: the options that the user wrote, by flat name; `resume_from` moves the position.
        command: the phase that it must be of, such as `sft`; any by default.
        allow_change: names of options that may differ from what the run was begun with.
        reweight: whether the parts of a mixture have new weights from here on, those of the option `shards`.
        say: takes lines for the user; of several processes, that of rank 0 calls it.
        on_step: as for `begin`.
        stop: as for `begin`.
        world: as for `begin`.

    Raises:
        UserError: there is no run, it is of another phase, there is no such option, or one differs that must not; the message shows
            both sides.
    """
    run = Path(run)
    allow_change = {*allow_change, *([WEIGHTS] if reweight else [])}
    prepare = partial(
        _prepare_resumed, run, dict(options_given), say, command=command, allow_change=allow_change
    )
    starts_ranks = world is None and torchrun_place() is None
    recorded_nproc = options_of(RunRecord.read(run), run).training.nproc if starts_ranks else 1
    watch = loop.Watch(on_step=on_step, stop=stop)
    return _run_on_ranks(prepare, watch, nproc=options_given.get("nproc", recorded_nproc), world=world)


def begin_or_resume(
    options: RunOptions,
    say: Say = say_on_stderr,
    *,
    names_given: Collection[str] | None = None,
    allow_change: Collection[str] = (),
    on_step: OnStep = loop.ignore,
    stop: Callable[[], bool] = never,
    world: World | None = None,
) -> loop.RunOutcome:
    """Resume the run in the folder `run` if there is one, and else begin it.

    This is one call, and one command line, for jobs that are started again by cron, Slurm or `torchrun --max-restarts`. A run that has
    ended is left as it is.

    Args:
        options: of a phase, as for `begin`. A run that is there must have been begun with those that are given, as for `resume`.
        say: takes lines for the user, as for `begin`.
        names_given: which of the options the user wrote, by flat name; by default, those that differ from their defaults.
        allow_change: names of options that may differ from what the run was begun with.
        on_step: as for `begin`.
        stop: as for `begin`.
        world: as for `begin`.

    Raises:
        UserError: the run can neither begin nor go on; the message says why and what to do.
    """
    run = options.training.run
    values, defaults = flatten(options), flatten(type(options)())
    if names_given is None:
        names_given = [name for name, value in values.items() if value != defaults[name]]
    if "resume_from" in names_given:
        raise UserError(
            "`resume_from` would move the run back each time that it is started again",
            remedy="move it once, by `resume`",
            option="resume_from",
        )
    options_given = {name: values[name] for name in names_given}
    prepare = partial(_prepare_either, options, options_given, say, allow_change=allow_change)
    nproc = options.training.nproc
    if runs.is_begun(run) and "nproc" not in options_given:
        nproc = options_of(RunRecord.read(run), run).training.nproc
    watch = loop.Watch(on_step=on_step, stop=stop)
    return _run_on_ranks(prepare, watch, nproc=nproc, world=world)


_Prepared = tuple[RankJob, Start, Callable[[], None]]
"""The job of rank 0, where it starts, and what to call once the model and its optimizer have been built."""


def _run_on_ranks(
    prepare: Callable[[World], AbstractContextManager[_Prepared]],
    watch: loop.Watch,
    *,
    nproc: int,
    world: World | None,
) -> loop.RunOutcome:
    """Train as a rank of `world`, or as the rank that torchrun started, or launch `nproc` ranks, or train alone."""
    work = partial(_train_as_rank, prepare, watch)
    if world is not None:
        return work(world)
    place = torchrun_place()
    if place is None and nproc > 1:
        _refuse_what_cannot_be_sent(work)
        return launch_ranks(work, nproc)
    if place is not None and nproc > 1:
        raise UserError(
            f"`nproc` {nproc} under torchrun, which starts the processes itself",
            remedy="leave one of the two out",
            option="nproc",
        )
    world = World(place or ALONE.place)
    with process_group(world):
        return work(world)


def _refuse_what_cannot_be_sent(work: Callable[[World], loop.RunOutcome]) -> None:
    """Refuse callables of the caller that no other process can have.

    Raises:
        UserError: one of them is a lambda, say, or holds an open file.
    """
    try:
        pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"what watches the run is called in another process, which cannot have it ({error})",
            remedy="pass functions of a module as `say`, `on_step` and `stop`, or train with `nproc` 1",
            option="nproc",
        ) from None


def _train_as_rank(
    prepare: Callable[[World], AbstractContextManager[_Prepared]], watch: loop.Watch, world: World
) -> loop.RunOutcome:
    """Train as one rank: rank 0 prepares the run and broadcasts where it starts; the others wait for that."""
    if world.is_main:
        with contextlib.ExitStack() as stack:
            with world.relaying_errors():
                job, start, before_steps = stack.enter_context(prepare(world))
            outcome = job.train(world.broadcast(start), before_steps, watch)
            if outcome.step >= outcome.total_steps:
                runs.note_finish(job.run, outcome.step)
            return outcome
    return _follow(world.broadcast(None), world)


def _follow(start: Start, world: World) -> loop.RunOutcome:
    """Train as another rank than the first, from where rank 0 said."""
    run = start.options.training.run
    if not (run / runs.RUN_CONFIG_NAME).is_file():
        raise UserError(
            f"rank {world.rank} does not see the run that rank 0 has there",
            where=run.absolute(),
            remedy="take a `run` in a folder that all machines share",
            option="run",
        )
    datasets = _open_datasets(start.options.data.shards)
    origin = InitialWeights(start.options, _say_nothing)
    return RankJob(start.options, datasets, origin, say=_say_nothing, world=world).train(start)


def _prepare_either(
    options: RunOptions,
    options_given: Mapping[str, Any],
    say: Say,
    world: World,
    *,
    allow_change: Collection[str],
) -> AbstractContextManager[_Prepared]:
    """Prepare the run that is there to go on, or a new one."""
    run = options.training.run
    if runs.is_begun(run):
        return _prepare_resumed(
            run, options_given, say, world, command=options.command, allow_change=allow_change
        )
    return _prepare_new(options, say, world, names_given=options_given)


@contextlib.contextmanager
def _prepare_new(
    options: RunOptions, say: Say, world: World, *, names_given: Collection[str] | None
) -> Iterator[_Prepared]:
    """Check the options of a new run, make its folder, and hold the folder's lock for the block."""
    run = options.training.run
    runs.refuse_occupied(run)
    datasets = Datasets.open(options.data.shards)
    refuse_other_kind(options, datasets.sets)
    if (excerpts := options.training.excerpts).sample_every:
        prompts_of(excerpts, cached_tokenizer(datasets.sets[0].tokenizer_json, datasets.tokenizer))
    options, weights = with_initial_weights(options, datasets, names_given, say)
    origin = InitialWeights(options, say, weights)
    job = RankJob(resolved(options, datasets), datasets, origin, say=say, world=world)
    start = Start(options=job.options, checkpoint=None, step=0, position=job.data.first_position())
    with user_error_on_full_disk(run):
        run.mkdir(parents=True, exist_ok=True)
    with user_error_on_full_disk(run), runs.lock(run):
        runs.refuse_occupied(run)
        runs.create(run, record_of(job.options, datasets), datasets.folder, describe(job.options))
        yield job, start, lambda: None


@contextlib.contextmanager
def _prepare_resumed(
    run: Path,
    options_given: Mapping[str, Any],
    say: Say,
    world: World,
    *,
    command: str | None = None,
    allow_change: Collection[str] = (),
) -> Iterator[_Prepared]:
    """Load the newest complete checkpoint, reconcile its options with those given, and hold the folder's lock for the block."""
    options_of(RunRecord.read(run), run)  # before the lock, which would leave its file in any folder
    with user_error_on_full_disk(run), runs.lock(run):
        record = RunRecord.read(run)
        options_of(record, run)  # so that what is read of it one by one is what options are
        if command not in {None, record.command}:
            raise UserError(
                f"a run of `mm-train {record.command}`, not of {command}",
                where=run,
                remedy="resume it with that command",
            )
        refuse_unknown(kind_of(record, run), options_given)
        runs.clean(run)
        latest = checkpoint.load_latest(run, say)
        step = latest.state.step if latest else 0
        if not latest:
            runs.refuse_repetition(run, record)
            say(f"{run}: no checkpoint yet, so the run begins again")
        names = [name for name in PLACES if name not in options_given]
        record_then = with_present_places(record, run, say, names=names).without_moves_after(step)
        datasets = _open_datasets(source_texts(options_given.get("shards", record_then.options["shards"])))
        options, new_record = reconciled(
            run, record_then, options_given, datasets, step=step, allow_change=allow_change
        )
        refuse_other_kind(options, datasets.sets)
        if options.validation.val_shards:
            with _asking_where("val_shards"):
                Manifest.read(Path(options.validation.val_shards))
        job = RankJob(options, datasets, InitialWeights(options, say), say=say, world=world)
        if "from_weight" in options_given:
            job.origin.weights("`from_weight` says where they are now")
        position = record_then.position_at(
            step, latest.state.position if latest else job.data.first_position()
        )
        if "resume_from" in options_given:
            new_position = job.data.position_of(options_given["resume_from"], near=position)
            new_record = new_record.changed([move(step, position, new_position)])
            position = new_position
        if any(change.name == WEIGHTS for change in new_record.changes[len(record_then.changes) :]):
            job.reweight(position)
            new_record = replace(new_record, options=recorded(job.options))
        new_record = replace(new_record.dated(step, position), finished=record.finished)
        description = describe(job.options, new_record.changes)
        update = partial(runs.update, run, record, new_record, datasets.folder, description)
        if latest and step >= job.data.end(step, position)[1]:
            refuse_idle_changes(options, step, new_record.changes[len(record_then.changes) :])
            update()  # a change of the end itself
        yield job, Start(options=job.options, checkpoint=latest, step=step, position=position), update


def _open_datasets(texts: Sequence[str]) -> Datasets:
    with _asking_where("shards"):
        return Datasets.open(texts)


@contextlib.contextmanager
def _asking_where(option: str) -> Iterator[None]:
    """Let the error about a dataset of a run ask where it is, as it was there once."""
    try:
        yield
    except FormatError as error:
        raise UserError(
            str(error), remedy=f"if the dataset has moved, say where by `{option}`", option=option
        ) from None


def _say_nothing(_: str) -> None:
    """Drop a line: rank 0 says it too."""

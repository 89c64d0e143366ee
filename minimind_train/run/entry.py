"""A run of any phase: `begin` a new one or `resume` one, on one rank or several.

Rank 0 decides how the run begins (options, checkpoint, cursor) and holds the lock of its folder; every rank then trains in `rank_job`. A phase
brings its options and its objective; which options `--resume` may change is in `config`.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from minimind_data.dataset.format import FormatError
from minimind_data.errors import UserError
from minimind_data.files import user_error_on_full_disk
from minimind_train.batches.datasets import Datasets, source_texts
from minimind_train.parallel.launch import launch_ranks
from minimind_train.parallel.world import ALONE, World, process_group, torchrun_place
from minimind_train.progress import Say, say_on_stderr
from minimind_train.run.initial import InitialWeights, with_initial_weights
from minimind_train.run.options import ConfigT
from minimind_train.run.phase import Phase, refuse_other_kind
from minimind_train.run.rank import RankJob, Start
from minimind_train.run.reconcile import WEIGHTS, reconciled, record_of, recorded, resolved
from minimind_train.run.toml import describe
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder import record as runs
from minimind_train.run_folder.record import RunRecord, moved_cursor
from minimind_train.training import loop

__all__ = ["begin", "resume"]


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
    prepare = partial(_prepare_new, phase, config, say, given=given)
    return _run_on_ranks(phase, prepare, nproc=config.training.nproc)


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
    prepare = partial(_prepare_resumed, phase, run, given, say, allow_change=allow_change)
    recorded_nproc = RunRecord.read(run).options.get("nproc", 1) if torchrun_place() is None else 1
    return _run_on_ranks(phase, prepare, nproc=given.get("nproc", recorded_nproc))


_Prepared = tuple["RankJob[ConfigT]", Start[ConfigT], Callable[[], None]]
"""The job of rank 0, where it starts, and what to call once the model and its optimizer are built."""


def _run_on_ranks(
    phase: Phase[ConfigT],
    prepare: Callable[[World], AbstractContextManager[_Prepared[ConfigT]]],
    *,
    nproc: int,
) -> loop.Outcome:
    """Run as the rank that torchrun made this process, or launch `nproc` ranks, or run alone."""
    work = partial(_train_as_rank, phase, prepare)
    place = torchrun_place()
    if place is None and nproc > 1:
        return launch_ranks(work, nproc)
    if place is not None and nproc > 1:
        raise UserError(
            f"--nproc {nproc} under torchrun, which starts the processes itself; leave one of the two out"
        )
    world = World(place or ALONE.place)
    with process_group(world):
        return work(world)


def _train_as_rank(
    phase: Phase[ConfigT],
    prepare: Callable[[World], AbstractContextManager[_Prepared[ConfigT]]],
    world: World,
) -> loop.Outcome:
    """Train as one rank: rank 0 prepares the run and broadcasts where it starts, the others wait for that."""
    if world.is_main:
        with contextlib.ExitStack() as held:
            with world.relaying_errors():
                job, start, before_steps = held.enter_context(prepare(world))
            outcome = job.train(world.broadcast(start), before_steps)
            if outcome.step >= outcome.total_steps:
                runs.note_finish(job.run, outcome.step)
            return outcome
    start = world.broadcast(None)
    run = start.config.training.run
    if not (run / runs.CONFIG_NAME).is_file():
        raise UserError(
            f"{run.absolute()}: rank {world.rank} does not see the run that rank 0 has there; take a --run in a folder that all "
            "machines share"
        )
    shards = _open_shards(start.config.data.shards)
    origin = InitialWeights(start.config, _say_nothing)
    return RankJob(phase, start.config, shards, origin, say=_say_nothing, world=world).train(start)


@contextlib.contextmanager
def _prepare_new(
    phase: Phase[ConfigT], config: ConfigT, say: Say, world: World, *, given: Collection[str] | None
) -> Iterator[_Prepared[ConfigT]]:
    """Check the options of a new run, make its folder, and hold the folder's lock for the block."""
    run = config.training.run
    runs.refuse_occupied(run)
    shards = Datasets.open(config.data.shards)
    refuse_other_kind(phase, shards.sets)
    config, weights = with_initial_weights(config, shards, given, say)
    job = RankJob(
        phase, resolved(config, shards), shards, InitialWeights(config, say, weights), say=say, world=world
    )
    start = Start(config=job.config, found=None, step=0, cursor=job.data.first_position())
    with user_error_on_full_disk(run):
        run.mkdir(parents=True, exist_ok=True)
    with user_error_on_full_disk(run), runs.lock(run):
        runs.refuse_occupied(run)
        runs.create(
            run,
            record_of(phase.command, job.config, shards),
            shards.folder,
            describe(phase.command, job.config),
        )
        yield job, start, lambda: None


@contextlib.contextmanager
def _prepare_resumed(
    phase: Phase[ConfigT],
    run: Path,
    given: Mapping[str, Any],
    say: Say,
    world: World,
    *,
    allow_change: Collection[str],
) -> Iterator[_Prepared[ConfigT]]:
    """Load the newest whole checkpoint, reconcile its options with the given ones, and hold the folder's lock for the block."""
    RunRecord.read(run)  # before the lock, which would leave its file in any folder
    with user_error_on_full_disk(run), runs.lock(run):
        record = RunRecord.read(run)
        if record.command != phase.command:
            raise UserError(
                f"{run}: a run of `mm-train {record.command}`, not of {phase.command}; resume it with that command"
            )
        runs.clean(run)
        found = checkpoint.load_latest(run, say)
        step = found.state.step if found else 0
        if not found:
            runs.refuse_repetition(run, record)
            say(f"{run}: no checkpoint yet, so the run begins again")
        shards = _open_shards(source_texts(given.get("shards", record.options["shards"])))
        kept = record.without_moves_after(step)
        config, new_record = reconciled(
            phase.config, run, kept, given, shards, step=step, allow_change=allow_change
        )
        refuse_other_kind(phase, shards.sets)
        job = RankJob(phase, config, shards, InitialWeights(config, say), say=say, world=world)
        if "from_weight" in given:
            job.origin.weights("--from-weight says where they are now")
        cursor = kept.cursor_at(step, found.state.cursor if found else job.data.first_position())
        if "resume_from" in given:
            moved = job.data.position_of(given["resume_from"], cursor=cursor)
            new_record = new_record.changed([moved_cursor(step, cursor, moved)])
            cursor = moved
        if any(change.name == WEIGHTS for change in new_record.changes[len(kept.changes) :]):
            job.reweight(cursor)
            new_record = replace(new_record, options=recorded(job.config))
        new_record = replace(new_record.placed(step, cursor), finished=record.finished)
        described = describe(phase.command, job.config, new_record.changes)
        update = partial(runs.update, run, record, new_record, shards.folder, described)
        if found and step >= job.data.end(step, cursor)[1]:
            runs.refuse_idle_changes(run, step, new_record.changes[len(kept.changes) :])
            update()  # of the end itself
        yield job, Start(config=job.config, found=found, step=step, cursor=cursor), update


def _open_shards(words: Sequence[str]) -> Datasets:
    try:
        return Datasets.open(words)
    except FormatError as error:
        raise UserError(f"{error}; if the dataset has moved, say where by --shards") from None


def _say_nothing(_: str) -> None:
    """Take a line that rank 0 says too."""

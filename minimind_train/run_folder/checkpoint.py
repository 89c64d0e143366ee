"""Checkpoints: all that a run needs to go on exactly, whole or absent, and no pickle.

    checkpoints/step-000001000/
        model.safetensors       every weight that is learned under its parameter name, in full precision
        optimizer.safetensors   the optimizer's tensors as KEY.PARAMETER, such as `exp_avg.model.norm.weight`
                                (both are as many files, `model-00001-of-00004.safetensors`, where as many ranks hold the weights
                                in shards, and each writes what it holds; see `stored`)
        state.json              step, position (`cursor`), options, the dataset's fingerprint, what validation gave at this step, size and
                                SHA-256 of the two files, and of itself

A checkpoint is written under a temporary name beside its own, flushed to the disk and renamed; old ones are renamed away
before they are deleted. So whatever carries a checkpoint's name was once complete, and one that has been damaged since is
found by its checksums. What can be derived (learning rate, order of samples, random states, which checkpoint is the best) is
not stored.

This module does not know what a run folder holds besides, nor when a checkpoint is due or has had its time (see `saver`); the caller holds the
folder's lock.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from minimind_data.errors import UserError
from minimind_data.files import (
    DamagedFileError,
    fsync_folder,
    is_disk_full,
    partial_name,
    read_checked,
    remove_partials,
    sha256_of,
    write_checked,
)
from minimind_train.parallel.world import ALONE, World
from minimind_train.run_folder.record import CHECKPOINTS_NAME
from minimind_train.run_folder.tensors import (
    MODEL_NAME,
    OPTIMIZER_NAME,
    StoredTensors,
    Tensors,
    put_optimizer_state,
    put_weights,
)

FORMAT_VERSION = 2  # 1 did not count the lines of metrics
STATE_NAME = "state.json"
_CHECKSUM = "sha256"

_KEYS = {"position": "cursor"}
"""Fields of a `CheckpointState` that state.json calls otherwise."""

_NAME = re.compile(r"step-(\d{9,})")


class DamagedCheckpointError(UserError):
    """A checkpoint is not what was written."""


class GoneCheckpointError(UserError):
    """A checkpoint was deleted while it was read, as a run that is still training does when it has newer ones."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"{folder}: deleted while it was read, by a run that is still training; try again, or give the run a larger --keep"
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What a checkpoint says besides its tensors."""

    step: int
    """Completed optimizer steps."""
    position: int
    """Samples consumed by them, so where the next one stands; in state.json it is called `cursor`."""
    config: dict[str, Any]
    """The run's options, resolved."""
    dataset: str
    """Fingerprint of the dataset."""
    metrics_lines: int
    """Lines that metrics.jsonl had; how often they came may have changed on the way."""
    loss_scale: dict[str, Any] | None = None
    """In fp16: what its loss is multiplied by, and how that came about."""
    skipped_steps: int = 0
    """Steps so far whose loss or gradient was not finite and that moved no weight."""
    val_loss: float | None = None
    """Where the run was measured after this step, what came out."""
    val_on: str | None = None
    """What it was measured on; losses on other things cannot be compared with it."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk whose every byte has just been found right."""

    folder: Path
    state: CheckpointState

    def restore(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Put the weights, and the optimizer's state where one is given, in place, bit for bit.

        Raises:
            GoneCheckpointError: it has been deleted since it was found.
            UserError: the model is not the one that was saved.
        """
        try:
            weights = self._stored(MODEL_NAME)
            put_weights(self.folder, model, weights)
            if optimizer is not None:
                put_optimizer_state(optimizer, model, self._stored(OPTIMIZER_NAME))
        except (OSError, SafetensorError):
            if self.folder.exists():
                raise
            raise GoneCheckpointError(self.folder) from None

    def _stored(self, name: str) -> StoredTensors:
        stem, _, suffix = name.rpartition(".")
        files = [*self.folder.glob(name), *self.folder.glob(f"{stem}-*-of-*.{suffix}")]
        if not files:
            raise FileNotFoundError(self.folder / name)
        return StoredTensors(files)


def folder_of(run: Path, step: int) -> Path:
    """Return where the checkpoint of a step has its place."""
    return run / CHECKPOINTS_NAME / f"step-{step:09d}"


def steps_of(run: Path) -> list[int]:
    """Return the steps of which a run folder has checkpoints, whole or damaged, oldest first."""
    folder = run / CHECKPOINTS_NAME
    if not folder.is_dir():
        return []
    return sorted(
        int(match[1]) for path in folder.iterdir() if path.is_dir() and (match := _NAME.fullmatch(path.name))
    )


def save(
    run: Path,
    state: CheckpointState,
    tensors: Tensors,
    *,
    go_on: Callable[[], object] = lambda: None,
    world: World = ALONE,
) -> Path:
    """Write a checkpoint, or together with other ranks one part of it each.

    Args:
        run: the run folder.
        state: step, position and what they belong to.
        tensors: what `tensors_of` gave, or a copy of it.
        go_on: called between two files; what it raises ends the save without a trace.
        world: the ranks that write it together, all of which come here.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: it could not be written, by one of them; the checkpoints before it are as they were.
    """
    final = folder_of(run, state.step)
    with contextlib.ExitStack() as undo:
        if world.is_main:
            partial = partial_name(final)
            undo.callback(shutil.rmtree, partial, ignore_errors=True)
            with world.relaying_errors(), _user_error_on_failed_write(final):
                final.parent.mkdir(exist_ok=True)
                remove_leftovers(run)
                partial.mkdir()
        partial = world.broadcast(partial if world.is_main else None)
        written: dict[str, Any] | UserError
        try:
            with _user_error_on_failed_write(final):
                written = _write(partial, tensors, go_on)
        except UserError as error:
            written = error
        files: dict[str, Any] = {}
        for of_rank in world.all_gather(written):
            if isinstance(of_rank, UserError):
                raise of_rank
            files |= of_rank
        if world.is_main:
            with world.relaying_errors(), _user_error_on_failed_write(final):
                _write_state(partial, state, files)
                if final.exists():  # damaged, else the run would have gone on from it
                    delete(final)
                partial.rename(final)
                fsync_folder(final.parent)
                fsync_folder(run)
        return world.broadcast(final if world.is_main else None)


@contextlib.contextmanager
def _user_error_on_failed_write(final: Path) -> Iterator[None]:
    """Turn what the system says against writing a checkpoint into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(_sentence(final, error)) from error


def best_of(
    run: Path, *, last_step: int | None = None, measured_on: str | None = None
) -> CheckpointState | None:
    """Return what the checkpoint of the lowest validation loss says, the first one where several have it; None where there is none.

    Args:
        run: the run folder.
        last_step: those of later steps are left out.
        measured_on: only losses on this are compared; by default on what was last measured on.
    """
    measured: list[tuple[float, CheckpointState]] = []
    for step in steps_of(run):
        if last_step is not None and step > last_step:
            break
        with contextlib.suppress(UserError, OSError):  # damaged or gone: not the best, whatever it was
            state = _state_in(folder_of(run, step))
            if state.val_loss is not None:
                measured.append((state.val_loss, state))
    if not measured:
        return None
    same = measured_on or measured[-1][1].val_on
    comparable = [(loss, state) for loss, state in measured if state.val_on == same]
    return min(comparable, key=lambda pair: pair[0])[1] if comparable else None


def remove_leftovers(run: Path) -> None:
    """Delete what a killed process left half-written or half-deleted."""
    remove_partials(run / CHECKPOINTS_NAME)


def load(run: Path, step: int) -> Checkpoint:
    """Check the checkpoint of one step and return it.

    Raises:
        UserError: there is none, or it is damaged, or it is deleted meanwhile.
    """
    there = steps_of(run)
    if step not in there:
        listed = ", ".join(map(str, there)) or "none"
        raise UserError(f"{run}: no checkpoint of step {step}; there are: {listed}")
    return _found(run, step)


def load_best(run: Path) -> Checkpoint:
    """Check the checkpoint of the lowest validation loss and return it.

    Raises:
        UserError: no checkpoint was measured, or that one is damaged, or it is deleted meanwhile.
    """
    best = best_of(run)
    if best is None:
        raise UserError(
            f"{run}: no checkpoint has a validation loss; one has where --val-every and --save-every fall on the same step, and "
            "with --save-best the best one always does"
        )
    return _found(run, best.step)


def load_latest(run: Path, on_damaged: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None where there has never been one.

    Args:
        run: the run folder.
        on_damaged: is told, in one sentence, of every damaged checkpoint that is passed over.

    Raises:
        GoneCheckpointError: one was deleted while it was read; there are newer ones.
        UserError: there are checkpoints, and all are damaged.
    """
    steps = steps_of(run)
    for step in reversed(steps):
        try:
            return _found(run, step)
        except DamagedCheckpointError as error:
            on_damaged(f"{error}; trying the one before it")
    if steps:
        raise UserError(
            f"{run / CHECKPOINTS_NAME}: every checkpoint is damaged; bring one back from a backup, or delete the folder "
            f"{CHECKPOINTS_NAME} and resume, which starts the run again from its first step"
        )
    return None


def _found(run: Path, step: int) -> Checkpoint:
    folder = folder_of(run, step)
    try:
        return Checkpoint(folder=folder, state=_state_in(folder, with_files=True))
    except DamagedCheckpointError:
        if folder.exists():
            raise
        raise GoneCheckpointError(folder) from None


def _write(folder: Path, tensors: Tensors, go_on: Callable[[], object]) -> dict[str, Any]:
    """Write the files of this rank, and return the size and the checksum of each."""
    files = {}
    for name, named in tensors.items():
        path = folder / name
        save_file(named, path)
        go_on()
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        go_on()
    return files


def _write_state(folder: Path, state: CheckpointState, files: dict[str, Any]) -> None:
    # In the order of the fields, each under its name on disk.
    content = {_KEYS.get(name, name): value for name, value in asdict(state).items()}
    content = {"format_version": FORMAT_VERSION, **content, "files": files}
    write_checked(folder / STATE_NAME, content, key=_CHECKSUM)
    for name in files:  # safetensors lets nobody else read what it writes; the user's umask shall decide
        shutil.copymode(folder / STATE_NAME, folder / name)


def _state_in(folder: Path, *, with_files: bool = False) -> CheckpointState:
    """Read state.json and hold it, and both files where that is asked for, against its checksums."""
    try:
        content = read_checked(folder / STATE_NAME, key=_CHECKSUM)
        problem = _problem(folder, content["files"]) if with_files else None
        version = content["format_version"]
        if problem is None and version == FORMAT_VERSION:
            keys = {field.name: _KEYS.get(field.name, field.name) for field in fields(CheckpointState)}
            return CheckpointState(**{name: content[key] for name, key in keys.items() if key in content})
    except PermissionError:
        raise  # not damaged, and nothing that should be deleted
    except OSError as error:
        problem = f"{Path(error.filename or folder).name}: {error.strerror}"
    except DamagedFileError as error:
        problem = f"{STATE_NAME}: {error.problem}"
    except (KeyError, TypeError, AttributeError):
        problem = f"{STATE_NAME} is not one of this program's"
    if problem is None:
        raise UserError(
            f"checkpoint {folder} is of format {version}; this program reads format {FORMAT_VERSION}"
        )
    raise DamagedCheckpointError(f"checkpoint {folder} is damaged ({problem})")


def _problem(folder: Path, files: dict[str, Any]) -> str | None:
    """Say which file of a checkpoint is not what was written, or return None."""
    for name, entry in files.items():
        num_bytes = (folder / name).stat().st_size
        if num_bytes != entry["bytes"]:
            return f"{name} has {num_bytes} bytes instead of {entry['bytes']}"
        if sha256_of(folder / name) != entry["sha256"]:
            return f"{name} does not fit its checksum"
    return None


def delete(folder: Path) -> None:
    """Delete a checkpoint: its name goes first, so that one that is half deleted never looks whole."""
    doomed = partial_name(folder.with_name(f"{folder.name}.deleted"))
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _sentence(folder: Path, error: Exception) -> str:
    # safetensors tells a system's error by its text alone.
    full = (isinstance(error, OSError) and is_disk_full(error)) or "os error 28" in str(error)
    remedy = "make room on the disk" if full else "mend that"
    why = getattr(error, "strerror", None) or str(error)
    return f"{folder}: the checkpoint could not be written ({why}); {remedy} and go on with --resume; earlier checkpoints are intact"

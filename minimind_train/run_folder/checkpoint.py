"""Checkpoints: everything that a run needs to continue exactly, whole or absent, and without pickle.

    checkpoints/step-000001000/
        model.safetensors       every trained weight under its parameter name, in full precision
        optimizer.safetensors   the optimizer's tensors as KEY.PARAMETER, such as `exp_avg.model.norm.weight`
                                (where ranks hold the weights in shards, each writes its own file of either kind, such as
                                `model-00001-of-00004.safetensors`; see `tensors`)
        state.json              step, position (`cursor`), options, the dataset's fingerprint, the validation loss of this step, size and
                                SHA-256 of the other files, and its own SHA-256

A checkpoint is written under a temporary name beside its own, flushed to the disk and renamed; old ones are renamed away
before they are deleted. So a folder with a checkpoint's name was once complete, and damage since then is
found by its checksums. What can be derived (learning rate, order of samples, random states, which checkpoint is the best) is
not stored.

When a checkpoint is due and how long it is kept is decided in `saver`. The caller holds the lock of the run folder.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from minimind_data.errors import UserError
from minimind_data.files import (
    DamagedFileError,
    fsync_folder,
    is_disk_full,
    is_out_of_files,
    partial_name,
    read_checked,
    remove_partials,
    sha256_of,
    write_checked,
)
from minimind_data.json_fields import (
    BESIDE,
    Count,
    Digest,
    FieldError,
    FileName,
    Key,
    Rule,
    read_fields,
    shown,
)
from minimind_train.model.precision import LossScale
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
_BYTES_PER_WEIGHT = 4  # float32
_CHECKSUM = "sha256"

_POSITION_KEY = "cursor"

_NAME = re.compile(r"step-(\d{9,})")


class DamagedCheckpointError(UserError):
    """A file of a checkpoint is damaged or missing."""


class GoneCheckpointError(UserError):
    """A checkpoint was deleted while it was read, by a run that is still training and has newer ones."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            "deleted while it was read, by a run that is still training",
            where=folder,
            remedy="try again, or give the run a larger `keep`",
            option="keep",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """The contents of a checkpoint besides its tensors."""

    step: Count
    """Completed optimizer steps."""
    position: Annotated[Count, Key(_POSITION_KEY)]
    """Samples consumed by these steps: the position of the next sample. In state.json it is called `cursor`."""
    config: dict[str, Any]
    """The run's options, resolved."""
    dataset: str
    """Fingerprint of the dataset."""
    metrics_lines: Count
    """The number of lines in metrics.jsonl; it does not follow from the step, as `log_every` may have changed."""
    loss_scale: Annotated[dict[str, Any], Rule("the state of a loss scale", LossScale.is_state)] | None = None
    """In fp16 the state of its `LossScale`."""
    skipped_steps: Count = 0
    """Steps so far whose loss or gradient was not finite, and which therefore changed no weight."""
    val_loss: float | None = None
    """The validation loss after this step, where it was measured."""
    val_on: str | None = None
    """What it was measured on; losses on something else cannot be compared with it."""


@dataclass(frozen=True, kw_only=True)
class _FileEntry:
    """What state.json says of another file of the checkpoint."""

    bytes: Count
    sha256: Digest


@dataclass(frozen=True, kw_only=True)
class _StateFile:
    """The contents of state.json."""

    state: Annotated[CheckpointState, BESIDE]
    files: dict[FileName, _FileEntry]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk whose checksums have just been verified."""

    folder: Path
    state: CheckpointState
    files: tuple[str, ...]
    """Its files of tensors, as state.json lists them; what else lies in the folder is not looked at."""

    def refuse_larger_model(self, num_weights: int) -> None:
        """Refuse to build a model of more weights than the files can hold: what the options say may be made up.

        Args:
            num_weights: that are trained, at least.

        Raises:
            GoneCheckpointError: it has been deleted since it was verified.
            UserError: the files are smaller.
        """
        try:
            num_bytes = sum((self.folder / name).stat().st_size for name in _parts_of(MODEL_NAME, self.files))
        except FileNotFoundError:
            raise GoneCheckpointError(self.folder) from None
        if _BYTES_PER_WEIGHT * num_weights > num_bytes:
            raise UserError(
                f"the checkpoint is of another model: its weights have {num_bytes:,} bytes, and a model of these "
                f"options has {num_weights:,} weights of {_BYTES_PER_WEIGHT} bytes",
                where=self.folder,
                remedy="give the model the options of its run, or start a new one in another `run`",
                option="run",
            )

    def restore(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Load the weights into a model, and the state into an optimizer if one is given, bit for bit.

        Raises:
            DamagedCheckpointError: a file holds no tensors, although its checksum fits.
            GoneCheckpointError: it has been deleted since it was verified.
            UserError: the model is not the one that was saved.
        """
        try:
            weights = StoredTensors(self.folder / name for name in _parts_of(MODEL_NAME, self.files))
            put_weights(self.folder, model, weights)
            if optimizer is not None:
                stored = StoredTensors(self.folder / name for name in _parts_of(OPTIMIZER_NAME, self.files))
                put_optimizer_state(optimizer, model, stored)
        except (OSError, SafetensorError) as error:
            if not self.folder.exists():
                raise GoneCheckpointError(self.folder) from None
            if isinstance(error, OSError):
                raise
            raise DamagedCheckpointError(f"checkpoint {self.folder} is damaged ({error})") from None


def _parts_of(name: str, files: Iterable[str]) -> list[str]:
    """Return the files among these that are `name`, or the parts of it that ranks wrote, in order."""
    stem, _, suffix = name.rpartition(".")
    part = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?\.{re.escape(suffix)}")
    return sorted(file for file in files if part.fullmatch(file))


def folder_of(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return run / CHECKPOINTS_NAME / f"step-{step:09d}"


def steps_of(run: Path) -> list[int]:
    """Return the steps of the checkpoints in a run folder, whole or damaged ones, oldest first."""
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
    between_files: Callable[[], object] = lambda: None,
    world: World = ALONE,
) -> Path:
    """Write a checkpoint; where several ranks write it together, each writes its own part.

    Args:
        run: the run folder.
        state: the contents besides the tensors.
        tensors: the result of `tensors_of`, or a copy of it.
        between_files: called between two files; an exception from it ends the save and leaves no files behind.
        world: the ranks that write it together; all of them call this.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: one of the ranks could not write its part; earlier checkpoints are unchanged.
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
        own_files: dict[str, Any] | UserError
        try:
            with _user_error_on_failed_write(final):
                own_files = _write(partial, tensors, between_files)
        except UserError as error:
            own_files = error
        files: dict[str, Any] = {}
        for files_or_error in world.all_gather(own_files):
            if isinstance(files_or_error, UserError):
                raise files_or_error
            files |= files_or_error
        if world.is_main:
            with world.relaying_errors(), _user_error_on_failed_write(final):
                _write_state(partial, state, files)
                if final.exists():  # damaged, or the run would have resumed from it
                    delete(final)
                partial.rename(final)
                fsync_folder(final.parent)
                fsync_folder(run)
        return world.broadcast(final if world.is_main else None)


@contextlib.contextmanager
def _user_error_on_failed_write(final: Path) -> Iterator[None]:
    """Turn the errors of a failed write into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(_sentence(final, error)) from error


def best_of(
    run: Path, *, last_step: int | None = None, measured_on: str | None = None
) -> CheckpointState | None:
    """Return the state of the checkpoint with the lowest validation loss, the first of several equal ones; None where there is none.

    Args:
        run: the run folder.
        last_step: later checkpoints are ignored.
        measured_on: only losses measured on this are compared; by default that of the newest measured checkpoint.
    """
    measured: list[tuple[float, CheckpointState]] = []
    for step in steps_of(run):
        if last_step is not None and step > last_step:
            break
        with contextlib.suppress(UserError, OSError):  # damaged or gone, so it cannot be used
            state, _ = _state_in(folder_of(run, step))
            if state.val_loss is not None:
                measured.append((state.val_loss, state))
    if not measured:
        return None
    reference = measured_on or measured[-1][1].val_on
    comparable = [(loss, state) for loss, state in measured if state.val_on == reference]
    return min(comparable, key=lambda pair: pair[0])[1] if comparable else None


def remove_leftovers(run: Path) -> None:
    """Delete what a killed process left half-written or half-deleted."""
    remove_partials(run / CHECKPOINTS_NAME)


def load(run: Path, step: int) -> Checkpoint:
    """Verify the checkpoint of a step and return it.

    Raises:
        UserError: there is none, it is damaged, or it was deleted meanwhile.
    """
    steps = steps_of(run)
    if step not in steps:
        steps_there = ", ".join(map(str, steps)) or "none"
        raise UserError(f"no checkpoint of step {step}", where=run, remedy=f"there are: {steps_there}")
    return _verified(run, step)


def load_best(run: Path) -> Checkpoint:
    """Verify the checkpoint with the lowest validation loss and return it.

    Raises:
        UserError: no checkpoint has a validation loss, or this one is damaged, or it was deleted meanwhile.
    """
    best = best_of(run)
    if best is None:
        raise UserError(
            "no checkpoint has a validation loss",
            where=run,
            remedy="one has where `val_every` and `save_every` fall on the same step, and with `save_best` "
            "the best one always does",
            option="checkpoint",
        )
    return _verified(run, best.step)


def load_latest(run: Path, on_damaged: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None where there are none.

    Args:
        run: the run folder.
        on_damaged: takes a sentence on each damaged checkpoint that is skipped.

    Raises:
        GoneCheckpointError: one was deleted while it was read; there are newer ones.
        UserError: there are checkpoints, and all are damaged.
    """
    steps = steps_of(run)
    for step in reversed(steps):
        try:
            return _verified(run, step)
        except DamagedCheckpointError as error:
            on_damaged(f"{error}; trying the one before it")
    if steps:
        raise UserError(
            "every checkpoint is damaged",
            where=run / CHECKPOINTS_NAME,
            remedy=f"bring one back from a backup, or delete the folder {CHECKPOINTS_NAME} and resume, which "
            "starts the run again from its first step",
        )
    return None


def _verified(run: Path, step: int) -> Checkpoint:
    folder = folder_of(run, step)
    try:
        state, files = _state_in(folder, with_files=True)
        return Checkpoint(folder=folder, state=state, files=files)
    except DamagedCheckpointError:
        if folder.exists():
            raise
        raise GoneCheckpointError(folder) from None


def _write(folder: Path, tensors: Tensors, between_files: Callable[[], object]) -> dict[str, Any]:
    """Write the files of this rank, and return the size and the checksum of each."""
    files = {}
    for name, by_name in tensors.items():
        path = folder / name
        save_file(by_name, path)
        between_files()
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        between_files()
    return files


def _write_state(folder: Path, state: CheckpointState, files: dict[str, Any]) -> None:
    # In the order of the fields, each under its name on disk.
    content = {_POSITION_KEY if name == "position" else name: value for name, value in asdict(state).items()}
    content = {"format_version": FORMAT_VERSION, **content, "files": files}
    write_checked(folder / STATE_NAME, content, key=_CHECKSUM)
    for name in files:  # safetensors lets nobody else read its files; they get the rights of a usual one
        shutil.copymode(folder / STATE_NAME, folder / name)


def _state_in(folder: Path, *, with_files: bool = False) -> tuple[CheckpointState, tuple[str, ...]]:
    """Read state.json and verify its checksum, and if asked for those of the other files; return their names too."""
    try:
        content = read_checked(folder / STATE_NAME, key=_CHECKSUM)
        version = content.get("format_version")
        if version is not None and version != FORMAT_VERSION:
            raise UserError(
                f"checkpoint {folder} is of format {shown(version)}; this program reads format {FORMAT_VERSION}"
            )
        file = read_fields(_StateFile, content, ignore_unknown=True)
        problem = None
        if folder_of(folder.parents[1], file.state.step) != folder:
            problem = f"{STATE_NAME} is of step {file.state.step}"
        elif with_files:
            problem = _problem(folder, file.files)
        if problem is None:
            return file.state, tuple(file.files)
    except PermissionError:
        raise  # it is not damaged, and must not be deleted
    except OSError as error:
        if is_out_of_files(error):
            raise  # nor is it then
        problem = f"{Path(error.filename or folder).name}: {error.strerror}"
    except DamagedFileError as error:
        problem = f"{STATE_NAME}: {error.problem}"
    except FieldError as error:
        problem = f"{STATE_NAME}: {error}"
    raise DamagedCheckpointError(f"checkpoint {folder} is damaged ({problem})")


def _problem(folder: Path, files: dict[str, _FileEntry]) -> str | None:
    """Return a clause on the first file that is damaged, or None."""
    for name in (MODEL_NAME, OPTIMIZER_NAME):
        if not _parts_of(name, files):
            return f"{STATE_NAME} lists no {name}"
    for name, entry in files.items():
        num_bytes = (folder / name).stat().st_size
        if num_bytes != entry.bytes:
            return f"{name} has {num_bytes} bytes instead of {entry.bytes}"
        if sha256_of(folder / name) != entry.sha256:
            return f"{name} does not fit its checksum"
    return None


def delete(folder: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that one that is half deleted never looks whole."""
    renamed = partial_name(folder.with_name(f"{folder.name}.deleted"))
    folder.rename(renamed)
    shutil.rmtree(renamed)


def _sentence(folder: Path, error: Exception) -> str:
    # safetensors passes a system's error on only as a text.
    full = (isinstance(error, OSError) and is_disk_full(error)) or "os error 28" in str(error)
    remedy = "make room on the disk" if full else "mend that"
    why = getattr(error, "strerror", None) or str(error)
    return f"{folder}: the checkpoint could not be written ({why}); {remedy} and go on with `resume`; earlier checkpoints are intact"

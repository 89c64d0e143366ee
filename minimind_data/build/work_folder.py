"""The folder `.mm-build`, in which an unfinished build keeps what it needs to go on after a kill.

It is in the folder of the dataset from the beginning of a build to its end:

    lock                 is held by the run that works there; slices also hold a lock of their own, and one while they write the plan
    plan.json            the recipe, the inputs, and the names of the shards
    NAME.result.json     the result of a split whose shard is complete
    NAME.hashes          the hashes of the texts of a split, with `dedup`
    previous/            the manifest of the finished dataset, while shards that it names are being replaced

`pipeline` decides when all this is written and read; here is in which files and in which form.
"""

import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from minimind_data.build.bad_records import SET_ASIDE_SUFFIX
from minimind_data.build.plan import TokenizeOptions, slice_of
from minimind_data.build.recipe import Recipe, options_of
from minimind_data.build.split import (
    HASHES_SUFFIX,
    SplitResult,
    SplitTask,
    hashes_path,
)
from minimind_data.dataset.format import (
    MANIFEST_NAME,
    SET_ASIDE_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    VALIDATION_NAME,
    Kind,
)
from minimind_data.errors import UserError
from minimind_data.files import (
    DamagedFileError,
    FolderLock,
    fsync_folder,
    is_disk_full,
    is_locked,
    read_checked,
    remove_partials,
    write_checked,
)
from minimind_data.inputs.discovery import source_of
from minimind_data.inputs.forms import FORMS
from minimind_data.inputs.sources import STDIN, Source, spool
from minimind_data.json_fields import BESIDE, FieldError, FileName, Rule, read_fields, shown
from minimind_data.reporting import Progress, say_nothing

_T = TypeVar("_T")

WORK_FOLDER_NAME = ".mm-build"
STDIN_NAME = "stdin"
PLAN_NAME = "plan.json"
_LOCK_NAME = "lock"
_CHECKSUM = "checksum"
_PREVIOUS_NAME = "previous"
_RESULT_SUFFIX = ".result.json"
_MASK_SUFFIX = ".mask"
_SHARD_SUFFIXES = (".bin", _MASK_SUFFIX, ".idx")


def shard_suffixes(kind: Kind) -> tuple[str, ...]:
    """Return the suffixes of the files of a shard in datasets of this kind."""
    return tuple(suffix for suffix in _SHARD_SUFFIXES if suffix != _MASK_SUFFIX or kind != "pretrain")


class CannotWriteError(UserError):
    """The folder of the dataset cannot be written to."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan.json` says: what the build makes, and from what."""

    recipe: Annotated[Recipe, BESIDE]
    inputs: Annotated[tuple[Source, ...], Rule("at least one input", bool)]
    """With absolute paths, so that `mm-data commit` finds them from any working directory."""
    shards: tuple[FileName, ...]
    """Names, in alphabetical order, of all shards that this build or one before it may have made."""

    @property
    def has_validation(self) -> bool:
        """Whether shards may also be in the folder of the validation part."""
        return bool(self.recipe.options.get("val_fraction"))

    def to_json(self) -> dict[str, Any]:
        """Return the object in `plan.json`, in which the items of the recipe stand beside the others."""
        inputs = [asdict(source) for source in self.inputs]
        return {**self.recipe.to_json(), "inputs": inputs, "shards": list(self.shards)}


class WorkFolder:
    """The files of an unfinished build.

    Args:
        out: the folder of the dataset.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / WORK_FOLDER_NAME
        self.val = out / VALIDATION_NAME
        self.previous = self.path / _PREVIOUS_NAME
        """Where the manifest of a finished dataset is while its shards are being replaced."""
        self._own_lock: Path | None = None
        """Of the slice that this process makes."""

    @contextlib.contextmanager
    def locked(self, part: tuple[int, int] | None = None) -> Iterator[None]:
        """Make the folders and hold the lock; at the end, remove a folder that is empty.

        Args:
            part: a slice, for which only runs of the same slice and of the whole build are kept out; else all others are.

        Raises:
            CannotWriteError: the folders cannot be made.
            UserError: another run holds the lock.
        """
        busy = f"{self.out}: another run is writing there; wait for it or take another `out`"
        locks = [FolderLock(self.path / _LOCK_NAME, busy, shared=part is not None)]
        if part is not None:
            self._own_lock = self.path / f"{_LOCK_NAME}-{part[0]}-of-{part[1]}"
            locks.append(FolderLock(self._own_lock, busy))
        with contextlib.ExitStack() as stack:
            stack.callback(self._remove_if_empty)
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                for lock in locks:
                    stack.enter_context(lock)
            except OSError as error:
                if is_disk_full(error):
                    raise
                raise CannotWriteError(
                    f"cannot be written ({error.strerror})",
                    where=self.out,
                    remedy="take another folder with `out`",
                    option="out",
                ) from None
            yield

    def _remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):  # not empty, or another run has just started there
            self.path.rmdir()

    def remove_partials(self, tasks: Sequence[SplitTask], part: tuple[int, int] | None) -> None:
        """Remove the temporary files that killed processes left; those of this slice alone, where other slices may be at work."""
        tasks = slice_of(list(tasks), part)
        shard_files = {f"{task.name}{suffix}" for task in tasks for suffix in _SHARD_SUFFIXES}
        if part is not None:
            suffixes = (_RESULT_SUFFIX, SET_ASIDE_SUFFIX)
            remove_partials(self.path, {f"{task.name}{suffix}" for task in tasks for suffix in suffixes})
            for folder in (self.out, self.val):
                remove_partials(folder, shard_files)
            return
        remove_partials(self.path)
        for folder in (self.out, self.val):
            remove_partials(
                folder, shard_files | {TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, SET_ASIDE_NAME, MANIFEST_NAME}
            )

    def begin(self, recipe: Recipe, inputs: Sequence[Source], names: set[str], finished: set[str]) -> None:
        """Write the plan, or go on with the one that is there.

        Args:
            recipe: of the build.
            inputs: of the dataset.
            names: of the shards that this build makes.
            finished: names of the shards that the finished dataset has, if there is one.
        """
        names = names | finished
        plan_there = self.plan()
        if plan_there is not None:
            if plan_there.recipe != recipe and not self.is_begun():  # nothing that it has made is kept
                _remove_shards(self, plan_there, keep=finished, keep_val=finished)
            else:
                names = names.union(plan_there.shards)
        plan = Plan(
            recipe=recipe,
            inputs=tuple(source.absolute() for source in inputs),
            shards=tuple(sorted(names)),
        )
        if plan != plan_there:
            write_checked(self.path / PLAN_NAME, plan.to_json(), key=_CHECKSUM)

    def plan(self) -> Plan | None:
        """Return the plan, or None where there is none.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / PLAN_NAME
        try:
            plan = _read(Plan, path, self._plan_remedy)
        except (FileNotFoundError, NotADirectoryError):
            return None
        for source in plan.inputs:
            if source.form not in FORMS:
                why = f"the form of an input is {shown(source.form)}, where {' or '.join(FORMS)} is wanted"
                raise DamagedFileError.of(path, why, self._plan_remedy)
        return plan

    def planning(self) -> FolderLock:
        """Return a lock that slices hold, one after the other, while they look at the plan and write it."""
        return FolderLock(self.path / f"{_LOCK_NAME}-plan", "another slice writes the plan", wait=say_nothing)

    def is_begun(self) -> bool:
        """Tell whether any split is made by the recipe of the plan, or another slice is at work on some; else the plan binds nobody."""
        slices = self.path.glob(f"{_LOCK_NAME}-*-of-*")
        return self.has_results() or any(is_locked(path) for path in slices if path != self._own_lock)

    def has_results(self) -> bool:
        """Tell whether any split is made."""
        return any(self.path.glob(f"*{_RESULT_SUFFIX}"))

    def options_of(self, plan: Plan) -> TokenizeOptions:
        """Return the options that a plan was made by, as far as they shape the dataset.

        Raises:
            UserError: the file of the plan holds other values than options have.
        """
        return options_of(plan.recipe, self.out, self.path / PLAN_NAME, self._plan_remedy)

    @property
    def _plan_remedy(self) -> str:
        return f"delete {self.path} and run the command that started this build again, which makes all splits anew"

    def write_result(self, result: SplitResult) -> None:
        """Write the result of a split, after its shard is committed."""
        write_checked(self.path / f"{result.name}{_RESULT_SUFFIX}", result.to_json(), key=_CHECKSUM)

    def read_result(self, name: str) -> SplitResult | None:
        """Return the result of the split with this name, or None where there is none.

        Raises:
            UserError: the file is damaged.
        """
        remedy = "delete it and run the command that made this split again, which makes it anew"
        path = self.path / f"{name}{_RESULT_SUFFIX}"
        try:
            result = _read(SplitResult, path, remedy)
        except FileNotFoundError:
            return None
        if result.name != name:
            raise DamagedFileError.of(path, f"it is of shard {result.name!r}", remedy)
        return result

    def read_hashes(self, tasks: Sequence[SplitTask]) -> list[bytes]:
        """Return the hashes of the texts of each split."""
        return [hashes_path(self.path, task.name).read_bytes() for task in tasks]

    def retire(self) -> None:
        """Take away the manifest of the finished dataset, before anything that it names is changed; the plan is written by then."""
        if not (self.out / MANIFEST_NAME).exists():
            return
        (self.previous / VALIDATION_NAME).mkdir(parents=True, exist_ok=True)
        paths = [self.out / MANIFEST_NAME, self.out / SET_ASIDE_NAME]
        if (plan := self.plan()) is not None and plan.has_validation:
            paths.insert(1, self.val / MANIFEST_NAME)
        for path in paths:
            if path.exists():
                path.replace(self.previous / path.relative_to(self.out))
        for folder in (self.previous, self.out):
            fsync_folder(folder)

    def remove_stale_shards(self, keep: set[str], keep_val: set[str]) -> None:
        """Remove the shards that the plan names and the new dataset does not have.

        Args:
            keep: names of the shards of the dataset.
            keep_val: names of the shards of its validation part.
        """
        if (plan := self.plan()) is not None:
            _remove_shards(self, plan, keep=keep, keep_val=keep_val)

    def clean(self) -> None:
        """Remove everything but the lock, which goes when it is released."""
        for pattern in (
            f"*{_RESULT_SUFFIX}",
            f"*{SET_ASIDE_SUFFIX}",
            f"*{HASHES_SUFFIX}",
            STDIN_NAME,
            TOKENIZER_NAME,
            TOKENIZER_CONFIG_NAME,
        ):
            for path in self.path.glob(pattern):
                path.unlink()
        if self.previous.is_dir():
            shutil.rmtree(self.previous)
        (self.path / PLAN_NAME).unlink(missing_ok=True)  # last, since it says which shards may be stale
        for path in self.path.glob(f"{_LOCK_NAME}-*"):
            path.unlink()


def _remove_shards(work: WorkFolder, plan: Plan, *, keep: set[str], keep_val: set[str]) -> None:
    """Remove the shards that a plan names, in the validation part only where its build makes one."""
    folders = [(work.out, keep), (work.val, keep_val)]
    for folder, names_to_keep in folders if plan.has_validation else folders[:1]:
        for name in set(plan.shards) - names_to_keep:
            for suffix in shard_suffixes(plan.recipe.kind):
                (folder / f"{name}{suffix}").unlink(missing_ok=True)


def _read(cls: type[_T], path: Path, remedy: str) -> _T:
    """Read what `write_checked` wrote, every field held against its annotation."""
    content = read_checked(path, key=_CHECKSUM, remedy=remedy)
    try:
        return read_fields(cls, content)
    except FieldError as error:
        raise DamagedFileError.of(path, str(error), remedy) from None


def spool_stdin(work: WorkFolder, options: TokenizeOptions, progress: Progress) -> Source:
    """Copy standard input into the work folder, and return the copy as a source.

    Raises:
        UserError: standard input is closed or a terminal, or the build is one of slices.
    """
    remedy = "pipe text into this command, or name a file"
    if sys.stdin is None or sys.stdin.closed:  # as after <&- in a shell
        raise UserError("standard input is closed", where=STDIN, remedy=remedy)
    if sys.stdin.isatty():
        raise UserError("standard input is a terminal", where=STDIN, remedy=remedy)
    if options.task is not None:
        raise UserError(
            "standard input cannot be cut into slices for several runs",
            where=STDIN,
            remedy="save it to a file first",
        )
    path = work.path / STDIN_NAME
    try:
        with progress("reading standard input", 0) as report:
            spool(sys.stdin.buffer, path, report)
        return source_of(str(path), options.format, name=STDIN)
    except BaseException:
        path.unlink(missing_ok=True)
        raise

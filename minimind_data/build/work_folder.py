"""The folder `.mm-build` of a dataset that is being made: its lock, its plan, and what the finished splits gave.

It stands inside the dataset's folder from a build's first moment to its last, and is what a build goes on from after a kill:
`plan.json` says how it was begun, `NAME.result.json` stands for every split whose shard is whole, and `previous/` holds the
manifest of a finished dataset whose shards are being replaced. `pipeline.py` says when what is read and written; here is where and
in which form.
"""

import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from minimind_data.build.plan import TokenizeOptions, slice_of
from minimind_data.build.recipe import Recipe
from minimind_data.build.split import (
    HASHES_SUFFIX,
    SET_ASIDE_SUFFIX,
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
)
from minimind_data.errors import UserError
from minimind_data.files import (
    DamagedFileError,
    FolderLock,
    fsync_folder,
    is_disk_full,
    read_checked,
    remove_partials,
    write_checked,
)
from minimind_data.inputs.discovery import source_of
from minimind_data.inputs.sources import STDIN, Source, spool
from minimind_data.json_fields import BESIDE, FieldError, FileName, read_fields
from minimind_data.reporting import Progress

_T = TypeVar("_T")

WORK_FOLDER_NAME = ".mm-build"
STDIN_NAME = "stdin"
PLAN_NAME = "plan.json"
_LOCK_NAME = "lock"
_CHECKSUM = "checksum"
_PREVIOUS_NAME = "previous"
_RESULT_SUFFIX = ".result.json"
_SHARD_SUFFIXES = (".bin", ".mask", ".idx")


class CannotWriteError(UserError):
    """The folder of the dataset, or its disk, takes no files from us."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan.json` says: what the build makes, and of what."""

    recipe: Annotated[Recipe, BESIDE]
    inputs: tuple[Source, ...]
    """Where the inputs lie, so that `mm-data commit` finds them from any working directory."""
    shards: tuple[FileName, ...]
    """Names of the shards that this build, or a dataset before it, may have made, in alphabetical order."""

    def to_json(self) -> dict[str, Any]:
        """Return the object that stands in `plan.json`: what the recipe says stands beside the rest."""
        inputs = [asdict(source) for source in self.inputs]
        return {**self.recipe.to_json(), "inputs": inputs, "shards": list(self.shards)}


class WorkFolder:
    """What an unfinished build has on disk.

    Args:
        out: the folder of the dataset.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / WORK_FOLDER_NAME
        self.val = out / VALIDATION_NAME
        self.previous = self.path / _PREVIOUS_NAME
        """Holds the manifest of a finished dataset whose shards are being replaced."""

    @contextlib.contextmanager
    def locked(self, part: tuple[int, int] | None = None) -> Iterator[None]:
        """Make the folders and hold the lock; leave no empty folder behind.

        Args:
            part: a slice, which keeps others only from the same slice and from the whole.

        Raises:
            CannotWriteError: they cannot be made.
            UserError: another run holds the lock.
        """
        busy = f"{self.out}: another run is writing there; wait for it or take another `out`"
        locks = [FolderLock(self.path / _LOCK_NAME, busy, shared=part is not None)]
        if part is not None:
            locks.append(FolderLock(self.path / f"{_LOCK_NAME}-{part[0]}-of-{part[1]}", busy))
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
        with contextlib.suppress(OSError):  # not empty, or another run has just begun there
            self.path.rmdir()

    def remove_partials(self, tasks: Sequence[SplitTask], part: tuple[int, int] | None) -> None:
        """Remove what killed processes left half-written; beside other slices, of this slice's splits alone."""
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

    def begin(self, recipe: Recipe, inputs: Sequence[Source], names: set[str]) -> None:
        """Write down what is to be made, or go on with what was begun.

        Args:
            recipe: of the build.
            inputs: of the dataset.
            names: of the shards that this build or a dataset before it may have made.

        Raises:
            UserError: it was begun by another recipe, and some of it is done.
        """
        begun = self.plan()
        if begun is not None:
            # Where nothing is done yet, there is nothing that another recipe could spoil.
            has_results = any(self.path.glob(f"*{_RESULT_SUFFIX}"))
            if has_results and (different := begun.recipe.differences(recipe)):
                raise UserError(
                    f"holds an unfinished build made otherwise: {'; '.join(different)}",
                    where=self.out,
                    remedy=f"finish it as it was begun, take another `out`, or delete {self.path}",
                    option="out",
                )
            names = names.union(begun.shards)
        plan = Plan(
            recipe=recipe,
            inputs=tuple(source.absolute() for source in inputs),
            shards=tuple(sorted(names)),
        )
        if plan != begun:
            write_checked(self.path / PLAN_NAME, plan.to_json(), key=_CHECKSUM)

    def plan(self) -> Plan | None:
        """Return what was begun, or None.

        Raises:
            UserError: the file is damaged.
        """
        remedy = (
            f"delete {self.path} and run the command that began this build again, which makes all splits anew"
        )
        try:
            return _read(Plan, self.path / PLAN_NAME, remedy)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write_result(self, result: SplitResult) -> None:
        """Put down that a split is made."""
        write_checked(self.path / f"{result.name}{_RESULT_SUFFIX}", result.to_json(), key=_CHECKSUM)

    def read_result(self, name: str) -> SplitResult | None:
        """Return what the split of this shard gave, or None where it is not made.

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
        """Take the manifest of a finished dataset away before anything that it speaks of changes."""
        if not (self.out / MANIFEST_NAME).exists():
            return
        (self.previous / VALIDATION_NAME).mkdir(parents=True, exist_ok=True)
        for path in (self.out / MANIFEST_NAME, self.val / MANIFEST_NAME, self.out / SET_ASIDE_NAME):
            if path.exists():
                path.replace(self.previous / path.relative_to(self.out))
        for folder in (self.previous, self.out):
            fsync_folder(folder)

    def remove_stale_shards(self, keep: set[str], keep_val: set[str]) -> None:
        """Remove shards that this build, or one that it goes on with, made or might have made of what is gone."""
        plan = self.plan()
        names = set() if plan is None else set(plan.shards)
        for folder, kept in ((self.out, keep), (self.val, keep_val)):
            for name in names - kept:
                for suffix in _SHARD_SUFFIXES:
                    (folder / f"{name}{suffix}").unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove what only an unfinished build needs; the locks go last, when they are released."""
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
        (self.path / PLAN_NAME).unlink(missing_ok=True)  # last: it says which shards may be stale
        for path in self.path.glob(f"{_LOCK_NAME}-*"):
            path.unlink()


def _read(cls: type[_T], path: Path, remedy: str) -> _T:
    """Read what `write_checked` wrote, every field held against its annotation."""
    content = read_checked(path, key=_CHECKSUM, remedy=remedy)
    try:
        return read_fields(cls, content)
    except FieldError as error:
        raise DamagedFileError.of(path, str(error), remedy) from None


def spooled(work: WorkFolder, options: TokenizeOptions, progress: Progress) -> Source:
    """Copy standard input to the disk, beside the shards that it will become.

    Raises:
        UserError: there is nothing to be read there.
    """
    if sys.stdin is None or sys.stdin.closed:  # so it is where a shell closed it with <&-
        raise UserError("-: standard input is closed; pipe text into this command, or name a file")
    if sys.stdin.isatty():
        raise UserError("-: standard input is a terminal; pipe text into this command, or name a file")
    if options.task is not None:
        raise UserError(
            "-: standard input cannot be cut into slices for several runs; save it to a file first"
        )
    path = work.path / STDIN_NAME
    try:
        with progress("reading standard input", 0) as report:
            spool(sys.stdin.buffer, path, report)
        return source_of(str(path), options.format, name=STDIN)
    except BaseException:
        path.unlink(missing_ok=True)
        raise

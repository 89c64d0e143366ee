"""The folder `.mm-build` of a dataset that is being made: its lock, its plan, and what the finished splits gave.

It stands inside the dataset's folder from a build's first moment to its last, and is what a build goes on from after a kill:
`plan.json` says how it was begun, and `NAME.result.json` stands for every split whose shard is whole. `build.py` says when
what is read and written; here is where and in which form.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from minimind_data.errors import UserError
from minimind_data.files import FolderLock, is_disk_full, remove_partials, write_atomic
from minimind_data.format import MANIFEST_NAME, SET_ASIDE_NAME, TOKENIZER_NAME
from minimind_data.options import differences
from minimind_data.plan import flat_settings
from minimind_data.split import SET_ASIDE_SUFFIX, SplitResult, SplitTask, set_aside_path
from minimind_data.writer import WrittenShard

WORK_FOLDER_NAME = ".mm-build"
_PLAN_NAME = "plan.json"
_LOCK_NAME = "lock"
_RESULT_SUFFIX = ".result.json"
_SHARD_SUFFIXES = (".bin", ".idx")


class CannotWriteError(UserError):
    """The folder of the dataset, or its disk, takes no files from us."""


class WorkFolder:
    """What an unfinished build has on disk.

    Args:
        out: the folder of the dataset.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / WORK_FOLDER_NAME

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folders and hold the lock; leave no empty folder behind.

        Raises:
            CannotWriteError: they cannot be made.
            UserError: another run holds the lock.
        """
        lock = FolderLock(
            self.path / _LOCK_NAME,
            f"{self.out}: another run is writing there; wait for it or take another --out",
        )
        try:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                lock.__enter__()
            except OSError as error:
                if is_disk_full(error):
                    raise
                raise CannotWriteError(
                    f"{self.out}: cannot be written ({error.strerror}); take another folder with --out"
                ) from None
            try:
                yield
            finally:
                lock.__exit__(None, None, None)
        finally:
            with contextlib.suppress(OSError):  # not empty, or another run has just begun there
                self.path.rmdir()

    def remove_partials(self, tasks: Sequence[SplitTask]) -> None:
        """Remove what killed processes left half-written."""
        remove_partials(self.path)
        shard_files = {f"{task.name}{suffix}" for task in tasks for suffix in _SHARD_SUFFIXES}
        remove_partials(self.out, shard_files | {TOKENIZER_NAME, SET_ASIDE_NAME, MANIFEST_NAME})

    def begin(self, settings: dict[str, Any], inputs: Sequence[Path], tasks: Sequence[SplitTask]) -> None:
        """Write down what is to be made, or go on with what was begun.

        Raises:
            UserError: it was begun with other settings or inputs, and some of it is done.
        """
        path = self.path / _PLAN_NAME
        plan = {
            **settings,
            "inputs": [source.name for source in inputs],
            "shards": [task.name for task in tasks],
        }
        if path.exists():
            begun = json.loads(path.read_bytes())
            there, here = (
                flat_settings(one["kind"], one["tokenizer"], one["options"]) | {"inputs": one["inputs"]}
                for one in (begun, plan)
            )
            # Where nothing is done yet, there is nothing that other settings could spoil.
            is_begun = any(self.path.glob(f"*{_RESULT_SUFFIX}"))
            if is_begun and (found := differences(there, here, here)):
                raise UserError(
                    f"{self.out}: holds an unfinished build made otherwise: {'; '.join(found)}; finish it as it was begun, "
                    f"take another --out, or delete {self.path}"
                )
            plan["shards"] = sorted({*plan["shards"], *begun["shards"]})
        write_atomic(path, json.dumps(plan, indent=1))

    def write_result(self, result: SplitResult) -> None:
        """Put down that a split is made."""
        write_atomic(self.path / f"{result.name}{_RESULT_SUFFIX}", json.dumps(asdict(result)))

    def read_result(self, name: str) -> SplitResult | None:
        """Return what the split of this shard gave, or None where it is not made."""
        try:
            told = json.loads((self.path / f"{name}{_RESULT_SUFFIX}").read_bytes())
        except FileNotFoundError:
            return None
        return SplitResult(**{**told, "shard": told["shard"] and WrittenShard(**told["shard"])})

    def set_aside(self, inputs: Sequence[Path], results: Sequence[SplitResult]) -> bytes:
        """Return the bad records of all splits as JSON lines, their numbers counted from the first line of the file."""
        lines: list[bytes] = []
        line_offset = 0
        for before, result in zip([None, *results], results, strict=False):
            line_offset = line_offset + before.lines if before and before.input == result.input else 0
            if result.set_aside:
                for line in set_aside_path(self.path, result.name).read_bytes().splitlines():
                    record = orjson.loads(line)
                    record["line"] += line_offset
                    told = {"path": str(inputs[result.input]), **record}
                    lines.append(orjson.dumps(told, option=orjson.OPT_APPEND_NEWLINE))
        return b"".join(lines)

    def remove_stale_shards(self, keep: set[str]) -> None:
        """Remove shards that this build, or one that it goes on with, made or might have made of lines that are gone."""
        planned = json.loads((self.path / _PLAN_NAME).read_bytes())["shards"]
        for name in set(planned) - keep:
            for suffix in _SHARD_SUFFIXES:
                (self.out / f"{name}{suffix}").unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove what only an unfinished build needs; the lock goes last, when it is released."""
        for pattern in (_PLAN_NAME, f"*{_RESULT_SUFFIX}", f"*{SET_ASIDE_SUFFIX}"):
            for path in self.path.glob(pattern):
                path.unlink()

"""metrics.jsonl: one line of JSON for every logged step, each step once, also in runs that were killed and resumed.

A line reaches the kernel before the next step begins, so a kill costs at most the line that is being written. A resumed run
goes back to its checkpoint, and so does the file: lines of later steps are removed before the first new one is written.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from minimind_data.errors import UserError
from minimind_data.files import parse_json, write_atomic
from minimind_data.json_fields import MAX_COUNT

FILE_NAME = "metrics.jsonl"


class Records(Protocol):
    """Anything that takes lines of metrics."""

    def write(self, record: dict[str, Any]) -> None:
        """Take one line."""


class MetricsLog:
    """Appends to a `metrics.jsonl`; a context manager.

    Args:
        path: the file; it is created if missing.
        last_step: lines of later steps, and lines that are no metrics, are removed first. 0 removes all.

    Attributes:
        num_lines: how many lines the file has.
        former_last_step: the step of its last line before any was removed; 0 where there was none.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        self._path = path
        self.num_lines, self.former_last_step = _cut_back(path, last_step)
        # Unbuffered: each line is one system call, after which it survives the end of the process.
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; the `step` of `record` is greater than those before it, and all its numbers are finite."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._named_errors():
            written = self._file.write(line)
        if written != len(line):
            raise UserError("the disk is full", where=self._path, remedy="make room and go on with `resume`")
        self.num_lines += 1

    def sync(self) -> None:
        """Flush the lines to the disk, so that a checkpoint is never ahead of its metrics."""
        with self._named_errors():
            os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                error.strerror or str(error), where=self._path, remedy="mend that and go on with `resume`"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class NoMetrics:
    """A `MetricsLog` that writes nothing, for the ranks that do not write."""

    num_lines = 0
    former_last_step = 0

    def write(self, record: dict[str, Any]) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def _cut_back(path: Path, last_step: int) -> tuple[int, int]:
    """Remove all lines but the whole ones up to a step; return (how many are left, the last step before the removal).

    The file is changed as a whole or not at all.
    """
    if not path.exists():
        return 0, 0
    lines = path.read_bytes().splitlines(keepends=True)
    steps = [None if (record := _record(line)) is None else record["step"] for line in lines]
    lines_before = [
        line for line, step in zip(lines, steps, strict=True) if step is not None and step <= last_step
    ]
    if lines_before != lines:
        write_atomic(path, b"".join(lines_before))
    return len(lines_before), max((step for step in steps if step is not None), default=0)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, which may not exist yet; a last line that is still being written is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [record for line in lines if (record := _record(line)) is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    """Parse one line; None where it has no end, or is no record of a step: its step and its position, if it has one, are counts."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not _is_count(record.get("step")):
        return None
    return record if _is_count(record.get("position", 0)) else None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT

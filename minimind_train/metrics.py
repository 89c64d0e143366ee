"""metrics.jsonl: one line of JSON for every logged step, each step once, whatever happened to the process.

A line reaches the kernel before the next step begins, so a kill costs at most a line that was being written. A resumed run
goes back to its checkpoint, and so does the file: lines after the checkpoint's step are cut off before the first new one.
"""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from minimind_data.errors import UserError
from minimind_data.files import write_atomic

FILE_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends to a `metrics.jsonl`; a context manager.

    Args:
        path: the file; it is created if missing.
        last_step: lines of later steps, and a line that was cut off, are removed first. 0 begins anew.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        self._path = path
        _cut_back(path, last_step)
        # Unbuffered: one line is one system call, which survives the end of the process in whatever way it comes.
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line. `record` has a `step` greater than those before it, and finite numbers only."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise UserError(f"{self._path}: {error.strerror}; mend that and go on with --resume") from error
        if written != len(line):
            raise UserError(f"{self._path}: the disk is full; make room and go on with --resume")

    def sync(self) -> None:
        """Bring what was written to the disk itself, so that a checkpoint is never ahead of its metrics."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a `metrics.jsonl`, also of a run that is still writing it.

    Raises:
        UserError: there is no such file, or a line other than a last, unfinished one is no record.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; a run writes it into its folder from its first step on"
        ) from None
    records = []
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif line.endswith(b"\n"):
            raise UserError(
                f"{path}:{number}: not a line of metrics; delete it, or bring the file back from a backup"
            )
    return records


def _cut_back(path: Path, last_step: int) -> None:
    """Keep the whole lines up to a step; the file changes as a whole or not at all."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (record := _record(line)) is not None and record["step"] <= last_step]
    if kept != lines:
        write_atomic(path, b"".join(kept))


def _record(line: bytes) -> dict[str, Any] | None:
    """Read one line, or return None if it is torn or no record."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None

"""A disk on which the N-th change, or the N-th opening of a file, fails: what a caller is told, and what is there afterwards."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_CHANGES = ("replace", "rename", "unlink", "fsync", "mkdir", "rmdir", "link", "open")
"""Functions of `os`."""


class Killed(BaseException):
    """Raised by every operation from a certain one on, as if the process were gone."""


class Disk:
    """Counts the operations on files below a folder, of which one fails.

    Args:
        folder: operations on other files are neither counted nor fail.
        fail_at: number of the operation that fails, counted from 1; 0 lets all succeed.
        error_number: how it fails; None lets that one and all after it raise `Killed`.
    """

    def __init__(self, folder: Path, fail_at: int, error_number: int | None) -> None:
        self.operations = 0
        self._folder = os.fspath(folder)
        self._fail_at, self._error_number = fail_at, error_number

    def _failing(self, real: Callable[..., Any], *, names_files: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            place = arguments[0]
            if names_files and not (
                isinstance(place, str | os.PathLike) and os.fspath(place).startswith(self._folder)
            ):
                return real(*arguments, **named)
            self.operations += 1
            if self._error_number is None:
                if self.operations >= self._fail_at:
                    raise Killed
            elif self.operations == self._fail_at:
                error = self._error_number, os.strerror(self._error_number)
                raise OSError(*error, os.fspath(place)) if names_files else OSError(*error)
            return real(*arguments, **named)

        return call

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Let the operations of this process go through here."""
        with pytest.MonkeyPatch.context() as patch:
            for name in _CHANGES:
                patch.setattr(os, name, self._failing(getattr(os, name), names_files=name != "fsync"))
            patch.setattr(io, "open", self._failing(io.open, names_files=True))
            yield

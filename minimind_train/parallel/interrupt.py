"""Requests to stop a run early: SIGINT, SIGTERM, and `--max-hours`. The step is finished and saved, then the run ends.

A second signal is obeyed at once. How several ranks agree on a request is in `world`.
"""

import math
import os
import signal
import sys
import threading
import time
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(IntEnum):
    """Why a run stops before its time. The number is the exit status that says so: what shells show for a signal, what `timeout` gives."""

    MAX_HOURS = 124
    SIGINT = 128 + signal.SIGINT
    SIGTERM = 128 + signal.SIGTERM

    @property
    def what(self) -> str:
        """As a user knows it."""
        return "`max_hours`" if self is Stop.MAX_HOURS else self.name


def acknowledge(number: int) -> None:
    """Say on stderr that a signal was heard, since the step that is to end first may take minutes. A signal handler may call it."""
    name = signal.Signals(number).name
    line = f"{name}: stops after this step, which is saved; once more stops now, unsaved\n"
    try:
        # Where a progress line stands, it is drawn again below. Past Python's buffers: the signal may have come amid a write.
        os.write(sys.stderr.fileno(), (("\r\x1b[K" if sys.stderr.isatty() else "") + line).encode())
    except (OSError, ValueError):
        return  # nobody reads it


class StopRequest:
    """Listens for SIGINT and SIGTERM while it is entered (in other threads than the main one it hears nothing), and keeps the time.

    Args:
        max_hours: after which a stop is due; 0 for no limit.
        tell: whether to acknowledge a signal; one process of a run does.

    Attributes:
        signal: the signal that asked for a stop, or None.
    """

    def __init__(self, max_hours: float = 0, *, tell: bool = False) -> None:
        self._tell = tell
        self.signal: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}
        self._deadline = time.monotonic() + 3600 * max_hours if max_hours else math.inf

    @property
    def stop(self) -> Stop | None:
        """Why to stop now, or None."""
        if number := self.signal:
            return Stop(128 + number)
        return Stop.MAX_HOURS if time.monotonic() >= self._deadline else None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()
        if self._tell:
            acknowledge(number)

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

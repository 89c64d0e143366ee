"""Requests to stop a run early: SIGINT, SIGTERM, the option `max_hours`, and its caller's own. The step is finished and saved, then the run ends.

A second signal stops the run at once. How several ranks agree on a request is in `world`.
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(IntEnum):
    """Why a run stops early. The number is the exit status: that of a shell for a signal, and that of `timeout` for the time limit."""

    CALLER = 1
    MAX_HOURS = 124
    SIGINT = 128 + signal.SIGINT
    SIGTERM = 128 + signal.SIGTERM

    @property
    def what(self) -> str:
        """Its name for the user."""
        names = {Stop.CALLER: "its caller", Stop.MAX_HOURS: "`max_hours`"}
        return names.get(self, self.name)


def never() -> bool:
    """Ask for no stop."""
    return False


def acknowledge(number: int) -> None:
    """Say on stderr that a signal was received, as the step to be finished may take minutes. A signal handler may call this."""
    name = signal.Signals(number).name
    line = f"{name}: stops after this step, which is saved; once more stops now, unsaved\n"
    try:
        # A progress line is erased and drawn again below. Written without Python's buffers, as the signal may have interrupted a write.
        os.write(sys.stderr.fileno(), (("\r\x1b[K" if sys.stderr.isatty() else "") + line).encode())
    except (OSError, ValueError):
        return  # there is nobody to read it


class StopRequest:
    """Listens for SIGINT and SIGTERM, and watches the time limit; a context manager. Outside the main thread it receives no signals.

    Args:
        max_hours: the time limit; 0 for none.
        asked: called after each step; true where the caller of the run wants it to stop.
        acknowledges: whether to acknowledge a signal on stderr, as one process of a run does.

    Attributes:
        signal: the signal received, or None.
    """

    def __init__(
        self, max_hours: float = 0, asked: Callable[[], bool] = never, *, acknowledges: bool = False
    ) -> None:
        self._acknowledges = acknowledges
        self._asked = asked
        self.signal: signal.Signals | None = None
        self._former_handlers: dict[signal.Signals, Any] = {}
        self._deadline = time.monotonic() + 3600 * max_hours if max_hours else math.inf

    @property
    def stop(self) -> Stop | None:
        """The reason to stop now, or None."""
        if number := self.signal:
            return Stop(128 + number)
        if time.monotonic() >= self._deadline:
            return Stop.MAX_HOURS
        return Stop.CALLER if self._asked() else None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._former_handlers = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()
        if self._acknowledges:
            acknowledge(number)

    def _restore(self) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        self._former_handlers = {}

"""Requests to stop a run early: SIGINT, SIGTERM, the option `max_hours`, and its caller's own. The step is finished and saved, then the run ends.

A second signal stops the run at once. How several ranks agree on a request is in `world`.

Python calls a signal's handler in the main thread, and only when that thread runs Python: a backward pass may keep it for a minute. The
system's own handler writes the signal's number to a pipe at once (`signal.set_wakeup_fd`). A thread reads it there, acknowledges the first
signal, and ends the process if the main thread has not left soon after the second.
"""

import contextlib
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
_SECONDS_TO_LEAVE = 0.5
"""After a second signal: time for the main thread to leave by itself, with an exception, before the process is ended."""


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


def acknowledge(number: int, *, in_a_step: bool = True) -> None:
    """Say on stderr that a signal was received, as the step to be finished may take minutes. A signal handler may call this.

    Args:
        number: of the signal.
        in_a_step: whether it is known that steps are being made.
    """
    when = "after this step, which is saved" + ("" if in_a_step else ", or at once where none has begun")
    _write_on_stderr(f"{signal.Signals(number).name}: stops {when}; once more stops now, unsaved\n")


def _write_on_stderr(line: str) -> None:
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
        self._watch: _SignalWatch | None = None
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
            self._watch = _SignalWatch(acknowledges=self._acknowledges)
            self._former_handlers = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self._watch:
            self._watch.close()

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        self._former_handlers = {}


class _SignalWatch:
    """A thread that sees SIGINT and SIGTERM at once, whatever the main thread does; made and closed in the main thread.

    Args:
        acknowledges: whether to acknowledge the first signal on stderr.
    """

    def __init__(self, *, acknowledges: bool) -> None:
        self._acknowledges = acknowledges
        self._closed = threading.Event()
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)  # a signal handler must not wait
        self._former_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="signal-watch", daemon=True).start()

    def close(self) -> None:
        """End the thread."""
        signal.set_wakeup_fd(self._former_fd)
        self._closed.set()
        os.close(self._writing)  # the thread reads to the end

    def _run(self) -> None:
        num_signals = 0
        while numbers := os.read(self._reading, 64):
            if self._former_fd >= 0:  # as an event loop has one
                with contextlib.suppress(OSError):
                    os.write(self._former_fd, numbers)
            for number in numbers:
                if number not in _SIGNALS:
                    continue
                num_signals += 1
                if num_signals == 1 and self._acknowledges:
                    acknowledge(number)
                if num_signals == 2 and not self._closed.wait(_SECONDS_TO_LEAVE):
                    if self._acknowledges:
                        _write_on_stderr("error: interrupted\n")
                    os._exit(128 + number)  # what is on disk is whole at every moment
        os.close(self._reading)

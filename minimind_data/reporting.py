"""How work that takes long speaks to its caller: sentences through a `Say`, bytes through a `Progress`.

A function that takes long prints nothing; it takes these callbacks, and what it computes comes back as its result. `ByteProgress` is
the `Progress` that people see: one bar on a terminal, with the bytes, their rate and the time left; elsewhere a line now and then;
always on stderr. Here too: how counts and kinds of JSON values are written in a sentence.
"""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 15.0

Say = Callable[[str], None]
"""Takes a sentence that the user should know before the work is done."""

Report = Callable[[int, int], None]
"""Takes the bytes and the tokens that were done since the last call; less than 0 where work is done over. Any thread may call it."""


class Progress(Protocol):
    """Is called at the start of each step of a piece of work, and gives the `Report` of that step to a `with` block."""

    def __call__(self, title: str, num_bytes: int, /) -> AbstractContextManager[Report]:
        """Begin a step.

        Args:
            title: what is going on, in a word or three.
            num_bytes: how many bytes will be reported; 0 where that is not known.
        """


def say_nothing(_sentence: str) -> None:
    """Drop a sentence: a `Say` for callers who want to hear none."""


def no_progress(_title: str, _num_bytes: int) -> AbstractContextManager[Report]:
    """Show no progress: a `Progress` for callers who want none."""
    return contextlib.nullcontext(lambda _bytes, _tokens: None)


class CountedReport:
    """A `Report` that passes everything on to another one, and can take it all back.

    Args:
        report: the other one.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self.num_bytes = 0
        self.num_tokens = 0

    def __call__(self, num_bytes: int, num_tokens: int) -> None:
        """Pass on that this much more is done."""
        self.num_bytes += num_bytes
        self.num_tokens += num_tokens
        self._report(num_bytes, num_tokens)

    def take_back(self) -> None:
        """Report that nothing of it counts, because the work is done over."""
        self(-self.num_bytes, -self.num_tokens)


class ByteProgress:
    """A `Progress` on stderr: how many of the bytes are done, how fast, and how many tokens, once there are some.

    Args:
        title: what is going on, in a word or three.
        num_bytes: all of them; 0 where that is not known.
    """

    def __init__(self, title: str, num_bytes: int, /) -> None:
        self._title = title
        self._total = num_bytes
        self._done = 0
        self._tokens = 0
        self._start = self._last_line = time.monotonic()
        self._lock = threading.Lock()
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=num_bytes or None,
                desc=title,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
                leave=False,
            )

    def __enter__(self) -> Report:
        return self._report

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def _report(self, num_bytes: int, num_tokens: int) -> None:
        with self._lock:
            self._done += num_bytes
            self._tokens += num_tokens
            if self._bar is not None:
                if self._tokens:
                    self._bar.set_postfix_str(self._count(), refresh=False)
                self._bar.update(num_bytes)
            elif (now := time.monotonic()) - self._last_line >= _SECONDS_BETWEEN_LINES:
                self._last_line = now
                self._print_line(now - self._start)

    def _count(self) -> str:
        return f"{self._tokens / 1e6:.1f}M tokens"

    def _print_line(self, seconds: float) -> None:
        rate = self._done / seconds
        parts = [f"{self._done / 1e6:.0f} MB", f"{rate / 1e6:.1f} MB/s"]
        if self._total:
            parts[0] = f"{100 * self._done // self._total}% of {self._total / 1e6:.0f} MB"
        if self._tokens:
            parts.append(self._count())
        if self._total:
            seconds_left = (self._total - self._done) / rate if rate > 0 else float("inf")
            parts.append(f"{seconds_left:.0f} s left")
        print(f"{self._title}: {', '.join(parts)}", file=sys.stderr, flush=True)  # noqa: T201 - what this class is for


def counted(number: int, noun: str) -> str:
    """Write how many there are of something: `1 shard`, `2,000 shards`; an English noun with a regular plural."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


_JSON_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
    bytes: "bytes that are no UTF-8",
}


def kind_of(value: object) -> str:
    """Say what a JSON value is, for a message."""
    if isinstance(value, str):
        return "a string"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN, which is no number" if math.isnan(value) else "Infinity, which is no number"
    return _JSON_KINDS.get(type(value), f"of type {type(value).__name__}")

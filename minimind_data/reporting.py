"""How long work speaks to whoever called it: the types of its callbacks, counts in sentences, and one progress bar.

A function that takes long takes callbacks and prints nothing; `ByteProgress` shows them: one bar on a terminal, with the bytes, their rate
and the time left, a line now and then elsewhere, always on stderr. What a function found comes back as its result.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 15.0


class ByteProgress:
    """Progress over a known number of bytes.

    Args:
        title: what is going on, one word.
        total_bytes: all of it.
        count_name: what the second number that `add` takes counts, such as `tokens`; empty for none.
    """

    def __init__(self, title: str, total_bytes: int, count_name: str = "") -> None:
        self._title = title
        self._total = total_bytes
        self._count_name = count_name
        self._count = 0
        self._done = 0
        self._start = self._last_line = time.monotonic()
        self._lock = threading.Lock()
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total_bytes, desc=title, unit="B", unit_scale=True, dynamic_ncols=True, leave=False
            )

    def add(self, num_bytes: int, count: int = 0) -> None:
        """Tell that this much more is done (less, where work is done over); any thread may."""
        with self._lock:
            self._add(num_bytes, count)

    def _add(self, num_bytes: int, count: int) -> None:
        self._done += num_bytes
        self._count += count
        if self._bar is not None:
            if self._count_name:
                self._bar.set_postfix_str(f"{self._count / 1e6:.1f}M {self._count_name}", refresh=False)
            self._bar.update(num_bytes)
        elif (now := time.monotonic()) - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._print_line(now - self._start)

    def _print_line(self, seconds: float) -> None:
        rate = self._done / seconds
        left = (self._total - self._done) / rate if rate > 0 else float("inf")
        counted = f", {self._count / 1e6:.1f}M {self._count_name}" if self._count_name else ""
        share = 100 * self._done // max(1, self._total)
        text = f"{self._title}: {share}% of {self._total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s{counted}, {left:.0f} s left"
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - progress is this module's purpose

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


Announce = Callable[[str], None]

"""Takes a sentence that the user should know before the work is done."""

Report = Callable[[int, int], None]

"""Takes (bytes of input, tokens) that were done since the last call; less than 0 where work is done over."""

Progress = Callable[[str, int], AbstractContextManager[Report]]

"""Called with the name of a step and the bytes that it will read; its work is reported to what the `with` block gives."""


def no_progress(_title: str, _num_bytes: int) -> AbstractContextManager[Report]:
    """Show no progress: a `Progress` for callers who want none."""
    return contextlib.nullcontext(lambda _bytes, _tokens: None)


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
    return _JSON_KINDS.get(type(value), f"of type {type(value).__name__}")

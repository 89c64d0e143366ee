"""How long work speaks to whoever called it: the types of its callbacks, and counts in sentences.

A function that takes long takes callbacks and prints nothing; `progress.ByteProgress` shows them on a terminal. What it found comes back
as its result.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

__all__ = ["Announce", "Progress", "Report", "counted", "no_progress"]

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

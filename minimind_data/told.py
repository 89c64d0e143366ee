"""What a build tells while it runs and when it is done."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from minimind_data.format import Manifest
from minimind_data.split import Report
from minimind_data.tokenizer import Choice

Announce = Callable[[str], None]
"""Told, in a sentence, what the user should know before the work is done."""
Progress = Callable[[str, int], AbstractContextManager[Report]]
"""Called with the name of a step and the bytes to be read; inside the `with` of what it returns, bytes and tokens are told."""


def silent(_title: str, _num_bytes: int) -> AbstractContextManager[Report]:
    """Show no progress."""
    return contextlib.nullcontext(lambda _bytes, _tokens: None)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a build did."""

    manifest: Manifest | None
    """None where only a slice was made."""
    validation: Manifest | None
    """Of the validation part, where there is one."""
    already_done: bool
    """The dataset was there, made from the same inputs with the same settings."""
    kept_shards: int
    """Shards that an earlier run had made."""
    made_shards: int
    input_bytes: int
    """Of the splits that were made in this run, as they are stored."""
    seconds: float
    backend: Choice | None
    compared: int
    """Documents held against the reference during this run."""
    differences: tuple[str, ...]
    """Where the fast backend differed from the reference, which then did the work."""

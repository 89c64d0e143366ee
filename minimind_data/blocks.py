"""What reading gives: a split of a source, blocks of the texts in it, and the records that make none.

How a form is read is not this module's business: see `records.py` (JSON lines, text) and `rows.py` (Parquet).
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from minimind_data.sources import Source


@dataclass(frozen=True, kw_only=True)
class Split:
    """The part [start, stop) of a source, and how to read it."""

    source: Source
    start: int
    """A byte offset; in Parquet, the number of a row group."""
    stop: int
    num_bytes: int
    """What the split weighs, for progress: bytes of the input as it is stored."""
    more: tuple[Source, ...] = ()
    """Where each file is one document: the files that share this split with the first."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """Everything that it is read from."""
        return (self.source, *self.more)

    @property
    def path(self) -> str:
        """The name of the source, for messages."""
        return self.source.name


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that makes no document."""

    line: int
    """Its number, from 1 at the first of the split: a line, a row, or a text."""
    reason: str
    """What is wrong with it and, after a semicolon, what can be done."""
    data: bytes
    """The record itself, without its end."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some of the records of a split, in order."""

    texts: list[str]
    empty_texts: int
    bad: list[BadRecord]
    num_bytes: int
    """How far this block went on in the input, for progress."""


class RecordReader(Protocol):
    """The records of one split. What it tells of itself holds for what was read so far."""

    @property
    def begin(self) -> int:
        """Where the first record begins, in the split's unit."""
        ...

    @property
    def end(self) -> int:
        """Where the last one ends."""
        ...

    @property
    def num_lines(self) -> int:
        """Records read, those of white space included."""
        ...

    @property
    def sha256(self) -> str:
        """Of what was read."""
        ...

    def blocks(self) -> Generator[Block, None, None]:
        """Yield the texts."""
        ...

"""What reading gives: a split of a source, blocks of the texts in it, and the records that make none.

How a form is read is not this module's business: see `records.py` (JSON lines, text) and `rows.py` (Parquet).
"""

from collections.abc import Generator
from dataclasses import dataclass, replace
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
class Rendered:
    """A conversation as one text."""

    text: str
    guarded: str | None
    """The same, with the template's special tokens under other names, where somebody else wrote some; see `rendering.py`."""
    spans: tuple[tuple[int, int], ...] | None
    """What the assistant wrote, [start, stop) in characters; None where the template does not say."""
    num_answers: int
    """Turns of the assistant's."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some of the records of a split, in order."""

    texts: list[str]
    """Those of a document end to end: one, or two of a pair."""
    empty_texts: int
    bad: list[BadRecord]
    num_bytes: int
    """How far this block went on in the input, for progress."""
    texts_each: int = 1
    """Texts of a document."""
    chats: list[Rendered] | None = None
    """More about the texts, where they are conversations."""
    different_prompts: int = 0
    """Pairs whose two conversations do not begin alike."""

    @property
    def documents(self) -> list[str]:
        """What tells documents apart: the text, or those of a pair together."""
        if self.texts_each == 1:
            return self.texts
        pairs = zip(self.texts[::2], self.texts[1::2], strict=True)
        return [f"{len(chosen)}:{chosen}{rejected}" for chosen, rejected in pairs]

    def keep(self, documents: list[int]) -> "Block":
        """Return the block with some of its documents alone, by their places in it."""
        each = self.texts_each
        places = [place * each + side for place in documents for side in range(each)]
        return replace(
            self,
            texts=[self.texts[place] for place in places],
            chats=None if self.chats is None else [self.chats[place] for place in places],
        )


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

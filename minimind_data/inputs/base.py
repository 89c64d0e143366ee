"""What every form of input has in common: it is cut into splits, and a split is read in blocks of texts.

A split is what can be read alone: a range of bytes of JSON lines or of separated text, row groups of a Parquet file, a whole
compressed file, or several small files of text. Splits follow from the input alone, never from workers or machines.

`Form` is what a new form of input must provide. `forms` has the table of those that there are.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from minimind_data.chat.encoding import ChatEncoding
from minimind_data.dataset.format import Kind
from minimind_data.inputs.blocks import Block
from minimind_data.inputs.sources import Source
from minimind_data.inputs.spec import RecordSpec


@dataclass(frozen=True, kw_only=True)
class Split:
    """The part [start, stop) of a source, and how to read it."""

    source: Source
    start: int
    """Byte offset; in Parquet, the number of a row group."""
    stop: int
    num_bytes: int
    """Size for progress: bytes of the input as it is stored."""
    more: tuple[Source, ...] = ()
    """Further files of the split, if each file is one document."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """All files that it is read from."""
        return (self.source, *self.more)

    @property
    def path(self) -> str:
        """The name of the source, for messages."""
        return self.source.name


class RecordReader(Protocol):
    """Reads the records of one split. Its attributes are about what was read so far."""

    @property
    def begin(self) -> int:
        """Where the first record begins, in bytes or row groups as `Split.start`."""
        ...

    @property
    def end(self) -> int:
        """Where the last record ends."""
        ...

    @property
    def num_lines(self) -> int:
        """Records read, those of white space included."""
        ...

    @property
    def sha256(self) -> str:
        """SHA-256 of what was read."""
        ...

    def blocks(self) -> Generator[Block, None, None]:
        """Yield the texts."""
        ...


class Form(ABC):
    """How the sources of one form are cut into splits, and how these are read.

    Args:
        spec: what makes a text of a record.
        kind: what the records are.
    """

    def __init__(self, spec: RecordSpec, kind: Kind) -> None:
        self._spec = spec
        self._kind = kind

    @abstractmethod
    def splits(self, sources: Sequence[Source], split_bytes: int) -> list[list[Split]]:
        """Cut consecutive sources into splits: a list for each source, empty if it shares a split with one before it.

        Args:
            sources: all of this form.
            split_bytes: of a split, about.

        Raises:
            UserError: a source is unreadable.
        """

    @abstractmethod
    def reader(self, split: Split, chat: ChatEncoding | None = None) -> RecordReader:
        """Return the reader of a split; with `chat`, its records are conversations."""

    @abstractmethod
    def records_before(self, split: Split) -> int:
        """Count the records of a source before a split."""

    def content(self, split: Split) -> tuple[int, int, str]:
        """Return (begin, end, SHA-256) of the records in a split, as its reader has them after reading; faster than reading, where possible."""
        reader = self.reader(split)
        for _ in reader.blocks():
            pass
        return reader.begin, reader.end, reader.sha256

    def place(self, split: Split, number: int) -> str:
        """Return the place of a record for a message, path:line or path:row; `number` counts from 1 at the first of the split."""
        return f"{split.source.name}:{self.records_before(split) + number}"

    def sample(self, split: Split, num_bytes: int) -> Split:  # noqa: ARG002 - for those forms that can
        """Return a split of about so many bytes that has some of its texts, or itself if there is no such."""
        return split

"""Forms whose records end at certain bytes, as lines do: cut into splits by byte offset, each record read in the split where it begins."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence

from minimind_data.files import sha256_of_stream
from minimind_data.inputs.base import Form, Split
from minimind_data.inputs.blocks import Block
from minimind_data.inputs.held_record import too_long
from minimind_data.inputs.lines import Delimiter, LineReader, border
from minimind_data.inputs.sources import Source
from minimind_data.inputs.spec import RecordSpec

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Delimited(Form):
    """A form whose records end at the bytes `ends`."""

    ends: Delimiter

    def splits(self, sources: Sequence[Source], split_bytes: int) -> list[list[Split]]:
        """Cut at every `split_bytes`; a compressed source, which cannot be entered in the middle, stays whole."""
        splits = []
        for source in sources:
            size = source.stamp()[0]
            borders = [*range(0, size, split_bytes), size] if source.compression is None else [0, size]
            splits.append(
                [
                    Split(source=source, start=start, stop=stop, num_bytes=stop - start)
                    for start, stop in itertools.pairwise(borders)
                ]
            )
        return splits

    def content(self, split: Split) -> tuple[int, int, str]:
        """See `Form.content`."""
        source = split.source
        if source.compression is not None:
            lines = LineReader(source, split.start, split.stop, self.ends)
            for _ in lines.lines():
                pass
            return lines.begin, lines.end, lines.sha256
        with source.reading(), source.open() as file:
            begin = border(file, self.ends, split.start, split.stop)
            end = split.stop if begin == split.stop else border(file, self.ends, split.stop)
            return begin, end, sha256_of_stream(file, begin, end)

    def records_before(self, split: Split) -> int:
        """See `Form.records_before`."""
        if not split.start:
            return 0
        lines = LineReader(split.source, 0, split.start, self.ends)
        return sum(map(len, lines.lines()))


class DelimitedReader(ABC):
    """What the readers of delimited records share."""

    def __init__(self, split: Split, spec: RecordSpec, ends: Delimiter) -> None:
        self._split = split
        self._spec = spec
        self._lines = LineReader(split.source, split.start, split.stop, ends)

    @property
    def begin(self) -> int:
        """The first byte of the first record; the end of the split if none begins in it."""
        return self._lines.begin

    @property
    def end(self) -> int:
        """The byte after the last record read so far, delimiter included."""
        return self._lines.end

    @property
    def num_lines(self) -> int:
        """Records read so far, those of white space included."""
        return self._lines.num_lines

    @property
    def sha256(self) -> str:
        """Of the bytes [begin, end)."""
        return self._lines.sha256

    def blocks(self) -> Generator[Block, None, None]:
        """Yield the texts; see `RecordReader`."""
        for first, records, num_bytes in self._records():
            is_too_long = self._lines.is_too_long
            block = self._block(first, [] if is_too_long else records, num_bytes)
            if is_too_long:
                block.bad.append(too_long(first, records[0], self._long_remedy))
            yield block

    @property
    @abstractmethod
    def _long_remedy(self) -> str:
        """What to do about a record that is too long."""

    @abstractmethod
    def _block(self, first: int, records: list[bytes], num_bytes: int) -> Block:
        """Return the block of some records.

        Args:
            first: the number of the first of them, from 1 at the first of the split.
            records: without their ends.
            num_bytes: bytes of input that they took.
        """

    def _is_cut(self, number: int) -> bool:
        """Tell whether a record is the last of its source and has no end; `number` counts from 1."""
        return self._lines.is_open and number == self._lines.num_lines

    def _records(self) -> Iterator[tuple[int, list[bytes], int]]:
        """Yield (number of the first, records, bytes of input that they took)."""
        progress = _Progress(self._split)
        number = 1
        for records in self._lines.lines():
            if number == 1 and self.begin == 0:
                records[0] = records[0].removeprefix(BYTE_ORDER_MARK)
            yield number, records, progress.at(self._lines.begin, self._lines.end)
            number += len(records)


class _Progress:
    """How far reading is in the input as it is stored.

    What a compressed file holds may be longer than the file: then progress stands still at the file's size.
    """

    def __init__(self, split: Split) -> None:
        self._is_compressed = split.source.compression is not None
        self._size = split.num_bytes
        self._done = 0

    def at(self, begin: int, end: int) -> int:
        """Return the bytes since the last call."""
        now = min(end - begin, self._size) if self._is_compressed else end - begin
        step, self._done = now - self._done, now
        return step

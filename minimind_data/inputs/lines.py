"""Lines, which end with a line feed or any other delimiter, read split by split so that each line is read once.

A line belongs to the split in which it begins. So what a split holds depends on the file's bytes alone, and reading it never means
reading through a line that began before it.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import BinaryIO

from minimind_data.inputs.held_record import HeldRecord
from minimind_data.inputs.sources import Source

_BLOCK_BYTES = 2 * 2**20
_LONG_LINE_BYTES = 4 * _BLOCK_BYTES
"""Of a line that is kept apart until its end is found."""


class Delimiter:
    """Bytes that end a line.

    Where occurrences overlap, as those of a delimiter of two line feeds in a row of three, the last one counts. So the bytes around an
    occurrence show whether it counts, without reading from the beginning.
    """

    def __init__(self, text: bytes) -> None:
        self.text = text
        overlaps = [shift for shift in range(1, len(text)) if text[shift:] == text[: len(text) - shift]]
        behind = b"".join(b"(?!" + re.escape(text[len(text) - shift :]) + b")" for shift in overlaps)
        self._pattern = re.compile(re.escape(text) + behind)
        self.lookahead = max(overlaps, default=0)
        """Bytes behind an occurrence that must be read to know whether it counts."""

    def first_end(self, data: bytes, start: int) -> int:
        """Return where the first delimiter that begins at `start` or later ends, or -1."""
        if not self.lookahead:
            place = data.find(self.text, start)
            return place + len(self.text) if place >= 0 else -1
        match = self._pattern.search(data, start)
        return match.end() if match else -1

    def last_end(self, data: bytes, limit: int) -> int:
        """Return where the last delimiter that ends at `limit` or before ends, or -1."""
        if not self.lookahead:
            place = data.rfind(self.text, 0, limit)
            return place + len(self.text) if place >= 0 else -1
        ends = (match.end() for match in self._pattern.finditer(data))
        return max((end for end in ends if end <= limit), default=-1)

    def split(self, data: bytes) -> list[bytes]:
        """Return whole lines without their delimiters; the last one may have none."""
        lines = self._pattern.split(data) if self.lookahead else data.split(self.text)
        if not lines[-1]:
            lines.pop()
        return lines


@lru_cache(maxsize=8)
def delimiter(text: bytes) -> Delimiter:
    """Return the delimiter of this text; it is made once."""
    return Delimiter(text)


LINE_FEED = delimiter(b"\n")


def border(file: BinaryIO, ends: Delimiter, at: int, stop: int | None = None) -> int:
    """Return the first byte from `at` on where a line may begin, the one before it having ended; `stop`, or the end, if none does.

    Reads a block at a time and little beyond `stop`, so a line that fills a hundred splits is read once, not a hundred times.
    """
    if not at:
        return 0
    width = len(ends.text)
    base = max(0, at - width)  # a line begins at `at` if a delimiter ends there
    file.seek(base)
    data = b""
    while True:
        block = file.read(
            _BLOCK_BYTES if stop is None else min(_BLOCK_BYTES, stop + ends.lookahead - base - len(data))
        )
        data += block
        line_end = ends.first_end(data, max(0, at - width - base))
        is_certain = not block or line_end + ends.lookahead <= len(data)
        if line_end >= 0 and is_certain:
            return base + line_end if stop is None else min(base + line_end, stop)
        if not block:
            return base + len(data) if stop is None else stop
        if line_end < 0 and len(data) > width + ends.lookahead:
            # Keep the bytes in which a delimiter may have begun.
            cut = len(data) - width - ends.lookahead
            base += cut
            data = data[cut:]


class LineReader:
    """The lines that begin in the bytes [start, stop) of a source, in blocks of a few megabytes.

    Attributes:
        begin: the first byte of the first line; `stop` if none begins in the split.
        end: the byte after the last line read so far, delimiter included.
        num_lines: lines read so far.
        is_open: whether the last of them has no delimiter, the source having ended before.
        is_too_long: whether the last list has only the beginning of a line that is longer than `held_record.MAX_RECORD_BYTES`.
    """

    def __init__(self, source: Source, start: int, stop: int, ends: Delimiter = LINE_FEED) -> None:
        self._source = source
        self._start = start
        self._stop = stop if source.compression is None else sys.maxsize  # a compressed file is one split
        self._ends = ends
        self._digest = hashlib.sha256()
        self.begin = self.end = start
        self.num_lines = 0
        self.is_open = self.is_too_long = False

    def lines(self) -> Iterator[list[bytes]]:
        """Yield lists of whole lines, without their delimiters; a line that is too long comes alone, and only its beginning.

        Raises:
            UserError: the source cannot be read to its end.
        """
        stop = self._stop
        with self._source.reading(), self._source.open_text() as file:
            if self._start:
                self.begin = self.end = border(file, self._ends, self._start, stop)
                file.seek(self.begin)
            data = b""
            while self.end < stop:
                block = file.read(_BLOCK_BYTES)
                data = data + block if data else block
                certain = len(data) - self._ends.lookahead if block else len(data)
                cut = -1
                if (
                    self.end + certain >= stop
                ):  # the last block ends with the line that holds the last byte of the split
                    cut = self._ends.first_end(data, max(0, stop - self.end - len(self._ends.text)))
                    if cut > certain:
                        cut = -1
                if cut < 0:
                    cut = self._ends.last_end(data, certain) if block else len(data)
                if cut > 0:
                    yield self._take(data[:cut])
                    data = data[cut:]
                elif len(data) > _LONG_LINE_BYTES:
                    line, data = self._long_line(file, data)
                    yield [line]
                    self.is_too_long = False
                if not block:
                    return  # should the file have been cut off meanwhile, the build notices by its size

    def _long_line(self, file: BinaryIO, data: bytes) -> tuple[bytes, bytes]:
        """Read a line to its end, and return (it without its delimiter, what was read beyond it).

        Args:
            file: from which it is read on.
            data: its beginning, in which it does not certainly end.
        """
        record = HeldRecord()
        width = len(self._ends.text) + self._ends.lookahead
        while block := file.read(_BLOCK_BYTES):
            cut = max(0, len(data) - width)  # a delimiter may have begun in the rest
            record.add(data[:cut])
            self._advance(data[:cut])
            data = data[cut:] + block
            line_end = self._ends.first_end(data, 0)
            if 0 <= line_end <= len(data) - self._ends.lookahead:
                break
        else:
            line_end = self._ends.first_end(data, 0)
            line_end = line_end if line_end >= 0 else len(data)
        record.add(data[:line_end])
        self._advance(data[:line_end])
        self.num_lines += 1
        self.is_too_long = record.is_too_long
        return record.data().removesuffix(self._ends.text), data[line_end:]

    def _take(self, block: bytes) -> list[bytes]:
        self._advance(block)
        lines = self._ends.split(block)
        self.num_lines += len(lines)
        return lines

    def _advance(self, data: bytes) -> None:
        self._digest.update(data)
        self.end += len(data)
        self.is_open = not data.endswith(self._ends.text)

    @property
    def sha256(self) -> str:
        """Of the bytes [begin, end)."""
        return self._digest.hexdigest()

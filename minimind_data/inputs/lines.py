"""Pieces of a file that end with a delimiter, such as lines, cut into splits that hold every piece once.

A piece belongs to the split in which it begins. So splits depend on the file's bytes alone, and reading one never reads through
a piece that began before it.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import BinaryIO

from minimind_data.errors import UserError
from minimind_data.inputs.sources import Source

MAX_LINE_BYTES = 2**30
"""A longer piece is no record but a file of another form: memory must hold it several times over."""
_BLOCK_BYTES = 2 * 2**20


class Delimiter:
    """Bytes that end a piece.

    Where occurrences overlap (the second and third of three line feeds, for a delimiter of two) the last one counts, so that what
    is a delimiter can be told from its neighbourhood, without reading from the beginning.
    """

    def __init__(self, text: bytes) -> None:
        self.text = text
        overlaps = [shift for shift in range(1, len(text)) if text[shift:] == text[: len(text) - shift]]
        behind = b"".join(b"(?!" + re.escape(text[len(text) - shift :]) + b")" for shift in overlaps)
        self._pattern = re.compile(re.escape(text) + behind)
        self.lookahead = max(overlaps, default=0)
        """Bytes that must be seen behind an occurrence to know that it counts."""

    def first_end(self, data: bytes, start: int) -> int:
        """Return where the first delimiter that begins at `start` or later ends, or -1."""
        if not self.lookahead:
            found = data.find(self.text, start)
            return found + len(self.text) if found >= 0 else -1
        match = self._pattern.search(data, start)
        return match.end() if match else -1

    def last_end(self, data: bytes, limit: int) -> int:
        """Return where the last delimiter that ends at `limit` or before ends, or -1."""
        if not self.lookahead:
            found = data.rfind(self.text, 0, limit)
            return found + len(self.text) if found >= 0 else -1
        ends = (match.end() for match in self._pattern.finditer(data))
        return max((end for end in ends if end <= limit), default=-1)

    def split(self, data: bytes) -> list[bytes]:
        """Cut whole pieces apart and take their delimiters off; a last piece may have none."""
        pieces = self._pattern.split(data) if self.lookahead else data.split(self.text)
        if not pieces[-1]:
            pieces.pop()
        return pieces


@lru_cache(maxsize=8)
def delimiter(text: bytes) -> Delimiter:
    """Return the delimiter of this text, made once."""
    return Delimiter(text)


LINE_FEED = delimiter(b"\n")


def border(file: BinaryIO, ends: Delimiter, at: int, stop: int | None = None) -> int:
    """Return the first place from byte `at` on where a piece ends and another may begin; `stop`, or the end, where none does.

    Reads a block at a time and little beyond `stop`, so a piece that fills a hundred splits is read once, not a hundred times.
    """
    if not at:
        return 0
    width = len(ends.text)
    base = max(0, at - width)  # a piece begins at `at` if a delimiter ends there
    file.seek(base)
    data = b""
    while True:
        if stop is not None and base + len(data) - ends.lookahead >= stop:
            return stop
        block = file.read(
            _BLOCK_BYTES if stop is None else min(_BLOCK_BYTES, stop + ends.lookahead - base - len(data))
        )
        data += block
        found = ends.first_end(data, max(0, at - width - base))
        is_certain = not block or found + ends.lookahead <= len(data)
        if found >= 0 and is_certain:
            return base + found if stop is None else min(base + found, stop)
        if not block:
            return base + len(data) if stop is None else stop
        if found < 0 and len(data) > width + ends.lookahead:  # keep what a delimiter may have begun in
            cut = len(data) - width - ends.lookahead
            base += cut
            data = data[cut:]


class LineReader:
    """The pieces that begin in the bytes [start, stop) of a source, in blocks of a few megabytes.

    Attributes:
        begin: the first byte of the first piece; `stop` where none begins in the split.
        end: the byte after the last piece read so far, delimiter included.
        num_lines: pieces read so far.
    """

    def __init__(self, source: Source, start: int, stop: int, ends: Delimiter = LINE_FEED) -> None:
        self._source = source
        self._start = start
        self._stop = stop if source.compression is None else sys.maxsize  # a compressed file is one split
        self._ends = ends
        self._digest = hashlib.sha256()
        self.begin = self.end = start
        self.num_lines = 0

    def pieces(self) -> Iterator[list[bytes]]:
        """Yield lists of whole pieces, without their delimiters.

        Raises:
            UserError: a piece is longer than `MAX_LINE_BYTES`, or the source cannot be read to its end.
        """
        stop = self._stop
        with self._source.reading(), self._source.open_text() as file:
            if self._start:
                self.begin = self.end = border(file, self._ends, self._start, stop)
                file.seek(self.begin)
            data = b""
            while self.end < stop:
                block = file.read(
                    max(_BLOCK_BYTES, len(data) // 2)
                )  # in proportion, so that a giant is not copied often
                data = data + block if data else block
                certain = len(data) - self._ends.lookahead if block else len(data)
                if self.end + certain < stop:
                    cut = self._ends.last_end(data, certain) if block else len(data)
                else:  # the split's last block ends with the piece that holds its last byte
                    cut = self._ends.first_end(data, max(0, stop - self.end - len(self._ends.text)))
                    if cut > certain:
                        cut = -1
                    elif cut < 0 and not block:
                        cut = len(data)
                if cut > 0:
                    yield self._take(data[:cut])
                    data = data[cut:]
                elif len(data) > MAX_LINE_BYTES:
                    line = self._num_before() + self.num_lines + 1
                    raise UserError(
                        f"{self._source.name}:{line}: a record of over {MAX_LINE_BYTES >> 20:,} MiB; write one record a line"
                    )
                if not block:
                    return  # where the file was cut off under us, the build notices by its size

    def _num_before(self) -> int:
        if not self.begin:
            return 0
        before = LineReader(self._source, 0, self.begin, self._ends)
        return sum(map(len, before.pieces()))

    def _take(self, block: bytes) -> list[bytes]:
        self._digest.update(block)
        self.end += len(block)
        lines = self._ends.split(block)
        self.num_lines += len(lines)
        return lines

    @property
    def sha256(self) -> str:
        """Of the bytes [begin, end)."""
        return self._digest.hexdigest()

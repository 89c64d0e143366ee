"""Validated records out of JSON lines, split by byte offset.

A split is a range of bytes of one input; a line belongs to the split in which it begins, so splits depend on the input
alone and together hold every line once. A record that cannot be used becomes a `BadRecord` with its line and its reason:
nothing is coerced, dropped or repaired in silence. Lines of white space are no records.
"""

import hashlib
import json
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from minimind_data.errors import UserError

MAX_LINE_BYTES = 2**30
"""A longer line is no record but a file of another form: memory must hold a line several times over."""
_BLOCK_BYTES = 2 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WORD = re.compile(r"[^\W\d_]+|\d+|\s+|[^\w\s]+|_+")
_JSON_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


@dataclass(frozen=True, kw_only=True)
class Split:
    """The bytes [start, stop) of an input; the lines that begin there."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A line that makes no document."""

    line: int
    """Counted from 1 at the first line of the split."""
    reason: str
    """What is wrong with it and, after a semicolon, what can be done."""
    data: bytes
    """The line itself, without its end."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some of the records of a split, in order."""

    texts: list[str]
    empty_texts: int
    bad: list[BadRecord]
    num_bytes: int
    """How far this block went on in the input, for progress."""


def plan_splits(path: Path, split_bytes: int) -> list[Split]:
    """Cut an input every `split_bytes` bytes.

    Raises:
        UserError: the input is missing, no file, unreadable or empty.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path}: a folder; name the .jsonl files in it")
        if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
            raise UserError(
                f"{path}: a pipe or a device, which cannot be read twice; save it to a file first"
            )
        with path.open("rb") as file:
            size = file.seek(0, 2)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read; change its permissions") from None
    if not size:
        raise UserError(f"{path}: the file is empty; there is nothing to tokenize")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{path}: the name is no UTF-8, so a manifest cannot hold it; rename the file"
        ) from None
    return [
        Split(path=path, start=at, stop=min(at + split_bytes, size)) for at in range(0, size, split_bytes)
    ]


def line_range(split: Split) -> tuple[int, int]:
    """Return (first byte, byte after the last) of the lines that begin in a split; both are its stop where none does."""
    with split.path.open("rb") as file:
        begin = _line_border(file, split.start, split.stop)
        return begin, split.stop if begin == split.stop else _line_border(file, split.stop)


def _line_border(file: BinaryIO, at: int, stop: int | None = None) -> int:
    """Return the first place from byte `at` on where a line ends and another may begin; `stop`, or the end, where none does.

    Reads a block at a time and never past `stop`, so a line that fills a hundred splits is read once, not a hundred times.
    """
    if not at:
        return 0
    place = at - 1  # a line begins at `at` if the byte before ends one
    file.seek(place)
    last = None if stop is None else stop - 1
    while block := file.read(_BLOCK_BYTES if last is None else max(0, min(_BLOCK_BYTES, last - place))):
        found = block.find(b"\n")
        if found >= 0:
            return place + found + 1
        place += len(block)
    return place if stop is None else stop


class LineReader:
    """The lines that begin in a split, in blocks of a few megabytes.

    Attributes:
        begin: the first byte of the first line; the split's stop where no line begins in it.
        end: the byte after the last line read so far.
        num_lines: lines read so far, lines of white space included.
    """

    def __init__(self, split: Split) -> None:
        self._split = split
        self._digest = hashlib.sha256()
        self.begin = self.end = split.start
        self.num_lines = 0

    def __iter__(self) -> Iterator[list[bytes]]:
        """Yield lists of whole lines, without their line feeds.

        Raises:
            UserError: a line is longer than `MAX_LINE_BYTES`.
        """
        stop = self._split.stop
        with self._split.path.open("rb") as file:
            self.begin = self.end = _line_border(file, self._split.start, stop)
            file.seek(self.begin)
            pieces: list[bytes] = []  # of lines whose end has not been read yet
            place = self.begin
            while self.end < stop:
                piece = file.read(_BLOCK_BYTES)
                if (
                    not piece
                ):  # the end of the file; where it was cut off under us, the build notices by its size
                    if pieces:
                        yield self._take(b"".join(pieces))
                    return
                # Up to the last whole line; in the split's last block, up to the end of the line that holds its last byte.
                place += len(piece)
                border = (
                    piece.rfind(b"\n")
                    if place < stop
                    else piece.find(b"\n", max(0, len(piece) - place + stop - 1))
                ) + 1
                if border:
                    pieces.append(piece[:border])
                    block = b"".join(pieces)
                    pieces = [piece[border:]]
                    yield self._take(block)
                else:
                    pieces.append(piece)
                    self._check_length(place)

    def _take(self, block: bytes) -> list[bytes]:
        self._digest.update(block)
        self.end += len(block)
        lines = block.split(b"\n")
        if not lines[-1]:
            lines.pop()
        self.num_lines += len(lines)
        return lines

    def _check_length(self, place: int) -> None:
        if place - self.end > MAX_LINE_BYTES:
            line = count_lines(self._split.path, self.end) + 1
            raise UserError(
                f"{self._split.path}:{line}: a line of over {MAX_LINE_BYTES >> 20:,} MiB; write one record a line"
            )

    @property
    def sha256(self) -> str:
        """Of the bytes [begin, end)."""
        return self._digest.hexdigest()


def read_blocks(reader: LineReader, *, field: str, max_word_chars: int) -> Generator[Block, None, None]:
    """Yield the texts of a split, block by block.

    Args:
        reader: the lines.
        field: the name of the field that holds the text.
        max_word_chars: a text with a longer run of letters, of digits, of signs or of white space is a bad record.
    """
    line_number = 0
    for lines in reader:
        texts: list[str] = []
        bad: list[BadRecord] = []
        empty_texts = 0
        if line_number == 0:
            end = reader.begin
            if end == 0:
                lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
        for line in lines:
            line_number += 1
            try:
                text = orjson.loads(line)[field]
            except (ValueError, LookupError, TypeError):
                text = None
            if isinstance(text, str) and len(text) <= max_word_chars:
                if text:
                    texts.append(text)
                else:
                    empty_texts += 1
            elif line.strip():
                reason = _reason(line, field, max_word_chars)
                if reason is None:
                    assert isinstance(text, str)
                    texts.append(text)
                else:
                    bad.append(BadRecord(line=line_number, reason=reason, data=line.rstrip(b"\r")))
        yield Block(texts=texts, empty_texts=empty_texts, bad=bad, num_bytes=reader.end - end)
        end = reader.end


def count_lines(path: Path, stop: int) -> int:
    """Return how many lines of a file begin before the byte `stop`, where a line begins."""
    count = 0
    with path.open("rb") as file:
        while stop > 0 and (block := file.read(min(stop, _BLOCK_BYTES))):
            count += block.count(b"\n")
            stop -= len(block)
    return count


def _reason(line: bytes, field: str, max_word_chars: int) -> str | None:
    """Say why a line makes no document, or None where it does."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) is no UTF-8; convert the file to UTF-8"
    try:
        record: Any = orjson.loads(line.rstrip())  # so that its columns are this line's
    except orjson.JSONDecodeError as error:
        if "surrogate" in str(error):
            return f"a lone surrogate escape (column {error.colno}), which is no character; remove it"
        return f"not JSON ({error.msg.rstrip('.')}, column {error.colno}); mend or remove the line"
    if not isinstance(record, dict):
        quoted = json.dumps(field, ensure_ascii=False)
        return f"the record is {_kind(record)}, not an object; write it as {{{quoted}: …}}"
    if field not in record:
        found = ", ".join(list(record)[:5]) or "none at all"
        return f"no field {field!r} (its fields: {found}); name the field of the text with --field"
    text = record[field]
    if not isinstance(text, str):
        return f"field {field!r} is {_kind(text)}, not a string; name the field of the text with --field"
    longest = max((match.end() - match.start() for match in _WORD.finditer(text)), default=0)
    if longest > max_word_chars:
        return (
            f"one word of {longest:,} characters, the longest allowed has {max_word_chars:,}; "
            "break it up, or raise --max-word-chars"
        )
    return None


def _kind(value: object) -> str:
    return "a string" if isinstance(value, str) else _JSON_KINDS[type(value)]

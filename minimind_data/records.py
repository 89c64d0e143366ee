"""Validated records out of JSON lines, split by byte offset.

A split is a range of bytes of one input; a line belongs to the split in which it begins, so splits depend on the input
alone and together hold every line once. A record that cannot be used becomes a `BadRecord` with its line and its reason:
nothing is coerced, dropped or repaired in silence. Lines of white space are no records.
"""

import hashlib
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from minimind_data.errors import UserError

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
    return [
        Split(path=path, start=at, stop=min(at + split_bytes, size)) for at in range(0, size, split_bytes)
    ]


def line_range(split: Split) -> tuple[int, int]:
    """Return (first byte, byte after the last) of the lines that begin in a split; the two are equal where none does."""
    with split.path.open("rb") as file:
        begin = _line_start(file, split.start)
        return begin, max(begin, _line_start(file, split.stop))


def _line_start(file: BinaryIO, at: int) -> int:
    """Return where the first line begins that does not begin before byte `at`; the file is left there."""
    if at:
        file.seek(at - 1)
        file.readline()
    return file.tell()


class LineReader:
    """The lines that begin in a split, in blocks of a few megabytes.

    Attributes:
        begin: the first byte of the first line.
        end: the byte after the last line read so far.
        num_lines: lines read so far, lines of white space included.
    """

    def __init__(self, split: Split) -> None:
        self._split = split
        self._digest = hashlib.sha256()
        self.begin = self.end = split.start
        self.num_lines = 0

    def __iter__(self) -> Iterator[list[bytes]]:
        """Yield lists of whole lines, each with its line end."""
        with self._split.path.open("rb") as file:
            self.begin = self.end = _line_start(file, self._split.start)
            while (left := self._split.stop - self.end) > 0:
                # `readlines` stops once it has read more than its hint, and takes 0 for no bound. So the last line of a call
                # begins before the split's end.
                hint = min(_BLOCK_BYTES, left) - 1
                lines = file.readlines(hint) if hint else [file.readline()]
                block = b"".join(lines)
                if not block:
                    return  # the file was cut off under us; the build notices by its size
                self._digest.update(block)
                self.end += len(block)
                self.num_lines += len(lines)
                yield lines

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
    end = reader.begin
    for lines in reader:
        texts: list[str] = []
        bad: list[BadRecord] = []
        empty_texts = 0
        if reader.begin == 0 and line_number == 0:
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
                    bad.append(BadRecord(line=line_number, reason=reason, data=line.rstrip(b"\r\n")))
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
        return f"the record is {_kind(record)}, not an object; write it as {{{field!r}: …}}".replace("'", '"')
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

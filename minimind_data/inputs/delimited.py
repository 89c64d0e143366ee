"""Readers of records that end at a byte: JSON lines, conversations in JSON lines, separated text, and files of text.

A record that cannot be used becomes a `BadRecord` with its number and its reason: nothing is coerced, dropped or repaired in
silence. Lines of white space are no records.
"""

import functools
from collections.abc import Generator, Iterator
from typing import Any

import orjson

from minimind_data.chat.conversations import BadConversationError
from minimind_data.chat.rendering import ChatSpec
from minimind_data.files import sha256_of_bytes
from minimind_data.inputs.blocks import BadRecord, Block, Chats, Split
from minimind_data.inputs.lines import LINE_FEED, Delimiter, LineReader, delimiter
from minimind_data.inputs.spec import RecordSpec, long_word, reason, text_getter

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_BLOCK_DOCUMENT_BYTES = 2 * 2**20


def ends(split: Split, spec: RecordSpec) -> Delimiter:
    """Return what ends a record in this split."""
    if split.source.form == "jsonl":
        return LINE_FEED
    assert spec.separator_bytes is not None
    return delimiter(spec.separator_bytes)


class _Bytes:
    """What readers of delimited records share."""

    def __init__(self, split: Split, spec: RecordSpec) -> None:
        self._split = split
        self._spec = spec
        self._lines = LineReader(split.source, split.start, split.stop, ends(split, spec))

    @property
    def begin(self) -> int:
        return self._lines.begin

    @property
    def end(self) -> int:
        return self._lines.end

    @property
    def num_lines(self) -> int:
        return self._lines.num_lines

    @property
    def sha256(self) -> str:
        return self._lines.sha256

    def _pieces(self) -> Iterator[tuple[int, list[bytes], int]]:
        """Yield (number of the first, pieces, bytes of input that they took)."""
        progress = _Progress(self._split)
        number = 1
        for pieces in self._lines.pieces():
            if number == 1 and self.begin == 0:
                pieces[0] = pieces[0].removeprefix(_BYTE_ORDER_MARK)
            yield number, pieces, progress.at(self._lines.begin, self._lines.end)
            number += len(pieces)


class _Progress:
    """How far reading went on in the input as it is stored; a compressed file's end is told when it comes."""

    def __init__(self, split: Split) -> None:
        self._is_compressed = split.source.compression is not None
        self._size = split.num_bytes
        self._done = 0

    def at(self, begin: int, end: int) -> int:
        """Return the bytes since the last call."""
        now = min(end - begin, self._size) if self._is_compressed else end - begin
        step, self._done = now - self._done, now
        return step


class JsonRecords(_Bytes):
    """JSON lines."""

    def blocks(self) -> Generator[Block, None, None]:
        """Yield the texts; see `RecordReader`."""
        get_text = text_getter(self._spec)
        max_word_chars = self._spec.max_word_chars
        for first, lines, num_bytes in self._pieces():
            texts: list[str] = []
            bad: list[BadRecord] = []
            empty_texts = 0
            for number, line in enumerate(lines, first):
                try:
                    text = get_text(orjson.loads(line))
                except (ValueError, LookupError, TypeError):
                    text = None
                if isinstance(text, str) and len(text) <= max_word_chars:
                    if text:
                        texts.append(text)
                    else:
                        empty_texts += 1
                elif line.strip():
                    why = _why_no_document(line, self._spec)
                    if why is None:
                        assert isinstance(text, str)
                        texts.append(text)
                    else:
                        bad.append(BadRecord(line=number, reason=why, data=line.rstrip(b"\r")))
            yield Block(texts=texts, empty_texts=empty_texts, bad=bad, num_bytes=num_bytes)


class ChatRecords(_Bytes):
    """JSON lines that hold conversations, or pairs of them."""

    def __init__(self, split: Split, spec: RecordSpec, chat: ChatSpec) -> None:
        super().__init__(split, spec)
        self._chats = Chats(spec, chat)

    def blocks(self) -> Generator[Block, None, None]:
        """Yield the conversations as texts; see `RecordReader`."""
        for first, lines, num_bytes in self._pieces():
            for number, line in enumerate(lines, first):
                if line.strip():
                    self._chats.add(
                        number, functools.partial(_parsed, line), functools.partial(line.rstrip, b"\r")
                    )
            yield self._chats.take(num_bytes)


def _parsed(line: bytes) -> object:
    try:
        return orjson.loads(line)
    except ValueError:
        raise BadConversationError(_why_no_json(line)) from None


def _why_no_json(line: bytes) -> str | None:
    """Say why a line is no JSON, or None where it is."""
    if (why := _no_utf8(line, "line")) is not None:
        return why
    try:
        orjson.loads(line.rstrip())  # so that its columns are this line's
    except orjson.JSONDecodeError as error:
        if "surrogate" in str(error):
            return f"a lone surrogate escape (column {error.colno}), which is no character; remove it"
        return f"not JSON ({error.msg.rstrip('.')}, column {error.colno}); mend or remove the line"
    return None


def _why_no_document(line: bytes, spec: RecordSpec) -> str | None:
    """Say why a line makes no document, or None where it does."""
    if (why := _why_no_json(line)) is not None:
        return why
    record: Any = orjson.loads(line)
    try:
        text = text_getter(spec)(record)
    except (LookupError, TypeError):
        text = None
    return reason(record, text, spec)


def _no_utf8(data: bytes, what: str) -> str | None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1} of the {what} (0x{data[error.start]:02x}) is no UTF-8; convert the file to UTF-8"
    return None


class _Texts:
    """Collects plain texts into blocks."""

    def __init__(self, spec: RecordSpec) -> None:
        self._spec = spec
        self._texts: list[str] = []
        self._bad: list[BadRecord] = []
        self._empty_texts = 0

    def add(self, number: int, data: bytes) -> None:
        """Take in a text; one of white space alone is empty."""
        why = _no_utf8(data, "text")
        text = "" if why else data.decode()
        why = why or long_word(text, self._spec.max_word_chars)
        if why:
            self._bad.append(BadRecord(line=number, reason=why, data=data))
        elif not text.strip():
            self._empty_texts += 1
        else:
            self._texts.append(text)

    def take(self, num_bytes: int) -> Block:
        """Return what was collected, and begin anew."""
        block = Block(texts=self._texts, empty_texts=self._empty_texts, bad=self._bad, num_bytes=num_bytes)
        self._texts, self._bad, self._empty_texts = [], [], 0
        return block


class TextRecords(_Bytes):
    """Plain text whose documents end with a separator."""

    def blocks(self) -> Generator[Block, None, None]:
        """Yield the texts; see `RecordReader`."""
        texts = _Texts(self._spec)
        for first, pieces, num_bytes in self._pieces():
            for number, piece in enumerate(pieces, first):
                texts.add(number, piece)
            yield texts.take(num_bytes)


class TextFileRecords:
    """Plain text files, each one document."""

    def __init__(self, split: Split, spec: RecordSpec) -> None:
        self._split = split
        self._spec = spec
        self._digests: list[str] = []
        self.begin = self.end = 0
        self.num_lines = 0

    def blocks(self) -> Generator[Block, None, None]:
        """Yield the texts; see `RecordReader`."""
        texts = _Texts(self._spec)
        weight = 0
        for source in self._split.sources:
            with source.reading(), source.open_text() as file:
                data = file.read()
            self._digests.append(sha256_of_bytes(data))
            self.num_lines += 1
            size = source.stamp()[0]
            self.end += size
            texts.add(self.num_lines, data.removeprefix(_BYTE_ORDER_MARK))
            weight += size
            if weight >= _BLOCK_DOCUMENT_BYTES:
                yield texts.take(weight)
                weight = 0
        yield texts.take(weight)

    @property
    def sha256(self) -> str:
        """Of the SHA-256s of the files' texts."""
        return sha256_of_bytes("".join(self._digests).encode())

"""Validated records: the splits of a source, and the texts that begin in one, block by block.

A source's form decides what a split is. JSON lines and separated text are cut by byte offset, where a record belongs to the split
in which it begins; Parquet is cut between row groups; a compressed file, and text in which each file is one document, is one
split. So splits depend on the input alone and together hold every record once.

A record that cannot be used becomes a `BadRecord` with its number and its reason: nothing is coerced, dropped or repaired in
silence. Lines of white space are no records.
"""

import functools
import itertools
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import orjson

from minimind_data.blocks import BadRecord, Block, RecordReader, Split
from minimind_data.chat_records import Chats
from minimind_data.conversations import BadConversationError
from minimind_data.fields import RecordSpec, long_word, reason, text_getter
from minimind_data.files import sha256_of_bytes, sha256_of_stream
from minimind_data.format import Kind
from minimind_data.lines import LINE_FEED, Delimiter, LineReader, border, delimiter
from minimind_data.rendering import ChatSpec
from minimind_data.sources import Source

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK_DOCUMENT_BYTES = 2 * 2**20


def plan_splits(
    sources: Sequence[Source], split_bytes: int, spec: RecordSpec, kind: Kind = "pretrain"
) -> list[list[Split]]:
    """Cut sources into splits: a list for each source, empty for one that shares a split with one before it.

    Args:
        sources: what is to be read.
        split_bytes: of a split, about.
        spec: what makes a document of a record, where it is a text.
        kind: what the records are.

    Raises:
        UserError: a source is unreadable.
    """
    planned: list[list[Split]] = [[] for _ in sources]
    first, weight = 0, 0  # of the group of text files that is being filled

    def close_group(stop: int) -> None:
        if weight:
            files = tuple(sources[first:stop])
            planned[first] = [Split(source=files[0], more=files[1:], start=0, stop=weight, num_bytes=weight)]

    for number, source in enumerate(sources):
        if source.form != "text" or spec.separator is not None:
            close_group(number)
            weight = 0
            planned[number] = _splits_of(source, split_bytes, spec, kind)
            continue
        size = source.stamp()[0]
        if weight + size > split_bytes:
            close_group(number)
            weight = 0
        if not weight:
            first = number
        weight += size
    close_group(len(sources))
    return planned


def _splits_of(source: Source, split_bytes: int, spec: RecordSpec, kind: Kind) -> list[Split]:
    if source.form == "parquet":
        from minimind_data.rows import row_group_splits  # noqa: PLC0415 - takes a tenth of a second

        with source.reading():
            return list(row_group_splits(source, split_bytes, spec, kind))
    size = source.stamp()[0]
    if source.compression is not None:
        return [Split(source=source, start=0, stop=size, num_bytes=size)]
    borders = [*range(0, size, split_bytes), size]
    return [
        Split(source=source, start=start, stop=stop, num_bytes=stop - start)
        for start, stop in itertools.pairwise(borders)
    ]


def open_reader(split: Split, spec: RecordSpec, chat: ChatSpec | None = None) -> RecordReader:
    """Return the reader of a split; with `chat`, its records are conversations."""
    if split.source.form == "parquet":
        from minimind_data.rows import ParquetChats, ParquetRecords  # noqa: PLC0415 - takes a tenth of a second

        return ParquetRecords(split, spec) if chat is None else ParquetChats(split, spec, chat)
    if chat is not None:
        return ChatRecords(split, spec, chat)
    if split.source.form == "text":
        return TextRecords(split, spec) if spec.separator is not None else TextFileRecords(split, spec)
    return JsonRecords(split, spec)


def content_of(split: Split, spec: RecordSpec, kind: Kind = "pretrain") -> tuple[int, int, str]:
    """Return (begin, end, SHA-256) of the records in a split, as its reader would tell them, without making texts of any."""
    source = split.source
    if (
        source.compression is None
        and (source.form == "jsonl" or spec.separator is not None)
        and source.form != "parquet"
    ):
        ends = _ends(split, spec)
        with source.reading(), source.open() as file:
            begin = border(file, ends, split.start, split.stop)
            end = split.stop if begin == split.stop else border(file, ends, split.stop)
            return begin, end, sha256_of_stream(file, begin, end)
    if source.form == "parquet":
        from minimind_data.rows import ParquetRows  # noqa: PLC0415 - takes a tenth of a second

        rows = ParquetRows(split, spec, kind)
        for _ in rows.batches():
            pass
        return rows.begin, rows.end, rows.sha256
    reader = open_reader(split, spec)
    for _ in reader.blocks():
        pass
    return reader.begin, reader.end, reader.sha256


def _ends(split: Split, spec: RecordSpec) -> Delimiter:
    if split.source.form == "jsonl":
        return LINE_FEED
    assert spec.separator_bytes is not None
    return delimiter(spec.separator_bytes)


class _Bytes:
    """What readers of delimited records share."""

    def __init__(self, split: Split, spec: RecordSpec) -> None:
        self._split = split
        self._spec = spec
        self._lines = LineReader(split.source, split.start, split.stop, _ends(split, spec))

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


def place(split: Split, spec: RecordSpec, line: int) -> str:
    """Return path:line of the record with this number in a split, for a message; in Parquet the row stands for the line."""
    source = split.source
    if source.form == "text" and spec.separator is None:
        return split.sources[line - 1].name
    return f"{source.name}:{records_before(split, spec) + line}"


def records_before(split: Split, spec: RecordSpec) -> int:
    """Count the records of a source before a split."""
    if not split.start:
        return 0
    if split.source.form == "parquet":
        from minimind_data.rows import count_rows  # noqa: PLC0415 - takes a tenth of a second

        return count_rows(split.source, range(split.start))
    lines = LineReader(split.source, 0, split.start, _ends(split, spec))
    for _ in lines.pieces():
        pass
    return lines.num_lines

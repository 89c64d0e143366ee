"""JSON lines: one record a line, a text or a conversation in each.

A record that cannot be used becomes a `BadRecord` with its number and its reason: nothing is coerced, dropped or repaired in
silence. Lines of white space are no records.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from minimind_data.chat.encoding import ChatEncoding
from minimind_data.chat.messages import BadConversationError
from minimind_data.inputs.base import RecordReader, Split
from minimind_data.inputs.blocks import BadRecord, Block, ConversationCollector
from minimind_data.inputs.delimited import BYTE_ORDER_MARK, Delimited, DelimitedReader
from minimind_data.inputs.lines import LINE_FEED
from minimind_data.inputs.spec import RecordSpec, lone_surrogate, no_utf8, reason, text_getter

CSV_REMEDY = "CSV, not one JSON object a line; write its rows as objects, as pandas' to_json(orient='records', lines=True) does"
_ONE_A_LINE = "write one record a line"


class JsonLines(Delimited):
    """JSON lines."""

    ends = LINE_FEED

    def reader(self, split: Split, chat: ChatEncoding | None = None) -> RecordReader:
        """See `Form.reader`."""
        return JsonTexts(split, self._spec) if chat is None else JsonConversations(split, self._spec, chat)

    def sample(self, split: Split, num_bytes: int) -> Split:
        """See `Form.sample`."""
        if split.source.compression is not None:
            return split
        return replace(split, stop=min(split.stop, split.start + num_bytes))


def why_no_lines(head: bytes) -> str | None:
    """Say why a file that begins so holds no JSON lines, or None: one JSON array, or CSV, or lines that end as those of old Macs."""
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    line, _, more = text.partition(b"\n")
    if line.startswith(b"[") and _is_array_of_objects(line):
        return "one JSON array, not one record a line; rewrite it, as with `jq -c '.[]'`"
    if b"\n" not in text and re.search(rb"\}\s*\r\s*\{", text):
        return "its lines end with a carriage return alone; convert it, as with `tr '\\r' '\\n'`"
    second = more.partition(b"\n")[0]
    if any(_looks_separated(line, second, mark) for mark in (b",", b"\t")):
        return CSV_REMEDY
    return None


def _is_array_of_objects(line: bytes) -> bool:
    """Tell whether a line begins an array that has objects in it, or that does not end there."""
    try:
        array = json.loads(line)
    except (ValueError, RecursionError):
        return line[1:].lstrip()[:1] in (b"", b"{")
    return isinstance(array, list) and bool(array) and isinstance(array[0], dict)


def _looks_separated(first: bytes, second: bytes, mark: bytes) -> bool:
    """Tell whether two lines look like the head and a row of a table with this mark between its columns."""
    if b"{" in first + second or first.startswith(b"["):
        return False
    return mark in first and mark in second


class JsonTexts(DelimitedReader):
    """The texts in them."""

    def __init__(self, split: Split, spec: RecordSpec) -> None:
        super().__init__(split, spec, LINE_FEED)

    _long_remedy = _ONE_A_LINE

    def _block(self, first: int, records: list[bytes], num_bytes: int) -> Block:
        get_text = text_getter(self._spec)
        max_word_chars = self._spec.max_word_chars
        num_fields = len(self._spec.fields)
        texts: list[str] = []
        bad: list[BadRecord] = []
        empty_texts = 0
        shapes: dict[tuple[str, ...], int] = {}
        for number, line in enumerate(records, first):
            try:
                record = orjson.loads(line)
                text = get_text(record)
            except (ValueError, LookupError, TypeError):
                text = None
            if not isinstance(text, str) or len(text) > max_word_chars:
                if not line.strip():
                    continue
                try:
                    record, text = _slowly_read(line, self._spec, is_cut=self._is_cut(number))
                except _BadLineError as error:
                    bad.append(BadRecord(line=number, reason=str(error), data=line.rstrip(b"\r")))
                    continue
            if text:
                texts.append(text)
            else:
                empty_texts += 1
            if len(record) > num_fields:
                shape = tuple(record)
                shapes[shape] = shapes.get(shape, 0) + 1
        return Block(
            texts=texts,
            empty_texts=empty_texts,
            bad=bad,
            num_bytes=num_bytes,
            unread=self._unread(shapes),
        )

    def _unread(self, shapes: Mapping[tuple[str, ...], int]) -> Counter[str]:
        """Count the fields that make no text, of records by the names of their fields."""
        unread: Counter[str] = Counter()
        for names, count in shapes.items():
            unread.update(dict.fromkeys(self._spec.unread(names), count))
        return unread


class JsonConversations(DelimitedReader):
    """The conversations in them, or pairs of conversations."""

    def __init__(self, split: Split, spec: RecordSpec, chat: ChatEncoding) -> None:
        super().__init__(split, spec, LINE_FEED)
        self._conversations = ConversationCollector(spec, chat)

    _long_remedy = _ONE_A_LINE

    def _block(self, first: int, records: list[bytes], num_bytes: int) -> Block:
        for number, line in enumerate(records, first):
            if line.strip():
                self._conversations.add(
                    number,
                    functools.partial(_parsed, line, is_cut=self._is_cut(number)),
                    functools.partial(line.rstrip, b"\r"),
                )
        return self._conversations.take(num_bytes)


class _BadLineError(Exception):
    """A line makes no document; the message says why and, after a semicolon, what to do."""


def _parsed(line: bytes, *, is_cut: bool) -> Any:
    """Return what a line of JSON holds; also if that is NaN or half a surrogate pair, which Python writes, somewhere in it.

    Raises:
        BadConversationError: it is no JSON.
    """
    try:
        return orjson.loads(line)
    except ValueError:
        pass
    if (why := no_utf8(line, "line")) is not None:
        raise BadConversationError(_CUT if is_cut and _ends_in_a_character(line) else why)
    if _depth(line) > _MAX_DEPTH:
        raise BadConversationError("not JSON that can be read (nested too deep); write it flatter")
    try:
        return json.loads(line.decode())
    except ValueError:
        pass
    try:
        orjson.loads(line.rstrip())  # so that its columns are this line's
    except orjson.JSONDecodeError as error:
        if is_cut and error.pos >= len(line.rstrip().decode()):
            raise BadConversationError(_CUT) from None
        raise BadConversationError(
            f"not JSON ({error.msg.rstrip('.')}, column {error.colno}); mend or remove the line"
        ) from None
    raise AssertionError("one parser takes what the other refuses")


_CUT = "not JSON: the file ends in the middle of this line; is the download complete?"


# Python's parser goes as deep as its stack has room, which must not decide what is read; orjson goes to 1024.
_MAX_DEPTH = 500
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')


def _depth(line: bytes) -> int:
    """Return how deep the lists and objects of a line are nested."""
    depth = deepest = 0
    for sign in re.findall(rb"[\[\]{}]", _STRING.sub(b"", line)):
        depth += 1 if sign in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _ends_in_a_character(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def _slowly_read(line: bytes, spec: RecordSpec, *, is_cut: bool) -> tuple[dict[str, Any], str]:
    """Return (the record of a line that the quick way does not take, its text).

    Raises:
        _BadLineError: it makes no document.
    """
    try:
        record = _parsed(line, is_cut=is_cut)
    except BadConversationError as error:
        raise _BadLineError(str(error)) from None
    try:
        text = text_getter(spec)(record)
    except (LookupError, TypeError):
        text = None
    if isinstance(text, str) and (why := lone_surrogate(text, "the text")) is not None:
        raise _BadLineError(why)
    if (why := reason(record, text, spec)) is not None:
        raise _BadLineError(why)
    return record, text

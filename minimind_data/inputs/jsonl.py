"""JSON lines: one record a line, a text or a conversation in each.

A record that cannot be used becomes a `BadRecord` with its number and its reason: nothing is coerced, dropped or repaired in
silence. Lines of white space are no records.
"""

import functools
import json
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import orjson

from minimind_data.chat.conversations import BadConversationError
from minimind_data.chat.encoding import ChatEncoding
from minimind_data.inputs.base import RecordReader, Split
from minimind_data.inputs.blocks import BadRecord, Block, ConversationCollector
from minimind_data.inputs.delimited import BYTE_ORDER_MARK, Delimited, DelimitedReader
from minimind_data.inputs.lines import LINE_FEED
from minimind_data.inputs.spec import RecordSpec, no_utf8, reason, text_getter


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
    """Say why a file that begins so holds no JSON lines, or None: one JSON array, as many tools write it."""
    line = head.removeprefix(BYTE_ORDER_MARK).lstrip().split(b"\n")[0]
    if not line.startswith(b"[") or _is_json(line):
        return None
    return "one JSON array, not one record a line; rewrite it, as with `jq -c '.[]'`"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


class JsonTexts(DelimitedReader):
    """The texts in them."""

    def __init__(self, split: Split, spec: RecordSpec) -> None:
        super().__init__(split, spec, LINE_FEED)

    def blocks(self) -> Generator[Block, None, None]:
        """Yield the texts; see `RecordReader`."""
        get_text = text_getter(self._spec)
        max_word_chars = self._spec.max_word_chars
        for first, lines, num_bytes in self._records():
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


class JsonConversations(DelimitedReader):
    """The conversations in them, or pairs of conversations."""

    def __init__(self, split: Split, spec: RecordSpec, chat: ChatEncoding) -> None:
        super().__init__(split, spec, LINE_FEED)
        self._conversations = ConversationCollector(spec, chat)

    def blocks(self) -> Generator[Block, None, None]:
        """Yield the conversations as texts; see `RecordReader`."""
        for first, lines, num_bytes in self._records():
            for number, line in enumerate(lines, first):
                if line.strip():
                    self._conversations.add(
                        number, functools.partial(_parsed, line), functools.partial(line.rstrip, b"\r")
                    )
            yield self._conversations.take(num_bytes)


def _parsed(line: bytes) -> object:
    try:
        return orjson.loads(line)
    except ValueError:
        raise BadConversationError(_why_no_json(line)) from None


def _why_no_json(line: bytes) -> str | None:
    """Say why a line is no JSON, or None where it is."""
    if (why := no_utf8(line, "line")) is not None:
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

"""The text of a record: one field, a field inside a field, or several joined by a template.

Nothing is coerced: a number, a null or a list where a string should be makes a bad record, with a reason that names the field.
"""

import codecs
import json
import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from minimind_data.chat.conversations import MESSAGES_FIELDS, holds_messages, kind_shown_by
from minimind_data.options import KnowsPassed
from minimind_data.reporting import kind_of

_GB2312_PAIR = re.compile(rb"[\xa1-\xfe]{2}")
_LOOKED_AT = 4096
_WORD = re.compile(r"[^\W\d_]+|\d+|\s+|[^\w\s]+|_+")


@dataclass(frozen=True, kw_only=True)
class RecordSpec(KnowsPassed):
    """What makes a document out of a record, or out of plain text."""

    field: Annotated[str, "Field of a record that holds the text; a.b is field b inside a."] = "text"
    template: Annotated[
        str | None,
        "Join several fields instead, such as '{question} {answer.text}'; a doubled brace stands "
        "for a brace.",
    ] = None
    separator: Annotated[
        str | None,
        "Text between two documents of a plain text file (\\n is a line feed); without it, a file is "
        "one document.",
    ] = None
    max_word_chars: Annotated[
        int, "Maximum characters without a word break in a text; a text with more is a bad record."
    ] = 1_000_000

    def __post_init__(self) -> None:
        if self.max_word_chars < 1:
            raise ValueError(f"`max_word_chars` must be at least 1, not {self.max_word_chars}")
        if self.separator == "":
            raise ValueError("`separator` must not be empty; leave it out where each file is one document")
        if self.template is not None:
            if self.field != "text":
                raise ValueError("`template` and `field` exclude each other: the template names its fields")
            if not template_fields(self.template):
                raise ValueError(
                    f"`template` {self.template!r} names no field; write one like '{{question}} {{answer}}'"
                )

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that the text is made of."""
        return (self.field,) if self.template is None else template_fields(self.template)

    def unread(self, names: Iterable[str]) -> list[str]:
        """Return those of the names of a record's fields that the text is not made of."""
        read = {*self.fields, *(field.partition(".")[0] for field in self.fields)}
        return [name for name in names if name not in read]

    @property
    def separator_bytes(self) -> bytes | None:
        r"""The separator in UTF-8, with a line feed for \n and so on."""
        if self.separator is None:
            return None
        escapes = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}
        return re.sub(r"\\[ntr\\]", lambda escape: escapes[escape[0]], self.separator).encode()


def template_fields(template: str) -> tuple[str, ...]:
    """Return the fields that a template names.

    Raises:
        ValueError: the template is malformed.
    """
    names = []
    for _, name, form, conversion in _parse(template):
        if name is None:
            continue
        if not name or form or conversion:
            raise ValueError(
                f"`template` {template!r}: between braces stands a field's name and nothing else"
            )
        names.append(name)
    return tuple(names)


def _parse(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"`template` {template!r}: {error}; write literal braces doubled") from None


def text_getter(spec: RecordSpec) -> Callable[[Any], Any]:
    """Return a function from a record to its text.

    Where a field is missing or is no string, the function returns None or what is there, or raises LookupError or TypeError; `reason`
    then says what is wrong.
    """
    if spec.template is None:
        return _getter(spec.field)
    parts = [(literal, name and _getter(name)) for literal, name, _, _ in _parse(spec.template)]

    def join(record: Any) -> str | None:
        texts: list[str] = []
        for literal, get in parts:
            texts.append(literal)
            if get:
                value = get(record)
                if not isinstance(value, str):
                    return None
                texts.append(value)
        return "".join(texts)

    return join


def _getter(field: str) -> Callable[[Any], Any]:
    if "." not in field:
        return lambda record: record[field]
    steps = field.split(".")

    def get(record: Any) -> Any:
        if isinstance(record, Mapping) and field in record:  # a name with a dot in it
            return record[field]
        for step in steps:
            record = record[step]
        return record

    return get


def reason(
    record: object, text: object, spec: RecordSpec, remedy: str = "name the field of the text with `field`"
) -> str | None:
    """Say why a record makes no document and, after a semicolon, what to do; None if it makes one.

    Args:
        record: as it was parsed.
        text: what the function from `text_getter` returned for it; None if that raised.
        spec: what makes a text of it.
        remedy: what to do about a field that is missing or no string.
    """
    if not isinstance(record, Mapping):
        example = json.dumps(spec.fields[0], ensure_ascii=False)
        return f"the record is {kind_of(record)}, not an object; write it as {{{example}: …}}"
    if spec.template is not None:
        remedy = "mend the record or `template`"
    for field in spec.fields:
        try:
            value = _getter(field)(record)
        except (LookupError, TypeError):
            names = ", ".join(str(name) for name in list(record)[:5]) or "none at all"
            return f"no field {field!r} (its fields: {names}); {remedy}{kind_hint(map(str, record))}"
        if not isinstance(value, str):
            hint = (
                MESSAGES_HINT
                if field not in MESSAGES_FIELDS and holds_messages(value)
                else kind_hint(map(str, record))
            )
            return f"field {field!r} is {kind_of(value)}, not a string; {remedy}{hint}"
    assert isinstance(text, str)
    return long_word(text, spec.max_word_chars)


_KIND_HINT = ", or let `kind` {} read such records"
MESSAGES_HINT = ", or rename it to 'messages' and let `kind` sft read such records"
"""What to do about a text that is a list of messages."""


def kind_hint(names: Iterable[str]) -> str:
    """Return what else to do about records whose fields show that they are no texts; empty where they do not."""
    names = list(names)
    shown = kind_shown_by(names)
    return "" if shown is None else _KIND_HINT.format(shown)


def long_word(text: str, max_word_chars: int) -> str | None:
    """Say that a run of letters, of digits, of signs or of white space in a text is longer than allowed; None if none is."""
    if len(text) <= max_word_chars:
        return None
    longest = max((match.end() - match.start() for match in _WORD.finditer(text)), default=0)
    if longest <= max_word_chars:
        return None
    return f"one word of {longest:,} characters, the longest allowed has {max_word_chars:,}; break it up, or raise `max_word_chars`"


def no_utf8(data: bytes, what: str) -> str | None:
    """Say that bytes are no UTF-8, or None if they are; `what` says of what, such as a line."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        how = ", as with `iconv -f GB18030 -t UTF-8`" if _is_gb18030(data[error.start :][:_LOOKED_AT]) else ""
        return f"byte {error.start + 1} of the {what} (0x{data[error.start]:02x}) is no UTF-8; convert the file to UTF-8{how}"
    return None


def _is_gb18030(data: bytes) -> bool:
    """Tell whether bytes that are no UTF-8 are most likely Chinese in GB18030, GBK or GB2312: most high bytes stand in pairs."""
    try:
        codecs.getincrementaldecoder("gb18030")().decode(data)  # its end may be in the middle of a character
    except UnicodeDecodeError:
        return False
    num_high = sum(byte > 127 for byte in data)
    return 2 * 2 * len(_GB2312_PAIR.findall(data)) > num_high > 1


def lone_surrogate(text: str, what: str) -> str | None:
    """Say that half a surrogate pair stands in a text, or None if none does; `what` names the text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"a lone surrogate escape (column {error.start + 1} of {what}), which is no character; remove it"
        )
    return None

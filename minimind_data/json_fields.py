"""Dataclasses out of JSON that nobody vouches for: every value is held against the annotation of its field before anything uses it.

A field's type says what JSON may hold there, and `Annotated` says more: a `Rule` that its values must keep, the `Key` by which JSON
calls it, or `BESIDE` where the fields of an inner dataclass stand beside the others rather than in an object of their own:

    name: FileName
    position: Annotated[Count, Key("cursor")]
    written: Annotated[WrittenShard, BESIDE]

A checksum says that a file is what somebody wrote, not that a program of ours wrote it: a dataset that was downloaded can say
anything, and a name in it must not lead out of its folder, nor a number beyond what can be counted.
"""

import functools
import math
import os
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_T = TypeVar("_T")


class FieldError(ValueError):
    """A value is not what the annotation of its field says; `str(error)` is a clause that names both.

    Attributes:
        wanted: the values that are allowed, in words; None where the error is about something else.
    """

    wanted: str | None = None


def _unfit(value: object, where: str, wanted: str) -> FieldError:
    """Return the error for a value where others are wanted."""
    error = FieldError(f"{where} is {shown(value)}, where {wanted} is wanted")
    error.wanted = wanted
    return error


@dataclass(frozen=True)
class Rule:
    """What the values of a field must keep besides their type.

    Args:
        wording: the values that keep it, as the error names them.
        holds: tells whether a value of the right type keeps it.
    """

    wording: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Key:
    """The name of a field in JSON, where it has another there."""

    name: str


BESIDE: Final = object()
"""Marks a field that is a dataclass whose own fields stand in JSON beside those of the dataclass that has it."""

MAX_COUNT = 2**53 - 1
"""The most that is counted: what every reader of JSON can tell apart, and eight thousand terabytes."""

_MAX_NAME_BYTES = 250  # of the 255 that file systems take; a suffix may follow
_NOT_IN_NAMES = re.compile(r"[/\\\x00-\x1f\x7f]")


def is_file_name(name: str) -> bool:
    """Tell whether a text names a file in a folder, and cannot lead anywhere else."""
    try:
        num_bytes = len(os.fsencode(name))
    except UnicodeEncodeError:
        return False
    return name not in ("", ".", "..") and num_bytes <= _MAX_NAME_BYTES and not _NOT_IN_NAMES.search(name)


def is_path(text: str) -> bool:
    """Tell whether the system can be asked for a path: it is not empty, has no null character, and its characters are some."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return bool(text) and "\0" not in text


def as_file_name(text: str) -> str:
    """Return the text with `_` for what names of files do not have here."""
    return _NOT_IN_NAMES.sub("_", text)


def is_finite(value: object) -> bool:
    """Tell whether no number in a value of JSON, at any depth, is infinite or none at all."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list):
        return all(map(is_finite, value))
    return math.isfinite(value) if isinstance(value, float) else True


Count = Annotated[
    int, Rule(f"a whole number from 0 to {MAX_COUNT:,}", lambda number: 0 <= number <= MAX_COUNT)
]
FileName = Annotated[
    str, Rule("the name of a file in the folder, without separators or control characters", is_file_name)
]
Digest = Annotated[
    str,
    Rule("a SHA-256 in hexadecimal, or nothing", lambda text: not text or re.fullmatch("[0-9a-f]{64}", text)),
]
PathText = Annotated[str, Rule("a path or a URI", is_path)]
FiniteJson = Annotated[Any, Rule("a value of finite numbers", is_finite)]

_Reader = Callable[[Any, str], Any]
"""Turns a value of JSON into that of a field, or raises FieldError; the text says where in the file it stands."""


def read_fields(cls: type[_T], content: object, *, ignore_unknown: bool = False) -> _T:
    """Make a dataclass of an object of JSON.

    Args:
        cls: the dataclass; its fields are of JSON's types, of literals, of tuples and dictionaries of these, or dataclasses in turn.
        content: what was parsed.
        ignore_unknown: leave out what is no field rather than refuse it.

    Raises:
        FieldError: a value is of another type or out of its range, a field is missing, or one is unknown; the clause says which.
    """
    if not isinstance(content, dict):
        raise FieldError(f"{shown(content)} stands where an object is wanted")
    rest = dict(content)
    result = _take(cls, rest, "")
    if rest and not ignore_unknown:
        raise FieldError(f"{shown(next(iter(rest)))} is no field that is known")
    return result


def read_value(kind: Any, value: object, where: str) -> Any:
    """Return a value of JSON as a field of some type has it.

    Args:
        kind: the annotation of the field.
        value: what was parsed.
        where: what the error calls the field.

    Raises:
        FieldError: it is of another type, or out of its range.
    """
    return _reader_of(kind)(value, where)


def _take(cls: type[_T], rest: dict[str, Any], where: str) -> _T:
    """Make a dataclass of those of the keys that are its fields, and remove them from `rest`."""
    values: dict[str, Any] = {}
    for name, key, read, inner, is_required in _plan_of(cls):  # type: ignore[arg-type]
        if inner is not None:
            values[name] = _take(inner, rest, where)
        elif key in rest:
            values[name] = read(rest.pop(key), f"{where}{key}")
        elif is_required:
            raise FieldError(f"{where}{key} is missing")
    return cls(**values)


@functools.cache
def _plan_of(cls: type) -> tuple[tuple[str, str, _Reader, type | None, bool], ...]:
    """Return (name, key in JSON, reader, the dataclass whose fields stand beside the others or None, no default) of each field."""
    hints = get_type_hints(cls, include_extras=True)
    plan = []
    for field in fields(cls):
        kind = hints[field.name]
        extras: tuple[Any, ...] = ()
        if get_origin(kind) is Annotated:
            _, *more = get_args(kind)
            extras = tuple(more)
        inner = get_args(kind)[0] if BESIDE in extras else None
        key = next((extra.name for extra in extras if isinstance(extra, Key)), field.name)
        is_required = field.default is MISSING and field.default_factory is MISSING
        plan.append((field.name, key, _reader_of(kind), inner, is_required))
    return tuple(plan)


@functools.cache
def _reader_of(kind: Any) -> _Reader:
    """Return the reader of values of a type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _ruled(_reader_of(arguments[0]), [rule for rule in arguments[1:] if isinstance(rule, Rule)])
    if origin in (Union, types.UnionType):
        readers = [_reader_of(argument) for argument in arguments if argument is not types.NoneType]
        return _any_of(readers, takes_none=types.NoneType in arguments)
    if origin is Literal:
        return _one_of(arguments)
    if origin is tuple:
        if len(arguments) != 2 or arguments[1] is not Ellipsis:
            raise TypeError(f"no reader for {kind}")
        return _tuple_of(_reader_of(arguments[0]))
    if origin in (dict, Mapping):
        return _dict_of(_reader_of(arguments[0]), _reader_of(arguments[1]))
    if isinstance(kind, type) and is_dataclass(kind):
        return _dataclass_of(kind)
    if kind is Path:
        read_text = _plain(str)
        return lambda value, where: Path(read_text(value, where))
    if kind is Any:
        return lambda value, where: value  # noqa: ARG005 - as readers are called
    return _plain(kind)


_TITLES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def _plain(kind: type) -> _Reader:
    types_taken = (int, float) if kind is float else (kind,)

    def read(value: Any, where: str) -> Any:
        if type(value) not in types_taken or (kind is float and not _is_finite_float(value)):
            raise _unfit(value, where, _TITLES[kind])
        return value

    return read


def _is_finite_float(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond all floats
        return False


def _any_of(readers: list[_Reader], *, takes_none: bool) -> _Reader:
    def read(value: Any, where: str) -> Any:
        if value is None and takes_none:
            return None
        errors = []
        for read_one in readers:
            try:
                return read_one(value, where)
            except FieldError as error:
                errors.append(error)
        for refusal in errors:
            if len(errors) == 1 or refusal.wanted is None or not str(refusal).startswith(f"{where} is "):
                raise refusal  # also where it is about a value inside of a list or an object
        raise _unfit(value, where, " or ".join(each.wanted for each in errors if each.wanted))

    return read


def _ruled(read: _Reader, rules: list[Rule]) -> _Reader:
    def read_ruled(value: Any, where: str) -> Any:
        value = read(value, where)
        for rule in rules:
            if not rule.holds(value):
                raise _unfit(value, where, rule.wording)
        return value

    return read_ruled if rules else read


def _one_of(values: tuple[Any, ...]) -> _Reader:
    def read(value: Any, where: str) -> Any:
        if not any(type(value) is type(known) and value == known for known in values):
            raise _unfit(value, where, " or ".join(map(str, values)))
        return value

    return read


def _tuple_of(read_each: _Reader) -> _Reader:
    def read(value: Any, where: str) -> Any:
        values = _plain(list)(value, where)
        return tuple(read_each(each, f"{where}[{index}]") for index, each in enumerate(values))

    return read


def _dict_of(read_key: _Reader, read_each: _Reader) -> _Reader:
    def read(value: Any, where: str) -> Any:
        values = _plain(dict)(value, where)
        return {
            read_key(key, f"a key of {where}"): read_each(each, f"{where}[{shown(key)}]")
            for key, each in values.items()
        }

    return read


def _dataclass_of(kind: type) -> _Reader:
    def read(value: Any, where: str) -> Any:
        rest = dict(_plain(dict)(value, where))
        result: Any = _take(kind, rest, f"{where}.")
        if rest:
            raise FieldError(f"{where} has {shown(next(iter(rest)))}, which is no field that is known")
        return result

    return read


def shown(value: object) -> str:
    """Return a value of JSON as a message shows it, in a few characters and in printable ones."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"

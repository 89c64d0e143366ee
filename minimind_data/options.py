"""How an option is declared: once, in the frozen dataclass that reads it.

A field's help, and its parser where the type alone does not say how to read a flag, stand in its annotation:

    split_bytes: Annotated[int, "Bytes of input that make one shard.", parse_size] = 64 * 2**20

The command line makes its flags from these dataclasses, so a default or a help text is never written twice.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_T = TypeVar("_T")

_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str | int) -> int:
    """Read a number of bytes such as `64MiB`, `1.5GB` or `4096`.

    Raises:
        ValueError: the text is no size; the message says what one looks like.
    """
    written = str(text).strip().lower()
    digits = written.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = written[len(digits) :].strip()
    try:
        return int(float(digits) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"{text!r} is no size; write one like 64MiB, 1.5GB or 4096") from None


def format_size(size: int) -> str:
    """Write a number of bytes as `parse_size` reads it: 64MiB where it comes out even, else plain bytes."""
    for unit, worth in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size and size % worth == 0:
            return f"{size // worth}{unit}"
    return str(size)


def check_limits(options: object, limits: Mapping[str, tuple[float, float]]) -> None:
    """Check options against the least and the most that each may be; None is let through.

    Args:
        options: a dataclass of options.
        limits: by the name of the option, (least, most), both allowed.

    Raises:
        ValueError: one is outside; the message says the limits and the value.
    """
    for name, (least, most) in limits.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"`{name}` must be from {least} to {most}, not {value}")


def as_paths(options: object, *names: str) -> None:
    """Turn strings among these options, of a frozen dataclass that is being made, into paths."""
    for name in names:
        if isinstance(value := getattr(options, name), str):
            object.__setattr__(options, name, Path(value))


def leaves(cls: type, defaults: object = None, *, flags_only: bool = True) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, annotation with extras, default) for the options of a dataclass, nested dataclasses flattened.

    With `flags_only`, those alone that the user writes.
    Defaults are those of `defaults`, an instance; without one, those of the fields. Where a dataclass composes another by a
    factory, what the factory makes has the say, so that one set of options can have other defaults in another place.
    """
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        kind = hints[field.name]
        if is_dataclass(kind):
            assert isinstance(kind, type)
            made = None if field.default_factory is MISSING else field.default_factory()
            yield from leaves(
                kind, made if defaults is None else getattr(defaults, field.name), flags_only=flags_only
            )
        elif field.metadata.get("flag", True) or not flags_only:
            yield field.name, kind, field.default if defaults is None else getattr(defaults, field.name)


def options_from(cls: type[_T], values: dict[str, Any], defaults: _T | None = None) -> _T:
    """Make `cls` from flat option values, filling nested dataclasses; names that it does not know are left alone.

    What `values` leaves out is as in `defaults`, by default as in what the factories of `cls` make.
    """
    hints = get_type_hints(cls)
    made: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        kind = hints[field.name]
        if is_dataclass(kind):
            assert isinstance(kind, type)
            inner = None if field.default_factory is MISSING else field.default_factory()
            made[field.name] = options_from(
                kind, values, inner if defaults is None else getattr(defaults, field.name)
            )
        elif field.name in values:
            made[field.name] = values[field.name]
    return cls(**made) if defaults is None else replace(defaults, **made)  # type: ignore[type-var]


def flatten(options: "DataclassInstance") -> dict[str, Any]:
    """Return every option of a dataclass by its flat name: the inverse of `build`."""
    flat: dict[str, Any] = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            flat |= flatten(value)
        else:
            flat[field.name] = value
    return flat


def differences(there: dict[str, Any], here: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Say, for each of `names` in which two sets of options differ, what stands on either side."""
    return [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in names
        if there.get(name) != here.get(name)
    ]

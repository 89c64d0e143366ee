"""How an option is declared: once, as a field of the frozen dataclass that uses it.

The help of an option is in the annotation of its field, and so is its parser, where the type alone does not say how to read a flag:

    split_bytes: Annotated[int, "Bytes of input that make one shard.", parse_size] = 64 * 2**20

The command line makes its flags from these dataclasses, so defaults and help texts are written once.

A dataclass that is `KnowsPassed` can tell the options that its caller passed from those that have their defaults.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, get_type_hints

from minimind_data.errors import UserError
from minimind_data.json_fields import read_value

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_T = TypeVar("_T")


class KnowsPassed:
    """A dataclass of options that knows which of them its caller passed, and which have their defaults because he said nothing.

    Two of them are equal if their options are, passed or not. `dataclasses.replace` passes all of them.
    """

    _passed: frozenset[str] = frozenset()

    def __new__(cls, **options: object) -> Self:
        """Note the names of the options."""
        self = super().__new__(cls)
        object.__setattr__(self, "_passed", frozenset(options))
        return self


def names_passed(options: KnowsPassed) -> frozenset[str]:
    """Return the flat names of the options that were passed to a dataclass and to the dataclasses nested in it."""
    names: set[str] = set()
    for field in fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name)
        if isinstance(value, KnowsPassed):
            names |= names_passed(value)
        elif field.name in options._passed:  # noqa: SLF001 - of the same module
            names.add(field.name)
    return frozenset(names)


_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str | int) -> int:
    """Read a number of bytes such as `64MiB`, `1.5GB` or `4096`.

    Raises:
        ValueError: the text is not a size; the message shows what one looks like.
    """
    size = str(text).strip().lower()
    digits = size.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = size[len(digits) :].strip()
    try:
        return int(float(digits) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size; write one like 64MiB, 1.5GB or 4096") from None


def format_size(size: int) -> str:
    """Write a number of bytes as `parse_size` reads it: with a unit, such as 64MiB, where that is exact, else plain bytes."""
    for unit, num_bytes in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size and size % num_bytes == 0:
            return f"{size // num_bytes}{unit}"
    return str(size)


def check_limits(options: object, limits: Mapping[str, tuple[float, float]]) -> None:
    """Check options against the least and the greatest value that each may have; None is allowed.

    Args:
        options: a dataclass of options.
        limits: for each of them by name, (least, greatest) value, both allowed.

    Raises:
        ValueError: an option is outside its limits; the message gives both and the value.
    """
    for name, (least, most) in limits.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"`{name}` must be from {least} to {most}, not {value}")


def as_paths(options: object, *names: str) -> None:
    """Turn those of these options that are strings into paths; for the `__post_init__` of a frozen dataclass."""
    for name in names:
        if isinstance(value := getattr(options, name), str):
            object.__setattr__(options, name, Path(value))


def leaves(cls: type, defaults: object = None, *, flags_only: bool = True) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, annotation with extras, default) for each option of a dataclass and of the dataclasses nested in it.

    Args:
        cls: the dataclass.
        defaults: an instance whose values are the defaults; without one they are the fields' own. Where a nested dataclass has a
            factory, its defaults are those of what the factory makes, so the same options can have other defaults in another place.
        flags_only: leave out the options that have no flag.
    """
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        kind = hints[field.name]
        if is_dataclass(kind):
            assert isinstance(kind, type)
            nested_defaults = _nested_defaults(field, defaults)
            yield from leaves(kind, nested_defaults, flags_only=flags_only)
        elif field.metadata.get("flag", True) or not flags_only:
            yield field.name, kind, field.default if defaults is None else getattr(defaults, field.name)


def options_from(cls: type[_T], values: dict[str, Any], defaults: _T | None = None) -> _T:
    """Make a dataclass of options, and the dataclasses nested in it, from the values of options by their flat names.

    Args:
        cls: the dataclass.
        values: the options; names that it does not have are ignored.
        defaults: an instance whose values hold for options that are not in `values`; without one, the defaults of `leaves` do.
    """
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        kind = hints[field.name]
        if is_dataclass(kind):
            assert isinstance(kind, type)
            arguments[field.name] = options_from(kind, values, _nested_defaults(field, defaults))
        elif field.name in values:
            arguments[field.name] = values[field.name]
    if defaults is None:
        return cls(**arguments)
    options = replace(defaults, **arguments)  # type: ignore[type-var]
    if isinstance(options, KnowsPassed) and isinstance(defaults, KnowsPassed):
        object.__setattr__(options, "_passed", defaults._passed | arguments.keys())  # noqa: SLF001 - of the same module
    return options


def options_in_file(cls: type[_T], values: Mapping[str, Any], path: Path, *, remedy: str | None = None) -> _T:
    """Make a dataclass of options as `options_from` does, of values that a JSON file holds: they may be anything.

    Args:
        cls: the dataclass.
        values: the options by their flat names, as JSON has them; names that it does not have are ignored.
        path: of the file.
        remedy: what the user can do if a value is not what its option takes.

    Raises:
        UserError: an option has a value of another type or out of its range; the message says which and where.
    """
    try:
        checked = {
            name: read_value(kind, values[name], name)
            for name, kind, _ in leaves(cls, flags_only=False)
            if name in values
        }
        _refuse_nul(checked)
        return options_from(cls, checked)
    except ValueError as error:
        why = str(error).replace("`", "")  # as the file calls its options
        raise UserError(f"edited or damaged ({why})", where=path, remedy=remedy) from None


def _refuse_nul(values: Mapping[str, Any]) -> None:
    """Refuse a NUL character in a text, which no path may have, with a ValueError."""
    for name, value in values.items():
        if "\0" in str(value):
            raise ValueError(f"{name} holds a NUL character")


def _nested_defaults(field: Field[Any], defaults: object) -> Any:
    """Return the defaults of the dataclass in a field: those in `defaults`, else what its factory makes, else None."""
    if defaults is not None:
        return getattr(defaults, field.name)
    return None if field.default_factory is MISSING else field.default_factory()


def flatten(options: "DataclassInstance") -> dict[str, Any]:
    """Return every option of a dataclass by its flat name: the inverse of `options_from`."""
    flat: dict[str, Any] = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            flat |= flatten(value)
        else:
            flat[field.name] = value
    return flat

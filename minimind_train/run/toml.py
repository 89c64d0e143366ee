"""The options of a run in a TOML file: `config` of a command, and the `run.toml` in each run folder that repeats the run.

    command = "pretrain"        # optional: the kind of training that this is for
    preset = "minimind-3"       # optional: see `presets`; other options here override it
    shards = "data"
    seq_len = 512

Names are those of the options, with `_` or `-`; there are no sections, as no name has two meanings. Paths are relative to the working
directory, as on the command line. Options on the command line override these. Where the file is the run.toml beside the record of a run,
the datasets and weights that it shares with the record are looked for as a resume looks for them, so it also works when both have moved.
"""

import difflib
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from minimind_data.errors import UserError
from minimind_data.json_fields import FieldError, read_value
from minimind_data.options import leaves
from minimind_train.model.presets import PRESETS
from minimind_train.progress import Say
from minimind_train.run.options import RunOptions, recorded
from minimind_train.run_folder.places import PLACES, with_present_places
from minimind_train.run_folder.record import DESCRIPTION_NAME, RUN_CONFIG_NAME, Change, RunRecord
from minimind_train.weights.options import NO_WEIGHTS

_COMMAND, _PRESET = "command", "preset"


def read_description(path: Path, command: str, names: Collection[str]) -> dict[str, Any]:
    """Return the options in a TOML file by name.

    Args:
        path: the file.
        command: the kind of training that they are for.
        names: of all options.

    Raises:
        ValueError: the file cannot be read, is of another kind of training, or has a name that is no option; the message is a
            sentence for the user.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, or nested too deeply
        raise ValueError(f"{path}: no TOML ({error}); see run.toml in the folder of any run") from None
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in {_COMMAND, _PRESET, *names}:
            raise ValueError(f"{path}: {_unknown(key, name, value, names)}")
        if name in options:
            raise ValueError(f"{path}: {name} stands there twice, with _ and with -; leave one out")
        options[name] = value
    if (command_there := options.pop(_COMMAND, command)) != command:
        raise ValueError(
            f"{path}: is for mm-train {command_there}, not {command}; call that, or change `command` there"
        )
    preset = options.pop(_PRESET, None)
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise ValueError(f"{path}: no preset {preset!r}; there are {', '.join(PRESETS)}")
    return (PRESETS[preset] if preset is not None else {}) | options


def typed_options(path: Path, options: Mapping[str, Any], kind: type[RunOptions]) -> dict[str, Any]:
    """Return options from a file as their types have them; texts are left as they are, to be read as flags are.

    Args:
        path: the file.
        options: what `read_description` returned.
        kind: the options of the phase.

    Raises:
        ValueError: a value is of another type; the message names it and the file.
    """
    values = dict(options)
    for name, annotation, _ in leaves(kind):
        value = values.get(name)
        if value is None or isinstance(value, str):
            continue
        if isinstance(value, float) and value.is_integer() and float not in _types_of(annotation):
            value = values[name] = int(value)  # TOML has 1e5 as a fraction
        is_list = get_origin(get_args(annotation)[0]) is tuple
        try:
            read_value(annotation, [value] if is_list and not isinstance(value, list) else value, name)
        except FieldError as error:
            raise ValueError(f"{path}: {error}") from None
    return values


def _types_of(annotation: Any) -> tuple[Any, ...]:
    """Return the types of which the value of an option may be one."""
    kind = get_args(annotation)[0]
    return get_args(kind) or (kind,)


def with_present_places_of_run(path: Path, options: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Return the options in a run.toml with the places where the datasets and weights of its run are now.

    Args:
        path: the file; where it is not beside the record of a run, nothing is looked for.
        options: what `read_description` returned.
        say: takes a line for each thing that is elsewhere than the file says.
    """
    run = path.parent
    if path.name != DESCRIPTION_NAME or not (run / RUN_CONFIG_NAME).is_file():
        return dict(options)
    try:
        record = RunRecord.read(run)
        names = [name for name in PLACES if name in options and options[name] == record.options.get(name)]
        present = with_present_places(record, run, say, names=names).options
    except UserError:
        return dict(options)  # the file says what it says, whatever the record has become
    return {**options, **{name: present[name] for name in names}}


def _unknown(key: str, name: str, value: Any, names: Collection[str]) -> str:
    if isinstance(value, dict):
        return f"[{key}] begins a section, and there are none: write its options above, by their own names"
    near = difflib.get_close_matches(name, sorted({*names, _PRESET}), n=1)
    return f"{key} is no option of a run; " + (
        f"did you mean {near[0]}?" if near else "see --help for their names"
    )


def describe(options: RunOptions, changes: Sequence[Change] = ()) -> str:
    """Return the TOML that repeats a run with these options, resolved; comments tell of `changes` during the run."""
    values = recorded(options)
    if values["layout"] != "pack":
        del values["long_documents"]  # it would do nothing, and so it is refused
    if values["from_weight"] is None and type(options)().start.from_weight is not None:
        values["from_weight"] = NO_WEIGHTS
    lines = [
        f"# Repeats this run: mm-train {options.command} --config run.toml --run NEW_FOLDER",
        *(
            f"# Not so from the beginning: {change.name} was {_toml(change.old)} up to step {change.step}."
            for change in changes
        ),
        f"{_COMMAND} = {_toml(options.command)}",
    ]
    for field in fields(options):
        lines += _section(getattr(options, field.name), values)
    return "\n".join(lines) + "\n"


def _section(part: Any, values: dict[str, Any]) -> list[str]:
    """Return the lines of one dataclass of options, headed by its docstring, and after them those of the dataclasses in it."""
    names = [
        field.name
        for field in fields(part)
        if field.metadata.get("flag", True) and values.get(field.name) is not None
    ]
    lines = [f"{name} = {_toml(values[name])}" for name in names]
    inner = (getattr(part, field.name) for field in fields(part))
    below = [line for each in inner if is_dataclass(each) for line in _section(each, values)]
    title = (part.__doc__ or "").partition("\n")[0]
    return (["", f"# {title}", *lines] if lines else []) + below


def _toml(value: Any) -> str:
    """Write a value as TOML does."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    text = "".join(_ESCAPES.get(character, character) for character in str(value))
    return f'"{text}"'


_ESCAPES = {chr(code): f"\\u{code:04x}" for code in (*range(32), 127)} | {'"': '\\"', "\\": "\\\\"}

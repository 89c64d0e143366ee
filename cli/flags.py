"""From parameters to flags: where the library says `seq_len`, a user of the command line reads --seq-len.

The library names its parameters in backticks and knows no flags. Here, and nowhere else, they become the flags of the running command, in
all that it prints: errors, notes, and the help of options that mention others.

    take a longer `seq_len`                        take a longer --seq-len
    `tokenize(['a.jsonl'], TokenizeOptions(out='b'))`   `mm-data tokenize a.jsonl --out b`
    go on with `resume` and `compile=False`        go on with --resume and --no-compile
    `resume('runs/it', {'skip_positions': ['3:4']})`    `mm-train pretrain --run runs/it --resume --skip-positions 3:4`

Anything else in backticks, such as a command or a name that is no parameter of a command, stays as it is.
"""

import ast
import re
import shlex
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from minimind_data.reporting import Say
from minimind_train.progress import say_on_stderr

_ELSEWHERE = {
    name: f"--{name.replace('_', '-')}"
    for name in ("kind", "layout", "long_documents", "resume", "run", "seq_len", "shards", "to", "tokenizer")
}
"""Flags of other commands that sentences of the running one may mention."""

_CALLS = {"locate": "mm-data locate --run {}", "resume": "mm-train {command} --run {} --resume"}
"""Functions whose calls the library's sentences mention, and the commands that do the same."""

_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What a command calls its parameters."""

    command: str = ""
    """Its name, such as `pretrain`."""
    on: Mapping[str, str] = field(default_factory=dict)
    """By the name of a parameter, its flag; of an argument, its name in the help."""
    off: Mapping[str, str] = field(default_factory=dict)
    """By the name of a switch, the flag that turns it off."""

    @classmethod
    def of(cls, command: Any) -> Self:
        """Return the flags of a typer command. A flag with another name than its parameter, as --resume, is known by both."""
        on, off = {}, {}
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                on[parameter.name] = parameter.metavar
                continue
            flag = max(parameter.opts, key=len)
            on |= {parameter.name: flag, flag.removeprefix("--").replace("-", "_"): flag}
            if parameter.secondary_opts:
                off[parameter.name] = parameter.secondary_opts[0]
        return cls(command=command.name, on=on, off=off)

    def __call__(self, sentence: str) -> str:
        """Return a sentence of the library with the command's flags."""
        return _CODE.sub(lambda code: self._translated(code[1]) or code[0], sentence)

    def _translated(self, code: str) -> str | None:
        try:
            (node,) = ast.parse(code).body
        except (SyntaxError, ValueError):  # not Python: a command, or a word in backticks
            return None
        match node:
            case ast.Expr(ast.Name(name)):
                return self.on.get(name) or _ELSEWHERE.get(name)
            case ast.Assign([ast.Name(name)], ast.Constant(False)):
                return self.off.get(name)
            case ast.Expr(ast.Call(ast.Name("tokenize"), [ast.List() as inputs, ast.Call() as options])):
                words = ["mm-data", "tokenize", *ast.literal_eval(inputs)]
                for option, value in _flat_keywords(options):
                    words += _as_flag(option, value)
                return f"`{shlex.join(words)}`"
            case ast.Expr(ast.Call(ast.Name(name), [ast.Constant(first), *options], keywords)) if (
                name in _CALLS
            ):
                words = [_CALLS[name].format(shlex.quote(str(first)), command=self.command)]
                values = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in keywords}
                for mapping in options:
                    values |= ast.literal_eval(mapping)
                for option, value in values.items():
                    many = value if isinstance(value, list) else [value]
                    words += [f"--{option.replace('_', '-')} {shlex.quote(str(one))}" for one in many]
                return f"`{' '.join(words)}`"
        return None


def _flat_keywords(call: ast.Call) -> Iterator[tuple[str, Any]]:
    """Yield the options that are passed to a dataclass of options, and to those nested in it."""
    for keyword in call.keywords:
        if isinstance(keyword.value, ast.Call):
            yield from _flat_keywords(keyword.value)
        else:
            yield keyword.arg or "", ast.literal_eval(keyword.value)


def _as_flag(option: str, value: Any) -> list[str]:
    """Return the words of a command line that pass an option."""
    flag = f"--{option.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, tuple):  # a slice, I/N
        value = "/".join(map(str, value))
    return [flag, str(value)]


_NO_COMMAND = Flags()
_running: ContextVar[Flags] = ContextVar("flags of the running command", default=_NO_COMMAND)


def use_flags_of(command: Any) -> None:
    """Use the flags of a typer command in the sentences of this process from here on."""
    _running.set(Flags.of(command))


def in_flags(sentence: object) -> str:
    """Return a sentence of the library, or an error, with the flags of the running command."""
    return _running.get()(str(sentence))


def say_in_flags() -> Say:
    """Return what prints a line of the library's on stderr as the running command says it; the ranks of a run get it too."""
    return partial(_say, _running.get())


def _say(flags: Flags, line: str) -> None:
    say_on_stderr(flags(line))

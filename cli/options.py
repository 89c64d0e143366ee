"""Commands from functions: a parameter that is a dataclass of options becomes one flag for each of its fields.

    @command(app)
    def tokenize(
        inputs: Annotated[list[str], typer.Argument()], options: TokenizeOptions, options_given: OptionsGiven
    ) -> None: ...

A parameter annotated `OptionsGiven` receives the names of the options that the user passed, as opposed to defaults. The wrapper
also turns a `UserError` into one sentence and exit status 1, and an interrupt into exit status 130.
"""

import contextlib
import functools
import importlib
import inspect
import io
import os
import signal
import sys
import threading
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, is_dataclass
from typing import Annotated, Any, ClassVar, NewType, NoReturn, TextIO, get_args, get_origin, get_type_hints

import typer
from tqdm import tqdm
from typer.completion import completion_init  # type: ignore[attr-defined] # typer itself imports it from there
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from minimind_data.errors import UserError
from minimind_data.files import MORE_FILES, is_out_of_files
from minimind_data.options import KnowsPassed, format_size, leaves, options_from, parse_size

from .entry import die_of_interrupts, importing
from .flags import Flags, in_flags, use_flags_of
from .minimind import translation, with_dashes

OptionsGiven = NewType("OptionsGiven", frozenset[str])


@dataclass(frozen=True)
class Changes:
    """Annotates a parameter that gets those options of a dataclass, by name, that the user passed: each is a flag without a default."""

    kind: type
    without: frozenset[str] = frozenset()
    """Options that are no flags."""

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """The flags."""
        return [
            _flag(name, annotation, None)
            for name, annotation, _ in leaves(self.kind)
            if name not in self.without
        ]


AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else.")
]

_CONTEXT = "typer_context"
_TYPED = "minimind_cli.typed"
_OPTIONAL_VALUES = {"--resume": ("always", "auto")}
"""Flags that may stand alone: what that means, and the value that may follow them."""

_USER_SOURCES = frozenset({"COMMANDLINE", "DEFAULT_MAP"})
"""The sources of options that the user passed, on the command line or in a preset or file named there."""


def make_app(help_text: str, modules: Mapping[str, str] | None = None) -> typer.Typer:
    """Return an application with plain help and plain tracebacks.

    Args:
        help_text: what it is for.
        modules: the modules beside this one whose functions are further commands, by the command's name. A module is imported when
            its command is asked for, so that the others start without it.

    Completion in a shell works without an installation: `eval "$(_MM_TRAIN_COMPLETE=source_bash mm-train)"`.
    """
    completion_init()  # `add_completion` would also add two flags to every help
    group = type("Group", (_Group,), {"modules": modules or {}})
    return typer.Typer(
        help=help_text,
        cls=group,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def command(
    app: typer.Typer, name: str | None = None, *, first: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command of `app`, with a flag for each field of its option dataclasses.

    Args:
        app: the application.
        name: of the command; the function's by default.
        first: parameters that come first in its help; the others follow in the order of the function.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        parameters = [inspect.Parameter(_CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        for parameter in inspect.signature(function).parameters.values():
            kind = hints[parameter.name]
            if is_dataclass(kind):
                assert isinstance(kind, type)
                parameters += [_flag(*leaf) for leaf in leaves(kind)]
            elif (changes := _changes_in(kind)) is not None:
                parameters += changes.parameters
            elif kind is not OptionsGiven:
                parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))

        rank = {name: number for number, name in enumerate((_CONTEXT, *first))}
        assert not rank.keys() - {parameter.name for parameter in parameters}
        parameters.sort(key=lambda parameter: rank.get(parameter.name, len(rank)))

        @functools.wraps(function)
        def run(**values: Any) -> None:
            context = values.pop(_CONTEXT)
            use_flags_of(context.command)
            arguments = {
                name: _argument(hints[name], name, values, context) for name in hints if name != "return"
            }
            with _ErrorBoundary():
                function(**arguments)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name, cls=_Command)(run)
        return function

    return register


def option_of(
    kind: type, name: str, *, default: str | None = None, note: str = "", **settings: Any
) -> typer.models.OptionInfo:
    """Return one option of a dataclass as a flag of a command that takes it without the others, with the same help.

    Args:
        kind: the dataclass.
        name: of its field.
        default: says in words what holds without the flag, where the parameter's own default does not.
        note: what the help adds for this command.
        settings: further ones of `typer.Option`.
    """
    (annotation,) = (annotation for each, annotation, _ in leaves(kind) if each == name)
    help_text = " ".join(filter(None, (_help_in(annotation), note)))
    if default is not None:
        help_text += f"  [default: {default}]"
        settings["show_default"] = False
    flag: typer.models.OptionInfo = typer.Option(help=help_text, **settings)
    return flag


def _help_in(annotation: Any) -> str:
    return next((extra for extra in get_args(annotation)[1:] if isinstance(extra, str)), "")


def refuse_idle(options_given: OptionsGiven, layout: str) -> None:
    """Refuse an option for layout `pack` with another layout, where it would do nothing.

    Raises:
        typer.BadParameter: the user passed it.
    """
    if "long_documents" in options_given and layout != "pack":
        raise typer.BadParameter(
            f"--long-documents is for --layout pack, in layout {layout} it does nothing; leave one of them out"
        )


def is_typed(flag: str, context: typer.Context) -> bool:
    """Tell whether a flag is on the command line, even while that is still being parsed."""
    return any(word.partition("=")[0] == flag for word in context.meta[_TYPED])


def as_defaults(options: Mapping[str, Any], context: typer.Context) -> dict[str, Any]:
    """Return options as defaults of a command line.

    Raises:
        typer.BadParameter: a value is a list or a boolean, and the option does not take that.
    """
    defaults = {}
    flags = {parameter.name: parameter for parameter in context.command.params}
    for name, value in options.items():
        flag: Any = flags[name]
        many = isinstance(value, list)
        if (many and not flag.multiple) or (isinstance(value, bool) and not flag.is_flag):
            raise typer.BadParameter(
                f"{name} takes no {'list' if many else 'true or false'}, but is {value!r}"
            )
        defaults[name] = [value] if flag.multiple and not many else value
    return defaults


class _Group(TyperGroup):
    """The commands of an application, of which some are imported when they are asked for.

    An interrupt before a command begins is said too, which typer itself would not do.
    """

    modules: ClassVar[Mapping[str, str]]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands({**self.commands, **self.modules})

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read what stands before the name of the command."""
        with _saying_interrupts():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Read the command line of the command, and run it."""
        with _saying_interrupts():
            return super().invoke(ctx)


class _Commands(UserDict[str, Any]):
    """Commands by name; a value that is the name of a module is replaced by its command where it is read."""

    def __getitem__(self, name: str) -> Any:
        if isinstance(module := self.data[name], str):
            app = make_app("")
            with importing():
                imported = importlib.import_module(f"{__package__}.{module}")
            command(app)(getattr(imported, name))
            self.data[name] = typer.main.get_command(app)
        return self.data[name]


@contextlib.contextmanager
def _saying_interrupts() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        _fail_interrupted(error)


def _fail_interrupted(error: KeyboardInterrupt) -> NoReturn:
    die_of_interrupts()  # a second one must not be shown as a traceback of what follows
    _fail(str(error) or "interrupted", 128 + signal.SIGINT)


class _Command(TyperCommand):
    """A command whose usage errors and help speak of flags, not of Python."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spoken = Flags.of(self)
        for parameter in self.params:
            if isinstance(parameter, TyperOption | TyperArgument) and parameter.help:
                parameter.help = spoken(parameter.help)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line."""
        flags = {flag for parameter in self.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        if (sentence := translation(str(self.name), args, flags)) is not None:
            ctx.fail(sentence)
        args = list(_with_values([with_dashes(word, flags) for word in args]))
        ctx.meta[_TYPED] = tuple(args)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")  # typer checks choices by pydantic
            raise


def _with_values(words: Sequence[str]) -> Iterator[str]:
    """Yield the words of a command line, in which each flag that may stand alone has a value."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in _OPTIONAL_VALUES:
            alone, value = _OPTIONAL_VALUES[word]
            word += f"={rest.pop(0) if rest[:1] == [value] else alone}"
        yield word


def _flag(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    extras = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    kind = get_args(annotation)[0] if extras else annotation
    parser = next((extra for extra in extras if callable(extra)), None)
    settings: dict[str, Any] = {"help": _help_in(annotation)}
    if parser:
        kind = str  # typer knows few types, and the parser may return any
        settings |= {
            "parser": plain(parser),
            "metavar": parser.__name__.removeprefix("parse_").upper(),
        }
    if get_origin(kind) is tuple:  # of any length: the flag is repeated
        item = get_args(kind)[0]
        kind, default = list[item], list(default)  # type: ignore[valid-type]
        settings["metavar"] = {str: "TEXT", int: "INT"}[item]
    if parser is parse_size and isinstance(default, int):
        default = format_size(default)  # as a user would write it
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[kind, typer.Option(**settings)],
    )


def plain(parser: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser whose error message is only its own sentence."""

    @functools.wraps(parser)
    def parse(text: str) -> Any:
        try:
            return parser(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parse


def _changes_in(kind: Any) -> Changes | None:
    return next((extra for extra in get_args(kind)[1:] if isinstance(extra, Changes)), None)


def _argument(kind: Any, name: str, values: dict[str, Any], context: typer.Context) -> Any:
    if kind is OptionsGiven:
        return frozenset(key for key in values if _is_passed(key, context))
    if (changes := _changes_in(kind)) is not None:
        names = [parameter.name for parameter in changes.parameters]
        return {name: values[name] for name in names if _is_passed(name, context)}
    if not is_dataclass(kind):
        return values[name]
    assert isinstance(kind, type)
    if issubclass(kind, KnowsPassed):
        values = {key: value for key, value in values.items() if _is_passed(key, context)}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        return options_from(kind, values)
    except ValueError as error:  # a value that the dataclass refuses is wrong usage
        raise typer.BadParameter(in_flags(error)) from None


def _is_passed(name: str, context: typer.Context) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name in _USER_SOURCES


class _ClosableStderr(io.TextIOBase):
    """stderr that may be closed: once nobody reads it, messages are dropped and the work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

    def write(self, text: str) -> int:
        """Write, or do nothing if the reader is gone."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing if the reader is gone."""
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        """Tell whether this is a terminal."""
        return not self._gone and self._stream.isatty()

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's encoding, which decides how a progress bar is drawn."""
        return self._stream.encoding

    def _try(self, action: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            action()
        except OSError:
            self._gone = True
            # What is buffered must not fail again when the interpreter ends.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class _ErrorBoundary:
    """Turns an error that a user can cause into one sentence on stderr and an exit status."""

    def __enter__(self) -> None:
        """Keep output from stopping the work: escape what a terminal cannot show, and let stderr be closed."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        if not isinstance(sys.stderr, _ClosableStderr):
            sys.stderr = _ClosableStderr(sys.stderr)
        # tqdm's own lock, made with its first line, is shared with other processes: that starts one, where Ctrl-C shows a traceback.
        tqdm.set_lock(threading.RLock())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, BrokenPipeError):  # as in `mm-data info | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0)
        if isinstance(error, UserError):
            _fail(in_flags(error), 1)
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            remedy = f"; {MORE_FILES}" if is_out_of_files(error) else ""
            _fail(f"{where}{error.strerror or error}{remedy}", 1)
        if isinstance(error, KeyboardInterrupt):
            _fail_interrupted(error)


def _fail(sentence: str, status: int) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    raise typer.Exit(status) from None

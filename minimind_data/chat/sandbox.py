"""Where chat templates run: Jinja's sandbox, in which they see plain JSON values, cannot reach Python, and are metered (`metering`)."""

import functools
import json
from collections.abc import Callable, Mapping
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from minimind_data.chat.metering import (
    ALLOWANCE,
    COMPARES,
    FREE_FILTERS,
    LEFT_OUT_FILTERS,
    LEFT_OUT_METHODS,
    LINEAR_METHODS,
    MAX_BITS,
    MAX_TEMPLATE_CHARS,
    METERS,
    PER_CHAR,
    PER_ITEM,
    TEXT_METHODS,
    Allowance,
    TooMuchWorkError,
    as_list,
    check_format,
    joined,
    metered_filter,
    metered_test,
    paid,
    pay_for_method,
    pay_for_output,
    with_meters,
)

SPAN_OPENS, SPAN_CLOSES = "\ufdd0", "\ufdd1"
"""Put around what a template marks by {% generation %}; noncharacters, which no text holds."""


def parse(text: str) -> nodes.Template:
    """Parse a template.

    Raises:
        jinja2.TemplateSyntaxError: it is none.
    """
    return _environment().parse(text)


@functools.lru_cache(maxsize=8)
def compiled(text: str, *, mark_generation: bool = False) -> jinja2.Template:
    """Return a template that can be rendered by `run`.

    Args:
        text: the template.
        mark_generation: put `SPAN_OPENS` and `SPAN_CLOSES` around what {% generation %} marks.

    Raises:
        jinja2.TemplateSyntaxError: it is none, or is too long.
        Exception: it is nested too deep, or of too many parts, for Python.
    """
    if len(text) > MAX_TEMPLATE_CHARS:
        raise jinja2.TemplateSyntaxError(f"it has more than {MAX_TEMPLATE_CHARS:,} characters", 1)
    environment = _environment(mark_generation=mark_generation)
    token = ALLOWANCE.set(Allowance())  # constant expressions are computed here
    try:
        tree = with_meters(environment.parse(text))
        tree.set_environment(environment)
        return environment.from_string(tree)
    finally:
        ALLOWANCE.reset(token)


def run(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """Render a template.

    Raises:
        TooMuchWorkError: it takes too much time or memory.
        Exception: it fails, in any way.
    """
    token = ALLOWANCE.set(Allowance((variables.get("messages"), variables.get("tools"))))
    try:
        return template.render(variables)
    finally:
        ALLOWANCE.reset(token)


_DICT_METHODS = frozenset(dir(dict))
_LOOP_VALUES = frozenset(("first", "last", "index", "index0", "length", "revindex", "revindex0"))
_MISSING = object()


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with meters."""

    intercepted_binops = frozenset(("*", "/", "//", "%", "**"))
    concat = staticmethod(joined)

    def getattr(self, obj: Any, attribute: str) -> Any:
        # Almost all that templates ask for, without the many checks of what else it could be.
        kind = type(obj)
        if kind is dict and attribute in obj and attribute not in _DICT_METHODS:
            return obj[attribute]
        if kind is str and attribute in TEXT_METHODS:
            return getattr(obj, attribute)
        if kind is LoopContext and attribute in _LOOP_VALUES:
            return getattr(obj, attribute)
        if kind is _Namespace and not attribute.startswith("_"):
            value = getattr(obj, attribute, _MISSING)
            if value is not _MISSING:
                return value
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str | bytes | int) and attr in LEFT_OUT_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        function = super().wrap_str_format(value)
        if function is None:
            return None

        def metered(*args: Any, **named: Any) -> str:
            check_format(value.__self__, [*args, *named.values()], "{")
            return function(*args, **named)

        return metered

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(1, right) if operator == "**" else left.bit_length()
            if max(bits, right.bit_length()) > MAX_BITS:
                raise TooMuchWorkError
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(many, str | bytes | list | tuple):
                    each = PER_CHAR if isinstance(many, str | bytes) else PER_ITEM
                    ALLOWANCE.get().pay(each * len(many) * max(0, times))
        elif operator == "%" and isinstance(left, str | bytes):
            check_format(str(left), [right], "%")
        elif not isinstance(left, int | float):
            ALLOWANCE.get().pay_for((left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as Jinja has it
        owner = getattr(__obj, "__self__", None)
        if type(owner) is str and type(__obj) is BuiltinMethodType:
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            if __obj.__name__ in LINEAR_METHODS and type(args[0] if args else "") is str:
                ALLOWANCE.get().pay(PER_CHAR * len(owner))
            else:
                args = tuple(map(as_list, args))
                pay_for_method(owner, __obj.__name__, [*args, *kwargs.values()])
            return paid(__obj(*args, **kwargs))
        if type(owner) is dict or isinstance(__obj, Macro):
            return paid(super().call(__context, __obj, *args, **kwargs))
        args = tuple(map(as_list, args))
        if isinstance(owner, str):
            pay_for_method(owner, __obj.__name__, [*args, *kwargs.values()])
        for one in (owner, *args):
            if isinstance(one, str | list | tuple | dict | range):
                ALLOWANCE.get().pay_for(one)
        return paid(super().call(__context, __obj, *args, **kwargs))


@functools.cache
def _environment(*, mark_generation: bool = False) -> jinja2.Environment:
    generation = _MarkedGeneration if mark_generation else Generation
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=pay_for_output,
        extensions=[generation, jinja2.ext.loopcontrols],
    )
    filters = {**environment.filters, "tojson": _tojson}
    for name in LEFT_OUT_FILTERS:
        del filters[name]
    environment.filters = {
        name: function if name in FREE_FILTERS else metered_filter(name, function)
        for name, function in filters.items()
    }
    environment.filters |= METERS
    environment.tests |= {name: metered_test(environment.tests[name]) for name in COMPARES}
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


class Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, which templates put around what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration
    method = "_mark"

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse what stands between the two."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method(self.method), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return str(caller())


class _MarkedGeneration(Generation):
    """The same, with `SPAN_OPENS` and `SPAN_CLOSES` around it in the text."""

    def _mark(self, caller: Macro) -> str:
        return f"{SPAN_OPENS}{caller()}{SPAN_CLOSES}"


class _Dict:
    """`dict` for templates: a function, with no way to the class."""

    def __call__(self, *pairs: Any, **named: Any) -> dict[Any, Any]:
        return dict(*pairs, **named)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Return `dict.fromkeys`."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates, without names that lead into Python."""

    def __init__(*args: Any, **named: Any) -> None:
        self, *pairs = args
        values = dict(*pairs, **named)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace takes no name that begins with _, such as {name!r}"
        )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON unescaped; Jinja's own filter escapes it for HTML."""
    if indent is None:
        return json.dumps(value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)
    if isinstance(indent, int):
        ALLOWANCE.get().require(PER_CHAR * indent)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    pieces = []
    for piece in encoder.iterencode(value):
        ALLOWANCE.get().pay(PER_CHAR * len(piece))
        pieces.append(piece)
    return "".join(pieces)

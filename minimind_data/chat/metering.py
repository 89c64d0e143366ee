"""What a chat template may use for a conversation, and the meters that count it.

A template is a program, from whoever made the tokenizer, over texts of whoever wrote them. So that it can neither take hours nor fill the
memory, whatever it computes is paid for from an allowance (`Allowance`) before it is computed: text by its length, the passes of loops
and the calls of macros by the size of their bodies, values that are searched, compared or written by their size. The allowance is
counted, not timed: on every machine the same conversations are within it.

What is not metered is a constant amount of work for each word of the template, or one pass over a value that was paid for. `with_meters`
puts meters into the program; filters, calls and arithmetic get theirs in the environment (`sandbox`).

Some of Jinja is left out, because its cost cannot be told beforehand and chat templates have no use for it: `lipsum`, the filters
`urlize`, `wordwrap`, `pprint` and `xmlattr`, `autoescape`, `encode` and `translate` of texts, widths in `format` that are fields.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from types import GeneratorType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_WORK = 512 << 20
"""What a template may use for one conversation, in bytes of text that it makes."""
MAX_TEMPLATE_CHARS = 1 << 18
PER_CHAR = 4
"""Bytes of a character."""
_PER_RECORD_CHAR = 256
"""What each character of a long conversation adds to the allowance."""
_STEP = 64
"""What the work of one word of a template costs: it takes as long as making that many bytes of text."""
PER_ITEM = 80
"""Bytes of an item of a list, the pointer and the object."""
MAX_BITS = 4096
"""Of a whole number that is computed with."""


class TooMuchWorkError(Exception):
    """A template uses more than its allowance."""

    def __init__(self) -> None:
        super().__init__(
            f"the chat template is stopped, since it takes more than {MAX_WORK >> 20} MiB of memory, or as much in work (some "
            "seconds), over this record; name another template with `chat_template`, or leave the record out"
        )


class Allowance:
    """What a template may still use for a conversation.

    Args:
        record: the conversation; a long one gets more.
    """

    def __init__(self, record: object = None) -> None:
        self._left = MAX_WORK
        self._record = record

    def pay(self, work: int) -> None:
        """Take work off.

        Raises:
            TooMuchWorkError: there is not so much left.
        """
        self._left -= work
        if self._left < 0:
            self._extend()

    def require(self, work: int) -> None:
        """Raise TooMuchWorkError where there is not so much left."""
        self.pay(work)
        self._left += work

    def pay_for(self, value: object) -> None:
        """Pay for reading a value in full; what stands in it several times is counted each time."""
        if type(value) is str:
            self.pay(PER_CHAR * len(value))
            return
        to_do: list[Any] = [value]
        while to_do:
            one = to_do.pop()
            work = 4 * _STEP
            if isinstance(one, str | bytes):
                work += PER_CHAR * len(one)
            elif isinstance(one, Mapping):
                to_do += one.keys()
                to_do += one.values()
            elif isinstance(one, list | tuple | set | frozenset | _VIEWS):
                to_do += one
            elif isinstance(one, range):
                work *= 1 + len(one)
            elif isinstance(one, Namespace):
                to_do.append(object.__getattribute__(one, "_Namespace__attrs"))
            self.pay(work)

    def _extend(self) -> None:
        """Add what a long conversation may use besides, once.

        Raises:
            TooMuchWorkError: that is not enough.
        """
        record, self._record = self._record, None
        if record is not None:
            self._left += _PER_RECORD_CHAR * _chars_in(record)
        if self._left < 0:
            raise TooMuchWorkError


_VIEWS: Any = type({}.keys()) | type({}.values()) | type({}.items())
ALLOWANCE: ContextVar[Allowance] = ContextVar("allowance")


def _chars_in(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_chars_in, value.keys())) + sum(map(_chars_in, value.values()))
    return sum(map(_chars_in, value)) if isinstance(value, list | tuple) else 1


def with_meters(tree: nodes.Template) -> Any:
    """Return a parsed template with meters in it, which are filters of `METERS`; the tree given is changed.

    Raises:
        jinja2.TemplateSyntaxError: it has what cannot be metered.
    """
    return _Metering().visit(tree)


class _Metering(NodeTransformer):
    """Puts a meter where a template makes, copies or compares something, and where it repeats a body."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        weight = _weight(node)
        self.generic_visit(node)
        node.iter = _filter(node.iter, "each pass", nodes.Const(weight))
        if node.recursive:
            node.body.insert(0, _step(weight))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        node.body.insert(0, _step(_weight(node)))
        return self.generic_visit(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        node.body.insert(0, _step(_weight(node)))
        return self.generic_visit(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        node.body.insert(0, _step(_weight(node)))
        return self.generic_visit(node)

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        parts = [node.right]
        first = node.left
        while isinstance(first, nodes.Add):
            parts.append(first.right)
            first = first.left
        return _filter(self.visit(first), "sum of parts", *(self.visit(part) for part in reversed(parts)))

    def visit_Sub(self, node: nodes.Sub) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node.left, "difference of parts", node.right)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [part if _is_short(part) else _filter(part, "as text") for part in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        is_short = _is_short(node.expr)
        for operand in node.ops:
            if not (_is_short(operand.expr) or (is_short and operand.op in ("eq", "ne"))):
                operand.expr = _filter(operand.expr, "when compared")
            is_short = _is_short(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "as part") if isinstance(node.arg, nodes.Slice) else node

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> nodes.Node:
        raise jinja2.TemplateSyntaxError("autoescape is for HTML, and chat templates write text", node.lineno)

    visit_EvalContextModifier = visit_ScopedEvalContextModifier


def _weight(node: nodes.Node) -> int:
    """Return how many words of work a body is."""
    return 1 + sum(1 for _ in node.find_all(nodes.Node))


def _filter(node: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _step(weight: int) -> nodes.ExprStmt:
    """Return a statement that pays for one pass of a body, and for what it takes to begin one."""
    return nodes.ExprStmt(_filter(nodes.Const(8 + weight, lineno=1), "a step"), lineno=1)


def _is_short(node: nodes.Node) -> bool:
    """Tell whether an expression is of constants, so as long as the template says."""
    return isinstance(node, nodes.Const | nodes.TemplateData) or (
        isinstance(node, nodes.List | nodes.Tuple) and all(map(_is_short, node.items))
    )


# The meters


@jinja2.pass_context  # so that it is never computed beforehand
def _each_pass(_context: Context, items: Any, weight: int) -> Any:
    """Pay for the passes of a loop."""
    if not isinstance(items, Sized):
        return _metered(items, weight * _STEP)
    ALLOWANCE.get().pay(len(items) * weight * _STEP)
    return items


def _metered(items: Iterable[Any], work: int) -> Iterator[Any]:
    """Pay for each item when it is taken."""
    pay = ALLOWANCE.get().pay
    for item in items:
        pay(work)
        yield item


@jinja2.pass_context
def _pay_step(_context: Context, weight: int) -> None:
    ALLOWANCE.get().pay(weight * _STEP)


def _sum(first: Any, *others: Any) -> Any:
    """Add from left to right, as `+` does."""
    if type(first) is str and {*map(type, others)} == {str}:
        ALLOWANCE.get().pay(PER_CHAR * (len(first) + sum(map(len, others))))
        return "".join((first, *others))
    total = first
    for other in others:
        _pay_shallow(total)
        _pay_shallow(other)
        total = total + other
    return total


def _difference(one: Any, other: Any) -> Any:
    if type(one) is not int:
        ALLOWANCE.get().pay_for((one, other))
    return one - other


def _paid_in_full(value: Any) -> Any:
    ALLOWANCE.get().pay_for(value)
    return value


def _as_part(value: Any) -> Any:
    _pay_shallow(value)
    return value


def _pay_shallow(value: Any) -> None:
    """Pay for a copy of a value, which shares the items with it."""
    if isinstance(value, str | bytes):
        ALLOWANCE.get().pay(PER_CHAR * len(value))
    elif isinstance(value, list | tuple | dict | set):
        ALLOWANCE.get().pay(PER_ITEM * len(value))


def pay_for_output(value: Any) -> Any:
    """Pay for a value that is about to be written as text, if it is no text yet (texts pay when they are joined)."""
    if type(value) is not str:
        ALLOWANCE.get().pay_for(value)
    return value


def joined(pieces: Iterable[str]) -> str:
    """Join what a template writes, or a part of it."""
    pieces = list(pieces)
    ALLOWANCE.get().pay(PER_CHAR * sum(map(len, pieces)))
    return "".join(pieces)


# Methods of texts

_PADS = frozenset(("center", "ljust", "rjust", "zfill"))
_SEARCHES_AT_EACH_PLACE = frozenset(("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip"))
LINEAR_METHODS = frozenset(("startswith", "endswith", "find", "lower", "upper"))
_SPLITS = frozenset(("split", "rsplit", "splitlines"))
LEFT_OUT_METHODS = frozenset(("encode", "translate", "maketrans", "to_bytes", "from_bytes"))
TEXT_METHODS = frozenset(
    name for name in dir(str) if not name.startswith("_") and name not in (*LEFT_OUT_METHODS, "format", "format_map")
)  # fmt: skip


def pay_for_method(text: str, name: str, args: list[Any]) -> None:
    """Pay for a call of a method of a text before it is made."""
    allowance = ALLOWANCE.get()
    length = len(text)
    work = PER_CHAR * length
    texts = [one for one in args if isinstance(one, str)]
    if name in _PADS:
        work += PER_CHAR * _largest(args)
    elif name == "expandtabs":
        work *= 1 + _largest(args)
    elif name == "replace" and len(texts) == 2:
        work += PER_CHAR * text.count(texts[0]) * len(texts[1])
    elif name == "join":
        for one in args:
            allowance.pay_for(one)
            work += PER_CHAR * length * (len(one) if isinstance(one, Sized) else 0)
    elif name not in TEXT_METHODS:
        for one in args:
            allowance.pay_for(one)
    if name in _SEARCHES_AT_EACH_PLACE:
        work += length * sum(map(len, texts)) // 2
    if name in _SPLITS:
        work += PER_ITEM * (1 + (text.count(texts[0]) if texts and texts[0] else length // 2))
    allowance.pay(work)


def _largest(args: Iterable[Any]) -> int:
    return max((abs(one) for one in args if isinstance(one, int)), default=0)


def check_format(text: str, args: list[Any], sign: str) -> None:
    """Check that what a format makes is within the allowance; widths stand in it as numbers."""
    widths = sum(int(digits) if len(digits) < 10 else MAX_WORK for digits in re.findall(r"[0-9]+", text))
    if sign == "%" and "*" in text:
        flat = [one for arg in args for one in (arg if isinstance(arg, tuple) else [arg])]
        widths += sum(abs(one) for one in flat if isinstance(one, int))
    if sign == "{" and re.search(r"\{[^{}]*\{", text.replace("{{", "")):
        raise jinja2.exceptions.SecurityError("the width of a format is a field; write it as a number")
    allowance = ALLOWANCE.get()
    allowance.require(PER_CHAR * (len(text) + widths))
    for _ in range(text.count(sign)):
        allowance.pay_for(args)


# Filters and tests


def _pay_for_filter(name: str, value: Any, args: list[Any]) -> None:
    """Pay for a filter before it is applied."""
    allowance = ALLOWANCE.get()
    count = len(value) if isinstance(value, Sized) else 1
    if name in _LAZY or name == "list":
        allowance.pay(count * (4 * _STEP if name in _LAZY else PER_ITEM))
        return
    for _ in range(_TIMES.get(name, 1)):
        allowance.pay_for(value)
    for one in args:
        allowance.pay_for(one)
    if name in _AS_METHODS:
        texts = [str(one) if name == "replace" and place < 2 else one for place, one in enumerate(args)]
        pay_for_method(str(value), _AS_METHODS[name], texts)
    elif name == "format":
        check_format(str(value), args, "%")
    elif name == "indent":
        width = max([_largest(args), *(len(one) for one in args if isinstance(one, str))])
        allowance.require(PER_CHAR * (1 + width) * len(str(value)))
    elif name == "striptags":
        text = str(value)
        allowance.pay(len(text) * (1 + text.count("<")) // 8)
    elif name == "join":
        allowance.pay(PER_CHAR * count * sum(len(str(one)) for one in args))
    elif name in _BY_NUMBER:
        allowance.pay(_BY_NUMBER[name](_largest(args), count))


_BY_NUMBER: dict[str, Callable[[int, int], int]] = {
    "batch": lambda largest, _: PER_ITEM * largest,
    "slice": lambda largest, _: PER_ITEM * largest,
    "round": lambda largest, _: largest**2,
    "sum": lambda _, count: count**2,
}
"""What filters cost by the largest number among their arguments and the number of items."""
_AS_METHODS = {"center": "center", "replace": "replace", "trim": "strip"}
"""Filters that do what a method of texts does."""
_LAZY = frozenset(("map", "select", "reject", "selectattr", "rejectattr"))
FREE_FILTERS = frozenset(
    ("length", "count", "first", "last", "default", "d", "items", "attr", "abs", "float")
)
"""Filters whose work does not depend on their value."""
_SORTS = frozenset(("sort", "dictsort", "unique", "groupby", "min", "max"))
_TIMES = {
    **dict.fromkeys(_SORTS, 16),
    "urlencode": 9,
    "e": 6,
    "escape": 6,
    "forceescape": 6,
    "tojson": 2,
    "title": 32,
    "wordcount": 32,
}
"""How many times its own size a filter makes of a value, or looks at it, where that is more than once."""
_READS_ALL = _SORTS | {"join", "sum", "batch", "slice", "list"}
"""Filters that take the items of a generator."""
LEFT_OUT_FILTERS = ("urlize", "wordwrap", "pprint", "xmlattr")
COMPARES = ("in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">=", "<", "lt", "lessthan", "<=", "le")  # fmt: skip


def as_list(value: Any) -> Any:
    """Take the items of a generator, so that it is known how many there are."""
    return list(_metered(value, PER_ITEM)) if isinstance(value, GeneratorType) else value


def metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter of this name that is paid for."""
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def metered(*args: Any, **named: Any) -> Any:
        arguments = list(args)
        if name in _READS_ALL:
            arguments[place] = as_list(arguments[place])
        _pay_for_filter(name, arguments[place], [*arguments[place + 1 :], *named.values()])
        return paid(function(*arguments, **named))

    return metered


def metered_test(function: Any) -> Callable[..., Any]:
    """Return a test that is paid for."""

    @functools.wraps(function)
    def metered(value: Any, *args: Any) -> Any:
        for one in (value, *args):
            ALLOWANCE.get().pay_for(one)
        return function(value, *args)

    return metered


def paid(value: Any) -> Any:
    """Pay for what was made: text and lists now, other items when they are taken."""
    if isinstance(value, GeneratorType):
        return _metered(value, _STEP)
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise TooMuchWorkError
    _pay_shallow(value)
    return value


METERS: dict[str, Callable[..., Any]] = {
    "each pass": _each_pass,
    "a step": _pay_step,
    "sum of parts": _sum,
    "difference of parts": _difference,
    "as text": _paid_in_full,
    "when compared": _paid_in_full,
    "as part": _as_part,
}
"""The filters that `with_meters` puts in; no template can write their names."""

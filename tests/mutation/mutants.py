"""The mutants of a module: its source with one small mistake each, as a person might make it.

A comparison takes in its border or leaves it out, a number is one more or one less, `and` is `or`, a condition always or never holds, an operator
is its counterpart, a statement is gone, a value that is returned is None. Text, annotations, assertions and the sentences of errors are left alone.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

_ORDERINGS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
_OPPOSITES = {
    ast.Lt: ">=",
    ast.LtE: ">",
    ast.Gt: "<=",
    ast.GtE: "<",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
_SIGNS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="} | {
    ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in",
}  # fmt: skip
_COUNTERPARTS = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "//",
    ast.FloorDiv: "*",
    ast.Div: "*",
    ast.Mod: "//",
    ast.LShift: ">>",
    ast.RShift: "<<",
    ast.BitAnd: "|",
    ast.BitOr: "&",
    ast.BitXor: "&",
    ast.MatMult: "+",
    ast.Pow: "*",
}
_OTHER_NAMES = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "minimum": "maximum",
    "maximum": "minimum",
}
_OTHER_WORDS = {"left": "right", "right": "left"}

_INDIFFERENT = {"maxsize", "strict"}
"""Arguments on which no result depends: the size of a cache; like an assertion, a guard against our own mistakes."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A module with one mistake."""

    line: int
    """Where, from 1; the first line of what is changed."""
    last_line: int
    source: str
    """The whole module."""
    was: str
    """The lines that are changed, in one."""
    becomes: str
    """What they are changed to."""


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def place(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    mutants = {}
    for node, text in _changes(tree):
        start, stop = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
        changed = source[:start] + text + source[stop:]
        mutant = Mutant(
            line=node.lineno,
            last_line=node.end_lineno,
            source=changed,
            was=_in_one(lines[node.lineno - 1 : node.end_lineno]),
            becomes=_in_one(
                [source[starts[node.lineno - 1] : start] + text + source[stop : starts[node.end_lineno]]]
            ),
        )
        if mutant.was != mutant.becomes and _compiles(changed):
            mutants.setdefault(changed, mutant)
    return sorted(mutants.values(), key=lambda mutant: mutant.line)


def _in_one(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def _compiles(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield (what is replaced, its replacement) for a node and all below it."""
    if isinstance(node, ast.JoinedStr):  # positions inside of one mean nothing before Python 3.12
        return
    if isinstance(node, ast.keyword) and node.arg in _INDIFFERENT:
        return
    yield from _changes_of(node)
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns", "decorator_list", "type_params"} or isinstance(
            node, ast.Raise | ast.Assert
        ):
            continue
        children = value if isinstance(value, list) else [value]
        for child in children:
            if isinstance(child, ast.AST) and not _is_text(child) and not _is_typing(node, child):
                yield from _changes(child)


def _is_text(node: ast.AST) -> bool:
    """A docstring, of a module, a class, a function or a field."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_typing(parent: ast.AST, node: ast.AST) -> bool:
    """Whether nothing happens there when the program runs."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
    return (
        isinstance(parent, ast.Module | ast.ClassDef)
        and isinstance(node, ast.Assign)
        and _is_type(node.value)
    )


def _is_type(node: ast.AST) -> bool:
    return isinstance(node, ast.Subscript | ast.BinOp) and any(
        isinstance(part, ast.Subscript) and isinstance(part.value, ast.Name) and part.value.id[0].isupper()
        for part in ast.walk(node)
    )


def _changes_of(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:  # noqa: C901, PLR0912 - a table of mistakes
    match node:
        case ast.Compare(ops=ops):
            for place, operator in enumerate(ops):
                for signs in (_ORDERINGS, _OPPOSITES):
                    if type(operator) in signs:
                        yield node, _compared(node, place, signs[type(operator)])
        case ast.BoolOp(op=operator, values=values):
            other = " or " if isinstance(operator, ast.And) else " and "
            yield node, f"({other.join(f'({ast.unparse(value)})' for value in values)})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield node, f"({ast.unparse(operand)})"
        case ast.UnaryOp(op=ast.USub() | ast.Invert(), operand=operand) if not isinstance(
            operand, ast.Constant
        ):
            yield node, f"({ast.unparse(operand)})"
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _COUNTERPARTS:
            yield node, f"(({ast.unparse(left)}) {_COUNTERPARTS[type(operator)]} ({ast.unparse(right)}))"
        case ast.AugAssign(op=operator, target=target, value=value):
            yield node, "pass"
            if type(operator) in _COUNTERPARTS:
                yield node, f"{ast.unparse(target)} {_COUNTERPARTS[type(operator)]}= {ast.unparse(value)}"
        case ast.Constant(value=bool() as value):
            yield node, str(not value)
        case ast.Constant(value=int() as value):
            yield node, str(value + 1)
            yield node, f"({value - 1})" if value < 1 else str(value - 1)
        case ast.Constant(value=float() as value):
            yield node, repr(value + 1.0)
        case ast.Constant(value=str() as value) if value in _OTHER_WORDS:
            yield node, repr(_OTHER_WORDS[value])
        case ast.Name(id=name, ctx=ast.Load()) if name in _OTHER_NAMES:
            yield node, _OTHER_NAMES[name]
        case ast.Attribute(value=owner, attr=name) if name in _OTHER_NAMES:
            yield node, f"{ast.unparse(owner)}.{_OTHER_NAMES[name]}"
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            yield test, "False"
            if not isinstance(node, ast.While):
                yield test, "True"
        case ast.Return(value=ast.expr() as value) if not _is_none(value):
            yield node, "return None"
        case ast.Slice(lower=lower, upper=upper):
            for border in (lower, upper):
                if border and not isinstance(border, ast.Constant):
                    yield border, f"({ast.unparse(border)}) + 1"
        case ast.Call(func=ast.Name(id="range") | ast.Attribute(attr="arange"), args=borders):
            for border in borders:
                if not isinstance(border, ast.Constant):
                    yield border, f"({ast.unparse(border)}) + 1"
        case ast.Expr(value=ast.Call() | ast.Yield() | ast.YieldFrom()) | ast.Raise() | ast.Delete():
            yield node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, "pass"
        case ast.Break() | ast.Continue():
            yield node, "pass"
        case ast.comprehension(ifs=conditions):
            for condition in conditions:
                yield condition, "True"


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _compared(node: ast.Compare, place: int, sign: str) -> str:
    signs = [sign if at == place else _SIGNS[type(operator)] for at, operator in enumerate(node.ops)]
    sides = [f"({ast.unparse(side)})" for side in (node.left, *node.comparators)]
    return sides[0] + "".join(f" {sign} {side}" for sign, side in zip(signs, sides[1:], strict=True))

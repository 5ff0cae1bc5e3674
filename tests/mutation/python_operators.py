"""Mutants of Python sources, from their syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import accumulate, pairwise

from .mutant import Mutant

COMPARISONS = {
    ast.Lt: ("<=", ">"),
    ast.LtE: ("<", ">"),
    ast.Gt: (">=", "<"),
    ast.GtE: (">", "<"),
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
    ast.Is: ("is not",),
    ast.IsNot: ("is",),
    ast.In: ("not in",),
    ast.NotIn: ("in",),
}
ARITHMETIC = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "+",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "+",
    ast.BitAnd: "|",
    ast.BitOr: "&",
    ast.LShift: ">>",
    ast.RShift: "<<",
    ast.Pow: "*",
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
# Statements without which what follows still runs.
DROPPED = (ast.AugAssign, ast.Raise, ast.Continue, ast.Break, ast.Delete)


class _Source:
    """Positions of syntax nodes as characters of the text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = text.splitlines(keepends=True)
        self.begins = [0, *accumulate(map(len, self.lines))]

    def at(self, line: int, column: int) -> int:
        return self.begins[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def of(self, node: ast.AST) -> str:
        begin, end = self.span(node)
        return self.text[begin:end]


def mutants_of(file: str, text: str) -> Iterator[Mutant]:
    """Every mutant of a file. Docstrings, annotations and messages stay as they are."""
    source = _Source(text)
    for node in _code(ast.parse(text)):
        for operator, begin, end, after in _changes(node, source):
            before = text[begin:end]
            if before != after:
                yield Mutant(file, text.count("\n", 0, begin) + 1, begin, operator, before, after)


def _code(node: ast.AST, key: bool = False) -> Iterator[ast.AST]:
    """Nodes that compute something. `node.is_key` says of a tuple whether it is a part of a cache's key."""
    for name, child in ast.iter_fields(node):
        if name in ("annotation", "returns", "exc", "msg", "type_params") or _is_for_type_checkers(node):
            continue
        if name == "value" and isinstance(node, ast.keyword) and node.arg == "strict":  # of a zip: a check of our own
            continue
        below = key or _names_a_key(node, name)
        for one in child if isinstance(child, list) else [child]:
            if isinstance(one, ast.AST) and not isinstance(one, ast.JoinedStr):
                one.is_key = below
                yield one
                yield from _code(one, below and not isinstance(one, ast.Call))


def _is_for_type_checkers(node: ast.AST) -> bool:
    """`if TYPE_CHECKING`, and the alias of a type."""
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
        return isinstance(node.value.value, ast.Name) and node.value.value.id in ("tuple", "dict", "Callable")
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _names_a_key(node: ast.AST, field: str) -> bool:
    if field == "slice":
        return True
    if isinstance(node, ast.Assign):
        return field == "value" and any("key" in ast.unparse(target) for target in node.targets)
    if isinstance(node, ast.FunctionDef):
        return field == "body" and "key" in node.name
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    return called and field == "args" and node.func.attr in ("get", "setdefault", "pop")


def _changes(node: ast.AST, source: _Source) -> Iterator[tuple[str, int, int, str]]:
    """Operator, begin, end and the new text of each change of a node."""
    begin, end = source.span(node) if hasattr(node, "lineno") else (0, 0)
    if isinstance(node, ast.Compare):
        for (left, right), operator in zip(pairwise([node.left, *node.comparators]), node.ops, strict=True):
            for other in COMPARISONS[type(operator)]:
                yield "comparison", source.span(left)[1], source.span(right)[0], f" {other} "
    elif isinstance(node, ast.BinOp):
        if type(node.op) in ARITHMETIC and not _is_text(node.left) and not _is_text(node.right):
            yield from _between(source, node.left, node.right, ARITHMETIC[type(node.op)])
    elif isinstance(node, ast.BoolOp):
        yield from _of_conjunction(node, source)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield "dropped not or minus", begin, end, source.of(node.operand)
    elif isinstance(node, (ast.If, ast.IfExp)):
        first, last = source.span(node.test)
        yield "negated condition", first, last, f"(not ({source.of(node.test)}))"
    elif isinstance(node, ast.Constant):
        yield from _of_constant(node, begin, end)
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield "min and max", begin, end, NAMES[node.id]
    elif isinstance(node, ast.Call):
        yield from _of_call(node, source)
    elif isinstance(node, ast.Tuple) and node.is_key and isinstance(node.ctx, ast.Load) and len(node.elts) > 1:
        if any(isinstance(element, ast.Slice) for element in node.elts):
            return
        for element in node.elts:
            kept = ", ".join(source.of(other) for other in node.elts if other is not element)
            yield "dropped part of a key", begin, end, f"({kept},)"
    elif _is_dropped(node):
        yield "dropped statement", begin, end, "pass"
        if _is_repeatable(node):
            yield "doubled statement", begin, end, f"{source.of(node)}; {source.of(node)}"


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_dropped(node: ast.AST) -> bool:
    if isinstance(node, DROPPED):
        return True
    if isinstance(node, ast.Assign):
        return all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets)
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def _is_repeatable(node: ast.AST) -> bool:
    """Whether a second time changes something."""
    if isinstance(node, ast.Expr) and isinstance(node.value.func, ast.Attribute):
        return node.value.func.attr in ("append", "extend", "insert", "pop", "push", "write")
    return isinstance(node, ast.AugAssign)


def _between(source: _Source, left: ast.AST, right: ast.AST, operator: str) -> Iterator[tuple[str, int, int, str]]:
    begin, end = source.span(left)[1], source.span(right)[0]
    between = source.text[begin:end]
    symbol = between.strip(" ()\n")
    if symbol and between.count(symbol) == 1:  # not where a comment is in between
        yield "arithmetic", begin, end, between.replace(symbol, operator)


def _of_conjunction(node: ast.BoolOp, source: _Source) -> Iterator[tuple[str, int, int, str]]:
    begin, end = source.span(node)
    word, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
    for operand in node.values:
        kept = f" {word} ".join(f"({source.of(one)})" for one in node.values if one is not operand)
        yield "dropped operand", begin, end, f"({kept})"
    yield "and and or", begin, end, f"({f' {other} '.join(f'({source.of(one)})' for one in node.values)})"


def _of_constant(node: ast.Constant, begin: int, end: int) -> Iterator[tuple[str, int, int, str]]:
    if isinstance(node.value, bool):
        yield "constant", begin, end, str(not node.value)
    elif isinstance(node.value, int):
        yield "constant", begin, end, str(node.value + 1)
        yield "constant", begin, end, f"({node.value - 1})"
    elif isinstance(node.value, float):
        yield "constant", begin, end, repr(node.value * 2 + 1)


def _of_call(node: ast.Call, source: _Source) -> Iterator[tuple[str, int, int, str]]:
    plain = (ast.Name, ast.Attribute)
    for one, other in pairwise(node.args):
        if isinstance(one, plain) and isinstance(other, plain):
            begin, end = source.span(one)[0], source.span(other)[1]
            between = source.text[source.span(one)[1] : source.span(other)[0]]
            yield "swapped arguments", begin, end, f"{source.of(other)}{between}{source.of(one)}"
    for keyword in node.keywords:
        if keyword.arg and isinstance(keyword.value, plain):
            begin, end = source.span(keyword)
            yield "argument None", begin, end, f"{keyword.arg}=None"

"""Mutants of CUDA sources, from their text: expressions stand between blanks, and templates do not."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .mutant import Mutant

Change = tuple[str, int, int, str]

OPERATORS = {
    "<": ("<=", ">"),
    "<=": ("<", ">"),
    ">": (">=", "<"),
    ">=": (">", "<"),
    "==": ("!=",),
    "!=": ("==",),
    "+": ("-",),
    "-": ("+",),
    "*": ("+",),
    "/": ("*",),
    "%": ("/",),
    "&": ("|",),
    "|": ("&",),
    "^": ("&",),
    "<<": (">>",),
    ">>": ("<<",),
    "&&": ("||",),
    "||": ("&&",),
    "+=": ("-=", "="),
    "-=": ("+=",),
    "*=": ("+=",),
    "&=": ("|=",),
    "|=": ("&=",),
    "<<=": (">>=",),
    ">>=": ("<<=",),
}
OPERATOR = re.compile(rf"(?<=\s)({'|'.join(map(re.escape, sorted(OPERATORS, key=len, reverse=True)))})(?=\s)")
INTEGER = re.compile(r"(?<![\w.])(0x[0-9a-f]+|\d+)([uU]?[lL]{0,2})(?![\w.])")
FLOAT = re.compile(r"(?<![\w.])(\d+\.\d*|\.\d+)(f?)(?![\w.])")
# A cast to a type of another width or kind.
OTHER_TYPES = {
    "long long": "int",
    "size_t": "unsigned",
    "index_t": "short",
    "unsigned": "unsigned short",
    "int": "short",
    "unsigned short": "unsigned char",
    "unsigned char": "unsigned short",
    "acc_t": "value_t",
    "double": "float",
    "float": "int",
}
CAST = re.compile(rf"\(({'|'.join(OTHER_TYPES)})\)(?=[\w(])")
NAMES = {"min": "max", "max": "min", "fminf": "fmaxf", "fmaxf": "fminf", "true": "false", "false": "true"}
NAME = re.compile(rf"\b({'|'.join(NAMES)})\b")
# Two neighbouring arguments that are names or members.
ARGUMENTS = re.compile(r"(?<=[(\s])([a-z_][\w.]*), ([a-z_][\w.]*)(?=[,)])")
CONDITION = re.compile(r"\bif( constexpr)? \(")
STATEMENT = re.compile(
    r"(?<=[;{}:)\n])(\s*)((?!return\b|using\b|else\b|static|struct|template|typedef|namespace)[^;{}#]+;)"
)
# A declaration: a type, then a name.
DECLARATION = re.compile(r"(const |constexpr |unsigned |long |extern )|[\w:<>, ]+[ *&]+\w+(\[[^]]*\])*( =|;|\(|\{)")
# What a second time changes something.
REPEATABLE = re.compile(r"[^=]*(\+=|-=|\+\+|--)|.*\batomicAdd\(", re.DOTALL)


def hidden(text: str) -> str:
    """The text with blanks for comments, preprocessor lines and what stands under `#if MSDA_PTX`."""
    blank = [False] * len(text)
    for comment in re.finditer(r"//[^\n]*|/\*.*?\*/|\"[^\"\n]*\"", text, re.DOTALL):
        blank[comment.start() : comment.end()] = [True] * len(comment[0])
    at, inside = 0, []
    for line in text.splitlines(keepends=True):
        word = line.strip()
        if word.startswith("#"):
            if word.startswith("#if"):
                inside.append("MSDA_PTX" in word)
            elif word.startswith(("#else", "#elif")) and inside:
                inside[-1] = False
            elif word.startswith("#endif") and inside:
                inside.pop()
        if word.startswith("#") or any(inside) or "static_assert" in word or "asm" in word:
            blank[at : at + len(line)] = [True] * len(line)
        at += len(line)
    return "".join(" " if hide and c != "\n" else c for hide, c in zip(blank, text, strict=True))


def mutants_of(file: str, text: str) -> Iterator[Mutant]:
    """Every mutant of a file, outside comments and PTX."""
    code = hidden(text)
    for operator, begin, end, after in _changes(code):
        if code[begin:end] == text[begin:end] != after:  # nothing hidden in between
            yield Mutant(file, text.count("\n", 0, begin) + 1, begin, operator, text[begin:end], after)


def _changes(code: str) -> Iterator[Change]:
    for found in OPERATOR.finditer(code):
        kind = "comparison" if found[1] in ("<", "<=", ">", ">=", "==", "!=") else "arithmetic"
        for other in OPERATORS[found[1]]:
            yield kind, *found.span(1), other
        if found[1] in ("&&", "||"):
            yield from _dropped_operands(code, *found.span(1))
    for found in INTEGER.finditer(code):
        number = int(found[1], 0)
        for other in (number + 1, number - 1):
            yield "constant", *found.span(), f"{other}{found[2]}" if other >= 0 else f"({other})"
    for found in FLOAT.finditer(code):
        yield "constant", *found.span(), f"{float(found[1]) * 2 + 1}{found[2]}"
    for found in CAST.finditer(code):
        yield "width of a cast", *found.span(1), OTHER_TYPES[found[1]]
    for found in NAME.finditer(code):
        yield "min and max" if "m" in found[1] else "constant", *found.span(), NAMES[found[1]]
    for found in ARGUMENTS.finditer(code):
        if found[1] != found[2]:
            yield "swapped arguments", *found.span(), f"{found[2]}, {found[1]}"
    for found in CONDITION.finditer(code):
        begin, end = found.end(), _closing(code, found.end())
        yield "negated condition", begin, end, f"!({code[begin:end]})"
    for found in STATEMENT.finditer(code):
        statement = found[2]
        begin, end = found.span(2)
        if not DECLARATION.match(statement) and not statement.startswith("for (") and not _in_for(code, begin):
            yield "dropped barrier" if "__sync" in statement else "dropped statement", begin, end, ";"
            if "__sync" not in statement and REPEATABLE.match(statement):
                yield "doubled statement", begin, end, f"{{ {statement} {statement} }}"


def _dropped_operands(code: str, begin: int, end: int) -> Iterator[Change]:
    """Without the operand to the right of a conjunction, and without the one to its left."""
    right, left = _operand_end(code, end), _operand_begin(code, begin)
    yield "dropped operand", begin, right, ""
    yield "dropped operand", left, end, ""


def _operand_end(code: str, at: int) -> int:
    depth = 0
    while at < len(code):
        if code[at] in "([":
            depth += 1
        elif code[at] in ")]":
            if depth == 0:
                return at
            depth -= 1
        elif depth == 0 and (code[at] in ";?:,{}" or code[at : at + 2] in ("&&", "||")):
            return at
        at += 1
    return at


def _operand_begin(code: str, at: int) -> int:
    depth = 0
    while at > 0:
        before = code[at - 1]
        if before in ")]":
            depth += 1
        elif before in "([":
            if depth == 0:
                return at
            depth -= 1
        elif depth == 0 and (
            before in ";?:,{}" or code[at - 2 : at] in ("&&", "||", "= ") or code[at - 7 : at] == "return "
        ):
            return at
        at -= 1
    return at


def _closing(code: str, at: int) -> int:
    """The parenthesis that closes one opened before `at`."""
    depth = 1
    while at < len(code):
        depth += {"(": 1, ")": -1}.get(code[at], 0)
        if depth == 0:
            return at
        at += 1
    return at


def _in_for(code: str, at: int) -> bool:
    """Whether a text is inside the head of a loop."""
    begin = code.rfind("for (", 0, at)
    return begin >= 0 and _closing(code, begin + 5) >= at

"""The expression language of formulas: R's operators, precedence and way of printing.

A formula is parsed here, not handed to Python's ``eval``: the grammar has names, numbers, strings,
calls and operators and nothing else (no attributes, no subscripts, no assignment), so what a
formula can do is decided by the functions that `lmmjax.evaluate` offers. Every node can print
itself as R's ``deparse`` does, because coefficient names are made of these texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from lmmjax.errors import FormulaError

__all__ = ["Call", "Name", "Node", "Number", "Text", "deparse", "fail", "names_in", "parse_expr"]


@dataclass(frozen=True)
class Number:
    """A number; `suffix` is ``"L"`` for an R integer."""

    value: float
    suffix: str = ""
    pos: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Text:
    """A quoted string."""

    value: str
    pos: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Name:
    """A variable, constant or (as the head of a call) a function name."""

    id: str
    pos: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Call:
    """A function call or an operator; parentheses are the call of ``"("``, as in R."""

    fn: str
    args: tuple[Node, ...]
    keys: tuple[str | None, ...] = ()
    pos: int = field(default=0, compare=False)


Node = Number | Text | Name | Call

# R's precedence (help page "Syntax"), loosest first; a unary sign binds looser than ^, so that
# -x^2 is -(x^2), but tighter than `:`.
_BINARY = {
    "~": 1,
    **dict.fromkeys(("|", "||"), 2),
    **dict.fromkeys(("&", "&&"), 3),
    **dict.fromkeys(("==", "!=", "<", ">", "<=", ">="), 5),
    **dict.fromkeys(("+", "-"), 6),
    **dict.fromkeys(("*", "/"), 7),
    ":": 9,
    "^": 11,
}
_PERCENT, _NOT, _SIGN = 8, 4, 10
_TIGHT = {"^", ":", "/"}  # printed by R without spaces

_TOKEN = re.compile(
    r"""
      (?P<space>\s+)
    | (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?P<suffix>L?)
    | (?P<name>(?:[^\W\d_]|\.(?!\d))[\w.]*|_\w*)
    | (?P<quoted>`[^`]*`)
    | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | (?P<op>%[^%\s]*%|\*\*|==|!=|<=|>=|\|\||&&|[-+*/^:~|&!<>(),=])
    """,
    re.VERBOSE,
)
_SYNTACTIC = re.compile(r"(?:[^\W\d_]|\.(?!\d))[\w.]*\Z")


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    pos: int
    suffix: str = ""


def fail(text: str, pos: int, message: str) -> NoReturn:
    """Raise a `FormulaError` whose second and third line show the place in the formula."""
    shown = re.sub(r"\s", " ", text)
    raise FormulaError(f"{message}\n    {shown}\n    {' ' * pos}^")


def parse_expr(text: str) -> Node:
    """Parse a formula or expression into a tree.

    Parameters
    ----------
    text : str
        R syntax; ``**`` is read as ``^``, as R does.

    Returns
    -------
    Number | Text | Name | Call

    Raises
    ------
    FormulaError
        With a caret line below the formula that points at the place.
    """
    if not isinstance(text, str):
        raise FormulaError(
            f"found {type(text).__name__} where a formula was expected; "
            'give text such as "y ~ x + (1 | g)".'
        )
    return _Parser(text).whole()


def _tokens(text: str) -> Iterator[_Token]:
    pos = 0
    while pos < len(text):
        match = _TOKEN.match(text, pos)
        if match is None:
            _bad_character(text, pos)
        kind = match.lastgroup if match.lastgroup != "suffix" else "number"
        if kind != "space":
            token = match.group("number") if kind == "number" else match.group()
            token = "^" if token == "**" else token
            yield _Token(str(kind), token, pos, match.group("suffix") or "")
        pos = match.end()
    yield _Token("end", "", len(text))


def _bad_character(text: str, pos: int) -> NoReturn:
    found = text[pos]
    if found in "\"'`":
        fail(text, pos, f"found {found} that is never closed; add the closing {found}.")
    hint = "use only names, numbers, calls and the operators of R formulas"
    if found in "[]{}$@":
        hint = "subscripts and attributes are not part of a formula; make a column of it first"
    fail(text, pos, f"found {found!r}, which has no meaning in a formula; {hint}.")


class _Parser:
    """Precedence climbing over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(_tokens(text))
        self.i = 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.i]

    def next(self) -> _Token:
        self.i += 1
        return self.tokens[self.i - 1]

    def at(self, op: str) -> bool:
        return self.token.kind == "op" and self.token.text == op

    def whole(self) -> Node:
        if self.token.kind == "end":
            fail(self.text, 0, 'found an empty formula; give text such as "y ~ x + (1 | g)".')
        node = self.expr(0)
        if self.at(")"):
            fail(self.text, self.token.pos, "found ')' without its '('; remove it or add the '('.")
        if self.token.kind != "end":
            self.unexpected("an operator such as '+' was expected")
        return node

    def expr(self, floor: int) -> Node:
        node = self.prefix()
        while (power := self.power()) is not None and power > floor:
            op = self.next()
            # ^ groups from the right, and its right side may carry a sign: 2^-1.
            right = self.expr(_SIGN - 1 if op.text == "^" else power)
            node = Call(op.text, (node, right), (None, None), op.pos)
        return node

    def power(self) -> int | None:
        if self.token.kind != "op":
            return None
        if self.token.text.startswith("%"):
            return _PERCENT
        return _BINARY.get(self.token.text)

    def prefix(self) -> Node:
        token = self.next()
        if token.kind == "op" and token.text in ("+", "-", "!", "~"):
            floor = {"!": _NOT, "~": _BINARY["~"]}.get(token.text, _SIGN)
            return Call(token.text, (self.expr(floor - 1),), (None,), token.pos)
        if token.kind == "op" and token.text == "(":
            inner = self.expr(0)
            self.close(token)
            return Call("(", (inner,), (None,), token.pos)
        return self.atom(token)

    def atom(self, token: _Token) -> Node:
        if token.kind == "number":
            return Number(float(token.text), token.suffix, token.pos)
        if token.kind == "string":
            return Text(re.sub(r"\\(.)", r"\1", token.text[1:-1]), token.pos)
        if token.kind in ("name", "quoted"):
            name = token.text.strip("`")
            return self.call(token, name) if self.at("(") else Name(name, token.pos)
        self.i -= 1
        self.unexpected("a variable, a number or '(' was expected")

    def call(self, head: _Token, name: str) -> Call:
        opening = self.next()
        args: list[Node] = []
        keys: list[str | None] = []
        while not self.at(")"):
            keys.append(self.key())
            args.append(self.expr(0))
            if not self.at(","):
                break
            self.next()
        self.close(opening)
        return Call(name, tuple(args), tuple(keys), head.pos)

    def key(self) -> str | None:
        following = self.tokens[self.i + 1 : self.i + 2]
        if self.token.kind == "name" and following and following[0].text == "=":
            name = self.next().text
            self.next()
            return name
        return None

    def close(self, opening: _Token) -> None:
        if self.token.kind == "end":
            fail(self.text, opening.pos, "found '(' that is never closed; add the ')'.")
        if not self.at(")"):
            self.unexpected("')' or an operator was expected")
        self.next()

    def unexpected(self, expected: str) -> NoReturn:
        found = "the end of the formula" if self.token.kind == "end" else repr(self.token.text)
        fail(self.text, self.token.pos, f"found {found} where {expected}.")


def deparse(node: Node) -> str:
    """Print an expression as R does: ``I(age - 11)``, ``sin(2 * pi * x)``, ``a/b``, ``x^2``."""
    if isinstance(node, Number):
        return deparse_number(node.value) + node.suffix
    if isinstance(node, Text):
        return '"' + node.value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(node, Name):
        return _quote(node.id)
    if node.fn == "(":
        return f"({deparse(node.args[0])})"
    if _is_operator(node.fn):
        return _deparse_operator(node)
    keys = node.keys or (None,) * len(node.args)
    args = [
        f"{key} = {deparse(arg)}" if key else deparse(arg)
        for key, arg in zip(keys, node.args, strict=True)
    ]
    return f"{_quote(node.fn)}({', '.join(args)})"


def _quote(name: str) -> str:
    return name if _SYNTACTIC.match(name) else f"`{name}`"


def _is_operator(fn: str) -> bool:
    return fn in _BINARY or fn == "!" or fn.startswith("%")


def _deparse_operator(node: Call) -> str:
    parts = [deparse(arg) for arg in node.args]
    if len(parts) == 1:
        return node.fn + parts[0]
    # R prints user operators with spaces, but %% and %/% without.
    tight = node.fn in _TIGHT or node.fn in ("%%", "%/%")
    return (node.fn if tight else f" {node.fn} ").join(parts)


def deparse_number(value: float) -> str:
    """Print a number as R: at most 15 digits, scientific only where that is shorter."""
    if value != value or value in (float("inf"), float("-inf")):
        return {"nan": "NaN", "inf": "Inf", "-inf": "-Inf"}[str(value)]
    digits = next((d for d in range(15) if float(f"{value:.{d}e}") == float(f"{value:.14e}")), 14)
    scientific = f"{value:.{digits}e}"
    exponent = int(scientific.split("e")[1])
    fixed = f"{value:.{max(digits - exponent, 0)}f}"
    return fixed if len(fixed) <= len(scientific) else scientific


def names_in(node: Node) -> Iterator[Name]:
    """Yield every name that an expression reads (not the names of functions)."""
    if isinstance(node, Name):
        yield node
    elif isinstance(node, Call):
        for arg in node.args:
            yield from names_in(arg)

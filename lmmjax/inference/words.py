"""Hypotheses in words: ``"Days = 10"``, ``"MachineB - MachineC = 0, MachineB = 8"``.

A small grammar: sums of coefficients and numbers with ``* /`` and brackets around either side of
``=`` (without it, ``= 0``); several hypotheses are parted by ``,`` or ``;``. Coefficients are known
by their names in R, longest first, so ``recipeB:temperature.L`` or ``I(x^2)`` need no quoting.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmmjax.errors import LmmError

_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_SIGNS = "+-*/=,;()"


class Hypotheses(NamedTuple):
    """Lβ = rhs, with the text of each row."""

    L: np.ndarray  # (r, p)
    rhs: np.ndarray  # (r,)
    names: list[str]


class _Linear(NamedTuple):
    """Coefficients and constant of a linear expression."""

    row: np.ndarray
    constant: float

    def plus(self, other: _Linear, sign: float) -> _Linear:
        return _Linear(self.row + sign * other.row, self.constant + sign * other.constant)

    def times(self, factor: float) -> _Linear:
        return _Linear(self.row * factor, self.constant * factor)


def parse(text: str | Sequence[str], names: Sequence[str], aliased: Sequence[str]) -> Hypotheses:
    """Read hypotheses about the coefficients ``names``.

    Raises
    ------
    LmmError
        Unknown or aliased coefficients, products of coefficients, malformed text.

    Examples
    --------
    >>> parse("2 * a - b = 3", ["a", "b"], []).L
    array([[ 2., -1.]])
    """
    texts = [text] if isinstance(text, str) else list(text)
    L, rhs, said = [], [], []
    for one in texts:
        reader = _Reader(one, names, aliased)
        for row, constant, words in reader.hypotheses():
            L.append(row)
            rhs.append(constant)
            said.append(words)
    return Hypotheses(np.array(L).reshape(-1, len(names)), np.array(rhs, float), said)


class _Reader:
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str, names: Sequence[str], aliased: Sequence[str]) -> None:
        self.text, self.names, self.at = text, list(names), 0
        self.tokens = list(_tokens(text, names, aliased))

    def fail(self, found: str) -> LmmError:
        return LmmError(
            f"cannot read the hypothesis {self.text!r}: found {found}; expected sums such as "
            f"'{self.names[0]} = 0'. Coefficients are {', '.join(self.names)}."
        )

    def peek(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else "end"

    def take(self) -> tuple[str, object, int, int]:
        if self.at >= len(self.tokens):
            raise self.fail("its end")
        self.at += 1
        return self.tokens[self.at - 1]

    def hypotheses(self):
        while True:
            start = self.tokens[self.at][2] if self.at < len(self.tokens) else 0
            side = self.sum()
            if self.peek() == "=":
                self.take()
                side = side.plus(self.sum(), -1.0)
            yield side.row, -side.constant, self.text[start : self.tokens[self.at - 1][3]].strip()
            if self.peek() == "end":
                return
            if self.take()[0] not in ",;":
                raise self.fail(repr(self.text[self.tokens[self.at - 1][2] :]))

    def sum(self) -> _Linear:
        value = _Linear(np.zeros(len(self.names)), 0.0)
        sign = 1.0
        if self.peek() in ("+", "-"):
            sign = -1.0 if self.take()[0] == "-" else 1.0
        value = value.plus(self.product(), sign)
        while self.peek() in ("+", "-"):
            sign = -1.0 if self.take()[0] == "-" else 1.0
            value = value.plus(self.product(), sign)
        return value

    def product(self) -> _Linear:
        value = self.atom()
        while self.peek() in ("*", "/"):
            divide = self.take()[0] == "/"
            other = self.atom()
            if divide and (np.any(other.row) or other.constant == 0):
                raise self.fail("a division by a coefficient or by 0")
            if np.any(value.row) and np.any(other.row):
                raise self.fail("a product of coefficients")
            if divide:
                value = value.times(1.0 / other.constant)
            elif np.any(other.row):
                value = other.times(value.constant)
            else:
                value = value.times(other.constant)
        return value

    def atom(self) -> _Linear:
        kind, value, *_ = self.take()
        zero = np.zeros(len(self.names))
        if kind == "number":
            return _Linear(zero, float(value))  # type: ignore[arg-type]
        if kind == "name":
            zero[self.names.index(str(value))] = 1.0
            return _Linear(zero, 0.0)
        if kind == "-":
            return self.atom().times(-1.0)
        if kind == "(":
            inner = self.sum()
            if self.take()[0] != ")":
                raise self.fail("a bracket that is not closed")
            return inner
        raise self.fail(repr(value))


def _tokens(text: str, names: Sequence[str], aliased: Sequence[str]):
    """Yield (kind, value, start, end); names of coefficients first, the longest that fits."""
    ordered = sorted([*names, *aliased], key=len, reverse=True)
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        name = next((n for n in ordered if text.startswith(n, at) and _ends(text, at, n)), None)
        if name is not None:
            if name in aliased:
                raise LmmError(
                    f"{name} is aliased with earlier columns, so it is not estimable; test "
                    "combinations that the data determine."
                )
            yield "name", name, at, at + len(name)
            at += len(name)
            continue
        number = _NUMBER.match(text, at)
        if number:
            yield "number", float(number[0]), at, number.end()
            at = number.end()
        elif text[at] in _SIGNS:
            yield text[at], text[at], at, at + 1
            at += 1
        else:
            raise LmmError(
                f"the hypothesis {text!r} names something unknown at {text[at:]!r}; expected one "
                f"of the coefficients {', '.join(names)}."
            )


def _ends(text: str, at: int, name: str) -> bool:
    """Whether the name is not a mere beginning of a longer word."""
    end = at + len(name)
    return end >= len(text) or not (
        name[-1].isalnum() and (text[end].isalnum() or text[end] in "._:")
    )

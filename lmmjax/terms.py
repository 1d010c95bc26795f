"""From terms and evaluated variables to the columns of a model matrix.

Columns, their names and their order equal R's ``model.matrix``: a factor gets contrasts in a term
whose margin stands before it and dummies otherwise (Chambers and Hastie 1992, p. 38 [1]_), in an
interaction the first variable varies fastest, and a contrast keeps R's suffix (``.L``, ``1``).
The published Python packages differ from R in the order of columns, in these names or in the
rule, and repairing their output is longer than the rule itself.

References
----------
.. [1] Chambers, J. M. and Hastie, T. J. (1992). Statistical Models in S. Chapman and Hall.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmmjax.errors import DesignError
from lmmjax.formula import Terms

__all__ = [
    "CONTRASTS",
    "Coding",
    "Encoded",
    "centrable",
    "constant_columns",
    "encode",
    "patterns",
    "spanning_term",
]


def _treatment(levels: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    return np.eye(len(levels))[:, 1:], tuple(levels[1:])


def _sum(levels: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    k = len(levels)
    return np.vstack([np.eye(k - 1), -np.ones(k - 1)]), _numbered(k - 1)


def _helmert(levels: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    k = len(levels)
    matrix = np.triu(-np.ones((k, k - 1)))
    matrix[np.arange(1, k), np.arange(k - 1)] = np.arange(1, k)
    return matrix, _numbered(k - 1)


def _poly(levels: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return orthonormal polynomials of equally spaced scores."""
    k = len(levels)
    scores = np.arange(k) - (k - 1) / 2
    q, r = np.linalg.qr(np.vander(scores, k, increasing=True))
    names = (".L", ".Q", ".C", *(f"^{d}" for d in range(4, k)))[: k - 1]
    return (q * np.sign(np.diag(r)))[:, 1:], names


def _numbered(k: int) -> tuple[str, ...]:
    return tuple(str(j + 1) for j in range(k))


CONTRASTS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, tuple[str, ...]]]] = {
    "treatment": _treatment,
    "sum": _sum,
    "helmert": _helmert,
    "poly": _poly,
}


@dataclass(frozen=True, eq=False)
class Coding:
    """How one variable becomes columns.

    Attributes
    ----------
    name : str
        R's text of the variable.
    levels : (L,) array of str, or None for a numeric variable
    contrast : str
        A key of `CONTRASTS`; ``""`` for a numeric variable.
    width : int
        Columns of a numeric variable; more than one are numbered, as R does (poly, splines).
    """

    name: str
    levels: np.ndarray | None = None
    contrast: str = ""
    width: int = 1

    def columns(self, full: bool) -> tuple[tuple[str, ...], np.ndarray | None]:
        """Return names and, for a factor, the (L, k) matrix of a row's values by level."""
        if self.levels is None:
            suffixes = _numbered(self.width) if self.width > 1 else ("",)
            return tuple(self.name + s for s in suffixes), None
        if full:
            return tuple(self.name + level for level in self.levels), np.eye(len(self.levels))
        if len(self.levels) < 2:
            raise DesignError(
                f"found one level ({', '.join(self.levels)}) of the factor {self.name}; expected "
                "at least 2 among the rows used. Remove it from the formula."
            )
        matrix, suffixes = CONTRASTS[self.contrast](self.levels)
        return tuple(self.name + s for s in suffixes), matrix


@dataclass(frozen=True, eq=False)
class Encoded:
    """A model matrix with its labels; `assign` is 0 for the intercept, then 1, 2 ... by term."""

    X: np.ndarray
    names: tuple[str, ...]
    assign: np.ndarray


def patterns(terms: Terms, codings: Mapping[str, Coding]) -> list[tuple[bool, ...]]:
    """Return, per term and variable, whether a factor gets a dummy for each level.

    R's rule: contrasts if the term without the variable is empty or part of a term before it;
    without an intercept the first factor of the first term that has one gets dummies.
    """
    full = []
    for position, term in enumerate(terms.terms):
        before = [set(t) for t in terms.terms[:position]]
        margins = [set(term) - {v} for v in term]
        full.append([bool(m) and not any(m <= b for b in before) for m in margins])
    if not terms.intercept:
        factors = (
            (t, i)
            for t, term in enumerate(terms.terms)
            for i, v in enumerate(term)
            if codings[terms.variables[v]].levels is not None
        )
        for t, i in itertools.islice(factors, 1):
            full[t][i] = True
    return [tuple(row) for row in full]


def encode(
    terms: Terms, codings: Mapping[str, Coding], values: Mapping[str, Any], n: int
) -> Encoded:
    """Build the model matrix.

    Parameters
    ----------
    terms : Terms
    codings : dict of Coding
        By variable.
    values : dict of ndarray
        By variable: codes (n,) with -1 for missing, or numbers (n,) or (n, k).
    n : int
        Rows.

    Returns
    -------
    Encoded
        `X` (n, p) float64 in Fortran order: columns are filled, scaled and summed one by one.

    Notes
    -----
    O(n p), no copy besides X and, in interactions, the columns of one variable.
    """
    plan = list(zip(terms.terms, patterns(terms, codings), strict=True))
    blocks = [
        [codings[terms.variables[v]].columns(full) for v, full in zip(term, row, strict=True)]
        for term, row in plan
    ]
    names = ["(Intercept)"] if terms.intercept else []
    assign = [0] * len(names)
    for position, block in enumerate(blocks):
        own = [":".join(reversed(c)) for c in itertools.product(*(b[0] for b in reversed(block)))]
        names += own
        assign += [position + 1] * len(own)
    X = np.empty((n, len(names)), order="F")
    X[:, : int(terms.intercept)] = 1.0
    place = int(terms.intercept)
    for (term, _), block in zip(plan, blocks, strict=True):
        values_of = [values[terms.variables[v]] for v in term]
        place = _fill(X, place, block, values_of)
    return Encoded(X, tuple(names), np.array(assign, np.int64))


def _fill(X: np.ndarray, place: int, block: list, values: list) -> int:
    """Write one term's columns; the first variable varies fastest."""
    widths = [len(names) for names, _ in block]
    for combination in itertools.product(*(range(w) for w in reversed(widths))):
        out = X[:, place]
        for i, j in enumerate(reversed(combination)):
            column = _column(values[i], block[i][1], j)
            if i == 0:
                out[:] = column
            else:
                out *= column
        place += 1
    return place


def _column(values: np.ndarray, matrix: np.ndarray | None, j: int) -> np.ndarray:
    if matrix is None:
        return values if values.ndim == 1 else values[:, j]
    # The code -1 (missing) picks the NaN at the end.
    return np.append(matrix[:, j], np.nan)[values]


def centrable(terms: Terms, codings: Mapping[str, Coding]) -> list[str]:
    """Return the numeric variables that can be centred without changing the column space.

    These are the variables whose every term has its margin in the model too (x:f with f, x with
    the constant), factors coded alike or fully in the margin.
    """
    present = {frozenset(term) for term in terms.terms}
    if terms.intercept or spanning_term(terms, codings) is not None:
        present.add(frozenset())
    return [
        name
        for v, name in enumerate(terms.variables)
        if codings[name].levels is None
        and all(frozenset(t) - {v} in present for t in map(frozenset, terms.terms) if v in t)
    ]


def spanning_term(terms: Terms, codings: Mapping[str, Coding]) -> int | None:
    """Return the first term whose dummies add to 1, if any."""
    for position, (term, row) in enumerate(zip(terms.terms, patterns(terms, codings), strict=True)):
        factors = all(codings[terms.variables[v]].levels is not None for v in term)
        if factors and all(row):
            return position
    return None


def constant_columns(terms: Terms, codings: Mapping[str, Coding], assign: np.ndarray) -> np.ndarray:
    """Coefficients a with X a = 1, (p,): the intercept, or the dummies of a term; else zeros.

    ``assign`` is that of `Encoded`.
    """
    if terms.intercept:
        return (assign == 0).astype(float)
    position = spanning_term(terms, codings)
    return (assign == (-1 if position is None else position + 1)).astype(float)

r"""Hypotheses Lβ = 0 of a term, of types I, II and III (Goodnight 1978, SAS report R-101).

With X'X = R'DR, R unit upper triangular, the rows of R that belong to a term are its type I test:
the term adjusted for those before it. Type II is the same after moving a term's containers behind
it, so that it is adjusted for every term that does not contain it. Type III lives in the
parametrisation with a dummy for every level, D = XA: the estimable functions that involve only the
term and its containers, orthogonal to those that involve the containers alone. It therefore does
not depend on the contrasts in use; without empty cells it equals sum-to-zero coding. A term
contains another if it has the same covariates and all of its factors, and more.

F does not depend on which rows span a hypothesis, Satterthwaite's denominator df do. The rows of
type III are those of lmerTest: in the coefficients of treatment coding, whatever the coding in use,
reduced so that each is one coefficient of the term plus coefficients of its containers. A single
term is its type I test there, as lmerTest has it (weighted models of streamed tables, which do not
know X'X: its coefficients). So the df are the same for every coding, too.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmmjax.errors import EstimabilityWarning, LmmError
from lmmjax.inference.nesting import keeps_rows
from lmmjax.rank import triangle
from lmmjax.terms import encode, spanning_term

if TYPE_CHECKING:
    from lmmjax.design import Design
    from lmmjax.fit import Fit

RANK = 1e-9

#: part of a column of a map between codings, whose entries are about 1, that counts
INDEPENDENT = 1e-8


def hypotheses(fit: Fit, kind: int | str) -> dict[str, np.ndarray]:
    """L of each fixed term, (rows, p), by term label; the intercept has none.

    Warns
    -----
    EstimabilityWarning
        Where columns are aliased (empty cells): type III then tests what is estimable.
    """
    kinds: dict[Any, int] = {1: 1, 2: 2, 3: 3, "I": 1, "II": 2, "III": 3}
    if kind not in kinds:
        found = repr(kind) if isinstance(kind, str | int | float) else f"a {type(kind).__name__}"
        raise LmmError(
            f"type={found} is unknown; expected 1, 2 or 3. To compare two fits, use "
            "lmmjax.lrt(small, big) or lmmjax.aic_table(...)."
        )
    design = fit.model.design
    if design.aliased:
        warnings.warn(_empty_cells(design, kinds[kind]), EstimabilityWarning, stacklevel=4)
    if kinds[kind] == 3:
        return type_three(fit)
    root = _root(fit)
    if kinds[kind] == 1 or len(_labels(design)) == 1:
        R = _sequential(root, np.arange(design.p))
        return {t: R[_columns(design, t)] for t in _labels(design)}
    return {t: _type_two(design, root, t) for t in _labels(design)}


def _empty_cells(design: Design, kind: int) -> str:
    dropped = ", ".join(design.aliased[:6]) + (" ..." if len(design.aliased) > 6 else "")
    return (
        f"{len(design.aliased)} columns of X depend on others (empty cells or copies): {dropped}. "
        f"Tests of type {'I' * kind} cover what the data determine; their hypotheses depend on "
        "which cells are empty."
    )


def _labels(design: Design) -> list[str]:
    return [t for t in design.x_terms if t != "(Intercept)"]


def _columns(design: Design, label: str) -> np.ndarray:
    return np.flatnonzero(design.x_assign == design.x_terms.index(label))


def _root(fit: Fit) -> np.ndarray:
    """A (p, p) matrix with the cross-products of X: X'WX for linear models, else X'X."""
    design = fit.model.design
    if fit.model.is_structured or (design.has_weights and fit.model.is_mixed):
        return triangle(design.X)
    _, units, gram, _ = fit.model._standard
    d = fit.model._plan.layout.d
    return np.linalg.cholesky(np.asarray(gram.core)[d:, d:]).T @ np.linalg.inv(units.A)


def _sequential(root: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows of R for the columns taken in ``order``, put back at their own places."""
    R = np.linalg.qr(root[:, order], mode="r")
    R = R / np.diag(R)[:, None]
    out = np.zeros_like(R)
    out[np.ix_(order, order)] = R
    return out


def _type_two(design: Design, root: np.ndarray, label: str) -> np.ndarray:
    containers = [t for t in _labels(design) if contains(design, t, label)]
    if not containers:
        return np.eye(design.p)[_columns(design, label)]
    late = {label, *containers}
    first = [j for t in design.x_terms if t not in late for j in _columns(design, t)]
    own = list(_columns(design, label))
    last = [j for t in containers for j in _columns(design, t)]
    return _sequential(root, np.array([*first, *own, *last], int))[own]


def contains(design: Design, outer: str, inner: str) -> bool:
    """Whether term ``outer`` has the covariates of ``inner`` and all of its factors, and more."""
    a, b = _parts(design, outer), _parts(design, inner)
    return a[1] == b[1] and b[0] < a[0]


def _parts(design: Design, label: str) -> tuple[frozenset[str], frozenset[str]]:
    """(factors, covariates) of a term."""
    spec = design.spec
    names = spec.term_variables.get(label, ())
    factors = {v for v in names if spec.codings[v].levels is not None}
    return frozenset(factors), frozenset(names) - factors


# -- type III ------------------------------------------------------------------------------------


class Codings(NamedTuple):
    """Other parametrisations of X: D = X A with all dummies, X_t = X B with treatment contrasts."""

    A: np.ndarray  # (p, D)
    owner: np.ndarray  # term of each dummy column, (D,)
    B: np.ndarray  # (p, p)
    treatment: np.ndarray  # term of each column of X_t, (p,)


def type_three(fit: Fit) -> dict[str, np.ndarray]:
    """L of each term; see the header. O(P³) with P the columns of the dummy parametrisation."""
    design = fit.model.design
    k, labels = codings(design), design.x_terms
    back = np.linalg.inv(k.B)
    if len(_labels(design)) == 1 and (keeps_rows(fit) or not design.has_weights):
        R = _sequential(_root(fit) @ k.B, np.arange(design.p))
        return {t: R[k.treatment == labels.index(t)] @ back for t in _labels(design)}
    out = {}
    for i, label in enumerate(labels):
        if label == "(Intercept)":
            continue
        above = np.array([contains(design, t, label) for t in labels])
        own = k.owner == i
        mine = _null(k.A[:, ~(own | above[k.owner])].T)
        alone = _null(k.A[:, ~above[k.owner]].T)
        L = mine @ _null((mine.T @ (k.A @ k.A.T) @ alone).T)
        out[label] = _reduced(L.T @ k.B, np.flatnonzero(k.treatment == i)) @ back
    return out


def _reduced(L: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Rows of the same span with ones and zeros in the first independent columns, ``own`` first."""
    order = np.append(own, np.setdiff1d(np.arange(L.shape[1]), own)).astype(int)
    first = order[_first_independent(L[:, order])]
    rows = np.linalg.solve(L[:, first], L)
    rows[np.abs(rows) < RANK] = 0.0
    return rows


def _first_independent(M: np.ndarray) -> np.ndarray:
    """Positions of the columns that do not depend on those before them."""
    Q, found = np.zeros((len(M), 0)), []
    for j, column in enumerate(M.T):
        left = column - Q @ (Q.T @ column)
        left = left - Q @ (Q.T @ left)
        size = np.linalg.norm(left)
        if size > INDEPENDENT * max(np.linalg.norm(column), INDEPENDENT):
            Q = np.column_stack([Q, left / size])
            found.append(j)
    return np.array(found, int)


def _null(M: np.ndarray) -> np.ndarray:
    """Orthonormal basis of {c: Mc = 0}, as columns."""
    if M.shape[0] == 0:
        return np.eye(M.shape[1])
    _, s, Vt = np.linalg.svd(M)
    rank = int(np.sum(s > RANK * max(s[0], 1e-300))) if len(s) and s[0] > RANK else 0
    return Vt[rank:].T


def codings(design: Design) -> Codings:
    """The parametrisations by dummies and by treatment contrasts, from the codings alone.

    Each term's dummies are columns of the terms within it, whatever the data; so A is found on a
    small grid of all levels with arbitrary covariates, term by term, and B with it. Where columns
    of X are aliased, X_t has the first independent ones.
    """
    spec = design.spec
    terms, coded = spec.parsed.terms, spec.codings
    plain = {
        name: c if c.levels is None else replace(c, contrast="treatment")
        for name, c in coded.items()
    }
    offset, P = int(terms.intercept), len(spec.keep)
    span = None if terms.intercept else spanning_term(terms, coded)
    constant = np.eye(P)[:, :offset]
    A, B = [constant], [constant]
    for i, term in enumerate(terms.terms):
        wanted = set(term) | (set(terms.terms[span]) if span is not None else set())
        grid, n = _grid(terms, coded, wanted)
        encoded = encode(terms, coded, grid, n)
        within = [j for j, other in enumerate(terms.terms) if set(other) <= wanted]
        use = np.isin(encoded.assign, [0, *(j + 1 for j in within)])
        other = encode(terms, plain, grid, n)
        D = _dummy_columns(
            [coded[terms.variables[v]] for v in term], [grid[terms.variables[v]] for v in term]
        )
        for blocks, columns in ((A, D), (B, other.X[:, other.assign == i + 1])):
            map_ = np.zeros((P, columns.shape[1]))
            map_[use] = np.linalg.lstsq(encoded.X[:, use], columns, rcond=None)[0]
            if not np.allclose(encoded.X[:, use] @ map_[use], columns, atol=1e-8):
                raise LmmError(
                    f"the term {terms.labels[i]} is not spanned by the terms within it, so type "
                    "III hypotheses are not defined; use type=1 or 2, or add the lower-order terms."
                )
            blocks.append(map_)
    owners = [np.repeat(np.arange(len(M)) + offset - 1, [m.shape[1] for m in M]) for M in (A, B)]
    maps = [np.hstack(M) for M in (A, B)]
    if spec.alias is not None:
        maps = [M[spec.keep] + spec.alias @ M[~spec.keep] for M in maps]
    first = _first_independent(maps[1])
    return Codings(maps[0], owners[0], maps[1][:, first], owners[1][first])


def _grid(terms: Any, codings: Any, wanted: set[int]) -> tuple[dict[str, np.ndarray], int]:
    """All combinations of the wanted factors' levels, several times over with other covariates."""
    names = [terms.variables[v] for v in sorted(wanted)]
    factors = [name for name in names if codings[name].levels is not None]
    widths = [codings[name].width for name in names if codings[name].levels is None]
    copies = int(np.prod([1 + w for w in widths])) + 1 if widths else 1
    cells = list(itertools.product(*(range(len(codings[f].levels)) for f in factors)))
    codes = np.tile(np.array(cells, np.int32).reshape(len(cells), len(factors)), (copies, 1))
    n, rng = len(codes), np.random.default_rng(0)
    grid: dict[str, np.ndarray] = {}
    for name in terms.variables:
        coding = codings[name]
        if coding.levels is not None:
            grid[name] = codes[:, factors.index(name)] if name in factors else np.zeros(n, np.int32)
        else:
            grid[name] = rng.normal(size=(n, coding.width) if coding.width > 1 else n)
    return grid, n


def _dummy_columns(codings: list[Any], values: list[np.ndarray]) -> np.ndarray:
    """Products of a dummy per level and of covariates, (n, D)."""
    out = np.ones((len(values[0]), 1))
    for coding, value in zip(codings, values, strict=True):
        if coding.levels is not None:
            part = np.eye(len(coding.levels))[value]
        else:
            part = value.reshape(len(value), -1)
        out = (out[:, :, None] * part[:, None, :]).reshape(len(out), -1)
    return out

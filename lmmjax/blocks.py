r"""Cross-products of a large table in memory, block by block: nothing of its size is made.

Means, sizes and the fit of y come from the moments of [X y] that the judgement of X's rank took
(`lmmjax.rank.Moments`); the standardised columns of a block live only until its products are summed
(`lmmjax.totals.sum_standardised`, as for streamed tables).
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from lmmjax.covariance import covariance
from lmmjax.design import LARGE, Design
from lmmjax.gram import (
    DENSE,
    Gram,
    Plan,
    Rhs,
    Standardised,
    Units,
    Workspace,
    parents,
    shift_matrix,
)
from lmmjax.late import moments_of, rows_of
from lmmjax.totals import empty_totals, sum_standardised

__all__ = ["products"]

Array = np.ndarray


class _Shift(NamedTuple):
    """(column - mean) / size."""

    mean: Array
    size: Array

    def apply(self, columns: Array) -> Array:
        """In place."""
        for j, column in enumerate(columns.T):
            if self.mean[j] != 0.0:
                column -= self.mean[j]
            if self.size[j] != 1.0:
                column /= self.size[j]
        return columns


class _Term(NamedTuple):
    """How the columns of a term are standardised; ``twins`` are columns of X equal to them."""

    shift: _Shift
    B: Array
    twins: Any  # slice, (S,) int, or None


def products(design: Design, plan: Plan) -> tuple[Units, Gram, Rhs] | None:
    """Units and cross-products; as `gram.standardise` and `gram.crossproducts`, to rounding.

    None where those have to be asked: few rows, weights, no intercept, a dense core, columns so far
    from the origin that their moments lack digits, a nearly exact fit.

    Notes
    -----
    O(n (S + d + p) S) time; memory of a block and of the sums. A block has more rows than twice
    the levels of any factor, so that adding its sums costs little beside making them.
    """
    layout, m = plan.layout, moments_of(design, "X")
    if m is None or design.has_weights or layout.sparse or layout.d > DENSE or not m.precise():
        return None
    n, p, mean, centred = m.n, layout.p, m.mean, m.centred() / m.n
    spread = np.sqrt(np.diag(centred))
    unit = centred[:-1, :-1] / np.outer(spread[:-1], spread[:-1])
    slopes = np.linalg.solve(unit, centred[:-1, -1] / spread[:-1])
    left = centred[-1, -1] - slopes @ (centred[:-1, -1] / spread[:-1])
    if not left > 1e-8 * centred[-1, -1]:
        return None
    scale, constant = float(np.sqrt(left)), np.eye(p)[0]
    x = _Shift(np.append(0.0, mean[:-1]), np.append(1.0, spread[:-1]))
    terms = [_term(design, k, x) for k in range(len(design.terms))]
    if not all(np.isfinite(t.B).all() for t in terms):
        return None
    sums, space = empty_totals(plan), Workspace()
    size = max(LARGE, *(2 * J for _, _, J in (*layout.chain, *layout.core)), 0)
    for start in range(0, n, size):
        rows = slice(start, start + size)
        X = x.apply(rows_of(design, "X", rows))
        y = design.y[rows] - design.offset[rows] if design.has_offset else design.y[rows].copy()
        y -= mean[-1]
        y -= X[:, 1:] @ slopes
        y /= scale
        Z = [
            t.shift.apply(rows_of(design.terms[k], "z", rows)) if t.twins is None else X[:, t.twins]
            for k, t in enumerate(terms)
        ]
        codes = [term.codes[rows] for term in design.terms]
        standard = Standardised(X, y, tuple(Z), None)  # type: ignore[arg-type]
        sums.add(sum_standardised(standard, codes, None, plan, space))
    A = shift_matrix(constant, x.mean, x.size)
    beta0 = constant * mean[-1] + A @ np.append(0.0, slopes)
    units = Units(A, beta0, scale, tuple(t.B for t in terms), float(np.linalg.slogdet(A)[1]), n, p)
    flat, levels = sums.flat, sums.levels
    the_gram = Gram(
        own=tuple(arrays[0] for arrays in levels),
        up=tuple(tuple(arrays[1:-2]) for arrays in levels),
        parent=parents(design, plan),
        border=tuple(arrays[-2] for arrays in levels),
        core=flat["core"],
        n=np.float64(n),
        logdet_R=np.float64(0.0),
    )
    rhs = Rhs(tuple(a[-1] for a in levels), flat["core_y"], np.float64(flat["yy"]))
    return units, the_gram, rhs


def _term(design: Design, k: int, x: _Shift) -> _Term:
    """Choose shifts and scales of a term, as `gram.standardise` does."""
    term, terms = design.terms[k], design.spec.random[k].terms
    structure = covariance(term.cov, len(term.names))
    shifted = structure.mixes and terms.intercept
    twins = [_twin(design, k, name) for name in term.names]
    mean, rms = np.zeros(len(twins)), np.ones(len(twins))
    own = [s for s, j in enumerate(twins) if j is None and term.names[s] != "(Intercept)"]
    if own:
        mean[own], rms[own] = _means_and_sizes(design, k, own, shifted)
    for s, j in enumerate(twins):
        if j is not None:
            mean[s], rms[s] = x.mean[j], x.size[j]
            if not shifted:
                rms[s] = np.hypot(rms[s], mean[s]) if j else 1.0
    if not shifted:
        mean[:] = 0.0
    size = rms if structure.scales else np.full(len(rms), rms.mean())
    B = np.eye(len(mean))
    if shifted:
        B[0] -= mean
    same = all(
        j is not None and mean[s] == x.mean[j] and size[s] == x.size[j] for s, j in enumerate(twins)
    )
    return _Term(_Shift(mean, size), B / size, _as_slice(twins) if same else None)


def _as_slice(places: list[Any]) -> Any:
    """A slice where there is one, which takes no copy."""
    step = places[1] - places[0] if len(places) > 1 else 1
    regular = step > 0 and all(b - a == step for a, b in itertools.pairwise(places))
    return slice(places[0], places[-1] + 1, step) if regular else np.array(places)


def _twin(design: Design, k: int, name: str) -> int | None:
    """The column of X that is the same by construction: the intercept, or one numeric variable."""
    spec = design.spec
    if name == "(Intercept)":
        return 0 if spec.random[k].terms.intercept else None
    for codings in (spec.codings, spec.random[k].codings):
        if name not in codings or codings[name].levels is not None:
            return None
    found = [j for j, x in enumerate(design.x_names) if x == name]
    return next((j for j in found if design.x_terms[design.x_assign[j]] == name), None)


def _means_and_sizes(
    design: Design, k: int, columns: list[int], shifted: bool
) -> tuple[Array, Array]:
    """Means of columns of z, and their root mean squares about them or about 0; one pass."""
    first, total, square = np.zeros((3, len(columns)))
    for start in range(0, design.n, LARGE):
        rows = rows_of(design.terms[k], "z", slice(start, start + LARGE))
        for i, column in enumerate(rows[:, s] for s in columns):
            first[i] = column[0] if start == 0 and shifted else first[i]
            moved = column - first[i]
            total[i] += moved.sum()
            square[i] += moved @ moved
    mean = total / design.n
    rms = np.sqrt(np.maximum(square / design.n - (mean**2 if shifted else 0.0), 0.0))
    return first + mean, np.where(rms > 0, rms, 1.0)

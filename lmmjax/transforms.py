"""Transforms that learn from the training data: poly, scale, center, bs, ns.

Each is a pair: ``fit_*(values, ...)`` returns a small state of plain numbers, ``apply_*(x, state)``
the columns; `Values` may be a column in memory or one that was streamed past. The columns equal
those of R's `poly`, `scale`, `splines::bs` and `splines::ns`, signs included. Missing values are
left out of the state and stay missing in the columns. Polynomials and B-splines are evaluated by
formulaic; natural splines, which it lacks with R's knots and signs, stand on SciPy's B-splines.

References
----------
.. [1] Kennedy, W. J. and Gentle, J. E. (1980). Statistical Computing, ch. 8 (orthogonal
   polynomials by the three-term recurrence).
.. [2] de Boor, C. (1978). A Practical Guide to Splines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmmjax.errors import DataError, FormulaError
from lmmjax.values import Values

__all__ = ["STATEFUL", "SUMMARIES", "Transform"]

Array = np.ndarray


@dataclass(frozen=True)
class Transform:
    """A stateful transform; `apply` returns (n,) or, for a basis, (n, k)."""

    fit: Callable[..., Any]
    apply: Callable[[Array, Any], Array]


def _present(x: Values) -> Values:
    kept = x.finite()
    if kept.size == 0:
        raise DataError("found no finite value in the argument of a transform; check the column.")
    return kept


def _whole(value: Any, what: str, least: int = 1) -> int:
    if not isinstance(value, int | float) or value != int(value) or value < least:
        raise FormulaError(f"found {what} = {value}; expected a whole number of at least {least}.")
    return int(value)


# Orthogonal polynomials -----------------------------------------------------------------------


def fit_poly(x: Values, degree: float = 1, raw: bool = False) -> tuple:
    """Learn the recurrence P_k+1 = (x - alpha_k) P_k - (norm_k / norm_k-1) P_k-1.

    O(n degree^2), one scan of the values per degree (Stieltjes' procedure).
    """
    degree = _whole(degree, "the degree of poly()")
    if raw:
        return degree, None
    x = _present(x)
    distinct = x.distinct(degree)
    if distinct <= degree:
        raise DataError(
            f"found {distinct} distinct values in poly() of degree {degree}; use a lower degree."
        )
    alpha: dict[int, float] = {}
    norms2: dict[int, float] = {}
    shift = x.mean()
    for k in range(degree + 1):
        norm, first = 0.0, 0.0
        for chunk in x.chunks():
            square = _monic(chunk, k, alpha, norms2) ** 2
            norm += float(square.sum())
            first += float(square @ (chunk - shift))
        norms2[k] = norm
        if k < degree:
            alpha[k] = shift + first / norm
    return degree, {"alpha": alpha, "norms2": norms2}


def _monic(x: Array, degree: int, alpha: dict[int, float], norms2: dict[int, float]) -> Array:
    """Return the monic orthogonal polynomial of `degree` at x."""
    before, value = np.zeros_like(x), np.ones_like(x)
    for k in range(degree):
        beta = norms2[k] / norms2[k - 1] if k else 0.0
        before, value = value, (x - alpha[k]) * value - beta * before
    return value


def apply_poly(x: Array, state: tuple) -> Array:
    """Return the (n, degree) basis, without the constant."""
    from formulaic.transforms import poly

    degree, learned = state
    return np.asarray(poly(x, degree, raw=learned is None, _state=learned or {}))


# Centring and scaling -------------------------------------------------------------------------


def fit_scale(x: Values, center: bool | float = True, scale: bool | float = True) -> tuple:
    """Learn mean and SD (divisor n - 1); without centring R divides by the root mean square."""
    x = _present(x)
    shift = x.mean() if center is True else float(center)
    spread = 1.0
    if scale is True:
        spread = float(np.sqrt(x.sum_squares(shift) / max(x.size - 1, 1)))
    elif scale is not False:
        spread = float(scale)
    if spread == 0.0:
        raise DataError("found a constant column in scale(); remove it or use center().")
    return shift, spread


def apply_scale(x: Array, state: tuple) -> Array:
    """Return (x - shift) / spread."""
    return (x - state[0]) / state[1]


def fit_center(x: Values) -> tuple:
    """Learn the mean."""
    return _present(x).mean(), 1.0


# Splines --------------------------------------------------------------------------------------


def _knots(x: Values, df: float | None, knots: Any, fixed: int, bounds: Any) -> tuple[Array, Array]:
    """Return boundary knots (2,) and inner knots; `fixed` is the df of the basis without knots."""
    x = _present(x)
    boundary = np.array([x.min(), x.max()]) if bounds is None else np.sort(np.atleast_1d(bounds))
    if knots is not None:
        return boundary, np.sort(np.atleast_1d(np.asarray(knots, float)))
    inner = 0 if df is None else _whole(df, "the df of a spline") - fixed
    if inner < 0:
        raise FormulaError(f"found a spline with df = {df:g}; expected at least {fixed}.")
    return boundary, x.quantiles(np.linspace(0, 1, inner + 2)[1:-1], *boundary)


def fit_bs(
    x: Values,
    df: float | None = None,
    knots: Any = None,
    degree: float = 3,
    intercept: bool = False,
    Boundary_knots: Any = None,
) -> tuple:
    """Learn the knots of a B-spline basis; inner knots at quantiles, as R's bs()."""
    degree = _whole(degree, "the degree of bs()")
    boundary, inner = _knots(x, df, knots, degree + bool(intercept), Boundary_knots)
    return tuple(map(float, boundary)), tuple(map(float, inner)), degree, bool(intercept)


def apply_bs(x: Array, state: tuple) -> Array:
    """Return the (n, df) basis; outside the boundary knots the end polynomials go on."""
    from formulaic.transforms import basis_spline

    (low, high), knots, degree, intercept = state
    columns = basis_spline(
        x,
        knots=knots,
        degree=degree,
        include_intercept=intercept,
        lower_bound=low,
        upper_bound=high,
        extrapolation="extend",
    )
    return np.stack(list(columns.values()), axis=1)


def _padded(boundary: Array, inner: Array, degree: int) -> tuple[float, ...]:
    low, high = ([float(b)] * (degree + 1) for b in boundary)
    return (*low, *map(float, inner), *high)


def _basis(x: Array, knots: Sequence[float], degree: int, derivative: int = 0) -> Array:
    from scipy.interpolate import BSpline  # slow to import, rarely needed

    spline = BSpline(np.asarray(knots), np.eye(len(knots) - degree - 1), degree)
    if derivative:
        spline = spline.derivative(derivative)
    return spline(x)  # continues the end polynomials outside the knots, as R does


def fit_ns(
    x: Values,
    df: float | None = None,
    knots: Any = None,
    intercept: bool = False,
    Boundary_knots: Any = None,
) -> tuple:
    """Learn a natural cubic spline: B-splines whose second derivative is 0 at both ends."""
    boundary, inner = _knots(x, df, knots, 1 + bool(intercept), Boundary_knots)
    knots4 = _padded(boundary, inner, 3)
    drop = 0 if intercept else 1
    ends = _basis(boundary, knots4, 3, derivative=2)[:, drop:]
    # Householder QR as in R, so that the basis of the null space has R's signs.
    q, _ = np.linalg.qr(ends.T, mode="complete")
    return knots4, drop, tuple(map(tuple, q[:, 2:].tolist()))


def apply_ns(x: Array, state: tuple) -> Array:
    """Return the (n, df) basis; it is linear outside the boundary knots."""
    knots, drop, null = state
    inside = np.clip(x, knots[0], knots[-1])
    basis = _basis(inside, knots, 3)
    outside = np.flatnonzero(inside != x)
    outside = outside[~np.isnan(x[outside])]
    if outside.size:
        slope = _basis(inside[outside], knots, 3, derivative=1)
        basis[outside] += slope * (x - inside)[outside, None]
    return basis[:, drop:] @ np.asarray(null)


STATEFUL = {
    "poly": Transform(fit_poly, apply_poly),
    "scale": Transform(fit_scale, apply_scale),
    "center": Transform(fit_center, apply_scale),
    "bs": Transform(fit_bs, apply_bs),
    "ns": Transform(fit_ns, apply_ns),
}


def _median(x: Values) -> float:
    return float(x.quantiles(np.array([0.5]))[0])


# Summaries keep their training value too: I(x - mean(x)) means the same for new data.
SUMMARIES: dict[str, Callable[[Values], float]] = {
    "mean": Values.mean,
    "median": _median,
    "sd": Values.sd,
    "min": Values.min,
    "max": Values.max,
}

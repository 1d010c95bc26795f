"""Estimated marginal means, their contrasts, and trends of a covariate; see grid.py.

Everything is a matrix L of combinations of grid rows, judged by the method of degrees of freedom in
use. A combination that needs a cell which the data do not determine is NaN, with a warning.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmmjax import tables
from lmmjax.errors import DataError, EstimabilityWarning, LmmError
from lmmjax.inference import adjust as adjustment
from lmmjax.inference import grid as grids
from lmmjax.inference.hypothesis import Method
from lmmjax.terms import CONTRASTS

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.design import Design

WEIGHTS = ("equal", "proportional")

#: step of a numerical trend, relative to the range of the covariate
STEP = 1e-3


class Combinations(NamedTuple):
    """Averages of the grid: one row of ``L`` per combination of the levels of ``names``."""

    names: tuple[str, ...]
    levels: list[tuple[str, ...]]
    L: np.ndarray  # (r, p), NaN where not estimable


def names_of(specs: Any) -> tuple[str, ...]:
    """Column names from a name, a list of names, or text such as ``"recipe:temperature"``."""
    if specs is None:
        return ()
    if isinstance(specs, str):
        return tuple(part.strip() for part in specs.lstrip("~ ").replace("*", ":").split(":"))
    return tuple(specs)


def averages(
    design: Design, names: Sequence[str], weights: str, at: Mapping[str, Any] | None
) -> Combinations:
    """Marginal averages of the grid over all factors that are not named."""
    return _average(design, grids.build(design, at), names, weights)


def _average(design: Design, grid: grids.Grid, names: Sequence[str], weights: str) -> Combinations:
    if weights not in WEIGHTS:
        raise LmmError(f"weights={weights!r} is unknown; expected 'equal' or 'proportional'.")
    known = list(grid.factors)
    for name in names:
        if name not in known:
            raise DataError(
                f"{name!r} is not a factor of the fixed part; expected some of {known}. A "
                "covariate needs at={...} with the values wanted."
            )
    mine = [known.index(n) for n in names]
    rest = [i for i in range(len(known)) if i not in mine]
    w = _weights(design, grid, rest) if weights == "proportional" else np.ones(len(grid.cells))
    shapes = [range(len(grid.factors[n])) for n in names]
    levels, rows = [], []
    for combination in itertools.product(*reversed(shapes)):
        wanted = np.array(combination[::-1], int)
        here = np.all(grid.cells[:, mine] == wanted, axis=1)
        share = w[here] / w[here].sum()
        rows.append(share[share > 0] @ grid.rows[here][share > 0])
        levels.append(tuple(grid.factors[n][i] for n, i in zip(names, wanted, strict=True)))
    return Combinations(tuple(names), levels, np.array(rows))


def _weights(design: Design, grid: grids.Grid, rest: list[int]) -> np.ndarray:
    """Frequency of the combinations of the factors that are averaged over."""
    _, inverse = np.unique(grid.cells[:, rest], axis=0, return_inverse=True)
    inverse = inverse.ravel()
    return np.bincount(inverse, grids.counts(design, grid))[inverse]


def trends(
    design: Design, var: str, names: Sequence[str], weights: str, at: Mapping[str, Any] | None
) -> Combinations:
    """Slopes in a covariate: central differences of the grid (exact up to quadratics)."""
    covariates = grids.numeric_columns(design)
    if var not in covariates:
        raise DataError(
            f"{var!r} is not a covariate of the fixed part; expected one of {covariates}."
        )
    column = design.columns[var].to_numpy(float)
    step = STEP * float(np.ptp(column))
    up = _average(design, grids.build(design, at, {var: step}), names, weights)
    down = _average(design, grids.build(design, at, {var: -step}), names, weights)
    return up._replace(L=(up.L - down.L) / (2 * step))


# -- tables -----------------------------------------------------------------------------------


def judged(m: Method, L: np.ndarray, shift: float, level: float) -> pd.DataFrame:
    """``coef_table``'s columns for the rows of L; NaN rows where not estimable, with a warning."""
    import pandas as pd

    known = np.all(np.isfinite(L), axis=1)
    if not known.all():
        warnings.warn(
            f"{int(np.sum(~known))} of {len(L)} results are not estimable (empty cells) and are "
            "NaN; restrict the levels with at=, or drop the interaction.",
            EstimabilityWarning,
            stacklevel=5,
        )
    table = tables.t_table(
        L[known] @ m.beta + shift,
        m.std_errors(L[known]),
        m.degrees(L[known]),
        list(np.flatnonzero(known)),
        level,
    )
    return pd.DataFrame(table.reindex(range(len(L)))).astype(float)


def frame(m: Method, c: Combinations, what: str, shift: float, level: float) -> pd.DataFrame:
    """One column a factor, then the estimate under the name ``what``, SE, df and interval."""
    import pandas as pd

    table = judged(m, c.L, shift, level).rename(columns={"estimate": what})
    labels = pd.DataFrame(c.levels, columns=list(c.names), index=range(len(c.L)))
    return pd.concat([labels, table[[what, "std_error", "df", "ci_low", "ci_high"]]], axis=1)


# -- contrasts --------------------------------------------------------------------------------


def compare(m: Method, c: Combinations, n_by: int, method: Any, adjust: str | None) -> pd.DataFrame:
    """Contrasts of the means of each combination of the last ``n_by`` factors, family by family."""
    import pandas as pd

    own = len(c.names) - n_by
    families = list(dict.fromkeys(lv[own:] for lv in c.levels))
    adjust = _default(method) if adjust is None else adjustment.check(adjust)
    if adjust == "tukey" and method != "pairwise":
        raise LmmError(
            "adjust='tukey' is for all pairwise comparisons; use 'holm', 'bonferroni', 'bh' or "
            "'none' with other contrasts."
        )
    labels, rows, sizes = [], [], []
    for family in families:
        members = [i for i, lv in enumerate(c.levels) if lv[own:] == family]
        made = coefficients([" ".join(c.levels[i][:own]) for i in members], method)
        for text, weights in made.items():
            labels.append((text, *family))
            used = weights != 0
            rows.append(weights[used] @ c.L[members][used])
        sizes.append((len(made), len(members)))
    table = judged(m, np.array(rows).reshape(-1, len(m.beta)), 0.0, 0.95)
    table["p_value"] = np.concatenate(
        [
            adjustment.adjusted(
                part["p_value"].to_numpy(),
                adjust,
                part["statistic"].to_numpy(),
                part["df"].to_numpy(),
                size[1],
            )
            for part, size in zip(_parts(table, [s[0] for s in sizes]), sizes, strict=True)
        ]
    )
    text = pd.DataFrame(labels, columns=["contrast", *c.names[own:]], index=range(len(rows)))
    columns = ["estimate", "std_error", "df", "statistic", "p_value"]
    return pd.concat([text, table[columns]], axis=1)


def _parts(table: pd.DataFrame, sizes: list[int]) -> list[pd.DataFrame]:
    ends = np.cumsum([0, *sizes])
    return [table.iloc[a:b] for a, b in itertools.pairwise(ends)]


def _default(method: Any) -> str:
    if method == "pairwise":
        return "tukey"
    return "holm" if method == "trt.vs.ctrl" else "none"


def coefficients(levels: list[str], method: Any) -> dict[str, np.ndarray]:
    """Weights of the means per contrast, by label.

    Parameters
    ----------
    levels : list of str
    method : {"pairwise", "trt.vs.ctrl", "poly"} or dict
        A dict gives ``{"label": [weight per level]}``.

    Examples
    --------
    >>> {k: w.tolist() for k, w in coefficients(["a", "b", "c"], "poly").items()}
    {'linear': [-1.0, 0.0, 1.0], 'quadratic': [1.0, -2.0, 1.0]}
    """
    k, e = len(levels), np.eye(len(levels))
    if isinstance(method, Mapping):
        return {str(name): _custom(name, w, k) for name, w in method.items()}
    if method == "pairwise":
        pairs = itertools.combinations(range(k), 2)
        return {f"{levels[i]} - {levels[j]}": e[i] - e[j] for i, j in pairs}
    if method == "trt.vs.ctrl":
        return {f"{levels[i]} - {levels[0]}": e[i] - e[0] for i in range(1, k)}
    if method == "poly":
        degrees = ["linear", "quadratic", "cubic", "quartic"]
        columns = CONTRASTS["poly"](np.array(levels, object))[0].T[:6]
        names = [degrees[i] if i < 4 else f"degree {i + 1}" for i in range(len(columns))]
        return {n: _whole(c) for n, c in zip(names, columns, strict=True)}
    raise LmmError(
        f"method={method!r} is unknown; expected 'pairwise', 'trt.vs.ctrl', 'poly' or a dict of "
        "weights by label."
    )


def _custom(name: Any, weights: Any, k: int) -> np.ndarray:
    w = np.asarray(weights, float)
    if w.shape != (k,):
        raise LmmError(
            f"the contrast {name!r} has shape {w.shape}; expected one weight for {k} means."
        )
    return w


def _whole(column: np.ndarray) -> np.ndarray:
    """The column as its smallest whole numbers."""
    size = np.abs(column)
    unit = column / size[size > 1e-8 * size.max()].min()
    for times in range(1, 1000):
        scaled = unit * times
        if np.allclose(scaled, np.round(scaled), atol=1e-6 * times):
            return np.round(scaled) + 0.0
    return column

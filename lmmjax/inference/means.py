"""Estimated marginal means, their contrasts, and trends of a covariate; see grid.py.

Everything is a matrix L of combinations of grid rows, judged by the method of degrees of freedom in
use. A combination that the data do not determine (empty cells) is NaN, with a warning; others of
the same cells are not.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmmjax import tables
from lmmjax.errors import DataError, EstimabilityWarning, LmmError
from lmmjax.expr import names_in
from lmmjax.inference import adjust as adjustment
from lmmjax.inference import grid as grids
from lmmjax.inference import simultaneous
from lmmjax.inference.hypothesis import Method
from lmmjax.terms import CONTRASTS

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.design import Design

WEIGHTS = ("equal", "proportional")

#: each level against the first
CONTROL = ("trt.vs.ctrl", "control")

NOTE = "averaged over {}, which interacts with {}: the averages may mislead"

#: step of a numerical trend, relative to the range of the covariate
STEP = 1e-3


class Combinations(NamedTuple):
    """Averages of the grid: one row per combination of the levels of ``names``."""

    names: tuple[str, ...]
    levels: list[tuple[str, ...]]
    rows: grids.Rows  # full model rows, estimable or not


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
    levels, shares = [], []
    for combination in itertools.product(*reversed(shapes)):
        wanted = np.array(combination[::-1], int)
        here = np.all(grid.cells[:, mine] == wanted, axis=1)
        shares.append(np.where(here, w, 0.0) / w[here].sum())
        levels.append(tuple(grid.factors[n][i] for n, i in zip(names, wanted, strict=True)))
    return Combinations(tuple(names), levels, grid.rows.combine(np.array(shares)))


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
    return up._replace(rows=up.rows.slope(down.rows, 2 * step))


def interaction_note(
    design: Design,
    names: Sequence[str],
    at: Mapping[str, Any] | None = None,
    trend: str | None = None,
) -> str | None:
    """What is averaged over though it interacts with what is asked for, in words.

    As emmeans' note on involvement in interactions; what ``at`` holds at one value is not averaged,
    nor is the covariate of a trend.
    """
    held = {c for c, value in (at or {}).items() if len(grids.as_list(value)) == 1}
    asked = [*names, *([] if trend is None or trend in names else [trend])]
    terms = design.spec.parsed.terms
    known = zip(terms.variables, terms.nodes, strict=True)
    nodes = {text: {x.id for x in names_in(node)} for text, node in known}
    raw = set(design.spec.levels)
    others: dict[str, None] = {}
    for variables in design.spec.term_variables.values():
        used = {c for v in variables for c in nodes[v] & raw}
        if len(used) > 1 and used & set(asked):
            others |= dict.fromkeys(sorted(used - set(asked) - held))
    return NOTE.format(", ".join(others), ", ".join(asked)) if others else None


def noted(frame: pd.DataFrame, *notes: str | None) -> pd.DataFrame:
    """The frame with those notes that say something in its ``attrs``."""
    said = [n for n in (frame.attrs.get("note"), *notes) if n is not None]
    if said:
        frame.attrs["note"] = "; ".join(said)
    return frame


# -- tables -----------------------------------------------------------------------------------


def judged(
    m: Method, design: Design, rows: grids.Rows, shift: float, level: float
) -> tuple[pd.DataFrame, np.ndarray]:
    """``coef_table``'s columns for combined rows, and these in the columns of the fit.

    NaN rows where not estimable, with a warning. What no coefficient enters (the contrast of slopes
    without interaction) is 0 with a standard error of 0, and nothing to test.
    """
    import pandas as pd

    L = grids.estimable_rows(design, rows)
    known = np.all(np.isfinite(L), axis=1)
    if not known.all():
        warnings.warn(
            f"{int(np.sum(~known))} of {len(L)} results are not estimable (empty cells) and are "
            "NaN; restrict the levels with at=, or drop the interaction.",
            EstimabilityWarning,
            stacklevel=4,
        )
    empty = ~np.any(L != 0, axis=1)
    used = L[known & ~empty]
    names: list[Any] = np.flatnonzero(known & ~empty).tolist()
    estimate, se = used @ m.beta + shift, m.std_errors(used)
    table = tables.t_table(estimate, se, m.degrees(used), names, level)
    table = pd.DataFrame(table.reindex(range(len(L)))).astype(float)
    table.loc[empty, ["estimate", "std_error"]] = [shift, 0.0]
    return table, L


def frame(
    m: Method, design: Design, c: Combinations, what: str, shift: float, level: float
) -> pd.DataFrame:
    """One column a factor, then the estimate under the name ``what``, SE, df and interval."""
    import pandas as pd

    table = judged(m, design, c.rows, shift, level)[0].rename(columns={"estimate": what})
    labels = pd.DataFrame(c.levels, columns=list(c.names), index=range(len(c.levels)))
    return pd.concat([labels, table[[what, "std_error", "df", "ci_low", "ci_high"]]], axis=1)


# -- contrasts --------------------------------------------------------------------------------


class Family(NamedTuple):
    """Contrasts that are adjusted together: their places, and how many means they compare."""

    rows: slice
    means: int


def compare(
    m: Method,
    design: Design,
    c: Combinations,
    n_by: int,
    method: Any,
    adjust: str | None,
    seed: int = 0,
    ref: Any = None,
    level: float | None = None,
) -> pd.DataFrame:
    """Contrasts of the means of each combination of the last ``n_by`` factors, family by family.

    With ``level`` the limits of simultaneous intervals too.
    """
    import pandas as pd

    adjust = _default(method) if adjust is None else adjustment.check(adjust)
    _check_family(adjust, method)
    labels, families, weights = _families(c, n_by, method, ref)
    table, L = judged(m, design, c.rows.combine(weights), 0.0, 0.95)
    error = 0.0
    for f in families:
        part, rows = table.iloc[f.rows], L[f.rows]
        found = _adjusted(m, rows, part, adjust, f.means, seed)
        error = max(error, found.mc_se)
        if level is not None:
            c_value = _critical(m, rows, part["df"].to_numpy(float), adjust, f.means, level, seed)
            half = c_value * part["std_error"].to_numpy()
            table.loc[part.index, "ci_low"] = part["estimate"].to_numpy() - half
            table.loc[part.index, "ci_high"] = part["estimate"].to_numpy() + half
        table.loc[part.index, "p_value"] = found.p
    columns = ["estimate", "std_error", "df", "statistic", "p_value"]
    columns += ["ci_low", "ci_high"] if level is not None else []
    shown = ["contrast", *c.names[len(c.names) - n_by :]]
    text = pd.DataFrame(labels, columns=shown, index=range(len(labels)))
    out = pd.concat([text, table[columns]], axis=1)
    out.attrs["adjust"] = adjust
    if adjust in adjustment.JOINT:
        out.attrs["mc_se"] = error
    return noted(out, adjustment.INTERVALS.get(adjust)) if level is not None else out


def _families(
    c: Combinations, n_by: int, method: Any, ref: Any
) -> tuple[list[tuple[str, ...]], list[Family], np.ndarray]:
    """Labels of all contrasts, their families, and the weights of the combinations (r, m)."""
    own = len(c.names) - n_by
    labels: list[tuple[str, ...]] = []
    families, weights = [], [np.zeros((0, len(c.levels)))]
    for condition in dict.fromkeys(lv[own:] for lv in c.levels):
        members = [i for i, lv in enumerate(c.levels) if lv[own:] == condition]
        made = coefficients([" ".join(c.levels[i][:own]) for i in members], method, ref)
        families.append(Family(slice(len(labels), len(labels) + len(made)), len(members)))
        labels += [(text, *condition) for text in made]
        wide = np.zeros((len(made), len(c.levels)))
        wide[:, members] = np.array(list(made.values())).reshape(-1, len(members))
        weights.append(wide)
    return labels, families, np.concatenate(weights)


def _adjusted(
    m: Method, L: np.ndarray, part: pd.DataFrame, adjust: str, means: int, seed: int
) -> simultaneous.Adjusted:
    """Adjusted p-values of one family; contrasts that are not estimable stay NaN."""
    p, t, df = (part[c].to_numpy(float) for c in ("p_value", "statistic", "df"))
    if adjust not in adjustment.JOINT:
        return simultaneous.Adjusted(adjustment.adjusted(p, adjust, t, df, means), 0.0)
    known, out = np.isfinite(p), np.full(len(p), np.nan)
    if not known.any():
        return simultaneous.Adjusted(out, 0.0)
    own = L[known]
    out[known], error = simultaneous.adjust(t[known], df[known], own @ m.vcov @ own.T, seed)
    return simultaneous.Adjusted(out, error)


def _critical(
    m: Method, L: np.ndarray, df: np.ndarray, adjust: str, means: int, level: float, seed: int
) -> np.ndarray:
    """Half widths of a family's intervals in standard errors, (r,); NaN where not estimable."""
    known, out = ~np.isnan(df), np.full(len(L), np.nan)
    if not known.any():
        return out
    if adjust in adjustment.JOINT:
        cov = L[known] @ m.vcov @ L[known].T
        out[known] = simultaneous.quantile(df[known], cov, level, seed)
    else:
        out[known] = adjustment.critical(adjust, level, df[known], means)
    return out


def _check_family(adjust: str, method: Any) -> None:
    """Refuse adjustments that are made for another family of contrasts."""
    wanted = {"tukey": ("pairwise",), "dunnett": CONTROL}.get(adjust)
    if wanted is None or (isinstance(method, str) and method in wanted):
        return
    what = "all pairwise comparisons" if adjust == "tukey" else "comparisons with a control"
    raise LmmError(
        f"adjust={adjust!r} is for {what} (method={wanted[0]!r}); use 'mvt', 'holm', 'bonferroni', "
        "'bh' or 'none' with other contrasts."
    )


def _default(method: Any) -> str:
    if method == "pairwise":
        return "tukey"
    return "holm" if isinstance(method, str) and method in CONTROL else "none"


def coefficients(levels: list[str], method: Any, ref: Any = None) -> dict[str, np.ndarray]:
    """Weights of the means per contrast, by label.

    Parameters
    ----------
    levels : list of str
    method : {"pairwise", "trt.vs.ctrl", "control", "poly"} or dict
        A dict gives ``{"label": [weight per level]}``.
    ref : str, optional
        The control; by default the first level.

    Examples
    --------
    >>> {k: w.tolist() for k, w in coefficients(["a", "b", "c"], "poly").items()}
    {'linear': [-1.0, 0.0, 1.0], 'quadratic': [1.0, -2.0, 1.0]}
    """
    k, e = len(levels), np.eye(len(levels))
    control = _control(levels, method, ref)
    if isinstance(method, Mapping):
        return {str(name): _custom(name, w, k) for name, w in method.items()}
    if method == "pairwise":
        pairs = itertools.combinations(range(k), 2)
        return {f"{levels[i]} - {levels[j]}": e[i] - e[j] for i, j in pairs}
    if method in CONTROL:
        others = [i for i in range(k) if i != control]
        return {f"{levels[i]} - {levels[control]}": e[i] - e[control] for i in others}
    if method == "poly":
        degrees = ["linear", "quadratic", "cubic", "quartic"]
        columns = CONTRASTS["poly"](np.array(levels, object))[0].T[:6]
        names = [degrees[i] if i < 4 else f"degree {i + 1}" for i in range(len(columns))]
        return {n: _whole(c) for n, c in zip(names, columns, strict=True)}
    raise LmmError(
        f"method={method!r} is unknown; expected 'pairwise', 'trt.vs.ctrl' or 'control', 'poly', "
        "or a dict of weights by label. Dunnett's comparisons are method='control', "
        "adjust='dunnett'."
    )


def _control(levels: list[str], method: Any, ref: Any) -> int:
    """Position of the control among the levels."""
    if ref is None:
        return 0
    if not (isinstance(method, str) and method in CONTROL):
        raise LmmError(f"ref={ref!r} goes with method='control'; found method={method!r}.")
    text = " ".join(map(str, ref)) if isinstance(ref, tuple | list) else str(ref)
    if text not in levels:
        raise LmmError(f"ref={ref!r} is not a level; expected one of {', '.join(levels)}.")
    return levels.index(text)


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

"""Values of a residual structure's variables to arrays: subjects, positions, variance covariates.

This is where structures are refused whose data they do not fit: two rows of a subject at one
position, lags that are no whole numbers, missing positions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lmmjax.errors import DataError, DesignError, ResidualWarning
from lmmjax.evaluate import Evaluator, Factor, Matrix, cross, is_missing, label, to_factor
from lmmjax.expr import deparse
from lmmjax.residual import structures as st
from lmmjax.residual.language import Correlation, ResidualSpec, Variance

#: families whose positions are places on a common grid
GRID = ("un", "ad", "toep")


@dataclass(frozen=True, eq=False)
class Residuals:
    """What a residual structure needs to know of the rows.

    Attributes
    ----------
    spec : ResidualSpec
    structure : Structure
        Families and parameters, static.
    subject_name : str
    subject : (n,) int32
        Residual subject of each row; every row its own where there is no correlation.
    subjects : (G,) array of str
        Labels of the subjects; empty where there is no correlation.
    pos : (n, dim) float64
        Times or coordinates; places on the grid for un, ad and toep.
    H : (n, n_variances) float64
        log S = H φ_v.
    grid : tuple of str
        Labels of the positions where there is a grid or a variance per position.
    origin, step : float
        Whole-numbered positions are (time - origin) / step.
    levels : dict
        Levels of the variables of varident, by their text.
    """

    spec: ResidualSpec
    structure: st.Structure
    subject_name: str
    subject: np.ndarray
    subjects: np.ndarray
    pos: np.ndarray
    H: np.ndarray
    grid: tuple[str, ...] = field(default=())
    origin: float = 0.0
    step: float = 1.0
    levels: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def correlated(self) -> bool:
        return self.structure.family is not None


def evaluate_residual(spec: ResidualSpec | None, evaluator: Evaluator) -> dict[str, Any]:
    """Values of the structure's expressions by their text; the subject as one factor."""
    if spec is None or not spec.structured:
        return {}
    values: dict[str, Any] = {}
    c = spec.correlation
    if c is not None:
        values |= {deparse(node): evaluator.variable(node) for node in c.positions}
        if c.subject:
            factors = [evaluator.factor(node) for node in c.subject]
            values["|"] = cross(factors, c.subject_name)
    for v in spec.estimated:
        factor = v.kind == "ident"
        value = evaluator.factor(v.node) if factor else evaluator.variable(v.node)
        values[_key(v)] = value
    return values


def _key(v: Variance) -> str:
    return f"{v.kind}({deparse(v.node)})"


def build(
    spec: ResidualSpec, values: Mapping[str, Any], n: int, n_dropped: int, rows: Any
) -> Residuals:
    """Check the evaluated variables (of the rows used) and make the structure's arrays.

    Raises
    ------
    DataError, DesignError
        A missing or repeated position, a lag that is no whole number, a structure with nothing to
        estimate; each names the first row.

    Warns
    -----
    ResidualWarning
        Positions are the order of rows and rows were dropped.
    """
    for name, value in values.items():
        _refuse_missing(value, name, rows, spec)
    c = spec.correlation
    if c is None:
        variances, H = _variances(spec, values, None, (), n)
        return Residuals(
            spec,
            st.Structure(None, variances),
            "",
            np.arange(n, dtype=np.int32),
            np.empty(0, object),
            np.zeros((n, 1)),
            H,
            levels=_levels(spec, values),
        )
    subject = values.get("|", Factor(np.zeros(n, np.int32), np.array(["all"], dtype=object)))
    pos, places, grid = _positions(c, values, subject, n)
    if not c.positions and n_dropped and c.name != "cs":
        warnings.warn(
            f"{n_dropped} rows with missing values were dropped, and {c.name}(1 | "
            f"{c.subject_name}) takes the order of rows as position: rows around a gap count as "
            "neighbours. Give a variable as position to keep the gaps.",
            ResidualWarning,
            stacklevel=5,
        )
    if c.name != "cs" and not c.nugget:
        _refuse_repeats(c, subject, pos, rows)
    family = _family(c, subject, pos, grid)
    variances, H = _variances(spec, values, places if c.heterogeneous else None, grid, n)
    return Residuals(
        spec,
        st.Structure(family, variances),
        c.subject_name,
        subject.codes.astype(np.int32),
        subject.levels,
        pos,
        H,
        grid,
        *_units(c, values, pos),
        _levels(spec, values),
    )


def _units(c: Correlation, values: Mapping[str, Any], pos: np.ndarray) -> tuple[float, float]:
    """Origin and step of whole-numbered positions, from two of them."""
    value = values[deparse(c.positions[0])] if c.positions else None
    if c.family not in ("ar1", "arma", "toep") or not isinstance(value, np.ndarray):
        return 0.0, 1.0
    low, high = int(np.argmin(pos[:, 0])), int(np.argmax(pos[:, 0]))
    span = pos[high, 0] - pos[low, 0]
    step = (value[high] - value[low]) / span if c.family == "toep" else 1.0
    return float(value[low] - pos[low, 0] * step), float(step)


def _levels(spec: ResidualSpec, values: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {
        _key(v): tuple(values[_key(v)].take(None).levels)
        for v in spec.estimated
        if v.kind == "ident"
    }


def _refuse_missing(value: Any, name: str, rows: Any, spec: ResidualSpec) -> None:
    missing = np.flatnonzero(is_missing(value))
    if missing.size:
        what = "subject" if name == "|" else name
        raise DataError(
            f"found {missing.size} rows without a value of {what} of the residual structure "
            f"{spec.text} (first: row {rows[missing[0]]}); expected a value in every row used. "
            "Fill the values in, or remove these rows."
        )


# Positions ------------------------------------------------------------------------------------


def _positions(
    c: Correlation, values: Mapping[str, Any], subject: Factor, n: int
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Positions (n, dim), places on the grid of positions (n,), labels of the grid."""
    if not c.positions:
        place = _row_order(subject.codes)
        return (
            place[:, None].astype(float),
            place,
            tuple(str(k + 1) for k in range(place.max() + 1)),
        )
    given = [values[deparse(node)] for node in c.positions]
    if any(isinstance(v, Matrix) for v in given):
        raise DataError(f"found several columns as one position of {c.name}; expected one.")
    if c.family.startswith("sp") or c.family == "car1":
        return _coordinates(c, given), np.zeros(n, np.int32), ()
    value = given[0]
    factor = to_factor(value).take(None)
    labels = tuple(map(str, factor.levels))
    if isinstance(value, Factor) or c.family in ("un", "ad", "cs"):
        return factor.codes[:, None].astype(float), factor.codes, labels
    times = _whole(c, np.asarray(value, float), subject.codes)
    if c.family == "toep":
        times = _equal_steps(times)
    return times[:, None], factor.codes, labels


def _row_order(codes: np.ndarray) -> np.ndarray:
    """Number of earlier rows of the same subject."""
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    place = np.empty(len(codes), np.int32)
    place[order] = np.arange(len(codes)) - first
    return place


def _coordinates(c: Correlation, given: list[Any]) -> np.ndarray:
    for node, value in zip(c.positions, given, strict=True):
        if isinstance(value, Factor):
            raise DataError(
                f"found text or a categorical as position {deparse(node)} of {c.name}; expected "
                "numbers. Give a numeric column."
            )
    return np.column_stack([np.asarray(getattr(v, "values", v), float) for v in given])


def _whole(c: Correlation, times: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Times from the first on as whole numbers; lags within a subject must be whole."""
    first = np.full(codes.max() + 1, np.inf)
    np.minimum.at(first, codes, times)
    lags = times - first[codes]
    off = np.abs(lags - np.round(lags)) > 1e-8 * np.maximum(1.0, np.abs(times))
    if np.any(off):
        found = f"{lags[off][0]:g}"
        raise DataError(
            f"found a lag of {found} between rows of one subject; {c.name} expects whole-numbered "
            "positions. Use car1(t | id) for real times, or number the visits."
        )
    start = np.round(first - np.min(first))
    return np.round(lags) + start[codes]


def _equal_steps(times: np.ndarray) -> np.ndarray:
    steps = np.unique(times - times.min()).astype(int)
    return (times - times.min()) / max(1, math.gcd(*steps.tolist()))


def _refuse_repeats(c: Correlation, subject: Factor, pos: np.ndarray, rows: Any) -> None:
    order = np.lexsort((*pos.T[::-1], subject.codes))
    same = (np.diff(subject.codes[order]) == 0) & np.all(np.diff(pos[order], axis=0) == 0, axis=1)
    if np.any(same):
        at = int(np.flatnonzero(same)[0])
        a, b = sorted((int(order[at]), int(order[at + 1])))
        who = f"{c.subject_name} {subject.levels[subject.codes[a]]}" if c.subject else "the data"
        raise DesignError(
            f"found two rows of {who} at the same position (rows {rows[a]} and {rows[b]}); "
            f"{c.name} expects one row a position. Make the positions distinct, name a finer "
            "subject, or average the rows."
        )


# Families -------------------------------------------------------------------------------------


def _family(c: Correlation, subject: Factor, pos: np.ndarray, grid: tuple[str, ...]) -> st.Family:
    sizes = np.bincount(subject.codes)
    if sizes.max() < 2:
        raise DesignError(
            f"found one row per {c.subject_name} for {c.name}; expected subjects with several "
            "rows. Leave the correlation out."
        )
    if c.family == "cs":
        return st.CompoundSymmetry(int(sizes.max()))
    if c.family == "un":
        return st.Unstructured(grid)
    if c.family == "ad":
        return st.Antedependence(grid)
    if c.family.startswith("sp") or c.family == "car1":
        kind = "time" if c.family == "car1" else c.family.removeprefix("sp")
        return st.Spatial(kind, _typical_gap(subject.codes, pos), pos.shape[1], c.nugget)
    spans = _spans(subject.codes, pos[:, 0])
    if c.family == "ar1":
        return st.Autoregressive(spans)
    if c.family == "arma":
        return st.ARMA(c.p, c.q, spans)
    _refuse_unseen_lags(subject.codes, pos[:, 0], spans)
    return st.Toeplitz(spans + 1)


def _spans(codes: np.ndarray, times: np.ndarray) -> int:
    """Largest lag within a subject."""
    low, high = np.full(codes.max() + 1, np.inf), np.full(codes.max() + 1, -np.inf)
    np.minimum.at(low, codes, times)
    np.maximum.at(high, codes, times)
    return int(np.max(high - low))


def _refuse_unseen_lags(codes: np.ndarray, times: np.ndarray, spans: int) -> None:
    seen = np.zeros(spans + 1, bool)
    order = np.lexsort((times, codes))
    codes, times = codes[order], times[order].astype(int)
    for shift in range(1, int(np.bincount(codes).max())):
        same = codes[shift:] == codes[:-shift]
        seen[(times[shift:] - times[:-shift])[same]] = True
    if not np.all(seen[1:]):
        lag = int(np.flatnonzero(~seen[1:])[0]) + 1
        raise DesignError(
            f"found no two rows of a subject {lag} positions apart, so the correlation at that lag "
            "cannot be estimated; expected every lag from 1 to the longest. Use ar1, or number "
            "the visits."
        )


def _typical_gap(codes: np.ndarray, pos: np.ndarray) -> float:
    """Median distance of a row to the nearest row of its subject, for scaling only."""
    if pos.shape[1] == 1:
        order = np.lexsort((pos[:, 0], codes))
        gaps = np.diff(pos[order, 0])[np.diff(codes[order]) == 0]
    else:
        gaps = _nearest(codes, pos)
    gaps = gaps[gaps > 0]
    return float(np.median(gaps)) if gaps.size else 1.0


def _nearest(codes: np.ndarray, pos: np.ndarray) -> np.ndarray:
    from scipy.spatial import cKDTree

    found = []
    for rows in np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1]):
        if len(rows) > 1:
            found.append(cKDTree(pos[rows]).query(pos[rows], k=2)[0][:, 1])
    return np.concatenate(found)


# Variances ------------------------------------------------------------------------------------


def _variances(
    spec: ResidualSpec,
    values: Mapping[str, Any],
    places: np.ndarray | None,
    grid: tuple[str, ...],
    n: int,
) -> tuple[st.Variances, np.ndarray]:
    """All variance functions side by side: parameters and H."""
    parts: list[_Part] = []
    if places is not None:
        parts.append(_ratios(Factor(places, np.array(grid, dtype=object)), "position"))
    for v in spec.estimated:
        value, text = values[_key(v)], deparse(v.node)
        parts.append(_ratios(value, text) if v.kind == "ident" else _power(v.kind, value, text))
    names = [p.names for p in parts]
    if len({x for p in names for x in p}) < sum(map(len, names)):
        texts = ["position"] * (places is not None) + [deparse(v.node) for v in spec.estimated]
        names = [[_longer(x, t) for x in p] for p, t in zip(names, texts, strict=True)]
    variances = st.Variances(
        tuple(x for p in names for x in p),
        tuple(p.kind for p in parts for _ in p.names),
        tuple(p.scale for p in parts for _ in p.names),
        tuple(p.shift for p in parts for _ in p.names),
    )
    return variances, np.concatenate([np.zeros((n, 0)), *(p.H for p in parts)], axis=1)


class _Part(NamedTuple):
    """One variance function: see :class:`lmmjax.residual.structures.Variances`."""

    names: list[str]
    kind: str
    scale: float
    shift: float
    H: np.ndarray


def _longer(name: str, text: str) -> str:
    return f"delta[{text}]" if name == "delta" else name.replace("[", f"[{text}=", 1)


def _ratios(factor: Factor, text: str) -> _Part:
    factor = factor.take(None)
    if len(factor.levels) < 2:
        raise DesignError(
            f"found one level of {text} among the rows used, so there is no ratio of SDs to "
            "estimate; expected at least 2. Leave the variance function out."
        )
    names = [f"sd_ratio[{label(x)}]" for x in factor.levels[1:]]
    H = (factor.codes[:, None] == np.arange(1, len(factor.levels))).astype(float)
    return _Part(names, "ratio", 1.0, 0.0, H)


def _power(kind: str, value: Any, text: str) -> _Part:
    if isinstance(value, Factor | Matrix):
        raise DataError(f"found {text} in var{kind}, which is no column of numbers; expected one.")
    x = np.asarray(getattr(value, "values", value), float)
    if kind == "power":
        if np.any(x == 0):
            raise DataError(
                f"found {int(np.sum(x == 0))} rows with {text} = 0 in varpower, whose SD would be "
                "0; expected values other than 0. Use varexp, or add a constant."
            )
        x = np.log(np.abs(x))
    mean, sd = float(x.mean()), float(x.std())
    if not sd > 1e-10 * max(1.0, abs(mean)):
        raise DesignError(
            f"found a constant {text} in var{kind}; expected a covariate that varies."
        )
    return _Part(["delta"], "delta", sd, -mean / sd, ((x - mean) / sd)[:, None])

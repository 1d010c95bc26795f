"""The reference grid: every combination of the factors' levels, covariates at their means.

Marginal means, contrasts and trends are linear functions of the grid's predictions (Searle, Speed
and Milliken 1980, Am. Stat. 34, 216-221); a row of the grid is estimable if its full model row is
spanned by the columns that were kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax.errors import DataError
from lmmjax.evaluate import FACTOR_CALLS, label
from lmmjax.expr import Call, Name, names_in

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.design import Design

#: tolerance of estimability, relative to the size of the row
ESTIMABLE = 1e-8


@dataclass(frozen=True)
class Grid:
    """A reference grid.

    Attributes
    ----------
    factors : dict of str to list
        Levels of each factor (or values given by ``at``), as text.
    cells : (m, F) int
        Level of each factor in each cell; the first factor varies fastest.
    rows : (m, p)
        Model rows of the cells; NaN where a cell is not estimable.
    """

    factors: dict[str, list[str]]
    cells: np.ndarray
    rows: np.ndarray


def numeric_columns(design: Design) -> list[str]:
    """Raw columns of the fixed part that are covariates (numeric and not only made factors of)."""
    return [
        c for c, levels in design.spec.levels.items() if levels is None and _covariate(design, c)
    ]


def _covariate(design: Design, column: str) -> bool:
    """Whether some expression uses a numeric column other than as ``factor(column)``."""
    nodes = [n for n in design.spec.parsed.terms.nodes if column in {x.id for x in names_in(n)}]
    return not all(
        isinstance(n, Call) and n.fn in FACTOR_CALLS and n.args == (Name(column),) for n in nodes
    )


def build(
    design: Design, at: Mapping[str, Any] | None = None, shift: Mapping[str, float] | None = None
) -> Grid:
    """The grid of a design; ``at`` replaces levels or means, ``shift`` moves covariates.

    Raises
    ------
    DataError
        Unknown columns in ``at``; a model that does not keep its raw columns.
    """
    import pandas as pd

    if set(design.spec.levels) - set(design.columns):
        raise DataError(
            "this model does not keep the columns of its fixed part, so no reference grid can be "
            "built; expected a model built from a table in memory. Use test() with coefficients."
        )
    given = {k: as_list(v) for k, v in (at or {}).items()}
    unknown = set(given) - set(design.spec.levels)
    if unknown:
        raise DataError(
            f"at= names {', '.join(sorted(unknown))}; expected columns of the fixed part: "
            f"{', '.join(design.spec.levels)}."
        )
    values, observed = _axes(design, given, shift or {})
    factors = {c: v for c, v in values.items() if c in observed or len(v) > 1}
    combos = list(itertools.product(*(range(len(v)) for v in reversed(list(values.values())))))
    index = np.array(combos, int).reshape(len(combos), len(values))[:, ::-1]
    frame = pd.DataFrame(
        {c: _column(design.columns[c], v, index[:, i]) for i, (c, v) in enumerate(values.items())},
        index=range(len(index)),
    )
    full = design.spec.fixed_columns(frame)
    where = [list(values).index(c) for c in factors]
    shown = {c: [label(x) for x in v] for c, v in factors.items()}
    return Grid(shown, index[:, where], estimable_rows(design, full))


def as_list(value: Any) -> list[Any]:
    """A value, or several, as a list."""
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        return [value]
    return list(value)


def _axes(
    design: Design, given: Mapping[str, list[Any]], shift: Mapping[str, float]
) -> tuple[dict[str, list[Any]], set[str]]:
    """Values of each raw column in the grid, and which columns are factors of the data."""
    covariates = set(numeric_columns(design))
    values: dict[str, list[Any]] = {}
    for name in design.spec.levels:
        if name in covariates:
            column = design.columns[name].to_numpy(float)
            chosen = given.get(name, [float(np.mean(column))])
            values[name] = [float(x) + shift.get(name, 0.0) for x in chosen]
        else:
            values[name] = given.get(name, _levels(design, name))
    return values, set(values) - covariates


def _levels(design: Design, name: str) -> list[Any]:
    """The levels as the column's own values, so that new data mean the same."""
    known = design.spec.levels[name]
    present = design.columns[name].unique()
    if known is None:
        return sorted(present)
    by_label = {label(x): x for x in present}
    return [by_label[k] for k in known if k in by_label]


def _column(series: pd.Series, values: list[Any], codes: np.ndarray) -> pd.Series:
    """A grid column of the training column's type."""
    import pandas as pd

    out = pd.Series([values[i] for i in codes])
    return out.astype(series.dtype) if isinstance(series.dtype, pd.CategoricalDtype) else out


def counts(design: Design, grid: Grid) -> np.ndarray:
    """How many rows of the data have each cell's combination of factor levels, (m,)."""
    import pandas as pd

    covariates = set(numeric_columns(design))
    cell, row = np.zeros(len(grid.cells), int), np.zeros(design.n, int)
    known = np.ones(design.n, bool)
    for i, (name, levels) in enumerate(grid.factors.items()):
        if name in covariates:
            continue
        codes, uniques = pd.factorize(design.columns[name])
        place = {level: j for j, level in enumerate(levels)}
        codes = np.array([place.get(label(u), -1) for u in uniques], int)[codes]
        known &= codes >= 0
        row = row * len(levels) + codes
        cell = cell * len(levels) + grid.cells[:, i]
    sums = np.bincount(row[known], minlength=int(cell.max(initial=0)) + 1)
    return sums[cell].astype(float)


def estimable_rows(design: Design, full: np.ndarray) -> np.ndarray:
    """Kept columns of full model rows, NaN where the aliased ones say something else."""
    kept = design.spec.keep
    rows = full[:, kept].copy()
    if design.spec.alias is not None:
        gap = np.abs(full[:, ~kept] - rows @ design.spec.alias)
        size = np.abs(rows) @ np.abs(design.spec.alias) + np.abs(full[:, ~kept])
        rows[np.any(gap > ESTIMABLE * (1 + size), axis=1)] = np.nan
    return rows

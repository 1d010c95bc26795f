"""The reference grid: every combination of the factors' levels, covariates at their means.

Marginal means, contrasts and trends are linear functions of the grid's predictions (Searle, Speed
and Milliken 1980, Am. Stat. 34, 216-221). Full model rows are combined, and the combination alone
is judged: it is estimable if the aliased columns say in it what those that were kept say. A slope
or a difference may be so where the cells that it comes from are not.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmmjax.errors import DataError
from lmmjax.evaluate import FACTOR_CALLS, label
from lmmjax.expr import Call, Name, names_in

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.design import Design

#: tolerance of estimability, relative to the size of the row
ESTIMABLE = 1e-8

#: rounding of sums, relative to the size of what was added
ROUNDING = 1e-14


class Rows(NamedTuple):
    """Full model rows (the aliased columns included), or combinations of such."""

    values: np.ndarray  # (m, P)
    parts: np.ndarray  # (m, P): sums of the sizes of what was added, for the rounding of zeros

    def combine(self, weights: np.ndarray) -> Rows:
        """Σ_i w_i row_i for each row w of ``weights`` (r, m); NaN where it needs one that is not
        finite."""
        finite = np.all(np.isfinite(self.values), axis=1)
        values, parts = (np.where(finite[:, None], a, 0.0) for a in self)
        out = weights @ values
        out[np.any((weights != 0) & ~finite, axis=1)] = np.nan
        return Rows(out, np.abs(weights) @ parts)

    def slope(self, other: Rows, step: float) -> Rows:
        """(row - other's row) / step."""
        return Rows((self.values - other.values) / step, (self.parts + other.parts) / step)


@dataclass(frozen=True)
class Grid:
    """A reference grid.

    Attributes
    ----------
    factors : dict of str to list
        Levels of each factor (or values given by ``at``), as text.
    cells : (m, F) int
        Level of each factor in each cell; the first factor varies fastest.
    rows : Rows
        Full model rows of the cells, estimable or not, (m, P).
    """

    factors: dict[str, list[str]]
    cells: np.ndarray
    rows: Rows


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
    """The grid of a design; ``at`` replaces levels or means.

    ``shift`` moves covariates in the model rows, not in the labels of the cells.

    Raises
    ------
    DataError
        Unknown columns or levels in ``at``; a model that does not keep its raw columns.
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
    values, observed = _axes(design, given)
    factors = {c: v for c, v in values.items() if c in observed or c in given}
    combos = list(itertools.product(*(range(len(v)) for v in reversed(list(values.values())))))
    index = np.array(combos, int).reshape(len(combos), len(values))[:, ::-1]
    moved = values | {c: [x + by for x in values[c]] for c, by in (shift or {}).items()}
    frame = pd.DataFrame(
        {c: _column(design.columns[c], v, index[:, i]) for i, (c, v) in enumerate(moved.items())},
        index=range(len(index)),
    )
    full = design.spec.fixed_columns(frame)
    where = [list(values).index(c) for c in factors]
    shown = {c: [label(x) for x in v] for c, v in factors.items()}
    return Grid(shown, index[:, where], Rows(full, np.abs(full)))


def as_list(value: Any) -> list[Any]:
    """A value, or several, as a list."""
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        return [value]
    return list(value)


def _axes(design: Design, given: Mapping[str, list[Any]]) -> tuple[dict[str, list[Any]], set[str]]:
    """Values of each raw column in the grid, and which columns are factors of the data."""
    covariates = set(numeric_columns(design))
    values: dict[str, list[Any]] = {}
    for name in design.spec.levels:
        if name in covariates:
            mean = float(np.mean(design.columns[name].to_numpy(float)))
            values[name] = [_number(name, x) for x in given.get(name, [mean])]
        else:
            known = {label(x): x for x in _levels(design, name)}
            chosen = [label(x) for x in given.get(name, known.values())]
            if unknown := [x for x in chosen if x not in known]:
                raise DataError(
                    f"at= has the levels {', '.join(unknown)} of {name}; expected some of "
                    f"{', '.join(known)}."
                )
            values[name] = [known[x] for x in chosen]
    return values, set(values) - covariates


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"at= has {value!r} for the covariate {name}; expected numbers.") from error


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


def estimable_rows(design: Design, rows: Rows) -> np.ndarray:
    """Kept columns of (combined) full model rows, NaN where the aliased ones say something else."""
    kept, alias = design.spec.keep, design.spec.alias
    found = rows.values[:, kept].copy()
    found[np.abs(found) <= ROUNDING * rows.parts[:, kept]] = 0.0  # differences of equals
    if alias is not None:
        own, size = np.abs(rows.values), np.abs(alias)
        gap = np.abs(rows.values[:, ~kept] - found @ alias)
        room = ESTIMABLE * (1 + own[:, kept] @ size + own[:, ~kept])
        room += ROUNDING * (rows.parts[:, kept] @ size + rows.parts[:, ~kept])
        found[np.any(gap > room, axis=1)] = np.nan
    return found

"""The marginal covariance of one subject's rows, V_i = Z_i D Z_i' + Σ_i."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax.errors import DataError, DesignError
from lmmjax.residual.covariance import block
from lmmjax.tables import correlation

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.design import Design


def marginal_cov(
    design: Design,
    covs: list[np.ndarray],
    sigma: float,
    level: Any,
    group: str | None,
    phi: np.ndarray,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """V_i and its correlation for the rows of ``level`` of ``group``; see ``Fit.marginal_cov``."""
    import pandas as pd

    term = _subject_term(design, group)
    found = np.flatnonzero(term.levels == str(level))
    if found.size == 0:
        raise DataError(
            f"level {level!r} is not a level of {term.group}; expected one of "
            f"{', '.join(map(str, term.levels[:8]))}{' ...' if len(term.levels) > 8 else ''}."
        )
    rows = np.flatnonzero(term.codes == found[0])
    V = sigma**2 * block(design.residual, phi, design.weights, rows)
    for t, cov in zip(design.terms, covs, strict=True):
        same = t.codes[rows, None] == t.codes[rows]
        V = V + np.where(same, t.z[rows] @ cov @ t.z[rows].T, 0.0)
    labels = design.rows[rows]
    return (
        pd.DataFrame(V, index=labels, columns=labels),
        pd.DataFrame(correlation(V), index=labels, columns=labels),
    )


def _nested(inner: Any, outer: Any) -> bool:
    lies_in = np.zeros(len(inner.levels), dtype=outer.codes.dtype)
    lies_in[inner.codes] = outer.codes
    return bool(np.array_equal(lies_in[inner.codes], outer.codes))


def _factors(design: Design) -> dict[str, Any]:
    """Grouping factors of the random effects, then the residual subjects."""
    known: dict[str, Any] = {t.group: t for t in design.terms}
    r = design.residual
    if r is not None and r.correlated:
        name = r.subject_name or "all rows"
        known.setdefault(name, SimpleNamespace(group=name, codes=r.subject, levels=r.subjects))
    return known


def _subject_term(design: Design, group: str | None) -> Any:
    """The factor whose levels are the subjects: every other factor must be nested with it."""
    known = _factors(design)
    if not known:
        raise DesignError(
            "the model has no grouping factor, so its rows are independent; expected a model with "
            "random effects or correlated residuals."
        )
    if group is not None and group not in known:
        raise DataError(f"group={group!r} is not a grouping factor; expected one of {list(known)}.")
    candidates = [known[group]] if group is not None else list(known.values())
    for t in candidates:
        inside = [_nested(u, t) for u in known.values()]
        around = [group is not None and _nested(t, u) for u in known.values()]
        if all(a or b for a, b in zip(inside, around, strict=True)):
            return t
    raise DesignError(
        f"the grouping factors {list(known)} are crossed, so the rows of one level are correlated "
        "with those of others and no V_i stands alone; expected nested factors."
    )

"""P-values and intervals adjusted for the number of comparisons of a family."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lmmjax.errors import LmmError

METHODS = ("tukey", "dunnett", "mvt", "holm", "bonferroni", "bh", "none")

#: adjustments by the joint distribution of the family (simultaneous.py)
JOINT = ("dunnett", "mvt")

#: what intervals are made of where an adjustment of p-values has none of its own, as in emmeans
INTERVALS = {
    "holm": "intervals by Bonferroni: Holm's steps have none",
    "bh": "intervals by Bonferroni: false discovery rates have none",
}


def check(adjust: str) -> str:
    """The adjustment under its own name; refuse an unknown one ("fdr" is R's other name of bh)."""
    adjust = "bh" if adjust == "fdr" else adjust
    if adjust not in METHODS:
        raise LmmError(
            f"adjust={adjust!r} is unknown; expected one of {', '.join(METHODS)}, or 'fdr' for bh."
        )
    return adjust


def adjusted(
    p: np.ndarray, adjust: str, statistic: np.ndarray, df: np.ndarray, n_means: int
) -> np.ndarray:
    """Adjusted p-values of one family; NaN (non-estimable) stays NaN and does not count.

    Parameters
    ----------
    p, statistic, df : (r,)
    adjust : {"tukey", "holm", "bonferroni", "bh", "none"}
        Tukey's is the studentized range of ``n_means`` means; ``bh`` controls the false discovery
        rate (Benjamini and Hochberg 1995).
    n_means : int
    """
    known, out = np.isfinite(p), np.full(len(p), np.nan)
    if adjust == "tukey":
        out[known] = _tukey(statistic[known], df[known], n_means)
    else:
        out[known] = _STEPS[adjust](p[known])
    return out


def _tukey(statistic: np.ndarray, df: np.ndarray, n_means: int) -> np.ndarray:
    from scipy import stats

    if n_means <= 2:
        return 2 * stats.t.sf(np.abs(statistic), df)
    q = np.sqrt(2) * np.abs(statistic)
    return np.array([stats.studentized_range.sf(a, n_means, b) for a, b in zip(q, df, strict=True)])


def critical(adjust: str, level: float, df: np.ndarray, n_means: int) -> np.ndarray:
    """Half widths of simultaneous intervals of one family, in standard errors, (r,).

    Parameters
    ----------
    adjust : {"tukey", "holm", "bonferroni", "bh", "none"}
        Tukey's is a quantile of the studentized range; Holm and BH take Bonferroni's.
    level : float
        Of all intervals together ("none": of each).
    df : (r,)
        Of the contrasts that are estimable.
    n_means : int
    """
    from scipy import stats

    if adjust == "tukey" and n_means > 2:
        values, back = np.unique(np.round(df, 7), return_inverse=True)
        found = [stats.studentized_range.ppf(level, n_means, nu) for nu in values]
        return np.array(found)[back.ravel()] / np.sqrt(2)
    count = 1 if adjust in ("none", "tukey") else len(df)
    return stats.t.ppf(1 - (1 - level) / (2 * count), df)


def _holm(p: np.ndarray) -> np.ndarray:
    order = np.argsort(p)
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return _back(np.minimum(raised, 1.0), order)


def _benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    order = np.argsort(p)[::-1]
    lowered = np.minimum.accumulate(p[order] * len(p) / np.arange(len(p), 0, -1))
    return _back(np.minimum(lowered, 1.0), order)


def _back(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    out = np.empty_like(values)
    out[order] = values
    return out


_STEPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda p: p,
    "bonferroni": lambda p: np.minimum(p * len(p), 1.0),
    "holm": _holm,
    "bh": _benjamini_hochberg,
}

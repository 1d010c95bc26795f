"""Measures of agreement between two methods' estimates of the same quantities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def ratio(difference: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """difference / sd; 0 where there is no difference, whatever the SD."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(difference == 0, 0.0, difference / sd)


#: columns of the agreement table
COLUMNS = [
    "kind",
    "what",
    "method1",
    "method2",
    "n",
    "max_std_diff",
    "mean_std_diff",
    "correlation",
    "ccc",
    "overlap",
]


def pair(table: pd.DataFrame, a: str, b: str, levels: bool) -> dict[str, Any]:
    """Agreement of two methods on the quantities that both have."""
    columns = ["estimate", "sd", "low", "high"]
    one = table[table["method"] == a].set_index("key")[columns]
    two = table[table["method"] == b].set_index("key")[columns]
    shared = [k for k in one.index if k in two.index]
    x, y = one.loc[shared].to_numpy(float), two.loc[shared].to_numpy(float)
    difference = _standardised(x, y)
    rho, ccc = concordance(x[:, 0], y[:, 0]) if levels else (np.nan, np.nan)
    return {
        "method1": a,
        "method2": b,
        "n": len(shared),
        "max_std_diff": _where_known(np.max, difference),
        "mean_std_diff": _where_known(np.mean, difference),
        "correlation": rho,
        "ccc": ccc,
        "overlap": _where_known(np.mean, interval_overlap(x[:, 2:], y[:, 2:])),
    }


def _where_known(function: Any, values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(function(known)) if known.size else float("nan")


def _standardised(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|a - b| / pooled SD; columns estimate and SD first."""
    squares = np.stack([x[:, 1], y[:, 1]]) ** 2
    known = ~np.isnan(squares)
    count = known.sum(axis=0)
    total = np.where(known, squares, 0.0).sum(axis=0)
    pooled = np.sqrt(np.divide(total, count, out=np.full(len(x), np.nan), where=count > 0))
    return np.where(count > 0, ratio(np.abs(x[:, 0] - y[:, 0]), pooled), np.nan)


def concordance(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Pearson's correlation and Lin's concordance of two vectors; NaN where one is constant.

    Examples
    --------
    >>> x = np.array([1.0, 2.0, 3.0])
    >>> [round(v, 3) for v in concordance(x, x + 1)]
    [1.0, 0.571]
    """
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan"), float("nan")
    cov = np.cov(x, y, bias=True)
    ccc = 2 * cov[0, 1] / (cov[0, 0] + cov[1, 1] + (x.mean() - y.mean()) ** 2)
    return float(cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1])), float(ccc)


def interval_overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Length of the intersection over length of the union of intervals (m, 2); Jaccard's index.

    Examples
    --------
    >>> interval_overlap(np.array([[0.0, 2.0]]), np.array([[1.0, 3.0]])).round(3)
    array([0.333])
    """
    shared = np.maximum(np.minimum(a[:, 1], b[:, 1]) - np.maximum(a[:, 0], b[:, 0]), 0.0)
    union = (a[:, 1] - a[:, 0]) + (b[:, 1] - b[:, 0]) - shared
    same = np.all(a == b, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(same, 1.0, shared / union)

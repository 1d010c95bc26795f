"""Tidy frames that several results share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lmmjax.errors import DataError, LmmError

if TYPE_CHECKING:
    import pandas as pd


def check_level(level: float) -> float:
    """Refuse a confidence level outside (0, 1)."""
    if not 0 < level < 1:
        raise LmmError(f"level={level!r} is not a probability; expected a number such as 0.95.")
    return float(level)


def check_seed(seed: int) -> int:
    """Refuse a seed that is not an integer, 0 or more."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise DataError(f"seed={seed!r} is not a seed; expected an integer, 0 or more.")
    return int(seed)


def t_table(
    estimate: np.ndarray,
    se: np.ndarray,
    df: np.ndarray,
    names: list[str],
    level: float,
    rhs: np.ndarray | float = 0.0,
) -> pd.DataFrame:
    """Estimates with t-tests against ``rhs`` and intervals; infinite df is the normal limit."""
    import pandas as pd
    from scipy import stats

    statistic = (estimate - rhs) / se
    half = stats.t.ppf(0.5 + check_level(level) / 2, df) * se
    columns = {
        "estimate": estimate,
        "std_error": se,
        "df": df,
        "statistic": statistic,
        "p_value": 2 * stats.t.sf(np.abs(statistic), df),
        "ci_low": estimate - half,
        "ci_high": estimate + half,
    }
    return pd.DataFrame(columns, index=pd.Index(names, dtype=object))


def correlation(cov: np.ndarray) -> np.ndarray:
    """Correlation matrix of a covariance matrix; NaN beside a variance of 0, 1 on the diagonal."""
    sd = np.sqrt(np.diag(cov))
    with np.errstate(invalid="ignore", divide="ignore"):
        corr = cov / np.outer(sd, sd)
    np.fill_diagonal(corr, 1.0)
    return corr


def varcorr_frame(
    terms: Sequence[tuple[str, tuple[str, ...]]], covs: Sequence[np.ndarray], sigma: float
) -> pd.DataFrame:
    """lme4's data frame of variance components: variances of a term, then its covariances."""
    import pandas as pd

    rows: list[tuple[str, str | None, str | None, float, float]] = []
    for (group, names), cov in zip(terms, covs, strict=True):
        corr = correlation(cov)
        for i, name in enumerate(names):
            rows.append((group, name, None, cov[i, i], float(np.sqrt(cov[i, i]))))
        for i in range(len(names)):
            for j in range(i + 1, len(names)):
                rows.append((group, names[i], names[j], cov[i, j], corr[i, j]))
    rows.append(("Residual", None, None, sigma**2, sigma))
    frame = pd.DataFrame(rows, columns=["group", "term1", "term2", "vcov", "sdcor"])
    return missing_as_nan(frame)


def missing_as_nan(frame: pd.DataFrame) -> pd.DataFrame:
    """``term1`` and ``term2`` with NaN where there is none, also in columns without any text."""
    for name in ("term1", "term2"):
        frame[name] = frame[name].astype(object).where(frame[name].notna(), np.nan)
    return frame

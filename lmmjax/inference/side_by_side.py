"""``Fit.tests``: one coefficient by every method, side by side.

Statistics are those of the method: t (or z) for Wald tests, the likelihood ratio for ``lrt``, ζ for
the profile, the studentised bootstrap for ``bootstrap``; p-values are two-sided.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax.errors import LmmError, SingularFitWarning
from lmmjax.inference import hypothesis
from lmmjax.precision import in_float64
from lmmjax.tables import check_level

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit

COLUMNS = ("estimate", "std_error", "df", "statistic", "p_value", "ci_low", "ci_high", "note")

#: what Kenward-Roger makes of the variance parameters on the boundary of a singular fit
AT_ZERO = {
    "expected": "variances on the boundary count as uncertain (pbkrtest)",
    "observed": "variances on the boundary count as known (SAS)",
}

Row = dict[str, Any]


def side_by_side(fit: Fit, name: str, level: float, n: int, seed: int) -> pd.DataFrame:
    """The table of ``Fit.tests``."""
    import pandas as pd

    names = list(fit.model.design.x_names)
    if name not in names:
        raise LmmError(f"{name!r} is not a fixed effect of this fit; expected one of {names}.")
    check_level(level)
    if not (isinstance(n, int | np.integer) and n >= 20):
        raise LmmError(f"n={n!r} is too few replicates; expected an integer, 20 or more.")
    j = names.index(name)
    rows = {}
    for label, ask in _methods(fit, name, j, level, n, seed).items():
        try:
            rows[label] = ask()
        except LmmError as reason:
            rows[label] = {"note": f"not available: {reason}"}
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS))
    frame["note"] = frame["note"].fillna("")
    numeric = list(COLUMNS[:-1])
    frame[numeric] = frame[numeric].astype(float)
    return frame.rename_axis("method")


def _methods(
    fit: Fit, name: str, j: int, level: float, n: int, seed: int
) -> dict[str, Callable[[], Row]]:
    def wald(df: str, **options: Any) -> Callable[[], Row]:
        return lambda: _wald(fit, name, level, df, options)

    return {
        "wald": wald("wald"),
        "residual": wald("residual"),
        "containment": wald("containment"),
        "satterthwaite": wald("satterthwaite"),
        "kenward-roger (expected)": wald("kenward-roger", information="expected"),
        "kenward-roger (observed)": wald("kenward-roger", information="observed"),
        "robust CR2": lambda: _row(fit.coef_table(level=level, vcov="robust").loc[name]),
        "lrt": lambda: _lrt(fit, j),
        "profile": lambda: _profile(fit, name, j, level),
        "bootstrap": lambda: _bootstrap(fit, name, j, level, n, seed),
    }


def _row(of: pd.Series, note: str = "") -> Row:
    return {**{c: float(of[c]) for c in COLUMNS[:-1]}, "note": note}


def _wald(fit: Fit, name: str, level: float, df: str, options: dict[str, Any]) -> Row:
    if fit.model.is_linear and df not in ("wald", "residual"):
        raise LmmError("a linear model has n - p degrees of freedom by every method: see residual.")
    used = hypothesis.method(fit, df, **options).name
    alone = ", without grouping factors" if df == "containment" else ""
    note = "" if used == df else f"as {used}{alone}"
    if used == "kenward-roger" and fit.singular:
        note = AT_ZERO[options["information"]]
    return _row(fit.coef_table(df, level, **options).loc[name], note)


# -------------------------------------------------------------------------------------------------
# Likelihood
# -------------------------------------------------------------------------------------------------


def _lrt(fit: Fit, j: int) -> Row:
    """Refits by ML with and without the column."""
    from scipy import stats

    from lmmjax.inference.intervals import _by

    best, small = _by(fit, "ML"), _without(fit, j)
    for each in (best, small):
        if not each.converged:
            raise LmmError(f"an ML fit did not converge: {each.message}.")
    statistic = max(small.deviance - best.deviance, 0.0)
    note = "chi-squared with 1 df" + ("" if fit.method == "ML" else "; refitted by ML")
    return {
        "estimate": float(best._beta[j]),
        "statistic": statistic,
        "df": 1.0,
        "p_value": float(stats.chi2.sf(statistic, 1)),
        "note": note,
    }


def _without(fit: Fit, j: int) -> Fit:
    """The ML fit of the model without column ``j`` of X, whatever term it belongs to."""
    design = fit.model.design
    keep = np.arange(design.p) != j
    smaller = dataclasses.replace(
        design,
        X=np.asfortranarray(design.X[:, keep]),
        x_names=tuple(np.array(design.x_names, object)[keep]),
        x_assign=design.x_assign[keep],
    )
    model = copy.copy(fit.model)
    model.__dict__ = {
        k: v for k, v in fit.model.__dict__.items() if k in ("formula", "residual", "dtype")
    } | {"design": smaller}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingularFitWarning)  # that of a model nobody asked for
        return model.fit(method="ML")


@in_float64
def _profile(fit: Fit, name: str, j: int, level: float) -> Row:
    """ζ at 0, and the interval."""
    from scipy import stats

    from lmmjax.inference.intervals import _by
    from lmmjax.inference.profile import Profiler

    best = _by(fit, "ML")
    profiler = Profiler(best)
    parameter = profiler.coefficient(j)
    excess = profiler.deviance(parameter, 0.0, parameter.start())[0] - best.deviance
    zeta = float(np.sign(best._beta[j]) * np.sqrt(max(excess, 0.0)))
    interval = best.confint(method="profile", level=level, parm=name).loc[name]
    return {
        "estimate": float(best._beta[j]),
        "statistic": zeta,
        "df": np.inf,
        "p_value": float(2 * stats.norm.sf(abs(zeta))),
        "ci_low": float(interval["low"]),
        "ci_high": float(interval["high"]),
        "note": "ζ of the profile of ML, normal",
    }


# -------------------------------------------------------------------------------------------------
# Bootstrap
# -------------------------------------------------------------------------------------------------


def _bootstrap(fit: Fit, name: str, j: int, level: float, n: int, seed: int) -> Row:
    """Percentile interval; p by the studentised statistics of the replicates about β̂."""
    boot = fit.bootstrap(n, seed)
    drawn = boot.replicates[name].to_numpy()
    t = (drawn - fit._beta[j]) / boot.std_errors[name].to_numpy()
    statistic = float(fit._beta[j] / fit.std_errors[j])
    known = t[np.isfinite(t)]
    interval = boot.confint(level, "percentile", [name]).loc[name]
    p = (1 + np.sum(np.abs(known) >= abs(statistic))) / (1 + len(known))
    failed = f", {boot.n_failed} failed" if boot.n_failed else ""
    return {
        "estimate": float(fit._beta[j]),
        "std_error": float(np.nanstd(drawn, ddof=1)),
        "statistic": statistic,
        "p_value": float(p),
        "ci_low": float(interval["low"]),
        "ci_high": float(interval["high"]),
        "note": f"{n} replicates, seed {seed}{failed}; percentile interval, studentised p",
    }

"""Residual parameters as the field reports them, with Wald intervals on a transformed scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax.determined import delta_variance, flat_directions
from lmmjax.precision import float64, in_float64
from lmmjax.residual.structures import ARMA, CompoundSymmetry
from lmmjax.tables import check_level

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit

UNDETERMINED = "no test: the data do not determine this parameter"


@in_float64
def natural(fit: Fit) -> np.ndarray:
    """Reported residual parameters in the order of ``Model.phi_names``."""
    residual = fit.model.design.residual
    assert residual is not None
    return np.asarray(residual.structure.natural(jnp.asarray(fit.phi)))


@in_float64
def wald(fit: Fit, level: float = 0.95) -> pd.DataFrame:
    """Wald intervals of the residual parameters.

    The covariance of (θ, φ) is twice the inverse Hessian of the profiled deviance. Intervals are
    made where the parameters are unbounded (Fisher z for correlations, log for ratios and ranges,
    logit for the nugget, for φ of car1 and, on its own range, for ρ of cs, the identity for delta)
    and transformed back, so they stay in range.

    Returns
    -------
    DataFrame
        Index ``Model.phi_names``, columns ``estimate std_error low high``.

    Notes
    -----
    Parameters that move along a direction in (θ, φ) which the criterion does not determine have
    infinite standard errors, and intervals as wide as their range.
    """
    import pandas as pd
    from scipy import stats

    names, residual = fit.model.phi_names, fit.model.design.residual
    columns = ["estimate", "std_error", "low", "high"]
    if residual is None:
        return pd.DataFrame(columns=columns, dtype=float)
    structure, phi = residual.structure, jnp.asarray(fit.phi)
    value, slope = (
        np.asarray(structure.natural(phi)),
        np.asarray(jax.jacfwd(structure.natural)(phi)),
    )
    se = np.sqrt(2 * delta_variance(_joint(fit, slope), fit._hessian_s))
    half = stats.norm.ppf(0.5 + check_level(level) / 2) * se
    low, high = np.empty((2, len(names)))
    least = _least(residual.structure.family)
    for i, name in enumerate(names):
        low[i], high[i] = _back(_chart(name, fit), value[i], half[i], least)
    table = np.column_stack([value, se, low, high])
    return pd.DataFrame(table, index=names, columns=columns)


def _joint(fit: Fit, slope: np.ndarray) -> np.ndarray:
    """Slopes in φ as slopes in (θ, φ)."""
    return np.concatenate([np.zeros((len(slope), len(fit._theta_s))), slope], axis=1)


def undetermined(fit: Fit) -> list[str]:
    """Residual parameters that the criterion does not determine at the optimum.

    Those that have run into an end of their range, where φ is flat too, are none of them.
    """
    residual, flat = fit.model.design.residual, flat_directions(fit._hessian_s)
    if residual is None or flat.shape[1] == 0:
        return []
    with float64():
        slope = np.asarray(jax.jacfwd(residual.structure.natural)(jnp.asarray(fit.phi)))
    unknown = np.isinf(delta_variance(_joint(fit, slope), fit._hessian_s))
    moves = np.max(np.abs(slope), axis=1) > 1e-5
    return [n for n, u in zip(fit.model.phi_names, unknown & moves, strict=True) if u]


def _chart(name: str, fit: Fit) -> str:
    if name.startswith(("sd_ratio", "range")):
        return "log"
    residual = fit.model.design.residual
    correlation = None if residual is None else residual.spec.correlation
    spatial = correlation is not None and correlation.family in ("car1", "sppow")
    if name == "nugget" or (spatial and name in ("phi", "rho")):
        return "logit"
    if correlation is not None and correlation.family == "cs" and name == "rho":
        return "cs"
    return "identity" if name.startswith("delta") else "fisher"


def tests(fit: Fit) -> pd.DataFrame:
    """Wald tests of the residual parameters on the scales of :func:`wald`, two-sided.

    Returns
    -------
    DataFrame
        Index ``Model.phi_names``; ``estimate std_error statistic p_value caveat``. Statistic and p
        are NaN where the null hypothesis lies at the end of the parameter's range, or is none, and
        where the data do not determine the parameter.
    """
    from scipy import stats

    table = wald(fit)
    residual = fit.model.design.residual
    least = _least(None if residual is None else residual.structure.family)
    rows = zip(table.index, table["estimate"], table["std_error"], strict=True)
    found = [_test(_chart(name, fit), name, value, se, least) for name, value, se in rows]
    z = np.array([x for x, _ in found], float)
    return table[["estimate", "std_error"]].assign(
        statistic=z, p_value=2 * stats.norm.sf(np.abs(z)), caveat=[text for _, text in found]
    )


def _test(chart: str, name: str, value: float, se: float, least: float) -> tuple[float, str]:
    """z and what it tests."""
    if np.isinf(se):
        return np.nan, UNDETERMINED
    if chart == "logit" or name.startswith("range"):
        return np.nan, "no test: its null value is the end of its range; see confint"
    if chart == "identity":
        return value / se, "two-sided, against 0"
    if chart == "log":
        return np.log(value) * value / se, "two-sided, log ratio against 0 (equal SDs)"
    if chart == "cs":
        share, null = (value - least) / (1 - least), -least / (1 - least)
        distance = np.log(share / (1 - share)) - np.log(null / (1 - null))
        slope = 1 / (share * (1 - share) * (1 - least))
        return distance / (slope * se), "two-sided, logit on its range against correlation 0"
    if abs(value) >= 1:
        return value / se, "two-sided, against 0"
    return np.arctanh(value) * (1 - value**2) / se, "two-sided, Fisher's z against 0"


def ends(fit: Fit, name: str) -> tuple[float, float]:
    """Ends of the range of a reported residual parameter."""
    residual, chart = fit.model.design.residual, _chart(name, fit)
    assert residual is not None
    if chart == "log":
        return 0.0, np.inf
    if chart == "identity":
        return -np.inf, np.inf
    if chart == "logit":
        return 0.0, 1.0
    family = residual.structure.family
    if isinstance(family, ARMA) and (family.p if name.startswith("phi") else family.q) > 1:
        return -np.inf, np.inf
    return _least(family), 1.0


def _least(family: Any) -> float:
    """Lower end of the range of compound symmetry's correlation."""
    return -1 / (family.T - 1) if isinstance(family, CompoundSymmetry) else -1.0


def _back(chart: str, value: float, half: float, least: float) -> tuple[float, float]:
    """value ± half as an interval made in the chart, by the delta method."""
    if chart == "identity":
        return value - half, value + half
    if chart == "log":
        return value * np.exp(-half / value), value * np.exp(half / value)
    if chart == "cs":
        width = 1 - least
        low, high = _back("logit", (value - least) / width, half / width, least)
        return least + width * low, least + width * high
    if chart == "logit":
        z, h = np.log(value / (1 - value)), half / (value * (1 - value))
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(h - z)), 1 / (1 + np.exp(-h - z))
    inside = min(max(value, -1 + 1e-12), 1 - 1e-12)  # φ and θ of higher orders may leave (-1, 1)
    if abs(value) >= 1:
        return value - half, value + half
    z, h = np.arctanh(inside), half / (1 - inside**2)
    return float(np.tanh(z - h)), float(np.tanh(z + h))


# -------------------------------------------------------------------------------------------------
# Many values on unbounded scales
# -------------------------------------------------------------------------------------------------


def _charts(fit: Fit) -> tuple[list[str], float]:
    """The chart of each residual parameter, and the least ρ of compound symmetry."""
    residual = fit.model.design.residual
    family = None if residual is None else residual.structure.family
    charts = [_chart(name, fit) for name in fit.model.phi_names]
    if isinstance(family, ARMA) and max(family.p, family.q) > 1:  # these may leave (-1, 1)
        charts = ["identity" if c == "fisher" else c for c in charts]
    return charts, _least(family)


def unbounded(fit: Fit, values: np.ndarray, se: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values (m, r) of the reported parameters in their charts, and standard errors there."""
    charts, least = _charts(fit)
    out, out_se = np.array(values), np.array(se)
    with np.errstate(invalid="ignore", divide="ignore"):
        for i, chart in enumerate(charts):
            v = values[:, i]
            if chart == "log":
                out[:, i], slope = np.log(v), 1 / v
            elif chart in ("logit", "cs"):
                low = least if chart == "cs" else 0.0
                out[:, i], slope = np.log((v - low) / (1 - v)), 1 / (v - low) + 1 / (1 - v)
            elif chart == "fisher":
                out[:, i], slope = np.arctanh(v), 1 / (1 - v**2)
            else:
                continue
            out_se[:, i] *= slope
    return out, out_se


def bounded(fit: Fit, values: np.ndarray) -> np.ndarray:
    """The way back from :func:`unbounded`, (r,)."""
    charts, least = _charts(fit)
    out = np.array(values)
    for i, (chart, v) in enumerate(zip(charts, values, strict=True)):
        if chart == "log":
            out[i] = np.exp(v)
        elif chart in ("logit", "cs"):
            low = least if chart == "cs" else 0.0
            out[i] = low + (1 - low) / (1 + np.exp(-v))
        elif chart == "fisher":
            out[i] = np.tanh(v)
    return out

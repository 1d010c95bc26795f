r"""Confidence intervals of all parameters of a fit: Wald, profile likelihood, bootstrap.

Wald intervals of variance parameters are made where they are unbounded, log for SDs and σ, Fisher's
z for correlations, by the delta method from the exact Hessian of the profiled criterion; those of
fixed effects are t intervals with the fit's degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax import components
from lmmjax.bootstrap import on_active_face
from lmmjax.errors import LmmError
from lmmjax.precision import in_float64
from lmmjax.tables import check_level

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit
    from lmmjax.inference.profile import Parameter, Profiler

METHODS = ("wald", "profile", "bootstrap")

NOTE = "fixed effects by the profile of ML: REML integrates them out"


def confint(
    fit: Fit,
    method: str,
    level: float,
    parm: Any,
    criterion: str | None,
    n: int,
    seed: int,
    kind: str | None,
    beta: Mapping[str, Any],
) -> pd.DataFrame:
    """The table of ``Fit.confint``; ``beta`` are options of ``Fit.coef_table``."""
    if method not in METHODS:
        raise LmmError(f"method={method!r} is unknown; expected one of {', '.join(METHODS)}.")
    _check_options(method, {"criterion": criterion, "kind": kind, **beta})
    check_level(level)
    names = _wanted(fit, parm)
    if method == "bootstrap":
        return fit.bootstrap(n, seed).confint(level, kind or "percentile", names)
    frame = wald(fit, level, beta) if method == "wald" else None
    return profile(fit, level, names, criterion) if frame is None else frame.loc[names]


#: the method of intervals that an option belongs to, and the value that says nothing
OPTIONS = {
    "criterion": ("profile", None),
    "kind": ("bootstrap", None),
    "df": ("wald", None),
    "information": ("wald", None),
    "second_order": ("wald", True),
}


def _check_options(method: str, given: Mapping[str, Any]) -> None:
    """Refuse options of another method."""
    for name, value in given.items():
        owner, silent = OPTIONS[name]
        if method != owner and value is not silent:
            raise LmmError(
                f"found {name}={value!r} with method={method!r}; expected it with "
                f"method={owner!r} alone."
            )


def parameter_names(fit: Fit) -> list[str]:
    """lme4's names: variance parameters, σ, those of the residual structure, fixed effects."""
    model = fit.model
    return [*components.names(model.design.terms), *model.phi_names, *model.design.x_names]


def _wanted(fit: Fit, parm: Any) -> list[str]:
    known = parameter_names(fit)
    if parm is None:
        return known
    wanted = [parm] if isinstance(parm, str) else list(parm)
    groups = {"beta_": list(fit.model.design.x_names), "theta_": known[: -len(fit._beta) or None]}
    wanted = [name for w in wanted for name in groups.get(w, [w])]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise LmmError(
            f"parm names {unknown}; expected some of {known}, or 'beta_' or 'theta_' for all fixed "
            "effects or all variance parameters."
        )
    return wanted


def _frame(names: Sequence[str], rows: Any) -> pd.DataFrame:
    import pandas as pd

    table = np.asarray(rows, float).reshape(-1, 3)
    return pd.DataFrame(table, index=list(names), columns=["estimate", "low", "high"])


def estimates(fit: Fit) -> np.ndarray:
    """The fit's values of :func:`parameter_names`."""
    own = components.values(fit.model.design.terms, fit._term_covs(), np.asarray(fit.sigma))
    return np.concatenate([own, fit.residual_params(), fit._beta])


# -------------------------------------------------------------------------------------------------
# Wald
# -------------------------------------------------------------------------------------------------


def wald(fit: Fit, level: float, beta: Mapping[str, Any]) -> pd.DataFrame:
    """Wald intervals of all parameters; NaN for SDs of 0 and correlations of 1 or -1.

    The rest of a singular fit has the intervals of the model on the active face.
    """
    from scipy import stats

    value, se = _unbounded(fit)
    half = stats.norm.ppf(0.5 + level / 2) * se
    is_cor = np.array([n.startswith("cor_") for n in components.names(fit.model.design.terms)])

    def back(x: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.where(is_cor, np.tanh(x), np.exp(np.where(is_cor, 0.0, x)))

    table = fit.coef_table(level=level, **beta)
    residual = fit.residual_intervals(level)
    low = np.concatenate([back(value - half), residual["low"], table["ci_low"]])
    high = np.concatenate([back(value + half), residual["high"], table["ci_high"]])
    rows = np.column_stack([estimates(fit), low, high])
    return _frame(parameter_names(fit), rows)


@in_float64
def _unbounded(fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """log SDs, Fisher's z and log σ, with standard errors (NaN at a boundary)."""
    model = fit.model
    value, slope, direct = _components(fit)
    free = np.append(fit._theta_s, fit.phi)
    value, se = on_active_face(
        fit, value[None], slope[None], direct[None], free[None], fit._hessian_s[None]
    )
    is_log = [not c.startswith("cor_") for c in components.names(model.design.terms)]
    value = value[0] + float(np.log(model._units.scale)) * np.array(is_log)
    value[-1] = np.log(fit.sigma)
    return value, se[0]


def _components(fit: Fit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, slopes in (θ, φ) along the profile of σ, and in log σ² alone, standardised.

    φ moves components through the profiled σ² only, and σ also through the SD it refers to.
    """
    from lmmjax.bootstrap import _structure, _transformed

    model, layout = fit.model, fit.model._plan.layout
    gram, rhs = fit._products
    one = jax.tree.map(lambda a: np.asarray(a)[None], rhs)
    value, slope, direct = (
        np.array(a[0])
        for a in jax.device_get(
            _transformed(layout, fit.method, _structure(model), gram, one, fit._theta_s[None])
        )
    )
    if model.design.residual is None:
        return value, slope, direct
    from lmmjax.residual import program

    free = jnp.asarray(np.concatenate([fit._theta_s, fit.phi]))
    along = np.asarray(program.log_sigma2_slope(layout, fit.method, free, model._prepared[2]))
    moved = direct[:, None] * along[layout.n_theta :]
    structure = model.design.residual.structure
    reference = jax.jacfwd(
        lambda phi: jnp.log(structure.variances.reference(phi[structure.n_corr :]))
    )
    moved[-1] += np.asarray(reference(jnp.asarray(fit.phi)))
    return value, np.concatenate([slope, moved], axis=1), direct


# -------------------------------------------------------------------------------------------------
# Profile likelihood
# -------------------------------------------------------------------------------------------------


def profile(fit: Fit, level: float, names: list[str], criterion: str | None) -> pd.DataFrame:
    """Profile-likelihood intervals; ``attrs`` tell the criterion of each kind of parameter."""
    from lmmjax.inference.profile import limits

    method, profiled = _profiled(fit, names, criterion)
    known = dict(zip(parameter_names(fit), estimates(_by(fit, method)), strict=True))
    known |= dict(zip(fit.model.design.x_names, fit._beta, strict=True))
    rows = [(known[p.name], *limits(profiler, p, level)) for profiler, p in profiled]
    frame = _frame(names, rows)
    frame.attrs["criterion"] = {"variance parameters": method, "fixed effects": "ML"}
    if method == "REML" and any(name in fit.model.design.x_names for name in names):
        frame.attrs["note"] = NOTE
    return frame


def curves(fit: Fit, parm: Any, criterion: str | None, level: float, points: int) -> pd.DataFrame:
    """The table of ``Fit.profile``."""
    import pandas as pd

    from lmmjax.inference.profile import curve

    if not (isinstance(points, int | np.integer) and points >= 2):
        raise LmmError(f"points={points!r} is too few; expected an integer, 2 or more.")
    check_level(level)
    _, profiled = _profiled(fit, _wanted(fit, parm), criterion)
    parts = []
    for profiler, parameter in profiled:
        values, zeta = curve(profiler, parameter, level, int(points))
        parts.append(pd.DataFrame({"parameter": parameter.name, "value": values, "zeta": zeta}))
    return pd.concat(parts, ignore_index=True)


def _profiled(
    fit: Fit, names: list[str], criterion: str | None
) -> tuple[str, list[tuple[Profiler, Parameter]]]:
    """The criterion of the variance parameters, and each parameter with what profiles it."""
    from lmmjax.inference.profile import Profiler

    method = fit.method if criterion is None else str(criterion).upper()
    if method not in ("ML", "REML"):
        raise LmmError(f"criterion={criterion!r} is unknown; expected 'ML' or 'REML'.")
    fixed = list(fit.model.design.x_names)
    profilers: dict[str, Profiler] = {}
    out = []
    for name in names:
        own = "ML" if name in fixed else method
        if own not in profilers:
            profilers[own] = Profiler(_by(fit, own))
        p = profilers[own]
        out.append((p, p.coefficient(fixed.index(name)) if name in fixed else p.component(name)))
    return method, out


def _by(fit: Fit, method: str) -> Fit:
    """The optimum of the same model by that criterion; whatever it warns of, the limits show."""
    import warnings

    from lmmjax.errors import SingularFitWarning

    if fit.method == method:
        return fit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingularFitWarning)  # that of the caller's fit was told
        return fit.model.fit(method=method)

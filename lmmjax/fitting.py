"""Making a fit: options checked, the compiled optimiser run, its verdict put into words."""

from __future__ import annotations

import math
import time
import warnings
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax import estimate
from lmmjax.errors import ConvergenceWarning, DataError, LmmError, SingularFitWarning
from lmmjax.fit import Fit
from lmmjax.inference.hypothesis import check_df, check_information
from lmmjax.optimize import (
    CONVERGED,
    FLAT_STOP,
    SINGULAR_TOLERANCE,
    STATUS,
    newton_decrement,
)
from lmmjax.precision import in_float64
from lmmjax.threads import SMALL, one_blas_thread

if TYPE_CHECKING:
    from lmmjax.model import Model


def _optimizer_key(optimizer: Any) -> tuple[Any, str]:
    """What the compiled program takes, and a name for the result."""
    if isinstance(optimizer, str):
        if optimizer not in ("newton", "lbfgs", "adam"):
            raise LmmError(
                f"optimizer={optimizer!r} is unknown; expected 'newton', 'lbfgs', 'adam' or an "
                "optax transformation such as optax.adam(0.1)."
            )
        return optimizer, optimizer
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise LmmError(
            f"optimizer is a {type(optimizer).__name__}; expected 'newton', 'lbfgs', 'adam' or an "
            "optax transformation such as optax.adam(0.1)."
        )
    return optimizer, "optax"


def _start(model: Model, start: Any) -> np.ndarray:
    if start is None:
        return model._start
    theta = np.asarray(start, float)
    names = [*model.theta_names, *model.phi_names]
    if theta.shape != (len(names),) or not np.all(np.isfinite(theta)):
        raise DataError(
            f"start has shape {theta.shape}; expected ({len(names)},) finite values, one for each "
            f"of {names}."
        )
    theta, phi = np.split(theta, [len(model.theta_names)])
    theta_s = model._theta_standard(theta)
    if np.any(np.abs(theta_s[_diagonal(model)]) < SINGULAR_TOLERANCE):
        raise DataError(
            "start has a variance of 0, where the gradient is 0 whatever the data; expected "
            "positive relative SDs. Use small positive values, 0.1 say."
        )
    return np.concatenate([theta_s, phi])


def _diagonal(model: Model) -> np.ndarray:
    """Positions in θ of the parameters that are 0 on the boundary of us, diag and hom terms."""
    at, out = 0, []
    for s in model._plan.layout.structures:
        moved = np.abs(s.from_factor(2.0 * np.eye(s.S)) - s.start()) > 0
        out.append(at + np.flatnonzero(moved))
        at += s.n_theta
    return np.concatenate([np.zeros(0, int), *out])


@in_float64
def fit_model(
    model: Model,
    method: str,
    *,
    df: str | None,
    optimizer: Any,
    start: Any,
    information: str = "expected",
    mesh: Any = None,
) -> Fit:
    """Fit ``model``; see :meth:`lmmjax.Model.fit`."""
    from lmmjax.design import check_identifiable
    from lmmjax.residual.checks import warn_redundant

    check_identifiable(model.design)
    warn_redundant(model.design)
    uncertain = model.is_mixed or model.is_structured
    default = "satterthwaite" if uncertain else "residual"
    df = default if df is None else check_df(df, method)
    key, name = _optimizer_key(optimizer)
    layout, units, p = model._plan.layout, model._units, model.design.p
    theta0 = np.asarray(_start(model, start), model.dtype)
    began = time.perf_counter()
    with one_blas_thread(layout.d + layout.p >= SMALL):
        best, est = jax.tree.map(np.asarray, _optimise(model, method, theta0, key, mesh))
    seconds = time.perf_counter() - began
    theta_s, phi = np.split(np.asarray(best.theta, float), [layout.n_theta])
    sd = _residual_sd(model, phi)
    hessian = np.asarray(best.hessian, float)
    on_boundary = boundary(model, theta_s)
    converged, words = _judge(best, hessian, method, model.dtype, name)
    fit = Fit(
        model=model,
        method=method,
        df=df,
        optimizer=name,
        theta=_frozen(model._theta_public(theta_s, sd)),
        sigma=units.scale * math.sqrt(float(est.sigma2)) * sd,
        loglik=-0.5 * (float(best.value) + units.constant(method)),
        converged=converged,
        singular=bool(on_boundary),
        message="; ".join([words, *on_boundary]),
        n_evals=int(best.n_evals),
        seconds=seconds,
        gradient=_frozen(np.array(best.gradient, float)),
        _theta_s=theta_s,
        _curvature_s=hessian,
        _beta=units.beta0 + units.scale * units.A @ np.asarray(est.beta, float)[:p],
        _unscaled_vcov=units.A @ np.asarray(est.unscaled_vcov, float)[:p, :p] @ units.A.T / sd**2,
        information=check_information(information),
        phi=_frozen(phi),
        _residual_sd=sd,
    )
    if not converged:
        warnings.warn(fit.message, ConvergenceWarning, stacklevel=4)
    if on_boundary:
        warnings.warn("singular fit: " + "; ".join(on_boundary), SingularFitWarning, stacklevel=4)
    return fit


def _optimise(model: Model, method: str, theta0: np.ndarray, key: Any, mesh: Any) -> Any:
    """The compiled fit: over devices, with residual parameters, or in the bucket of its shapes."""
    if mesh is not None:
        from lmmjax.sharding import optimise

        return optimise(model, mesh, method, theta0, key)
    if model.is_structured:
        from lmmjax.residual import program

        layout = model._plan.layout
        return program.optimise(layout, method, model._source(), theta0, optimizer=key)
    layout, the_gram, rhs = model._fitted_arrays[method]
    return estimate.optimise(layout, method, the_gram, rhs, theta0, optimizer=key)


def _residual_sd(model: Model, phi: np.ndarray) -> float:
    """S of the row that σ refers to; 1 for equal variances."""
    if model.design.residual is None:
        return 1.0
    s = model.design.residual.structure
    return float(s.variances.reference(jnp.asarray(phi[s.n_corr :])))


def _frozen(values: np.ndarray) -> np.ndarray:
    """The array, closed to writing: results are immutable."""
    values.setflags(write=False)
    return values


def _judge(best: Any, hessian: np.ndarray, method: str, dtype: str, name: str) -> tuple[bool, str]:
    """Convergence by what a Newton step still promises and by the curvature, in words."""
    if len(hessian) == 0:
        return True, "closed form"
    status = int(best.status)
    if not np.all(np.isfinite(hessian)) or not np.isfinite(float(best.value)):
        return False, (
            f"did not converge: {STATUS[status]}; check the data for columns of wildly different "
            "size or a response that the model fits exactly"
        )
    gradient = np.asarray(best.gradient, float)
    promised, lowest = newton_decrement(gradient, hessian)
    tolerance = 1e-6 if dtype == "float64" else 1e-2
    curved = lowest > -1e-6 * max(1.0, float(np.abs(hessian).max()))
    largest = float(np.max(np.abs(gradient)))
    checks = f"{best.n_evals} evaluations, largest gradient {largest:.1g}"
    if promised < tolerance and curved and status in (CONVERGED, FLAT_STOP):
        return True, f"converged ({checks})"
    if promised < tolerance and curved:
        return True, f"converged to within {promised:.1g} of the criterion ({checks})"
    reason = STATUS[status] if not curved or status != CONVERGED else "the gradient is not zero"
    if not curved:
        reason += ", at a saddle point"
    remedy = (
        "use another start=" if name == "newton" else "use optimizer='newton', or another start="
    )
    if np.max(np.abs(np.asarray(best.theta))) > 1e4:
        reason += ", the residual variance goes to 0"
        remedy = "the random effects reproduce the response: simplify them, or check for copies"
    return False, (
        f"did not converge: {reason} ({checks}; a Newton step promises {promised:.2g} less "
        f"{method} criterion); {remedy}"
    )


def boundary(model: Model, theta_s: np.ndarray) -> list[str]:
    """Which components are on the boundary, one phrase each."""
    phrases = []
    for term, lam, B in zip(
        model.design.terms, model._factors(theta_s), model._units.B, strict=True
    ):
        lower = np.linalg.qr(lam.T, mode="r")
        if np.min(np.abs(np.diag(lower))) >= SINGULAR_TOLERANCE:
            continue
        sd = np.sqrt(np.sum((B @ lam) ** 2, axis=1)) / np.abs(np.diag(B))
        zero = [name for name, s in zip(term.names, sd, strict=True) if s < SINGULAR_TOLERANCE]
        if zero:
            phrases += [f"the variance of {name} | {term.group} is 0" for name in zero]
        elif len(term.names) == 2:
            c = (B @ lam) @ (B @ lam).T
            sign = "1" if c[0, 1] > 0 else "-1"
            phrases.append(
                f"the correlation of {term.names[0]} and {term.names[1]} | {term.group} is {sign}"
            )
        else:
            rank = int(np.sum(np.linalg.svd(lam, compute_uv=False) > SINGULAR_TOLERANCE))
            phrases.append(
                f"the covariance of {', '.join(term.names)} | {term.group} has rank {rank} "
                f"of {len(term.names)}"
            )
    return phrases

"""Making a fit: options checked, the compiled optimiser run, its verdict put into words."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax import estimate
from lmmjax.boundary import diagonal
from lmmjax.design import check_identifiable
from lmmjax.errors import ConvergenceWarning, DataError, LmmError, SingularFitWarning
from lmmjax.fit import Fit
from lmmjax.inference.hypothesis import check_df, check_information
from lmmjax.optimize import (
    CONVERGED,
    FLAT_STOP,
    MAX_ITERATIONS,
    SINGULAR_TOLERANCE,
    STATUS,
)
from lmmjax.precision import in_float64
from lmmjax.residual.checks import warn_redundant, warn_undetermined
from lmmjax.solution import Solution
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
    """A caller's start in standardised units."""
    theta = np.asarray(start, float)
    names = [*model.theta_names, *model.phi_names]
    if theta.shape != (len(names),) or not np.all(np.isfinite(theta)):
        raise DataError(
            f"start has shape {theta.shape}; expected ({len(names)},) finite values, one for each "
            f"of {names}."
        )
    theta, phi = np.split(theta, [len(model.theta_names)])
    theta_s = model._theta_standard(theta)
    if np.any(np.abs(theta_s[diagonal(model._plan.layout)]) < SINGULAR_TOLERANCE):
        raise DataError(
            "start has a variance of 0, where the gradient is 0 whatever the data; expected "
            "positive relative SDs. Use small positive values, 0.1 say."
        )
    return np.concatenate([theta_s, phi]).astype(model.dtype)


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
    check_identifiable(model.design)
    redundant = warn_redundant(model.design)
    uncertain = model.is_mixed or model.is_structured
    default = "satterthwaite" if uncertain else "residual"
    df = default if df is None else check_df(df, method)
    key, name = _optimizer_key(optimizer)
    layout = model._plan.layout
    with one_blas_thread(layout.d + layout.p >= SMALL):  # the products, too
        free0 = model._device_start if start is None else _start(model, start)
        began = time.perf_counter()
        solution = _solve(model, method, free0, key, mesh)
    fit = Fit(
        model=model,
        method=method,
        df=df,
        optimizer=name,
        converged=solution.converged(model.dtype),
        singular=solution.singular,
        seconds=time.perf_counter() - began,
        information=check_information(information),
        _solution=solution,
    )
    if not fit.converged:
        warnings.warn(fit.message, ConvergenceWarning, stacklevel=4)
    if fit.singular:
        words = "; ".join(boundary(model, fit._theta_s))
        warnings.warn("singular fit: " + words, SingularFitWarning, stacklevel=4)
    if fit.converged and model.is_structured and not redundant:
        warn_undetermined(fit)
    return fit


def _solve(model: Model, method: str, free0: Any, key: Any, mesh: Any) -> Solution:
    """The compiled fit: over devices, with residual parameters, or in the bucket of its shapes."""
    layout = model._plan.layout
    if mesh is not None:
        from lmmjax.sharding import solve

        values = solve(model, mesh, method, np.asarray(free0), key)
    elif model.is_structured:
        from lmmjax.residual import program

        values = program.solve(layout, method, model._source(), free0, optimizer=key)
    else:
        layout, the_gram, rhs = model._fitted_arrays[method]
        values = estimate.solve_any(layout, method, the_gram, rhs, free0, optimizer=key)
    return Solution.of(values, free0.shape[0], model.design.p, layout.p)


def message(fit: Fit) -> str:
    """What the convergence checks found, and what is on the boundary, in words."""
    words = _converged(fit) if fit.converged else _not_converged(fit)
    return "; ".join([words, *(boundary(fit.model, fit._theta_s) if fit.singular else [])])


def _checks(solution: Solution) -> str:
    largest = float(np.max(np.abs(solution.gradient)))
    count = f"{solution.n_evals} evaluation{'' if solution.n_evals == 1 else 's'}"
    return f"{count}, largest gradient {largest:.1g}"


def _converged(fit: Fit) -> str:
    solution = fit._solution
    if solution.k == 0:
        return "closed form"
    if solution.status in (CONVERGED, FLAT_STOP):
        return f"converged ({_checks(solution)})"
    return f"converged to within {solution.promised:.1g} of the criterion ({_checks(solution)})"


def _not_converged(fit: Fit) -> str:
    solution = fit._solution
    if not solution.finite:
        return (
            f"did not converge: {STATUS[solution.status]}; check the data for columns of wildly "
            "different size or a response that the model fits exactly"
        )
    stopped = not solution.curved or solution.status != CONVERGED
    reason = STATUS[solution.status] if stopped else "the gradient is not zero"
    if not solution.curved:
        reason += ", at a saddle point"
    remedy = (
        "use another start="
        if fit.optimizer == "newton"
        else "use optimizer='newton', or another start="
    )
    if fit.model.dtype == "float32" and solution.curved and solution.status != MAX_ITERATIONS:
        remedy = "float32 holds no more digits of this criterion: use dtype='float64'"
    if np.max(np.abs(solution.free)) > 1e4:
        reason += ", the residual variance goes to 0"
        remedy = "the random effects reproduce the response: simplify them, or check for copies"
    elif fit.model.is_structured and _runs_away(fit):
        reason += ", the residual covariance goes to a singular one"
        remedy = "the criterion is not bounded: use a residual structure with fewer parameters"
    return (
        f"did not converge: {reason} ({_checks(solution)}; a Newton step promises "
        f"{solution.promised:.2g} less {fit.method} criterion); {remedy}"
    )


def _runs_away(fit: Fit) -> bool:
    """Whether residuals are estimated as exact functions of others: correlation matrices or
    variances of their subjects nearly singular."""
    from lmmjax.residual.covariance import block

    r = fit.model.design.residual
    if r is None or not np.all(np.isfinite(fit.phi)):
        return False
    rows = np.flatnonzero(r.subject == np.argmax(np.bincount(r.subject)))[:200]
    e = np.linalg.eigvalsh(block(r, fit.phi, np.ones(len(r.subject)), rows))
    return bool(e[0] < 1e-6 * e[-1])


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

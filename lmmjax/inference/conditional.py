r"""Conditional AIC (Vaida and Blanchard 2005; Greven and Kneib 2010, Biometrika 97, 773-789).

    cAIC = -2 log p(y | β̂, b̂, σ̂) + 2 df,   df = 1 + tr(∂ŷ/∂y),

with θ̂ a function of y: the trace is ρ at fixed θ plus what re-estimating θ adds. With ŷ(θ) the
fitted values, D_k = ∂ŷ/∂θ_k, e = y - ŷ, W = R⁻¹, r² = y'Py, P = V⁻¹ - V⁻¹X(X'V⁻¹X)⁻¹X'V⁻¹ and H the
Hessian of the profiled criterion,

    ρ = p + tr(PZΣZ'),
    tr(∂ŷ/∂y) = ρ + (2ν/r²) Σ_kl (H⁻¹)_kl [D_l'W D_k + (e'W D_k)(∂_l r²)/r²],

since ∂θ̂/∂y = -H⁻¹ ∂²criterion/∂θ∂y and P_k y = -W D_k. A component at 0 has D_k = 0 by symmetry and
drops out, so the boundary needs no case of its own. tr(PZΣZ') is the derivative of
log|V| + log|X'V⁻¹X| along Σ.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax import likelihood as lk
from lmmjax.errors import DesignError, LmmError
from lmmjax.gram import Gram, Layout, Rhs
from lmmjax.precision import in_float64

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit


class Slopes(NamedTuple):
    """Derivatives in θ, last axis, in standardised units."""

    beta: jax.Array  # (p, K)
    b: tuple[jax.Array, ...]  # per factor (S, J, K)
    r2: jax.Array  # (K,)
    rho: jax.Array  # ()


@functools.partial(jax.jit, static_argnums=0)
def _slopes(layout: Layout, theta: jax.Array, gram: Gram, rhs: Rhs) -> Slopes:
    def effects(t: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
        red = lk.reduce(layout, t, gram, rhs)
        beta = lk.fixef(red)
        return beta, lk.ranef(layout, gram, red, beta), red.r2

    def logdets(s: jax.Array) -> jax.Array:
        lams = [lam * jnp.exp(s) for lam in lk.factors(layout, theta)]
        return lk.logdets(lk.reduce_factors(layout, lams, gram, rhs), "REML")

    beta, b, r2 = jax.jacfwd(effects)(theta)
    rho = layout.p + 0.5 * jax.grad(logdets)(jnp.zeros((), theta.dtype))
    return Slopes(beta, b, r2, rho)


def caic(fit: Fit) -> pd.Series:
    """The series of ``Fit.caic``."""
    import pandas as pd

    if fit.model.is_structured:
        raise LmmError(
            "conditional AIC is for independent residuals; found a residual structure. Use aic."
        )
    design = fit.model.design
    if not hasattr(design, "X"):
        raise DesignError("conditional AIC needs the rows; expected Model(formula, data).")
    e = design.y - fit.fitted().to_numpy()
    w = np.asarray(design.weights, float)
    s2 = fit.sigma**2
    loglik = -0.5 * float(np.sum(np.log(2 * np.pi * s2 / w[w > 0])) + np.sum(w * e**2) / s2)
    df = 1.0 + trace(fit)
    return pd.Series({"caic": -2 * loglik + 2 * df, "loglik": loglik, "df": df}, name="caic")


@in_float64
def trace(fit: Fit) -> float:
    """tr(∂ŷ/∂y) with θ̂ re-estimated; O(n (p + q columns) K)."""
    model, design = fit.model, fit.model.design
    layout, units = model._plan.layout, model._units
    if layout.n_theta == 0:
        return float(layout.p)
    found = jax.device_get(_slopes(layout, jnp.asarray(fit._theta_s), *model._on_device))
    D = design.X @ (units.A @ found.beta)  # in units of the scale c
    for f, b in zip(model._plan.factors, found.b, strict=True):
        at = 0
        for k in f.terms:
            term, B = design.terms[k], units.B[k]
            S = len(term.names)
            slopes = np.einsum("st,tjk->jsk", B, b[at : at + S])
            D = D + np.einsum("is,isk->ik", term.z, slopes[term.codes])
            at += S
    w = np.asarray(design.weights, float)
    e = (design.y - fit.fitted().to_numpy()) / units.scale
    nu = fit.n_obs - (layout.p if fit.method == "REML" else 0)
    r2 = nu * (fit.sigma / units.scale) ** 2
    inner = D.T @ (w[:, None] * D) + np.outer((w * e) @ D, found.r2) / r2
    inverse = np.linalg.pinv(fit._hessian_s, rcond=1e-9, hermitian=True)
    return float(found.rho + 2 * nu / r2 * np.sum(inverse * inner))

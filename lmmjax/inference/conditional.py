r"""Conditional AIC (Vaida and Blanchard 2005; Greven and Kneib 2010, Biometrika 97, 773-789).

    cAIC = -2 log N(y; Xβ̂ + Zb̂, σ̂²R̂) + 2 df,   df = 1 + #φ + tr(∂ŷ/∂y),

with θ̂ and φ̂ functions of y: the trace is ρ at fixed t = (θ, φ) plus what re-estimating t adds. With
P = V⁻¹ - V⁻¹X(X'V⁻¹X)⁻¹X'V⁻¹, e = y - ŷ = RPy, r² = y'Py, D_k = ∂ŷ/∂t_k, R_k = ∂R/∂t_k (0 for θ),
g_k = D_k + R_kR⁻¹e = -RP_k y and H the Hessian of the profiled criterion,

    ρ = n - tr(RP) = p + tr(PZΣZ'),
    tr(∂ŷ/∂y) = ρ + (2ν/r²) Σ_kl (H⁻¹)_kl [g_l'R⁻¹D_k + (e'R⁻¹D_k)(∂_l r²)/r²],

since ∂t̂/∂y = -H⁻¹ ∂²criterion/∂t∂y. A component at 0 has D_k = 0 by symmetry and drops out, so the
boundary needs no case of its own. tr(PZΣZ') is the derivative of log|V| + log|X'V⁻¹X| along Σ.

No rows are needed: with the effects moved along s, q(s, t) = |y - ŷ(t̂) - Σ s_kD_k|² in the metric
R(t)⁻¹ is a form in the cross-products, and

    e'R⁻¹D_k = -½ ∂q/∂s_k,   g_l'R⁻¹D_k = ½ (∂²q/∂s_k∂s_l + ∂²q/∂s_k∂t_l).

**Why #φ.** With Ω = σ²R of m parameters ψ and A = Ω⁻¹, the optimism of the conditional
log-likelihood for a new y of the same b is, by Stein's identity and averaged over b,

    tr(Ω A ∂ŷ/∂y) + E Σ_k (∂ψ̂_k/∂y)'Ω_k A [½ ε - (ŷ - Xβ - Zb)].

For known R it is the trace alone, exactly. To first order ∂ψ̂_k/∂y = Σ_l (I⁻¹)_kl P V_l P y, over
all variance parameters l with V_l = ∂V/∂ψ_l and I_kl = ½ tr(PV_kPV_l): the part with ½ ε is
Σ_k Σ_l (I⁻¹)_kl I_lk = m, the other vanishes. So σ² counts 1, which is Greven and Kneib's 1, and
every parameter of R that the data determine counts 1 too. Without random effects Xβ̂ is the mean,
the conditional likelihood is the marginal one, and df tends to the number of parameters.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax import determined
from lmmjax import likelihood as lk
from lmmjax.gram import Gram, Layout, Rhs
from lmmjax.precision import in_float64

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit


class Conditional(NamedTuple):
    """What the header names, in standardised units; K free parameters (θ, φ)."""

    square: jax.Array  # e'R⁻¹e, ()
    logdet_R: jax.Array  # ()
    rho: jax.Array  # ()
    along: jax.Array  # e'R⁻¹D_k, (K,)
    inner: jax.Array  # g_l'R⁻¹D_k, (K, K), k first
    r2: jax.Array  # ()
    r2_slope: jax.Array  # (K,)


class Fixed(NamedTuple):
    """A source of cross-products without parameters."""

    products: tuple[Gram, Rhs]

    def gram(self, phi: jax.Array) -> tuple[Gram, Rhs]:
        """The same for every (empty) φ."""
        return self.products


@functools.partial(jax.jit, static_argnums=0)
def conditional(layout: Layout, free: jax.Array, source: Any) -> Conditional:
    """The pieces at (θ, φ) from a source of cross-products.

    Notes
    -----
    K times an elimination, and K² times a product with the cross-products.
    """
    k = layout.n_theta

    def effects(t: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
        gram, rhs = source.gram(t[k:])
        red = lk.reduce(layout, t[:k], gram, rhs)
        beta = lk.fixef(red)
        return beta, lk.ranef(layout, gram, red, beta), red.r2

    gram, rhs = source.gram(free[k:])
    beta, b, r2 = effects(free)
    beta_slope, b_slope, r2_slope = jax.jacfwd(effects)(free)

    def square(s: jax.Array, t: jax.Array) -> jax.Array:
        moved = tuple(x + slope @ s for x, slope in zip(b, b_slope, strict=True))
        gram, rhs = source.gram(t[k:])
        return lk.residual_square(layout, gram, rhs, beta + beta_slope @ s, moved)

    def logdets(s: jax.Array) -> jax.Array:
        lams = [lam * jnp.exp(s) for lam in lk.factors(layout, free[:k])]
        return lk.logdets(lk.reduce_factors(layout, lams, gram, rhs), "REML")

    zero = jnp.zeros_like(free)
    value, slope = jax.value_and_grad(square)(zero, free)
    ss, st = jax.jacfwd(jax.grad(square), argnums=(0, 1))(zero, free)
    rho = layout.p + 0.5 * jax.grad(logdets)(jnp.zeros((), free.dtype))
    logdet_R = jnp.asarray(gram.logdet_R, free.dtype)
    return Conditional(value, logdet_R, rho, -0.5 * slope, 0.5 * (ss + st), r2, r2_slope)


@in_float64
def caic(fit: Fit) -> pd.Series:
    """The series of ``Fit.caic``."""
    import pandas as pd

    model = fit.model
    layout, source = model._plan.layout, model._prepared[2]
    made = source if model.is_structured else Fixed(model._on_device)
    free = jnp.asarray(np.concatenate([fit._theta_s, fit.phi]))
    c = jax.device_get(conditional(layout, free, made))
    s2, n = fit._solution.sigma2, fit.n_obs
    deviance = n * np.log(2 * np.pi * s2) + c.logdet_R + c.square / s2
    loglik = -0.5 * float(deviance) - n * float(np.log(model._units.scale))
    inverse, known = determined.inverse(fit._hessian_s)
    df = 1.0 + float(np.sum(known[layout.n_theta :])) + _trace(fit, c, inverse)
    return pd.Series({"caic": -2 * loglik + 2 * df, "loglik": loglik, "df": df}, name="caic")


def _trace(fit: Fit, c: Conditional, inverse: np.ndarray) -> float:
    """tr(∂ŷ/∂y) with θ̂ and φ̂ re-estimated."""
    nu = fit.n_obs - (fit.model._plan.layout.p if fit.method == "REML" else 0)
    inner = c.inner + np.outer(c.along, c.r2_slope) / c.r2
    return float(c.rho + 2 * nu / c.r2 * np.sum(inverse * inner))

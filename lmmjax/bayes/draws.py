r"""From draws of the sampler's coordinates to draws of everything, in the units of the data.

In the marginal form β and b have been integrated out; given (θ, σ) they are Gaussian, so they are
drawn exactly, β first and then b given β, from the same factorisation that gave the likelihood.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.infer.util import constrain_fn

from lmmjax import likelihood as lk
from lmmjax.bayes.numpyro_model import (
    Data,
    Sites,
    Spec,
    Variances,
    body,
    gaussian_beta,
    reduction,
    variances_of,
)
from lmmjax.marginal import BATCH_NUMBERS

#: name under which :func:`complete` hands back the free residual parameters
FREE = "residual_free"

#: each draw is completed once, so that compiling fast beats running fast
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


# -------------------------------------------------------------------------------------------------
# Values of all sites
# -------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("spec", "batch"), compiler_options=QUICK)
def complete(
    spec: Spec, data: Data, prior: Sites, z: dict[str, Array], keys: Array, batch: int
) -> dict[str, Array]:
    """All parameters and effects of each draw (leading axis) in the units of the data."""

    def one(draw: tuple[dict[str, Array], Array]) -> dict[str, Array]:
        position, key = draw
        values = constrain_fn(body, (spec, data, prior), {}, position, return_deterministic=True)
        v = variances_of(spec, values)
        if spec.form == "marginal":
            values |= _effects_given(spec, data, prior, values, v, key)
        keep = ("beta", "sigma", "sd_", "cor_", "ranef_")
        out = {k: x for k, x in values.items() if k.startswith(keep) and not k.endswith("_free")}
        if spec.residual is not None:
            out |= {k: values[k] for k in spec.residual.names} | {FREE: v.phi}
        return out

    return jax.lax.map(one, (z, keys), batch_size=batch)


def _effects_given(
    spec: Spec, data: Data, prior: Sites, values: dict[str, Array], v: Variances, key: Array
) -> dict[str, Array]:
    """An exact draw of β given (θ, σ, φ) where it was integrated out, then of b given β."""
    red, sigma2, gram = reduction(spec, data, v)
    key_beta, key_b = jax.random.split(key)
    M = data.scale * data.A
    if spec.integrate:
        beta_s = _draw_beta(red, data, prior, sigma2, key_beta)
    else:
        beta_s = jnp.linalg.solve(M, values["beta"] - data.beta0)
    out = {"beta": data.beta0 + M @ beta_s} if spec.layout.p else {}
    every = (*spec.layout.chain, *spec.layout.core)
    keys = jax.random.split(key_b, len(every) + 1)
    noise = tuple(
        jnp.sqrt(sigma2) * jax.random.normal(k, (S, J), beta_s.dtype)
        for k, (_, S, J) in zip(keys[:-1], every, strict=True)
    )
    b = lk.ranef(spec.layout, gram, red, beta_s, noise)
    by_terms = {terms: effects for (terms, _, _), effects in zip(every, b, strict=True)}
    for g in spec.groups:
        B = data.scale * jax.scipy.linalg.block_diag(*[data.B[k] for k in g.terms])
        out[f"ranef_{g.name}"] = (B @ by_terms[g.terms]).T
    return out


def _draw_beta(red: lk.Reduction, data: Data, prior: Sites, sigma2: Array, key: Array) -> Array:
    """β_s ~ N(Q⁻¹h, Q⁻¹), Q = X'V⁻¹X/σ² + P, h = X'V⁻¹y/σ² + P m."""
    b = gaussian_beta(data, prior)
    xx, xy, _ = lk.quadratic(red)
    L = jnp.linalg.cholesky(xx / sigma2 + b.precision)
    half = jax.scipy.linalg.solve_triangular(L, xy / sigma2 + b.precision @ b.mean, lower=True)
    half = half + jax.random.normal(key, half.shape, half.dtype)
    return jax.scipy.linalg.solve_triangular(L, half, lower=True, trans=1)


# -------------------------------------------------------------------------------------------------
# By row
# -------------------------------------------------------------------------------------------------


def slices(n_draws: int, numbers_per_draw: int) -> Iterator[slice]:
    """Parts of the draws that keep an array of ``numbers_per_draw`` a draw within bounds."""
    step = max(1, BATCH_NUMBERS // max(1, numbers_per_draw))
    for first in range(0, n_draws, step):
        yield slice(first, min(first + step, n_draws))


def linear_predictor(
    X: np.ndarray, offset: np.ndarray, terms: Any, beta: np.ndarray, effects: list[np.ndarray]
) -> np.ndarray:
    """Xβ + offset + Zb by draw: (draws, rows). Codes of -1 contribute nothing.

    ``terms`` are (z, codes) by term and ``effects`` their draws (draws, J, S).
    """
    out = beta @ X.T + offset
    for (z, codes), b in zip(terms, effects, strict=True):
        known = codes >= 0
        for s in range(z.shape[1]):
            out[:, known] += z[known, s] * b[:, codes[known], s]
    return out

"""The compiled programs of models whose cross-products depend on φ.

The free parameters are concat(θ, φ). Everything else is that of estimate.py: the same reduction,
heads and optimiser; at φ̂ the cross-products are constants and the other programs serve as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmmjax import estimate, optimize
from lmmjax import likelihood as lk
from lmmjax.derivatives import Derivatives, by_autodiff
from lmmjax.gram import Gram, Layout, Rhs
from lmmjax.optimize import Optimum
from lmmjax.residual import closed
from lmmjax.residual.source import Patterns, Source
from lmmjax.solution import pack


def criterion(layout: Layout, method: str, free: jax.Array, source: Source) -> jax.Array:
    """-2 log-likelihood at concat(θ, φ) in standardised units, β and σ profiled out."""
    k = layout.n_theta
    # without estimate.criterion's rules: θ and the cross-products move together here
    return lk.deviance(lk.reduce(layout, free[:k], *source.gram(free[k:])), method)


@functools.partial(jax.jit, static_argnames=("layout", "method", "optimizer"))
def optimise(
    layout: Layout, method: str, source: Source, free0: jax.Array, optimizer: Any = "newton"
) -> tuple[Optimum, estimate.Estimates]:
    """Fit in (θ, φ) together; see :func:`lmmjax.estimate.optimise`."""

    def f(free: jax.Array) -> jax.Array:
        return criterion(layout, method, free, source)

    def vgh(free: jax.Array) -> Derivatives:
        if isinstance(source, Patterns):
            return closed.value_gradient_hessian(method, free, source)
        return by_autodiff(f, free)

    if optimizer == "newton":
        best = optimize.newton(vgh, free0)
    else:
        transform = optimize.named_transform(optimizer) if isinstance(optimizer, str) else optimizer
        best = optimize.descend(f, vgh, free0, transform)
    k = layout.n_theta
    red = lk.reduce(layout, best.theta[:k], *source.gram(best.theta[k:]))
    sigma2 = lk.profiled_sigma2(red, method)
    est = estimate.Estimates(lk.fixef(red), lk.unscaled_vcov(red), sigma2, red.r2)
    return best._replace(value=lk.deviance(red, method)), est


@functools.partial(jax.jit, static_argnames=("layout", "method", "optimizer"))
def solve(
    layout: Layout, method: str, source: Source, free0: jax.Array, optimizer: Any = "newton"
) -> jax.Array:
    """:func:`optimise` as one vector for :class:`lmmjax.solution.Solution`."""
    return pack(layout, *optimise(layout, method, source, free0, optimizer=optimizer))


@jax.jit
def crossproducts(source: Source, phi: jax.Array) -> tuple[Gram, Rhs]:
    """Gram and Rhs at φ."""
    return source.gram(phi)


@functools.partial(jax.jit, static_argnames=("layout", "method"))
def log_sigma2_slope(layout: Layout, method: str, free: jax.Array, source: Source) -> jax.Array:
    """Gradient of log σ̂²(θ, φ), (k,)."""

    def log_sigma2(at: jax.Array) -> jax.Array:
        k = layout.n_theta
        red = lk.reduce(layout, at[:k], *source.gram(at[k:]))
        return jnp.log(lk.profiled_sigma2(red, method))

    return jax.jacfwd(log_sigma2)(free)


@functools.partial(jax.jit, static_argnames=("layout", "method"))
def vcov_and_derivative(
    layout: Layout, method: str, free: jax.Array, source: Source
) -> tuple[jax.Array, jax.Array]:
    """Cov(β̂) with σ profiled, (p, p), and its derivatives in (θ, φ), (p, p, k)."""
    if isinstance(source, Patterns):
        return closed.vcov_and_derivative(method, free, source)

    def vcov(at: jax.Array) -> jax.Array:
        k = layout.n_theta
        red = lk.reduce(layout, at[:k], *source.gram(at[k:]))
        return lk.profiled_sigma2(red, method) * lk.unscaled_vcov(red)

    return vcov(free), jax.jacfwd(vcov)(free)

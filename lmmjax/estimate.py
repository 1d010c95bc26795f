r"""The compiled programs: from cross-products to an optimum, and from an optimum to estimates.

Each is a pure function of arrays with a static :class:`~lmmjax.gram.Layout`, so models of equal
shape share compiled code. Everything is in standardised units; labels and units are put back by
the callers (fit.py, batches).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from lmmjax import derivatives, optimize
from lmmjax import likelihood as lk
from lmmjax.compiling import compiled_first
from lmmjax.gram import Gram, Layout, Rhs
from lmmjax.optimize import Optimum
from lmmjax.solution import pack
from lmmjax.start import identity

#: models of so many random effects are fitted by two programs
LARGE = 1 << 14


class Estimates(NamedTuple):
    """What a fit needs at once, in standardised units."""

    beta: jax.Array  # (p,)
    unscaled_vcov: jax.Array  # (p, p), times sigma2
    sigma2: jax.Array
    r2: jax.Array


def criterion(layout: Layout, method: str, theta: jax.Array, gram: Gram, rhs: Rhs) -> jax.Array:
    """-2 log-likelihood in standardised units, profiled over σ²; with its derivative rules."""
    return derivatives.profiled(layout, method, theta, gram, rhs)


def _optimum(
    layout: Layout, method: str, gram: Gram, rhs: Rhs, theta0: jax.Array, optimizer: Any = "newton"
) -> Optimum:
    """Minimise the profiled criterion."""

    def f(theta: jax.Array) -> jax.Array:
        return criterion(layout, method, theta, gram, rhs)

    def vgh(theta: jax.Array) -> derivatives.Derivatives:
        return derivatives.for_optimiser(layout, method, theta, gram, rhs)

    if layout.n_theta == 0:
        return optimize.linear(f, theta0)
    if optimizer == "newton":
        return optimize.newton(vgh, theta0, approximate=derivatives.is_approximate(layout))
    transform = optimize.named_transform(optimizer) if isinstance(optimizer, str) else optimizer
    return optimize.descend(f, vgh, theta0, transform)


def _estimates(
    layout: Layout, method: str, gram: Gram, rhs: Rhs, best: Optimum
) -> tuple[Optimum, Estimates]:
    """Evaluate the estimates, and the criterion once more, at an optimum."""
    red = lk.reduce(layout, best.theta, gram, rhs)
    est = Estimates(lk.fixef(red), lk.unscaled_vcov(red), lk.profiled_sigma2(red, method), red.r2)
    return best._replace(value=lk.deviance(red, method)), est


@functools.partial(jax.jit, static_argnames=("layout", "method", "optimizer"))
def optimise(
    layout: Layout, method: str, gram: Gram, rhs: Rhs, theta0: jax.Array, optimizer: Any = "newton"
) -> tuple[Optimum, Estimates]:
    """Fit: minimise the profiled criterion and evaluate the estimates at the optimum."""
    best = _optimum(layout, method, gram, rhs, theta0, optimizer)
    return _estimates(layout, method, gram, rhs, best)


@functools.partial(jax.jit, static_argnames=("layout", "method", "optimizer"))
def solve(
    layout: Layout, method: str, gram: Gram, rhs: Rhs, theta0: jax.Array, optimizer: Any = "newton"
) -> jax.Array:
    """:func:`optimise` as one vector for :class:`lmmjax.solution.Solution`."""
    return pack(layout, *optimise(layout, method, gram, rhs, theta0, optimizer=optimizer))


# -- large models: the steps of `solve` as programs of their own ---------------------------------

begin = jax.jit(optimize.begin)


@functools.partial(jax.jit, static_argnums=(0, 1))
def slopes(
    layout: Layout, method: str, gram: Gram, rhs: Rhs, s: optimize.State
) -> derivatives.Derivatives:
    """Value, gradient and curvature where Newton's method goes next."""
    return derivatives.for_optimiser(layout, method, s.at, gram, rhs)


@functools.partial(jax.jit, static_argnums=0)
def advance(
    approximate: bool, s: optimize.State, found: derivatives.Derivatives
) -> tuple[optimize.State, jax.Array]:
    """The state after :func:`slopes`, and whether to go on."""
    s = optimize.advance(s, *found, approximate=approximate)
    return s, s.going()


@functools.partial(jax.jit, static_argnums=(0, 1))
def finish(layout: Layout, method: str, gram: Gram, rhs: Rhs, s: optimize.State) -> jax.Array:
    """The vector of :func:`solve` where Newton's method has stopped."""
    return pack(layout, *_estimates(layout, method, gram, rhs, optimize.stop(s)))


def solve_large(layout: Layout, method: str, gram: Gram, rhs: Rhs, theta0: Any) -> jax.Array:
    """:func:`solve` by Newton's method in small programs, which are compiled one after the other.

    The compiler's memory grows with the length of a program and is returned after each. The calls,
    some 0.1 ms an evaluation, cost nothing beside arrays of this size.
    """
    key, s, going = (layout, method, gram.core.dtype), begin(theta0), True
    while going:
        found = compiled_first(slopes, key, layout, method, gram, rhs, s)
        s, going = compiled_first(advance, key, derivatives.is_approximate(layout), s, found)
    return compiled_first(finish, key, layout, method, gram, rhs, s)


def solve_any(
    layout: Layout, method: str, gram: Gram, rhs: Rhs, theta0: Any, optimizer: Any = "newton"
) -> Any:
    """:func:`solve`, or for many random effects :func:`solve_large`, if it has that optimiser."""
    if layout.q >= LARGE and layout.n_theta > 0 and optimizer == "newton":
        return solve_large(layout, method, gram, rhs, theta0)
    return solve(layout, method, gram, rhs, theta0, optimizer=optimizer)


@functools.partial(jax.jit, static_argnames="layout")
def effects(
    layout: Layout, gram: Gram, rhs: Rhs, theta: jax.Array
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """BLUPs (S, J) per factor, and their conditional covariances (S, S, J) in units of σ²."""
    red = lk.reduce(layout, theta, gram, rhs)
    b = lk.ranef(layout, gram, red, lk.fixef(red))
    return b, lk.ranef_cov(layout, theta, gram)


@functools.partial(jax.jit, static_argnames="layout")
def effect_slopes(layout: Layout, gram: Gram, rhs: Rhs, theta: jax.Array) -> tuple[jax.Array, ...]:
    """∂b̂/∂β of the BLUPs given β, which are affine in it: (S, J, p) per factor."""
    red = lk.reduce(layout, theta, gram, rhs)
    return jax.jacfwd(lambda beta: lk.ranef(layout, gram, red, beta))(lk.fixef(red))


@functools.partial(jax.jit, static_argnums=(0, 1))
def hessian(layout: Layout, method: str, theta: jax.Array, gram: Gram, rhs: Rhs) -> jax.Array:
    """Exact Hessian of the profiled criterion, where the optimiser used an approximation."""
    return derivatives.value_gradient_hessian(layout, method, theta, gram, rhs)[2]


vcov_and_derivative = jax.jit(derivatives.vcov_and_derivative, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnames="layout")
def unscaled_prediction_variance(
    layout: Layout, theta: jax.Array, gram: Gram, rows: Rhs
) -> jax.Array:
    """Var(c'(β̂ - β, b̂ - b)) / σ² for rows c of [Z X] that carry a leading axis.

    With c in place of the cross-products with y and y'y = 0 the penalised residual sum of squares
    is -c'C⁻¹c, C Henderson's coefficient matrix: prediction errors from the same factorisation.
    """

    factor = lk.factorise(layout, lk.factors(layout, theta), gram)

    def one(row: Rhs) -> jax.Array:
        return -lk.forward(layout, factor, gram, row).r2

    return jax.vmap(one)(rows)


def start(layout: Layout) -> np.ndarray:
    """Identity Λ for every term, in standardised units."""
    return identity(layout)

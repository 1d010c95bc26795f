r"""Minimise a criterion in θ: trust-region Newton, or any optax transformation, fully compiled.

The parametrisations of covariance.py have no bounds, so the problem is unconstrained. What is
special is symmetry: where a parameter (or a column of Λ) is 0, the gradient in it is exactly 0
whether that point is a minimum (a true boundary fit) or a saddle. Every method therefore ends with
the same check by exact gradient and Hessian, and Newton leaves a saddle along its direction of
negative curvature.

Newton's step uses |H| (Dauphin et al. 2014, saddle-free Newton) with the eigenvalues shifted until
the step fits the trust radius (Moré and Sorensen 1983); steps are accepted by the ratio of actual
to predicted decrease. Status is data: a batch of fits carries one number per item.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Criterion = Callable[[jax.Array], jax.Array]
Derivatives = Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]

#: a relative SD below this, in standardised units, is on the boundary (lme4's isSingular)
SINGULAR_TOLERANCE = 1e-4

#: with an approximate Hessian, the largest promise of a step that may be the last
LAST_PROMISE = 1e-6

#: what a Newton step at the optimum may promise at most, by precision
PROMISE = {"float64": 1e-6, "float32": 1e-2}

#: decreases of so many ulp of the criterion cannot be told from its rounding error
BLIND = 100

CONVERGED, MAX_ITERATIONS, NOT_FINITE, FLAT_STOP = 0, 1, 2, 3

STATUS = {
    CONVERGED: "converged",
    MAX_ITERATIONS: "stopped at the limit of iterations",
    NOT_FINITE: "the criterion is not finite at the start",
    FLAT_STOP: "no further decrease could be found although the gradient is not zero",
}


class Optimum(NamedTuple):
    """Where the optimiser stopped, and the derivatives that it saw last.

    Newton's last step is taken without another evaluation: it is the one that promised a decrease
    below rounding error.
    """

    theta: jax.Array
    value: jax.Array
    gradient: jax.Array
    hessian: jax.Array
    n_evals: jax.Array
    status: jax.Array  # a key of STATUS
    promised: jax.Array  # ½ g'|H|⁻¹g, the decrease that a Newton step still promises
    lowest: jax.Array  # eigenvalue of H


def linear(f: Criterion, theta: jax.Array) -> Optimum:
    """The optimum of a model without θ: nothing to minimise."""
    none = jnp.zeros((0, 0), theta.dtype)
    value, zero = f(theta), jnp.zeros((), theta.dtype)
    at = (jnp.asarray(1), jnp.asarray(CONVERGED))
    return Optimum(theta, value, none.sum(0), none, *at, zero, zero)


def newton_decrement(gradient: jax.Array, hessian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """½ g'|H|⁻¹g, the decrease that a Newton step still promises, invariant to scaling of θ, and
    the lowest eigenvalue of H."""
    e, Q = jnp.linalg.eigh(hessian)
    return _promised(Q.T @ gradient, _floored(e)), e[0]


def _promised(along: jax.Array, size: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(along**2 / size)


def certified(best: Optimum, gradient: jax.Array, hessian: jax.Array) -> Optimum:
    """``best`` with exact derivatives in the place of those that the optimiser used."""
    if not len(gradient):
        return best
    promised, lowest = newton_decrement(gradient, hessian)
    return best._replace(gradient=gradient, hessian=hessian, promised=promised, lowest=lowest)


def _floored(e: Any) -> Any:
    """|e|, kept away from 0 where the criterion does not determine a direction."""
    floor = np.sqrt(np.finfo(e.dtype).eps).astype(e.dtype)
    return abs(e).clip(floor * abs(e).max().clip(1.0))


class _Step(NamedTuple):
    step: jax.Array
    predicted: jax.Array  # decrease
    promised: jax.Array  # decrease without the trust region
    lowest: jax.Array  # eigenvalue of H


def _step(g: jax.Array, H: jax.Array, radius: jax.Array) -> _Step:
    """Saddle-free trust-region step."""
    e, Q = jnp.linalg.eigh(H)
    size, along = _floored(e), Q.T @ g

    def secular(shift: jax.Array) -> jax.Array:
        length = jnp.linalg.norm(along / (size + shift))
        slope = jnp.sum(along**2 / (size + shift) ** 3) / jnp.maximum(length, 1e-300)
        grow = (length / radius - 1.0) * length / jnp.maximum(slope, 1e-300)
        return jnp.where(length > radius, shift + grow, shift)

    def shortened() -> jax.Array:
        return jax.lax.fori_loop(0, 12, lambda _, s: secular(s), jnp.zeros_like(radius))

    too_long = jnp.linalg.norm(along / size) > radius
    shift = jax.lax.cond(too_long, shortened, lambda: jnp.zeros_like(radius))
    p = -along / (size + shift)
    p = p * jnp.minimum(1.0, radius / jnp.maximum(jnp.linalg.norm(p), 1e-300))
    predicted = -(along @ p) - 0.5 * jnp.sum(size * p**2)
    # at a saddle the gradient vanishes along the negative curvature: leave in that direction
    small = jnp.finfo(e.dtype).eps ** 0.5
    stuck = (e[0] < -small * jnp.maximum(1.0, e[-1])) & (
        jnp.abs(along[0]) < small * (1.0 + jnp.abs(e[0]))
    )
    p = jnp.where(stuck, p.at[0].set(radius), p)
    predicted = predicted + jnp.where(stuck, 0.5 * jnp.abs(e[0]) * radius**2, 0.0)
    return _Step(Q @ p, predicted, _promised(along, size), e[0])


class State(NamedTuple):
    """Where Newton's method stands, and the step that it takes next."""

    theta: jax.Array
    value: jax.Array
    gradient: jax.Array
    hessian: jax.Array
    next: _Step
    radius: jax.Array
    n: jax.Array
    close: jax.Array  # the next step is the last
    lost: jax.Array

    @property
    def at(self) -> jax.Array:
        """Where the next evaluation is."""
        return self.theta + self.next.step

    def going(self, max_iter: int = 200) -> jax.Array:
        """Whether to evaluate at ``at``."""
        return ~self.close & ~self.lost & (self.n < max_iter)


def newton(
    derivatives: Derivatives,
    theta0: jax.Array,
    max_iter: int = 200,
    approximate: bool = False,
) -> Optimum:
    """Trust-region Newton with exact derivatives; jit and vmap as you like.

    Stops when the predicted decrease is below the rounding error of the criterion and below
    ``PROMISE``, and takes that last step too: convergence is quadratic, so θ is then exact to about
    its own standard error times that decrease. Where rounding error is the larger of the two
    (float32, or a criterion of 1e8), the gradient alone judges the last steps: they are taken as
    long as the promise falls.

    An approximate Hessian, such as the average information, serves as well: convergence is then
    linear, at a rate that falls with the sample, and says itself how fast: the share of the last
    promise that is left after a step. Where that share of a promise below ``LAST_PROMISE`` is an
    ulp of the criterion, the step is the last.

    Parameters
    ----------
    derivatives : callable
        θ -> criterion, gradient, Hessian.
    theta0 : array, shape (n_theta,)
        Start; never a point with a parameter at 0.
    max_iter : int
        Most evaluations.
    approximate : bool
        Whether the Hessian is an approximation, of which nobody needs the value at the optimum.

    Returns
    -------
    Optimum
    """
    end = jax.lax.while_loop(
        lambda s: s.going(max_iter),
        lambda s: advance(s, *derivatives(s.at), approximate=approximate),
        begin(theta0),
    )
    return stop(end)


def begin(theta0: jax.Array) -> State:
    """The state before the first evaluation."""
    dtype, k = theta0.dtype, theta0.shape[0]
    inf = jnp.asarray(jnp.inf, dtype)
    return State(
        theta0,
        inf,
        jnp.zeros(k, dtype),
        jnp.eye(k, dtype=dtype),
        _Step(jnp.zeros(k, dtype), inf, inf, inf),
        jnp.asarray(1.0, dtype),
        jnp.asarray(0),
        jnp.asarray(False),
        jnp.asarray(False),
    )


def advance(
    s: State,
    value: jax.Array,
    gradient: jax.Array,
    hessian: jax.Array,
    approximate: bool = False,
) -> State:
    """The state after an evaluation at ``s.at``."""
    at, eps = s.at, jnp.finfo(value.dtype).eps
    finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(hessian)) & jnp.all(jnp.isfinite(gradient))
    first = s.n == 0
    # a step up to the minimum, shorter than the criterion can see: the gradient judges it
    blind = s.next.predicted <= BLIND * eps * (1.0 + jnp.abs(s.value))
    blind = blind & (s.next.lowest > 0.0)
    slack = jnp.where(blind, BLIND, 8) * eps * (1.0 + jnp.abs(value))
    ok = finite & (first | (value <= s.value + slack))
    ratio = (s.value - value + slack) / jnp.maximum(s.next.predicted, slack)
    length = jnp.linalg.norm(s.next.step)
    grown = jnp.where((ratio > 0.75) & (length > 0.8 * s.radius), 2.5 * s.radius, s.radius)
    grown = jnp.where((ratio < 0.25) & ~blind, 0.5 * s.radius, grown)
    radius = jnp.where(first, s.radius, jnp.where(ok, grown, 0.25 * length))
    keep = lambda new, old: jnp.where(ok, new, old)  # noqa: E731
    theta, value = keep(at, s.theta), keep(value, s.value)
    gradient, hessian = keep(gradient, s.gradient), keep(hessian, s.hessian)
    step = _step(gradient, hessian, radius)
    rounding = eps * (1.0 + jnp.abs(value))
    close = step.predicted <= jnp.minimum(BLIND * rounding, PROMISE[value.dtype.name])
    if approximate:
        left = step.predicted * (step.predicted / s.next.predicted)
        close = close | (~first & ok & (step.predicted <= LAST_PROMISE) & (left <= rounding))
    stalled = blind & ok & ~close & (step.promised > 0.9 * s.next.promised)
    lost = (~ok & first) | (~close & (radius < 1e-3 * eps)) | stalled
    found = State(theta, value, gradient, hessian, step, radius, s.n + 1, close, lost)
    worse = stalled & (step.promised > s.next.promised)
    old = s._replace(n=found.n, lost=lost)
    return jax.tree.map(lambda a, b: jnp.where(worse, a, b), old, found)


def stop(end: State) -> Optimum:
    """What was found when Newton's method does not go on."""
    status = jnp.where(end.close, CONVERGED, jnp.where(end.lost, FLAT_STOP, MAX_ITERATIONS))
    status = jnp.where(jnp.isinf(end.value), NOT_FINITE, status)
    theta = jnp.where(end.close, end.at, end.theta)
    verdict = (end.n, status, end.next.promised, end.next.lowest)
    return Optimum(theta, end.value, end.gradient, end.hessian, *verdict)


def descend(
    f: Criterion,
    derivatives: Derivatives,
    theta0: jax.Array,
    transform: Any,
    max_iter: int = 5000,
    tol: float = 1e-10,
) -> Optimum:
    """Minimise with an optax transformation until the gradient's squared norm is below ``tol``.

    ``transform`` may be any ``optax.GradientTransformationExtraArgs`` (``optax.lbfgs()``,
    ``optax.adam(0.1)``). First-order methods find fewer digits than Newton and may stop at the
    limit; the result's gradient and Hessian are exact in any case.
    """
    import optax

    transform = optax.with_extra_args_support(transform)
    value_and_grad = optax.value_and_grad_from_state(f)
    plain = jax.value_and_grad(f)
    linesearch = _keeps_value(transform, theta0)

    def evaluate(theta: jax.Array, state: Any) -> tuple[jax.Array, jax.Array]:
        return value_and_grad(theta, state=state) if linesearch else plain(theta)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        theta, state, best, best_value, _, n = carry
        value, gradient = evaluate(theta, state)
        better = value < best_value
        best, best_value = jnp.where(better, theta, best), jnp.where(better, value, best_value)
        updates, state = transform.update(
            gradient, state, theta, value=value, grad=gradient, value_fn=f
        )
        return theta + updates, state, best, best_value, jnp.sum(gradient**2), n + 1

    inf = jnp.asarray(jnp.inf, theta0.dtype)
    carry = (theta0, transform.init(theta0), theta0, inf, inf, jnp.asarray(0))
    going = lambda c: (c[4] > tol) & (c[5] < max_iter)  # noqa: E731
    _, _, best, _, norm2, n = jax.lax.while_loop(going, body, carry)
    value, gradient, hessian = derivatives(best)
    status = jnp.where(norm2 <= tol, CONVERGED, MAX_ITERATIONS)
    status = jnp.where(jnp.isfinite(value), status, NOT_FINITE)
    return Optimum(best, value, gradient, hessian, n, status, *newton_decrement(gradient, hessian))


def _keeps_value(transform: Any, theta0: jax.Array) -> bool:
    """Whether the transformation's state stores value and gradient (a line search does)."""
    import optax

    state = jax.eval_shape(transform.init, theta0)
    return optax.tree.get(state, "grad", None) is not None


@functools.cache
def named_transform(name: str) -> Any:
    """The optax transformation behind a short name: "lbfgs" or "adam"."""
    import optax

    return {"lbfgs": optax.lbfgs, "adam": lambda: optax.adam(0.05)}[name]()

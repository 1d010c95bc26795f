r"""Profile likelihood: one parameter held at a value, all others at their optimum.

An SD, a correlation or σ is held fixed by coordinates rather than by a constraint. With the rows of
a term ordered so that those concerned come first, its triangular factor relative to σ has

    SD v:           L_11 = v / σ,
    correlation r:  L_11 = a², (L_21, L_22) = b² (r, √(1 - r²)),

so that θ = M w + m v e^{-log σ} with a free vector w that contains log σ (and a and b, squared): an
unconstrained problem, smooth up to and at v = 0 and r = ±1. A fixed effect β_j = t adds
(β̂_j - t)² / [(X'V⁻¹X)⁻¹]_jj to r². M, m and the rest are arrays, so one compiled program serves all
parameters of a model, and of all models of its shape. The criterion is that of likelihood.py.

Residual parameters φ join w, and σ is then that of the row it refers to. What is reported of them,
g(φ) on an unbounded scale, is held by a penalty κ(g(φ) - t)²: its optimum is a point of the
profile, at g(φ) and with the criterion there. So limits are sought in t; for a profile at given
values t moves until g(φ) is the value (the method of multipliers). This serves every structure,
whatever g depends on; ends of its range are approached, not evaluated.

The limits are where -2 log L exceeds its minimum by the quantile of χ²(1), walked to from the
estimate in steps and then found by Brent's method: the interval around the estimate, also where the
profile is not monotone further out. Where a boundary is reached first, it is the limit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax import components, optimize
from lmmjax import derivatives as dv
from lmmjax import likelihood as lk
from lmmjax.covariance import Unstructured
from lmmjax.errors import ComparisonError, LmmError
from lmmjax.gram import Gram, Layout, Rhs
from lmmjax.precision import in_float64
from lmmjax.residual.intervals import ends
from lmmjax.residual.source import Source
from lmmjax.threads import one_blas_thread

if TYPE_CHECKING:
    from lmmjax.fit import Fit


#: columns of Z in a dense core from which on a Hessian costs much more than a gradient: it is then
#: made once in a while, and Newton's method runs on an old one
LARGE = 300

#: evaluations of an optimum with an old Hessian after which a new one is made for the next
TOLD = 12

#: κ of a residual parameter times its squared standard error, and targets until its value is met
STIFF, MOST_TARGETS = 1e3, 40

#: Newton steps, and the decrease still promised at which to stop short of convergence
MOST_STEPS, FLAT = 100, 1e-6


class Held(NamedTuple):
    """What is held fixed, as arrays; w = (n_theta + 1 + n_phi,): θ, log σ unless fixed, φ."""

    M: Any  # (n_theta, n_theta + 1)
    squared: Any  # (n_theta + 1,), 1 where w enters as its square: SDs that must not change sign
    constant: Any  # (n_theta,)
    along: Any  # (n_theta,), times exp(-log σ)
    log_sigma: Any  # added to free_sigma * w[-1]
    free_sigma: Any  # 1 or 0
    beta: Any  # (p,) direction of β, zeros if none is held
    value: Any  # of beta'β
    reml: Any  # 1 or 0
    units: Any  # per term (S, S): B⁻¹ P' D
    natural: Any  # (n_phi,), 1 for the residual parameter that is held
    ends: Any  # (2,), of its range
    target: Any  # t
    penalty: Any  # κ, 0 where no residual parameter is held


Products = tuple[Gram, Rhs] | Source


def unbounded(value: Any, ends: Any) -> jax.Array:
    """logit on a finite range, log above a finite end, else the value itself."""
    low, high = jnp.asarray(ends)
    above = jnp.maximum(jnp.where(jnp.isfinite(low), value - low, 1.0), 1e-300)
    below = jnp.maximum(jnp.where(jnp.isfinite(high), high - value, 1.0), 1e-300)
    return jnp.where(jnp.isfinite(low), jnp.log(above) - jnp.log(below), value)


def criterion(layout: Layout, w: jax.Array, held: Held, products: Products) -> jax.Array:
    """-2 log-likelihood in standardised units at free parameters w, with the penalty."""
    w, phi = jnp.split(w, [layout.n_theta + 1])
    log_sigma = held.log_sigma + held.free_sigma * w[-1]
    excess = jnp.zeros((), w.dtype)
    if isinstance(products, tuple):
        gram, rhs = products
    else:
        structure = products.structure
        log_sigma = log_sigma - jnp.log(structure.variances.reference(phi[structure.n_corr :]))
        gram, rhs = products.gram(phi)
        g = unbounded(held.natural @ structure.natural(phi), held.ends)
        excess = held.penalty * (g - held.target) ** 2
    entering = jnp.where(held.squared > 0, w**2, w)
    theta = held.M @ entering + held.constant + held.along * jnp.exp(-log_sigma)
    s2 = jnp.exp(2 * log_sigma)
    reduce = dv.reduce if layout.d > LARGE else lk.reduce
    red = reduce(layout, theta, gram, rhs, held.units)
    both = [lk.deviance(red, method, s2) for method in ("ML", "REML")]
    value = both[0] + held.reml * (both[1] - both[0]) + excess
    if red.p == 0:
        return value
    half = jax.scipy.linalg.solve_triangular(red.L_X, held.beta, lower=True)
    room = half @ half
    distance = held.beta @ lk.fixef(red) - held.value
    return value + jnp.where(room > 0, distance**2 / jnp.where(room > 0, room, 1.0), 0.0) / s2


@functools.partial(jax.jit, static_argnums=0)
def minimise(
    layout: Layout, w: jax.Array, held: Held, products: Products
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Optimum over w: its place, its value and its status.

    On a plateau, where a parameter runs off to infinity, the last gains are small and many: what is
    promised to be within :data:`FLAT` of the optimum is one.
    """

    def slope(w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        value, gradient = jax.value_and_grad(criterion, argnums=1)(layout, w, held, products)
        return gradient, (value, gradient)

    def vgh(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        hessian, (value, gradient) = jax.jacfwd(slope, has_aux=True)(w)
        return value, gradient, hessian

    return _judged(optimize.newton(vgh, w, max_iter=MOST_STEPS))[:3]


@functools.partial(jax.jit, static_argnums=0)
def minimise_by(
    layout: Layout, w: jax.Array, hessian: jax.Array, held: Held, products: Products
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """:func:`minimise` with a given Hessian, and the number of evaluations: linear convergence."""

    def vgh(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        value, gradient = jax.value_and_grad(criterion, argnums=1)(layout, w, held, products)
        return value, gradient, hessian

    return _judged(optimize.newton(vgh, w, max_iter=MOST_STEPS))


@functools.partial(jax.jit, static_argnums=0)
def curvature(layout: Layout, w: jax.Array, held: Held, products: Products) -> jax.Array:
    """Hessian of :func:`criterion`, one column at a time: memory of one gradient."""
    gradient = jax.grad(criterion, argnums=1)
    column = lambda e: jax.jvp(lambda x: gradient(layout, x, held, products), (w,), (e,))[1]  # noqa: E731
    return jax.lax.map(column, jnp.eye(len(w), dtype=w.dtype))


def _judged(best: optimize.Optimum) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Place, value, status with plateaus counted as found, and the evaluations."""
    e, Q = jnp.linalg.eigh(best.hessian)
    promised = 0.5 * jnp.sum((Q.T @ best.gradient) ** 2 / jnp.maximum(jnp.abs(e), 1e-12))
    flat = (best.status == optimize.MAX_ITERATIONS) & (promised < FLAT)
    status = jnp.where(flat, optimize.CONVERGED, best.status)
    return best.theta, best.value, status, best.n_evals


# -------------------------------------------------------------------------------------------------
# Parameters of a model
# -------------------------------------------------------------------------------------------------


class Parameter(NamedTuple):
    """One profiled parameter: where it may lie, and what holds it at a value."""

    name: str
    estimate: float
    low: float  # ends of its range
    high: float
    step: float  # a first step away from the estimate, of residual parameters on `scale`
    hold: Callable[[float], Held]
    start: Callable[[], np.ndarray]
    sds: tuple[str, ...] = ()  # of a correlation: the SDs without which it has no meaning
    reported: Callable[[np.ndarray], float] | None = None  # of a residual parameter: g(w)

    def scale(self, value: float) -> float:
        """A residual parameter on its unbounded scale."""
        return float(unbounded(value, (self.low, self.high)))

    def is_end(self, value: float, end: float) -> bool:
        """Whether a residual parameter has come so near to an end that it is the limit."""
        if np.isinf(end):
            return abs(value) > 1e5 * abs(self.estimate)
        return abs(value - end) < 1e-5 * abs(self.estimate - end)


class Profiler:
    """The profile likelihoods of one fit, by one criterion.

    Parameters
    ----------
    fit : Fit
        The optimum of ``fit.method``, which is the criterion.
    """

    def __init__(self, fit: Fit) -> None:
        _check(fit)
        self.fit = fit
        self.layout = fit.model._plan.layout
        self.scale = fit.model._units.scale
        self.constant = fit.model._units.constant(fit.method)
        self._hessians: dict[str, Any] = {}  # of each parameter's last optimum, large cores
        self._ends = np.cumsum([0, *(s.n_theta for s in self.layout.structures)])

    def deviance(self, parameter: Parameter, value: float, w: np.ndarray) -> tuple[float, Any]:
        """Profiled -2 log-likelihood at ``value``, and where it was found, from the start ``w``."""
        if parameter.reported is None:
            return self.pull(parameter, value, w)
        wanted = target = parameter.scale(value)
        for _ in range(MOST_TARGETS):
            found, place = self.pull(parameter, target, w)
            miss = wanted - parameter.scale(parameter.reported(place))
            if abs(miss) <= 1e-8 * parameter.step:
                return found, place
            target, w = target + miss, place
        raise ComparisonError(
            f"{parameter.name} could not be held at {value:.6g}; expected a value that the "
            "structure can take. Use method='wald'."
        )

    def pull(self, parameter: Parameter, target: float, w: np.ndarray) -> tuple[float, Any]:
        """The point of the profile at ``target``; of a residual parameter, somewhere before it."""
        held = parameter.hold(target)
        arrays, model = jax.tree.map(lambda a: np.asarray(a, float), held), self.fit.model
        products = model._prepared[2] if model.is_structured else model._on_device
        place, found, status = self._minimise(parameter.name, w, arrays, products)
        if status in (optimize.MAX_ITERATIONS, optimize.NOT_FINITE):
            raise ComparisonError(
                f"the profile of {parameter.name} at {target:.6g}: "
                f"{optimize.STATUS[int(status)]}; expected an optimum. Use method='bootstrap' or "
                "'wald'."
            )
        value = float(found) + self.constant
        if parameter.reported is not None:
            miss = parameter.scale(parameter.reported(place)) - target
            value -= float(held.penalty) * miss**2
        return value, place

    def _minimise(self, name: str, w: Any, held: Held, products: Products) -> tuple[Any, Any, Any]:
        layout = self.layout
        if layout.d <= LARGE:
            return jax.device_get(minimise(layout, w, held, products))
        hessian = self._hessians.get(name)
        if hessian is None:
            hessian = curvature(layout, w, held, products)
        *found, evaluations = jax.device_get(minimise_by(layout, w, hessian, held, products))
        self._hessians[name] = hessian if evaluations <= TOLD else None
        return tuple(found)

    # -- variance parameters ----------------------------------------------------------------------

    def component(self, name: str) -> Parameter:
        """The SD, correlation, σ or residual parameter of that name."""
        if name == "sigma":
            return self._sigma()
        if name in self.fit.model.phi_names:
            return self._residual(name)
        terms = self.fit.model.design.terms
        for k, term in enumerate(terms):
            for i, j in components.places(len(term.names), term.cov):
                if components.names([term])[_position(term, i, j)] == name:
                    return self._sd(k, i, name) if i == j else self._cor(k, i, j, name)
        raise LmmError(f"{name!r} is not a variance parameter of {self.fit.model.formula}.")

    def _sigma(self) -> Parameter:
        fit = self.fit
        held = self._held(None, ())
        n = fit.n_obs

        def hold(value: float) -> Held:
            return held._replace(log_sigma=np.log(value / self.scale), free_sigma=0.0)

        return Parameter(
            "sigma",
            fit.sigma,
            0.0,
            np.inf,
            0.5 * fit.sigma / np.sqrt(n),
            hold,
            lambda: self._start(None, ()),
        )

    def _sd(self, k: int, i: int, name: str) -> Parameter:
        fit, cov = self.fit, self.fit._term_covs()[k]
        sd = float(np.sqrt(max(cov[i, i], 0.0)))
        held = self._held(k, (i,))
        entry = self._ends[k] + self._diagonal(k, i)
        M = held.M.copy()
        M[:, entry] = 0.0
        M[entry] = 0.0
        e = np.zeros(self.layout.n_theta)
        e[entry] = 1.0 / (self._unit(k)[i] * self.scale)

        def hold(value: float) -> Held:
            return held._replace(M=M, along=e * value)

        size = fit.sigma * self._unit(k)[i]
        step = 0.2 * max(sd, size / np.sqrt(len(fit.model.design.terms[k].levels)))
        return Parameter(name, sd, 0.0, np.inf, step, hold, lambda: self._start(k, (i,)))

    def _cor(self, k: int, i: int, j: int, name: str) -> Parameter:
        term, cov = self.fit.model.design.terms[k], self.fit._term_covs()[k]
        size = float(np.sqrt(cov[i, i] * cov[j, j]))
        r = float(np.clip(cov[i, j] / size, -1.0, 1.0)) if size > 0 else 0.0
        held = self._held(k, (j, i))
        structure = self.layout.structures[k]
        at = int(self._ends[k])
        S = structure.S
        low = -1.0 if isinstance(structure, Unstructured) else -1.0 / (S - 1)
        squared = self._squared(k)

        def hold(value: float) -> Held:
            M, constant = held.M.copy(), held.constant.copy()
            if isinstance(structure, Unstructured):
                # column-major triangle: L_21 is second, L_22 follows the first column
                M[at + 1] = 0.0
                M[:, at + 1] = 0.0
                M[at + 1, at + S] = value
                M[at + S, at + S] = np.sqrt(max(1.0 - value**2, 0.0))
            else:
                last = int(self._ends[k + 1]) - 1
                M[last] = 0.0
                sine = np.sqrt(np.clip((1.0 - value) * (S - 1) / S, 0.0, 1.0))
                constant[last] = np.arcsin(sine)
            return held._replace(M=M, constant=constant, squared=squared)

        step = 0.5 / np.sqrt(len(term.levels))
        sds = tuple(f"sd_{term.names[x]}|{term.group}" for x in (i, j))
        return Parameter(name, r, low, 1.0, step, hold, lambda: self._start(k, (j, i), r), sds)

    def _residual(self, name: str) -> Parameter:
        residual, span = self.fit.model.design.residual, ends(self.fit, name)
        assert residual is not None
        structure, k = residual.structure, self.layout.n_theta + 1
        row = self.fit.residual_intervals().loc[name]
        value, se = float(row["estimate"]), float(row["std_error"])
        slope = float(jax.grad(unbounded)(value, np.array(span)))
        step = slope * se if np.isfinite(se) and se > 0 else 1.0
        natural = np.array(structure.names) == name
        held = self._held(None, ())._replace(natural=natural, ends=span, penalty=STIFF / step**2)

        @in_float64
        def reported(w: np.ndarray) -> float:
            return float(np.asarray(structure.natural(jnp.asarray(w[k:])))[natural][0])

        def hold(target: float) -> Held:
            return held._replace(target=target)

        start = lambda: self._start(None, ())  # noqa: E731
        return Parameter(name, value, *span, 0.5 * step, hold, start, (), reported)

    # -- fixed effects ----------------------------------------------------------------------------

    def coefficient(self, j: int) -> Parameter:
        """Fixed effect number ``j``; the criterion must be ML."""
        fit, units = self.fit, self.fit.model._units
        held = self._held(None, ())

        def hold(value: float) -> Held:
            return held._replace(beta=units.A[j], value=(value - units.beta0[j]) / self.scale)

        name, se = fit.model.design.x_names[j], float(fit.std_errors[j])
        return Parameter(
            name, float(fit._beta[j]), -np.inf, np.inf, se, hold, lambda: self._start(None, ())
        )

    # -- coordinates ------------------------------------------------------------------------------

    def _unit(self, k: int) -> np.ndarray:
        return np.abs(np.diag(self.fit.model._units.B[k]))

    def _order(self, k: int, first: tuple[int, ...]) -> list[int]:
        S = self.layout.structures[k].S
        if not isinstance(self.layout.structures[k], Unstructured):
            return list(range(S))
        return [*first, *(s for s in range(S) if s not in first)]

    def _diagonal(self, k: int, i: int) -> int:
        """Place in the term's θ of the number that is its SD i over σ."""
        structure = self.layout.structures[k]
        if isinstance(structure, Unstructured):
            return 0
        return min(i, structure.n_theta - 1) if structure.scales else 0

    def _held(self, k: int | None, first: tuple[int, ...]) -> Held:
        n, units = self.layout.n_theta, []
        for m, B in enumerate(self.fit.model._units.B):
            order = self._order(m, first if m == k else ())
            D = np.eye(len(B))[order].T * self._unit(m)[order]
            units.append(np.linalg.solve(B, D))
        p = len(self.fit._beta)
        reml = float(self.fit.method == "REML")
        M = np.eye(n, n + 1)
        return Held(
            *(M, np.zeros(n + 1), np.zeros(n), np.zeros(n), 0.0, 1.0, np.zeros(p), 0.0, reml),
            *(units, np.zeros(len(self.fit.phi)), np.array([-np.inf, np.inf]), 0.0, 0.0),
        )

    def _start(self, k: int | None, first: tuple[int, ...], r: float | None = None) -> np.ndarray:
        """w near the optimum, with no component at 0, where the gradient would vanish."""
        fit, pieces = self.fit, []
        lams = [fit._residual_sd * lam for lam in fit.model._factors(fit.theta)]
        for m, (lam, s) in enumerate(zip(lams, self.layout.structures, strict=True)):
            order = self._order(m, first if m == k else ())
            theta = s.from_factor((lam / self._unit(m)[:, None])[order])
            pieces.append(_away(theta, s))
            if m == k and r is not None and isinstance(s, Unstructured):
                # the coordinate of L_22 is now the second SD
                pieces[-1][s.S] = np.hypot(theta[1], pieces[-1][s.S])
        w = np.concatenate([*pieces, [np.log(fit.sigma / self.scale)]])
        if r is not None and k is not None:
            w = np.where(self._squared(k) > 0, np.sqrt(abs(w)), w)
        return np.concatenate([w, fit.phi])

    def _squared(self, k: int) -> np.ndarray:
        """Where w enters as a square while a correlation of term ``k`` is held."""
        S, at = self.layout.structures[k].S, int(self._ends[k])
        us = isinstance(self.layout.structures[k], Unstructured)
        out = np.zeros(self.layout.n_theta + 1)
        out[[at, at + S] if us else slice(at, int(self._ends[k + 1]) - 1)] = 1.0
        return out


def _position(term: Any, i: int, j: int) -> int:
    return components.places(len(term.names), term.cov).index((i, j))


def _away(theta: np.ndarray, structure: Any) -> np.ndarray:
    """θ with its diagonal not nearer to 0 than a small number: never start on a symmetry."""
    moved = np.abs(structure.from_factor(2.0 * np.eye(structure.S)) - structure.start()) > 0
    return np.where(moved & (np.abs(theta) < 0.05), 0.05, theta)


def _check(fit: Fit) -> None:
    if not fit.converged:
        raise ComparisonError(
            f"the fit did not converge; expected an optimum to profile from. {fit.message}"
        )


# -------------------------------------------------------------------------------------------------
# Limits
# -------------------------------------------------------------------------------------------------


@in_float64
def limits(profiler: Profiler, parameter: Parameter, level: float) -> tuple[float, float]:
    """Where the profile crosses the quantile, or the ends of the parameter's range.

    A correlation is arbitrary where an SD of its own is 0: if such a model is within the quantile,
    so is every correlation.
    """
    from scipy import stats

    top = profiler.fit.deviance + float(stats.chi2.ppf(level, 1))
    for name in parameter.sds:
        sd = profiler.component(name)
        if profiler.deviance(sd, 0.0, sd.start())[0] <= top:
            return parameter.low, parameter.high
    with one_blas_thread():  # thousands of small factorisations: threads only get in their way
        find = _limit if parameter.reported is None else _limit_of_reported
        low, high = (find(profiler, parameter, top, sign) for sign in (-1.0, 1.0))
    return low, high


def _limit(profiler: Profiler, parameter: Parameter, top: float, sign: float) -> float:
    """Walk until the profile is above ``top``, then find the crossing between the last two points.

    Every optimum is sought from the last one below ``top``: far outside there are others, in which
    an SD is 0.
    """
    from scipy.optimize import brentq

    end = parameter.low if sign < 0 else parameter.high
    start = parameter.start()
    inside, warm, step = parameter.estimate, start, parameter.step

    def excess(value: float) -> float:
        nonlocal warm
        found, place = profiler.deviance(parameter, value, _restart(warm, start))
        warm = place if found < top else warm
        return found - top

    if inside == end:
        return end
    for _ in range(60):
        value = inside + sign * step
        at_end = value <= end if sign < 0 else value >= end
        if at_end and parameter.name == "sigma":
            value, at_end = 0.5 * inside, False  # never 0: the criterion has no value there
        value = end if at_end else value
        if excess(value) > 0:
            scale = max(abs(inside), abs(value))
            return float(brentq(excess, inside, value, xtol=1e-9 * scale, rtol=1e-10))
        if at_end:
            return end
        inside, step = value, 1.6 * step
    raise _unbounded(parameter, inside)


def _limit_of_reported(profiler: Profiler, parameter: Parameter, top: float, sign: float) -> float:
    """The same for a residual parameter, sought in targets: each gives one point of the profile."""
    from scipy.optimize import brentq

    reported, end = parameter.reported, parameter.low if sign < 0 else parameter.high
    assert reported is not None
    place = warm = parameter.start()

    def excess(target: float) -> float:
        nonlocal place, warm
        found, place = profiler.pull(parameter, target, warm)
        warm = place if found < top else warm
        return found - top

    inside, step = parameter.scale(parameter.estimate), parameter.step
    for _ in range(60):
        target = inside + sign * step
        if excess(target) > 0:
            scale = max(abs(inside), abs(target))
            excess(float(brentq(excess, inside, target, xtol=1e-10 * scale, rtol=1e-12)))
            return reported(place)
        if parameter.is_end(reported(place), end):
            return end
        inside, step = target, 1.6 * step
    raise _unbounded(parameter, reported(place))


def _unbounded(parameter: Parameter, reached: float) -> ComparisonError:
    return ComparisonError(
        f"the profile of {parameter.name} stays below its limit up to {reached:.6g}; expected a "
        "crossing. The data do not bound it: use method='wald' or simplify the model."
    )


def _restart(warm: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The last optimum, moved off exact symmetries towards the estimate."""
    return np.where(np.abs(warm) < 1e-3, 0.9 * warm + 0.1 * start, warm)


@in_float64
def curve(
    profiler: Profiler, parameter: Parameter, level: float, points: int
) -> tuple[np.ndarray, np.ndarray]:
    """Values across the interval of that level, and ζ = sign(v - v̂) √(excess of -2 log L)."""
    values = np.linspace(*limits(profiler, parameter, level), points)
    start, excess = parameter.start(), np.empty(points)
    below = values < parameter.estimate
    for side in (np.flatnonzero(below)[::-1], np.flatnonzero(~below)):
        warm = start
        for i in side:
            found, warm = profiler.deviance(parameter, values[i], _restart(warm, start))
            excess[i] = found - profiler.fit.deviance
    zeta = np.sqrt(np.maximum(excess, 0.0))
    return values, np.where(below, -zeta, zeta)

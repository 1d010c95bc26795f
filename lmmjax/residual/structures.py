r"""Correlation of the residuals of one subject: free parameters φ -> correlation matrix.

Every family is one class with the same few questions: how many parameters, where to start, the
correlation of rows at given positions (in JAX, differentiable everywhere), the parameters as the
field reports them, and their names. All parametrisations are unconstrained; stationarity and
positive definiteness hold by construction. ``route`` says how rows are whitened (source.py):

    "chain"   rows by time are a Markov chain: ``links`` has the correlation of neighbours
    "mean"    compound symmetry: the subject's mean is all that is shared
    "dense"   a Cholesky factor per distinct set of positions
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

Array = Any


@dataclass(frozen=True)
class Family(abc.ABC):
    """A correlation structure; positions are (T, dim) arrays."""

    route = "dense"

    @property
    @abc.abstractmethod
    def n_phi(self) -> int:
        """Number of free parameters."""

    @abc.abstractmethod
    def start(self) -> np.ndarray:
        """Where the optimiser begins: moderate positive correlation."""

    @abc.abstractmethod
    def matrix(self, phi: Array, pos: Array) -> Array:
        """Correlation of rows at the positions ``pos``, (T, T)."""

    @abc.abstractmethod
    def natural(self, phi: Array) -> Array:
        """The parameters as reported, in the order of :meth:`names`."""

    @abc.abstractmethod
    def names(self) -> list[str]:
        """Names of the reported parameters."""

    def start_near(self, corr: np.ndarray) -> np.ndarray:
        """Where to begin given rough correlations of the places of a grid, (U, U)."""
        return self.start()

    def links(self, phi: Array, before: Array, pos: Array) -> Array:
        """Correlation of rows at ``pos`` with the row before them, at ``before`` (chain only)."""
        raise NotImplementedError(f"{type(self).__name__} is no Markov chain.")


def _distance(pos: Array) -> Array:
    """Euclidean distances (T, T); the diagonal is exactly 0 and has a zero derivative."""
    d2 = jnp.sum((pos[:, None] - pos[None]) ** 2, axis=-1)
    return jnp.where(d2 > 0, jnp.sqrt(jnp.where(d2 > 0, d2, 1.0)), 0.0)


def _lags(pos: Array) -> Array:
    return jnp.abs(pos[:, None, 0] - pos[None, :, 0]).astype(int)


def integer_power(base: Array, exponent: Array, largest: int) -> Array:
    """base ** exponent for whole exponents up to ``largest``, of either sign of the base.

    By repeated squaring: exact derivatives at base = 0, where those of ``jnp.power`` are NaN.
    """
    out = jnp.ones(jnp.shape(exponent), jnp.result_type(base))
    for bit in range(max(1, int(largest).bit_length())):
        out = jnp.where((exponent >> bit) & 1 == 1, out * base, out)
        base = base * base
    return out


def autocorrelations(partial: Array) -> tuple[Array, Array]:
    """Durbin-Levinson: partial autocorrelations -> autocorrelations 0 ... k, AR coefficients.

    Any numbers in (-1, 1) give a positive definite sequence and a stationary polynomial
    (Barndorff-Nielsen and Schou 1973, J. Multivariate Anal. 3).
    """
    rho = [jnp.ones((), partial.dtype)]
    coef = jnp.zeros(0, partial.dtype)
    left = jnp.ones((), partial.dtype)
    for k in range(partial.shape[0]):
        earlier = jnp.stack(rho[1:][::-1]) if k else coef
        rho.append(partial[k] * left + coef @ earlier)
        coef = jnp.append(coef - partial[k] * coef[::-1], partial[k])
        left = left * (1 - partial[k] ** 2)
    return jnp.stack(rho), coef


@final
@dataclass(frozen=True)
class CompoundSymmetry(Family):
    """One correlation ρ in (-1/(T-1), 1), T the largest subject."""

    T: int
    route = "mean"

    @property
    def n_phi(self) -> int:
        return 1

    @property
    def _lowest(self) -> float:
        return -1.0 / (self.T - 1)

    def start(self) -> np.ndarray:
        share = (0.2 - self._lowest) / (1 - self._lowest)
        return np.array([math.log(share / (1 - share))])

    def natural(self, phi: Array) -> Array:
        return self._lowest + (1 - self._lowest) * jax.nn.sigmoid(phi)

    def matrix(self, phi: Array, pos: Array) -> Array:
        rho, T = self.natural(phi)[0], pos.shape[0]
        return jnp.where(jnp.eye(T, dtype=bool), 1.0, rho)

    def names(self) -> list[str]:
        return ["rho"]


@final
@dataclass(frozen=True)
class Autoregressive(Family):
    """AR(1) at whole-numbered times: φ^lag, -1 < φ < 1."""

    largest: int  # largest lag
    route = "chain"

    @property
    def n_phi(self) -> int:
        return 1

    def start(self) -> np.ndarray:
        return np.array([0.3])

    def natural(self, phi: Array) -> Array:
        return jnp.tanh(phi)

    def matrix(self, phi: Array, pos: Array) -> Array:
        return integer_power(self.natural(phi)[0], _lags(pos), self.largest)

    def links(self, phi: Array, before: Array, pos: Array) -> Array:
        lag = jnp.abs(pos[..., 0] - before[..., 0]).astype(int)
        return integer_power(self.natural(phi)[0], lag, self.largest)

    def names(self) -> list[str]:
        return ["phi"]


@final
@dataclass(frozen=True)
class Spatial(Family):
    """Decay with distance: exp(-d/range), exp(-(d/range)²) or ρ^d, with or without a nugget.

    The free parameter is the log of ``scale``/range, ``scale`` a typical distance. With a nugget ν
    all correlations of different rows are multiplied by 1 - ν. ``kind="time"`` is the
    continuous-time AR(1): ρ^d in one dimension, reported as phi.
    """

    kind: str  # exp, gau, pow, time
    scale: float
    dim: int
    nugget: bool = False

    @property
    def route(self) -> str:  # type: ignore[override]
        return "chain" if self.dim == 1 and self.kind != "gau" and not self.nugget else "dense"

    @property
    def n_phi(self) -> int:
        return 1 + self.nugget

    def start(self) -> np.ndarray:
        return np.array([0.0, -2.0][: self.n_phi])

    def natural(self, phi: Array) -> Array:
        rate = jnp.exp(phi[0]) / self.scale
        first = jnp.exp(-rate) if self.kind in ("pow", "time") else 1.0 / rate
        return jnp.stack([first, *([jax.nn.sigmoid(phi[1])] if self.nugget else [])])

    def _decay(self, phi: Array, d: Array) -> Array:
        u = d * (jnp.exp(phi[0]) / self.scale)
        return jnp.exp(-(u**2) if self.kind == "gau" else -u)

    def matrix(self, phi: Array, pos: Array) -> Array:
        decay = self._decay(phi, _distance(pos))
        if self.nugget:
            decay = decay * jax.nn.sigmoid(-phi[1])
        return jnp.where(jnp.eye(pos.shape[0], dtype=bool), 1.0, decay)

    def links(self, phi: Array, before: Array, pos: Array) -> Array:
        return self._decay(phi, jnp.abs(pos[..., 0] - before[..., 0]))

    def names(self) -> list[str]:
        first = {"pow": "rho", "time": "phi"}.get(self.kind, "range")
        return [first, *(["nugget"] if self.nugget else [])]


@final
@dataclass(frozen=True)
class ARMA(Family):
    """ARMA(p, q), stationary and invertible; MA polynomial 1 + θ₁B + ... (as R and nlme)."""

    p: int
    q: int
    largest: int

    @property
    def n_phi(self) -> int:
        return self.p + self.q

    def start(self) -> np.ndarray:
        first = [0.4, *[0.0] * self.p][: self.p]
        return np.array([*first, *[0.1, *[0.0] * self.q][: self.q]])

    def natural(self, phi: Array) -> Array:
        _, ar = autocorrelations(jnp.tanh(phi[: self.p]))
        _, ma = autocorrelations(-jnp.tanh(phi[self.p :]))
        return jnp.concatenate([ar, -ma])

    def _sequence(self, phi: Array) -> Array:
        """Autocorrelations 0 ... largest (Brockwell and Davis 1991, eqs 3.3.8 and 3.3.9)."""
        both = self.natural(phi)
        ar, ma = both[: self.p], jnp.concatenate([jnp.ones(1, both.dtype), both[self.p :]])
        m = max(self.p, self.q) + 1
        psi = [jnp.ones((), both.dtype)]
        for j in range(1, self.q + 1):
            psi.append(ma[j] + sum(ar[i] * psi[j - 1 - i] for i in range(min(self.p, j))))
        zero = jnp.zeros((), both.dtype)
        right = [sum((ma[j] * psi[j - k] for j in range(k, self.q + 1)), zero) for k in range(m)]
        A = jnp.eye(m, dtype=both.dtype)
        for k in range(m):
            for i in range(self.p):
                A = A.at[k, abs(k - 1 - i)].add(-ar[i])
        gamma = jnp.linalg.solve(A, jnp.stack(right))
        if self.largest < m:
            return gamma[: self.largest + 1] / gamma[0]

        def onwards(last: Array, _: None) -> tuple[Array, Array]:
            new = ar @ last[: self.p]
            return jnp.concatenate([new[None], last[:-1]]), new

        _, more = jax.lax.scan(onwards, gamma[::-1], None, length=self.largest + 1 - m)
        return jnp.concatenate([gamma, more]) / gamma[0]

    def matrix(self, phi: Array, pos: Array) -> Array:
        return self._sequence(phi)[_lags(pos)]

    def names(self) -> list[str]:
        ar = [f"phi{k + 1}" for k in range(self.p)]
        return [*ar, *(f"theta{k + 1}" for k in range(self.q))]


@final
@dataclass(frozen=True)
class Toeplitz(Family):
    """One correlation per lag, positions 0 ... T-1."""

    T: int

    @property
    def n_phi(self) -> int:
        return self.T - 1

    def start(self) -> np.ndarray:
        return np.array([0.3, *[0.0] * self.T][: self.n_phi])

    def natural(self, phi: Array) -> Array:
        return autocorrelations(jnp.tanh(phi))[0][1:]

    def matrix(self, phi: Array, pos: Array) -> Array:
        return autocorrelations(jnp.tanh(phi))[0][_lags(pos)]

    def names(self) -> list[str]:
        return [f"rho{k}" for k in range(1, self.T)]


@final
@dataclass(frozen=True)
class Antedependence(Family):
    """Order 1: a correlation per pair of neighbouring positions, products between others."""

    labels: tuple[str, ...]
    route = "chain"

    @property
    def n_phi(self) -> int:
        return len(self.labels) - 1

    def start(self) -> np.ndarray:
        return np.full(self.n_phi, 0.3)

    def natural(self, phi: Array) -> Array:
        return jnp.tanh(phi)

    def _table(self, phi: Array) -> Array:
        """Correlation of any two positions, (T, T)."""
        rho, T = self.natural(phi), len(self.labels)
        rows = [jnp.zeros(T, phi.dtype).at[0].set(1.0)]
        for t in range(1, T):
            rows.append((rows[-1] * rho[t - 1]).at[t].set(1.0))
        lower = jnp.stack(rows)
        return lower + jnp.tril(lower, -1).T

    def matrix(self, phi: Array, pos: Array) -> Array:
        at = pos[:, 0].astype(int)
        return self._table(phi)[at[:, None], at]

    def links(self, phi: Array, before: Array, pos: Array) -> Array:
        return self._table(phi)[before[..., 0].astype(int), pos[..., 0].astype(int)]

    def names(self) -> list[str]:
        pairs = zip(self.labels[:-1], self.labels[1:], strict=True)
        return [f"rho[{a},{b}]" for a, b in pairs]


@final
@dataclass(frozen=True)
class Unstructured(Family):
    """Any correlation matrix: rows of a unit-diagonal triangular factor scaled to length 1."""

    labels: tuple[str, ...]

    @property
    def n_phi(self) -> int:
        T = len(self.labels)
        return T * (T - 1) // 2

    def start(self) -> np.ndarray:
        return np.full(self.n_phi, 0.1)

    def start_near(self, corr: np.ndarray) -> np.ndarray:
        T = len(self.labels)
        if len(corr) != T:
            return self.start()
        L = np.linalg.cholesky(corr)
        return (L / np.diag(L)[:, None])[np.tril_indices(T, -1)]

    def table(self, phi: Array) -> Array:
        T = len(self.labels)
        below = np.tril_indices(T, -1)
        L = jnp.eye(T, dtype=phi.dtype).at[below].set(phi)
        L = L / jnp.sqrt(jnp.sum(L**2, axis=1, keepdims=True))
        return jnp.where(jnp.eye(T, dtype=bool), 1.0, L @ L.T)

    def natural(self, phi: Array) -> Array:
        columns, rows = np.triu_indices(len(self.labels), 1)
        return self.table(phi)[rows, columns]

    def matrix(self, phi: Array, pos: Array) -> Array:
        at = pos[:, 0].astype(int)
        return self.table(phi)[at[:, None], at]

    def names(self) -> list[str]:
        columns, rows = np.triu_indices(len(self.labels), 1)
        return [
            f"rho[{self.labels[a]},{self.labels[b]}]" for a, b in zip(columns, rows, strict=True)
        ]


# -------------------------------------------------------------------------------------------------
# Variances
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variances:
    """log S = h₀ + Hφ: SD ratios by level, powers and exponentials of a covariate.

    ``names``, ``kinds`` and ``scales`` have one entry per parameter: "ratio" is reported as exp(φ),
    "delta" as φ / scale; ``shifts`` is log S of the row that σ refers to, per unit of φ.
    """

    names: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    shifts: tuple[float, ...] = ()

    @property
    def n_phi(self) -> int:
        return len(self.names)

    def natural(self, phi: Array) -> Array:
        ratio = np.array([k == "ratio" for k in self.kinds], bool)
        return jnp.where(ratio, jnp.exp(phi), phi / np.array(self.scales, float))

    def reference(self, phi: Array) -> Array:
        """S of the row that σ refers to: the first level or position, |x| = 1, x = 0."""
        return jnp.exp(jnp.sum(phi * np.array(self.shifts, float)))


@dataclass(frozen=True)
class Structure:
    """Correlation and variances together: φ = (correlation, variances). Static and hashable."""

    family: Family | None
    variances: Variances

    @property
    def n_corr(self) -> int:
        return 0 if self.family is None else self.family.n_phi

    @property
    def n_phi(self) -> int:
        return self.n_corr + self.variances.n_phi

    @property
    def names(self) -> list[str]:
        return [*([] if self.family is None else self.family.names()), *self.variances.names]

    def start(self) -> np.ndarray:
        first = np.zeros(0) if self.family is None else self.family.start()
        return np.concatenate([first, np.zeros(self.variances.n_phi)])

    def natural(self, phi: Array) -> Array:
        """Parameters as reported, in the order of ``names``."""
        phi = jnp.asarray(phi)
        parts = [self.variances.natural(phi[self.n_corr :])]
        if self.family is not None:
            parts.insert(0, self.family.natural(phi[: self.n_corr]))
        return jnp.concatenate(parts)

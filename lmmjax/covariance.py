r"""Covariance of one random-effects term: free parameters θ -> factor Λ, D = σ² Λ Λ'.

Every structure is one class with the same few questions: how many parameters, where to start, the
factor (in JAX, differentiable everywhere), the parameters that give a wanted factor (in NumPy) and
their names. All parametrisations are unconstrained and *even* in the parameters that may vanish,
so a variance of zero, or a correlation of one, is an interior point at which the gradient in that
parameter is zero: boundary fits are ordinary optima, found by an unconstrained optimiser.
"""

from __future__ import annotations

import abc
import functools
import math
from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax.errors import FormulaError

Array = Any


def _linear(theta: Array, basis: np.ndarray) -> Array:
    """Σ θ_k basis_k as a product with a constant: cheap to compile, and the same in NumPy."""
    n, S, _ = basis.shape
    return (theta @ basis.reshape(n, S * S).astype(theta.dtype, copy=False)).reshape(S, S)


@functools.cache
def _lower_triangle(S: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the lower triangle, column by column."""
    columns, rows = np.triu_indices(S)
    return rows, columns


@functools.cache
def _diagonal_places(S: int) -> np.ndarray:
    """Places of the diagonal in the lower triangle, column by column."""
    return np.flatnonzero(np.equal(*_lower_triangle(S)))


@functools.cache
def _triangular_basis(S: int) -> np.ndarray:
    """One matrix per entry of the lower triangle, (S (S + 1) / 2, S, S)."""
    rows, columns = _lower_triangle(S)
    basis = np.zeros((len(rows), S, S))
    basis[np.arange(len(rows)), rows, columns] = 1.0
    return basis


@dataclass(frozen=True)
class Covariance(abc.ABC):
    """A structure for the S x S covariance of the effects of one level, relative to σ²."""

    S: int

    #: whether the columns of the term may be shifted (mixed) or each be scaled on its own
    mixes = False
    scales = True

    @property
    @abc.abstractmethod
    def n_theta(self) -> int:
        """Number of free parameters."""

    @abc.abstractmethod
    def factor(self, theta: Array) -> Array:
        """Λ, shape (S, S), with D / σ² = Λ Λ'; NumPy in, NumPy out, and the same for JAX."""

    @abc.abstractmethod
    def from_factor(self, lam: np.ndarray) -> np.ndarray:
        """Parameters of the structure whose covariance is ``lam @ lam.T`` (signs made positive)."""

    @abc.abstractmethod
    def pivots(self, theta: Array) -> Array:
        """Diagonal of the triangular factor, in size: one is 0 on the boundary."""

    @abc.abstractmethod
    def theta_names(self, names: tuple[str, ...]) -> list[str]:
        """One name per free parameter."""

    def start(self) -> np.ndarray:
        """Parameters of the identity."""
        return self.from_factor(np.eye(self.S))


def _row_norms(lam: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(lam**2, axis=1))


@final
class Unstructured(Covariance):
    """Any positive semidefinite matrix; θ is the lower triangle of Λ, column by column (lme4)."""

    mixes = True

    @property
    def n_theta(self) -> int:
        return self.S * (self.S + 1) // 2

    def factor(self, theta: Array) -> Array:
        return _linear(theta, _triangular_basis(self.S))

    def pivots(self, theta: Array) -> Array:
        return abs(theta[_diagonal_places(self.S)])

    def from_factor(self, lam: np.ndarray) -> np.ndarray:
        # the triangular factor straight from lam (never from lam @ lam.T): no digits are squared
        from scipy.linalg.lapack import dgeqrf

        upper = dgeqrf(lam.T)[0]
        rows, columns = _lower_triangle(self.S)
        signs = np.where(upper.diagonal() < 0, -1.0, 1.0)
        return upper[columns, rows] * signs[columns]

    def theta_names(self, names: tuple[str, ...]) -> list[str]:
        rows, columns = _lower_triangle(self.S)
        pairs = zip(rows, columns, strict=True)
        return [names[i] if i == j else f"{names[i]}.{names[j]}" for i, j in pairs]


@final
class Diagonal(Covariance):
    """Independent effects, each with its own variance; θ are the relative SDs."""

    @property
    def n_theta(self) -> int:
        return self.S

    def factor(self, theta: Array) -> Array:
        return theta[:, None] * np.eye(self.S, dtype=theta.dtype)

    def pivots(self, theta: Array) -> Array:
        return abs(theta)

    def from_factor(self, lam: np.ndarray) -> np.ndarray:
        return _row_norms(lam)

    def theta_names(self, names: tuple[str, ...]) -> list[str]:
        return list(names)


@final
class Homogeneous(Covariance):
    """Independent effects with one common variance; θ is the relative SD."""

    scales = False

    @property
    def n_theta(self) -> int:
        return 1

    def factor(self, theta: Array) -> Array:
        return theta[0] * np.eye(self.S, dtype=theta.dtype)

    def pivots(self, theta: Array) -> Array:
        return abs(theta)

    def from_factor(self, lam: np.ndarray) -> np.ndarray:
        return _row_norms(lam)[:1]

    def theta_names(self, names: tuple[str, ...]) -> list[str]:
        return ["hom"]


def _cs_root(angle: Array, S: int) -> Array:
    """Symmetric root of the S x S correlation matrix with all correlations 1 - S/(S-1) sin²(angle).

    Its eigenvalues 1 + (S-1)ρ = S cos² and 1 - ρ = S/(S-1) sin² reach zero smoothly.
    """
    xp = jnp if isinstance(angle, jax.Array) else np
    apart = math.sqrt(S / (S - 1)) * xp.sin(angle)
    along = math.sqrt(S) * xp.cos(angle)
    return apart * np.eye(S, dtype=angle.dtype) + (along - apart) / S


def _cs_pivots(angle: Array, S: int) -> Array:
    """Diagonal of the Cholesky factor of that correlation matrix, (S,); ``angle`` (1,) or, for
    S = 1, (0,).

    Its squares are ratios of the leading minors, (1 - ρ)(1 + kρ) / (1 + (k - 1)ρ).
    """
    if S == 1:
        return np.ones(1)
    xp = jnp if isinstance(angle, jax.Array) else np
    apart, along = S / (S - 1) * xp.sin(angle) ** 2, S * xp.cos(angle) ** 2  # 1 - ρ, 1 + (S - 1)ρ
    k = np.arange(1, S)  # S (1 + kρ) = (k + 1)(1 + (S - 1)ρ) + (S - 1 - k)(1 - ρ)
    later = apart * ((k + 1) * along + (S - 1 - k) * apart) / (k * along + (S - k) * apart)
    return xp.sqrt(xp.concatenate([xp.ones_like(angle), later]))


def _cs_angle(lam: np.ndarray) -> float:
    """Angle of the mean correlation of ``lam @ lam.T`` (independence where no SD is positive)."""
    S = len(lam)
    sd = _row_norms(lam)
    if S < 2 or not np.all(sd > 0):
        return math.asin(math.sqrt((S - 1) / S))
    unit = lam / sd[:, None]
    rho = (np.sum(unit @ unit.T) - S) / (S * (S - 1))
    return math.asin(math.sqrt(min(max((1 - rho) * (S - 1) / S, 0.0), 1.0)))


@final
class CompoundSymmetry(Covariance):
    """One correlation, own variances (glmmTMB ``cs``); θ = relative SDs, angle of the correlation.

    The correlation is 1 - S/(S-1) sin²(angle), between -1/(S-1) and 1.
    """

    @property
    def n_theta(self) -> int:
        return self.S + (self.S > 1)

    def factor(self, theta: Array) -> Array:
        if self.S == 1:
            return theta[:, None]
        return theta[: self.S, None] * _cs_root(theta[self.S], self.S)

    def pivots(self, theta: Array) -> Array:
        return abs(theta[: self.S]) * _cs_pivots(theta[self.S :], self.S)

    def from_factor(self, lam: np.ndarray) -> np.ndarray:
        angle = [_cs_angle(lam)] if self.S > 1 else []
        return np.concatenate([_row_norms(lam), angle])

    def theta_names(self, names: tuple[str, ...]) -> list[str]:
        return [*names, *(["cs"] if self.S > 1 else [])]


@final
class HomogeneousCompoundSymmetry(Covariance):
    """One correlation and one variance (glmmTMB ``homcs``); θ = relative SD, angle."""

    scales = False

    @property
    def n_theta(self) -> int:
        return 1 + (self.S > 1)

    def factor(self, theta: Array) -> Array:
        if self.S == 1:
            return theta[:, None]
        return theta[0] * _cs_root(theta[1], self.S)

    def pivots(self, theta: Array) -> Array:
        return abs(theta[0]) * _cs_pivots(theta[1:], self.S)

    def from_factor(self, lam: np.ndarray) -> np.ndarray:
        angle = [_cs_angle(lam)] if self.S > 1 else []
        return np.concatenate([_row_norms(lam)[:1], angle])

    def theta_names(self, names: tuple[str, ...]) -> list[str]:
        return ["hom", *(["cs"] if self.S > 1 else [])]


STRUCTURES: dict[str, type[Covariance]] = {
    "us": Unstructured,
    "diag": Diagonal,
    "hom": Homogeneous,
    "cs": CompoundSymmetry,
    "homcs": HomogeneousCompoundSymmetry,
}


def covariance(kind: str, S: int) -> Covariance:
    """Make the structure that the formula calls ``kind`` for a term of ``S`` columns.

    Examples
    --------
    >>> covariance("us", 2).theta_names(("(Intercept)", "Days"))
    ['(Intercept)', 'Days.(Intercept)', 'Days']
    """
    if kind not in STRUCTURES:
        raise FormulaError(
            f"unknown covariance structure {kind!r}; expected one of {', '.join(STRUCTURES)}."
        )
    return STRUCTURES[kind](S)

"""What a compiled fit hands back: one vector, taken apart only as far as somebody asks.

A fit of a small model takes less time than handing over its dozen results one by one, or than
putting them into the units of the data; so compiled code packs them, and :class:`Solution` slices.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax.gram import Layout
from lmmjax.optimize import PROMISE, SINGULAR_TOLERANCE, Optimum


class _Scalars(NamedTuple):
    value: Any  # criterion without the constant of the units
    sigma2: Any
    n_evals: Any
    status: Any  # a key of optimize.STATUS
    promised: Any  # what a Newton step would still take off the criterion
    lowest: Any  # eigenvalue of the Hessian
    steepest: Any  # largest entry of the Hessian, in size
    pivot: Any  # of the relative factors, the smallest: 0 on the boundary


def pack(layout: Layout, best: Optimum, est: Any) -> jax.Array:
    """An ``Optimum`` and its ``Estimates`` (estimate.py) as one vector."""
    k = len(best.theta)
    steepest = jnp.max(jnp.abs(best.hessian)) if k else 0.0
    thetas = layout.split(best.theta[: layout.n_theta])
    pivots = [s.pivots(t) for s, t in zip(layout.structures, thetas, strict=True)]
    pivot = jnp.min(jnp.concatenate(pivots)) if pivots else jnp.inf
    scalars = _Scalars(
        best.value,
        est.sigma2,
        best.n_evals,
        best.status,
        best.promised,
        best.lowest,
        steepest,
        pivot,
    )
    dtype = best.value.dtype
    parts = (best.theta, best.gradient, best.hessian, est.beta, est.unscaled_vcov)
    return jnp.concatenate(
        [jnp.stack([jnp.asarray(x, dtype) for x in scalars]), *(a.reshape(-1) for a in parts)]
    )


class Solution(NamedTuple):
    """The vector of :func:`pack`, in standardised units."""

    values: np.ndarray
    scalars: _Scalars
    k: int  # free parameters: θ, then φ
    p: int  # fixed effects of the data
    padded: int  # fixed effects of the compiled program (buckets.py)

    @classmethod
    def of(cls, packed: Any, k: int, p: int, padded: int) -> Solution:
        values = np.asarray(packed, float)
        values.setflags(write=False)
        return cls(values, _Scalars(*values[: len(_Scalars._fields)].tolist()), k, p, padded)

    def _array(self, place: int, shape: tuple[int, ...]) -> np.ndarray:
        start = len(_Scalars._fields) + place
        return self.values[start : start + math.prod(shape)].reshape(shape)

    @property
    def value(self) -> float:
        """Criterion without the constant of the units."""
        return self.scalars.value

    @property
    def sigma2(self) -> float:
        """σ²."""
        return self.scalars.sigma2

    @property
    def n_evals(self) -> int:
        """Evaluations of the criterion."""
        return int(self.scalars.n_evals)

    @property
    def status(self) -> int:
        """A key of ``optimize.STATUS``."""
        return int(self.scalars.status)

    @property
    def promised(self) -> float:
        """What a Newton step would still take off the criterion."""
        return self.scalars.promised

    @property
    def free(self) -> np.ndarray:
        """θ, then φ: (k,)."""
        return self._array(0, (self.k,))

    @property
    def gradient(self) -> np.ndarray:
        """Gradient in the free parameters, (k,)."""
        return self._array(self.k, (self.k,))

    @property
    def hessian(self) -> np.ndarray:
        """Hessian that the optimiser saw last, (k, k)."""
        return self._array(2 * self.k, (self.k, self.k))

    @property
    def beta(self) -> np.ndarray:
        """β̂, (p,)."""
        return self._array(self.k * (2 + self.k), (self.padded,))[: self.p]

    @property
    def unscaled_vcov(self) -> np.ndarray:
        """Cov(β̂) / σ², (p, p)."""
        P = self.padded
        return self._array(self.k * (2 + self.k) + P, (P, P))[: self.p, : self.p]

    @property
    def finite(self) -> bool:
        """Whether criterion and curvature are numbers."""
        return math.isfinite(self.scalars.value + self.scalars.steepest)

    @property
    def curved(self) -> bool:
        """Whether no direction leads down by the curvature."""
        return self.scalars.lowest > -1e-6 * max(1.0, self.scalars.steepest)

    @property
    def singular(self) -> bool:
        """Whether a relative factor is on the boundary."""
        return self.scalars.pivot < SINGULAR_TOLERANCE

    def converged(self, dtype: str) -> bool:
        """Convergence by what a Newton step still promises and by the curvature."""
        if self.k == 0:
            return True
        return self.finite and self.curved and self.promised < PROMISE[dtype]

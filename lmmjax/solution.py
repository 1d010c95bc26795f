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

from lmmjax.optimize import Optimum, newton_decrement

#: a Newton step at the optimum may promise this much of the criterion at most, by precision
PROMISE = {"float64": 1e-6, "float32": 1e-2}

_SCALARS = ("value", "sigma2", "n_evals", "status", "promised", "lowest", "steepest")


def pack(best: Optimum, est: Any) -> jax.Array:
    """An ``Optimum`` and its ``Estimates`` (estimate.py) as one vector."""
    k = len(best.theta)
    promised, lowest = newton_decrement(best.gradient, best.hessian) if k else (0.0, 0.0)
    steepest = jnp.max(jnp.abs(best.hessian)) if k else 0.0
    scalars = (best.value, est.sigma2, best.n_evals, best.status, promised, lowest, steepest)
    dtype = best.value.dtype
    parts = (best.theta, best.gradient, best.hessian, est.beta, est.unscaled_vcov)
    return jnp.concatenate(
        [jnp.stack([jnp.asarray(x, dtype) for x in scalars]), *(a.reshape(-1) for a in parts)]
    )


class Solution(NamedTuple):
    """The vector of :func:`pack`, in standardised units."""

    values: np.ndarray
    k: int  # free parameters: θ, then φ
    p: int  # fixed effects of the data
    padded: int  # fixed effects of the compiled program (buckets.py)

    def _scalar(self, name: str) -> float:
        return self.values.item(_SCALARS.index(name))

    def _array(self, place: int, shape: tuple[int, ...]) -> np.ndarray:
        start = len(_SCALARS) + place
        return self.values[start : start + math.prod(shape)].reshape(shape)

    @property
    def value(self) -> float:
        """Criterion without the constant of the units."""
        return self._scalar("value")

    @property
    def sigma2(self) -> float:
        """σ²."""
        return self._scalar("sigma2")

    @property
    def n_evals(self) -> int:
        """Evaluations of the criterion."""
        return int(self._scalar("n_evals"))

    @property
    def status(self) -> int:
        """A key of ``optimize.STATUS``."""
        return int(self._scalar("status"))

    @property
    def promised(self) -> float:
        """What a Newton step would still take off the criterion."""
        return self._scalar("promised")

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
        return math.isfinite(self.value + self._scalar("steepest"))

    @property
    def curved(self) -> bool:
        """Whether no direction leads down by the curvature."""
        return self._scalar("lowest") > -1e-6 * max(1.0, self._scalar("steepest"))

    def converged(self, dtype: str) -> bool:
        """Convergence by what a Newton step still promises and by the curvature."""
        if self.k == 0:
            return True
        return self.finite and self.curved and self.promised < PROMISE[dtype]

r"""The parameters ψ of a residual covariance to whose second derivatives Kenward-Roger refers.

The adjusted covariance depends on the parametrisation through R_ij alone. Here ψ are SAS's:

* covariances and variances where R is linear in them: ``cs``, ``toep``, ``symm`` of equal variances
  (σ² and the covariances), ``un``, ``varident`` alone (a variance per level). R_ij = 0;
* else a variance per position or level (``csh ar1h toeph adh``; one ``varident`` beside a
  homogeneous correlation), or σ², and the correlation parameters as reported (``ar1 ad arma car1
  sppow``: correlations; ``spexp spgau``: the range, with sill and nugget as variances);
* further ``varident`` beside those: squared ratios; δ of ``varpower`` and ``varexp``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax.residual.expansion import weighted_second
from lmmjax.residual.frame import Residuals
from lmmjax.residual.structures import (
    CompoundSymmetry,
    Spatial,
    Structure,
    Toeplitz,
    Unstructured,
)

Array = Any


class Chart(NamedTuple):
    """Which parameters ψ belong to a structure; static."""

    structure: Structure
    own: int  # leading SD ratios that stand for a variance each
    covariances: bool  # instead of correlations

    @property
    def is_linear(self) -> bool:
        """Whether R is linear in ψ."""
        only_own = self.own == self.structure.variances.n_phi
        return only_own and (self.covariances or self.structure.family is None)


def chart(r: Residuals) -> Chart:
    """The parameters of the header for a structure."""
    c, structure = r.spec.correlation, r.structure
    by_position = c is not None and c.heterogeneous
    own = len(r.grid) - 1 if by_position else 0
    if not by_position and [v.kind for v in r.spec.estimated] == ["ident"]:
        own = structure.variances.n_phi
    equal = structure.variances.n_phi == 0
    linear = isinstance(structure.family, CompoundSymmetry | Toeplitz | Unstructured) and equal
    un = isinstance(structure.family, Unstructured) and by_position
    return Chart(structure, own, linear or un)


def covariance_parameters(k: Chart, sigma2: Array, phi: Array) -> Array:
    """ψ of (σ², φ): (1 + n_phi,), a bijection; R = sigma2 S C S."""
    family, variances = k.structure.family, k.structure.variances
    v = phi[k.structure.n_corr :]
    rest = variances.natural(v)
    ratio = np.array([kind == "ratio" for kind in variances.kinds], bool)
    rest = jnp.where(ratio, rest**2, rest)
    first = sigma2 * variances.reference(v) ** 2
    by_level = first * jnp.concatenate([jnp.ones(1, phi.dtype), rest[: k.own]])
    corr = jnp.zeros(0) if family is None else family.natural(phi[: k.structure.n_corr])
    if k.covariances and isinstance(family, Unstructured):
        a, b = np.triu_indices(len(family.labels), 1)
        sd = jnp.sqrt(jnp.broadcast_to(by_level, len(family.labels)))
        corr = corr * sd[a] * sd[b]
    elif k.covariances:
        corr = first * corr
    elif isinstance(family, Spatial) and family.nugget and variances.n_phi == 0:
        return jnp.stack([first * (1 - corr[1]), corr[0], first * corr[1]])
    return jnp.concatenate([by_level, corr, rest[k.own :]])


@functools.partial(jax.jit, static_argnums=0)
def bend(k: Chart, phi: Array, W: Array) -> Array:
    """Σ_ij W_ij ∂²η/∂ψ_i∂ψ_j in coordinates of η = (σ², φ) at σ² = 1, W that of η̂.

    By the chain rule -J⁻¹ Σ_ij W_ij ∂²ψ/∂η_i∂η_j, J = ∂ψ/∂η: what a change to the parameters ψ
    adds to Σ W_ij ∂²V/∂η_i∂η_j, as coefficients of ∂V/∂η.
    """

    def psi(eta: Array) -> Array:
        return covariance_parameters(k, eta[0], eta[1:])

    eta = jnp.concatenate([jnp.ones(1), phi])
    return -jnp.linalg.solve(jax.jacfwd(psi)(eta), weighted_second(psi, eta, W))

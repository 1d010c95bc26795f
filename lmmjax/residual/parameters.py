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

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax.residual.expansion import weighted_second
from lmmjax.residual.frame import Residuals
from lmmjax.residual.structures import CompoundSymmetry, Spatial, Toeplitz, Unstructured

Array = Any


def n_own(r: Residuals) -> int:
    """Leading SD ratios that are a variance each: those by position, or of the only varident."""
    c, estimated = r.spec.correlation, r.spec.estimated
    if c is not None and c.heterogeneous:
        return len(r.grid) - 1
    return r.structure.variances.n_phi if [v.kind for v in estimated] == ["ident"] else 0


def covariance_parameters(r: Residuals, sigma2: Array, phi: Array) -> Array:
    """ψ of (σ² in the units of the source, φ): (1 + n_phi,), a bijection.

    Parameters
    ----------
    r : Residuals
    sigma2 : ()
        R = sigma2 S C S.
    phi : (n_phi,)
    """
    family, variances = r.structure.family, r.structure.variances
    v = phi[r.structure.n_corr :]
    own = n_own(r)
    rest = variances.natural(v)
    squared = jnp.where(np.array([k == "ratio" for k in variances.kinds], bool), rest**2, rest)
    first = sigma2 * variances.reference(v) ** 2
    by_level = first * jnp.concatenate([jnp.ones(1, phi.dtype), squared[:own]])
    if family is None:
        return jnp.concatenate([by_level, squared[own:]])
    corr = family.natural(phi[: r.structure.n_corr])
    equal = variances.n_phi == 0
    if isinstance(family, Unstructured) and (equal or r.spec.correlation.heterogeneous):  # type: ignore[union-attr]
        a, b = np.triu_indices(len(family.labels), 1)
        sd = jnp.sqrt(jnp.broadcast_to(by_level, len(family.labels)))
        corr = corr * sd[a] * sd[b]
    elif equal and isinstance(family, CompoundSymmetry | Toeplitz):
        corr = first * corr
    elif equal and isinstance(family, Spatial) and family.nugget:
        return jnp.stack([first * (1 - corr[1]), corr[0], first * corr[1]])
    return jnp.concatenate([by_level, corr, squared[own:]])


def bend(r: Residuals, phi: np.ndarray, W: Array) -> Array:
    """Σ_ij W_ij ∂²η/∂ψ_i∂ψ_j in coordinates of η = (σ², φ) at σ² = 1, W that of η̂.

    By the chain rule -J⁻¹ Σ_ij W_ij ∂²ψ/∂η_i∂η_j, J = ∂ψ/∂η: what a change to the parameters ψ
    adds to Σ W_ij ∂²V/∂η_i∂η_j, as coefficients of ∂V/∂η.
    """

    def psi(eta: Array) -> Array:
        return covariance_parameters(r, eta[0], eta[1:])

    eta = jnp.concatenate([jnp.ones(1), jnp.asarray(phi)])
    return -jnp.linalg.solve(jax.jacfwd(psi)(eta), weighted_second(psi, eta, W))

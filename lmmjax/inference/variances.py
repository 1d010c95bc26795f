r"""Tables of derivatives in all variance parameters of a fit, residual ones included.

The parameters are (V, ω, φ): V itself, which stands for σ² (kenward_roger.py), the variances and
covariances ω of linear.py, and the free residual parameters φ. To first order any parametrisation
would do; second derivatives of V in φ enter

* the observed information, as the Hessian of the criterion in φ, which the optimiser knows;
* R_ij of Kenward and Roger, as a sum weighted by W, in SAS's parameters (residual/parameters.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax.inference import kenward_roger as kr
from lmmjax.inference.information import Tables, along, tables
from lmmjax.inference.linear import Directions, directions, tangent
from lmmjax.precision import in_float64

if TYPE_CHECKING:
    from lmmjax.fit import Fit
    from lmmjax.residual.parameters import Chart
    from lmmjax.residual.source import Source


def source(fit: Fit) -> Source | None:
    """What gives the residual covariance's derivatives; None for independent residuals."""
    if not fit.model.is_structured:
        return None
    from lmmjax.residual.expansion import source_of

    return source_of(fit.model)


@in_float64
def variance_tables(fit: Fit) -> tuple[kr.Extended, Directions, float]:
    """Tables for (V, ω, φ), the directions, and σ̂² of the source, all in standardised units."""
    model, (gram, rhs) = fit.model, fit._products
    layout, theta = model._plan.layout, jnp.asarray(fit._theta_s)
    d = directions(layout, model._factors(fit._theta_s))
    sigma2 = (fit.sigma / fit._residual_sd / model._units.scale) ** 2
    residual = None
    if fit._residual_source is not None:
        from lmmjax.residual.expansion import expand

        residual = expand(fit._residual_source, jnp.asarray(fit.phi))
        d = d._replace(along=np.append(d.along, np.zeros(len(fit.phi))))
    found = tables(layout, theta, gram, rhs, d.sigmas, d.first, residual)
    return kr.extend(jax.tree.map(np.asarray, found), float(fit.n_obs)), d, sigma2


@in_float64
def second_tables(fit: Fit) -> Tables | None:
    """Tables for the directions ∂²Σ/∂ω_i∂ω_j, 0 in φ; None where Σ is linear in ω."""
    d = fit._variance_tables[1]
    if not d.nonlinear:
        return None
    E = [x.reshape(-1, *x.shape[2:]) for x in d.second]
    layout, theta = fit.model._plan.layout, jnp.asarray(fit._theta_s)
    found = jax.tree.map(np.asarray, tables(layout, theta, *fit._products, d.sigmas, E))
    more = len(d.along) - d.second[0].shape[0]
    return found._replace(trace1=_padded(found.trace1, more), S1=_padded(found.S1, more))


def _padded(x: np.ndarray, more: int) -> np.ndarray:
    """Entries by pair of parameters, with zeros for ``more`` of them behind: (K², ...)."""
    K = round(len(x) ** 0.5)
    square = x.reshape(K, K, *x.shape[1:])
    wide = np.pad(square, ((0, more), (0, more), *[(0, 0)] * (x.ndim - 1)))
    return wide.reshape(-1, *x.shape[1:])


def observed_information(fit: Fit) -> np.ndarray:
    """Half the Hessian of the criterion in (V, ω, φ), units of σ² = 1, (1 + K, 1 + K)."""
    e, d, sigma2 = fit._variance_tables
    second, k = fit._second_tables, len(fit.phi)
    more = None if second is None else kr.curvature(e, second, d.along, sigma2, fit.method)
    info = kr.observed_information(e, sigma2, fit.method, more)
    if k:
        nu = fit.n_obs - (e.p if fit.method == "REML" else 0)
        slope = np.einsum("m,kmn,n->k", e.v, e.S1[-k:], e.v)
        profiled = fit._hessian_s[-k:, -k:]
        info[-k:, -k:] = 0.5 * (profiled + np.outer(slope, slope) / (nu * sigma2**2))
    return info


def covariance(fit: Fit, information: str) -> np.ndarray:
    """W of the parameters (V, ω, φ) in units of σ² = 1, (1 + K, 1 + K), see kenward_roger.py."""
    e = fit._variance_tables[0]
    if information == "expected":
        return kr.inverse(kr.expected_information(e))
    if not fit.singular:
        return kr.inverse(observed_information(fit))
    nu = fit.n_obs - (e.p if fit.method == "REML" else 0)
    return kr.on_the_face(e, _slopes(fit), fit._hessian_s, nu)


@in_float64
def _slopes(fit: Fit) -> np.ndarray:
    """∂(ω, φ)/∂(θ, φ), (K + k, n_theta + k): ω the coefficients of Σ in its tangents."""
    from scipy.linalg import block_diag

    layout = fit.model._plan.layout
    blocks = []
    for s, theta in zip(layout.structures, layout.split(fit._theta_s), strict=True):
        lam = np.asarray(s.factor(theta))
        first = tangent(s, lam @ lam.T).first
        d_lam = np.asarray(jax.jacfwd(s.factor)(jnp.asarray(theta)))
        half = np.einsum("abk,cb->kac", d_lam, lam)
        moved = (half + np.swapaxes(half, 1, 2)).reshape(len(half), -1)
        blocks.append(np.linalg.lstsq(first.reshape(len(first), -1).T, moved.T, rcond=None)[0])
    return block_diag(*blocks, np.eye(len(fit.phi)))


def second_order(fit: Fit, W: np.ndarray) -> np.ndarray:
    """Σ_ij W_ij R_ij for W of the parameters (V, ω, φ), (p, p)."""
    e, d, _ = fit._variance_tables
    second = fit._second_tables
    found = np.zeros((e.p, e.p)) if second is None else kr.second_order(second, d.along, W)
    if fit.model.design.residual is None:
        return found
    from lmmjax.residual.parameters import chart

    own = chart(fit.model.design.residual)
    return found if own.is_linear else found + _residual(fit, own, W)


@in_float64
def _residual(fit: Fit, own: Chart, W: np.ndarray) -> np.ndarray:
    """What the second derivatives of σ²R in SAS's parameters add to :func:`second_order`."""
    from lmmjax.residual.expansion import curved
    from lmmjax.residual.parameters import bend

    e, d, _ = fit._variance_tables
    the_source, k = fit._residual_source, len(fit.phi)
    assert the_source is not None
    T = kr.to_sigma2(d.along)
    at = np.r_[0, len(T) - k : len(T)]  # σ² and φ
    W = (T @ W @ T.T)[np.ix_(at, at)]
    directions = jnp.asarray(W[1:, 1:])
    D = jax.tree.map(lambda x: x[None], curved(the_source, jnp.asarray(fit.phi), directions))
    _, slope = along(fit.model._plan.layout, *fit._products, d.sigmas, D)
    coefficients = np.array(bend(own, jnp.asarray(fit.phi), jnp.asarray(W)))
    coefficients[1:] += 2 * W[0, 1:]
    S1 = np.linalg.solve(T.T, e.S1.reshape(len(T), -1)).reshape(e.S1.shape)[at]
    total = np.tensordot(coefficients, S1, 1) - np.asarray(slope)[0]
    return total[: e.p, : e.p]

r"""Closed-form derivatives of the criterion for correlated rows without random effects (MMRM).

The formulas of derivatives.py with R in place of Σ. Per pattern p of n_p subjects, W = R_p⁻¹,
N = <C, G_p> and R_k = ∂R_p/∂φ_k:

    S = Σ_p <W, G_p>,   S_k = -Σ_p <W R_k W, G_p>,   Q = n_p W - W N W
    gradient_k  = Σ_p tr(Q R_k)
    Hessian_kl  = Σ_p [tr(Q R_kl) - n_p tr(W R_k W R_l) + 2 tr(W N W R_k W R_l)]
                  - 2 (ν/r²) (S_k v)_x' S_x⁻¹ (S_l v)_x - (ν/r⁴) (v'S_k v)(v'S_l v)
                  - (REML) tr(S_x⁻¹ S_k,x S_x⁻¹ S_l,x)

with v = (-β̂, 1), C = (ν/r²) v v' + (REML) S_x⁻¹ ⊕ 0. Second derivatives of R are needed only on the
grid of positions, in one scalar.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax import likelihood as lk
from lmmjax.derivatives import Derivatives
from lmmjax.residual.source import Patterns, assemble


class Pieces(NamedTuple):
    red: lk.Reduction
    W: jax.Array  # (P, T, T)
    slopes: jax.Array  # R_k, (k, P, T, T)
    A: jax.Array  # W R_k W, (k, P, T, T)
    S_dot: jax.Array  # S_k, (k, K, K)
    v: jax.Array  # (K,)
    M: jax.Array  # S_x⁻¹, (p, p)


def _pieces(phi: jax.Array, source: Patterns) -> Pieces:
    W, logs = source.inverses(phi)
    logdet = source.logdet_W + source.counts @ logs
    C = source.products(W)[None]
    none = jnp.zeros(0, phi.dtype)
    red = lk.reduce(
        source.layout, none, *assemble(source.layout, source.where, C, source.n, logdet)
    )
    last = source.take(jax.jacfwd(source.grid)(phi))
    # k as last axis: long vectors instead of many small products
    A = jnp.einsum("ptuk,puv->ptvk", jnp.einsum("pts,psuk->ptuk", W, last), W)
    slopes, A = jnp.moveaxis(last, -1, 0), jnp.moveaxis(A, -1, 0)
    v = jnp.append(-lk.fixef(red), 1.0).astype(phi.dtype)
    return Pieces(red, W, slopes, A, -source.products(A), v, lk.unscaled_vcov(red))


def value_gradient_hessian(method: str, phi: jax.Array, source: Patterns) -> Derivatives:
    """The profiled -2 log-likelihood in standardised units, its gradient and Hessian in φ.

    Cost: O(k P T² (T + k + K²)) for k parameters.
    """
    d = _pieces(phi, source)
    p, reml = d.red.p, method == "REML"
    ratio = 1.0 / lk.profiled_sigma2(d.red, method)
    C = ratio * jnp.outer(d.v, d.v)
    if reml:
        C = C.at[:p, :p].add(d.M)
    N = _weights(source, C)
    n = source.counts[:, None, None]
    WNW = d.W @ N @ d.W
    Q = n * d.W - WNW
    gradient = jnp.einsum("ptu,kptu->k", Q, d.slopes)

    on_grid = source.collect(Q)

    def linear(at: jax.Array) -> jax.Array:
        return jnp.sum(on_grid * source.grid(at))

    k = len(phi)
    half = jnp.einsum("pts,kpsu->kptu", 2 * d.W @ N, d.A)
    inner = (half - n * d.A).reshape(k, -1)
    cross = inner @ d.slopes.reshape(k, -1).T
    S_v = d.S_dot @ d.v
    along = S_v @ d.v
    hessian = jax.hessian(linear)(phi) + 0.5 * (cross + cross.T)
    hessian = hessian - 2 * ratio * S_v[:, :p] @ d.M @ S_v[:, :p].T
    hessian = hessian - ratio / d.red.r2 * jnp.outer(along, along)
    if reml:
        MS = d.M @ d.S_dot[:, :p, :p]
        hessian = hessian - MS.reshape(k, -1) @ jnp.swapaxes(MS, 1, 2).reshape(k, -1).T
    return lk.deviance(d.red, method), gradient, 0.5 * (hessian + hessian.T)


def _weights(source: Patterns, C: jax.Array) -> jax.Array:
    """N_p = <C, G_p> as symmetric matrices, (P, T, T)."""
    rows, columns = np.tril_indices(C.shape[0])
    packed = source.sums @ (C[rows, columns] * np.where(rows == columns, 1.0, 2.0))
    P, T = source.mask.shape
    rows, columns = np.tril_indices(T)
    half = packed.reshape(P, -1) * np.where(rows == columns, 1.0, 0.5)
    place = np.zeros((T, T), np.int32)
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))
    return half[:, place]


def vcov_and_derivative(
    method: str, phi: jax.Array, source: Patterns
) -> tuple[jax.Array, jax.Array]:
    """Cov(β̂)(φ) with σ profiled, (p, p), and its derivatives in φ, (p, p, k)."""
    d = _pieces(phi, source)
    p, s2 = d.red.p, lk.profiled_sigma2(d.red, method)
    slope = jnp.einsum("m,kmn,n->k", d.v, d.S_dot, d.v) / lk.residual_df(d.red, method)
    dM = -jnp.einsum("ia,kab,bj->ijk", d.M, d.S_dot[:, :p, :p], d.M)
    return s2 * d.M, d.M[..., None] * slope + s2 * dM

r"""Cross-products to second order in a residual covariance that is made linear.

With directions R_k = ∂R/∂φ_k at φ, R(t) = R + Σ t_k R_k and M = [Z X y],

    M'R(t)⁻¹M  = C - Σ t_k C_k + Σ t_k t_l C_kl + O(t³)
    log|R(t)|  = log|R| + Σ t_k tr(R⁻¹R_k) - ½ Σ t_k t_l tr(R⁻¹R_kR⁻¹R_l) + O(t³)
    C_k = M'R⁻¹R_kR⁻¹M,   C_kl = ½ M'R⁻¹(R_kR⁻¹R_l + R_lR⁻¹R_k)R⁻¹M.

Derivatives in t are those in which V is linear, as the tables of inference/information.py want
them: derivatives in φ would mix V⁻¹G_kV⁻¹G_lV⁻¹ with V⁻¹(∂²V/∂φ_k∂φ_l)V⁻¹. The latter come from
the same first-order formula along ∂²R, of which only a weighted sum is ever needed.

Dense matrices by residual subject (``Rows``), by pattern (``Patterns``) or by stratum (``Basis``);
never n x n unless all rows are one subject.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax.gram import Gram, Rhs
from lmmjax.residual.setup import whitened_rows
from lmmjax.residual.source import Basis, Block, Patterns, Rows, Source, assemble, correlations
from lmmjax.residual.structures import Structure

Array = Any
Direction = tuple[Gram, Rhs]  # derivatives of cross-products, without levels and n


class Expansion(NamedTuple):
    """The coefficients; K parameters φ, pairs (k, l) with k <= l in row order of a triangle."""

    at: tuple[Gram, Rhs]
    first: Direction  # ∂/∂t_k, leading axis K
    second: Direction  # ∂²/∂t_k∂t_l, leading axis K (K + 1) / 2


def source_of(model: Any) -> Source:
    """The model's source where its R keeps a closed form to second order, else whitened rows."""
    source = model._prepared[2]
    if isinstance(source, Rows | Patterns) or source.kind == "strata":
        return source
    from lmmjax.gram import standardise

    return whitened_rows(model.design, model._plan, standardise(model.design))


@jax.jit
def expand(source: Source, phi: Array) -> Expansion:
    """Cross-products at φ with their first and second derivatives in t.

    Notes
    -----
    K parameters, subjects of T rows and m local columns: O(K n T² + K² n m²) for ``Rows``, and
    O(K² P T² (T + m²)) for P patterns.
    """
    if isinstance(source, Basis):
        return _by_stratum(source, phi)
    return _by_pattern(source, phi) if isinstance(source, Patterns) else _by_subject(source, phi)


@jax.jit
def curved(source: Source, phi: Array, W: Array) -> Direction:
    """Derivative of the cross-products along Σ_kl W_kl ∂²R/∂φ_k∂φ_l, W symmetric (K, K)."""
    if isinstance(source, Basis):
        c, at = _strata(source, phi), 4 * jnp.einsum("sk,kl,sl->s", source.H, W, source.H)
        return _floats(source.combine(-c * at, source.sizes @ at))
    if isinstance(source, Patterns):
        inverse, _ = source.inverses(phi)
        D = source.take(weighted_second(source.grid, phi, W))
        logdet = source.counts @ jnp.einsum("ptu,ptu->p", inverse, D)
        return _from_pattern(source, -inverse @ D @ inverse, logdet)
    parts = []
    for b in source.blocks:
        D = jax.vmap(lambda *row: weighted_second(_covariance(source.structure, *row), phi, W))
        L, white = _whiten(source.structure, phi, b)
        parts.append((white, _between(L, D(b.pos, b.mask, b.H))))
    C = [-jnp.swapaxes(w, 1, 2) @ B @ w for w, B in parts]
    logdet = sum(jnp.einsum("gtt->", B) for _, B in parts)
    return _from_subject(source, C, logdet)


def weighted_second(f: Callable[[Array], Array], at: Array, W: Array) -> Array:
    """Σ_kl W_kl ∂²f/∂_k∂_l, as a sum over the eigenvectors of W: one at a time."""
    e, Q = jnp.linalg.eigh(W)

    def along(u: Array) -> Array:
        slope = lambda x: jax.jvp(f, (x,), (u,))[1]  # noqa: E731
        return jax.jvp(slope, (at,), (u,))[1]

    return jnp.tensordot(e, jax.lax.map(along, Q.T), 1)


def pairs(K: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs k <= l of :class:`Expansion`."""
    return np.triu_indices(K)


def _floats(products: tuple[Gram, Rhs]) -> Direction:
    """Without what no derivative changes."""
    gram, rhs = products
    return gram._replace(parent=(), n=jnp.zeros((), gram.core.dtype)), rhs


# -------------------------------------------------------------------------------------------------
# Whitened rows
# -------------------------------------------------------------------------------------------------


def _covariance(
    structure: Structure, pos: Array, mask: Array, H: Array
) -> Callable[[Array], Array]:
    """φ -> R of one subject, (T, T): the identity where padded."""

    def R(phi: Array) -> Array:
        s = jnp.exp(H @ phi[structure.n_corr :])
        if structure.family is None:
            return jnp.diag(s**2)
        return correlations(structure, phi, pos[None], mask[None])[0] * s[:, None] * s

    return R


def _whiten(structure: Structure, phi: Array, b: Block) -> tuple[Array, Array]:
    """Cholesky factors L of R (G, T, T) and L⁻¹M (G, T, m)."""
    R = jax.vmap(lambda *row: _covariance(structure, *row)(phi))(b.pos, b.mask, b.H)
    L = jnp.linalg.cholesky(R)
    return L, jax.scipy.linalg.solve_triangular(L, b.M, lower=True)


def _between(L: Array, x: Array) -> Array:
    """L⁻¹ x L⁻ᵀ for symmetric x (..., G, T, T)."""
    L = jnp.broadcast_to(L, x.shape)
    half = jax.scipy.linalg.solve_triangular(L, x, lower=True)
    return jax.scipy.linalg.solve_triangular(L, jnp.swapaxes(half, -1, -2), lower=True)


def _by_subject(source: Rows, phi: Array) -> Expansion:
    structure, parts = source.structure, []
    for b in source.blocks:
        L, white = _whiten(structure, phi, b)
        slope = lambda *row: jax.jacfwd(_covariance(structure, *row))(phi)  # noqa: E731
        slopes = jnp.moveaxis(jax.vmap(slope)(b.pos, b.mask, b.H), -1, 0)
        B = _between(L, slopes)
        parts.append((white, B, B @ white))
    trace: Array = sum(jnp.einsum("kgtt->k", B) for _, B, _ in parts)
    k, l = pairs(len(phi))  # noqa: E741

    def first(i: Array) -> Direction:
        C = [-jnp.einsum("gtm,gtn->gmn", w, BM[i]) for w, _, BM in parts]
        return _from_subject(source, C, trace[i])

    def second(pair: tuple[Array, Array]) -> Direction:
        i, j = pair
        C = [jnp.einsum("gtm,gtn->gmn", BM[i], BM[j]) for _, _, BM in parts]
        logdet = -sum(jnp.sum(B[i] * B[j]) for _, B, _ in parts)
        return _from_subject(source, [c + jnp.swapaxes(c, 1, 2) for c in C], logdet)

    return Expansion(
        source.gram(phi),
        jax.lax.map(first, jnp.arange(len(phi))),
        jax.lax.map(second, (jnp.asarray(k), jnp.asarray(l))),
    )


def _from_subject(source: Rows, C: list[Array], logdet: Array) -> Direction:
    """Sums of (G, m, m) matrices of the blocks' subjects."""
    if source.layout.structures:
        stacked = jnp.concatenate(C)
    else:
        total: Array = sum(jnp.sum(c, axis=0) for c in C)
        stacked = total[None]
    return _floats(assemble(source.layout, source.where, stacked, source.n, logdet))


# -------------------------------------------------------------------------------------------------
# Patterns, strata
# -------------------------------------------------------------------------------------------------


def _by_pattern(source: Patterns, phi: Array) -> Expansion:
    W, _ = source.inverses(phi)
    slopes = jnp.moveaxis(source.take(jax.jacfwd(source.grid)(phi)), -1, 0)
    A = W @ slopes @ W
    trace = jnp.einsum("p,ptu,kptu->k", source.counts, W, slopes)
    k, l = pairs(len(phi))  # noqa: E741

    def second(pair: tuple[Array, Array]) -> Direction:
        i, j = pair
        X = A[i] @ slopes[j] @ W
        logdet = -source.counts @ jnp.einsum("ptu,ptu->p", A[i], slopes[j])
        return _from_pattern(source, X + jnp.swapaxes(X, 1, 2), logdet)

    return Expansion(
        source.gram(phi),
        jax.lax.map(lambda a: _from_pattern(source, -a[0], a[1]), (A, trace)),
        jax.lax.map(second, (jnp.asarray(k), jnp.asarray(l))),
    )


def _from_pattern(source: Patterns, inverse: Array, logdet: Array) -> Direction:
    """Σ_p <X_p, G_p> of symmetric matrices X (P, T, T)."""
    C = source.products(inverse)[None]
    return _floats(assemble(source.layout, source.where, C, source.n, logdet))


def _strata(source: Basis, phi: Array) -> Array:
    """1/S² of each stratum."""
    return jnp.exp(-2 * source.H @ phi)


def _by_stratum(source: Basis, phi: Array) -> Expansion:
    """R_k = 2 H_k S²: all products are diagonal."""
    c, H = _strata(source, phi), 2 * source.H.T
    k, l = pairs(len(phi))  # noqa: E741
    first = jax.lax.map(lambda h: _floats(source.combine(-c * h, source.sizes @ h)), H)
    square = H[k] * H[l]
    second = jax.lax.map(lambda h: _floats(source.combine(2 * c * h, -source.sizes @ h)), square)
    return Expansion(source.gram(phi), first, second)


@functools.cache
def place(K: int) -> np.ndarray:
    """Where the pair (k, l) stands in :class:`Expansion`, (K, K)."""
    out = np.zeros((K, K), np.int32)
    k, l = pairs(K)  # noqa: E741
    out[k, l] = out[l, k] = np.arange(len(k))
    return out

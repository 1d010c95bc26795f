r"""First and second derivatives of log|V| and S = [X y]'V⁻¹[X y] in the covariance parameters.

With V = R + ZΣZ' (everything in units of σ²), directions E_k = ∂Σ/∂ω_k, Ã = Z'V⁻¹Z and
T = Z'V⁻¹[X y],

    tr(V⁻¹ZE_kZ')            = tr(Ã E_k)          = ∂_k log|V|
    tr(V⁻¹ZE_kZ'V⁻¹ZE_lZ')   = tr(Ã E_k Ã E_l)    = -∂_kl log|V|
    [X y]'V⁻¹ZE_kZ'V⁻¹[X y]  = T'E_k T            = -∂_k S
    [X y]'V⁻¹ZE_kZ'V⁻¹ZE_lZ'V⁻¹[X y] = T'E_k Ã E_l T,   with its transpose ∂_kl S

(for Σ linear in ω). These tables are all that Kenward-Roger, the observed and the expected
information need. With one factor eliminated level by level they have closed forms in the pieces of
derivatives.py; for deeper chains the elimination is written in Σ instead of its factor Λ, which
keeps it differentiable where Σ is singular, and differentiated twice. No n x n or q x q matrix is
formed either way. Residual parameters enter as directions of R, through the expansion of the
cross-products in a linear path of R (residual/expansion.py).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmmjax import cross as cr
from lmmjax import derivatives as dv
from lmmjax import likelihood as lk
from lmmjax.gram import Gram, Layout, Rhs
from lmmjax.residual.expansion import Direction, Expansion, place


class Tables(NamedTuple):
    """What the header names; K directions, m = p + 1, second derivatives symmetric in k and l."""

    S: jax.Array  # [X y]'V⁻¹[X y], (m, m)
    trace1: jax.Array  # tr(Ã E_k), (K,)
    trace2: jax.Array  # tr(Ã E_k Ã E_l), (K, K)
    S1: jax.Array  # T'E_k T, (K, m, m)
    S2: jax.Array  # (T'E_k Ã E_l T + its transpose) / 2, (K, K, m, m)


@functools.partial(jax.jit, static_argnames="layout")
def tables(
    layout: Layout,
    theta: jax.Array,
    gram: Gram,
    rhs: Rhs,
    sigmas: list[jax.Array],
    E: list[jax.Array],
    residual: Expansion | None = None,
) -> Tables:
    """The tables at θ for directions ``E``, one (K, S, S) array a factor, chain first.

    Parameters
    ----------
    sigmas : list of (S, S) arrays
        Σ per factor at θ (chain first).
    residual : Expansion, optional
        Of the residual covariance: its parameters follow those of ``E``.

    Returns
    -------
    Tables

    Notes
    -----
    One factor in the chain: O(J (K S m² + d² S²) + K² (d + m)³) with d columns in the core. Deeper
    chains, and residual parameters: K² times the elimination.
    """
    if residual is None and dv.has_closed_form(layout):
        return _closed_form(layout, theta, gram, rhs, E)
    return by_autodiff(layout, gram, rhs, sigmas, E, residual)


# -- closed forms for one factor in the chain --------------------------------------------------


def _closed_form(
    layout: Layout, theta: jax.Array, gram: Gram, rhs: Rhs, E: list[jax.Array]
) -> Tables:
    k = dv._pieces(layout, theta, gram, rhs, ())
    xx, xy, yy = lk.quadratic(k.red)
    S = jnp.block([[xx, xy[:, None]], [xy[None], yy[None, None]]])
    gamma = dv._gamma(layout, k, jnp.zeros_like(S))
    trace2, S2 = _second(layout, k, E)
    return Tables(S, dv._pair(gamma, E), trace2, dv._s_dot(layout, k, E), S2)


def _second(layout: Layout, k: dv.Pieces, E: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """tr(Ã E_k Ã E_l) and the symmetric part of T'E_k Ã E_l T, from Ã's blocks (derivatives.py)."""
    mine = dv._outer(k.a, k.a)
    trace = dv._double(mine, E[0], E[0])
    chain = dv._parameters(layout, layout.chain[0][0])
    quad = jnp.zeros((*trace.shape, *k.T.shape[1:2] * 2), trace.dtype)
    quad = quad.at[jnp.ix_(chain, chain)].set(_chain_quadratic(k, E[0][chain]))
    if layout.core:
        more_trace, more_quad = _core_second(layout, k, E)
        trace, quad = trace + more_trace, quad + more_quad
    return 0.5 * (trace + trace.T), 0.5 * (quad + jnp.swapaxes(quad, -1, -2))


def _chain_quadratic(k: dv.Pieces, E: jax.Array) -> jax.Array:
    """Σ_i T_i'E_k a_i E_l T_i: (K, K, m, m); a pass over the levels for each k."""

    def one(e: jax.Array) -> jax.Array:
        moved = dv._inner(k.a, jnp.swapaxes(_rows(e, k.T), 0, 1))
        return jnp.einsum("smtn,lst->lmn", dv._outer(moved, k.T), E)

    return jax.lax.map(one, E)


def _rows(e: jax.Array, x: jax.Array) -> jax.Array:
    """E x per level: (S, S), (S, m, J) -> (S, m, J)."""
    return jnp.tensordot(e, x, 1)


def _core_second(layout: Layout, k: dv.Pieces, E: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """What the dense core adds: -P_iQP_j' of the chain's block, and the blocks beside it."""
    IQK = jnp.eye(layout.d, dtype=k.Q.dtype) - k.Q @ k.K
    A_cc = k.K @ IQK
    M = k.P.weigh(E[0])
    G = jnp.stack([k.P.transposed(_rows(e, k.T)) for e in E[0]])
    QM = k.Q @ M
    mixed = dv._double(dv._outer(k.P.conjugate(k.Q), k.a), E[0], E[0])
    trace = jnp.einsum("kde,led->kl", QM, QM) - mixed - mixed.T
    quad = -jnp.einsum("kdm,ldn->klmn", G, k.Q @ G)
    ET = dv._apply_core(layout, E[1:], k.T_core)
    beside = jnp.einsum("kdm,ldn->klmn", IQK.T @ G, ET)
    quad = quad + beside + jnp.einsum("klmn->lknm", beside)
    quad = quad + jnp.einsum("kdm,ldn->klmn", ET, A_cc @ ET)
    across = jax.lax.map(lambda m: dv._pair(dv._core_sums(layout, IQK.T @ m @ IQK), E[1:]), M)
    trace = trace + across + across.T
    return trace + _core_trace(layout, A_cc, E[1:]), quad


def _core_trace(layout: Layout, A_cc: jax.Array, E: list[jax.Array]) -> jax.Array:
    """tr(Ã_cc E_k Ã_cc E_l) from the sums over pairs of levels, factor by factor."""
    where, out = dv._core_blocks(layout), jnp.zeros((len(E[0]), len(E[0])), A_cc.dtype)
    for (rows, J, S), x in zip(where, E, strict=True):
        for (columns, other_J, other_S), y in zip(where, E, strict=True):
            block = A_cc[rows, columns].reshape(J, S, other_J, other_S)
            out = out + dv._double(jnp.einsum("jaid,jbic->dabc", block, block), x, y)
    return out


# -- the elimination in Σ, differentiated -------------------------------------------------------


#: axes of directions, and whether [X y] follows, of the tables after S
_EMPTY = ((1, 0), (2, 0), (1, 1), (2, 1))


def by_autodiff(
    layout: Layout,
    gram: Gram,
    rhs: Rhs,
    sigmas: list[jax.Array],
    E: list[jax.Array],
    residual: Expansion | None = None,
) -> Tables:
    """The same tables by differentiating :func:`reduce_sigmas` along the directions.

    ``residual``, made at the φ of ``gram`` and ``rhs``, adds those of the residual parameters
    behind ``E``: its first derivatives are a path on which cross-products are linear, and what
    their second derivatives add enters as directions of its own.
    """
    K = E[0].shape[0] if E else 0
    k = 0 if residual is None else residual.first[0].core.shape[0]
    if K + k == 0:
        _, S = reduce_sigmas(layout, sigmas, gram, rhs)
        none = [jnp.zeros((*(0,) * i, *S.shape[: m * 2]), S.dtype) for i, m in _EMPTY]
        return Tables(S, *none)

    def f(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        moved = [s + jnp.tensordot(w[:K], e, 1) for s, e in zip(sigmas, E, strict=True)]
        at = (gram, rhs) if residual is None else move(gram, rhs, residual.first, w[K:])
        return reduce_sigmas(layout, moved, *at)

    at = jnp.zeros(K + k, rhs.core.dtype)
    logdet1, S1 = jax.jacfwd(f)(at)
    logdet2, S2 = jax.jacfwd(jax.jacfwd(f))(at)
    S2 = jnp.moveaxis(S2, (2, 3), (0, 1))
    if residual is not None:
        logs, more = along(layout, gram, rhs, sigmas, residual.second)
        pair = place(k)
        logdet2, S2 = logdet2.at[K:, K:].add(logs[pair]), S2.at[K:, K:].add(more[pair])
    return Tables(f(at)[1], logdet1, -logdet2, -jnp.moveaxis(S1, -1, 0), 0.5 * S2)


def move(gram: Gram, rhs: Rhs, directions: Direction, by: jax.Array) -> tuple[Gram, Rhs]:
    """Cross-products moved along directions with a leading axis, or along one by a number."""
    d_gram, d_rhs = directions
    add = lambda a, b: a + jnp.tensordot(by, b, jnp.ndim(by))  # noqa: E731
    names = ("own", "up", "border", "core", "logdet_R")
    moved = {n: jax.tree.map(add, getattr(gram, n), getattr(d_gram, n)) for n in names}
    return gram._replace(**moved), jax.tree.map(add, rhs, d_rhs)


@functools.partial(jax.jit, static_argnames="layout")
def along(
    layout: Layout, gram: Gram, rhs: Rhs, sigmas: list[jax.Array], directions: Direction
) -> tuple[jax.Array, jax.Array]:
    """Derivatives of log|V| and S along directions of the cross-products with a leading axis."""

    def one(direction: Direction) -> tuple[jax.Array, jax.Array]:
        def f(by: jax.Array) -> tuple[jax.Array, jax.Array]:
            return reduce_sigmas(layout, sigmas, *move(gram, rhs, direction, by))

        return jax.jvp(f, (jnp.zeros((), rhs.core.dtype),), (jnp.ones((), rhs.core.dtype),))[1]

    return jax.vmap(one)(directions)


def reduce_sigmas(
    layout: Layout, sigmas: list[jax.Array], gram: Gram, rhs: Rhs
) -> tuple[jax.Array, jax.Array]:
    """log|V| and S by elimination in Σ: (I + AΣ)⁻¹ where ``reduce`` has Λ(Λ'AΛ + I)⁻¹Λ'.

    Rational in Σ, hence differentiable at singular Σ and in directions that leave the cone of
    covariances; ``likelihood.reduce`` stays the way to evaluate the criterion.
    """
    c, d = len(layout.chain), layout.d
    own, up = list(gram.own), [list(u) for u in gram.up]
    border = [
        jnp.concatenate([b, y[:, None]], axis=1)
        for b, y in zip(_dense_borders(layout, gram), rhs.border, strict=True)
    ]
    core = jnp.block([[gram.core, rhs.core[:, None]], [rhs.core[None], rhs.yy]])
    logdet = jnp.asarray(gram.logdet_R, core.dtype)
    for i in range(c):
        H, log_i = _weight(own[i], sigmas[i])
        logdet = logdet + log_i
        HB = _times(H, border[i])
        core = core - lk.over_levels(border[i], HB)
        for a, parent in enumerate(gram.parent[i]):
            k, J = i + 1 + a, layout.chain[i + 1 + a][2]
            HU = _times(H, up[i][a])
            own[k] = own[k] - lk._to_parent(parent, lk.per_level(up[i][a], HU), J)
            border[k] = border[k] - lk._to_parent(parent, lk.per_level(HU, border[i]), J)
            for b, other in enumerate(up[i][a + 1 :]):
                up[k][b] = up[k][b] - lk._to_parent(parent, lk.per_level(HU, other), J)
    K, B = core[:d, :d], core[:d, d:]
    Sigma = [jnp.kron(jnp.eye(J), s) for s, (_, _, J) in zip(sigmas[c:], layout.core, strict=True)]
    if not Sigma:
        return logdet, core
    Sigma_c = jax.scipy.linalg.block_diag(*Sigma)
    M = jnp.eye(d, dtype=core.dtype) + K @ Sigma_c
    S = core[d:, d:] - B.T @ Sigma_c @ jnp.linalg.solve(M, B)
    return logdet + jnp.linalg.slogdet(M)[1], S


def _dense_borders(layout: Layout, gram: Gram) -> list[jax.Array]:
    """The borders with the core's columns of Z written out where a sparse layout lists them."""
    if gram.cross is None:
        return list(gram.border)
    first, *others = gram.border
    eye = jnp.eye(layout.d, dtype=first.dtype)
    written = cr.from_core(gram.cross, eye, layout.chain[0][2])
    return [jnp.concatenate([written, first], axis=1), *others]


def _weight(a: jax.Array, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Σ(I + aΣ)⁻¹ per level and Σ over levels of log|I + aΣ|: (S, S, J) -> (S, S, J), ()."""
    a = jnp.moveaxis(a, -1, 0)
    M = jnp.eye(a.shape[-1], dtype=a.dtype) + a @ sigma
    H = jnp.swapaxes(
        jnp.linalg.solve(jnp.swapaxes(M, 1, 2), jnp.broadcast_to(sigma, M.shape)), 1, 2
    )
    return jnp.moveaxis(H, 0, -1), jnp.sum(jnp.linalg.slogdet(M)[1])


def _times(H: jax.Array, x: jax.Array) -> jax.Array:
    """H x per level: (S, S, J), (S, m, J) -> (S, m, J)."""
    return lk.per_level(jnp.swapaxes(H, 0, 1), x)

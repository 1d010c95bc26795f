r"""Value, gradient and Hessian of the profiled criterion.

Where one grouping factor is eliminated level by level (the common layout: one factor, or one beside
crossed or small outer factors in the dense core) the derivatives have closed forms; they cost a
fraction of automatic differentiation to compile and to run. Deeper chains, and every derivative
beyond the second, are differentiated automatically. The tests hold one against the other.

With Σ = ΛΛ' for all factors, V = R + ZΣZ', and

    Ã = Z'V⁻¹Z,   T = Z'V⁻¹[X y],   S = [X y]'V⁻¹[X y],   E_k = ∂Σ/∂θ_k
    v = (-β̂, 1),  C = (ν/r²) v v' + (REML) S_x⁻¹ ⊕ 0

the rules ∂Ã = -Ã E Ã, ∂T = -Ã E T, ∂S = -T'E T give

    gradient_k  = tr(E_k (Ã - T C T'))
    Hessian_kl  = tr((∂E_k/∂θ_l)(Ã - T C T')) - tr(Ã E_k Ã E_l) + 2 tr(C T'E_k Ã E_l T)
                  - 2 (ν/r²) (Ṡ_k v)_x' S_x⁻¹ (Ṡ_l v)_x - (ν/r⁴) (v'Ṡ_k v)(v'Ṡ_l v)
                  - (REML) tr(S_x⁻¹ Ṡ_k,x S_x⁻¹ Ṡ_l,x),      Ṡ_k = T'E_k T

Ã is never formed. With V₁ = R + Z₁Σ₁Z₁' of the chain factor, block-diagonal by level i, the core's
columns Z_c, per level a_i = Z₁'V₁⁻¹Z₁ and P_i = Z₁'V₁⁻¹Z_c, and over all rows K = Z_c'V₁⁻¹Z_c and
Q = Λ_c(I + Λ_c'KΛ_c)⁻¹Λ_c',

    Ã_ij = δ_ij a_i - P_i Q P_j',   Ã_ic = P_i (I - Q K),   Ã_cc = K - K Q K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax import likelihood as lk
from lmmjax.gram import Gram, Layout, Rhs

Derivatives = tuple[jax.Array, jax.Array, jax.Array]


def by_autodiff(f: Callable[[jax.Array], jax.Array], theta: jax.Array) -> Derivatives:
    """f, ∇f, ∇²f by automatic differentiation, f and ∇f evaluated once."""
    (value, gradient), push = jax.linearize(jax.value_and_grad(f), theta)
    _, hessian = jax.vmap(push)(jnp.eye(theta.shape[0], dtype=theta.dtype))
    return value, gradient, 0.5 * (hessian + hessian.T)


def has_closed_form(layout: Layout) -> bool:
    """One factor in the chain, of few enough columns that S⁴ sums over the levels are cheap."""
    return len(layout.chain) == 1 and layout.chain[0][1] <= 8


def value_gradient_hessian(
    layout: Layout, method: str, theta: jax.Array, gram: Gram, rhs: Rhs
) -> Derivatives:
    """The profiled -2 log-likelihood in standardised units, its gradient and Hessian in θ.

    Cost: O(J (S⁴ + S² (p + 1)²)) for one factor, a small multiple of ``reduce`` otherwise.
    """
    if has_closed_form(layout):
        return closed_form(layout, method, theta, gram, rhs)

    def f(t: jax.Array) -> jax.Array:
        return lk.deviance(lk.reduce(layout, t, gram, rhs), method)

    return by_autodiff(f, theta)


class Pieces(NamedTuple):
    """What the closed forms need at θ. ``k`` counts the parameters of the part named."""

    red: lk.Reduction
    a: jax.Array  # a_i, (S, S, J)
    every_a: jax.Array  # a_i times the number of levels that it stands for (Gram.times)
    P: jax.Array  # P_i, (S, d, J)
    T: jax.Array  # rows of T of the chain, (S, p + 1, J)
    T_core: jax.Array  # rows of T of the core, (d, p + 1)
    K: jax.Array  # (d, d)
    Q: jax.Array  # (d, d)
    v: jax.Array  # (-β̂, 1)
    M: jax.Array  # S_x⁻¹ (p, p)


def _pieces(layout: Layout, theta: jax.Array, gram: Gram, rhs: Rhs) -> Pieces:
    """From the factorisation: with W = U⁻'Λ'(·), Z₁'V₁⁻¹B = B - W_A'W_B, no inverse formed."""
    red, d = lk.reduce(layout, theta, gram, rhs), layout.d
    f = red.factorised
    W_A = lk.forward_substitute(f.U[0], lk.scale_rows(f.lams[0], gram.own[0]))
    W_B = jnp.concatenate([f.border[0], red.row.chain[0][:, None]], axis=1)
    B = jnp.concatenate([gram.border[0], rhs.border[0][:, None]], axis=1)
    a = gram.own[0] - lk.per_level(W_A, W_A)
    every_a = a * gram.times[0] if gram.times else a
    P = B - lk.per_level(W_A, W_B)
    K = jnp.concatenate([f.schur[:d], red.row.schur[:d, None]], axis=1)
    half = lk.scale_core(layout, f.lams[1:], jnp.eye(d, dtype=theta.dtype)).T
    half = jax.scipy.linalg.solve_triangular(f.core[:d, :d], half, lower=True)
    Q = half.T @ half
    QK = Q @ K[:, d:]
    T, T_core = P[:, d:] - _left(QK.T, P[:, :d]), K[:, d:] - K[:, :d] @ QK
    v = jnp.append(-lk.fixef(red), 1.0).astype(theta.dtype)
    return Pieces(red, a, every_a, P[:, :d], T, T_core, K[:, :d], Q, v, lk.unscaled_vcov(red))


def _left(A: jax.Array, x: jax.Array) -> jax.Array:
    """A x for every row of the level's block: (k, m), (S, m, J) -> (S, k, J)."""
    return jnp.stack([A @ rows for rows in x])


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y' per level: (S, m, J), (R, m, J) -> (S, R, J), a fused multiply and add."""
    return jnp.sum(x[:, None] * y[None], axis=2)


def _outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """Σ over levels of x ⊗ y as one product: (a, b, J), (c, d, J) -> (a, b, c, d)."""
    J = x.shape[-1]
    return (x.reshape(-1, J) @ y.reshape(-1, J).T).reshape(*x.shape[:-1], *y.shape[:-1])


def _sigmas(layout: Layout, theta: jax.Array) -> list[jax.Array]:
    """Σ = ΛΛ' per factor, chain first."""
    lams = lk.factors(layout, theta)
    blocks = [lk.factor_lambda(terms, lams) for terms, _, _ in (*layout.chain, *layout.core)]
    return [b @ b.T for b in blocks]


def _sigma_derivatives(layout: Layout, theta: jax.Array) -> list[jax.Array]:
    """∂Σ/∂θ per factor, (n_theta, S, S)."""
    slopes = jax.jacfwd(lambda t: _sigmas(layout, t))(theta)
    return [jnp.moveaxis(s, -1, 0) for s in slopes]


def _parameters(layout: Layout, terms: tuple[int, ...]) -> np.ndarray:
    """Positions in θ of the parameters of some terms."""
    pieces = layout.split(np.arange(layout.n_theta))
    return np.concatenate([pieces[k] for k in terms])


def _core_blocks(layout: Layout) -> list[tuple[slice, int, int]]:
    """(columns, J, S) of each factor of the core."""
    ends = np.cumsum([0, *(S * J for _, S, J in layout.core)])
    return [
        (slice(int(a), int(b)), J, S)
        for a, b, (_, S, J) in zip(ends[:-1], ends[1:], layout.core, strict=True)
    ]


def _core_sums(layout: Layout, matrix: jax.Array) -> list[jax.Array]:
    """Sum of the diagonal blocks of a (d, d) matrix by factor: (S, S) each."""
    out = []
    for columns, J, S in _core_blocks(layout):
        block = matrix[columns, columns].reshape(J, S, J, S)
        out.append(jnp.einsum("jajb->ab", block))
    return out


def _apply_core(layout: Layout, E: list[jax.Array], x: jax.Array) -> jax.Array:
    """E_k x for every k: (n_theta, d, m)."""
    parts = []
    for (columns, J, S), e in zip(_core_blocks(layout), E, strict=True):
        rows = jnp.einsum("kst,jtm->kjsm", e, x[columns].reshape(J, S, -1))
        parts.append(rows.reshape(e.shape[0], J * S, -1))
    return jnp.concatenate(parts, axis=1)


def _pair(blocks: list[jax.Array], E: list[jax.Array]) -> jax.Array:
    """Σ over factors of tr(block' E_k), (k,)."""
    terms = [jnp.einsum("ab,kab->k", b, e) for b, e in zip(blocks, E, strict=True)]
    return jnp.sum(jnp.stack(terms), axis=0)


def _s_dot(layout: Layout, k: Pieces, E: list[jax.Array]) -> jax.Array:
    """Ṡ_k = T'E_k T, (n_theta, p + 1, p + 1)."""
    chain = jnp.einsum("kab,ambn->kmn", E[0], _outer(k.T, k.T))
    if not layout.core:
        return chain
    return chain + jnp.einsum("dm,kdn->kmn", k.T_core, _apply_core(layout, E[1:], k.T_core))


def _traces(layout: Layout, k: Pieces, E: list[jax.Array], C: jax.Array) -> jax.Array:
    """2 tr(C T'E_k Ã E_l T) - tr(Ã E_k Ã E_l), (n_theta, n_theta)."""
    H = _inner(_left(C, k.T), k.T)
    hessian = _double(_outer(2 * H - k.every_a, k.a), E[0], E[0])
    if not layout.core:
        return hessian
    return hessian + _core_traces(layout, k, E, C)


def _double(four: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Σ four[d, a, b, c] x_k[a, b] y_l[c, d]: Σ tr(F x_k G y_l) where four = Σ F ⊗ G."""
    return jnp.einsum("dabc,kab,lcd->kl", four, x, y)


def _core_traces(layout: Layout, k: Pieces, E: list[jax.Array], C: jax.Array) -> jax.Array:
    """What the core adds to :func:`_traces`; a few (d, d) products per parameter of the chain."""
    mine = _parameters(layout, layout.chain[0][0])
    e = E[0][mine]
    IQK = jnp.eye(layout.d, dtype=C.dtype) - k.Q @ k.K
    A_cc = k.K @ IQK
    # chain with chain
    mixed = _outer(_inner(_left(k.Q, k.P), k.P), k.a)
    M = jnp.einsum("kab,adbe->kde", e, _outer(k.P, k.P))
    G = jnp.einsum("kab,adbm->kdm", e, _outer(k.P, k.T))
    QM, QG = _left(k.Q, M), _left(k.Q, G)
    chain = _double(mixed, e, e)
    chain = chain + chain.T - jnp.einsum("kde,led->kl", QM, QM)
    chain = chain - 2 * jnp.einsum("mn,kdm,ldn->kl", C, G, QG)
    # chain with core
    ET = _apply_core(layout, E[1:], k.T_core)
    across = 2 * jnp.einsum("mn,kdm,ldn->kl", C, _left(IQK.T, G), ET)
    for i in range(len(mine)):
        across = across.at[i].add(-_pair(_core_sums(layout, IQK.T @ M[i] @ IQK), E[1:]))
    # core with core
    core = 2 * jnp.einsum("mn,kdm,ldn->kl", C, ET, _left(A_cc, ET))
    where = _core_blocks(layout)
    for (rows, J, S), x in zip(where, E[1:], strict=True):
        for (columns, other_J, other_S), y in zip(where, E[1:], strict=True):
            block = A_cc[rows, columns].reshape(J, S, other_J, other_S)
            core = core - _double(jnp.einsum("jaid,jbic->dabc", block, block), x, y)
    whole = core.at[jnp.ix_(mine, mine)].add(chain)
    return whole.at[mine].add(across).at[:, mine].add(across.T)


def closed_form(layout: Layout, method: str, theta: jax.Array, gram: Gram, rhs: Rhs) -> Derivatives:
    """The formulas of the module's header, for a layout with one factor in the chain."""
    k, E = _pieces(layout, theta, gram, rhs), _sigma_derivatives(layout, theta)
    p, reml = k.red.p, method == "REML"
    ratio = 1.0 / lk.profiled_sigma2(k.red, method)  # ν / r²
    C = ratio * jnp.outer(k.v, k.v)
    if reml:
        C = C.at[:p, :p].add(k.M)
    gamma = _gamma(layout, k, C)
    gradient = _pair(gamma, E)

    def linear_in_sigma(t: jax.Array) -> jax.Array:
        return _pair(gamma, [s[None] for s in _sigmas(layout, t)])[0]

    hessian = jax.hessian(linear_in_sigma)(theta) + _traces(layout, k, E, C)
    S_dot = _s_dot(layout, k, E)
    S_v = S_dot @ k.v
    along = S_v @ k.v
    hessian = hessian - 2 * ratio * S_v[:, :p] @ k.M @ S_v[:, :p].T
    hessian = hessian - ratio / k.red.r2 * jnp.outer(along, along)
    if reml:
        MS = jnp.einsum("ij,kjm->kim", k.M, S_dot[:, :p, :p])
        hessian = hessian - jnp.einsum("kij,lji->kl", MS, MS)
    return lk.deviance(k.red, method), gradient, 0.5 * (hessian + hessian.T)


def _gamma(layout: Layout, k: Pieces, C: jax.Array) -> list[jax.Array]:
    """Sums of the diagonal blocks of Ã - T C T' per factor, (S, S) each."""
    chain = jnp.sum(k.every_a - _inner(_left(C, k.T), k.T), axis=-1)
    if not layout.core:
        return [chain]
    chain = chain - jnp.sum(_inner(_left(k.Q, k.P), k.P), axis=-1)
    core = k.K - k.K @ k.Q @ k.K - k.T_core @ C @ k.T_core.T
    return [chain, *_core_sums(layout, core)]


def vcov_and_derivative(
    layout: Layout, method: str, theta: jax.Array, gram: Gram, rhs: Rhs
) -> tuple[jax.Array, jax.Array]:
    """Cov(β̂)(θ) with σ profiled, (p, p), and its derivatives in θ, (p, p, n_theta)."""
    if not has_closed_form(layout):

        def vcov(t: jax.Array) -> jax.Array:
            red = lk.reduce(layout, t, gram, rhs)
            return lk.profiled_sigma2(red, method) * lk.unscaled_vcov(red)

        return vcov(theta), jax.jacfwd(vcov)(theta)
    k = _pieces(layout, theta, gram, rhs)
    p, s2 = k.red.p, lk.profiled_sigma2(k.red, method)
    S_dot = jnp.moveaxis(_s_dot(layout, k, _sigma_derivatives(layout, theta)), 0, -1)
    slope = -jnp.einsum("m,mnk,n->k", k.v, S_dot, k.v) / lk.residual_df(k.red, method)
    dM = jnp.einsum("ia,abk,bj->ijk", k.M, S_dot[:p, :p], k.M)
    return s2 * k.M, k.M[..., None] * slope + s2 * dM

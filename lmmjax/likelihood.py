r"""The likelihood of the linear mixed model: one factorisation, read in several ways.

    y = X β + Z b + ε,   b = Λ_θ u,   u ~ N(0, σ² I_q),   ε ~ N(0, σ² R),   V = I + Λ' Z'R⁻¹Z Λ

    symbol   shape         meaning
    theta    (n_theta,)    free parameters of Λ, relative to σ (covariance.py)
    gram     Gram          Z'R⁻¹Z, Z'R⁻¹X, X'R⁻¹X by block, n, log|R|           (gram.py)
    rhs      Rhs           Z'R⁻¹y, X'R⁻¹y, y'R⁻¹y

With the random effects first, then X, then y, the Cholesky factor of

    [ Λ'Z'R⁻¹ZΛ + I   Λ'Z'R⁻¹X   Λ'Z'R⁻¹y ]          [ L_Z              ]
    [ .               X'R⁻¹X     X'R⁻¹y   ]  = L L',  L = [ L_XZ  L_X        ]
    [ .               .          y'R⁻¹y   ]          [ l_yZ  l_yX   r   ]

holds everything: |V_y/σ²| = |R| |L_Z|², X'V_y⁻¹X σ² = L_X L_X', β̂ = L_X⁻' l_yX', and
r² = min over (β, u) of |y - Xβ - ZΛu|²_R + |u|², the penalised residual sum of squares
(Bates, Maechler, Bolker and Walker 2015, J. Stat. Soft. 67(1), eqs 17 to 42).

:func:`reduce` is that factorisation. Factors in the chain are eliminated level by level on small
blocks; the core (crossed factors and X) is dense. The heads below it are the criteria: ML, REML,
each profiled over σ or not, and the marginal posterior's. There is no other copy of this
mathematics: estimates, tests, NUTS and batches all start from a :class:`Reduction`.

Where the products of a chain of one factor with the core's Z are sparse (``layout.sparse``), L⁻¹
of them would be as sparse but is never stored: G_i = Λ(Λ'AΛ + I)⁻¹Λ' per level stands between
the entries (cross.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax import cross as cr
from lmmjax.gram import Gram, Layout, Rhs

LOG_2PI = math.log(2 * math.pi)


class Factorised(NamedTuple):
    """The part of L that does not involve y. U_i = L_i' of chain factor i, levels last.

    The core's columns of Z are kept without their Λ, which is applied after the chain is gone.
    """

    lams: tuple[jax.Array, ...]  # Λ per factor, chain then core, (S, S)
    U: tuple[jax.Array, ...]  # (S_i, S_i, J_i) upper triangular
    up: tuple[tuple[jax.Array, ...], ...]  # L_i⁻¹ [.. Z_k], (S_i, S_k, J_i)
    border: tuple[jax.Array, ...]  # L_i⁻¹ [.. Z_core X], (S_i, d + p, J_i)
    schur: jax.Array  # what the chain leaves of [Z_core X]'R⁻¹[Z_core X], (d + p, d + p)
    core: jax.Array  # Cholesky factor of Λ'(schur)Λ + I (I on Z_core alone), (d + p, d + p)
    logdet: jax.Array  # log |V|, R included
    root: Any  # sparse layouts: L⁻¹Λ' of the chain, (S, S, J); border has X alone


class Row(NamedTuple):
    """The row of L that belongs to one right-hand side: l_y and r²."""

    chain: tuple[jax.Array, ...]  # (S_i, J_i)
    schur: jax.Array  # what the chain leaves of [Z_core X]'R⁻¹y, (d + p,)
    core: jax.Array  # (d + p,)
    r2: jax.Array


class Reduction(NamedTuple):
    """What the heads need: sizes n and p, log-determinants, L_X, l_yX and r²."""

    n: jax.Array
    logdet_V: jax.Array  # log |V_y| / σ² per row: log|R| + 2 log|L_Z|
    L_X: jax.Array  # (p, p)
    l_y: jax.Array  # (p,)
    r2: jax.Array  # ()
    factorised: Any  # Factorised, or None where only the heads are wanted (derivatives.reduce)
    row: Any  # Row, or None

    @property
    def p(self) -> int:
        return self.l_y.shape[0]

    @property
    def logdet_X(self) -> jax.Array:
        """log |X'V⁻¹X|."""
        return 2 * jnp.sum(jnp.log(jnp.diagonal(self.L_X)))


# -------------------------------------------------------------------------------------------------
# Λ applied to the blocks
# -------------------------------------------------------------------------------------------------


def factors(layout: Layout, theta: Any, units: Sequence[Any] = ()) -> list[Any]:
    """Λ of each term, in formula order; ``units`` are matrices to multiply them by, if any."""
    pieces = layout.split(theta)
    lams = [s.factor(t) for s, t in zip(layout.structures, pieces, strict=True)]
    return [B @ lam for B, lam in zip(units, lams, strict=True)] if units else lams


def factor_lambda(terms: tuple[int, ...], lams: list[jax.Array]) -> jax.Array:
    """Λ of all terms on one factor, block-diagonal (S, S)."""
    return jax.scipy.linalg.block_diag(*[lams[k] for k in terms])


def by_factor(layout: Layout, lams: list[jax.Array]) -> list[jax.Array]:
    """Λ per factor, chain then core, from Λ per term."""
    return [factor_lambda(terms, lams) for terms, _, _ in (*layout.chain, *layout.core)]


def scale_core(layout: Layout, lams: Sequence[jax.Array], a: jax.Array) -> jax.Array:
    """Multiply the first d entries of the last axis by blockdiag(I_J ⊗ Λ); the rest stays.

    ``lams`` are those of the core's factors.
    """
    if not layout.core:
        return a
    if all(S == 1 for _, S, _ in layout.core):
        return a * _core_scales(layout, lams, a)
    parts, at = [], 0
    for lam, (_, S, J) in zip(lams, layout.core, strict=True):
        block = a[..., at : at + S * J].reshape(*a.shape[:-1], J, S)
        parts.append((block @ lam).reshape(*a.shape[:-1], S * J))
        at += S * J
    return jnp.concatenate([*parts, a[..., at:]], axis=-1)


def _core_scales(layout: Layout, lams: Sequence[jax.Array], a: jax.Array) -> jax.Array:
    """The λ of each entry of the last axis of ``a``, where every factor of the core has one."""
    parts = [jnp.full(J, lam[0, 0]) for lam, (_, _, J) in zip(lams, layout.core, strict=True)]
    # written out: in a fused loop over a matrix the pieces would be told apart at each entry
    return jax.lax.optimization_barrier(
        jnp.concatenate([*parts, jnp.ones(a.shape[-1] - layout.d, a.dtype)])
    )


def conjugate_core(layout: Layout, lams: Sequence[jax.Array], a: jax.Array) -> jax.Array:
    """Λ'aΛ for symmetric ``a`` by :func:`scale_core` from both sides."""
    if not layout.core:
        return a
    if all(S == 1 for _, S, _ in layout.core):
        scales = _core_scales(layout, lams, a)
        return a * (scales[:, None] * scales)
    return scale_core(layout, lams, scale_core(layout, lams, a).T)


#: columns of a factor up to which products with its Λ are unrolled
SMALL_LAMBDA = 4


def scale_rows(lam: jax.Array, a: jax.Array) -> jax.Array:
    """Λ' a for blocks (S, ..., J); fused with what reads it where Λ is small."""
    S = lam.shape[0]
    if S > SMALL_LAMBDA:
        return jnp.tensordot(lam.T, a, 1)
    return jnp.stack([sum(lam[t, s] * a[t] for t in range(S)) for s in range(S)])


def _scale_both(left: jax.Array, a: jax.Array, right: jax.Array) -> jax.Array:
    """Λ_i' a Λ_k for blocks (S_i, S_k, J)."""
    return jnp.swapaxes(scale_rows(right, jnp.swapaxes(scale_rows(left, a), 0, 1)), 0, 1)


class _Blocks(NamedTuple):
    """The scaled matrix while it is eliminated: the lists change as the elimination proceeds."""

    own: list[jax.Array]
    up: list[list[jax.Array]]
    border: list[jax.Array]
    core: list[jax.Array]  # one element


def _assemble(lams: Sequence[jax.Array], gram: Gram) -> _Blocks:
    """The chain's Λ applied from both sides, I added: the matrix that is eliminated."""
    own, up, border = [], [], []
    for i, lam in enumerate(lams):
        eye = jnp.eye(lam.shape[0], dtype=lam.dtype)[..., None]
        own.append(_scale_both(lam, gram.own[i], lam) + eye)
        upper = zip(gram.up[i], lams[i + 1 :], strict=True)
        up.append([_scale_both(lam, a, right) for a, right in upper])
        border.append(scale_rows(lam, gram.border[i]))
    return _Blocks(own, up, border, [jnp.asarray(gram.core)])


# -------------------------------------------------------------------------------------------------
# The factorisation
# -------------------------------------------------------------------------------------------------


def _sweep(own: jax.Array, rest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cholesky of many small matrices at once: own = U'U -> U, U⁻' rest.

    ``own`` (S, S, J), ``rest`` (S, m, J). One rank-one update a column, on vectors over levels.
    """
    S = own.shape[0]
    M = jnp.concatenate([own, rest], axis=1)
    upper, solved = [], []
    for k in range(S):
        row = M[0] / jnp.sqrt(M[0, 0])
        upper.append(jnp.concatenate([jnp.zeros((k, row.shape[-1]), row.dtype), row[: S - k]]))
        solved.append(row[S - k :])
        M = M[1:, 1:] - row[1 : S - k, None] * row[None, 1:]
    return jnp.stack(upper), jnp.stack(solved)


def forward_substitute(U: jax.Array, rhs: jax.Array) -> jax.Array:
    """Solve U'x = rhs by level: (S, S, J), (S, ..., J)."""
    x: list[jax.Array] = []
    for s in range(U.shape[0]):
        x.append((rhs[s] - sum(U[t, s] * x[t] for t in range(s))) / U[s, s])
    return jnp.stack(x)


def scaled_inverse(U: jax.Array, lam: jax.Array) -> jax.Array:
    """U'⁻¹Λ' by level: (S, S, J)."""
    return forward_substitute(U, jnp.broadcast_to(lam.T[..., None], U.shape))


def _backward(U: jax.Array, rhs: jax.Array) -> jax.Array:
    """Solve U x = rhs by level: (S, S, J), (S, J)."""
    S = U.shape[0]
    x: dict[int, jax.Array] = {}
    for s in reversed(range(S)):
        x[s] = (rhs[s] - sum(U[s, t] * x[t] for t in range(s + 1, S))) / U[s, s]
    return jnp.stack([x[s] for s in range(S)])


def _to_parent(parent: jax.Array, values: jax.Array, J: int) -> jax.Array:
    """Sum the last axis (levels) by the level of the parent factor in which each lies."""
    return jnp.zeros((*values.shape[:-1], J), values.dtype).at[..., parent].add(values)


def matvec(N: jax.Array, x: jax.Array) -> jax.Array:
    """N x per level: (S, R, J), (R, k, J) -> (S, k, J); unrolled over R."""
    first, *others = (N[:, r, None] * x[r][None] for r in range(N.shape[1]))
    return sum(others, first)


def per_level(a: jax.Array, b: jax.Array) -> jax.Array:
    """a'b per level: (S, m, J), (S, k, J) -> (m, k, J). Unrolled over S into one fused loop."""
    first, *others = (x[:, None] * y[None] for x, y in zip(a, b, strict=True))
    return sum(others, first)


def over_levels(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum over levels and S of a'b: (S, m, J), (S, k, J) -> (m, k), as S plain products."""
    first, *others = (x @ y.T for x, y in zip(a, b, strict=True))
    return sum(others, first)


#: rows of a product with itself beyond which only the blocks below the diagonal are formed
BLOCK = 512


def row_blocks(m: int) -> list[tuple[int, int]]:
    """Cut m rows into blocks for symmetric products: one up to 2 BLOCK rows, at most eight."""
    count = 1 if m <= 2 * BLOCK else min(8, m // BLOCK)
    return list(itertools.pairwise(int(c) for c in np.linspace(0, m, count + 1)))


def self_products(a: jax.Array) -> jax.Array:
    """:func:`over_levels` of a with itself, without the upper half where that pays."""
    blocks = row_blocks(a.shape[1])
    if len(blocks) == 1:
        return over_levels(a, a)
    rows = [over_levels(a[:, i:j], a[:, :j]) for i, j in blocks]
    padded = [jnp.pad(r, ((0, 0), (0, a.shape[1] - r.shape[1]))) for r in rows]
    lower = jnp.tril(jnp.concatenate(padded))
    return lower + jnp.tril(lower, -1).T


def _eliminate(
    layout: Layout, blocks: _Blocks, gram: Gram, i: int
) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
    """Eliminate factor i of the chain; returns U, and L⁻¹ of the blocks to its right."""
    U, W = _sweep(blocks.own[i], jnp.concatenate([*blocks.up[i], blocks.border[i]], axis=1))
    W_up, at = [], 0
    for _, S, _ in layout.chain[i + 1 :]:
        W_up.append(W[:, at : at + S])
        at += S
    W = W[:, at:]
    if gram.cross is None:
        blocks.core[0] = blocks.core[0] - self_products(W)
    for a, (W_k, parent) in enumerate(zip(W_up, gram.parent[i], strict=True)):
        k = i + 1 + a
        J = layout.chain[k][2]
        blocks.own[k] = blocks.own[k] - _to_parent(parent, per_level(W_k, W_k), J)
        blocks.border[k] = blocks.border[k] - _to_parent(parent, per_level(W_k, W), J)
        for b, W_l in enumerate(W_up[a + 1 :]):
            blocks.up[k][b] = blocks.up[k][b] - _to_parent(parent, per_level(W_k, W_l), J)
    return U, tuple(W_up), W


class Chain(NamedTuple):
    """What the elimination of the chain leaves; fields as in :class:`Factorised`.

    ``schur`` and ``logdet`` add over the levels of a factor by itself.
    """

    U: tuple[jax.Array, ...]
    up: tuple[tuple[jax.Array, ...], ...]
    border: tuple[jax.Array, ...]
    root: Any
    schur: jax.Array
    logdet: jax.Array


def eliminate_chain(layout: Layout, every: Sequence[jax.Array], gram: Gram) -> Chain:
    """Eliminate the chain level by level; ``every`` are the Λ per factor, chain then core."""
    c = len(layout.chain)
    blocks = _assemble(every[:c], gram)
    logdet = jnp.asarray(gram.logdet_R, blocks.core[0].dtype)
    Us, ups, borders = [], [], []
    for i in range(c):
        U, W_up, W = _eliminate(layout, blocks, gram, i)
        # pivots by slices: a gathered diagonal of (S, S, J) costs five times the whole elimination
        logs = sum(jnp.log(U[s, s]) for s in range(U.shape[0]))
        logdet = logdet + 2 * jnp.sum(logs * gram.times[i] if gram.times else logs)
        Us.append(U)
        ups.append(W_up)
        borders.append(W)
    root = None
    if gram.cross is not None:
        root = scaled_inverse(Us[0], every[0])
        blocks.core[0] = _less_sparse_products(layout, gram, root, borders[0])
    return Chain(tuple(Us), tuple(ups), tuple(borders), root, blocks.core[0], logdet)


def factorise(layout: Layout, lams: list[jax.Array], gram: Gram) -> Factorised:
    """The Cholesky factor without its last row: all that does not involve y.

    O(J (S³ + S² m + S m²)) for the chain with m = d + p, and O((d + p)³) for the core.
    """
    every = by_factor(layout, lams)
    return _factorise_core(layout, every, eliminate_chain(layout, every, gram))


def _factorise_core(layout: Layout, every: list[jax.Array], chain: Chain) -> Factorised:
    lams, schur = every[len(layout.chain) :], chain.schur
    full = conjugate_core(layout, lams, schur)
    if layout.d:
        at = jnp.arange(len(schur))
        full = jnp.where((at[:, None] == at) & (at < layout.d), full + 1.0, full)
    # transposed, as LAPACK goes by columns: of a symmetric matrix that costs nothing
    L = jnp.tril(jax.lax.linalg.cholesky(full.T, symmetrize_input=False))
    logdet = chain.logdet + 2 * jnp.sum(jnp.log(jnp.diagonal(L)[: layout.d]))
    U, up, border, root, _, _ = chain
    return Factorised(tuple(every), U, up, border, schur, L, logdet, root)


def _less_sparse_products(layout: Layout, gram: Gram, root: jax.Array, W: jax.Array) -> jax.Array:
    """The core less the [Z_c X]'-products of a sparse chain: (d + p, d + p)."""
    zx = cr.to_core(gram.cross, per_level(root, W), layout.d)
    beside = jnp.concatenate([zx, over_levels(W, W)])
    core = jnp.asarray(gram.core)
    return cr.subtract_levels(gram.cross, per_level(root, root), beside, core)


def forward(layout: Layout, f: Factorised, gram: Gram, rhs: Rhs) -> Row:
    """The row of L for one right-hand side: O(J S m) after the factorisation."""
    return _forward_core(layout, f, *_forward_chain(layout, f.lams, f, gram, rhs))


def _forward_chain(
    layout: Layout, every: Sequence[jax.Array], f: Factorised | Chain, gram: Gram, rhs: Rhs
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """The chain's part of the row, and what it leaves of [Z_core X]'R⁻¹y and y'R⁻¹y."""
    c = len(layout.chain)
    z = [scale_rows(lam, a) for lam, a in zip(every[:c], rhs.border, strict=True)]
    core, r2 = rhs.core, rhs.yy
    rows = []
    for i in range(c):
        row = forward_substitute(f.U[i], z[i])
        core = core - _border_products(layout, f, gram, i, row[:, None])[:, 0]
        r2 = r2 - jnp.sum(row**2)
        for a, (W, parent) in enumerate(zip(f.up[i], gram.parent[i], strict=True)):
            k = i + 1 + a
            z[k] = z[k] - _to_parent(parent, per_level(W, row[:, None])[:, 0], layout.chain[k][2])
        rows.append(row)
    return tuple(rows), core, r2


def _forward_core(
    layout: Layout, f: Factorised, rows: tuple[jax.Array, ...], core: jax.Array, r2: jax.Array
) -> Row:
    scaled = scale_core(layout, f.lams[len(layout.chain) :], core)
    l_y = jax.scipy.linalg.solve_triangular(f.core, scaled, lower=True)
    return Row(rows, core, l_y, r2 - l_y @ l_y)


class Rows(NamedTuple):
    """Rows of data [Z X], each by its level of every chain factor; the core dense."""

    z: tuple[jax.Array, ...]  # chain i: (m, S_i)
    codes: tuple[jax.Array, ...]  # chain i: (m,)
    core: jax.Array  # [Z_core X], (m, d + p)


def forward_rows(
    layout: Layout, f: Factorised, gram: Gram, rows: Rows
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """L⁻¹ of rows of [Z X]: chain i (S_i, m), core (m, d + p); dense layouts only.

    :func:`forward` for right-hand sides that touch one level of each chain factor: O(S² + S m + m²)
    a row, m = d + p, whatever the number of levels. The squared length of such a row is t'C⁻¹t, C
    Henderson's coefficient matrix.
    """
    c = len(layout.chain)
    z = [lam.T @ a.T for lam, a in zip(f.lams[:c], rows.z, strict=True)]
    core, out = rows.core, []
    for i, code in enumerate(rows.codes):
        row = forward_substitute(f.U[i][..., code], z[i])
        core = core - per_level(f.border[i][..., code], row[:, None])[:, 0].T
        for a, W in enumerate(f.up[i]):
            z[i + 1 + a] = z[i + 1 + a] - per_level(W[..., code], row[:, None])[:, 0]
        out.append(row)
    scaled = scale_core(layout, f.lams[c:], core)
    return tuple(out), jax.scipy.linalg.solve_triangular(f.core, scaled.T, lower=True).T


def _border_products(
    layout: Layout, f: Factorised | Chain, gram: Gram, i: int, rows: jax.Array
) -> jax.Array:
    """Border'rows of chain factor i, summed over levels: (S, k, J) -> (d + p, k)."""
    dense = over_levels(f.border[i], rows)
    if f.root is None:
        return dense
    return jnp.concatenate([cr.to_core(gram.cross, per_level(f.root, rows), layout.d), dense])


def _border_times(layout: Layout, f: Factorised, gram: Gram, i: int, known: jax.Array) -> jax.Array:
    """Border times known values of the core's effects and β: (d + p,) -> (S, J)."""
    if f.root is None:
        return jnp.stack([known @ W for W in f.border[i]])
    d, J = layout.d, layout.chain[0][2]
    dense = jnp.stack([known[d:] @ W for W in f.border[i]])
    sparse = cr.from_core(gram.cross, known[:d, None], J)[:, 0]
    return dense + jnp.sum(f.root * sparse[None], axis=1)


def reduce(
    layout: Layout, theta: jax.Array, gram: Gram, rhs: Rhs, units: Sequence[Any] = ()
) -> Reduction:
    """Factorise once. Differentiable in every array argument; jit, vmap and scan as you like.

    Parameters
    ----------
    layout : Layout
        Static description of the model.
    theta : array, shape (n_theta,)
        Parameters of Λ.
    gram, rhs : Gram, Rhs
        Cross-products.
    units : sequence of arrays, optional
        B⁻¹ per term, where ``theta`` is in other units than ``gram`` (Λ_gram = B⁻¹ Λ; any factor
        of the covariance serves, triangular or not).

    Returns
    -------
    Reduction

    Notes
    -----
    Nothing depends on the number of rows; see :func:`factorise` and :func:`forward` for the cost.
    """
    return reduce_factors(layout, factors(layout, theta, units), gram, rhs)


def reduce_factors(layout: Layout, lams: list[jax.Array], gram: Gram, rhs: Rhs) -> Reduction:
    """:func:`reduce` from the factors Λ themselves, one (S, S) matrix a term."""
    every = by_factor(layout, lams)
    chain = eliminate_chain(layout, every, gram)
    rows, core, r2 = _forward_chain(layout, every, chain, gram, rhs)
    if is_plain(layout):  # arrays by level then cost nothing unless they are read
        schur, logdet, core, r2 = _chain_sums(layout, every[0], gram, rhs)
        chain = chain._replace(schur=schur, logdet=logdet)
    f = _factorise_core(layout, every, chain)
    row = _forward_core(layout, f, rows, core, r2)
    d, n = layout.d, jnp.asarray(gram.n, f.core.dtype)
    return Reduction(n, f.logdet, f.core[d:, d:], row.core[d:], row.r2, f, row)


# -------------------------------------------------------------------------------------------------
# Blocks of levels
# -------------------------------------------------------------------------------------------------


def is_plain(layout: Layout) -> bool:
    """Whether one factor by itself is eliminated."""
    return len(layout.chain) == 1 and layout.d == 0


def over_blocks(
    layout: Layout, part: Callable[[jax.Array, jax.Array, Any], Any], gram: Gram, rhs: Rhs
) -> Any:
    """Σ of ``part(A, [B y], times)`` over equal blocks of the levels of a factor by itself.

    Arrays with a number for every level need more than the cache where levels are many, and fresh
    memory from the system for every evaluation; those of a block need neither.
    """
    if layout.blocks == 1:
        B = jnp.concatenate([gram.border[0], rhs.border[0][:, None]], axis=1)
        return part(gram.own[0], B, gram.times)
    size = layout.chain[0][2] // layout.blocks

    def one(i: Any) -> Any:
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, i * size, size, axis=-1)  # noqa: E731
        B = jnp.concatenate([cut(gram.border[0]), cut(rhs.border[0])[:, None]], axis=1)
        levels = cut(gram.own[0]), B, tuple(cut(a) for a in gram.times)
        # copied at once: fused into what reads them, slices and join make it half as fast
        return part(*jax.lax.optimization_barrier(levels))

    start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one, 0))
    add = lambda i, total: jax.tree.map(jnp.add, total, one(i))  # noqa: E731
    return jax.lax.fori_loop(0, layout.blocks, add, start)


def plain_root(lam: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
    """U with U'U = Λ'AΛ + I, and U⁻'Λ', by level: (S, S, J) each."""
    eye = jnp.eye(len(lam), dtype=lam.dtype)[..., None]
    scaled = _scale_both(lam, own, lam) + eye
    return _sweep(scaled, jnp.broadcast_to(lam.T[..., None], scaled.shape))


def _chain_sums(
    layout: Layout, lam: jax.Array, gram: Gram, rhs: Rhs
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What a factor by itself leaves of [X y]'R⁻¹[X y] (xx, xy and yy), and log|V|, by blocks."""

    def part(A: jax.Array, B: jax.Array, times: Any) -> tuple[jax.Array, jax.Array]:
        U, root = jax.lax.optimization_barrier(plain_root(lam, A))
        logs = sum(jnp.log(U[s, s]) for s in range(len(lam)))
        W = jax.lax.optimization_barrier(matvec(root, B))
        return over_levels(W, W), jnp.sum(logs * times[0] if times else logs)

    products, logs = over_blocks(layout, part, gram, rhs)
    p = layout.p
    schur, core = gram.core - products[:p, :p], rhs.core - products[:p, p]
    return schur, gram.logdet_R + 2 * logs, core, rhs.yy - products[p, p]


# -------------------------------------------------------------------------------------------------
# Heads: -2 log-likelihoods, small functions of a Reduction
# -------------------------------------------------------------------------------------------------


def residual_df(red: Reduction, method: str) -> jax.Array:
    """ν: n for ML, n - p for REML."""
    return red.n - (red.p if method == "REML" else 0)


def profiled_sigma2(red: Reduction, method: str) -> jax.Array:
    """σ̂²(θ) = r² / ν (Bates et al. 2015, eqs 32 and 41)."""
    return red.r2 / residual_df(red, method)


def logdets(red: Reduction, method: str) -> jax.Array:
    """log |V|, and for REML + log |X'V⁻¹X|."""
    return red.logdet_V + (red.logdet_X if method == "REML" else 0.0)


def deviance(red: Reduction, method: str, sigma2: jax.Array | None = None) -> jax.Array:
    """-2 log-likelihood, profiled over β and, where ``sigma2`` is None, over σ² as well.

    ``method="REML"`` integrates β out instead (Bates et al. 2015, eqs 34 and 42).
    """
    nu = residual_df(red, method)
    s2 = profiled_sigma2(red, method) if sigma2 is None else sigma2
    return logdets(red, method) + nu * (LOG_2PI + jnp.log(s2)) + red.r2 / s2


def quadratic(red: Reduction) -> tuple[jax.Array, jax.Array, jax.Array]:
    """S = [X y]'V⁻¹[X y] as its blocks X'V⁻¹X, X'V⁻¹y, y'V⁻¹y (times σ²)."""
    return red.L_X @ red.L_X.T, red.L_X @ red.l_y, red.r2 + red.l_y @ red.l_y


def loglik_given_beta(red: Reduction, beta: jax.Array, sigma2: jax.Array) -> jax.Array:
    """log p(y | β, θ, σ), random effects integrated out."""
    xx, xy, yy = quadratic(red)
    rss = yy - 2 * beta @ xy + beta @ xx @ beta
    return -0.5 * (red.logdet_V + red.n * (LOG_2PI + jnp.log(sigma2)) + rss / sigma2)


def loglik_gaussian_beta(
    red: Reduction, mean: jax.Array, precision: jax.Array, logdet: jax.Array, sigma2: jax.Array
) -> jax.Array:
    """log p(y | θ, σ) with β ~ N(mean, precision⁻¹) integrated out; ``logdet`` of the precision.

    A flat prior is precision 0 and logdet 0: the restricted likelihood, up to its constant.
    """
    xx, xy, yy = quadratic(red)
    Q = xx / sigma2 + precision
    L = jnp.linalg.cholesky(Q)
    half = jax.scipy.linalg.solve_triangular(L, xy / sigma2 + precision @ mean, lower=True)
    rss = yy / sigma2 + mean @ precision @ mean - half @ half
    logdet_Q = 2 * jnp.sum(jnp.log(jnp.diagonal(L))) - logdet
    return -0.5 * (red.logdet_V + red.n * (LOG_2PI + jnp.log(sigma2)) + logdet_Q + rss)


# -------------------------------------------------------------------------------------------------
# Effects
# -------------------------------------------------------------------------------------------------


def fixef(red: Reduction) -> jax.Array:
    """β̂(θ), generalised least squares, shape (p,)."""
    return jax.scipy.linalg.solve_triangular(red.L_X, red.l_y, lower=True, trans=1)


def unscaled_vcov(red: Reduction) -> jax.Array:
    """(X'V⁻¹X)⁻¹ in units of σ², shape (p, p)."""
    inverse = jax.scipy.linalg.solve_triangular(
        red.L_X, jnp.eye(red.p, dtype=red.L_X.dtype), lower=True
    )
    return inverse.T @ inverse


def ranef(
    layout: Layout,
    gram: Gram,
    red: Reduction,
    beta: jax.Array,
    noise: tuple[jax.Array, ...] | None = None,
) -> tuple[jax.Array, ...]:
    """b given β and θ by back-substitution: its mode, or with ``noise`` an exact draw.

    Parameters
    ----------
    noise : tuple of arrays, optional
        N(0, σ²) numbers, one array (S, J) per factor in the order chain, core.

    Returns
    -------
    tuple of arrays
        b per factor, (S, J), chain first.
    """
    f, d, c = red.factorised, layout.d, len(layout.chain)
    every = (*layout.chain, *layout.core)
    z = noise if noise is not None else [jnp.zeros((S, J), beta.dtype) for _, S, J in every]
    rhs = red.row.core[:d] - f.core[d:, :d].T @ beta
    rhs = rhs + jnp.concatenate([jnp.zeros(0, beta.dtype), *[a.T.reshape(-1) for a in z[c:]]])
    u_core = jax.scipy.linalg.solve_triangular(f.core[:d, :d], rhs, lower=True, trans=1)
    core, at = [], 0
    for lam, (_, S, J) in zip(f.lams[c:], layout.core, strict=True):
        core.append(lam @ u_core[at : at + S * J].reshape(J, S).T)
        at += S * J
    known = jnp.concatenate([*[b.T.reshape(-1) for b in core], beta])
    u: dict[int, jax.Array] = {}
    for i in reversed(range(c)):
        rhs = red.row.chain[i] - _border_times(layout, f, gram, i, known) + z[i]
        for k, (W, parent) in enumerate(zip(f.up[i], gram.parent[i], strict=True)):
            rhs = rhs - jnp.einsum("stj,tj->sj", W, u[i + 1 + k][:, parent])
        u[i] = _backward(f.U[i], rhs)
    return (*[f.lams[i] @ u[i] for i in range(c)], *core)


def residual_square(
    layout: Layout, gram: Gram, rhs: Rhs, beta: jax.Array, b: Sequence[jax.Array]
) -> jax.Array:
    """|y - Xβ - Zb|² in the metric R⁻¹, from cross-products alone.

    Parameters
    ----------
    b : sequence of arrays
        Per factor (S, J), chain first.
    """
    c, d = len(layout.chain), layout.d
    known = jnp.concatenate([*[x.T.reshape(-1) for x in b[c:]], beta])
    total = rhs.yy + known @ (gram.core @ known - 2 * rhs.core)
    for i, mine in enumerate(b[:c]):
        others = jnp.stack([known[-a.shape[0] :] @ a for a in gram.border[i]])
        if gram.cross is not None:
            others = others + cr.from_core(gram.cross, known[:d, None], mine.shape[-1])[:, 0]
        for k, (a, parent) in enumerate(zip(gram.up[i], gram.parent[i], strict=True)):
            others = others + jnp.einsum("stj,tj->sj", a, b[i + 1 + k][:, parent])
        own = jnp.einsum("stj,tj->sj", gram.own[i], mine)
        total = total + jnp.sum(mine * (own + 2 * (others - rhs.border[i])))
    return total


def inverse_from_cholesky(L: jax.Array) -> jax.Array:
    """(LL')⁻¹: by halves, so that nearly all of the work is matrix products, 0.8 d³ of them.

    What is known to be zero or symmetric is left out in blocks of an eighth of the columns, of 200
    at least: smaller ones take longer to compile and gain nothing.
    """
    d = len(L)
    block = max(200, -(-d // 8))
    # LAPACK's factor stands by columns: that of L' by rows
    inverse = _inverse_triangular(L.T, block)
    if d <= block:
        return inverse @ inverse.T
    out = jnp.zeros_like(L)
    for a, b in itertools.pairwise(np.linspace(0, d, -(-d // block) + 1).astype(int)):
        rows = inverse[a:b, a:] @ inverse[:b, a:].T
        out = out.at[a:b, :b].set(rows)
        if a:
            out = out.at[:a, a:b].set(rows[:, :a].T)
    return out


def _sparse_ranef_cov(layout: Layout, theta: jax.Array, gram: Gram) -> tuple[jax.Array, ...]:
    f, d = factorise(layout, factors(layout, theta), gram), layout.d
    Q = conjugate_core(layout, [lam.T for lam in f.lams[1:]], inverse_from_cholesky(f.core[:d, :d]))
    G = per_level(f.root, f.root)
    middle = cr.conjugate_core(gram.cross, Q, layout.chain[0][2])
    chain = G + per_level(G, per_level(middle, G))
    core, at = [], 0
    for _, S, J in layout.core:
        part = Q[at : at + S * J, at : at + S * J].reshape(J, S, J, S)
        core.append(jnp.einsum("jsjt->stj", part))
        at += S * J
    return (chain, *core)


def _inverse_triangular(U: jax.Array, block: int) -> jax.Array:
    """U⁻¹ of an upper triangular matrix."""
    d = len(U)
    if d <= block:
        eye = jnp.eye(d, dtype=U.dtype)
        return jax.lax.linalg.triangular_solve(U, eye, left_side=True, lower=False)
    h = d // 2
    first, last = _inverse_triangular(U[:h, :h], block), _inverse_triangular(U[h:, h:], block)
    corner = -_times_upper(_upper_times(first, U[:h, h:], block), last, block)
    return jnp.block([[first, corner], [jnp.zeros((d - h, h), U.dtype), last]])


def _upper_times(U: jax.Array, a: jax.Array, block: int) -> jax.Array:
    """U a without most of the products with zeros below the diagonal of U."""
    if len(U) <= block:
        return U @ a
    h = len(U) // 2
    return jnp.concatenate([U[:h] @ a, _upper_times(U[h:, h:], a[h:], block)])


def _times_upper(a: jax.Array, U: jax.Array, block: int) -> jax.Array:
    """a U, likewise."""
    if len(U) <= block:
        return a @ U
    h = len(U) // 2
    return jnp.concatenate([_times_upper(a[:, :h], U[:h, :h], block), a @ U[:, h:]], axis=1)


def ranef_cov(layout: Layout, theta: jax.Array, gram: Gram) -> tuple[jax.Array, ...]:
    r"""Covariance of b - b̂ per level, in units of σ²: (S, S, J) per factor, chain first.

    Given β and θ, as lme4's conditional variances.

    Notes
    -----
    Since ∂ log|Λ'AΛ + I| / ∂A = Λ(Λ'AΛ + I)⁻¹Λ', the blocks are the gradient of the ML
    log-determinant in the cross-products: one reverse pass, no inverse is formed. One factor by
    itself has Λ U⁻¹U⁻'Λ' in closed form, at half the compilation. In a sparse layout, whose core
    is large, by the inverse Q = Λ_c(core)⁻¹Λ_c' instead: its diagonal blocks, and
    G_i + G_iB_iQB_i'G_i for the chain.
    """
    if layout.sparse:
        return _sparse_ranef_cov(layout, theta, gram)
    if layout.d == 0 and len(layout.chain) == 1:
        f = factorise(layout, factors(layout, theta), gram)
        root = scaled_inverse(f.U[0], f.lams[0])
        return (per_level(root, root),)

    def logdet(own: tuple[jax.Array, ...], core: jax.Array) -> jax.Array:
        moved = gram._replace(own=own, core=core)
        return factorise(layout, factors(layout, theta), moved).logdet

    own, core = jax.grad(logdet, argnums=(0, 1))(gram.own, gram.core)
    blocks, at = [0.5 * (a + jnp.swapaxes(a, 0, 1)) for a in own], 0
    for _, S, J in layout.core:
        part = core[at : at + S * J, at : at + S * J].reshape(J, S, J, S)
        part = jnp.einsum("jsjt->stj", part)
        blocks.append(0.5 * (part + jnp.swapaxes(part, 0, 1)))
        at += S * J
    return tuple(blocks)

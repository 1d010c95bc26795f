r"""Sources of cross-products: φ -> Gram, Rhs, to be fed to ``likelihood.reduce``.

With columns M = [Z X y] in standardised units everything is a sum over residual subjects of
C_i(φ) = M_i' R_i⁻¹ M_i. Z is local: a subject that meets m levels of a factor of S columns has m S
columns of it, and ``Where`` knows which levels they stand for. All sources are pytrees with static
sizes, so models of equal shape and structure share compiled code.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax.gram import Gram, Layout, Rhs
from lmmjax.residual.structures import Structure

Array = Any
T = TypeVar("T")


# -------------------------------------------------------------------------------------------------
# From local columns to the blocks of the Gram
# -------------------------------------------------------------------------------------------------


class Where(NamedTuple):
    """Which levels the local columns of each subject stand for (arrays), subjects first."""

    chain: tuple[Array, ...]  # per chain factor: level of the subject, (G,)
    core: Array  # columns of the dense core behind the local ones, X last: (G, k + p)
    parent: tuple[tuple[Array, ...], ...]  # Gram.parent


def assemble(layout: Layout, where: Where, C: Array, n: Array, logdet: Array) -> tuple[Gram, Rhs]:
    """Sum C_i (G, K, K) by level and into the core: O(G K²), linear in C.

    Local columns are ordered: chain factors (S each), core factors (slots by S each), X, y.
    """
    parts, rest = _cut(layout, C.shape[1] - 1)
    D = layout.d + layout.p
    own, up, border = [], [], []
    for i, (mine, (_, S, J)) in enumerate(zip(parts, layout.chain, strict=True)):
        by_level = functools.partial(_by_level, codes=where.chain[i], J=J)
        own.append(by_level(C[:, mine, mine]))
        up.append(tuple(by_level(C[:, mine, other]) for other in parts[i + 1 :]))
        to_core = jnp.moveaxis(C[:, mine, rest], 1, 0)
        if layout.core:
            out = jnp.zeros((S, D, J), C.dtype)
            border.append(out.at[:, where.core, where.chain[i][:, None]].add(to_core))
        else:
            border.append(by_level(C[:, mine, rest]))
    if layout.core:
        core = jnp.zeros((D, D), C.dtype)
        core = core.at[where.core[:, :, None], where.core[:, None, :]].add(C[:, rest, rest])
    else:
        core = jnp.sum(C[:, rest, rest], axis=0)
    gram = Gram(tuple(own), tuple(up), where.parent, tuple(border), core, n, logdet)
    return gram, assemble_rhs(layout, where, C[:, :, -1])


def assemble_rhs(layout: Layout, where: Where, c: Array) -> Rhs:
    """The part of :func:`assemble` that involves y, from the last columns of C_i, (G, K)."""
    parts, rest = _cut(layout, c.shape[1] - 1)
    levels = zip(parts, where.chain, layout.chain, strict=True)
    border = tuple(_by_level(c[:, mine], codes, J) for mine, codes, (_, _, J) in levels)
    if layout.core:
        core = jnp.zeros(layout.d + layout.p, c.dtype).at[where.core].add(c[:, rest])
    else:
        core = jnp.sum(c[:, rest], axis=0)
    return Rhs(border, core, jnp.sum(c[:, -1]))


def _cut(layout: Layout, end: int) -> tuple[list[slice], slice]:
    """Local columns of each chain factor, and those of the core and X up to ``end``."""
    at = np.cumsum([0, *(S for _, S, _ in layout.chain)])
    parts = [slice(int(a), int(b)) for a, b in itertools.pairwise(at)]
    return parts, slice(int(at[-1]), end)


def _by_level(x: Array, codes: Array, J: int) -> Array:
    """Sum over subjects by level; the level becomes the last axis."""
    return jnp.moveaxis(jax.ops.segment_sum(x, codes, num_segments=J), 0, -1)


# -------------------------------------------------------------------------------------------------
# Whitened rows
# -------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Block:
    """Subjects of similar length, padded to T rows of zeros; rows in order of position."""

    M: Array  # (G, T, K)
    mask: Array  # (G, T) 1 for a row, 0 for padding
    H: Array  # (G, T, n_variances)
    pos: Array  # (G, T, dim)
    pattern: Array  # (G,) int: which set of positions
    patterns: Array  # (P, T, dim)
    pattern_mask: Array  # (P, T)


def correlations(structure: Structure, phi: Array, pos: Array, mask: Array) -> Array:
    """Correlation matrices (P, T, T) of sets of positions; the identity where padded."""
    family = structure.family
    assert family is not None
    R = jax.vmap(lambda at: family.matrix(phi[: structure.n_corr], at))(pos)
    real = mask[:, :, None] * mask[:, None, :] > 0
    return jnp.where(real, R, jnp.eye(pos.shape[1], dtype=R.dtype))


def whiten(structure: Structure, phi: Array, b: Block) -> tuple[Array, Array]:
    """R^(-1/2) M (G, T, K) up to an orthogonal factor, and log|R|."""
    log_s = b.H @ phi[structure.n_corr :]
    A = b.M * jnp.exp(-log_s)[..., None]
    logdet = 2 * jnp.sum(b.mask * log_s)
    if structure.family is None:
        return A, logdet
    route = {"chain": _chain, "mean": _mean, "dense": _dense}[structure.family.route]
    white, more = route(structure, phi, b, A)
    return white, logdet + more


def _links(structure: Structure, phi: Array, b: Block) -> tuple[Array, Array]:
    """Correlation c_t of each row with the one before it (0 for the first), and 1 - c_t²."""
    family = structure.family
    assert family is not None
    before = jnp.concatenate([b.pos[:, :1], b.pos[:, :-1]], axis=1)
    c = family.links(phi[: structure.n_corr], before, b.pos)
    follows = (b.mask > 0) & (jnp.arange(b.mask.shape[1]) > 0)
    c = jnp.where(follows, c, 0.0)
    return c, (1 - c) * (1 + c)


def _chain(structure: Structure, phi: Array, b: Block, A: Array) -> tuple[Array, Array]:
    """e_t = (r_t - c_t r_(t-1)) / √(1 - c_t²)."""
    c, left = _links(structure, phi, b)
    last = jnp.concatenate([jnp.zeros_like(A[:, :1]), A[:, :-1]], axis=1)
    return (A - c[..., None] * last) / jnp.sqrt(left)[..., None], jnp.sum(jnp.log(left))


def _mean(structure: Structure, phi: Array, b: Block, A: Array) -> tuple[Array, Array]:
    """(I - κ 11'/m) r / √(1-ρ), κ = 1 - √((1-ρ) / (1 + (m-1)ρ)): the symmetric root of R⁻¹."""
    family = structure.family
    assert family is not None
    rho = family.natural(phi[: structure.n_corr])[0]
    m = jnp.sum(b.mask, axis=1)
    along = 1 + (m - 1) * rho
    share = (1 - jnp.sqrt((1 - rho) / along)) / jnp.maximum(m, 1)  # m = 0: a subject of padding
    total = jnp.sum(A, axis=1, keepdims=True)
    white = (A - (share[:, None] * b.mask)[..., None] * total) / jnp.sqrt(1 - rho)
    return white, jnp.sum((m - 1) * jnp.log1p(-rho) + jnp.log(along))


def _inverse_roots(structure: Structure, phi: Array, b: Block) -> tuple[Array, Array]:
    """L⁻¹ of C = LL' and log|C|, one for each set of positions."""
    L = jnp.linalg.cholesky(correlations(structure, phi, b.patterns, b.pattern_mask))
    eye = jnp.broadcast_to(jnp.eye(L.shape[-1], dtype=L.dtype), L.shape)
    inverse = jax.scipy.linalg.solve_triangular(L, eye, lower=True)
    return inverse, 2 * jnp.sum(jnp.log(jnp.diagonal(L, axis1=1, axis2=2)), axis=1)


def _dense(structure: Structure, phi: Array, b: Block, A: Array) -> tuple[Array, Array]:
    """One Cholesky factor per set of positions."""
    inverse, logs = _inverse_roots(structure, phi, b)
    return inverse[b.pattern] @ A, jnp.sum(logs[b.pattern])


def inverse_diagonal(structure: Structure, phi: Array, b: Block) -> Array:
    """Diagonal of R⁻¹ of every subject, (G, T); without meaning where padded."""
    inverse_s2 = jnp.exp(-2 * (b.H @ phi[structure.n_corr :]))
    family = structure.family
    if family is None:
        return inverse_s2
    if family.route == "chain":
        c, left = _links(structure, phi, b)
        # a row enters its own step and that of the row after it
        after = jnp.concatenate([(c**2 / left)[:, 1:], jnp.zeros_like(c[:, :1])], axis=1)
        return inverse_s2 * (1 / left + after)
    if family.route == "mean":
        rho = family.natural(phi[: structure.n_corr])[0]
        m = jnp.sum(b.mask, axis=1, keepdims=True)
        return inverse_s2 * (1 - rho / (1 + (m - 1) * rho)) / (1 - rho)
    inverse, _ = _inverse_roots(structure, phi, b)
    return inverse_s2 * jnp.sum(inverse**2, axis=1)[b.pattern]


def _pytree(*static: str) -> Callable[[type[T]], type[T]]:
    """Register a dataclass as a pytree whose fields ``static`` are not arrays."""

    def register(cls: type[T]) -> type[T]:
        arrays = [f.name for f in fields(cls) if f.name not in static]  # type: ignore[arg-type]
        return jax.tree_util.register_dataclass(cls, data_fields=arrays, meta_fields=[*static])

    return register


@_pytree("layout", "structure")
@dataclass(frozen=True)
class Rows:
    """Whitened rows: any structure, O(n K (route) + n K²) an evaluation."""

    layout: Layout
    structure: Structure
    blocks: tuple[Block, ...]
    where: Where
    n: Array
    logdet_W: Array  # -Σ log w of the known weights, which are in M

    def start(self) -> np.ndarray:
        """φ to begin with, (n_phi,)."""
        return self.structure.start()

    @property
    def response(self) -> tuple[Array, ...]:
        """What involves y: its padded rows (G, T) by block."""
        return tuple(b.M[..., -1] for b in self.blocks)

    def with_response(self, response: tuple[Array, ...]) -> Rows:
        """The source of another response on the same design."""
        pairs = zip(self.blocks, response, strict=True)
        joined = [(b, jnp.concatenate([b.M[..., :-1], y[..., None]], axis=-1)) for b, y in pairs]
        return replace(self, blocks=tuple(replace(b, M=M) for b, M in joined))

    def gram(self, phi: Array) -> tuple[Gram, Rhs]:
        """Cross-products at φ; differentiable."""
        parts = [whiten(self.structure, phi, b) for b in self.blocks]
        logdet = self.logdet_W + sum(log for _, log in parts)
        if self.layout.structures:
            C = jnp.concatenate([jnp.einsum("gtk,gtl->gkl", w, w) for w, _ in parts])
        else:
            flat = [w.reshape(-1, w.shape[-1]) for w, _ in parts]
            C = jnp.sum(jnp.stack([w.T @ w for w in flat]), axis=0)[None]
        return assemble(self.layout, self.where, C, self.n, logdet)


# -------------------------------------------------------------------------------------------------
# Fixed cross-products
# -------------------------------------------------------------------------------------------------


@_pytree("kind", "structure")
@dataclass(frozen=True)
class Basis:
    """Gram = Σ c_k(φ) G_k for fixed G_k: nothing depends on rows or subjects.

    ``kind`` "strata": variances alone, one Gram per distinct row of H. "chain": equally spaced
    AR(1), R⁻¹ = (I + φ² (inner rows - single rows) - φ neighbours) / (1 - φ²). "mean": compound
    symmetry, R⁻¹ = (I - Σ_m ρ / (1 + (m-1)ρ) J_m) / (1-ρ) with J_m the 11' of subjects of m rows.
    """

    kind: str
    structure: Structure
    grams: Gram  # every float leaf with a leading axis k
    rhs: Rhs
    sizes: Array  # strata: rows (k,); chain: rows that follow another (); mean: lengths m (k - 1,)
    counts: Array  # mean: subjects of each length
    H: Array  # strata: (k, n_variances)

    def start(self) -> np.ndarray:
        """φ to begin with, (n_phi,)."""
        return self.structure.start()

    @property
    def response(self) -> Rhs:
        """What involves y: the right-hand sides that go with the fixed Grams."""
        return self.rhs

    def with_response(self, response: Rhs) -> Basis:
        """The source of another response on the same design."""
        return replace(self, rhs=response)

    def gram(self, phi: Array) -> tuple[Gram, Rhs]:
        """Cross-products at φ; differentiable."""
        c, logdet = self._coefficients(phi)
        return self.combine(c, self.grams.logdet_R + logdet)

    def combine(self, c: Array, logdet: Array) -> tuple[Gram, Rhs]:
        """Σ c_k G_k, with ``logdet`` for log|R|."""
        add = lambda x: jnp.tensordot(c, x, 1)  # noqa: E731
        g = self.grams
        gram = Gram(
            tuple(map(add, g.own)),
            tuple(tuple(map(add, row)) for row in g.up),
            g.parent,
            tuple(map(add, g.border)),
            add(g.core),
            g.n,
            logdet,
        )
        return gram, jax.tree.map(add, self.rhs)

    def _coefficients(self, phi: Array) -> tuple[Array, Array]:
        if self.kind == "strata":
            log_s = self.H @ phi
            return jnp.exp(-2 * log_s), 2 * jnp.sum(self.sizes * log_s)
        family = self.structure.family
        assert family is not None
        r = family.natural(phi)[0]
        if self.kind == "chain":
            left = (1 - r) * (1 + r)
            return jnp.stack([jnp.ones_like(r), r**2, -r]) / left, self.sizes * jnp.log(left)
        along = 1 + (self.sizes - 1) * r
        c = jnp.concatenate([jnp.ones_like(r)[None], -r / along]) / (1 - r)
        return c, jnp.sum(self.counts * ((self.sizes - 1) * jnp.log1p(-r) + jnp.log(along)))


@_pytree("layout", "structure")
@dataclass(frozen=True)
class Patterns:
    """Sums of outer products per set of positions: models without random effects.

    [X y]'R⁻¹[X y] = Σ_p Σ_(t≥u) [R_p⁻¹]_tu G_p,tu, of which the lower triangles are kept, G_tu and
    G_ut added: O(P T² K²) an evaluation, nothing in the number of subjects. Positions (with the
    variances there) are those of a grid of U places.
    """

    layout: Layout
    structure: Structure
    sums: Array  # (P T(T+1)/2, K(K+1)/2)
    pos: Array  # of the grid, (U, dim)
    H: Array  # of the grid, (U, n_variances)
    place: Array  # of the grid, (P, T) int
    mask: Array  # (P, T)
    counts: Array  # subjects per pattern (P,)
    where: Where
    n: Array
    logdet_W: Array

    def start(self) -> np.ndarray:
        """From the covariances of the least-squares residuals, which y is in standardised units."""
        T, U = self.mask.shape[1], len(self.pos)
        t, u = np.tril_indices(T)
        sums, pairs = np.zeros((2, U, U))
        at = self.place[:, t], self.place[:, u]
        np.add.at(sums, at, self.sums[:, -1].reshape(-1, len(t)) * np.where(t == u, 1.0, 0.5))
        np.add.at(pairs, at, self.mask[:, t] * self.mask[:, u] * self.counts[:, None])
        upper = np.triu_indices(U, 1)
        cov = np.where(pairs > 0, sums / np.maximum(pairs, 1.0), 0.0)
        cov[upper] = np.where(pairs[upper] > 0, cov[upper], cov.T[upper])
        cov.T[upper] = cov[upper]
        sd = np.sqrt(np.maximum(np.diag(cov), 1e-3 * np.max(np.diag(cov))))
        corr = cov / np.outer(sd, sd)
        np.fill_diagonal(corr, 1.0)
        lowest = float(np.linalg.eigvalsh(corr)[0])
        share = min(1.0, 0.9 / (1.0 - lowest)) if lowest < 0.1 else 1.0
        corr = share * corr + (1 - share) * np.eye(U)
        log_s = np.column_stack([np.ones(U), self.H])
        ratios = np.linalg.lstsq(log_s, np.log(sd), rcond=None)[0][1:]
        family = self.structure.family
        assert family is not None
        return np.concatenate([family.start_near(corr), ratios])

    @property
    def response(self) -> Array:
        """What involves y: the last row of the packed triangles, (P T(T+1)/2, K)."""
        return self.sums[..., -(self.layout.p + 1) :]

    def with_response(self, response: Array) -> Patterns:
        """The source of another response on the same design."""
        kept = self.sums[..., : -(self.layout.p + 1)]
        join = np.concatenate if isinstance(response, np.ndarray) else jnp.concatenate
        return replace(self, sums=join([kept, response], axis=-1))

    def grid(self, phi: Array) -> Array:
        """R between any two places of the grid, (U, U)."""
        family = self.structure.family
        assert family is not None
        n_corr = self.structure.n_corr
        s = jnp.exp(self.H @ phi[n_corr:])
        return family.matrix(phi[:n_corr], self.pos) * s[:, None] * s

    def take(self, grid: Array) -> Array:
        """R_p of every pattern from a matrix over the grid, (P, T, T, ...); 0 where padded."""
        real = self.mask[:, :, None] * self.mask[:, None, :]
        taken = grid[self.place[:, :, None], self.place[:, None, :]]
        return taken * real.reshape(*real.shape, *[1] * (taken.ndim - 3))

    def collect(self, matrices: Array) -> Array:
        """Sum matrices (P, T, T), 0 where padded, over the grid: the transpose of :meth:`take`."""
        U = self.pos.shape[0]
        where = self.place[:, :, None], self.place[:, None, :]
        return jnp.zeros((U, U), matrices.dtype).at[where].add(matrices)

    def inverses(self, phi: Array) -> tuple[Array, Array]:
        """R_p⁻¹ (0 where padded) and log|R_p| of every pattern."""
        padded = (1 - self.mask)[:, :, None] * jnp.eye(self.mask.shape[1], dtype=phi.dtype)
        L = jnp.linalg.cholesky(self.take(self.grid(phi)) + padded)
        half = forward_solve(L, padded + self.mask[:, :, None] * jnp.eye(L.shape[-1]))
        logs = 2 * jnp.sum(jnp.log(jnp.diagonal(L, axis1=1, axis2=2)), axis=1)
        return jnp.swapaxes(half, 1, 2) @ half - padded, logs

    def products(self, inverse: Array) -> Array:
        """Σ_p <R_p⁻¹, G_p>, (..., K, K), of matrices (..., P, T, T)."""
        rows, columns = np.tril_indices(self.mask.shape[1])
        packed = inverse[..., rows, columns]
        packed = packed.reshape(*packed.shape[:-2], -1) @ self.sums
        K = self.layout.p + 1
        rows, columns = np.tril_indices(K)
        place = np.zeros((K, K), np.int32)
        place[rows, columns] = place[columns, rows] = np.arange(len(rows))
        return packed[..., place]

    def gram(self, phi: Array) -> tuple[Gram, Rhs]:
        """Cross-products at φ; differentiable."""
        inverse, logs = self.inverses(phi)
        logdet = self.logdet_W + self.counts @ logs
        return assemble(self.layout, self.where, self.products(inverse)[None], self.n, logdet)


def forward_solve(L: Array, rhs: Array) -> Array:
    """L⁻¹ rhs for many small lower-triangular matrices (P, T, T), (P, T, m), row by row."""
    rows: list[Array] = []
    for t in range(L.shape[1]):
        known = sum((L[:, t, u, None] * rows[u] for u in range(t)), jnp.zeros((), L.dtype))
        rows.append((rhs[:, t] - known) / L[:, t, t, None])
    return jnp.stack(rows, axis=1)


Source = Rows | Basis | Patterns

r"""Products of the eliminated factor with the dense core's columns of Z, where most are zero.

A student rates few lecturers: Z₁'Z_c has one block for each pair of levels that share a row, and
eliminating the students adds Σ_j B_j'G_jB_j to the lecturers, one number for each *pair* of
lecturers that a student has rated. Both are kept as plain lists, so that a pass over them is a
gather, a product and a scatter: for InstEval 1.8 million pairs instead of 2,972 · 1,142² products.
Pairs of one level stand in rows of equal length, so that a row shares its G_j and is summed before
it is scattered; the cells of the core that pairs fall into (142,330 of 652,653) are a list of their
own, small enough to stay in a cache while the pairs are gone through.

Where there are too many pairs to keep, they are formed as a pass goes along (crowded.py).

Whether entries or dense blocks are used is decided by count, see :func:`pays`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax import crowded
from lmmjax.crowded import TRUSTED

#: a pair costs as much as this many products of a dense matrix multiplication (measured)
PAIR_COST = 250

#: more pairs than this are not kept, they would need gigabytes
MOST_PAIRS = 30_000_000

#: the longest row of pairs, whose sum is written out
LONGEST_ROW = 16

#: places in rows of pairs may be this many times the pairs
SLACK = 1.25


class Pairs(NamedTuple):
    """The pairs of entries that share a level.

    A pair is ordered by column, so that its cell lies in the lower triangle of the core. Places
    that no pair fills have the value 0.
    """

    cells: Any  # (cells,) int, row * d + column of the core; rows >= columns
    level: Any  # (rows,) int32
    cell: Any  # (rows, length) int32, place among the cells
    value: Any  # (S, S, rows, length)


class Cross(NamedTuple):
    """B = Z₁'R⁻¹Z_c by its non-zero entries, sorted by level, then by column."""

    level: Any  # (m,) int32
    column: Any  # (m,) int32
    value: Any  # (S, m)
    pairs: Any  # Pairs or Crowd


# -------------------------------------------------------------------------------------------------
# Counting and building, in NumPy
# -------------------------------------------------------------------------------------------------

Part = tuple[np.ndarray, np.ndarray, int]  # a factor of the core: z (n, S), codes (n,), levels


def _cells(codes: np.ndarray, other: np.ndarray, J: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of levels that share a row, as sorted keys, and the place of each row among them."""
    key = codes.astype(np.int64) * J + other
    size = (int(codes.max()) + 1) * J
    if size > 8 * len(key) + 10_000_000:
        return np.unique(key, return_inverse=True)
    found = np.flatnonzero(np.bincount(key, minlength=size))
    place = np.empty(size, np.int64)
    place[found] = np.arange(len(found))
    return found, place[key]


def count_pairs(codes: np.ndarray, J: int, parts: list[tuple[np.ndarray, int, int]]) -> int:
    """How many pairs of the core's columns share a level; ``parts`` are (codes, S, levels)."""
    per_level = np.zeros(J)
    for other, S, levels in parts:
        keys, _ = _cells(codes, other, levels)
        per_level += S * np.bincount(keys // levels, minlength=J)
    return int(np.sum(per_level * (per_level + 1)) / 2)


def pays(pairs: int, S: int, J: int, d: int) -> bool:
    """Whether going through pairs is cheaper than dense products of (d, S J) matrices.

    Pairs that are not kept are gone through step by step, which is nothing for an accelerator.
    """
    if pairs > MOST_PAIRS and jax.default_backend() != "cpu":
        return False
    return pairs * S * PAIR_COST < J * d * d


def entries(
    codes: np.ndarray, z: np.ndarray, w: np.ndarray | None, J: int, parts: list[Part]
) -> Cross:
    """Sum the products of one factor's columns with the core's, kept by entry.

    Parameters
    ----------
    codes, z : (n,), (n, S)
        The eliminated factor: levels and columns of each row.
    w : (n,), optional
        Weights of the rows.
    J : int
        Levels of the eliminated factor.
    parts : list
        The core's factors.

    Notes
    -----
    O(n S S_c + pairs) time and memory, without the pairs where there are over ``MOST_PAIRS``.
    """
    level, column, value, start = [], [], [], 0
    for other_z, other, levels in parts:
        keys, place = _cells(codes, other, levels)
        S_c = other_z.shape[1]
        for s in range(S_c):
            level.append(keys // levels)
            column.append(start + (keys % levels) * S_c + s)
            zs = other_z[:, s] if w is None else other_z[:, s] * w
            sums = [np.bincount(place, weights=zs * a, minlength=len(keys)) for a in z.T]
            value.append(np.stack(sums))
        start += levels * S_c
    where, what = np.concatenate(level), np.concatenate(column)
    return from_entries(where, what, np.concatenate(value, axis=1), J, start)


def from_entries(where: np.ndarray, what: np.ndarray, value: np.ndarray, J: int, d: int) -> Cross:
    """Sort entries (level, column, (S, m) values) of a product (J, d) and list their pairs."""
    order = np.argsort(where * d + what)
    where, what, value = where[order], what[order], value[:, order]
    sizes = np.bincount(where, minlength=J)
    many = np.sum(sizes * (sizes + 1)) / 2 > MOST_PAIRS
    pairs = (crowded.from_entries if many else _listed)(where, what, value, J, d)
    return Cross(where.astype(np.int32), what.astype(np.int32), value, pairs)


def _listed(where: np.ndarray, what: np.ndarray, value: np.ndarray, J: int, d: int) -> Pairs:
    """Pairs of sorted entries."""
    first, second = _pairs(np.bincount(where, minlength=J))
    cells, cell = _cells(what[first], what[second], d)
    level, place, shape = _rows(where[first].astype(np.int32), J)
    pair_cell = np.zeros(shape, np.int32)
    pair_cell.reshape(-1)[place] = cell
    pair_value = np.zeros((len(value), len(value), *shape))
    flat = pair_value.reshape(*pair_value.shape[:2], -1)
    flat[..., place] = value[:, None, first] * value[None, :, second]
    return Pairs(cells.astype(crowded.cell_type(d)), level, pair_cell, pair_value)


def _rows(level: np.ndarray, J: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Rows of pairs that share a level: level of each row, place of each pair, (rows, length).

    The rows are as long as few empty places allow.
    """
    sizes = np.bincount(level, minlength=J)
    length = LONGEST_ROW
    while length > 1 and np.sum(-(-sizes // length)) * length > SLACK * len(level):
        length //= 2
    rows = -(-sizes // length)
    order = np.argsort(level, kind="stable")
    before = np.cumsum(rows) * length - rows * length - np.cumsum(sizes) + sizes
    place = np.empty(len(level), np.int64)
    place[order] = np.arange(len(level)) + before[level[order]]
    return np.repeat(np.arange(J, dtype=np.int32), rows), place, (int(rows.sum()), length)


def _pairs(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of all pairs (first >= second) within runs of these lengths."""
    starts = np.cumsum(sizes) - sizes
    first, second = [], []
    for size in np.unique(sizes[sizes > 0]):
        r, c = np.tril_indices(size)
        at = starts[sizes == size, None]
        first.append((at + r).ravel())
        second.append((at + c).ravel())
    return np.concatenate(first), np.concatenate(second)


# -------------------------------------------------------------------------------------------------
# Products, in JAX; each is linear in what is not part of the Cross
# -------------------------------------------------------------------------------------------------


def conjugate_levels(cross: Cross, G: jax.Array, d: int) -> jax.Array:
    """Σ_j B_j'G_jB_j for symmetric G_j: (S, S, J) -> (d, d)."""
    return -subtract_levels(cross, G, jnp.zeros((d, 0), G.dtype), jnp.zeros((d, d), G.dtype))


def subtract_levels(cross: Cross, G: jax.Array, beside: jax.Array, core: jax.Array) -> jax.Array:
    """``core`` less [[Σ_j B_j'G_jB_j, beside], [beside', .]], the last p columns given.

    Parameters
    ----------
    G : (S, S, J)
        Symmetric per level.
    beside : (d + p, p)
    core : (d + p, d + p)

    Notes
    -----
    Listed entries are scattered into a copy of ``core``: no matrix of products is made.
    """
    m, p = beside.shape
    d = m - p
    if isinstance(cross.pairs, Pairs):
        half, row, column = _listed_products(cross.pairs, G, d)
        out = core.reshape(-1).at[row * m + column].add(-half, **TRUSTED)
        out = out.at[column * m + row].add(-half, **TRUSTED).reshape(m, m)
    else:
        half = crowded.half_products(cross.pairs, G, d)
        out = core.at[:d, :d].add(-(half + half.T))
    return out.at[:, d:].add(-beside).at[d:, :d].add(-beside[:d].T)


def _listed_products(pairs: Pairs, G: jax.Array, d: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Σ_j B_j'G_jB_j by cell, half of what stands on the diagonal; rows and columns."""
    products = pairs.value * G.at[..., pairs.level].get(**TRUSTED)[..., None]
    cells = jnp.zeros(pairs.cells.shape, G.dtype)
    cells = cells.at[pairs.cell.reshape(-1)].add(products.sum((0, 1)).reshape(-1), **TRUSTED)
    row, column = pairs.cells // d, pairs.cells % d
    return jnp.where(row == column, 0.5 * cells, cells), row, column


def conjugate_core(cross: Cross, Q: jax.Array, J: int) -> jax.Array:
    """B_jQB_j' per level for symmetric Q: (d, d) -> (S, S, J)."""
    if isinstance(cross.pairs, Pairs):
        S = len(cross.value)
        half = jnp.zeros((S, S, J), Q.dtype)
        half = half.at[..., cross.pairs.level].add(_listed_sums(cross.pairs, Q), **TRUSTED)
    else:
        half = crowded.half_sums(cross.pairs, Q, J)
    return half + jnp.swapaxes(half, 0, 1)


def _listed_sums(pairs: Pairs, Q: jax.Array) -> jax.Array:
    """One of each two mirrored pairs, summed along the rows: (S, S, rows)."""
    d = Q.shape[0]
    picked = Q.reshape(-1).at[pairs.cells].get(**TRUSTED)
    half = jnp.where(pairs.cells // d == pairs.cells % d, 0.5 * picked, picked)
    # written out once: left to itself, the compiler looks every pair up in Q
    half = jax.lax.optimization_barrier(half)
    first, *others = (
        pairs.value[..., k] * half.at[pairs.cell[:, k]].get(**TRUSTED)
        for k in range(pairs.cell.shape[1])
    )
    return sum(others, first)


def to_core(cross: Cross, x: jax.Array, d: int) -> jax.Array:
    """Σ_j B_j'x_j: (S, k, J) -> (d, k)."""
    rows = jnp.moveaxis(x, -1, 0).at[cross.level].get(**TRUSTED)
    rows = jnp.sum(cross.value.T[..., None] * rows, axis=1)
    return jnp.zeros((d, x.shape[1]), x.dtype).at[cross.column].add(rows, **TRUSTED)


def from_core(cross: Cross, v: jax.Array, J: int) -> jax.Array:
    """B_j v per level: (d, k) -> (S, k, J)."""
    rows = cross.value.T[..., None] * v.at[cross.column].get(**TRUSTED)[:, None]
    # levels first while it is summed: side by side, the columns of an entry are added as one
    out = jnp.zeros((J, *rows.shape[1:]), v.dtype).at[cross.level].add(rows, **TRUSTED)
    return jnp.moveaxis(out, 0, -1)

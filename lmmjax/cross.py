r"""Products of the eliminated factor with the dense core's columns of Z, where most are zero.

A student rates few lecturers: Z₁'Z_c has one block for each pair of levels that share a row, and
eliminating the students adds Σ_j B_j'G_jB_j to the lecturers, one number for each *pair* of
lecturers that a student has rated. Both are kept as plain lists, so that a pass over them is a
gather, a product and a scatter: for InstEval 1.8 million pairs instead of 2,972 · 1,142² products.

Whether the lists or dense blocks are used is decided by count, see :func:`pays`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

#: a pair costs as much as this many products of a dense matrix multiplication (measured)
PAIR_COST = 250

#: more pairs than this would need gigabytes
MOST_PAIRS = 30_000_000


class Cross(NamedTuple):
    """B = Z₁'R⁻¹Z_c by its non-zero entries, and the pairs of entries that share a level.

    Entries are sorted by level, then by column; a pair is ordered by column, so that its cell lies
    in the lower triangle of the core.
    """

    level: Any  # (m,) int32
    column: Any  # (m,) int32
    value: Any  # (S, m)
    pair_level: Any  # (pairs,) int32
    pair_cell: Any  # (pairs,) int, row * d + column
    pair_value: Any  # (S, S, pairs)


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
    """Whether lists of pairs are cheaper than dense products of (d, S J) matrices."""
    return pairs <= MOST_PAIRS and pairs * S * PAIR_COST < J * d * d


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
    O(n S S_c + pairs) time and memory.
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
    first, second = _pairs(np.bincount(where, minlength=J))
    values = value[:, order]
    where, what = where[order].astype(np.int32), what[order]
    cell = what[first] * d + what[second]
    products = values[:, None, first] * values[None, :, second]
    small = np.int32 if d < 46_000 else np.int64
    return Cross(where, what.astype(np.int32), values, where[first], cell.astype(small), products)


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
    picked = jnp.sum(cross.pair_value * G[..., cross.pair_level], axis=(0, 1))
    lower = jnp.zeros(d * d, G.dtype).at[cross.pair_cell].add(picked).reshape(d, d)
    return lower + jnp.tril(lower, -1).T


def conjugate_core(cross: Cross, Q: jax.Array, J: int) -> jax.Array:
    """B_jQB_j' per level for symmetric Q: (d, d) -> (S, S, J)."""
    d = Q.shape[0]
    picked = cross.pair_value * Q.reshape(-1)[cross.pair_cell]
    off = cross.pair_cell // d != cross.pair_cell % d
    picked = picked + jnp.where(off, jnp.swapaxes(picked, 0, 1), 0.0)
    zeros = jnp.zeros((*cross.pair_value.shape[:2], J), Q.dtype)
    return zeros.at[..., cross.pair_level].add(picked)


def to_core(cross: Cross, x: jax.Array, d: int) -> jax.Array:
    """Σ_j B_j'x_j: (S, k, J) -> (d, k)."""
    picked = jnp.sum(cross.value[:, None] * x[..., cross.level], axis=0)
    return jnp.zeros((d, x.shape[1]), x.dtype).at[cross.column].add(picked.T)


def from_core(cross: Cross, v: jax.Array, J: int) -> jax.Array:
    """B_j v per level: (d, k) -> (S, k, J)."""
    picked = cross.value[:, None] * v[cross.column].T
    zeros = jnp.zeros((picked.shape[0], v.shape[1], J), v.dtype)
    return zeros.at[..., cross.level].add(picked)

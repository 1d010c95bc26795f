r"""Products of the eliminated factor with the dense core's columns of Z, where most are zero.

A student rates few lecturers: Z₁'Z_c has one block for each pair of levels that share a row, and
eliminating the students adds Σ_j B_j'G_jB_j to the lecturers, one number for each *pair* of
lecturers that a student has rated. Both are kept as plain lists, so that a pass over them is a
gather, a product and a scatter: for InstEval 1.8 million pairs instead of 2,972 · 1,142² products.
Pairs of one level stand in rows of equal length, so that a row shares its G_j and is summed before
it is scattered; the cells of the core that pairs fall into (142,330 of 652,653) are a list of their
own, small enough to stay in a cache while the pairs are gone through.

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

#: the longest row of pairs, whose sum is written out
LONGEST_ROW = 16

#: places in rows of pairs may be this many times the pairs
SLACK = 1.25


class Cross(NamedTuple):
    """B = Z₁'R⁻¹Z_c by its non-zero entries, and the pairs of entries that share a level.

    Entries are sorted by level, then by column; a pair is ordered by column, so that its cell lies
    in the lower triangle of the core. Places that no pair fills have the value 0.
    """

    level: Any  # (m,) int32
    column: Any  # (m,) int32
    value: Any  # (S, m)
    cells: Any  # (cells,) int, row * d + column of the core; rows >= columns
    pair_level: Any  # (rows,) int32
    pair_cell: Any  # (rows, length) int32, place among the cells
    pair_value: Any  # (S, S, rows, length)


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
    cells, cell = _cells(what[first], what[second], d)
    level, place, shape = _rows(where[first], J)
    pair_cell = np.zeros(shape, np.int32)
    pair_cell.reshape(-1)[place] = cell
    pair_value = np.zeros((len(value), len(value), *shape))
    flat = pair_value.reshape(*pair_value.shape[:2], -1)
    flat[..., place] = values[:, None, first] * values[None, :, second]
    small = np.int32 if d < 40_000 else np.int64  # for cells of the core with its border too
    return Cross(
        where, what.astype(np.int32), values, cells.astype(small), level, pair_cell, pair_value
    )


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


#: the lists hold no index that is negative or too large: none is tested
_TRUSTED: dict[str, Any] = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


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
    The entries are scattered into a copy of ``core``: no matrix of products is made.
    """
    m, p = beside.shape
    d = m - p
    products = cross.pair_value * G.at[..., cross.pair_level].get(**_TRUSTED)[..., None]
    cells = jnp.zeros(cross.cells.shape, G.dtype)
    cells = cells.at[cross.pair_cell.reshape(-1)].add(products.sum((0, 1)).reshape(-1), **_TRUSTED)
    row, column = cross.cells // d, cross.cells % d
    half = jnp.where(row == column, 0.5 * cells, cells)
    out = core.reshape(-1).at[row * m + column].add(-half, **_TRUSTED)
    out = out.at[column * m + row].add(-half, **_TRUSTED).reshape(m, m)
    return out.at[:, d:].add(-beside).at[d:, :d].add(-beside[:d].T)


def conjugate_core(cross: Cross, Q: jax.Array, J: int) -> jax.Array:
    """B_jQB_j' per level for symmetric Q: (d, d) -> (S, S, J)."""
    d = Q.shape[0]
    picked = Q.reshape(-1).at[cross.cells].get(**_TRUSTED)
    half = jnp.where(cross.cells // d == cross.cells % d, 0.5 * picked, picked)
    # written out once: left to itself, the compiler looks every pair up in Q
    half = jax.lax.optimization_barrier(half)
    first, *others = (
        cross.pair_value[..., k] * half.at[cross.pair_cell[:, k]].get(**_TRUSTED)
        for k in range(cross.pair_cell.shape[1])
    )
    zeros = jnp.zeros((*cross.pair_value.shape[:2], J), Q.dtype)
    lower = zeros.at[..., cross.pair_level].add(sum(others, first), **_TRUSTED)
    return lower + jnp.swapaxes(lower, 0, 1)


def to_core(cross: Cross, x: jax.Array, d: int) -> jax.Array:
    """Σ_j B_j'x_j: (S, k, J) -> (d, k)."""
    rows = jnp.moveaxis(x, -1, 0).at[cross.level].get(**_TRUSTED)
    rows = jnp.sum(cross.value.T[..., None] * rows, axis=1)
    return jnp.zeros((d, x.shape[1]), x.dtype).at[cross.column].add(rows, **_TRUSTED)


def from_core(cross: Cross, v: jax.Array, J: int) -> jax.Array:
    """B_j v per level: (d, k) -> (S, k, J)."""
    rows = cross.value.T[..., None] * v.at[cross.column].get(**_TRUSTED)[:, None]
    # levels first while it is summed: side by side, the columns of an entry are added as one
    out = jnp.zeros((J, *rows.shape[1:]), v.dtype).at[cross.level].add(rows, **_TRUSTED)
    return jnp.moveaxis(out, 0, -1)

r"""Products by entry where levels share too many pairs of columns to keep a list of them.

1,000,000 ratings of 3,706 films by 6,040 users have 140 million pairs of films that a user rated,
but a fifth of the films has most of the ratings. So the columns of B = Z₁'R⁻¹Z_c are split: the
*popular* ones are dense blocks, whose products are matrix multiplications; each *other* entry meets
its level's popular columns as one row; and pairs of other entries are formed as a pass goes along,
each entry of a level with the k-th after it in a circle, k = 0, 1, ... up to half the circle. How
many columns are popular is decided by count. A pass takes 0.7 s there, a dense one 3.7 s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

#: entries whose pairs are formed at a time
CHUNK = 1 << 14

#: products of a dense matrix multiplication that take as long as a number of a row, and as a pair
ROW_COST, PAIR_COST = 10, 240

#: numbers of popular columns that are considered
CHOICES = 33

#: indices that are neither negative nor too large: none is tested
TRUSTED: dict[str, Any] = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


class Circles(NamedTuple):
    """The other entries of each level in a circle, longest circles first; filled up to chunks.

    ``chunk`` and ``step`` are all chunks with all steps k that some entry of them takes.
    """

    level: Any  # (m,) int32
    column: Any  # (m,) int
    value: Any  # (S, m)
    first: Any  # (m,) int32, where the circle begins
    size: Any  # (m,) int32, of the circle; 0 where there is no entry
    chunk: Any  # (tasks,) int32
    step: Any  # (tasks,) int32


class Crowd(NamedTuple):
    """B by popular columns and other entries."""

    popular: Any  # (c,) int32, columns
    dense: Any  # (S, J, c), B in these columns
    level: Any  # (t,) int32, of the other entries
    column: Any  # (t,) int32
    value: Any  # (S, t)
    circles: Circles


# -------------------------------------------------------------------------------------------------
# Building, in NumPy
# -------------------------------------------------------------------------------------------------


def cell_type(d: int) -> Any:
    """An integer type for cells of a core of d columns, with its border too."""
    return np.int32 if d < 40_000 else np.int64


def from_entries(level: np.ndarray, column: np.ndarray, value: np.ndarray, J: int, d: int) -> Crowd:
    """Split the entries (m,), values (S, m), of a product (J, d); sorted by level.

    O(S (J c + m)) memory, O(m) time for each choice of c.
    """
    rank = np.empty(d, int)
    order = np.argsort(-np.bincount(column, minlength=d), kind="stable")
    rank[order] = np.arange(d)
    c = _popular(level, rank[column], J, d)
    dense, often = np.zeros((len(value), J, c)), rank[column] < c
    dense[:, level[often], rank[column[often]]] = value[:, often]
    level, column, value = level[~often], column[~often], value[:, ~often]
    others = level.astype(np.int32), column.astype(np.int32), value
    return Crowd(order[:c].astype(np.int32), dense, *others, _circles(level, column, value, J, d))


def _popular(level: np.ndarray, rank: np.ndarray, J: int, d: int) -> int:
    """The number of popular columns that makes a pass the cheapest."""

    def cost(c: int) -> float:
        others = np.bincount(level[rank >= c], minlength=J).astype(float)
        pairs = np.sum(others * (others + 1)) / 2
        return J * float(c) ** 2 + ROW_COST * c * others.sum() + PAIR_COST * pairs

    return min(np.linspace(0, d, CHOICES).astype(int), key=cost)


def _circles(level: np.ndarray, column: np.ndarray, value: np.ndarray, J: int, d: int) -> Circles:
    size = np.bincount(level, minlength=J)[level]
    order = np.argsort(-size, kind="stable")
    chunks = max(1, -(-len(order) // CHUNK))
    empty = chunks * CHUNK - len(order)
    level, column, size = (np.pad(a[order], (0, empty)) for a in (level, column, size))
    starts = np.zeros(J, int)
    starts[level[: len(order)][::-1]] = np.arange(len(order))[::-1]
    steps = size[::CHUNK] // 2 + 1
    chunk = np.repeat(np.arange(chunks), steps)
    step = np.arange(len(chunk)) - (np.cumsum(steps) - steps)[chunk]
    return Circles(
        level.astype(np.int32),
        column.astype(cell_type(d)),
        np.pad(value[:, order], [(0, 0), (0, empty)]),
        np.where(size > 0, starts[level], 0).astype(np.int32),
        size.astype(np.int32),
        chunk.astype(np.int32),
        step.astype(np.int32),
    )


# -------------------------------------------------------------------------------------------------
# Products, in JAX
# -------------------------------------------------------------------------------------------------


def half_products(crowd: Crowd, G: jax.Array, d: int) -> jax.Array:
    """H (d, d) with H + H' = Σ_j B_j'G_jB_j for symmetric G_j, (S, S, J)."""
    crowd = jax.tree.map(jnp.asarray, crowd)
    _, J, c = crowd.dense.shape
    scaled = jnp.einsum("stj,tjc->sjc", G[..., :J], crowd.dense)  # G_j B_j
    half = _circle_products(crowd.circles, G, d)
    popular = jnp.einsum("sjc,sje->ce", scaled, crowd.dense)
    half = half.at[crowd.popular[:, None], crowd.popular].add(0.5 * popular, **TRUSTED)

    def add(t: jax.Array, rows: jax.Array) -> jax.Array:
        mine = jax.lax.dynamic_slice_in_dim(scaled, crowd.level[t], 1, axis=1)[:, 0]
        row = jax.lax.dynamic_slice_in_dim(rows, crowd.column[t], 1)
        row = row + crowd.value[:, t] @ mine
        return jax.lax.dynamic_update_slice_in_dim(rows, row, crowd.column[t], axis=0)

    if len(crowd.level) == 0:
        return half
    rows = jax.lax.fori_loop(0, len(crowd.level), add, jnp.zeros((d, c), G.dtype))
    return half.at[:, crowd.popular].add(rows, **TRUSTED)


def half_sums(crowd: Crowd, Q: jax.Array, J: int) -> jax.Array:
    """H (S, S, J) with H + H' = B_jQB_j' per level for symmetric Q, (d, d)."""
    crowd = jax.tree.map(jnp.asarray, crowd)
    S, known, _ = crowd.dense.shape
    beside = Q.at[:, crowd.popular].get(**TRUSTED)
    popular = jnp.einsum("sjc,ce->sje", crowd.dense, beside.at[crowd.popular].get(**TRUSTED))
    half = jnp.zeros((S, S, J), Q.dtype)
    half = half.at[..., :known].set(0.5 * jnp.einsum("sje,tje->stj", popular, crowd.dense))

    def meet(t: jax.Array, sums: jax.Array) -> jax.Array:
        mine = jax.lax.dynamic_slice_in_dim(crowd.dense, crowd.level[t], 1, axis=1)[:, 0]
        row = jax.lax.dynamic_slice_in_dim(beside, crowd.column[t], 1)[0]
        return sums.at[:, t].set(mine @ row, **TRUSTED)

    if len(crowd.level) == 0:
        return half
    sums = jax.lax.fori_loop(0, len(crowd.level), meet, jnp.zeros_like(crowd.value))
    half = half.at[..., crowd.level].add(crowd.value[:, None] * sums, **TRUSTED)
    return half.at[..., crowd.circles.level].add(_circle_sums(crowd.circles, Q), **TRUSTED)


class _Met(NamedTuple):
    """Pairs of a chunk's entries with those some steps on; the share is 0 where there is none."""

    column: jax.Array  # (CHUNK,)
    value: jax.Array  # (S, CHUNK)
    share: jax.Array  # (CHUNK,) 1, or 1/2 of a pair that is met twice or mirrors itself


def _chunk(task: jax.Array, circles: Circles, a: jax.Array) -> jax.Array:
    """Those of (..., m) numbers that belong to a task's entries."""
    return jax.lax.dynamic_slice_in_dim(a, circles.chunk[task] * CHUNK, CHUNK, axis=-1)


def _meet(task: jax.Array, circles: Circles) -> _Met:
    k, at = circles.step[task], circles.chunk[task] * CHUNK + jnp.arange(CHUNK)
    first, size = (_chunk(task, circles, a) for a in (circles.first, circles.size))
    share = jnp.where((2 * k == size) | ((k == 0) & (size > 0)), 0.5, 1.0 * (2 * k < size))
    end = first + size
    other = jnp.where(share > 0.0, at + k - jnp.where(at + k >= end, size, 0), at)
    column = circles.column.at[other].get(**TRUSTED)
    value = circles.value.at[:, other].get(**TRUSTED)
    return _Met(column, value, share.astype(value.dtype))


def _circle_products(circles: Circles, G: jax.Array, d: int) -> jax.Array:
    """Σ_j B_j'G_jB_j with one of each two mirrored pairs, (d, d)."""
    mine = G.at[..., circles.level].get(**TRUSTED)
    scaled = jnp.sum(mine * circles.value[:, None], axis=0)  # G_j v, (S, m)

    def add(task: jax.Array, half: jax.Array) -> jax.Array:
        met = _meet(task, circles)
        products = met.share * jnp.sum(_chunk(task, circles, scaled) * met.value, axis=0)
        cells = _chunk(task, circles, circles.column) * d + met.column
        return half.at[cells].add(products, **TRUSTED)

    half = jax.lax.fori_loop(0, len(circles.step), add, jnp.zeros(d * d, G.dtype))
    return half.reshape(d, d)


def _circle_sums(circles: Circles, Q: jax.Array) -> jax.Array:
    """One of each two mirrored pairs, summed over the steps: (S, S, m)."""
    flat, d, S = Q.reshape(-1), Q.shape[0], len(circles.value)

    def add(task: jax.Array, sums: jax.Array) -> jax.Array:
        met, start = _meet(task, circles), circles.chunk[task] * CHUNK
        cells = _chunk(task, circles, circles.column) * d + met.column
        own = _chunk(task, circles, circles.value) * (met.share * flat.at[cells].get(**TRUSTED))
        more = _chunk(task, circles, sums) + own[:, None] * met.value
        return jax.lax.dynamic_update_slice_in_dim(sums, more, start, axis=-1)

    none = jnp.zeros((S, S, circles.level.shape[0]), Q.dtype)
    return jax.lax.fori_loop(0, len(circles.step), add, none)

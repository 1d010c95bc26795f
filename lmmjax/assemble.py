r"""Cross-products of many data sets at once: ragged rows in, padded blocks out.

What :mod:`lmmjax.gram` does for one data set, for m of them without a loop over data sets: columns
are shifted and scaled within each item, products are summed by (item, level), and the sums are laid
out with the item as first axis, padded to common numbers of levels. A level without rows has zero
products and adds nothing to the likelihood. Rows are sorted by item.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from lmmjax import gram as gr
from lmmjax.covariance import covariance
from lmmjax.gram import Gram, Layout, LevelSums, Plan, Rhs


@dataclass(frozen=True, eq=False)
class Stack:
    """Rows of many data sets, sorted by item.

    Attributes
    ----------
    item : (n,) int
        Item of each row, 0 ... m - 1, not falling.
    X, y, w : arrays
        Fixed columns (n, p), response less offset (n,), weights (n,) or None.
    terms : tuple
        With ``group``, ``z``, ``codes``, ``cov`` and ``names`` each; codes may repeat between
        items.
    m : int
    """

    item: np.ndarray
    X: np.ndarray
    y: np.ndarray
    w: np.ndarray | None
    terms: tuple[Any, ...]
    m: int

    def take(self, items: np.ndarray, columns: np.ndarray) -> Stack:
        """Some items, renumbered in order, with some columns of X."""
        place = np.full(self.m, -1)
        place[items] = np.arange(len(items))
        rows = np.flatnonzero(place[self.item] >= 0)
        terms = tuple(
            SimpleNamespace(
                group=t.group, names=t.names, cov=t.cov, z=t.z[rows], codes=t.codes[rows]
            )
            for t in self.terms
        )
        return Stack(
            place[self.item[rows]],
            self.X[np.ix_(rows, columns)],
            self.y[rows],
            None if self.w is None else self.w[rows],
            terms,
            len(items),
        )


class ItemUnits(NamedTuple):
    """:class:`lmmjax.gram.Units` of every item, the item as first axis."""

    A: np.ndarray  # (m, p, p)
    beta0: np.ndarray  # (m, p)
    scale: np.ndarray  # (m,)
    B: tuple[np.ndarray, ...]  # per term (m, S, S)
    n: np.ndarray  # (m,)
    exact: np.ndarray  # (m,) bool: X reproduces y


class Standard(NamedTuple):
    """Standardised columns, their units, and X'WX of each item (m, p, p)."""

    X: np.ndarray
    y: np.ndarray
    Z: tuple[np.ndarray, ...]
    units: ItemUnits
    xx: np.ndarray


def _rms(sums: LevelSums, column: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Root mean square by item, 1 where the column vanishes."""
    size = np.sqrt(sums(column**2) / n)
    return np.where(size > 0, size, 1.0)


def _standard_x(
    stack: Stack, sums: LevelSums, n: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X_s, A by item (m, p, p), and the constant's direction (p,)."""
    p = stack.X.shape[1]
    a = gr._constant_direction(stack.X)
    mean, size = np.zeros((stack.m, p)), np.ones((stack.m, p))
    Xs = np.array(stack.X, order="F")
    for j in range(p):
        if a.any() and a[j] == 0.0:
            mean[:, j] = sums(Xs[:, j]) / n
            Xs[:, j] -= mean[stack.item, j]
            # a column that is constant within an item leaves only rounding
            top = np.maximum.reduceat(np.abs(Xs[:, j]), sums.starts)
            flat = top <= 1e-13 * np.abs(mean[:, j])
            Xs[flat[stack.item], j] = 0.0
        size[:, j] = _rms(sums, Xs[:, j], n)
        Xs[:, j] /= size[stack.item, j]
    return Xs, (np.eye(p) - a[:, None] * mean[:, None, :]) / size[:, None, :], a


def fixed_products(stack: Stack) -> np.ndarray:
    """Centred and scaled X'WX / n of each item, (m, p, p): to judge ranks by."""
    sums = LevelSums(stack.item, stack.m)
    n = np.bincount(stack.item, minlength=stack.m)
    Xs, _, _ = _standard_x(stack, sums, n)
    return _xx(Xs, None, sums) / n[:, None, None]


def _xx(Xs: np.ndarray, w: np.ndarray | None, sums: LevelSums) -> np.ndarray:
    p = Xs.shape[1]
    out = np.empty((sums.J, p, p))
    for j in range(p):
        wx = gr._weighted(Xs[:, j], w)
        for k in range(j, p):
            out[:, j, k] = out[:, k, j] = sums(wx * Xs[:, k])
    return out


def standardise(stack: Stack) -> Standard:
    """Shift and scale the columns of every item on its own; see :func:`lmmjax.gram.standardise`.

    Every item must have independent columns of X. O(n (p² + S)).
    """
    sums = LevelSums(stack.item, stack.m)
    n = np.bincount(stack.item, minlength=stack.m)
    Xs, A, a = _standard_x(stack, sums, n)
    xx = _xx(Xs, stack.w, sums)
    shift = sums(stack.y) / n if a.any() else np.zeros(stack.m)
    y = stack.y - shift[stack.item]
    most = np.maximum.reduceat(np.abs(y), sums.starts)
    wy = gr._weighted(y, stack.w)
    xy = np.stack([sums(x * wy) for x in Xs.T], axis=1) if len(a) else np.zeros((stack.m, 0))
    beta = np.linalg.solve(xx, xy[..., None])[..., 0] if len(a) else xy
    y = y - np.einsum("ij,ij->i", Xs, beta[stack.item])
    size = np.sqrt(sums(y**2) / n)
    exact = ~(size > 1e-14 * np.maximum(most, np.finfo(float).tiny)) & np.isfinite(most)
    scale = np.where(exact, 1.0, size)
    y = y / scale[stack.item]
    beta0 = a * shift[:, None] + np.einsum("mij,mj->mi", A, beta)
    parts = [_standard_z(t, stack, sums, n) for t in stack.terms]
    B = tuple(b for _, b in parts)
    units = ItemUnits(A, beta0, scale, B, n, exact)
    return Standard(Xs, y, tuple(z for z, _ in parts), units, xx)


def _standard_z(
    term: Any, stack: Stack, sums: LevelSums, n: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Z_s = Z B by item; shifts only where an intercept is free to take them up."""
    S = term.z.shape[1]
    structure = covariance(term.cov, S)
    B = np.zeros((stack.m, S, S)) + np.eye(S)
    a = gr._constant_direction(term.z) if structure.mixes else np.zeros(S)
    constant = int(np.argmax(a)) if a.sum() == 1.0 else None
    zs, size = np.array(term.z, order="F"), np.ones((stack.m, S))
    for s in range(S):
        if constant is not None and s != constant:
            B[:, constant, s] = -sums(zs[:, s]) / n
            zs[:, s] += B[stack.item, constant, s]
        size[:, s] = _rms(sums, zs[:, s], n)
    if not structure.scales:
        size[:] = size.mean(axis=1, keepdims=True)
    zs /= size[stack.item]
    return zs, B / size[:, None, :]


# -------------------------------------------------------------------------------------------------
# Layout and products
# -------------------------------------------------------------------------------------------------


class _Levels(NamedTuple):
    """Levels of one factor over all items."""

    row: np.ndarray  # (n,) which of the U levels
    item: np.ndarray  # (U,)
    local: np.ndarray  # (U,) number within its item
    number: np.ndarray  # (m,) levels of each item


def levels_of(stack: Stack, term: Any) -> _Levels:
    """Number the levels of a factor within each item."""
    J = int(term.codes.max()) + 1
    found, row = np.unique(stack.item.astype(np.int64) * J + term.codes, return_inverse=True)
    item = found // J
    count = np.bincount(item, minlength=stack.m)
    first = np.concatenate([[0], np.cumsum(count)[:-1]])
    return _Levels(row.reshape(-1), item, np.arange(len(found)) - first[item], count)


def plan(stack: Stack) -> tuple[Plan, list[_Levels]]:
    """Order of elimination that serves all items, and the levels of each factor in that order."""
    every = [levels_of(stack, t) for t in stack.terms]
    levels = {t.group: v for t, v in zip(stack.terms, every, strict=True)}
    terms = [
        SimpleNamespace(group=t.group, names=t.names, cov=t.cov, levels=v.item)
        for t, v in zip(stack.terms, every, strict=True)
    ]

    def nested(child: str, parent: str) -> bool:
        inner, outer = levels[child], levels[parent]
        return gr._parents(inner.row, len(inner.item), outer.row) is not None

    p = stack.X.shape[1]
    made = gr.arrange(terms, p, nested, lambda *_: False, dense=gr.DENSE * stack.m)
    return made, [every[f.terms[0]] for f in made.factors]


def padded(the_plan: Plan, sizes: tuple[int, ...]) -> Layout:
    """The layout with the given numbers of levels."""
    layout, c = the_plan.layout, the_plan.n_chain
    factors = (*layout.chain, *layout.core)
    resized = tuple((t, S, J) for (t, S, _), J in zip(factors, sizes, strict=True))
    return dataclasses.replace(layout, chain=resized[:c], core=resized[c:], sparse=False)


def products(
    stack: Stack, the_plan: Plan, levels: list[_Levels], sizes: tuple[int, ...]
) -> tuple[Gram, Rhs, ItemUnits]:
    """Gram and Rhs with the item as first axis; see :func:`lmmjax.gram.crossproducts`.

    Parameters
    ----------
    sizes : tuple of int
        Levels to pad each factor to, in the plan's order.

    Notes
    -----
    O(n (S + p + d)²) time at worst, O(m) times the blocks of one item in memory.
    """
    made = standardise(stack)
    stacked = [gr._stack(_as_standardised(made), f) for f in the_plan.factors]
    c, p, m = the_plan.n_chain, stack.X.shape[1], stack.m
    w, y = stack.w, made.y
    core = _CoreColumns(stack, stacked[c:], levels[c:], sizes[c:])
    own, up, parent, border, zy = [], [], [], [], []
    for i in range(c):
        v, z, J = levels[i], stacked[i], sizes[i]
        sums, S = LevelSums(v.row, len(v.item)), z.shape[1]
        lay = _Layer(v)
        own_i = np.zeros((m, S, S, J))
        border_i = np.zeros((m, S, core.d + p, J))
        zy_i = np.zeros((m, S, J))
        ups = [np.zeros((m, S, g.shape[1], J)) for g in stacked[i + 1 : c]]
        for s in range(S):
            wz = gr._weighted(z[:, s], w)
            for t in range(s, S):
                lay.put(own_i[:, s, t], sums(wz * z[:, t]))
                own_i[:, t, s] = own_i[:, s, t]
            for block, g in zip(ups, stacked[i + 1 : c], strict=True):
                for t in range(g.shape[1]):
                    lay.put(block[:, s, t], sums(wz * g[:, t]))
            lay.put_columns(border_i[:, s, : core.d], core.by(v.row, len(v.item), wz))
            for j in range(p):
                lay.put(border_i[:, s, core.d + j], sums(wz * made.X[:, j]))
            lay.put(zy_i[:, s], sums(wz * y))
        own.append(own_i)
        border.append(border_i)
        zy.append(zy_i)
        up.append(tuple(ups))
        parent.append(tuple(_parent(v, other, m, J) for other in levels[i + 1 : c]))
    wy = gr._weighted(y, w)
    by_item = LevelSums(stack.item, m)
    core_y = np.zeros((m, core.d + p))
    core_y[:, : core.d] = core.by(stack.item, m, wy)
    for j in range(p):
        core_y[:, core.d + j] = by_item(made.X[:, j] * wy)
    n = made.units.n.astype(float)
    logdet = np.zeros(m) if w is None else -by_item(np.log(w))
    gram = Gram(tuple(own), tuple(up), tuple(parent), tuple(border), core.gram(made, w), n, logdet)
    return gram, Rhs(tuple(zy), core_y, by_item(y * wy)), made.units


def _as_standardised(made: Standard) -> Any:
    return SimpleNamespace(Z=made.Z)


class _Layer:
    """Places sums by level, (U,), into (m, J)."""

    def __init__(self, levels: _Levels) -> None:
        self.at = (levels.item, levels.local)

    def put(self, where: np.ndarray, values: np.ndarray) -> None:
        where[self.at] = values

    def put_columns(self, where: np.ndarray, values: np.ndarray) -> None:
        """``where`` (m, d, J), ``values`` (U, d)."""
        where[self.at[0], :, self.at[1]] = values


def _parent(child: _Levels, parent: _Levels, m: int, J: int) -> np.ndarray:
    """Local number of the parent level of each level of ``child``, (m, J); 0 for padding."""
    of_level = np.zeros(len(child.item), np.int32)
    of_level[child.row] = parent.local[parent.row]
    out = np.zeros((m, J), np.int32)
    out[child.item, child.local] = of_level
    return out


class _CoreColumns:
    """The columns of Z in the core, numbered within each item: level by level, factor by factor."""

    def __init__(
        self,
        stack: Stack,
        z: list[np.ndarray],
        levels: list[_Levels],
        sizes: tuple[int, ...],
    ) -> None:
        self.z, self.stack = z, stack
        widths = [a.shape[1] * J for a, J in zip(z, sizes, strict=True)]
        starts = np.cumsum([0, *widths])
        self.d = int(starts[-1])
        # column of the first coefficient of each row's level
        self.first = [
            start + v.local[v.row] * a.shape[1]
            for start, v, a in zip(starts, levels, z, strict=False)
        ]

    def by(self, rows: np.ndarray, U: int, left: np.ndarray) -> np.ndarray:
        """Sums of left * z by (group of rows, column): (U, d)."""
        out = np.zeros(U * self.d)
        for z, first in zip(self.z, self.first, strict=True):
            for s in range(z.shape[1]):
                cell = rows.astype(np.int64) * self.d + first + s
                out += np.bincount(cell, weights=left * z[:, s], minlength=U * self.d)
        return out.reshape(U, self.d)

    def gram(self, made: Standard, w: np.ndarray | None) -> np.ndarray:
        """[Z_c X]'W[Z_c X] by item, (m, d + p, d + p)."""
        m, p, d = self.stack.m, made.X.shape[1], self.d
        out = np.zeros((m, d + p, d + p))
        out[:, d:, d:] = made.xx
        for z, first in zip(self.z, self.first, strict=True):
            for s in range(z.shape[1]):
                cell = self.stack.item.astype(np.int64) * d + first + s
                wz = gr._weighted(z[:, s], w)
                flat = self.by(cell, m * d, wz).reshape(m, d, d)
                out[:, :d, :d] += flat
        for j in range(p):
            out[:, :d, d + j] = self.by(self.stack.item, m, gr._weighted(made.X[:, j], w))
            out[:, d + j, :d] = out[:, :d, d + j]
        return out

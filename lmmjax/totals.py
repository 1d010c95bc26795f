r"""Sums over batches of a streamed table, and their change to the units of the whole.

A batch is standardised with *rough* shifts and scales, learned from a sample of rows; sums of
products then keep their digits. When all rows have been seen the exact means and sizes are known,
and since both sets of columns span the same space the sums are taken over exactly:
with X_s = X_r T, Z_s = Z_r U and y_s = (y_r + X_r g) / c every product is a small linear map of the
rough ones. The results are the `Units`, `Gram` and `Rhs` that an in-memory design has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from lmmjax import cross, gram
from lmmjax.covariance import covariance
from lmmjax.errors import DesignError
from lmmjax.gram import Gram, Plan, Rhs, Standardised, Units, shift_matrix
from lmmjax.rank import independent_columns

__all__ = [
    "Columns",
    "Rough",
    "Totals",
    "aliases",
    "empty_totals",
    "exact",
    "rough_units",
    "sum_batch",
    "sum_standardised",
]

Array = np.ndarray


@dataclass(frozen=True)
class Columns:
    """Rows in the units of the data: all columns of X, aliased ones too; y without the offset."""

    X: Array  # (n, P)
    y: Array  # (n,)
    weights: Array | None  # (n,)
    Z: tuple[Array, ...]  # per term (n, S)
    codes: tuple[Array, ...]  # per term (n,)


@dataclass(frozen=True)
class Shift:
    """(column - mean) / size; means are 0 where ``a``, the coefficients of 1, is not."""

    a: Array
    mean: Array
    size: Array

    def apply(self, columns: Array, out: Array | None = None) -> Array:
        """Standardise (n, k) columns, into ``out`` if it is given."""
        out = np.empty(columns.shape, order="F") if out is None else out
        for j, column in enumerate(columns.T):
            np.subtract(column, self.mean[j], out=out[:, j])
            out[:, j] /= self.size[j]
        return out

    def moved(self, sums: Array, squares: Array, n: int, hom: bool = False) -> tuple[Shift, Array]:
        """Return the exact shift, given sums over the columns shifted so far, and the map T."""
        shifted = (self.a == 0.0) & bool(self.a.any())
        # The new mean as a float: what is undone later must be what was done, to the last bit
        total = self.mean + self.size * np.where(shifted, sums / n, 0.0)
        mean = (total - self.mean) / self.size
        size = np.sqrt(np.maximum(squares / n - (2 * sums / n - mean) * mean, 0.0))
        size = np.where(size > 0, size, 1.0 / self.size)
        if hom:
            size = np.full(len(size), (size * self.size).mean()) / self.size
        T = shift_matrix(self.a * self.size, mean, size)
        return Shift(self.a, total, self.size * size), T

    @property
    def matrix(self) -> Array:
        """A of X_s = X A."""
        return shift_matrix(self.a, self.mean, self.size)


def _shift(columns: Array, a: Array, hom: bool = False) -> Shift:
    shifted = (a == 0.0) & bool(a.any())
    mean = np.where(shifted, columns.mean(axis=0), 0.0)
    size = np.array([gram._rms(c - m) for c, m in zip(columns.T, mean, strict=True)])
    return Shift(a, mean, np.full(len(size), size.mean()) if hom and len(size) else size)


@dataclass(frozen=True)
class Rough:
    """Shifts and scales near those of the whole table."""

    x: Shift
    z: tuple[Shift, ...]
    shift: float  # of y, before the fit below
    coef: Array  # (P,), fit of y - shift on the shifted columns
    scale: float

    def apply(self, rows: Columns, space: gram.Workspace | None = None) -> Standardised:
        """Standardise a batch; in ``space``, it is lost with the next one."""
        space = gram.Workspace() if space is None else space
        X = self.x.apply(rows.X, space("X", rows.X.shape[::-1]).T)
        y = np.subtract(rows.y, self.shift, out=space("y", rows.y.shape))
        y -= X @ self.coef
        y /= self.scale
        Z = tuple(
            s.apply(z, space(("Z", k), z.shape[::-1]).T)
            for k, (s, z) in enumerate(zip(self.z, rows.Z, strict=True))
        )
        return Standardised(X, y, Z, None)  # type: ignore[arg-type]


def rough_units(
    sample: Columns, constant: Array, z_constant: Sequence[int | None], covs: Sequence[str]
) -> Rough:
    """Choose shifts and scales from a sample.

    Parameters
    ----------
    sample : Columns
    constant : (P,) array
        Coefficients a with X a = 1, or zeros.
    z_constant : sequence of int or None
        Position of the intercept of each term.
    covs : sequence of str
        Covariance structure of each term.
    """
    x = _shift(sample.X, constant)
    X = x.apply(sample.X)
    shift = float(sample.y.mean()) if constant.any() else 0.0
    y = sample.y - shift
    coef = np.zeros(X.shape[1])
    if X.shape[1]:
        keep = independent_columns(X, intercept=False)
        root = 1.0 if sample.weights is None else np.sqrt(sample.weights)
        coef[keep] = np.linalg.lstsq((X[:, keep].T * root).T, y * root, rcond=None)[0]
    scale = gram._rms(y - X @ coef)
    z = []
    for columns, position, cov in zip(sample.Z, z_constant, covs, strict=True):
        structure = covariance(cov, columns.shape[1])
        a = np.zeros(columns.shape[1])
        if structure.mixes and position is not None:
            a[position] = 1.0
        z.append(_shift(columns, a, not structure.scales))
    return Rough(x, tuple(z), shift, coef, scale)


# Sums -----------------------------------------------------------------------------------------


@dataclass
class Totals:
    """Sums that add over batches, partitions and machines.

    Attributes
    ----------
    levels : list of list of array
        Per factor of the chain its products by level (level last): own, up ..., border, y.
    flat : dict of array
        Everything else.
    """

    levels: list[list[Array]]
    flat: dict[str, Array]

    def add(self, part: Part) -> None:
        """Add a batch; its levels are a window of all levels."""
        for totals, arrays, window in zip(self.levels, part.levels, part.windows, strict=True):
            for total, array in zip(totals, arrays, strict=True):
                total[..., window] += array
        for key, value in part.flat.items():
            self.flat[key] += value


@dataclass(frozen=True)
class Part:
    """The sums of one batch; ``windows`` are the levels (slice or numbers) of each chain factor."""

    windows: list[Any]
    levels: list[list[Array]]
    flat: dict[str, Array]


def empty_totals(plan: Plan) -> Totals:
    """Return zeros of the shapes that `sum_batch` returns."""
    layout = plan.layout
    width, levels = layout.d + layout.p, []
    for i, (_, S, J) in enumerate(layout.chain):
        up = [np.zeros((S, other, J)) for _, other, _ in layout.chain[i + 1 :]]
        levels.append([np.zeros((S, S, J)), *up, np.zeros((S, width, J)), np.zeros((S, J))])
    terms = [np.zeros(s.S) for s in layout.structures]
    flat = {
        "core": np.zeros((width, width)),
        "core_y": np.zeros(width),
        "yy": np.zeros(()),
        "n": np.zeros(()),
        "logdet_R": np.zeros(()),
        "x": np.zeros(layout.p),
        "xx": np.zeros(layout.p),
        "y2": np.zeros(()),
    }
    flat |= {f"z{k}": zero.copy() for k, zero in enumerate(terms)}
    flat |= {f"zz{k}": zero.copy() for k, zero in enumerate(terms)}
    return Totals(levels, flat)


def _window(codes: Array, J: int) -> tuple[Any, Array, int]:
    """Return the levels of a batch (a slice where they are close), codes within, their number."""
    low, high = int(codes.min()), int(codes.max())
    if high - low < 2 * codes.size:
        return slice(low, high + 1), codes - np.int32(low), high - low + 1
    levels, inside = np.unique(codes, return_inverse=True)
    return levels, inside.astype(np.int32), levels.size


def sum_batch(rows: Columns, plan: Plan, rough: Rough, space: gram.Workspace | None = None) -> Part:
    """Sum the products of a batch, and what its exact units are found from.

    The part is to be used before the next one is made in the same ``space``.
    """
    standard = rough.apply(rows, space)
    part = sum_standardised(standard, rows.codes, rows.weights, plan, space)
    part.flat["x"] = standard.X.sum(axis=0)
    part.flat["xx"] = np.einsum("ij,ij->j", standard.X, standard.X)
    part.flat["y2"] = np.asarray(np.sum((rows.y - rough.shift) ** 2))
    for k, z in enumerate(standard.Z):
        part.flat[f"z{k}"] = z.sum(axis=0)
        part.flat[f"zz{k}"] = np.einsum("ij,ij->j", z, z)
    return part


def sum_standardised(
    standard: Standardised,
    codes: Sequence[Array],
    weights: Array | None,
    plan: Plan,
    space: gram.Workspace | None = None,
) -> Part:
    """Sum the products of some rows: `gram.crossproducts` on the levels that they have."""
    codes = list(codes)
    windows, factors = [], list(plan.factors)
    for i, factor in enumerate(plan.factors[: plan.n_chain]):
        window, inside, J = _window(codes[factor.terms[0]], factor.J)
        windows.append(window)
        factors[i] = replace(factor, J=J)
        for k in factor.terms:
            codes[k] = inside
    chain = tuple((f.terms, f.S, f.J) for f in factors[: plan.n_chain])
    local = Plan(replace(plan.layout, chain=chain), tuple(factors))
    design = SimpleNamespace(
        terms=[SimpleNamespace(codes=c) for c in codes],
        weights=weights,
        has_weights=weights is not None,
    )
    skip = tuple(tuple(None for _ in chain[i + 1 :]) for i in range(len(chain)))
    sums, rhs = gram.crossproducts(design, local, standard, parents=skip, space=space)
    levels = [[sums.own[i], *sums.up[i], sums.border[i], rhs.border[i]] for i in range(len(chain))]
    flat = {
        "core": sums.core,
        "core_y": rhs.core,
        "yy": rhs.yy,
        "n": sums.n,
        "logdet_R": sums.logdet_R,
    }
    return Part(windows, levels, flat)


# The units of the whole -----------------------------------------------------------------------


def exact(
    totals: Totals, plan: Plan, rough: Rough, keep: Array, parents: dict[tuple[str, str], Array]
) -> tuple[Plan, Units, Gram, Rhs]:
    """Drop aliased columns and go over to the exact units; see the top of this file.

    Raises
    ------
    DesignError
        Where the fixed effects fit the response exactly.

    Notes
    -----
    O(q_chain (S + d + p)²) time; the totals are used up.
    """
    f, layout = totals.flat, plan.layout
    n, d, kept = int(f["n"]), layout.d, np.flatnonzero(keep)
    x, T = rough.x.moved(f["x"], f["xx"], n)
    moved = [
        shift.moved(f[f"z{k}"], f[f"zz{k}"], n, not s.scales)
        for k, (shift, s) in enumerate(zip(rough.z, layout.structures, strict=True))
    ]
    maps = [U for _, U in moved]
    g = _fit(f, d, kept, rough)
    core_y, yy = _residual_products(f, d, g)
    size = float(np.sqrt(max(yy, 0.0) / n))
    if not rough.scale * size > 1e-14 * float(np.sqrt(f["y2"] / n)):
        raise DesignError(gram.EXACT_FIT)
    columns = np.concatenate([np.arange(d), d + kept])
    M = _block([_core_map(plan, maps), T[np.ix_(kept, kept)]])
    levels, rhs_border = _moved_levels(totals, plan, maps, M, columns, g / size, size)
    chain = plan.factors[: plan.n_chain]
    sums = Gram(
        own=tuple(first for first, _, _ in levels),
        up=tuple(ups for _, ups, _ in levels),
        parent=tuple(
            tuple(parents[a.group, b.group] for b in chain[i + 1 :]) for i, a in enumerate(chain)
        ),
        border=tuple(edge for _, _, edge in levels),
        core=M.T @ f["core"][np.ix_(columns, columns)] @ M,
        n=f["n"],
        logdet_R=f["logdet_R"],
    )
    rhs = Rhs(rhs_border, M.T @ core_y[columns] / size, np.float64(yy / size**2))
    A = shift_matrix(x.a[kept], x.mean[kept], x.size[kept])
    beta0 = x.a * rough.shift + rough.x.matrix @ (rough.coef - rough.scale * g)
    logdet = float(np.linalg.slogdet(A)[1]) if len(A) else 0.0
    B = tuple(z.matrix for z, _ in moved)
    units = Units(A, beta0[kept], rough.scale * size, B, logdet, n, len(kept))
    final, sums = by_entry(Plan(replace(layout, p=len(kept)), plan.factors), sums)
    return final, units, sums, rhs


def aliases(totals: Totals, rough: Rough, keep: Array) -> Array:
    """Return the dropped columns as combinations of those kept, (p, P - p)."""
    P = len(keep)
    xx = totals.flat["core"][-P:, -P:]
    among = np.linalg.solve(xx[np.ix_(keep, keep)], xx[np.ix_(keep, ~keep)])
    size, mean = rough.x.size, rough.x.mean / rough.x.size
    constant = mean[~keep] - mean[keep] @ among
    return size[~keep] * (among / size[keep][:, None] + np.outer(rough.x.a[keep], constant))


def _residual_products(f: dict[str, Array], d: int, g: Array) -> tuple[Array, float]:
    """Products of the core's columns with y + X g, and its square."""
    core, core_y = f["core"], f["core_y"]
    yy = float(f["yy"]) + 2 * float(g @ core_y[d:]) + float(g @ core[d:, d:] @ g)
    return core_y + core[:, d:] @ g, yy


def _moved_levels(
    totals: Totals, plan: Plan, maps: list[Array], M: Array, columns: Array, g: Array, size: float
) -> tuple[list[tuple[Array, tuple[Array, ...], Array]], tuple[Array, ...]]:
    """Own, up and border of each chain factor in new units, and the products with y/size + X g."""
    blocks = [_block([maps[k] for k in f.terms]) for f in plan.factors[: plan.n_chain]]
    d, out, rhs = plan.layout.d, [], []
    for i, (U, arrays) in enumerate(zip(blocks, totals.levels, strict=True)):
        first, *ups, edge, zy = arrays
        arrays.clear()  # these are the largest arrays of a model
        rhs.append(U.T @ (zy / size + np.tensordot(edge[:, d:], g, axes=(1, 0))))
        moved = tuple(_both(U, up, V) for up, V in zip(ups, blocks[i + 1 :], strict=True))
        edge = edge if len(columns) == edge.shape[1] else edge[:, columns]
        out.append((_both(U, first, U), moved, _both(U, edge, M)))
    return out, tuple(rhs)


def by_entry(plan: Plan, sums: Gram) -> tuple[Plan, Gram]:
    """Keep the chain's products with the core by entry where `gram.plan` would."""
    layout, d = plan.layout, plan.layout.d
    if len(layout.chain) != 1 or d <= gram.DENSE:
        return plan, sums
    border = sums.border[0]
    _, S, J = layout.chain[0]
    present = np.any(border[:, :d] != 0.0, axis=0)
    per_level = present.sum(axis=0)
    if not cross.pays(int(np.sum(per_level * (per_level + 1)) / 2), S, J, d):
        return plan, sums
    column, level = np.nonzero(present)
    made = cross.from_entries(level, column, border[:, column, level], J, d)
    sums = sums._replace(border=(border[:, d:].copy(),), cross=made)
    return Plan(replace(layout, sparse=True), plan.factors), sums


def _both(left: Array, block: Array, right: Array) -> Array:
    """left' block right for each level, (S, m, J)."""
    return np.tensordot(left.T, np.matmul(right.T, block), axes=1)


def _fit(f: dict[str, Array], d: int, kept: Array, rough: Rough) -> Array:
    """Return g (P,): y_r + X_r g is the residual of y on the kept columns.

    What the rough fit gave to a column that is dropped is taken back first.
    """
    g = rough.coef / rough.scale
    g[kept] = 0.0
    if len(kept):
        xx = f["core"][d:, d:]
        xy = f["core_y"][d:] + xx @ g
        g[kept] = -np.linalg.solve(xx[np.ix_(kept, kept)], xy[kept])
    return g


def _core_map(plan: Plan, maps: list[Array]) -> Array:
    """Block-diagonal map of the core's columns of Z, level by level."""
    blocks = []
    for factor in plan.factors[plan.n_chain :]:
        blocks.append(np.kron(np.eye(factor.J), _block([maps[k] for k in factor.terms])))
    return _block(blocks)


def _block(blocks: list[Array]) -> Array:
    from scipy.linalg import block_diag

    return block_diag(*blocks) if blocks else np.zeros((0, 0))

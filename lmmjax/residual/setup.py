"""Rows to a source: sorting, padding and summing, once per model, in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax.gram import Gram, Plan, Rhs, Standardised, _parents, _stack, crossproducts
from lmmjax.residual.frame import Residuals
from lmmjax.residual.source import Basis, Block, Patterns, Rows, Source, Where, assemble
from lmmjax.residual.structures import Autoregressive, CompoundSymmetry

#: distinct strata or lengths up to which fixed Grams are kept
MOST_GRAMS = 24
#: places of the grid up to which patterns are summed
MOST_PLACES = 64
#: numbers that the sums of outer products may take
MOST_SUMS = 8_000_000


def make_source(design: Any, the_plan: Plan, standardised: Standardised) -> Source:
    """The cheapest source that serves the structure on these data.

    Parameters
    ----------
    design : Design
        With ``residual``.
    the_plan, standardised
        As for ``gram.crossproducts``; the plan made with the residual subjects.

    Returns
    -------
    Rows, Basis or Patterns

    Notes
    -----
    O(n K²) time for the sums, O(n log n) for sorting; K local columns.
    """
    r: Residuals = design.residual
    if not r.correlated:
        strata, codes = np.unique(r.H, axis=0, return_inverse=True)
        if len(strata) <= MOST_GRAMS:
            return _strata(design, the_plan, standardised, strata, codes.ravel())
    rows = whitened_rows(design, the_plan, standardised)
    if r.structure.variances.n_phi == 0 and (basis := _basis(rows)) is not None:
        return basis
    if not design.terms and (sums := patterns_source(rows, 0.5)) is not None:
        return sums
    return rows


# Local columns --------------------------------------------------------------------------------


def _local(
    design: Any, the_plan: Plan, standardised: Standardised, subject: np.ndarray, G: int
) -> tuple[np.ndarray, Where]:
    """Columns [Z local, X, y] (n, K) and what the local ones stand for."""
    chain = the_plan.factors[: the_plan.n_chain]
    codes = {f.group: design.terms[f.terms[0]].codes for f in the_plan.factors}
    columns, chain_levels, core = [], [], []
    for f in chain:
        level = np.zeros(G, np.int32)
        level[subject] = codes[f.group]
        chain_levels.append(level)
        columns.append(_stack(standardised, f))
    first = 0
    for f in the_plan.factors[the_plan.n_chain :]:
        slot, table = _slots(subject, G, codes[f.group], f.J)
        m = table.shape[1]
        local = np.zeros((len(subject), m, f.S))
        local[np.arange(len(subject)), slot] = _stack(standardised, f)
        columns.append(local.reshape(len(subject), m * f.S))
        place = first + table[:, :, None] * f.S + np.arange(f.S)
        core.append(place.reshape(G, m * f.S))
        first += f.S * f.J
    p = standardised.X.shape[1]
    core.append(np.broadcast_to(first + np.arange(p), (G, p)))
    parents = tuple(
        tuple(_parents(codes[f.group], f.J, codes[g.group]) for g in chain[i + 1 :])
        for i, f in enumerate(chain)
    )
    M = np.concatenate([*columns, standardised.X, standardised.y[:, None]], axis=1)
    where = Where(tuple(chain_levels), np.concatenate(core, axis=1).astype(np.int32), parents)
    return M, where


def _slots(subject: np.ndarray, G: int, codes: np.ndarray, J: int) -> tuple[np.ndarray, np.ndarray]:
    """Slot of each row among the levels that its subject meets, and the table (G, m) of levels."""
    pairs, at = np.unique(subject.astype(np.int64) * J + codes, return_inverse=True)
    owner, level = np.divmod(pairs, J)
    counts = np.bincount(owner, minlength=G)
    start = np.cumsum(counts) - counts
    slot = np.arange(len(pairs)) - start[owner]
    table = np.zeros((G, int(counts.max())), np.int64)
    table[owner, slot] = level
    return slot[at.ravel()], table


# Padded blocks --------------------------------------------------------------------------------


def whitened_rows(design: Any, the_plan: Plan, standardised: Standardised) -> Rows:
    """The source that serves every structure; O(n K) memory."""
    r: Residuals = design.residual
    weights = design.weights if design.has_weights else np.ones(design.n)
    G = int(r.subject.max()) + 1
    M, where = _local(design, the_plan, standardised, r.subject, G)
    M = M * np.sqrt(weights)[:, None]
    groups = row_groups(r)
    blocks = [_block(r, M, rows, mask.astype(float)) for rows, mask in groups]
    by = np.concatenate([r.subject[rows[:, 0]] for rows, _ in groups])
    where = Where(tuple(x[by] for x in where.chain), where.core[by], where.parent)
    logdet = np.float64(-np.sum(np.log(weights)))
    layout, structure = the_plan.layout, r.structure
    return Rows(layout, structure, tuple(blocks), where, np.float64(design.n), logdet)


def row_groups(r: Residuals) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of each block by position."""
    return groups_of_rows(r.subject, np.lexsort((*r.pos.T[::-1], r.subject)))


def groups_of_rows(subject: np.ndarray, order: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows (G, T) of subjects of similar length and which are real; within a subject by ``order``.

    ``order`` sorts the rows; padding repeats the last row of a subject.
    """
    order = order[np.argsort(subject[order], kind="stable")]
    sizes = np.bincount(subject)
    start = np.cumsum(sizes) - sizes
    out = []
    for group in _lengths(sizes):
        T = int(sizes[group].max())
        at = start[group][:, None] + np.minimum(np.arange(T), sizes[group][:, None] - 1)
        out.append((order[at], np.arange(T) < sizes[group][:, None]))
    return out


def _lengths(sizes: np.ndarray) -> list[np.ndarray]:
    """Subjects in groups of similar length: one where that wastes little, else by powers of 2."""
    if sizes.max() * len(sizes) <= 1.5 * sizes.sum():
        return [np.arange(len(sizes))]
    bucket = np.ceil(np.log2(sizes)).astype(int)
    return [np.flatnonzero(bucket == b) for b in np.unique(bucket)]


def _block(r: Residuals, M: np.ndarray, rows: np.ndarray, mask: np.ndarray) -> Block:
    pos = r.pos[rows]
    key = np.concatenate([pos.reshape(len(rows), -1), mask], axis=1)
    if r.structure.family is not None and r.structure.family.route == "dense":
        _, first, pattern = np.unique(key, axis=0, return_index=True, return_inverse=True)
    else:
        first, pattern = np.zeros(1, int), np.zeros(len(rows), int)
    return Block(
        M[rows] * mask[..., None],
        mask,
        r.H[rows] * mask[..., None],
        pos,
        pattern.ravel().astype(np.int32),
        pos[first],
        mask[first],
    )


# Fixed cross-products -------------------------------------------------------------------------


def _strata(
    design: Any, the_plan: Plan, standardised: Standardised, H: np.ndarray, codes: np.ndarray
) -> Basis:
    """One Gram per stratum of equal variance."""
    whole, _ = _plan_parents(design, the_plan)
    made = []
    for k in range(len(H)):
        rows = np.flatnonzero(codes == k)
        terms = [SimpleNamespace(codes=t.codes[rows]) for t in design.terms]
        part = SimpleNamespace(
            terms=terms, has_weights=design.has_weights, weights=design.weights[rows]
        )
        Z = tuple(z[rows] for z in standardised.Z)
        cut = Standardised(standardised.X[rows], standardised.y[rows], Z, standardised.units)
        made.append(crossproducts(part, the_plan, cut, parents=whole))
    gram, rhs = _stacked(made)
    logdet = np.float64(sum(g.logdet_R for g, _ in made))
    gram = gram._replace(n=np.float64(design.n), logdet_R=logdet, parent=whole)
    sizes = np.bincount(codes).astype(float)
    return Basis("strata", design.residual.structure, gram, rhs, sizes, np.zeros(0), H)


def _plan_parents(design: Any, the_plan: Plan) -> tuple[Any, int]:
    chain = the_plan.factors[: the_plan.n_chain]
    codes = [design.terms[f.terms[0]].codes for f in chain]
    parents = tuple(
        tuple(_parents(codes[i], f.J, other) for other in codes[i + 1 :])
        for i, f in enumerate(chain)
    )
    return parents, len(chain)


def _stacked(made: list[tuple[Gram, Rhs]]) -> tuple[Gram, Rhs]:
    stack = lambda *x: np.stack([np.asarray(a) for a in x])  # noqa: E731
    grams = [g._replace(parent=()) for g, _ in made]
    return jax.tree.map(stack, *grams), jax.tree.map(stack, *[r for _, r in made])


def _basis(rows: Rows) -> Basis | None:
    """Fixed Grams of equally spaced AR(1) and of compound symmetry, where there are few."""
    found = operators(rows)
    if found is None:
        return None
    kind, matrices, sizes = found
    empty = np.zeros(0)
    M = np.concatenate([padded(b.M, int(sizes.max())) for b in rows.blocks])
    grams, rhs = _sums(rows, [np.einsum("gtk,gtl->gkl", M, Q(M)) for Q in matrices])
    if kind == "chain":
        follow = np.float64(np.sum(sizes - 1))
        return Basis(kind, rows.structure, grams, rhs, follow, empty, empty)
    lengths, counts = np.unique(sizes, return_counts=True)
    return Basis(
        kind, rows.structure, grams, rhs, lengths.astype(float), counts.astype(float), empty
    )


Operator = Callable[[np.ndarray], np.ndarray]


def operators(rows: Rows) -> tuple[str, list[Operator], np.ndarray] | None:
    """Fixed matrices Q_k of R⁻¹ = Σ c_k(φ) Q_k, each as a map of padded columns (G, T, K)."""
    family = rows.structure.family
    sizes = np.concatenate([b.mask.sum(axis=1) for b in rows.blocks]).astype(int)
    if isinstance(family, Autoregressive) and all(_unit_steps(b) for b in rows.blocks):
        return "chain", [lambda x: x, _signed(sizes), _neighbours], sizes
    lengths = np.unique(sizes)
    if isinstance(family, CompoundSymmetry) and len(lengths) < MOST_GRAMS:
        return "mean", [lambda x: x, *(_totals(sizes == m) for m in lengths)], sizes
    return None


def _signed(sizes: np.ndarray) -> Operator:
    """1 on inner rows, -1 on the row of a subject that has one alone, 0 at the ends."""
    places = np.arange(int(sizes.max()))
    last, first = places == (sizes - 1)[:, None], places == 0
    sign = (~last & ~first).astype(float) - (last & first)
    return lambda x: sign[..., None] * x


def _neighbours(x: np.ndarray) -> np.ndarray:
    """The row before plus the row after."""
    out = np.zeros_like(x)
    out[:, 1:] += x[:, :-1]
    out[:, :-1] += x[:, 1:]
    return out


def _totals(mine: np.ndarray) -> Operator:
    """11' for some subjects, 0 for the others."""
    return lambda x: np.where(mine[:, None, None], x.sum(axis=1, keepdims=True), 0.0)


def padded(x: np.ndarray, T: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, T - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))


def _unit_steps(b: Block) -> bool:
    follows = b.mask[:, 1:] > 0
    return bool(np.all(np.diff(b.pos[..., 0], axis=1)[follows] == 1))


def _sums(rows: Rows, products: list[np.ndarray]) -> tuple[Gram, Rhs]:
    made = []
    with jax.enable_x64(True):
        for C in products:
            gram, rhs = assemble(rows.layout, rows.where, jnp.asarray(C), rows.n, rows.logdet_W)
            made.append(jax.tree.map(np.asarray, (gram, rhs)))
    gram, rhs = _stacked(made)
    return gram._replace(n=rows.n, logdet_R=rows.logdet_W, parent=rows.where.parent), rhs


class Coded(NamedTuple):
    """Subjects by pattern: padded columns and which places of the grid each pattern has."""

    M: np.ndarray  # (G, T, K)
    grid: np.ndarray  # positions and variances of the U places
    patterns: np.ndarray  # (P, T) places, -1 where padded
    code: np.ndarray  # (G,)


def coded(rows: Rows) -> Coded:
    T = max(b.M.shape[1] for b in rows.blocks)
    M, mask, H, pos = (
        np.concatenate([padded(getattr(b, name), T) for b in rows.blocks])
        for name in ("M", "mask", "H", "pos")
    )
    real = mask > 0
    grid, at = np.unique(np.concatenate([pos[real], H[real]], axis=1), axis=0, return_inverse=True)
    place = np.full(mask.shape, -1)
    place[real] = at.ravel()
    patterns, code = np.unique(place, axis=0, return_inverse=True)
    return Coded(M, grid, patterns, code.ravel())


def patterns_source(rows: Rows, share: float) -> Patterns | None:
    """Sums of outer products per set of positions and variances, where they are few enough.

    ``share`` is the number of sets for each subject, at most.
    """
    if rows.structure.family is None:
        return None
    M, grid, patterns, code = coded(rows)
    (P, T), K = patterns.shape, rows.layout.p + 1
    size = P * T * (T + 1) * K * (K + 1) // 4
    if len(grid) > MOST_PLACES or size > MOST_SUMS or P > share * len(M):
        return None
    dim = rows.blocks[0].pos.shape[2]
    return Patterns(
        rows.layout,
        rows.structure,
        _outer_products(M, code, P),
        grid[:, :dim],
        grid[:, dim:],
        np.maximum(patterns, 0).astype(np.int32),
        (patterns >= 0).astype(float),
        np.bincount(code).astype(float),
        rows.where._replace(core=rows.where.core[:1]),
        rows.n,
        rows.logdet_W,
    )


def _outer_products(M: np.ndarray, code: np.ndarray, P: int) -> np.ndarray:
    """Σ over the subjects of a pattern of x_t x_u' + x_u x_t', lower triangles: (P TT, KK)."""
    T, K = M.shape[1:]
    (t, u), (k, m) = np.tril_indices(T), np.tril_indices(K)
    sums = np.empty((P, len(t), len(k)))
    for q in range(P):
        rows = M[code == q].reshape(-1, T * K)
        outer = (rows.T @ rows).reshape(T, K, T, K).transpose(0, 2, 1, 3)
        both = outer[t, u] + np.where((t != u)[:, None, None], outer[u, t], 0.0)
        sums[q] = both[:, k, m]
    return sums.reshape(P * len(t), -1)

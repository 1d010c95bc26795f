r"""Where the optimiser starts: variances by the method of moments, from the cross-products.

MINQUE(0) (Rao 1970; Searle, Casella and McCulloch 1992, section 11.3): with P = I - X(X'X)⁻¹X' the
quadratic forms y'PZ_kZ_k'Py have expectations that are linear in the variances,

    E |Z_k'Py|² = Σ_l σ_l² |Z_k'PZ_l|² + σ² tr(Z_k'PZ_k)
    E y'Py      = Σ_l σ_l² tr(Z_l'PZ_l) + σ² (n - p)

so one small linear system gives a variance for each column of Z. They are unbiased and far from
efficient, which is all that a start needs; negative ones are lifted. O(size of the Gram).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmmjax.covariance import Diagonal, Unstructured
from lmmjax.gram import Gram, Layout, Rhs

#: relative SDs of a start stay between these: away from the saddle at 0, and from infinity
SMALLEST, LARGEST = 0.05, 20.0


class _Column(NamedTuple):
    """One column of Z over all levels: products with X (p, J) and y (J,), and its place."""

    u: np.ndarray
    y: np.ndarray
    place: tuple[int, int]  # -1 and s for the chain; factor and s for the core
    trace: float  # tr(Z'Z)


def identity(layout: Layout) -> np.ndarray:
    """Parameters of Λ = I for every term."""
    return np.concatenate([np.zeros(0), *(s.start() for s in layout.structures)])


def moments(layout: Layout, gram: Gram, rhs: Rhs) -> np.ndarray:
    """θ from MINQUE(0), in standardised units; shape (n_theta,).

    Chains of several factors start from the identity, as does everything if the moments fail.
    """
    if len(layout.chain) != 1 or layout.n_theta == 0:
        return identity(layout)
    variances = _variances(layout, gram, rhs)
    if variances is None:
        return identity(layout)
    sds = np.sqrt(np.clip(variances[:-1] / variances[-1], SMALLEST**2, LARGEST**2))
    out: dict[int, np.ndarray] = {}
    at = 0
    for terms, _, _ in (*layout.chain, *layout.core):
        for k in terms:
            structure = layout.structures[k]
            out[k] = structure.from_factor(np.diag(sds[at : at + structure.S]))
            at += structure.S
    return np.concatenate([out[k] for k in range(len(out))])


def _variances(layout: Layout, gram: Gram, rhs: Rhs) -> np.ndarray | None:
    """Variance of each column of Z, chain first, and of the residual; None where undetermined."""
    d = layout.d
    W = np.linalg.inv(gram.core[d:, d:])
    columns = _columns(layout, gram, rhs)
    K = len(columns)
    system, right = _system(layout, gram, columns, W), np.empty(K + 1)
    for i, a in enumerate(columns):
        right[i] = np.sum((a.y - a.u.T @ (W @ rhs.core[d:])) ** 2)
    right[K] = float(rhs.yy) - rhs.core[d:] @ W @ rhs.core[d:]
    if not np.all(np.isfinite(system)) or np.linalg.cond(system) > 1e12:
        return None
    variances = np.linalg.solve(system, right)
    total = right[K] / system[K, K]
    variances[K] = max(variances[K], 0.05 * total)
    return variances


def _system(layout: Layout, gram: Gram, columns: list[_Column], W: np.ndarray) -> np.ndarray:
    """Expectations of the quadratic forms per unit of each variance, σ² last: (K + 1, K + 1)."""
    K = len(columns)
    system = np.empty((K + 1, K + 1))
    weighted = [W @ (c.u @ c.u.T) for c in columns]
    for i, a in enumerate(columns):
        for j, b in enumerate(columns[: i + 1]):
            squares, middle = _products(layout, gram, a, b)
            overlap = np.sum(weighted[i] * weighted[j].T) - 2 * np.sum(W * middle.T)
            system[i, j] = system[j, i] = squares + overlap
        system[i, K] = system[K, i] = a.trace - np.trace(weighted[i])
    system[K, K] = float(gram.n) - layout.p
    return system


def moments_of_many(layout: Layout, gram: Gram, rhs: Rhs) -> np.ndarray:
    """:func:`moments` of many responses on one design, ``rhs`` with a leading axis: (m, n_theta).

    Structures other than unstructured and diagonal start from the identity. O(m q).
    """
    m, d = len(rhs.yy), layout.d
    out = np.tile(identity(layout), (m, 1))
    if len(layout.chain) != 1 or layout.n_theta == 0:
        return out
    W = np.linalg.inv(gram.core[d:, d:])
    first = Rhs(tuple(b[0] for b in rhs.border), rhs.core[0], rhs.yy[0])
    columns = _columns(layout, gram, first)
    system = _system(layout, gram, columns, W)
    if not np.all(np.isfinite(system)) or np.linalg.cond(system) > 1e12:
        return out
    fixed = rhs.core[:, d:] @ W  # (m, p)
    right = np.empty((m, len(columns) + 1))
    for i, c in enumerate(columns):
        f, s = c.place
        y = rhs.border[0][:, s] if f < 0 else rhs.core[:, _rows(layout, c)]
        rest = y - fixed @ c.u
        right[:, i] = np.einsum("mj,mj->m", rest, rest)
    right[:, -1] = rhs.yy - np.einsum("mi,mi->m", fixed, rhs.core[:, d:])
    variances = np.linalg.solve(system, right.T).T
    residual = np.maximum(variances[:, -1], 0.05 * right[:, -1] / system[-1, -1])
    ratio = np.nan_to_num(variances[:, :-1] / residual[:, None], nan=1.0)
    sds = np.sqrt(np.clip(ratio, SMALLEST**2, LARGEST**2))
    return _place(layout, sds, out)


def _place(layout: Layout, sds: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """SDs of the columns, chain first, into θ where they are parameters."""
    starts = np.cumsum([0, *(s.n_theta for s in layout.structures)])
    at = 0
    for terms, _, _ in (*layout.chain, *layout.core):
        for k in terms:
            structure = layout.structures[k]
            if isinstance(structure, Unstructured | Diagonal):
                diagonal = starts[k] + np.flatnonzero(structure.start())
                theta[:, diagonal] = sds[:, at : at + structure.S]
            at += structure.S
    return theta


def _columns(layout: Layout, gram: Gram, rhs: Rhs) -> list[_Column]:
    d = layout.d
    X_part = slice(0, None) if layout.sparse else slice(d, None)
    out = []
    for s in range(layout.chain[0][1]):
        u = gram.border[0][s, X_part]
        out.append(_Column(u, rhs.border[0][s], (-1, s), float(np.sum(gram.own[0][s, s]))))
    for f, (at, S) in enumerate(_starts(layout)):
        for s in range(S):
            rows = at + s + S * np.arange(layout.core[f][2])
            trace = float(np.sum(gram.core[rows, rows]))
            out.append(_Column(gram.core[d:, rows], rhs.core[rows], (f, s), trace))
    return out


def _starts(layout: Layout) -> list[tuple[int, int]]:
    """First column and columns per level of each factor of the core."""
    ends = np.cumsum([0, *(S * J for _, S, J in layout.core)])
    return [(int(a), S) for a, (_, S, _) in zip(ends[:-1], layout.core, strict=True)]


def _products(layout: Layout, gram: Gram, a: _Column, b: _Column) -> tuple[float, np.ndarray]:
    """|Z_a'Z_b|² and X'Z_a (Z_a'Z_b) Z_b'X."""
    if a.place[0] == b.place[0] == -1:
        diagonal = gram.own[0][a.place[1], b.place[1]]
        return float(diagonal @ diagonal), (a.u * diagonal) @ b.u.T
    rows = [_rows(layout, c) for c in (a, b)]
    if -1 not in (a.place[0], b.place[0]):
        block = gram.core[np.ix_(*rows)]
        return float(np.sum(block**2)), a.u @ block @ b.u.T
    squares, middle = _across(layout, gram, b, a, rows[0])  # the chain's columns come first
    return squares, middle.T


def _rows(layout: Layout, c: _Column) -> np.ndarray:
    f, s = c.place
    if f < 0:
        return np.arange(0)
    at, S = _starts(layout)[f]
    return at + s + S * np.arange(layout.core[f][2])


def _across(
    layout: Layout, gram: Gram, chain: _Column, core: _Column, rows: np.ndarray
) -> tuple[float, np.ndarray]:
    """:func:`_products` of a column of the chain with one of the core."""
    s = chain.place[1]
    if gram.cross is None:
        block = gram.border[0][s, rows]  # (J_core, J)
        return float(np.sum(block**2)), chain.u @ block.T @ core.u.T
    position = np.full(layout.d, -1)
    position[rows] = np.arange(len(rows))
    column = position[gram.cross.column]
    mine = column >= 0
    value, level, column = gram.cross.value[s, mine], gram.cross.level[mine], column[mine]
    moved = [np.bincount(column, weights=value * u[level], minlength=len(rows)) for u in chain.u]
    return float(value @ value), np.array(moved).reshape(len(chain.u), -1) @ core.u.T

r"""Simulate responses as cross-products: no row is touched.

With R = σ²W⁻¹ the response enters the likelihood through [Z X]'Wy and y'Wy alone. Let

    [Z X]'W[Z X] = L L',   L of as many columns as the rank of [Z X],
    b = Λu,  u ~ N(0, σ²I);   t = L'(b, β) + σ z,  z ~ N(0, I).

t are the coordinates of W^½y in an orthonormal basis of the span of W^½[Z X], so that

    [Z X]'Wy = L t,   y'Wy = t't + σ² χ²(n - rank)

have exactly the law of the products of a response drawn row by row. L is found by blocks: the roots
of the levels of the first chain factor, then the root of what they leave of all other columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmmjax.errors import DesignError
from lmmjax.gram import Gram, Layout, Rhs

#: eigenvalues below this, relative to the largest, count as 0
RANK = 1e-10

#: columns besides those of the largest factor that a dense root may have
MOST = 6000


class Root(NamedTuple):
    """L by blocks: ``level`` L_j' (r, S, J), ``border`` L_j⁻¹[..] (r, k, J), ``rest`` (r', k).

    ``inside`` tells which rows of ``level`` belong to a level's rank, (r, J). The k other columns
    are the further factors of the chain, the core and X.
    """

    level: np.ndarray
    inside: np.ndarray
    border: np.ndarray
    rest: np.ndarray
    df: float  # n - rank


def _others(layout: Layout, gram: Gram) -> tuple[np.ndarray, np.ndarray]:
    """Products of the first factor with all other columns, (S, k, J), and of those, (k, k).

    Order of the columns: further factors of the chain, level by level, then core and X.
    """
    sizes = [S * J for _, S, J in layout.chain[1:]]
    starts = np.cumsum([0, *sizes])
    inner, end = int(starts[-1]), layout.d + layout.p
    if inner + end > MOST:
        raise DesignError(
            f"found {inner + end} columns beside those of the largest factor; a bootstrap from "
            f"cross-products needs at most {MOST}. Simulate rows: fit.simulate() and fit_many()."
        )
    _, S0, J0 = layout.chain[0]
    first = np.zeros((S0, inner + end, J0))
    dense = np.zeros((inner + end, inner + end))
    first[:, inner:] = gram.border[0]
    dense[inner:, inner:] = gram.core
    for i, (_, S, J) in enumerate(layout.chain):
        for a, (block, parent) in enumerate(zip(gram.up[i], gram.parent[i], strict=True)):
            _, other, _ = layout.chain[i + 1 + a]
            columns = starts[i + a] + other * np.asarray(parent)[:, None] + np.arange(other)
            if i == 0:
                np.put_along_axis(first, columns.T[None], block, axis=1)
                continue
            rows = starts[i - 1] + S * np.arange(J)[:, None] + np.arange(S)
            values = np.moveaxis(np.asarray(block), -1, 0)
            dense[rows[:, :, None], columns[:, None, :]] = values
            dense[columns[:, :, None], rows[:, None, :]] = np.swapaxes(values, 1, 2)
        if i == 0:
            continue
        rows = starts[i - 1] + S * np.arange(J)[:, None] + np.arange(S)
        dense[rows[:, :, None], rows[:, None, :]] = np.moveaxis(np.asarray(gram.own[i]), -1, 0)
        border = np.moveaxis(np.asarray(gram.border[i]), -1, 0)
        dense[rows[:, :, None], np.arange(inner, inner + end)[None, None]] = border
        dense[np.arange(inner, inner + end)[None, :, None], rows[:, None, :]] = np.swapaxes(
            border, 1, 2
        )
    return first, dense


def _root(matrix: np.ndarray, largest: float) -> np.ndarray:
    """L' (r, k) with L L' = matrix, r its numerical rank."""
    e, Q = np.linalg.eigh(matrix)
    known = e > RANK * largest
    return (Q[:, known] * np.sqrt(e[known])).T


def root(layout: Layout, gram: Gram) -> Root:
    """Factor [Z X]'W[Z X]; O(J S² (S + k) + k³), k columns beside those of the first factor."""
    if not layout.chain:
        S = np.zeros((0, 0, 0))
        rest = _root(np.asarray(gram.core), float(np.max(np.diag(gram.core), initial=1e-300)))
        empty = np.zeros((0, rest.shape[1], 0))
        return Root(S, np.zeros((0, 0)), empty, rest, float(gram.n) - len(rest))
    first, dense = _others(layout, gram)
    e, Q = np.linalg.eigh(np.moveaxis(np.asarray(gram.own[0]), -1, 0))  # (J, S), (J, S, S)
    inside = e > RANK * np.max(e)
    size = np.sqrt(np.where(inside, e, 0.0))
    level = np.moveaxis(Q * size[:, None, :], (0, 2), (2, 0))  # (r, S, J)
    inverse = np.where(inside, 1.0 / np.where(inside, size, 1.0), 0.0)
    border = np.einsum("jsr,jr,skj->rkj", Q, inverse, first, optimize=True)
    r, k, J = border.shape
    flat = np.moveaxis(border, 1, 2).reshape(r * J, k)
    rest = _root(dense - flat.T @ flat, float(np.max(np.diag(dense), initial=1e-300)))
    df = float(gram.n) - float(np.sum(inside)) - len(rest)
    return Root(level, inside.T.astype(float), border, rest, df)


def simulate(
    layout: Layout,
    the_root: Root,
    beta: np.ndarray,
    lams: list[np.ndarray],
    sigma: float,
    rng: np.random.Generator,
    m: int,
) -> Rhs:
    """Draw ``m`` right-hand sides, each from new random effects and errors.

    Parameters
    ----------
    the_root : Root
        Of the same cross-products.
    beta : (p,)
        Fixed effects, standardised units as everything here.
    lams : list of (S, S)
        Λ per term.
    sigma : float

    Returns
    -------
    Rhs with a leading axis of m items

    Notes
    -----
    O(m J S (S + k)) time, O(m J S) memory.
    """
    from scipy.linalg import block_diag

    level, inside, border, rest, df = the_root
    every = [block_diag(*[lams[k] for k in terms]) for terms, _, _ in (*layout.chain, *layout.core)]
    effects = [
        sigma * np.einsum("st,mtj->msj", lam, rng.standard_normal((m, S, J)))
        for lam, (_, S, J) in zip(every, (*layout.chain, *layout.core), strict=True)
    ]
    columns = [np.swapaxes(b, 1, 2).reshape(m, -1) for b in effects[1:]]
    other = np.concatenate([*columns, np.broadcast_to(beta, (m, len(beta)))], axis=1)
    t_rest = other @ rest.T + sigma * rng.standard_normal((m, len(rest)))
    yy = np.sum(t_rest**2, axis=1) + sigma**2 * rng.chisquare(df, m)
    products = t_rest @ rest
    if not layout.chain:
        return Rhs((), products, yy)
    t = np.einsum("rsj,msj->mrj", level, effects[0])
    t += np.einsum("rkj,mk->mrj", border, other, optimize=True)
    t += sigma * inside * rng.standard_normal(t.shape)
    products = products + np.einsum("rkj,mrj->mk", border, t, optimize=True)
    first = np.einsum("rsj,mrj->msj", level, t)
    yy += np.sum(t**2, axis=(1, 2))
    parts, at = [first], 0
    for _, S, J in layout.chain[1:]:
        parts.append(np.swapaxes(products[:, at : at + S * J].reshape(m, J, S), 1, 2))
        at += S * J
    return Rhs(tuple(parts), products[:, at:], yy)

r"""Fewer levels for the same likelihood: rotate levels whose blocks Z_j'R⁻¹Z_j are equal.

In a class of m levels with one and the same block A (S x S) the effects u_1 ... u_m are independent
and alike. For an orthogonal Q (m x m), (Q' ⊗ I)u has the same law, I ⊗ A stays as it is, and the
products B_j = Z_j'R⁻¹X and z_j = Z_j'R⁻¹y turn into Σ_j Q_jl B_j and Σ_j Q_jl z_j. So Q can be
chosen to leave as few levels with products as possible:

* the first k, the rank of the m x S(d + p) matrix whose rows are vec(B_j), keep all products with
  X;
* of the others, products with y alone, only the scatter Σ z z' (S x S) matters, which min(S, m - k)
  levels hold as well (a rotation that may differ between responses, as nothing else depends on it);
* the remaining ones have no products. Their share of log|V| is carried by ``Gram.times`` of the
  last.

The result is an ordinary Gram and Rhs for :func:`lmmjax.likelihood.reduce`, exact for every θ. For
a random intercept it is the reduction to distinct group sizes and sums of squares within each;
balanced longitudinal designs collapse by visit pattern.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmmjax.gram import Gram, Layout, Rhs

#: blocks that agree to this, relative to the largest entry, are the same
EQUAL = 1e-13

#: collapsing must leave at most this share of the levels, or it is not done
WORTH = 0.7

#: levels from which a sample is looked at first
MANY = 4096


@dataclass(frozen=True)
class _Class:
    """Levels ``at`` with one block; ``basis`` (m, k) spans their products with X."""

    at: np.ndarray
    basis: np.ndarray
    scatter: int  # levels that hold the rest of the products with y


@dataclass(frozen=True)
class Collapsed:
    """A layout and Gram with fewer levels, and the way of a right-hand side into them.

    Attributes
    ----------
    layout : Layout
    gram : Gram
    """

    layout: Layout
    gram: Gram
    _single: np.ndarray
    _classes: tuple[_Class, ...]

    def rhs(self, rhs: Rhs) -> Rhs:
        """Rotate products with y, (..., S, J) -> (..., S, J'); leading axes are items."""
        z = np.asarray(rhs.border[0])
        parts = [z[..., self._single]]
        for c in self._classes:
            mine = z[..., c.at]
            kept = mine @ c.basis
            parts.append(kept)
            if c.scatter:
                rest = mine - kept @ c.basis.T
                parts.append(_scatter_levels(rest)[..., -c.scatter :])
        return rhs._replace(border=(np.concatenate(parts, axis=-1),))


def _scatter_levels(rest: np.ndarray) -> np.ndarray:
    """Columns r_l with Σ r_l r_l' = rest rest', (..., S, m) -> (..., S, S), the largest last."""
    if rest.shape[-2] == 1:
        return np.sqrt(np.sum(rest**2, axis=-1, keepdims=True))
    scatter = rest @ np.swapaxes(rest, -1, -2)
    finite = np.all(np.isfinite(scatter), axis=(-1, -2), keepdims=True)
    e, Q = np.linalg.eigh(np.where(finite, scatter, 0.0))
    return np.where(finite, Q * np.sqrt(np.maximum(e, 0.0))[..., None, :], np.nan)


def _differ(own: np.ndarray) -> bool:
    """Whether some entry of the blocks has more than ``WORTH`` J distinct values.

    A sample shows that without sorting J of them: of 16 √J drawn from so few distinct ones that
    collapsing pays, some 77 pairs or more agree; none does with a chance of e⁻⁷⁷.
    """
    S, _, J = own.shape
    entries = [own[s, t] for s in range(S) for t in range(s + 1)]
    if J > MANY:
        drawn = np.random.default_rng(0).choice(J, 16 * math.isqrt(J), replace=False)
        if any(len(np.unique(x[drawn])) == len(drawn) for x in entries):
            return True
    return any(len(np.unique(x)) > WORTH * J for x in entries)


def _classes(own: np.ndarray) -> list[np.ndarray]:
    """Places of the levels of each class of equal blocks."""
    S, _, J = own.shape
    lower = own[np.tril_indices(S)].T
    size = np.max(np.abs(lower), initial=np.finfo(float).tiny)
    rounded = np.round(lower / size / EQUAL / 16)
    _, which = np.unique(rounded, axis=0, return_inverse=True)
    order = np.argsort(which.reshape(J), kind="stable")
    return np.split(order, np.cumsum(np.bincount(which.reshape(J)))[:-1])


def _span(border: np.ndarray) -> np.ndarray:
    """Orthonormal basis, (m, k), of the products with X of m levels: (S, d + p, m)."""
    S, k, m = border.shape
    U, s, _ = np.linalg.svd(border.reshape(S * k, m).T, full_matrices=False)
    return U[:, s > 1e-14 * max(m, k) * np.max(s, initial=0.0)]


def collapse(layout: Layout, gram: Gram) -> Collapsed | None:
    """Rotate levels with equal blocks, or return None where that does not pay.

    Parameters
    ----------
    layout : Layout
        With one factor in the chain; the core is not touched. Longer chains are not collapsed.
    gram : Gram
        NumPy arrays.

    Returns
    -------
    Collapsed or None

    Notes
    -----
    O(J log J) for the classes and O(m S(d + p) min(m, S(d + p))) for each; J' levels are left, at
    most S(d + p) + S a class.

    Examples
    --------
    >>> import lmmjax as lmm
    >>> model = lmm.Model("Reaction ~ Days + (Days | Subject)", lmm.load_dataset("sleepstudy"))
    >>> collapse(model._plan.layout, model._standard[2]).layout.chain
    (((0,), 2, 3),)
    """
    if len(layout.chain) != 1 or gram.times:
        return None
    (terms, S, J) = layout.chain[0]
    own, border = np.asarray(gram.own[0]), np.asarray(gram.border[0])
    if _differ(own):
        return None
    found = _classes(own)
    if len(found) > WORTH * J:
        return None
    single, classes = [np.zeros(0, int)], []
    for at in found:
        basis = _span(border[..., at])
        scatter = min(S, len(at) - basis.shape[1])
        pays = basis.shape[1] + scatter < len(at)
        if pays:
            classes.append(_Class(at, basis, scatter))
        else:
            single.append(at)
    kept = np.concatenate(single)
    left = len(kept) + sum(c.basis.shape[1] + c.scatter for c in classes)
    if left > WORTH * J:
        return None
    moved = dataclasses.replace(layout, chain=((terms, S, left),))
    return Collapsed(moved, _rotated(gram, own, border, kept, classes), kept, tuple(classes))


def _rotated(
    gram: Gram, own: np.ndarray, border: np.ndarray, kept: np.ndarray, classes: list[_Class]
) -> Gram:
    owns, borders, times = [own[..., kept]], [border[..., kept]], [np.ones(len(kept))]
    for c in classes:
        k = c.basis.shape[1]
        levels = k + c.scatter
        owns.append(np.repeat(np.mean(own[..., c.at], axis=-1, keepdims=True), levels, axis=-1))
        none = np.zeros((*border.shape[:2], c.scatter))
        borders += [border[..., c.at] @ c.basis, none]
        times.append(np.append(np.ones(levels - 1), 1.0 + len(c.at) - levels))
    join: Any = lambda parts: (np.concatenate(parts, axis=-1),)  # noqa: E731
    return gram._replace(own=join(owns), border=join(borders), times=join(times))

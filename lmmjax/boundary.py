"""Which variance parameters of fits are on their boundary; the rest is the active face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmmjax import components
from lmmjax.covariance import Covariance, HomogeneousCompoundSymmetry, Unstructured
from lmmjax.gram import Layout
from lmmjax.optimize import SINGULAR_TOLERANCE


def diagonal(layout: Layout) -> np.ndarray:
    """Positions in θ of the parameters that are 0 on the boundary of us, diag and hom terms."""
    at, out = 0, []
    for s in layout.structures:
        moved = np.abs(s.from_factor(2.0 * np.eye(s.S)) - s.start()) > 0
        out.append(at + np.flatnonzero(moved))
        at += s.n_theta
    return np.concatenate([np.zeros(0, int), *out])


def moving(layout: Layout, theta: np.ndarray) -> np.ndarray:
    """Which of θ (..., n_theta) are not relative SDs at 0, in standardised units."""
    out = np.ones(theta.shape, bool)
    at = diagonal(layout)
    out[..., at] = np.abs(theta[..., at]) >= SINGULAR_TOLERANCE
    return out


def rectify(structure: Covariance, theta: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """θ of one term with the entries that scale the rows ``zero`` (S,) of Λ exactly 0."""
    S = structure.S
    rows = np.minimum(np.arange(len(theta)), S)  # the row that each entry scales, S for none
    if isinstance(structure, Unstructured):
        rows = np.triu_indices(S)[1]  # the lower triangle, column by column
    elif isinstance(structure, HomogeneousCompoundSymmetry):
        rows = np.array([0, S])[: len(theta)]
    return np.where(np.append(zero, False)[rows], 0.0, theta)


def reached(terms: Any, lams: Sequence[np.ndarray], units: Sequence[np.ndarray]) -> np.ndarray:
    """Which SDs are 0, which correlations 1, -1 or beside an SD of 0, in the order of lme4.

    Parameters
    ----------
    lams : sequence of arrays (..., S, S)
        Λ of each term in standardised units.
    units : sequence of (S, S) arrays
        B of each term.

    Returns
    -------
    (..., K) bool array
        Without σ; there must be a term.
    """
    out = []
    for term, lam, B in zip(terms, lams, units, strict=True):
        half = B @ lam
        sd = np.sqrt(np.sum(half**2, axis=-1))
        zero = sd < SINGULAR_TOLERANCE * np.abs(np.diag(B))
        unit = half / np.where(zero, 1.0, sd)[..., None]
        cor = np.abs(unit @ np.swapaxes(unit, -1, -2))
        one = (cor > 1 - SINGULAR_TOLERANCE**2) | zero[..., None] | zero[..., None, :]
        for i, j in components.places(len(term.names), term.cov):
            out.append(zero[..., i] if i == j else one[..., i, j])
    return np.stack(out, axis=-1)

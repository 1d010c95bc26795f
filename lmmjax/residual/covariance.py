"""Residual covariance at given parameters, row by row: roots, normalised residuals, V_i."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax.precision import in_float64
from lmmjax.residual.frame import Residuals
from lmmjax.residual.setup import groups_of_rows
from lmmjax.residual.source import correlations


class Roots(NamedTuple):
    """Lower Cholesky factors of C_i, subjects of similar length padded to T rows in row order."""

    rows: list[np.ndarray]  # (G, T)
    mask: list[np.ndarray]  # (G, T) bool
    L: list[np.ndarray]  # (G, T, T)


def relative_sd(r: Residuals | None, phi: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """S_i / √w_i of each row, relative to the reported σ; ``phi`` (..., n_phi) gives (..., n)."""
    sd = 1.0 / np.sqrt(weights)
    if r is None:
        return sd
    v = np.asarray(phi)[..., r.structure.n_corr :]
    return sd * np.exp(v @ (r.H - np.asarray(r.structure.variances.shifts, float)).T)


@in_float64
def roots(r: Residuals, phi: np.ndarray) -> Roots:
    """Cholesky factors of the correlation of every subject: O(Σ T³)."""
    out = Roots([], [], [])
    for rows, mask in groups_of_rows(r.subject, np.arange(len(r.subject))):
        C = correlations(r.structure, jnp.asarray(phi), r.pos[rows], mask.astype(float))
        out.rows.append(rows)
        out.mask.append(mask)
        out.L.append(np.linalg.cholesky(np.asarray(C)))
    return out


def normalise(r: Residuals | None, phi: np.ndarray, values: np.ndarray) -> np.ndarray:
    """L⁻¹ times the values of each subject in row order (values already divided by their SD)."""
    if r is None or not r.correlated:
        return values
    out = np.empty_like(values)
    for rows, mask, L in zip(*roots(r, phi), strict=True):
        solved = np.linalg.solve(L, (values[rows] * mask)[..., None])[..., 0]
        out[rows[mask]] = solved[mask]
    return out


def whitening(r: Residuals | None, phi: np.ndarray, weights: np.ndarray) -> Any:
    """Sparse W (n, n) with W R W' = I: L⁻¹ of each subject, over the SD of its rows."""
    from scipy.sparse import csr_array, diags_array

    n, scale = len(weights), diags_array(1.0 / relative_sd(r, phi, weights))
    if r is None or not r.correlated:
        return scale.tocsr()
    entries, into, of = [], [], []
    for rows, mask, L in zip(*roots(r, phi), strict=True):
        real = mask[:, :, None] & mask[:, None, :] & np.tri(L.shape[1], dtype=bool)
        entries.append(np.linalg.inv(L)[real])
        into.append(np.broadcast_to(rows[:, :, None], L.shape)[real])
        of.append(np.broadcast_to(rows[:, None, :], L.shape)[real])
    joined = np.concatenate(entries), (np.concatenate(into), np.concatenate(of))
    return csr_array(joined, shape=(n, n)) @ scale


def correlate(r: Residuals | None, phi: np.ndarray) -> Any:
    """A function that turns white noise (n,) into noise with the subjects' correlation."""
    if r is None or not r.correlated:
        return lambda white: white
    parts = list(zip(*roots(r, phi), strict=True))

    def coloured(white: np.ndarray) -> np.ndarray:
        out = np.empty_like(white)
        for rows, mask, L in parts:
            out[rows[mask]] = np.einsum("gtu,gu->gt", L, white[rows] * mask)[mask]
        return out

    return coloured


def block(
    r: Residuals | None, phi: np.ndarray, weights: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Cov(ε) / σ² of some rows, (m, m): correlated within a residual subject, 0 across."""
    return blocks(r, phi, weights, rows[None])[0]


@in_float64
def blocks(
    r: Residuals | None, phi: np.ndarray, weights: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """:func:`block` of several sets of rows of one size: (c, m) -> (c, m, m)."""
    sd = relative_sd(r, phi, weights)[rows]
    if r is None or not r.correlated:
        return sd[:, :, None] ** 2 * np.eye(rows.shape[1])
    family = r.structure.family
    assert family is not None
    corr = jnp.asarray(phi)[: r.structure.n_corr]
    C = np.asarray(jax.vmap(lambda pos: family.matrix(corr, pos))(jnp.asarray(r.pos[rows])))
    subject = r.subject[rows]
    same = subject[:, :, None] == subject[:, None]
    return np.where(same, C, 0.0) * sd[:, :, None] * sd[:, None]

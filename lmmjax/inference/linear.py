r"""Variances and covariances as parameters ω in which V = σ²R + ZΣ(ω)Z' is linear.

Kenward and Roger's adjustment depends on the parametrisation: here ω are the variances and
covariances of each term and σ², as in pbkrtest and SAS. V is linear in them, so second derivatives
of V vanish, for the structures ``us``, ``diag``, ``hom`` and ``homcs``. Compound symmetry with own
variances (``cs``) is not linear in any parameters: ω are its SDs and its correlation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lmmjax.covariance import CompoundSymmetry, Covariance, Homogeneous, Unstructured
from lmmjax.covariance import HomogeneousCompoundSymmetry as HomCS
from lmmjax.gram import Layout


class Tangent(NamedTuple):
    """∂Σ/∂ω of one term, its second derivatives, and what each parameter is."""

    first: np.ndarray  # (K, S, S)
    second: np.ndarray  # (K, K, S, S); zero where Σ is linear in ω
    kinds: tuple[tuple[int, int] | str, ...]  # positions of the (co)variance, or a word


def _units(pairs: list[tuple[int, int]], S: int) -> np.ndarray:
    """Symmetric matrices with ones at the positions (i, j) and (j, i)."""
    out = np.zeros((len(pairs), S, S))
    for k, (i, j) in enumerate(pairs):
        out[k, i, j] = out[k, j, i] = 1.0
    return out


def _linear(first: np.ndarray, kinds: tuple[Any, ...]) -> Tangent:
    K, S, _ = first.shape
    return Tangent(first, np.zeros((K, K, S, S)), kinds)


def _compound(sd: np.ndarray, rho: float) -> Tangent:
    """Σ = diag(sd) C(ρ) diag(sd): derivatives in the SDs and in ρ."""
    S = len(sd)
    C = np.full((S, S), rho)
    np.fill_diagonal(C, 1.0)
    off, e = 1.0 - np.eye(S), np.eye(S)
    first, second = np.zeros((S + 1, S, S)), np.zeros((S + 1, S + 1, S, S))
    for i in range(S):
        half = np.outer(e[i], C[i] * sd)
        first[i] = half + half.T
        across = np.outer(e[i], off[i] * sd)
        second[i, S] = second[S, i] = across + across.T
        for j in range(S):
            unit = np.outer(e[i], e[j])
            second[i, j] = C[i, j] * (unit + unit.T)
    first[S] = off * np.outer(sd, sd)
    return Tangent(first, second, (*(f"sd {i}" for i in range(S)), "cor"))


def tangent(structure: Covariance, sigma: np.ndarray) -> Tangent:
    """Derivatives of the term's Σ at ``sigma`` in its variances and covariances.

    Parameters
    ----------
    structure : Covariance
    sigma : (S, S)
        Where to take them; matters for ``cs`` alone.

    Returns
    -------
    Tangent

    Examples
    --------
    >>> from lmmjax.covariance import covariance
    >>> tangent(covariance("us", 2), np.eye(2)).kinds
    ((0, 0), (1, 0), (1, 1))
    """
    S = structure.S
    if isinstance(structure, Unstructured):
        pairs = [(i, j) for j in range(S) for i in range(j, S)]
        return _linear(_units(pairs, S), tuple(pairs))
    if isinstance(structure, Homogeneous):
        return _linear(np.eye(S)[None], ("variance",))
    if isinstance(structure, HomCS) and S > 1:
        return _linear(np.stack([np.eye(S), 1.0 - np.eye(S)]), ("variance", "covariance"))
    if isinstance(structure, CompoundSymmetry) and S > 1:
        sd = np.sqrt(np.diag(sigma))
        known = np.outer(sd, sd) > 0
        both = known & ~np.eye(S, dtype=bool)
        rho = float(np.mean(sigma[both] / np.outer(sd, sd)[both])) if both.any() else 0.0
        return _compound(sd, rho)
    pairs = [(i, i) for i in range(S)]
    return _linear(_units(pairs, S), tuple(pairs))


class Directions(NamedTuple):
    """Tangents of all terms embedded in the blocks of their factors (chain first)."""

    first: list[np.ndarray]  # per factor (K, S, S)
    second: list[np.ndarray]  # per factor (K, K, S, S)
    sigmas: list[np.ndarray]  # per factor (S, S)
    along: np.ndarray  # c with Σ = Σ_k c_k ∂Σ/∂ω_k, (K,)
    nonlinear: bool


def directions(layout: Layout, lams: list[np.ndarray]) -> Directions:
    """The parameters of a whole model at its factors Λ, terms in formula order."""
    sigmas = [lam @ lam.T for lam in lams]
    tangents = [tangent(s, x) for s, x in zip(layout.structures, sigmas, strict=True)]
    starts = np.cumsum([0, *(len(t.first) for t in tangents)])
    K = int(starts[-1])
    first, second, blocks = [], [], []
    for terms, S, _ in (*layout.chain, *layout.core):
        E, F, block, at = np.zeros((K, S, S)), np.zeros((K, K, S, S)), np.zeros((S, S)), 0
        for k in terms:
            mine, size = slice(starts[k], starts[k + 1]), len(sigmas[k])
            here = slice(at, at + size)
            E[mine, here, here] = tangents[k].first
            F[mine, mine, here, here] = tangents[k].second
            block[here, here] = sigmas[k]
            at += size
        first.append(E)
        second.append(F)
        blocks.append(block)
    nonlinear = any(bool(np.any(t.second)) for t in tangents)
    return Directions(first, second, blocks, _along(tangents, sigmas), nonlinear)


def _along(tangents: list[Tangent], sigmas: list[np.ndarray]) -> np.ndarray:
    """Coefficients of Σ in the tangents, term by term."""
    out = [np.zeros(0)]
    for t, sigma in zip(tangents, sigmas, strict=True):
        columns = t.first.reshape(len(t.first), -1).T
        out.append(np.linalg.lstsq(columns, sigma.ravel(), rcond=None)[0])
    return np.concatenate(out)

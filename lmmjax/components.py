"""Variance components of many fits of one model: values and lme4's names, without labels inside."""

from __future__ import annotations

from typing import Any

import numpy as np

#: structures whose correlations are parameters
CORRELATED = ("us", "cs", "homcs")


def names(terms: Any) -> list[str]:
    """lme4's names, terms in formula order, each column by column, σ last.

    Parameters
    ----------
    terms : sequence of Term
        With ``group``, ``names`` and ``cov``.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> names([SimpleNamespace(group="g", names=("(Intercept)", "x"), cov="us")])
    ['sd_(Intercept)|g', 'cor_x.(Intercept)|g', 'sd_x|g', 'sigma']
    """
    out = []
    for t in terms:
        for i, j in places(len(t.names), t.cov):
            kind = f"sd_{t.names[i]}" if i == j else f"cor_{t.names[i]}.{t.names[j]}"
            out.append(f"{kind}|{t.group}")
    return [*out, "sigma"]


def values(terms: Any, covs: Any, sigma: Any) -> np.ndarray:
    """SDs, correlations and σ in the order of :func:`names`.

    Parameters
    ----------
    covs : sequence of arrays (..., S, S)
        Covariance of each term in the units of the data.
    sigma : array (...)

    Returns
    -------
    (..., K) array; correlations beside an SD of 0 are NaN
    """
    out = []
    for t, cov in zip(terms, covs, strict=True):
        sd = np.sqrt(np.maximum(np.diagonal(cov, axis1=-2, axis2=-1), 0.0))
        for i, j in places(len(t.names), t.cov):
            if i == j:
                out.append(sd[..., i])
                continue
            with np.errstate(invalid="ignore", divide="ignore"):
                out.append(np.clip(cov[..., i, j] / (sd[..., i] * sd[..., j]), -1.0, 1.0))
    return np.stack([*out, np.broadcast_to(sigma, np.shape(sigma))], axis=-1)


def places(S: int, kind: str) -> list[tuple[int, int]]:
    """Row and column of each component of a term, in the order of :func:`names`."""
    every = [(i, j) for j in range(S) for i in range(j, S)]
    return every if kind in CORRELATED else [(i, j) for i, j in every if i == j]


def varcorr_places(S: int) -> list[tuple[int, int]]:
    """Order of ``varcorr`` in a term: variances, then covariances by row."""
    pairs = [(i, j) for i in range(S) for j in range(i + 1, S)]
    return [(i, i) for i in range(S)] + pairs

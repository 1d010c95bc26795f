r"""Exact null distribution of the (restricted) likelihood ratio for one variance component.

For y = Xβ + Zb + ε, b ~ N(0, λσ²I), let μ_s be the eigenvalues of Z'W(I - P)Z, P the projection on
X, and ξ_s those of Z'WZ. Under λ = 0 (Crainiceanu and Ruppert 2004, J. R. Statist. Soc. B 66,
165-185, eqs 6 and 9), with independent w_s ~ N(0, 1),

    N(λ) = Σ_s λμ_s/(1 + λμ_s) w_s²,   D(λ) = Σ_s w_s²/(1 + λμ_s) + χ²(n - p - K),
    RLRT = sup_λ (n - p) log(1 + N/D) - Σ_s log(1 + λμ_s),
    LRT  = sup_λ n log(1 + N/D) - Σ_s log(1 + λξ_s)  +  n log(1 + χ²(q)/(N + D)),

q fixed effects under test, so simulation costs nothing in n. Where other random terms stay in both
models, the distribution is that without them: approximate (Greven, Crainiceanu, Küchenhoff and
Peters 2008, J. Comput. Graph. Statist. 17, 870-891). With ε ~ N(0, σ²R(φ)) all of this holds for
rows whitened by R^(-1/2), W = R⁻¹; φ is held at its estimate under the null: approximate too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmmjax.covariance import Homogeneous
from lmmjax.errors import ComparisonError
from lmmjax.inference.nesting import Pair
from lmmjax.residual.covariance import whitening

#: columns of Z that an eigen-decomposition is made of at most
MOST = 4000

#: eigenvalues below this part of the largest count as 0
RANK = 1e-10

#: points of λ on which the supremum is taken, and draws at a time
GRID, CHUNK = 200, 5000


class Spectrum(NamedTuple):
    """What the null distribution depends on."""

    mu: np.ndarray  # positive eigenvalues of Z'W(I - P)Z, (K,)
    xi: np.ndarray  # positive eigenvalues of Z'WZ; of restricted ratios the same as ``mu``
    n: int
    p: int
    q: int  # fixed effects under test
    restricted: bool


def spectrum(pair: Pair) -> Spectrum:
    """The eigenvalues for the variance that only the larger model has.

    Raises
    ------
    ComparisonError
        Unless exactly one variance, and no covariance, is under test; or for too many levels.

    Notes
    -----
    O(n p² + n J p + J³) for J levels.
    """
    from scipy.sparse import csr_array

    design = pair.big.model.design
    z, codes, J = _tested(pair)
    S = z.shape[1]
    if J * S > MOST:
        raise ComparisonError(
            f"found {J * S} random effects under test; the exact distribution is made for at most "
            f"{MOST}. With so many levels method='mixture' is as good."
        )
    white = whitening(design.residual, pair.small.phi, design.weights)
    Q = np.linalg.qr(white @ design.X)[0]
    at = codes[:, None] * S + np.arange(S), np.arange(len(z))[:, None] + np.zeros(S, int)
    Z = white @ csr_array((z.ravel(), (at[1].ravel(), at[0].ravel())), shape=(len(z), J * S))
    ZZ, ZQ = (Z.T @ Z).toarray(), Z.T @ Q
    restricted = pair.big.method == "REML"
    mu = _positive(ZZ - ZQ @ ZQ.T, ZZ)
    xi = mu if restricted else _positive(ZZ, ZZ)
    return Spectrum(mu, xi, len(z), Q.shape[1], pair.n_fixed, restricted)


def _positive(matrix: np.ndarray, scale: np.ndarray) -> np.ndarray:
    e = np.linalg.eigvalsh(matrix)
    return e[e > RANK * float(np.max(np.diag(scale)))]


def _tested(pair: Pair) -> tuple[np.ndarray, np.ndarray, int]:
    """Columns, codes and number of levels of the one variance under test."""
    small, big = pair.small, pair.big
    extra = big.n_params - small.n_params - pair.n_fixed
    found = []
    for g in pair.groupings:
        for k in g.big:
            term = big.model.design.terms[k]
            at = sum(len(big.model.design.terms[j].names) for j in g.big if j < k)
            used = np.any(g.C[at : at + len(term.names)] != 0, axis=1)
            found += [(term, i, k) for i in np.flatnonzero(~_touched(used, g.C, at))]
    structures = big.model._plan.layout.structures
    terms = {k for *_, k in found}
    single = len(found) == 1 and (structures[found[0][2]].S == 1 or found[0][0].cov == "diag")
    whole = len(terms) == 1 and isinstance(structures[next(iter(terms))], Homogeneous)
    if extra != 1 or not (single or whole):
        raise ComparisonError(
            f"found {extra} parameters under test, or no variance among them; the exact test is "
            "for one variance component beside the same residuals. Use method='mixture' or "
            "'bootstrap'."
        )
    term = found[0][0]
    z = term.z if whole else term.z[:, [found[0][1]]]
    return z, term.codes, len(term.levels)


def _touched(used: np.ndarray, C: np.ndarray, at: int) -> np.ndarray:
    """Columns of a term that the smaller model has."""
    size = np.max(np.abs(C), initial=0.0)
    block = np.abs(C[at : at + len(used)])
    return used & (np.max(block, axis=1, initial=0.0) > 1e-9 * size)


def simulate(s: Spectrum, n: int, seed: int) -> np.ndarray:
    """Draw ``n`` statistics; O(n K GRID)."""
    rng = np.random.default_rng(seed)
    lam = _grid(s.mu)
    shrink = 1.0 / (1.0 + np.outer(s.mu, lam))  # (K, L)
    logs = np.sum(np.log1p(np.outer(s.xi, lam)), axis=0)
    factor = s.n - s.p if s.restricted else s.n
    out = []
    for at in range(0, n, CHUNK):
        m = min(CHUNK, n - at)
        w2 = rng.standard_normal((m, len(s.mu))) ** 2
        rest = rng.chisquare(max(s.n - s.p - len(s.mu), 1e-300), m)
        whole = w2.sum(axis=1) + rest  # N + D
        D = w2 @ shrink + rest[:, None]
        best = np.max(factor * np.log(whole[:, None] / D) - logs, axis=1)
        if s.q and not s.restricted:
            best = best + s.n * np.log1p(rng.chisquare(s.q, m) / whole)
        out.append(np.where(best < 0, 0.0, best))
    return np.concatenate(out)


def _grid(mu: np.ndarray) -> np.ndarray:
    """λ = 0, then from where the largest eigenvalue begins to matter to where the smallest ends."""
    low, high = 1e-3 / np.max(mu), 1e4 / np.min(mu)
    return np.append(0.0, np.geomspace(low, high, GRID))

r"""Sandwich covariance of β̂ by group, with Bell and McCaffrey's degrees of freedom.

With W_i = V_i⁻¹ at the estimates, M = (Σ X_i'W_iX_i)⁻¹ and e_i = y_i - X_iβ̂,

    V_R = M [Σ_i X_i'W_iA_i e_ie_i' A_iW_iX_i] M.

CR0: A_i = I. CR1: CR0 times m/(m - 1), m groups. CR2: A_i = D_i'B_i^{+1/2}D_i with D_i'D_i = V_i
and B_i = D_i(V_i - X_iMX_i')D_i', which makes V_R unbiased if V_i is right (Bell and McCaffrey
2002; Pustejovsky and Tipton 2018, J. Bus. Econ. Stat. 36, 672-683, eqs 9 to 11).

A single coefficient l'β̂ has ν = (Σ λ)²/Σ λ² degrees of freedom, λ the eigenvalues of
P_ij = h_i'(δ_ij V_i - X_iMX_j')h_j, h_i = A_iW_iX_iMl: the Satterthwaite approximation under V.
Only tr P and |P|² are needed, so no groups x groups matrix is formed.

Several rows at once are tested by Hotelling's T² approximation with Zhang's degrees of freedom
(Pustejovsky and Tipton 2018, section 3.2): with Ω = E(LV_RL') under V, the standardised
D = Ω^{-1/2}LV_RL'Ω^{-1/2} and η = q(q + 1)/Σ_st Var(D_st),

    (η - q + 1)/(η q) (Lβ̂ - c)'(LV_RL')⁻¹(Lβ̂ - c) ~ F(q, η - q + 1),
    Var(D_st) = Σ_ij (P_ij^ss P_ij^tt + P_ij^st P_ij^ts),

P^st as P with h of the rows s and t of Ω^{-1/2}L. For one row η = ν.

V is that of the model, structured residuals included; groups must contain whole subjects of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax.errors import DataError, DesignError, LmmError
from lmmjax.gram import LevelSums
from lmmjax.residual.covariance import blocks

if TYPE_CHECKING:
    from lmmjax.design import Design
    from lmmjax.fit import Fit

CORRECTIONS = ("CR0", "CR1", "CR2")

#: entries of V_i held at once
CHUNK = 2_000_000

#: a robust standard error below this part of the model's is 0 but for rounding
VANISHED = 1e-8


@dataclass(frozen=True)
class Sandwich:
    """The robust covariance and what its degrees of freedom need."""

    vcov: np.ndarray  # (p, p)
    M: np.ndarray  # (p, p)
    K: np.ndarray  # X_i'A_iW_iX_i, (m, p, p)
    D: np.ndarray  # X_i'W_iA_iV_iA_iW_iX_i, (m, p, p)

    def degrees(self, L: np.ndarray) -> np.ndarray:
        """Bell-McCaffrey degrees of freedom of each row of Lβ̂."""
        return np.array([self._one(row) for row in L] or np.zeros(0))

    def joint(self, L: np.ndarray) -> tuple[float, float]:
        """Denominator df and scaling of F for all rows of Lβ̂ at once (full rank).

        Raises
        ------
        LmmError
            Too few groups for the approximation: η < q.
        """
        q = len(L)
        A = L @ self.M
        omega = np.sum(self._pairs(A)[0] - self._pairs(A)[1], axis=0)
        A = np.linalg.solve(np.linalg.cholesky(omega), A)
        d, own, C = self._pairs(A)
        CM = C @ self.M
        F = np.einsum("ksi,ktj->stij", CM, C)
        first = np.einsum("stij,tsji->st", F, F)
        second = np.einsum("tsij,tsji->st", F, F)
        dd, oo = (np.einsum("kss->ks", x) for x in (d, own))
        first += dd.T @ dd - dd.T @ oo - oo.T @ dd
        second += np.einsum("kst,kst->st", d, d - 2 * own)
        eta = q * (q + 1) / float(np.sum(first + second))
        if eta < q:
            raise LmmError(
                f"found {len(self.K)} groups, which give a robust test of {q} rows {eta:.1f} "
                f"degrees of freedom; expected at least {q}. Test fewer rows, or leave out "
                "vcov='robust'."
            )
        return eta - q + 1, (eta - q + 1) / eta

    def check(self, L: np.ndarray) -> None:
        """Refuse rows of Lβ̂ for which the scores of all groups vanish."""
        own, model = (np.einsum("ri,ij,rj->r", L, V, L) for V in (self.vcov, self.M))
        if np.any(own < VANISHED**2 * model):
            raise LmmError(
                f"the scores of all {len(self.K)} groups vanish for a coefficient (or contrast), "
                "so its robust variance is 0 but for rounding; expected more groups. Use a group "
                "nested within this one, or leave out 'robust'."
            )

    def _pairs(self, A: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """h_s'V_ih_t, h_s'X_iMX_i'h_t (m, q, q) and X_i'h_s (m, q, p) for rows L M."""
        C = np.einsum("kij,sj->ksi", self.K, A)
        return A @ self.D @ A.T, C @ self.M @ np.swapaxes(C, 1, 2), C

    def _one(self, row: np.ndarray) -> float:
        a = self.M @ row
        d = np.einsum("i,kij,j->k", a, self.D, a)
        C = self.K @ a
        CM = C @ self.M
        own = np.einsum("kp,kp->k", CM, C)
        cross = self.M @ (C.T @ C)
        square = d @ d - 2 * d @ own + np.trace(cross @ cross)
        return float((np.sum(d) - np.sum(own)) ** 2 / square)


def sandwich(fit: Fit, group: Any = None, correction: str = "CR2") -> Sandwich:
    """Robust covariance of the fixed effects by group.

    Raises
    ------
    LmmError, DataError, DesignError
        Unknown correction or group; a group that splits a level of a random effect or a residual
        subject; a variance that is 0 but for rounding, as with too few groups.

    Notes
    -----
    A second pass over the rows: O(Σ n_i³) for CR2, batched over groups of equal size.
    """
    if correction not in CORRECTIONS:
        raise LmmError(f"correction={correction!r} is unknown; expected one of {CORRECTIONS}.")
    design = fit.model.design
    codes, m = clusters(design, group)
    if m < 2:
        raise DesignError("a robust covariance needs at least 2 groups; found 1.")
    M = fit.sigma**2 * fit._unscaled_vcov
    residual = design.y - design.offset - design.X @ fit._beta
    p = design.p
    scores, K, D = np.zeros((m, p)), np.zeros((m, p, p)), np.zeros((m, p, p))
    for which, rows in _batches(codes, m):
        X, V = design.X[rows], _marginal(fit, rows)
        WX = np.linalg.solve(V, X)
        AWX = _corrector(V, X, M) @ WX if correction == "CR2" else WX
        scores[which] = np.einsum("cnp,cn->cp", AWX, residual[rows])
        K[which] = np.swapaxes(X, 1, 2) @ AWX
        D[which] = np.swapaxes(AWX, 1, 2) @ V @ AWX
    factor = m / (m - 1) if correction == "CR1" else 1.0
    found = Sandwich(factor * M @ scores.T @ scores @ M, M, K, D)
    found.check(np.eye(p))
    return found


def _corrector(V: np.ndarray, X: np.ndarray, M: np.ndarray) -> np.ndarray:
    """A_i of CR2, by groups of one size: (c, n, n)."""
    lower = np.linalg.cholesky(V)
    inner = V - X @ M @ np.swapaxes(X, 1, 2)
    e, Q = np.linalg.eigh(np.swapaxes(lower, 1, 2) @ inner @ lower)
    known = e > 1e-10 * e[:, -1:]
    root = np.where(known, 1.0 / np.sqrt(np.where(known, e, 1.0)), 0.0)
    half = lower @ Q
    return (half * root[:, None]) @ np.swapaxes(half, 1, 2)


def _marginal(fit: Fit, rows: np.ndarray) -> np.ndarray:
    """V_i of groups of one size: (c, n) row numbers -> (c, n, n)."""
    design = fit.model.design
    V = fit.sigma**2 * blocks(design.residual, fit.phi, design.weights, rows)
    for term, cov in zip(design.terms, fit._term_covs(), strict=True):
        z, codes = term.z[rows], term.codes[rows]
        V += (codes[:, :, None] == codes[:, None]) * (z @ cov @ np.swapaxes(z, 1, 2))
    return V


def _batches(codes: np.ndarray, m: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(groups, their rows) for groups of one size, at most CHUNK entries of V at once."""
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes, minlength=m)
    starts = np.cumsum(sizes) - sizes
    for size in np.unique(sizes):
        same = np.flatnonzero(sizes == size)
        step = max(1, CHUNK // int(size) ** 2)
        for a in range(0, len(same), step):
            which = same[a : a + step]
            yield which, order[starts[which][:, None] + np.arange(size)]


def clusters(design: Design, group: Any) -> tuple[np.ndarray, int]:
    """Codes of the groups, whose rows may depend on each other, and their number."""
    codes, name = _codes(design, group)
    labels, codes = np.unique(codes, return_inverse=True)
    for inner, own, J in _factors(design):
        sums = LevelSums(own, J)
        mean = sums(codes.astype(float)) / np.bincount(own, minlength=J)
        if not np.allclose(mean[own], codes):
            raise DesignError(
                f"levels of {inner} are spread over several groups of {name}, so the groups "
                "are not independent; expected groups within which every random effect and every "
                "residual subject lies."
            )
    return codes, len(labels)


def _factors(design: Design) -> list[tuple[str, np.ndarray, int]]:
    """Name, codes and levels of all that makes rows dependent."""
    found = [(t.group, t.codes, len(t.levels)) for t in design.terms]
    r = design.residual
    if r is not None and r.correlated:
        found.append((r.subject_name or "all rows", r.subject, int(r.subject.max()) + 1))
    return found


def _codes(design: Design, group: Any) -> tuple[np.ndarray, str]:
    if group is None:
        found = _factors(design)
        name, codes, _ = (
            min(found, key=lambda f: f[2]) if found else ("rows", np.arange(design.n), 0)
        )
        return codes, name
    if isinstance(group, str):
        for name, codes, _ in _factors(design):
            if name == group:
                return codes, group
        if group in design.columns:
            return np.unique(design.columns[group].astype(str), return_inverse=True)[1], group
        raise DataError(
            f"group={group!r} is not a grouping factor nor a column known here; expected one of "
            f"{[f[0] for f in _factors(design)]}, a column of the fixed part "
            f"({', '.join(design.columns) or 'none is kept'}), or an array with a label for each "
            "row used."
        )
    labels = np.asarray(group)
    if labels.shape != (design.n,):
        raise DataError(
            f"group has shape {labels.shape}; expected a label for each of the {design.n} rows."
        )
    return np.unique(labels.astype(str), return_inverse=True)[1], "group"

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

No matrix of size n_i is formed with independent residuals. Rows of one group with one variance c
have V_i = cI + ZΣZ' there; with [X_i Z] = QF, Q orthonormal, V_i leaves span(Q) invariant and is cI
beside it, where B_i = c²I and A_i = I. So (X_i, Z, e_i) may be replaced by (Q'X_i, Q'Z, Q'e_i):
p + q_i rows instead of n_i give the same CR2, exactly, at O(n_i (p + q_i)²). CR0 and CR1 do not
change when rows are scaled, so all variances are made 1 first; and where all is nested in the
groups they need only the cross-products of each group after elimination (deletion.py). A_i of
unequal variances has no such form: each value in a group is reduced by itself, and where all differ
nothing is gained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmmjax.errors import DataError, DesignError, LmmError
from lmmjax.gram import LevelSums
from lmmjax.inference import deletion
from lmmjax.residual.covariance import blocks, relative_sd

if TYPE_CHECKING:
    from lmmjax.design import Design
    from lmmjax.fit import Fit

CORRECTIONS = ("CR0", "CR1", "CR2")

#: entries of V_i held at once
CHUNK = 2_000_000

#: rows of a group (after their reduction, where there is one) from which it is not batched with
#: others of its size, and at most
LARGE, MOST = 64, deletion.MOST

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
        subject; a variance that is 0 but for rounding, as with too few groups; groups that need
        dense matrices of more than ``MOST`` rows.

    Notes
    -----
    A second pass over the rows: O(n (p + S)²), then O(Σ k_i³) with k_i = min(n_i, p + q_i) for CR2;
    the cube falls away for CR0 and CR1 of nested designs. Correlated residuals, and CR2 where the
    rows of a group differ in variance: k_i = n_i.
    """
    if correction not in CORRECTIONS:
        raise LmmError(f"correction={correction!r} is unknown; expected one of {CORRECTIONS}.")
    design = fit.model.design
    codes, m = clusters(design, group)
    if m < 2:
        raise DesignError("a robust covariance needs at least 2 groups; found 1.")
    M = fit.sigma**2 * fit._unscaled_vcov
    if correction == "CR2" or fit.model.is_structured or not _all_nested(design):
        scores, K, D = _by_blocks(fit, codes, m, M, correction)
    else:
        scores, K, D = _by_elimination(fit, codes, m)
    factor = m / (m - 1) if correction == "CR1" else 1.0
    found = Sandwich(factor * M @ scores.T @ scores @ M, M, K, D)
    found.check(np.eye(design.p))
    return found


Sums = tuple[np.ndarray, np.ndarray, np.ndarray]


def _by_elimination(fit: Fit, codes: np.ndarray, m: int) -> Sums:
    """X_i'W_ie_i and X_i'W_iX_i of CR0 from the cross-products of the groups after elimination."""
    found = deletion.groups(fit, codes, m)
    back = np.linalg.inv(found.root)
    K = back.T @ found.T @ back
    return found.t @ back, K, K


def _by_blocks(fit: Fit, codes: np.ndarray, m: int, M: np.ndarray, correction: str) -> Sums:
    """What :class:`Sandwich` is made of, from V_i of the groups."""
    p = len(M)
    scores, K, D = np.zeros((m, p)), np.zeros((m, p, p)), np.zeros((m, p, p))
    for which, X, V, e in _blocks(fit, codes, m, correction):
        WX = np.linalg.solve(V, X)
        AWX = _corrector(V, X, M) @ WX if correction == "CR2" else WX
        scores[which] = np.einsum("cnp,cn->cp", AWX, e)
        K[which] = np.swapaxes(X, 1, 2) @ AWX
        D[which] = np.swapaxes(AWX, 1, 2) @ V @ AWX
    return scores, K, D


def _corrector(V: np.ndarray, X: np.ndarray, M: np.ndarray) -> np.ndarray:
    """A_i of CR2, by groups of one size: (c, n, n)."""
    lower = np.linalg.cholesky(V)
    inner = V - X @ M @ np.swapaxes(X, 1, 2)
    e, Q = np.linalg.eigh(np.swapaxes(lower, 1, 2) @ inner @ lower)
    known = e > 1e-10 * e[:, -1:]
    root = np.where(known, 1.0 / np.sqrt(np.where(known, e, 1.0)), 0.0)
    half = lower @ Q
    return (half * root[:, None]) @ np.swapaxes(half, 1, 2)


# -------------------------------------------------------------------------------------------------
# V_i of groups, of their rows or of what stands for them
# -------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows, or rotations of rows that share their group, their variance and all levels."""

    X: np.ndarray  # (n, p)
    e: np.ndarray  # y - offset - Xβ̂, (n,)
    z: list[np.ndarray]  # of each term, (n, S)
    codes: list[np.ndarray]
    variance: np.ndarray  # (n,)
    group: np.ndarray

    def at(self, rows: np.ndarray) -> Rows:
        """Some of them."""
        z, codes = ([a[rows] for a in x] for x in (self.z, self.codes))
        return Rows(self.X[rows], self.e[rows], z, codes, self.variance[rows], self.group[rows])


def _blocks(
    fit: Fit, codes: np.ndarray, m: int, correction: str
) -> Iterator[tuple[Any, np.ndarray, np.ndarray, np.ndarray]]:
    """Groups, and their X_i (c, n, p), V_i (c, n, n) and residuals (c, n), rotated."""
    design, covs = fit.model.design, fit._term_covs()
    correlated = design.residual is not None and design.residual.correlated
    r = _rows(fit, codes, whiten=correction != "CR2" and not correlated)
    r = r if correlated else _reduced(r)
    for which, rows in _batches(r.group, m):
        if rows.shape[1] > LARGE and not correlated:
            for one, own in zip(which, rows, strict=True):
                X, V, e = _one(r.at(own), covs)
                yield [one], X[None], V[None], e[None]
            continue
        _check_size(rows.shape[1], "correlated residuals")
        if correlated:
            V = fit.sigma**2 * blocks(design.residual, fit.phi, design.weights, rows)
        else:
            V = r.variance[rows][:, :, None] * np.eye(rows.shape[1])
        for z, code, cov in zip(r.z, r.codes, covs, strict=True):
            own = z[rows]
            alike = code[rows][:, :, None] == code[rows][:, None]
            V += alike * (own @ cov @ np.swapaxes(own, 1, 2))
        yield which, r.X[rows], V, r.e[rows]


def _rows(fit: Fit, codes: np.ndarray, whiten: bool) -> Rows:
    design = fit.model.design
    sd = fit.sigma * relative_sd(design.residual, fit.phi, design.weights)
    e = design.y - design.offset - design.X @ fit._beta
    z, levels = [t.z for t in design.terms], [t.codes for t in design.terms]
    if not whiten:
        return Rows(design.X, e, z, levels, sd**2, codes)
    by = 1.0 / sd[:, None]
    one = np.ones(design.n)
    return Rows(design.X * by, e * by[:, 0], [a * by for a in z], levels, one, codes)


def _reduced(r: Rows) -> Rows:
    """Rows of one group, one variance and the same levels of all terms as p + S rotated ones."""
    p, widths = r.X.shape[1], [a.shape[1] for a in r.z]
    k = p + sum(widths)
    cell = np.zeros(len(r.e), int)
    for labels in (r.group, r.variance, *r.codes):
        own = np.unique(labels, return_inverse=True)[1].ravel()
        cell = np.unique(cell * (own.max() + 1) + own, return_inverse=True)[1].ravel()
    sizes = np.bincount(cell)
    if sizes.max() <= k:
        return r
    few = np.flatnonzero(sizes[cell] <= k)
    cells = np.flatnonzero(sizes > k)
    renumbered = np.full(len(sizes), -1)
    renumbered[cells] = np.arange(len(cells))
    many = np.flatnonzero(renumbered[cell] >= 0)
    F, first = np.zeros((len(cells), k, k + 1)), np.zeros(len(cells), int)
    for which, at in _batches(renumbered[cell[many]], len(cells), k + 1):
        rows = many[at]
        F[which] = _triangle(np.concatenate([r.X[rows], *(a[rows] for a in r.z)], 2), r.e[rows])
        first[which] = rows[:, 0]
    ends = np.cumsum([p, *widths])
    parts = [a.reshape(-1, a.shape[2]) for a in np.split(F, ends, axis=2)]
    kept, stands = r.at(few), np.repeat(first, k)
    both = lambda a, b: np.concatenate([a, b])  # noqa: E731
    return Rows(
        both(kept.X, parts[0]),
        both(kept.e, parts[-1][:, 0]),
        [both(a, b) for a, b in zip(kept.z, parts[1:-1], strict=True)],
        [both(a, b[stands]) for a, b in zip(kept.codes, r.codes, strict=True)],
        both(kept.variance, r.variance[stands]),
        both(kept.group, r.group[stands]),
    )


def _triangle(columns: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Q'[columns e], Q an orthonormal basis of the columns: (c, n, k) -> (c, k, k + 1).

    The triangular factor of [columns e]: the part of e beside the columns is in its last row.
    """
    k = columns.shape[2]
    return np.linalg.qr(np.concatenate([columns, e[:, :, None]], 2), mode="r")[:, :k]


def _one(r: Rows, covs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X_i, V_i and residuals of a large group: of each variance in it p + q_i rows at most."""
    p, Z, ZS = r.X.shape[1], [], []
    within = [np.unique(codes, return_inverse=True) for codes in r.codes]
    q = sum(len(levels) * z.shape[1] for (levels, _), z in zip(within, r.z, strict=True))
    _check_size(min(len(r.e), p + q), MANY)
    for z, (levels, at), cov in zip(r.z, within, covs, strict=True):
        wide = np.zeros((len(z), len(levels), z.shape[1]))
        wide[np.arange(len(z)), at.ravel()] = z
        Z.append(wide.reshape(len(z), -1))
        ZS.append(np.kron(np.eye(len(levels)), cov))
    columns, e = np.concatenate([r.X, *Z], 1), r.e
    parts, variances = [], []
    for c in np.unique(r.variance):
        at = np.flatnonzero(r.variance == c)
        own, part = columns[at], e[at]
        used = np.flatnonzero(np.any(own != 0, axis=0))
        if len(at) > len(used):
            F = _triangle(own[None][:, :, used], part[None])[0]
            own, part = np.zeros((len(used), columns.shape[1])), F[:, -1]
            own[:, used] = F[:, :-1]
        parts.append(np.column_stack([own, part]))
        variances.append(np.full(len(own), c))
    whole, variance = np.concatenate(parts), np.concatenate(variances)
    _check_size(len(whole), MANY)
    V, ends = np.diag(variance), p + np.cumsum([0, *(len(s) for s in ZS)])
    for a, b, S in zip(ends, ends[1:], ZS, strict=False):
        V += whole[:, a:b] @ S @ whole[:, a:b].T
    return whole[:, :p], V, whole[:, -1]


MANY = "many random effects or different variances"


def _check_size(size: int, why: str) -> None:
    if size > MOST:
        raise LmmError(
            f"found a group whose covariance, with {why}, needs a dense matrix of {size} rows; "
            f"expected at most {MOST}. Use group= for smaller groups, correction='CR1' if it was "
            "CR2, or leave out 'robust'."
        )


def _batches(
    codes: np.ndarray, m: int, width: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(groups, their rows) for groups of one size, about CHUNK numbers at once.

    A row has ``width`` numbers, by default as many as the group has rows.
    """
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes, minlength=m)
    starts = np.cumsum(sizes) - sizes
    for size in np.unique(sizes):
        same = np.flatnonzero(sizes == size)
        step = max(1, CHUNK // (int(size) * (width or int(size))))
        for a in range(0, len(same), step):
            which = same[a : a + step]
            yield which, order[starts[which][:, None] + np.arange(size)]


# -------------------------------------------------------------------------------------------------
# Groups
# -------------------------------------------------------------------------------------------------


def _all_nested(design: Design) -> bool:
    """Whether every factor stands in the chain, so that groups are sums over levels."""
    from lmmjax import gram

    return bool(design.p) and not gram.plan(design, dense=0).layout.core


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

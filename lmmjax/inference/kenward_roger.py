r"""Kenward and Roger's adjusted covariance, degrees of freedom and scaled F.

With G_i = ∂V/∂ω_i for the variance parameters ω (linear.py), Φ = (X'V⁻¹X)⁻¹,
P_i = -X'V⁻¹G_iV⁻¹X, Q_ij = X'V⁻¹G_iV⁻¹G_jV⁻¹X, R_ij = X'V⁻¹(∂²V/∂ω_i∂ω_j)V⁻¹X and W the covariance
of ω̂ (Kenward and Roger 1997, Biometrics 53, 983-997):

    Φ_A = Φ + 2 Φ [Σ_ij W_ij (Q_ij - P_iΦP_j - ¼R_ij)] Φ.

For H0: Lβ = c with q rows, Θ = L'(LΦL')⁻¹L, A₁ = Σ W_ij tr(ΘΦP_iΦ)tr(ΘΦP_jΦ) and
A₂ = Σ W_ij tr(ΘΦP_iΦΘΦP_jΦ) lead to λF ~ F(q, m), F = (Lβ̂ - c)'(LΦ_AL')⁻¹(Lβ̂ - c)/q.

W⁻¹ is the expected information ½ tr(P G_i P G_j), P = V⁻¹ - V⁻¹XΦX'V⁻¹ (pbkrtest), or the observed
one, half the Hessian of the REML criterion (SAS): both legitimate, and different. Of a singular fit
the expected information keeps all parameters (pbkrtest), the observed one is that of the active
face: parameters at 0 are known to be 0 (SAS; :func:`on_the_face`).

R = V - ZΣZ' lies in the span of V and the G_k, and the adjustment does not depend on the basis of
that span: V itself stands for the residual variance, for which all tables are known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lmmjax import determined
from lmmjax.inference.information import Tables

INFORMATION = ("expected", "observed")


class Adjustment(NamedTuple):
    """What every Kenward-Roger test of one fit shares, in the units of the data."""

    vcov: np.ndarray  # Φ, (p, p)
    adjusted: np.ndarray  # Φ_A, (p, p)
    slopes: np.ndarray  # Φ P_i Φ, (1 + K, p, p)
    W: np.ndarray  # covariance of the variance parameters, (1 + K, 1 + K)


class Extended(NamedTuple):
    """The tables with V put before the directions G_k, as NumPy arrays in units of σ²."""

    M: np.ndarray  # Φ, (p, p)
    r2: float
    n: float
    v: np.ndarray  # (-β̂, 1)
    trace1: np.ndarray  # tr(V⁻¹G_i), (1 + K,)
    trace2: np.ndarray  # tr(V⁻¹G_iV⁻¹G_j), (1 + K, 1 + K)
    S1: np.ndarray  # [X y]'V⁻¹G_iV⁻¹[X y], (1 + K, m, m)
    S2: np.ndarray  # [X y]'V⁻¹G_iV⁻¹G_jV⁻¹[X y], symmetrised, (1 + K, 1 + K, m, m)

    @property
    def p(self) -> int:
        return len(self.M)


def extend(t: Tables, n: float) -> Extended:
    """Put V as the first direction: V⁻¹VV⁻¹ = V⁻¹ makes its rows known."""
    S, trace1, trace2, S1, S2 = (np.asarray(a, float) for a in t)
    p, K = len(S) - 1, len(trace1)
    full2 = np.empty((1 + K, 1 + K, p + 1, p + 1))
    full2[0, 0], full2[0, 1:], full2[1:, 0], full2[1:, 1:] = S, S1, S1, S2
    full_trace = np.block([[np.array([[n]]), trace1[None]], [trace1[:, None], trace2]])
    M = np.linalg.inv(S[:p, :p])
    M = 0.5 * (M + M.T)
    beta = M @ S[:p, p]
    r2 = float(S[p, p] - S[:p, p] @ beta)
    first = np.concatenate([[n], trace1])
    return Extended(
        M, r2, n, np.append(-beta, 1.0), first, full_trace, np.concatenate([S[None], S1]), full2
    )


def expected_information(e: Extended) -> np.ndarray:
    """½ tr(P G_i P G_j) in units of σ² = 1, (1 + K, 1 + K)."""
    p = e.p
    MP = np.einsum("ab,ibc->iac", e.M, e.S1[:, :p, :p])
    across = np.einsum("ab,ijab->ij", e.M, e.S2[:, :, :p, :p])
    return 0.5 * (e.trace2 - 2 * across + np.einsum("iab,jba->ij", MP, MP))


def observed_information(
    e: Extended, sigma2: float, method: str = "REML", curvature: np.ndarray | None = None
) -> np.ndarray:
    """Half the Hessian of the deviance in (V, ω), units of σ² = 1, (1 + K, 1 + K).

    -½ tr(P G_i P G_j) + y'P G_i P G_j P y, with V⁻¹ instead of P in the trace for ML. ``curvature``
    is :func:`curvature`'s, None where V is linear.
    """
    p = e.p
    Sv = e.S1 @ e.v
    quadratic = np.einsum("m,ijmn,n->ij", e.v, e.S2, e.v)
    quadratic = quadratic - Sv[:, :p] @ e.M @ Sv[:, :p].T
    trace = 2 * expected_information(e) if method == "REML" else e.trace2
    return -0.5 * trace + quadratic / sigma2 + (0.0 if curvature is None else curvature)


def curvature(
    e: Extended, second: Tables, along: np.ndarray, sigma2: float, method: str
) -> np.ndarray:
    """What ∂²V/∂ω_i∂ω_j adds to the observed information, (1 + K, 1 + K); 0 where V is linear.

    Half the criterion's derivatives along them, ½[tr(P G_ij) - y'P G_ij P y]. ``second`` are the
    tables for the K² directions ∂²Σ/∂ω_i∂ω_j.
    """
    K, p = len(along), e.p
    S1 = np.asarray(second.S1)
    trace = np.asarray(second.trace1)
    if method == "REML":
        trace = trace - np.einsum("ab,iab->i", e.M, S1[:, :p, :p])
    along_v = np.einsum("m,imn,n->i", e.v, S1, e.v) / sigma2
    T = to_sigma2(along)[1:]
    return T.T @ (0.5 * (trace - along_v)).reshape(K, K) @ T


def to_sigma2(along: np.ndarray) -> np.ndarray:
    """Jacobian of (σ², ω) in the parameters (V, ω): raising V by itself raises every ω too."""
    T = np.eye(1 + len(along))
    T[1:, 0] = along
    return T


def inverse(information: np.ndarray) -> np.ndarray:
    """Inverse of an information matrix; directions that the data do not determine are left out."""
    size = np.sqrt(np.abs(np.diag(information)))
    size[size == 0] = 1.0
    unit = information / np.outer(size, size)
    return np.linalg.pinv(unit, rcond=1e-12, hermitian=True) / np.outer(size, size)


def on_the_face(e: Extended, J: np.ndarray, hessian: np.ndarray, nu: float) -> np.ndarray:
    """Covariance W of the parameters (V, ω) from the Hessian in θ, (1 + K, 1 + K).

    With σ̂²(θ) = r²(θ)/ν and H the Hessian of the profiled deviance, Var θ̂ = 2H⁻¹ and
    log σ̂² = log r²(θ)/ν + an independent part of variance 2/ν. Inside the parameter space W is the
    inverse of :func:`observed_information`. On its boundary the slope of the criterion is not 0 in
    ω and half its Hessian in ω is no information; in θ it is, and a variance of 0 has no slope.

    Parameters
    ----------
    J : (K, n_theta)
        Slopes of (ω, φ), relative to σ², in (θ, φ).
    hessian : (n_theta, n_theta)
        Directions that it does not determine are left out.
    nu : float
        n - p (REML) or n (ML).
    """
    slope = -np.einsum("m,kmn,n->k", e.v, e.S1[1:], e.v) / e.r2
    both = np.vstack([slope @ J, J])
    W = 2.0 * both @ determined.inverse(hessian)[0] @ both.T
    W[0, 0] += 2.0 / nu
    return W


def adjust(
    e: Extended,
    sigma2: float,
    W: np.ndarray,
    curved: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Adjustment:
    """Φ, Φ_A and what the tests need, in units where σ² has the value ``sigma2``.

    Parameters
    ----------
    e : Extended
    sigma2 : float
    W : (1 + K, 1 + K)
        Covariance of the parameters (V, ω), in units of σ² = 1.
    curved : callable, optional
        W -> Σ_ij W_ij R_ij (p, p) of structures that are not linear, W for the parameters (V, ω);
        see :func:`second_order`.
    """
    p = e.p
    S1, S2 = e.S1[:, :p, :p], e.S2[:, :, :p, :p]
    inner = np.einsum("ij,ijab->ab", W, S2)
    inner = inner - np.einsum("ij,iab,bc,jcd->ad", W, S1, e.M, S1, optimize=True)
    if curved is not None:
        inner = inner - 0.25 * curved(W)
    adjusted = e.M + 2 * e.M @ inner @ e.M
    slopes = -e.M @ S1 @ e.M
    return Adjustment(sigma2 * e.M, sigma2 * 0.5 * (adjusted + adjusted.T), sigma2 * slopes, W)


def second_order(second: Tables, along: np.ndarray, W: np.ndarray) -> np.ndarray:
    """Σ_ij W_ij X'V⁻¹(∂²V/∂ω_i∂ω_j)V⁻¹X for W of the parameters (V, ω), (p, p)."""
    K, m = len(along), second.S1.shape[-1]
    R = np.asarray(second.S1).reshape(K, K, m, m)[..., : m - 1, : m - 1]
    T = to_sigma2(along)[1:]
    return np.einsum("kl,klab->ab", T @ W @ T.T, R)


def change_units(a: Adjustment, back: np.ndarray) -> Adjustment:
    """Carry the adjustment from standardised to the caller's units: β = β₀ + back β_s."""
    slopes = np.einsum("ai,kij,bj->kab", back, a.slopes, back)
    return Adjustment(back @ a.vcov @ back.T, back @ a.adjusted @ back.T, slopes, a.W)


def f_distribution(a: Adjustment, L: np.ndarray) -> tuple[float, float]:
    """Degrees of freedom m and scaling λ of F for the hypothesis with rows ``L`` (full rank).

    Kenward and Roger (1997), section 3, with the convention of pbkrtest where m is near 2.
    """
    q = len(L)
    root = np.linalg.cholesky(L @ a.vcov @ L.T)
    half = np.linalg.solve(root, L)
    D = half @ a.slopes @ half.T  # similar to ΘΦP_iΦ
    traces = np.trace(D, axis1=1, axis2=2)
    A1 = float(traces @ a.W @ traces)
    A2 = float(np.einsum("ij,iab,jba->", a.W, D, D, optimize=True))
    B = (A1 + 6 * A2) / (2 * q)
    g = ((q + 1) * A1 - (q + 4) * A2) / ((q + 2) * A2)
    c = np.array([g, q - g, q + 2 - g]) / (3 * q + 2 * (1 - g))
    V0, V1, V2 = 1 + c[0] * B, 1 - c[1] * B, 1 - c[2] * B
    V0 = 0.0 if abs(V0) < 1e-10 else V0
    E = 1 - A2 / q
    rho = (1.0 if abs(E) < 1e-14 and abs(V1) < 1e-14 else E / V1) ** 2 * V0 / (q * V2)
    df = 4 + (q + 2) / (q * rho - 1)
    return df, 1.0 if abs(df - 2) < 1e-2 else df * E / (df - 2)

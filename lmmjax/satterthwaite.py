r"""Satterthwaite's degrees of freedom from exact derivatives.

For a contrast c = l'β with estimated variance v = l'V l, df = 2 v² / Var(v) (Giesbrecht and Burns
1985; Kuznetsova, Brockhoff and Christensen 2017). With the variance parameters' covariance taken
as twice the inverse Hessian of the deviance in (θ, σ), and σ profiled out (P the inverse Hessian of
the *profiled* deviance, v(θ) = σ̂²(θ) l'M(θ)l the variance along the profile), block inversion
leaves

    1/df = 1/ν + (∂v/v)' P (∂v/v),      ν = n - p (REML) or n (ML).

A parameter on the boundary (a relative SD of 0) has ∂v = 0 by symmetry and so drops out: the df
are those of the model on the active face. Directions that the criterion does not determine
(determined.py) are left out, as lmerTest does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lmmjax.determined import inverse


def degrees(L: np.ndarray, V: np.ndarray, dV: np.ndarray, hessian: np.ndarray, nu: Any) -> Any:
    """Satterthwaite df for each row of ``L``; leading axes (items of a batch) are carried along.

    Parameters
    ----------
    L : (r, p)
    V : (..., p, p)
        Covariance of β̂ with σ profiled.
    dV : (..., p, p, n_theta)
        Its derivatives in θ along the profile.
    hessian : (..., n_theta, n_theta)
        Of the profiled deviance in the same θ.
    nu : float or (...) array
        Residual degrees of freedom of σ̂².

    Returns
    -------
    (..., r) array

    Notes
    -----
    O(r p² n_theta) an item.
    """
    v = np.einsum("ri,...ij,rj->...r", L, V, L)
    slope = np.einsum("ri,...ijk,rj->...rk", L, dV, L) / v[..., None]
    if hessian.shape[-1] == 0:
        return np.broadcast_to(np.asarray(nu, float)[..., None], v.shape).copy()
    nu = np.asarray(nu, float)[..., None]
    spread = np.einsum("...rk,...kl,...rl->...r", slope, inverse(hessian)[0], slope)
    return 1.0 / (1.0 / nu + spread)

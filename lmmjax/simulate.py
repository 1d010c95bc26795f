"""Draws of the response from the model, in the units of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lmmjax.errors import DataError
from lmmjax.residual.covariance import correlate, relative_sd
from lmmjax.tables import check_seed

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.design import Design


def simulate(
    design: Design,
    beta: np.ndarray,
    lams: list[np.ndarray],
    sigma: float,
    *,
    n: int,
    seed: int,
    phi: np.ndarray | None = None,
) -> pd.DataFrame:
    """Simulate ``n`` responses y = Xβ + offset + Zb + ε with new b and ε each.

    Parameters
    ----------
    beta : array (p,)
    lams : list of arrays (S, S)
        Relative factors Λ per term; Cov(b) = σ²ΛΛ'.
    sigma : float
        Residual SD; a row of weight w has residual SD σ/√w.
    n, seed : int
    phi : array (n_phi,), optional
        Free residual parameters of a structured model (``Fit.phi``).

    Returns
    -------
    DataFrame, shape (n_obs, n), columns sim_1 ...

    Notes
    -----
    O(n_obs n S) time. The same seed gives the same numbers.
    """
    import pandas as pd

    if beta.shape != (design.p,):
        raise DataError(
            f"beta has shape {beta.shape}; expected ({design.p},), one value for each of "
            f"{list(design.x_names)}."
        )
    rng = np.random.default_rng(check_seed(seed))
    mean = design.X @ beta + design.offset
    phi = np.zeros(0) if phi is None else phi
    sd = sigma * relative_sd(design.residual, phi, design.weights)
    coloured = correlate(design.residual, phi)
    out = np.empty((n, design.n))
    for i in range(n):
        out[i] = mean + sd * coloured(rng.standard_normal(design.n))
        for term, lam in zip(design.terms, lams, strict=True):
            b = sigma * rng.standard_normal((len(term.levels), lam.shape[0])) @ lam.T
            out[i] += np.einsum("is,is->i", term.z, b[term.codes])
    return pd.DataFrame(out.T, index=design.rows, columns=[f"sim_{i + 1}" for i in range(n)])

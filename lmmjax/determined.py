r"""What a likelihood determines: flat directions of its Hessian, and variances along the others.

Directions are judged in units of each parameter's own curvature, so that neither the number of rows
nor a parameter's scale decides: with d_i = h_ii^(-1/2) the matrix d h d has a unit diagonal, and an
eigenvalue of 0 where some parameters move without the likelihood noticing.
"""

from __future__ import annotations

import numpy as np

#: eigenvalues of the unit-diagonal Hessian below this are 0: the SE given the others is 1,000 times
#: smaller, and the Hessian is that of an optimum found to a gradient of about this size
FLAT = 1e-6

#: curvature of -2 log L below which a parameter is flat by itself
NO_CURVATURE = 1e-7

#: part of a slope along flat directions that counts, relative to the slope
PART = 1e-3


def _unit(hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales d, eigenvalues and eigenvectors of the Hessian with a unit diagonal."""
    diagonal = np.abs(np.diagonal(hessian, axis1=-2, axis2=-1))
    d = 1.0 / np.sqrt(np.where(diagonal > NO_CURVATURE, diagonal, 1.0))
    return d, *np.linalg.eigh(hessian * d[..., :, None] * d[..., None, :])


def flat_directions(hessian: np.ndarray) -> np.ndarray:
    """Directions (K, m) in the parameters that leave the criterion unchanged to second order.

    Parameters
    ----------
    hessian : (K, K)
        Of -2 log-likelihood at an optimum.

    Examples
    --------
    >>> flat_directions(np.array([[1.0, 1.0], [1.0, 1.0]])).shape
    (2, 1)
    """
    d, e, Q = _unit(hessian)
    return d[:, None] * Q[:, np.abs(e) <= FLAT]


def delta_variance(slopes: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Diagonal of J h⁻¹ J'; infinite where a row of J has a part along a flat direction.

    Parameters
    ----------
    slopes : (..., r, K)
        J, the slopes of the quantities in the parameters; leading axes (fits) are carried along.
    hessian : (..., K, K)

    Returns
    -------
    (..., r) array

    Notes
    -----
    O(K³ + r K²).

    Examples
    --------
    >>> flat = np.array([[1.0, 1.0], [1.0, 1.0]])
    >>> delta_variance(np.array([[1.0, 1.0], [1.0, 0.0]]), flat).tolist()
    [1.0, inf]
    """
    d, e, Q = _unit(hessian)
    along, flat = (slopes * d[..., None, :]) @ Q, np.abs(e) <= FLAT
    weight = np.where(flat, 0.0, 1.0 / np.where(flat, 1.0, e))
    variance = np.sum(along**2 * weight[..., None, :], axis=-1)
    part = np.sqrt(np.sum(along**2 * flat[..., None, :], axis=-1))
    size = np.sqrt(np.sum(along**2, axis=-1))
    return np.where((part > PART * size) & (part > 0), np.inf, variance)


def inverse(hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse along the directions of positive curvature, and how far each parameter lies in them.

    Parameters
    ----------
    hessian : (..., K, K)
        Leading axes (fits) are carried along.

    Returns
    -------
    (..., K, K) array
        0 along :func:`flat_directions`.
    (..., K) array
        1 for a parameter that is determined, 0 for one that is flat.

    Examples
    --------
    >>> inverse(np.diag([2.0, 0.0]))[1].tolist()
    [1.0, 0.0]
    """
    d, e, Q = _unit(hessian)
    kept = e > FLAT
    weight = np.where(kept, 1.0 / np.where(kept, e, 1.0), 0.0)
    half = d[..., None] * Q
    whole = (half * weight[..., None, :]) @ np.swapaxes(half, -1, -2)
    return whole, np.sum(Q**2 * kept[..., None, :], axis=-1)

"""Residual parameters as the field reports them, with Wald intervals on a transformed scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from lmmjax.precision import in_float64

if TYPE_CHECKING:
    from lmmjax.fit import Fit


@in_float64
def natural(fit: Fit) -> np.ndarray:
    """Reported residual parameters in the order of ``Model.phi_names``."""
    residual = fit.model.design.residual
    assert residual is not None
    return np.asarray(residual.structure.natural(jnp.asarray(fit.phi)))

r"""R² for mixed models, intraclass correlation, and the shares of the variance.

    var_fixed     variance of Xβ̂ over the rows (denominator n - 1)
    var_random    mean over the rows of z'Dz, summed over the terms (Johnson 2014)
    var_residual  σ²; where a residual structure has unequal variances, their mean over the rows

marginal R² = var_fixed / total, conditional R² = (var_fixed + var_random) / total (Nakagawa and
Schielzeth 2013, Meth. Ecol. Evol. 4, 133-142; random slopes: Johnson 2014, ibid. 5, 944-946).
Adjusted ICC = var_random / (var_random + var_residual), unadjusted ICC = var_random / total. All
are defined for singular fits. They are shares of a row's variance: where residuals of a group are
correlated, so that two of its rows share more than the random effects, ``marginal_cov`` has their
correlation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lmmjax.errors import LmmError
from lmmjax.residual.covariance import relative_sd

if TYPE_CHECKING:
    from lmmjax.fit import Fit


def shares(fit: Fit) -> tuple[float, dict[str, float], float]:
    """(var_fixed, var_random by group, var_residual) in squared units of the response."""
    design = fit.model.design
    mean = design.X @ fit._beta
    fixed = float(np.var(mean - mean[0], ddof=1))  # 0 for a constant, without its rounding
    random: dict[str, float] = {}
    for term, cov in zip(design.terms, fit._term_covs(), strict=True):
        own = float(np.sum((term.z.T @ term.z) * cov)) / design.n
        random[term.group] = random.get(term.group, 0.0) + own
    sd = relative_sd(design.residual, fit.phi, np.ones(design.n))
    return fixed, random, fit.sigma**2 * float(np.mean(sd**2))


def intraclass(fit: Fit) -> tuple[float, float]:
    """(adjusted, unadjusted) share of the random effects.

    Raises
    ------
    LmmError
        No random effects but correlated residuals, whose correlation no share tells.
    """
    residual = fit.model.design.residual
    if not fit.model.is_mixed and residual is not None and residual.correlated:
        raise LmmError(
            f"found no random effects, and residuals correlated by {fit.model.residual}; expected "
            "random effects, whose share of the variance the ICC is. See residual_params(), or "
            "marginal_cov() for the correlation of rows."
        )
    fixed, random, left = shares(fit)
    between = sum(random.values())
    return between / (between + left), between / (fixed + between + left)

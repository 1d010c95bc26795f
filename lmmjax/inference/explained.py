r"""R² for mixed models, intraclass correlation, and the shares of the variance.

    var_fixed     variance of Xβ̂ over the rows (denominator n - 1)
    var_random    mean over the rows of z'Dz, summed over the terms (Johnson 2014)
    var_residual  σ²

marginal R² = var_fixed / total, conditional R² = (var_fixed + var_random) / total (Nakagawa and
Schielzeth 2013, Meth. Ecol. Evol. 4, 133-142; random slopes: Johnson 2014, ibid. 5, 944-946).
Adjusted ICC = var_random / (var_random + var_residual), unadjusted ICC = var_random / total. All
are defined for singular fits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lmmjax.fit import Fit


def shares(fit: Fit) -> tuple[float, dict[str, float], float]:
    """(var_fixed, var_random by group, var_residual) in squared units of the response."""
    design = fit.model.design
    fixed = float(np.var(design.X @ fit._beta, ddof=1))
    random: dict[str, float] = {}
    for term, cov in zip(design.terms, fit._term_covs(), strict=True):
        mean = float(np.sum((term.z.T @ term.z) * cov)) / design.n
        random[term.group] = random.get(term.group, 0.0) + mean
    return fixed, random, fit.sigma**2

r"""Wald tests of variance components.

The covariance of (ω̂, σ̂²), the variances and covariances of linear.py, is the inverse of half the
Hessian of the fitted criterion (observed information, as SAS's COVTEST), z = estimate / SE. A
variance cannot be negative, so its p-value is one-sided; that of a covariance is two-sided. Near
the boundary the normal approximation is poor, at it void: every row says so in words. Parameters of
a residual structure follow, tested on the scales of residual/intervals.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lmmjax.determined import delta_variance
from lmmjax.inference import kenward_roger as kr
from lmmjax.inference.linear import tangent
from lmmjax.inference.variances import observed_information
from lmmjax.residual.intervals import UNDETERMINED, tests
from lmmjax.tables import missing_as_nan

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit

BOUNDARY = "on the boundary: z and p are not valid; use a likelihood ratio test with its mixture"
VARIANCE = "one-sided; the normal approximation is poor near 0, prefer a likelihood ratio test"
COVARIANCE = "two-sided; relies on a normal approximation"
RESIDUAL = "one-sided; relies on a normal approximation"


class Component(NamedTuple):
    """A variance or covariance, and how it depends on (σ², ω) in standardised units."""

    group: str
    term1: str | None
    term2: str | None
    value: float
    row: np.ndarray
    caveat: str


def wald(fit: Fit) -> pd.DataFrame:
    """The table of ``Fit.variance_tests``."""
    import pandas as pd
    from scipy import stats

    parts = components(fit)
    J = np.array([c.row for c in parts])
    T = kr.to_sigma2(fit._variance_tables[1].along)
    se = np.sqrt(np.maximum(delta_variance(J @ T, observed_information(fit)), 0.0))
    estimate = np.array([c.value for c in parts])
    unknown = np.isinf(se)
    void = np.array([c.caveat == BOUNDARY for c in parts]) | (se == 0) | unknown
    z = np.where(void, np.nan, estimate / np.where(se > 0, se, 1.0))
    two_sided = np.array([c.term2 is not None for c in parts])
    p = np.where(two_sided, 2 * stats.norm.sf(np.abs(z)), stats.norm.sf(z))
    frame = pd.DataFrame([c[:3] for c in parts], columns=["group", "term1", "term2"])
    caveat = [UNDETERMINED if u else c.caveat for c, u in zip(parts, unknown, strict=True)]
    frame = frame.assign(estimate=estimate, std_error=se, statistic=z, p_value=p, caveat=caveat)
    if not fit.model.is_structured:
        return missing_as_nan(frame)
    more = tests(fit).rename_axis("term1").reset_index()
    more.insert(0, "group", "Residual")
    more.insert(2, "term2", None)
    return missing_as_nan(pd.concat([frame, more], ignore_index=True))


def parameter_covariance(fit: Fit) -> np.ndarray:
    """Covariance of (σ̂², ω̂, φ̂) in the standardised problem, in units of σ̂²: (1 + K, 1 + K).

    σ̂² is that of the residual source, see :class:`lmmjax.residual.structures.Variances`.
    """
    T = kr.to_sigma2(fit._variance_tables[1].along)
    return T @ kr.inverse(observed_information(fit)) @ T.T


def components(fit: Fit) -> list[Component]:
    """All variances and covariances in the order of ``varcorr``, in the units of the data."""
    sigma2 = (fit.sigma / fit._residual_sd) ** 2
    model = fit.model
    structures, terms = model._plan.layout.structures, model.design.terms
    lams = model._factors(fit._theta_s)
    tangents = [tangent(s, lam @ lam.T) for s, lam in zip(structures, lams, strict=True)]
    ends = 1 + np.cumsum([0, *(len(t.first) for t in tangents)])
    out = []
    for k, (term, t, cov) in enumerate(zip(terms, tangents, fit._term_covs(), strict=True)):
        moved = sigma2 * model._units.B[k] @ t.first @ model._units.B[k].T
        S, singular = len(cov), _singular(lams[k])
        pairs = [(i, i) for i in range(S)]
        pairs += [(i, j) for i in range(S) for j in range(i + 1, S) if np.any(moved[:, i, j])]
        for i, j in pairs:
            row = np.zeros(ends[-1] + len(fit.phi))
            row[ends[k] : ends[k + 1]] = moved[:, i, j]
            caveat = BOUNDARY if singular else (VARIANCE if i == j else COVARIANCE)
            other = None if i == j else term.names[j]
            out.append(Component(term.group, term.names[i], other, cov[i, j], row, caveat))
    residual = np.zeros(ends[-1] + len(fit.phi))
    residual[0] = fit.sigma**2
    if model.design.residual is not None:
        structure = model.design.residual.structure
        shifts = np.asarray(structure.variances.shifts, float)
        residual[ends[-1] + structure.n_corr :] = 2 * fit.sigma**2 * shifts
    return [*out, Component("Residual", None, None, fit.sigma**2, residual, RESIDUAL)]


def _singular(lam: np.ndarray) -> bool:
    from lmmjax.optimize import SINGULAR_TOLERANCE

    return bool(np.min(np.abs(np.diag(np.linalg.qr(lam.T, mode="r")))) < SINGULAR_TOLERANCE)

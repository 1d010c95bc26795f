"""Is a residual structure identified, contained in another, implied by a hierarchical model?"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax.errors import ResidualWarning
from lmmjax.residual.structures import (
    Antedependence,
    CompoundSymmetry,
    Toeplitz,
    Unstructured,
)

if TYPE_CHECKING:
    from lmmjax.design import Design, Term
    from lmmjax.fit import Fit
    from lmmjax.residual.frame import Residuals


def warn_redundant(design: Design) -> None:
    """Warn where random effects of the residual subjects are part of the residual structure.

    cs and toep contain the covariance of a random intercept, un that of any random effects: only
    their sum is identified.
    """
    r = design.residual
    if r is None or r.structure.family is None:
        return
    family, variances = r.structure.family, r.structure.variances
    for term in design.terms:
        if not _same_groups(term.codes, r.subject):
            continue
        equal = variances.n_phi == 0 and "(Intercept)" in term.names
        if isinstance(family, Unstructured) or (
            equal and isinstance(family, CompoundSymmetry | Toeplitz)
        ):
            _warn(term, r.spec.text)


def _same_groups(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two codings divide the rows alike."""
    pairs = np.unique(np.column_stack([a, b]), axis=0)
    return len(pairs) == len(np.unique(a)) == len(np.unique(b))


def _warn(term: Term, text: str) -> None:
    warnings.warn(
        f"{text} contains the covariance of ({', '.join(term.names)} | {term.group}): only the sum "
        "of the two is identified, not each of them. Leave one of them out; the fixed effects and "
        "the likelihood do not suffer.",
        ResidualWarning,
        stacklevel=5,
    )


#: correlations whose members are members of others too, on the same subjects and positions
_WITHIN: dict[str, tuple[str, ...]] = {
    "cs": ("toep", "un"),
    "ar1": ("arma", "toep", "ad", "un"),
    "arma": ("toep", "un"),
    "toep": ("un",),
    "ad": ("un",),
    "car1": ("sppow", "spexp"),
    "sppow": ("car1", "spexp"),
    "spexp": ("car1", "sppow"),
}


def contains(big: Residuals, small: Residuals) -> bool:
    """Whether every covariance of one structure is one of the other's, as far as can be told.

    Correlations by name (cs, ar1 in arma in toep in un, ar1 in ad in un, ...; with a nugget those
    without) on the same subjects and positions; SDs by the span of log S, which is linear in its
    parameters.
    """
    a, b = small.spec.correlation, big.spec.correlation
    if small.correlated and (a is None or b is None or not _same_positions(big, small)):
        return False
    if a is not None and b is not None:
        wider = a.family == b.family or b.family in _WITHIN.get(a.family, ())
        orders = a.family != "arma" or b.family != "arma" or (a.p <= b.p and a.q <= b.q)
        autoregressive = a.family != "ar1" or b.family != "arma" or b.p > 0
        if not (wider and orders and autoregressive and a.nugget <= b.nugget):
            return False
    H = np.column_stack([np.ones(len(big.H)), big.H])
    left = small.H - H @ np.linalg.lstsq(H, small.H, rcond=None)[0]
    return bool(np.all(np.abs(left) < 1e-7 * (1 + np.abs(small.H))))


def _same_positions(big: Residuals, small: Residuals) -> bool:
    """Same subjects; the position of a row in one tells that in the other, and keeps the order."""
    if not _same_groups(big.subject, small.subject):
        return False
    if isinstance(small.structure.family, CompoundSymmetry):
        return True
    if big.pos.shape[1] != 1 or small.pos.shape[1] != 1:
        return np.array_equal(big.pos, small.pos)
    pairs = np.unique(np.column_stack([big.pos[:, 0], small.pos[:, 0]]), axis=0)
    one_to_one = len(pairs) == len(np.unique(pairs[:, 0])) == len(np.unique(pairs[:, 1]))
    if not one_to_one or isinstance(big.structure.family, Unstructured):
        return one_to_one
    steps = np.diff(pairs, axis=0)
    if isinstance(big.structure.family, Antedependence):
        return bool(np.all(steps[:, 1] > 0))
    return bool(np.allclose(steps[:, 1] / steps[:, 0], steps[0, 1] / steps[0, 0]))


def hierarchical_counterpart(fit: Fit) -> str | None:
    """Why no hierarchical model implies a fitted marginal model, or None.

    Compound symmetry is what a random intercept implies, V_i = tau2 11' + sigma2 I, as long as
    tau2 = rho V_11 is not negative (Verbeke and Molenberghs 2000, section 5.6.2). A negative
    correlation is a valid marginal model that no random intercept brings about.
    """
    family: Any = None
    if fit.model.design.residual is not None:
        family = fit.model.design.residual.structure.family
    if not isinstance(family, CompoundSymmetry) or fit.model.is_mixed:
        return None
    rho = float(fit.residual_params()["rho"])
    if rho >= 0:
        return None
    return (
        f"the correlation within {fit.model.design.residual.subject_name} is negative "  # type: ignore[union-attr]
        f"({rho:.3g}): a valid marginal model, but none that a random intercept could bring about, "
        "since its variance would have to be negative; rows of a subject compete rather than share"
    )

"""Is a fitted or stated residual structure identified, and does a hierarchical model imply it?"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax.errors import ResidualWarning
from lmmjax.residual.structures import CompoundSymmetry, Toeplitz, Unstructured

if TYPE_CHECKING:
    from lmmjax.design import Design, Term
    from lmmjax.fit import Fit


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

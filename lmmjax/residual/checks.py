"""Is a residual structure identified, contained in another, implied by a hierarchical model?"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

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


def warn_redundant(design: Design) -> bool:
    """Warn where random effects of the residual subjects are part of the residual structure.

    cs and toep with equal variances contain the covariance of a random intercept, un with a
    variance per position that of any random effects: only the sum is identified. Random effects
    that span a constant count as an intercept, whatever their columns are called.

    Returns
    -------
    bool
        Whether a warning was given.
    """
    r, found = design.residual, False
    if r is None or r.structure.family is None:
        return found
    family, equal = r.structure.family, r.structure.variances.n_phi == 0
    any_effects = isinstance(family, Unstructured) and _position_variances(r)
    intercept = equal and isinstance(family, CompoundSymmetry | Toeplitz | Unstructured)
    for term in design.terms:
        if not _same_groups(term.codes, r.subject):
            continue
        if any_effects or (intercept and _has_constant(term)):
            _warn(term, r.spec.text, any_effects or len(term.names) == 1)
            found = True
    return found


def _position_variances(r: Residuals) -> bool:
    """Whether every position has a variance of its own."""
    return r.spec.correlation is not None and r.spec.correlation.heterogeneous


def _has_constant(term: Term) -> bool:
    """Whether the term's covariances, of its kind, include c 11'.

    Of an unrestricted covariance matrix they do where the columns span a constant; of independent
    effects where a column is constant.
    """
    one = np.ones(len(term.z))
    if term.cov != "us":
        constant = np.all(term.z == term.z[:1], axis=0) & (term.z[0] != 0)
        return bool(np.any(constant))
    left = one - term.z @ np.linalg.lstsq(term.z, one, rcond=None)[0]
    return bool(np.max(np.abs(left)) < 1e-7)


def _same_groups(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two codings divide the rows alike."""
    pairs = np.unique(np.column_stack([a, b]), axis=0)
    return len(pairs) == len(np.unique(a)) == len(np.unique(b))


def _warn(term: Term, text: str, whole: bool) -> None:
    name = f"({', '.join(term.names)} | {term.group})"
    what = f"the covariance of {name}" if whole else f"that of a constant effect, a part of {name}"
    warnings.warn(
        f"{text} contains {what}: only the sum of the two is identified, not each of them. Leave "
        "one of them out; the fixed effects and the likelihood do not suffer.",
        ResidualWarning,
        stacklevel=5,
    )


def warn_undetermined(fit: Fit) -> None:
    """Warn of residual parameters along which the criterion is flat at the optimum."""
    from lmmjax.residual.intervals import undetermined

    names, r = undetermined(fit), fit.model.design.residual
    if not names or r is None:
        return
    apart = never_met(r)
    pairs = ", ".join(f"{a} and {b}" for a, b in apart[:5]) + (" ..." if len(apart) > 5 else "")
    reason = f" No {r.subject_name} has rows at both of the positions {pairs}." if apart else ""
    warnings.warn(
        f"the data do not determine {', '.join(names[:5])}{' ...' if len(names) > 5 else ''} of "
        f"{r.spec.text}: the likelihood is the same for other values, and their standard errors "
        f"are infinite.{reason} Use a structure with fewer parameters, or leave out effects that "
        "take its place; the likelihood does not suffer.",
        ResidualWarning,
        stacklevel=5,
    )


def never_met(r: Residuals) -> list[tuple[str, str]]:
    """Pairs of positions of an unstructured correlation that no subject has both of."""
    if not isinstance(r.structure.family, Unstructured):
        return []
    labels, place = r.structure.family.labels, r.pos[:, 0].astype(int)
    seen = np.zeros((int(r.subject.max()) + 1, len(labels)))
    seen[r.subject, place] = 1.0
    apart = np.argwhere(np.triu(seen.T @ seen == 0, 1))
    return [(labels[i], labels[j]) for i, j in apart]


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
    """Why no random intercept implies a fitted marginal model, in words, or None.

    Compound symmetry is what a random intercept implies, V_i = tau2 11' + sigma2 I, as long as
    tau2 = rho V_11 is not negative (Verbeke and Molenberghs 2000, section 5.6.2). A negative
    correlation is a valid marginal model that no random intercept brings about. Of other structures
    with negative correlations, and of those beside random effects, the text says that they were not
    judged: random effects enough can imply any covariance.
    """
    r = fit.model.design.residual
    if r is None or r.structure.family is None:
        return None
    lowest = _lowest_correlation(fit, r)
    if lowest >= 0:
        return None
    if not isinstance(r.structure.family, CompoundSymmetry) or fit.model.is_mixed:
        beside = " beside random effects" if fit.model.is_mixed else ""
        return (
            f"not judged: {r.spec.text}{beside} has negative correlations (down to {lowest:.3g}); "
            "no random intercept alone implies these, whether other random effects do is not told"
        )
    return (
        f"the correlation within {r.subject_name} is negative "
        f"({lowest:.3g}): a valid marginal model, but none that a random intercept could bring "
        "about, since its variance would have to be negative; rows of a subject compete rather "
        "than share"
    )


def _lowest_correlation(fit: Fit, r: Residuals) -> float:
    """The lowest residual correlation in the subject with most rows, or of any two positions."""
    from lmmjax.residual.covariance import block

    if isinstance(r.structure.family, CompoundSymmetry | Unstructured):
        names = [n for n in fit.model.phi_names if n.startswith("rho")]
        return float(fit.residual_params()[names].min())
    rows = np.flatnonzero(r.subject == np.argmax(np.bincount(r.subject)))
    cov = block(r, fit.phi, np.ones(len(r.subject)), rows)
    sd = np.sqrt(np.diag(cov))
    return float(np.min(cov / np.outer(sd, sd)))

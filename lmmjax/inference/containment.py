r"""Containment degrees of freedom by nlme's inner-outer rule (Pinheiro and Bates 2000, p. 91).

Groups of nested factors g_1 ⊃ ... ⊃ g_Q have n_1 < ... < n_Q levels, n_{Q+1} = n rows. A column of
X is estimated at the innermost stratum s at which it still varies: s = 1 if it is constant within
the outermost groups, s = q + 1 if it varies within groups of g_q. Stratum s has
n_s - n_{s-1} degrees of freedom less its columns; one more is used by the constant, in stratum 1.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from lmmjax.design import Design
from lmmjax.errors import LmmError


class Containment(NamedTuple):
    """Denominator degrees of freedom by coefficient and by fixed term."""

    columns: np.ndarray  # (p,)
    terms: np.ndarray  # one per x_terms


def containment(design: Design) -> Containment:
    """Degrees of freedom of each coefficient and term.

    Raises
    ------
    LmmError
        For crossed factors, to which the rule does not apply.

    Notes
    -----
    O(n p Q).
    """
    codes, sizes = _strata(design)
    X = design.X
    base = np.diff([0, *sizes, design.n]).astype(float)
    varies = np.array([bool(np.any(x != x[0])) for x in X.T])
    stratum = np.zeros(design.p, int)
    for q, (code, J) in enumerate(zip(codes, sizes, strict=True)):
        first = np.zeros(J, int)
        first[code[::-1]] = np.arange(design.n)[::-1]
        at = first[code]
        stratum[[bool(np.any(x != x[at])) for x in X.T]] = q + 1
    term_stratum = np.zeros(len(design.x_terms), int)
    term_varies = np.zeros(len(design.x_terms), bool)
    np.maximum.at(term_stratum, design.x_assign, stratum)
    np.logical_or.at(term_varies, design.x_assign, varies)
    sizes_of = np.bincount(design.x_assign, minlength=len(term_varies))
    columns = _degrees(base, stratum, varies, np.ones(design.p, int))
    return Containment(columns, _degrees(base, term_stratum, term_varies, sizes_of))


def _degrees(
    base: np.ndarray, stratum: np.ndarray, varies: np.ndarray, size: np.ndarray
) -> np.ndarray:
    """What each stratum has left; the constant gets the most that any stratum has (as nlme)."""
    left = base - np.bincount(stratum[varies], size[varies], minlength=len(base))
    if not varies.all():
        left[0] -= 1
    else:
        left[1:] += 1
    return np.where(varies, left[stratum], left.max())


def _strata(design: Design) -> tuple[list[np.ndarray], list[int]]:
    """Codes and numbers of levels of the grouping factors, outermost first."""
    factors = {t.group: (t.codes, len(t.levels)) for t in design.terms}
    ordered = sorted(factors.items(), key=lambda item: item[1][1])
    for (outer, (a, _)), (inner, (b, J)) in itertools.pairwise(ordered):
        parent = np.zeros(J, a.dtype)
        parent[b] = a
        if not np.array_equal(parent[b], a):
            raise LmmError(
                f"containment degrees of freedom need nested grouping factors; {inner} is not "
                f"nested in {outer}. Use df='satterthwaite' or df='kenward-roger'."
            )
    return [codes for _, (codes, _) in ordered], [J for _, (_, J) in ordered]

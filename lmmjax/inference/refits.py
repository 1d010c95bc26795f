r"""Refits without each group, in a batch: the cross-products of the group are taken off the whole.

A level whose products are all 0 contributes nothing to the criterion (its block of Λ'AΛ + I is I),
so the layout stays that of the whole model and all groups share one compiled program.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lmmjax import batch, components
from lmmjax import gram as gr
from lmmjax.errors import LmmError
from lmmjax.gram import Gram, Rhs, Standardised
from lmmjax.precision import in_float64
from lmmjax.threads import one_blas_thread

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit

#: numbers of the cross-products that are held at once
CHUNK = 2**23

NOT_ESTIMABLE = "failed: a coefficient is not estimable without this group"


@dataclass(frozen=True, eq=False)
class Refits:
    """Estimates without each of m groups, in the units of the data; NaN where a fit failed."""

    names: list[str]
    beta: np.ndarray  # (m, p)
    vcov: np.ndarray  # (m, p, p)
    sigma: np.ndarray  # (m,)
    components: np.ndarray  # (m, K), lme4's SDs, correlations, σ
    status: list[str]

    def describe(self, frame: pd.DataFrame) -> pd.DataFrame:
        """``frame`` with the variance parameters and the status of each refit."""
        import pandas as pd

        values = pd.DataFrame(self.components[:, :-1], index=frame.index, columns=self.names[:-1])
        return pd.concat([frame, values], axis=1).assign(status=self.status)


@in_float64
def without_groups(fit: Fit, codes: np.ndarray, m: int) -> Refits:
    """Refit without the rows of each of ``m`` groups.

    Parameters
    ----------
    codes : (n,) int
        Group of each row.

    Notes
    -----
    m fits of the whole model's cross-products, in one compiled call a chunk; the starts are those
    of any batch, so that a fit at the boundary does not hold the others there.

    Raises
    ------
    LmmError
        With a residual structure.
    """
    if fit.model.is_structured:
        raise LmmError(
            "refits without each group are for independent residuals; found the residual structure "
            f"{fit.model.residual}. Use influence(refit=False), which keeps θ and φ, or fit "
            "Model(formula, data without the group)."
        )
    the_plan, units, gram, rhs = batch.standard(fit.model)
    s = gr.standardise(fit.model.design)
    size = sum(np.size(a) for a in jax.tree.leaves((gram, rhs)))
    step = max(8, CHUNK // size)
    parts, statuses = [], []
    rows = np.split(
        np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes, minlength=m))[:-1]
    )
    for at in range(0, m, step):
        less = [_less(fit, the_plan, s, gram, rhs, r) for r in rows[at : at + step]]
        grams, sides = jax.tree.map(lambda *a: np.stack(a), *less)
        with one_blas_thread():
            done = batch.fit_items(
                the_plan.layout, fit.method, grams, sides, shared=False, size=min(step, m)
            )
        parts.append(done.items)
        statuses.append(done.status)
    items = jax.tree.map(lambda *a: np.concatenate(a), *parts)
    return _estimates(fit, units, items, np.concatenate(statuses))


def _less(
    fit: Fit, the_plan: gr.Plan, s: Standardised, gram: Gram, rhs: Rhs, rows: np.ndarray
) -> tuple[Gram, Rhs]:
    """The cross-products of all rows but these."""
    part = gr.crossproducts(*_part(fit, the_plan, s, rows), parents=gram.parent)
    whole = gram._replace(parent=()), rhs
    mine = part[0]._replace(parent=()), part[1]
    left, side = jax.tree.map(lambda a, b: a - b, whole, mine)
    return left._replace(parent=gram.parent), side


def _part(
    fit: Fit, the_plan: gr.Plan, s: Standardised, rows: np.ndarray
) -> tuple[Any, gr.Plan, Standardised]:
    design = fit.model.design
    terms = [SimpleNamespace(codes=t.codes[rows]) for t in design.terms]
    some = SimpleNamespace(
        terms=terms, has_weights=design.has_weights, weights=np.asarray(design.weights)[rows]
    )
    return some, the_plan, Standardised(s.X[rows], s.y[rows], tuple(z[rows] for z in s.Z), s.units)


def _estimates(fit: Fit, units: gr.Units, items: batch.Items, status: np.ndarray) -> Refits:
    terms = fit.model.design.terms
    sigma = units.scale * np.sqrt(items.sigma2)
    covs = []
    for B, lam in zip(units.B, items.lams, strict=True):
        half = B @ lam
        covs.append((sigma**2)[:, None, None] * half @ np.swapaxes(half, 1, 2))
    vcov = (sigma**2)[:, None, None] * (units.A @ items.unscaled_vcov @ units.A.T)
    beta = units.beta0 + units.scale * items.beta @ units.A.T
    good = status <= batch.SINGULAR
    lost = ~np.all(np.isfinite(items.beta), axis=1)
    words = [
        NOT_ESTIMABLE if no else batch.WORDS[int(k)] for k, no in zip(status, lost, strict=True)
    ]

    def known(values: np.ndarray) -> np.ndarray:
        return np.where(good.reshape(-1, *[1] * (values.ndim - 1)), values, np.nan)

    values = components.values(terms, covs, sigma)
    return Refits(
        components.names(terms), known(beta), known(vcov), known(sigma), known(values), words
    )

r"""Refits without each group, in a batch: the cross-products of the group are taken off the whole.

A level whose products are all 0 contributes nothing to the criterion (its block of Λ'AΛ + I is I),
so the layout stays that of the whole model and all groups share one compiled program. With a
residual structure, whose products depend on its parameters, each group's remaining rows make a
source of their own, in the units of the whole; padded to one shape (residual/ragged.py) they share
a program as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lmmjax import batch, components
from lmmjax import gram as gr
from lmmjax.bootstrap import start_of
from lmmjax.gram import Gram, Rhs, Standardised
from lmmjax.precision import in_float64
from lmmjax.rank import independent_columns
from lmmjax.residual import ragged
from lmmjax.residual.setup import whitened_rows
from lmmjax.threads import one_blas_thread

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit

#: numbers of the cross-products that are held at once
CHUNK = 2**23

#: eigenvalues of X'X without a group, columns of mean square 1, below which its rank is looked at
SUSPECT = 1e-6

NOT_ESTIMABLE = "failed: a coefficient is not estimable without this group"


@dataclass(frozen=True, eq=False)
class Refits:
    """Estimates without each of m groups, in the units of the data; NaN where a fit failed."""

    names: list[str]
    beta: np.ndarray  # (m, p)
    vcov: np.ndarray  # (m, p, p)
    sigma: np.ndarray  # (m,)
    components: np.ndarray  # (m, K), lme4's SDs and correlations, then residual parameters
    status: list[str]

    def describe(self, frame: pd.DataFrame) -> pd.DataFrame:
        """``frame`` with the variance parameters and the status of each refit."""
        import pandas as pd

        values = pd.DataFrame(self.components, index=frame.index, columns=self.names)
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
    of any batch, so that a fit at the boundary does not hold the others there. With a residual
    structure m fits of n rows each (of the sums by pattern without random effects), from the
    estimates of the fit. Its parameters mean what they mean in the whole: positions are those of
    the whole model's rows, and the gap that a row leaves within its subject stays.
    """
    rows = np.split(
        np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes, minlength=m))[:-1]
    )
    chunks = _structured(fit, rows) if fit.model.is_structured else _independent(fit, rows)
    parts, statuses = [], []
    for done in chunks:
        parts.append(done.items)
        statuses.append(done.status)
    items = jax.tree.map(lambda *a: np.concatenate(a), *parts)
    return _estimates(fit, items, np.concatenate(statuses), _lost(fit, rows))


def _lost(fit: Fit, rows: list[np.ndarray]) -> np.ndarray:
    """Groups without which a column of X depends on the others, (m,) bool.

    Products of X less the group's tell which to look at: O(n p² + m p³).
    """
    design = fit.model.design
    X, constant = gr.standardise(design).X, "(Intercept)" in design.x_names
    whole = X.T @ X
    out = np.zeros(len(rows), bool)
    for i, r in enumerate(rows):
        if len(X) - len(r) <= design.p:
            out[i] = True
        elif np.linalg.eigvalsh(whole - X[r].T @ X[r])[:1].min(initial=np.inf) < SUSPECT * len(X):
            left = np.delete(design.X, r, axis=0)
            out[i] = not independent_columns(left, constant).all()
    return out


def _independent(fit: Fit, rows: list[np.ndarray]) -> Iterator[batch.Batch]:
    """Fits to the cross-products of the whole less those of each group, chunk by chunk."""
    the_plan, _, gram, rhs = batch.standard(fit.model)
    s = gr.standardise(fit.model.design)
    size = sum(np.size(a) for a in jax.tree.leaves((gram, rhs)))
    step = max(8, CHUNK // size)
    for at in range(0, len(rows), step):
        less = [_less(fit, the_plan, s, gram, rhs, r) for r in rows[at : at + step]]
        grams, sides = jax.tree.map(lambda *a: np.stack(a), *less)
        with one_blas_thread():
            yield batch.fit_items(
                the_plan.layout,
                fit.method,
                grams,
                sides,
                shared=False,
                size=min(step, len(rows)),
            )


def _structured(fit: Fit, rows: list[np.ndarray]) -> Iterator[batch.Batch]:
    """Fits to sources of the other rows, chunk by chunk."""
    design, the_plan = fit.model.design, fit.model._plan
    s = gr.standardise(design)
    whole = ragged.make_source(design, the_plan, s)
    step = max(8, CHUNK // ragged.numbers(whole))
    start = start_of(fit)
    for at in range(0, len(rows), step):
        kept = [np.delete(np.arange(design.n), r) for r in rows[at : at + step]]
        pieces = [_piece(fit, the_plan, s, r) for r in kept]
        made = [ragged.make_source(*p) for p in pieces]
        if len({type(source) for source in (whole, *made)}) > 1:
            made = [whitened_rows(*p) for p in pieces]
            sizes = ragged.common_sizes([whitened_rows(design, the_plan, s), *made])
        else:
            sizes = ragged.common_sizes([whole, *made])
        stacked = ragged.stack([ragged.pad(source, sizes) for source in made])
        with one_blas_thread():
            yield batch.fit_items(
                stacked.layout,
                fit.method,
                stacked,
                stacked.response,
                start,
                shared=False,
                size=min(step, len(rows)),
            )


def _piece(
    fit: Fit, the_plan: gr.Plan, s: Standardised, rows: np.ndarray
) -> tuple[Any, gr.Plan, Standardised]:
    """What makes a source of some rows, with the residual structure of the whole."""
    some, *rest = _part(fit, the_plan, s, rows)
    r = fit.model.design.residual
    assert r is not None
    _, subject = np.unique(r.subject[rows], return_inverse=True)
    some.residual = dataclasses.replace(
        r, subject=subject.ravel().astype(np.int32), pos=r.pos[rows], H=r.H[rows]
    )
    some.n = len(rows)
    return some, *rest


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


def _estimates(fit: Fit, items: batch.Items, status: np.ndarray, lost: np.ndarray) -> Refits:
    model, units = fit.model, fit.model._units
    terms, residual = model.design.terms, model.design.residual
    natural, sd = batch.reported(None if residual is None else residual.structure, items.theta)
    sigma = units.scale * np.sqrt(items.sigma2)  # of the residual source
    covs = []
    for B, lam in zip(units.B, items.lams, strict=True):
        half = B @ lam
        covs.append((sigma**2)[:, None, None] * half @ np.swapaxes(half, 1, 2))
    vcov = (sigma**2)[:, None, None] * (units.A @ items.unscaled_vcov @ units.A.T)
    beta = units.beta0 + units.scale * items.beta @ units.A.T
    lost = lost | ~np.all(np.isfinite(items.beta), axis=1)
    good = (status <= batch.SINGULAR) & ~lost
    words = [
        NOT_ESTIMABLE if no else batch.WORDS[int(k)] for k, no in zip(status, lost, strict=True)
    ]

    def known(values: np.ndarray) -> np.ndarray:
        return np.where(good.reshape(-1, *[1] * (values.ndim - 1)), values, np.nan)

    values = components.values(terms, covs, sigma)[:, :-1]
    names = [*components.names(terms)[:-1], *model.phi_names]
    both = np.concatenate([values, natural], axis=1)
    return Refits(names, known(beta), known(vcov), known(sigma * sd), known(both), words)

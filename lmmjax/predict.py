"""Predictions and their standard errors, by the same factorisation as the fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax.errors import DataError
from lmmjax.gram import Rhs
from lmmjax.tables import check_level

if TYPE_CHECKING:
    from lmmjax.design import NewDesign
    from lmmjax.fit import Fit

#: rows per compiled call of the prediction variance: bounds its memory
CHUNK = 256


def predict(
    fit: Fit,
    newdata: Any,
    kind: str,
    interval: str | None,
    level: float,
    new_levels: str,
    offset: Any,
) -> Any:
    """See :meth:`lmmjax.fit.Fit.predict`."""
    import pandas as pd

    _check(kind, interval, new_levels)
    new = _new_design(fit, newdata, kind == "conditional" or interval == "prediction", offset)
    if kind == "conditional" and new_levels == "raise":
        _refuse_new_levels(fit, new)
    mean = new.X @ fit._beta + new.offset
    if kind == "conditional":
        for (z, codes, _), b in zip(new.terms, fit._term_effects(), strict=True):
            known = codes >= 0
            mean[known] += np.einsum("is,is->i", z[known], b[codes[known]])
    if interval is None:
        return pd.Series(mean, index=new.rows, name="prediction")
    se = np.sqrt(_variance(fit, new, kind, interval))
    half = _quantile(fit, check_level(level)) * se
    columns = {"estimate": mean, "std_error": se, "low": mean - half, "high": mean + half}
    return pd.DataFrame(columns, index=new.rows)


def _check(kind: str, interval: str | None, new_levels: str) -> None:
    for name, value, allowed in (
        ("kind", kind, ("conditional", "population")),
        ("interval", interval, (None, "confidence", "prediction")),
        ("new_levels", new_levels, ("raise", "population")),
    ):
        if value not in allowed:
            raise DataError(f"{name}={value!r} is unknown; expected one of {allowed}.")


def _new_design(fit: Fit, newdata: Any, random: bool, offset: Any) -> NewDesign:
    from lmmjax.design import NewDesign, NewTerm

    design = fit.model.design
    if newdata is not None:
        return design.spec.new(newdata, random=random and bool(design.terms), offset=offset)
    terms = tuple(NewTerm(t.z, t.codes, t.levels[t.codes]) for t in design.terms)
    return NewDesign(X=design.X, offset=design.offset, terms=terms, rows=design.rows)


def _refuse_new_levels(fit: Fit, new: NewDesign) -> None:
    for term, (_, codes, labels) in zip(fit.model.design.terms, new.terms, strict=True):
        if np.any(codes < 0):
            unseen = sorted({str(x) for x in np.asarray(labels)[codes < 0]})
            raise DataError(
                f"newdata has levels of {term.group} that were not in the training data: "
                f"{', '.join(unseen[:5])}{' ...' if len(unseen) > 5 else ''}; expected known "
                "levels. Use new_levels='population' to predict them with effects of 0."
            )


def _quantile(fit: Fit, level: float) -> float:
    from scipy import stats

    df = np.inf if fit.model.is_mixed else fit.n_obs - len(fit._beta)
    return float(stats.t.ppf(0.5 + level / 2, df))


def _variance(fit: Fit, new: NewDesign, kind: str, interval: str) -> np.ndarray:
    """Variance of the prediction error, in the units of y squared."""
    covs = fit._term_covs()
    if kind == "population":
        var = np.einsum("ia,ab,ib->i", new.X, fit.vcov().to_numpy(), new.X)
        unknown = [np.ones(len(var), bool)] * len(covs) if interval == "prediction" else []
    else:
        var = fit.sigma**2 * _error_variance(fit, new)
        unknown = [codes < 0 for _, codes, _ in new.terms]
    for (z, _, _), cov, rows in zip(new.terms, covs, unknown, strict=False):
        var = var + np.where(rows, np.einsum("is,st,it->i", z, cov, z), 0.0)
    return var + (fit.sigma**2 if interval == "prediction" else 0.0)


def _error_variance(fit: Fit, new: NewDesign) -> np.ndarray:
    """Var(x'(β̂ - β) + z'(b̂ - b)) / σ² per row; levels not seen contribute nothing here."""
    out = [
        fit._prediction_variance(_rows(fit, new, slice(i, i + CHUNK)))
        for i in range(0, len(new.X), CHUNK)
    ]
    return np.maximum(np.concatenate([np.zeros(0), *out]), 0.0)


def _rows(fit: Fit, new: NewDesign, part: slice) -> Rhs:
    """Rows [z x] in standardised units, laid out as cross-products with a leading axis."""
    model = fit.model
    layout, units = model._plan.layout, model._units
    X = new.X[part] @ units.A
    m = len(X)
    at = np.arange(m)
    core = np.zeros((m, layout.d + layout.p))
    core[:, layout.d :] = X
    border, first = [], 0
    for i, factor in enumerate(model._plan.factors):
        z = np.concatenate([new.terms[k][0][part] @ units.B[k] for k in factor.terms], axis=1)
        codes = new.terms[factor.terms[0]][1][part]
        z = np.where(codes[:, None] >= 0, z, 0.0)
        block = np.zeros((m, factor.S, factor.J))
        block[at, :, np.maximum(codes, 0)] = z
        if i < model._plan.n_chain:
            border.append(block)
        else:
            size = factor.S * factor.J
            core[:, first : first + size] = np.swapaxes(block, 1, 2).reshape(m, size)
            first += size
    return Rhs(tuple(border), core, np.zeros(m))

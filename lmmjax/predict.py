"""Predictions and their standard errors, by the same factorisation as the fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax.design import NewDesign, NewTerm
from lmmjax.errors import DataError
from lmmjax.gram import Rhs
from lmmjax.tables import check_level

if TYPE_CHECKING:
    from lmmjax.fit import Fit
    from lmmjax.model import Model
    from lmmjax.residual.new import Known

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
    population = kind == "population"
    new = _new_design(
        fit, newdata, not population or interval == "prediction", offset, not population
    )
    if kind != "population" and new_levels == "raise":
        _refuse_new_levels(fit, new)
    mean = new.X @ fit._beta + new.offset
    known = _known(fit.model, newdata, kind, fit.phi, new_levels)
    if kind != "population":
        for (z, codes, _), b in zip(new.terms, fit._term_effects(), strict=True):
            seen = codes >= 0
            mean[seen] += np.einsum("is,is->i", z[seen], b[codes[seen]])
    if known:
        residuals = fit.residuals().to_numpy()
        mean += np.array([k.weights @ residuals[k.rows] for k in known])
    if interval is None:
        return pd.Series(mean, index=new.rows, name="prediction")
    sd = _residual_sd(fit.model, newdata, fit.phi) if interval == "prediction" else 1.0
    se = np.sqrt(_variance(fit, new, kind, interval, known, sd))
    half = _quantile(fit, check_level(level)) * se
    columns = {"estimate": mean, "std_error": se, "low": mean - half, "high": mean + half}
    return pd.DataFrame(columns, index=new.rows)


def _check(kind: str, interval: str | None, new_levels: str) -> None:
    for name, value, allowed in (
        ("kind", kind, ("conditional", "population", "next")),
        ("interval", interval, (None, "confidence", "prediction")),
        ("new_levels", new_levels, ("raise", "population")),
    ):
        if value not in allowed:
            raise DataError(f"{name}={value!r} is unknown; expected one of {allowed}.")


def _new_design(
    fit: Fit, newdata: Any, random: bool, offset: Any, groups: bool = True
) -> NewDesign:
    design = fit.model.design
    if newdata is not None:
        random = random and bool(design.terms)
        return design.spec.new(newdata, random=random, groups=groups, offset=offset)
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

    df = np.inf if not fit.model.is_linear else fit.n_obs - len(fit._beta)
    return float(stats.t.ppf(0.5 + level / 2, df))


def _known(model: Model, newdata: Any, kind: str, phi: np.ndarray, new_levels: str) -> list[Known]:
    """What the subjects' rows tell of the residuals of new rows, for ``kind="next"``."""
    if kind != "next":
        return []
    if not model.is_structured or newdata is None:
        raise DataError(
            "kind='next' predicts new rows from the correlation of residuals; expected newdata and "
            "a model with a residual structure such as residual='ar1(time | id)'. Use "
            "kind='conditional'."
        )
    from lmmjax.residual.new import encode, known_residuals

    return known_residuals(model.design, encode(model, newdata, new_subjects=new_levels), phi)


def _residual_sd(model: Model, newdata: Any, phi: np.ndarray) -> np.ndarray | float:
    """Residual SD of each row relative to σ; new rows have weight 1. ``phi`` (..., n_phi)."""
    from lmmjax.residual.covariance import relative_sd
    from lmmjax.residual.new import encode

    residual = model.design.residual
    if newdata is None:
        return relative_sd(residual, phi, model.design.weights)
    if residual is None:
        return 1.0
    return encode(model, newdata, variances=True).sd(residual.structure, phi)


def _variance(
    fit: Fit,
    new: NewDesign,
    kind: str,
    interval: str,
    known: list[Known],
    sd: np.ndarray | float,
) -> np.ndarray:
    """Variance of the prediction error, in the units of y squared."""
    covs = fit._term_covs()
    if kind == "population":
        var = np.einsum("ia,ab,ib->i", new.X, fit.vcov().to_numpy(), new.X)
        unknown = [np.ones(len(var), bool)] * len(covs) if interval == "prediction" else []
    else:
        var = fit._sigma2 * _error_variance(fit, new, known)
        unknown = [codes < 0 for _, codes, _ in new.terms]
    for (z, _, _), cov, rows in zip(new.terms, covs, unknown, strict=False):
        var = var + np.where(rows, np.einsum("is,st,it->i", z, cov, z), 0.0)
    left = np.array([k.variance for k in known]) if known else np.square(sd)
    return var + (fit._sigma2 * left if interval == "prediction" else 0.0)


def _error_variance(fit: Fit, new: NewDesign, known: list[Known]) -> np.ndarray:
    """Var(x'(β̂ - β) + z'(b̂ - b)) / σ² per row; levels not seen contribute nothing here.

    Where the residuals of other rows are used with weights w, x is x - w'X of them, and z alike.
    """
    out = []
    for i in range(0, len(new.X), CHUNK):
        rows = _rows(fit, new, slice(i, i + CHUNK))
        if known:
            rows = _less(fit, rows, known[i : i + CHUNK])
        out.append(fit._prediction_variance(rows))
    return np.maximum(np.concatenate([np.zeros(0), *out]), 0.0)


def _less(fit: Fit, rows: Rhs, known: list[Known]) -> Rhs:
    """Rows less the weighted rows of training whose residuals are used."""
    import jax

    old = _new_design(fit, None, True, None)
    taken = []
    for k in known:
        part = NewDesign(
            X=old.X[k.rows],
            offset=old.offset[k.rows],
            terms=tuple(type(t)(*(a[k.rows] for a in t)) for t in old.terms),
            rows=old.rows[k.rows],
        )
        every = _rows(fit, part, slice(None))
        taken.append(jax.tree.map(lambda a, w=k.weights: np.tensordot(w, a, 1), every))
    return jax.tree.map(lambda a, *b: a - np.stack(b), rows, *taken)


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

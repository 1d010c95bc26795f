"""Predictions as summaries of draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lmmjax.bayes.draws import linear_predictor, slices
from lmmjax.precision import in_float64
from lmmjax.predict import _check, _known, _new_design, _refuse_new_levels, _residual_sd
from lmmjax.tables import check_level

if TYPE_CHECKING:
    from lmmjax.bayes.posterior import Posterior
    from lmmjax.design import NewDesign


def predict(
    posterior: Posterior,
    newdata: Any,
    kind: str,
    interval: str | None,
    level: float,
    new_levels: str,
    offset: Any,
    seed: int,
) -> Any:
    """See :meth:`lmmjax.bayes.posterior.Posterior.predict`."""
    import pandas as pd

    _check(kind, interval, new_levels)
    # these two ask a result for its model only
    result = cast("Any", posterior)
    new = _new_design(result, newdata, kind != "population" or interval == "prediction", offset)
    if kind != "population" and new_levels == "raise":
        _refuse_new_levels(result, new)
    shift, left = _residuals(posterior, newdata, kind, len(new.X), interval, new_levels)
    mean = _means(posterior, new, kind)
    if shift is not None:
        mean = mean + shift.mean(axis=0)
    if interval is None:
        return pd.Series(mean, index=new.rows, name="prediction")
    check_level(level)
    rng = np.random.default_rng(seed)
    effects = _effects(posterior, new, kind, interval, rng)
    n_draws = posterior.chains * posterior.draws
    out = np.empty((len(new.X), 4))
    # by rows, since a quantile needs all draws of a row at once
    for rows in slices(len(new.X), n_draws):
        terms = [(z[rows], codes[rows]) for z, codes, _ in effects]
        y = linear_predictor(
            new.X[rows], new.offset[rows], terms, posterior._flat("beta"), [b for *_, b in effects]
        )
        if shift is not None:
            y += shift[:, rows]
        if interval == "prediction":
            sd = posterior._flat("sigma")[:, None] * (
                left if np.ndim(left) == 0 else left[..., rows]
            )
            y += sd * rng.standard_normal(y.shape)
        out[rows] = _summary(y, level)
    # the mean has no noise from drawing what is not conditioned on
    out[:, 0] = mean
    return pd.DataFrame(out, index=new.rows, columns=["estimate", "std_error", "low", "high"])


@in_float64
def _residuals(
    posterior: Posterior,
    newdata: Any,
    kind: str,
    m: int,
    interval: str | None,
    new_levels: str,
) -> tuple[np.ndarray | None, Any]:
    """By draw: the mean of the new rows' residuals, if it is known, and their SDs over σ."""
    model, phi = posterior.model, posterior._phi()
    known = _known(model, newdata, kind, phi, new_levels)
    if not known:
        return None, _residual_sd(model, newdata, phi) if interval == "prediction" else 1.0
    shift, left = np.empty((2, len(phi), m))
    for i, k in enumerate(known):
        residuals = model.design.y[k.rows] - posterior._expected(slice(None), k.rows)
        shift[:, i] = np.sum(k.weights * residuals, axis=1)
        left[:, i] = np.sqrt(k.variance)
    return shift, left


def _means(posterior: Posterior, new: NewDesign, kind: str) -> np.ndarray:
    """Posterior means of Xβ + Zb: linear in β and b, so their means suffice."""
    known = zip(new.terms, posterior._term_effects(), strict=False) if kind != "population" else ()
    pairs = [((t[0], t[1]), b.mean(axis=0)[None]) for t, b in known]
    beta = posterior._flat("beta").mean(axis=0)[None]
    return linear_predictor(
        new.X, new.offset, [term for term, _ in pairs], beta, [b for _, b in pairs]
    )[0]


def _effects(
    posterior: Posterior, new: NewDesign, kind: str, interval: str, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What adds to Xβ: columns, codes (-1: nothing) and draws of effects (draws, levels, S)."""
    if kind == "population" and interval == "confidence":
        return []
    out = []
    factors, drawn = posterior._factors(), posterior._term_effects()
    for (z, codes, labels), factor, b in zip(new.terms, factors, drawn, strict=True):
        if kind != "population":
            out.append((z, codes, b))
        unseen = codes < 0 if kind != "population" else np.ones(len(codes), bool)
        if np.any(unseen):
            out.append((z, *_new_effects(factor, unseen, np.asarray(labels, str), rng)))
    return out


def _new_effects(
    factor: np.ndarray, unseen: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the unseen labels and their effects, b ~ N(0, D): one draw for all rows of a level.

    ``factor`` is a factor of D by draw, (draws, S, S).
    """
    found, where = np.unique(labels[unseen], return_inverse=True)
    codes = np.full(len(unseen), -1)
    codes[unseen] = where
    noise = rng.standard_normal((len(factor), len(found), factor.shape[-1]))
    return codes, np.einsum("dst,djt->djs", factor, noise)


def _summary(y: np.ndarray, level: float) -> np.ndarray:
    """Mean, SD and interval of the draws of each row: (rows, 4)."""
    half = 0.5 * (1 - level)
    low, high = np.quantile(y, (half, 1 - half), axis=0)
    return np.column_stack([y.mean(axis=0), y.std(axis=0, ddof=1), low, high])

"""Predictions as summaries of draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lmmjax.bayes.draws import linear_predictor, slices
from lmmjax.predict import _check, _new_design, _refuse_new_levels
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
    new = _new_design(result, newdata, kind == "conditional" or interval == "prediction", offset)
    if kind == "conditional" and new_levels == "raise":
        _refuse_new_levels(result, new)
    if interval is None:
        return pd.Series(_means(posterior, new, kind), index=new.rows, name="prediction")
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
        if interval == "prediction":
            y += posterior._flat("sigma")[:, None] * rng.standard_normal(y.shape)
        out[rows] = _summary(y, level)
    # the mean has no noise from drawing what is not conditioned on
    out[:, 0] = _means(posterior, new, kind)
    return pd.DataFrame(out, index=new.rows, columns=["estimate", "std_error", "low", "high"])


def _means(posterior: Posterior, new: NewDesign, kind: str) -> np.ndarray:
    """Posterior means of the expected response: linear in β and b, so their means suffice."""
    known = zip(new.terms, posterior._term_effects(), strict=False) if kind == "conditional" else ()
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
        if kind == "conditional":
            out.append((z, codes, b))
        unseen = codes < 0 if kind == "conditional" else np.ones(len(codes), bool)
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

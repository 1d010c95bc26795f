"""Likelihood-ratio tests of every random term: each dropped or reduced in turn."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax.errors import ComparisonError, SingularFitWarning
from lmmjax.inference.lrt import LikelihoodRatio, lrt
from lmmjax.late import Made, replaced
from lmmjax.terms import patterns
from lmmjax.texts import given

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit
    from lmmjax.model import Model

COLUMNS = ("n_params", "loglik", "aic", "statistic", "df", "p_value", "note")


def ranova(fit: Fit, method: str, n: int | None, seed: int) -> pd.DataFrame:
    """The table of ``Fit.ranova``."""
    import pandas as pd

    if not hasattr(fit.model.design, "X"):
        raise ComparisonError(
            "found a model of a streamed table, which cannot be reduced; expected "
            "Model(formula, data)."
        )
    if not fit.model.design.terms:
        raise ComparisonError(
            "found a model without random effects, so there is no random term to test; expected "
            "one or more. Compare residual structures by lmmjax.lrt(small, big)."
        )
    rows = {"<none>": (fit.n_params, fit.loglik, fit.aic, np.nan, np.nan, np.nan, "")}
    refused = []
    for label, terms, specs in _reductions(fit.model):
        small = _refit(fit, terms, specs, label)
        try:
            tested = _tested(lrt(small, fit, method, n=n, seed=seed))
        except ComparisonError as reason:
            refused.append(reason)
            tested = (*_ratio(small, fit), np.nan, f"not available: {reason}")
        rows[label] = (small.n_params, small.loglik, small.aic, *tested)
    if len(refused) == len(rows) - 1:
        raise refused[0]
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS)).rename_axis("term")


def _tested(test: LikelihoodRatio) -> tuple[float, float, float, str]:
    return test.statistic, test.df, test.p_value, ""


def _ratio(small: Fit, fit: Fit) -> tuple[float, float]:
    """Statistic and degrees of freedom where the p-value is refused; NaN where they are too."""
    try:
        return _tested(lrt(small, fit))[:2]
    except ComparisonError:
        return np.nan, np.nan


def _refit(fit: Fit, terms: tuple[Any, ...], specs: tuple[Any, ...], label: str) -> Fit:
    """The model with other random terms on the same arrays."""
    model = type(fit.model).__new__(type(fit.model))
    model.formula = f"{fit.model.formula}, without {label}"
    model.residual, model.dtype = fit.model.residual, fit.model.dtype
    design = fit.model.design
    model.design = replaced(design, terms=terms, spec=replace(design.spec, random=specs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingularFitWarning)  # that of a model nobody asked for
        return model.fit(method=fit.method)


def _reductions(model: Model) -> Iterator[tuple[str, tuple[Any, ...], tuple[Any, ...]]]:
    """Labels, and the terms and their specifications that stay."""
    terms, specs = model.design.terms, model.design.spec.random
    for k, (term, spec) in enumerate(zip(terms, specs, strict=True)):
        smaller = list(_columns(spec)) if term.cov in ("us", "diag") else []
        smaller = [(label, keep) for label, keep in smaller if keep.any()]
        if not smaller:
            yield spec.bar.text, (*terms[:k], *terms[k + 1 :]), (*specs[:k], *specs[k + 1 :])
        for label, keep in smaller:
            names = tuple(n for n, kept in zip(term.names, keep, strict=True) if kept)
            z = given(term, "z")
            z = z.kept(keep) if isinstance(z, Made) else np.asfortranarray(z[:, keep])
            less = replaced(term, names=names, z=z)
            yield f"{label} in {spec.bar.text}", (*terms[:k], less, *terms[k + 1 :]), specs


def _columns(spec: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Variables that no other contains, each with the columns that stay without it."""
    terms = spec.terms
    plan = zip(terms.terms, patterns(terms, spec.codings), strict=True)
    widths = [
        math.prod(
            len(spec.codings[terms.variables[v]].columns(full)[0])
            for v, full in zip(term, row, strict=True)
        )
        for term, row in plan
    ]
    ends = list(itertools.accumulate(widths, initial=int(terms.intercept)))
    for i, (label, term) in enumerate(zip(terms.labels, terms.terms, strict=True)):
        if any(set(term) < set(other) for other in terms.terms):
            continue
        keep = np.ones(ends[-1], bool)
        keep[ends[i] : ends[i + 1]] = False
        yield label, keep

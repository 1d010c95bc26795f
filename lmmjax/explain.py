"""Where the methods of a comparison differ, and why, in words that hold for its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lmmjax.comparison import COMPONENT, component_label, is_posterior, lacking
from lmmjax.display import boundary, numbers, percent
from lmmjax.fit import Fit

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.comparison import Comparison


def explain(comparison: Comparison) -> list[str]:
    """Sentences on a comparison, most urgent first."""
    return [
        *_lacking(comparison),
        *_models(comparison),
        *_trouble(comparison),
        *_fixed(comparison),
        *_ml_against_reml(comparison),
        *_skewness(comparison),
        *_blups_against_posterior(comparison),
    ]


def _lacking(comparison: Comparison) -> list[str]:
    return [
        f"{label} has no {', '.join(names)}; compare the shared terms only."
        for label, names in lacking(comparison).items()
    ]


def _models(comparison: Comparison) -> list[str]:
    """Where to test what one fit has and another lacks."""
    fits = [r for r in comparison.results if isinstance(r, Fit)]
    if len({f.model.formula for f in fits}) < 2:
        return []
    return [
        "The fits are of different models: lmmjax.lrt(small, big) tests nested ones, "
        "lmmjax.aic_table(...) ranks any."
    ]


def _trouble(comparison: Comparison) -> list[str]:
    lines = []
    for label, result in zip(comparison.labels, comparison.results, strict=True):
        if not isinstance(result, Fit):
            continue
        if not result.converged:
            lines.append(f"{label} did not converge, its numbers mean little: {result.message}.")
        if result.singular:
            lines.append(
                f"{label} is singular ({boundary(result)}): the estimate "
                "lies on the boundary of its range, which a posterior mean never does."
            )
    return lines


def _fixed(comparison: Comparison) -> list[str]:
    """How far apart the fixed effects are."""
    if len(comparison.labels) < 2:
        return []
    agreement = comparison.agreement()
    fixed = agreement[(agreement["kind"] == "fixed effects") & agreement["max_std_diff"].notna()]
    if fixed.empty:
        return []
    worst = fixed.loc[fixed["max_std_diff"].idxmax()]
    if worst["max_std_diff"] < 1e-3:
        return ["Fixed effects agree to within 0.001 standard errors."]
    return [
        f"Fixed effects differ by at most {worst['max_std_diff']:.2g} standard errors "
        f"({worst['method1']} against {worst['method2']})."
    ]


def _components(comparison: Comparison) -> pd.DataFrame:
    """SDs (no correlations), one column per method, named for people."""
    frame = comparison.variance_components()
    frame = frame[frame["term2"].isna()]
    labels = [component_label(*row) for row in frame[COMPONENT].itertuples(index=False)]
    wide = frame.assign(label=labels).pivot(index="label", columns="method", values="estimate")
    return wide.loc[list(dict.fromkeys(labels))]


def _ml_against_reml(comparison: Comparison) -> list[str]:
    if not {"ML", "REML"} <= set(comparison.labels):
        return []
    sds = _components(comparison)[["ML", "REML"]].dropna()
    ratio = (sds["ML"] / sds["REML"])[sds["REML"] > 0]
    if ratio.empty or ratio.min() > 0.9995:
        return []
    name = ratio.idxmin()
    p = len(comparison.results[comparison.labels.index("REML")].model.design.x_names)
    return [
        f"ML's {name} is {percent(round(1 - ratio.min(), 3))} below REML's: ML treats the {p} "
        "fixed effects as known when it estimates variances, which biases them downward; REML "
        "integrates the fixed effects out. The fewer the levels, the larger the difference."
    ]


def _skewness(comparison: Comparison) -> list[str]:
    """Posterior means of SDs against REML's mode."""
    if comparison.reference not in _posteriors(comparison) or "REML" not in comparison.labels:
        return []
    sds = _components(comparison)[["REML", comparison.reference]].dropna()
    sds = sds[sds.index != "sigma"]
    if sds.empty:
        return []
    gap = sds[comparison.reference] - sds["REML"]
    name = (gap / sds[comparison.reference]).idxmax()
    if gap[name] <= 0:
        return []
    reml, mean = numbers(sds.loc[name])
    return [
        f"{name}: REML {reml}, {comparison.reference} {mean}. A posterior mean lies above the most "
        "likely value because the posterior of an SD is skewed to the right; the prior adds its "
        "part."
    ]


def _blups_against_posterior(comparison: Comparison) -> list[str]:
    posterior = comparison.reference
    if posterior not in _posteriors(comparison):
        return []
    lines = []
    for group in comparison.groups:
        frame = comparison.random_effects(group)
        for method in dict.fromkeys(frame["method"]):
            if method not in _posteriors(comparison):
                lines.append(_blup_line(group, method, posterior, frame))
    if lines:
        lines.append(
            "A conditional SD takes the variance components and the fixed effects as known at "
            "their estimates; a posterior SD averages over what is not known about them."
        )
    return lines


def _blup_line(group: str, method: str, posterior: str, frame: pd.DataFrame) -> str:
    mine = frame[frame["method"] == method]
    gap = np.abs(mine["std_diff"].to_numpy())
    ratio = mine["sd_ratio"].to_numpy()
    ratio = ratio[np.isfinite(ratio)]
    words = f"{group}: BLUPs ({method}) lie {np.nanmean(gap):.2g} posterior SDs from the means of "
    words += f"{posterior} on average ({np.nanmax(gap):.2g} at most)"
    if not ratio.size:
        return words + "; their conditional SDs are 0."
    return words + f"; the posterior SDs are {ratio.mean():.3g} times their conditional SDs."


def _posteriors(comparison: Comparison) -> list[str]:
    pairs = zip(comparison.labels, comparison.results, strict=True)
    return [label for label, result in pairs if is_posterior(result)]

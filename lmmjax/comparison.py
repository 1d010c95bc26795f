"""Results of one data set side by side: ML, REML and posteriors, as tidy frames and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax import agreement
from lmmjax.errors import ComparisonError
from lmmjax.fit import Fit
from lmmjax.tables import check_level

if TYPE_CHECKING:
    import os
    from pathlib import Path

    import pandas as pd

    from lmmjax.bayes.posterior import Posterior

    Result = Fit | Posterior

FIXED, VARIANCE, RANDOM = "fixed effects", "variance components", "random effects"

#: a variance component is one row of ``varcorr``
COMPONENT = ["group", "term1", "term2"]


def compare(*results: Result, level: float = 0.95) -> Comparison:
    """Put fits and posteriors of the same data side by side.

    Parameters
    ----------
    *results : Fit or Posterior
        From ``Model.fit`` and ``Model.sample``. Formulas may differ as long as some terms are
        shared; what one of them lacks is told.
    level : float
        Of all intervals.

    Returns
    -------
    Comparison

    Raises
    ------
    ComparisonError
        If rows or response differ, or the models have no term in common.

    Examples
    --------
    >>> import lmmjax as lmm
    >>> model = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff"))
    >>> both = lmm.compare(model.fit(method="ML"), model.fit(method="REML"))
    >>> frame = both.variance_components()
    >>> frame.pivot(index="group", columns="method", values="estimate").round(1)
    method      ML  REML
    group
    Batch     37.3  42.0
    Residual  49.5  49.5
    """
    for result in results:
        _check_kind(result)
    if not results:
        raise ComparisonError("found nothing to compare; expected fits or posteriors.")
    for other in results[1:]:
        _check_same_data(results[0], other)
    labels = _labels([r.method for r in results])
    _check_overlap(results, labels)
    return Comparison(tuple(results), labels, check_level(level))


@dataclass(frozen=True, eq=False)
class Comparison:
    """Results of one data set side by side; made by :func:`lmmjax.compare`.

    Attributes
    ----------
    results : tuple of Fit or Posterior
    labels : tuple of str
        The methods ("REML", "NUTS (marginal)"), numbered where one occurs twice.
    level : float
        Of all intervals.

    Notes
    -----
    Frequentist rows hold estimates and standard errors, Bayesian rows posterior means, standard
    deviations and equal-tailed intervals.
    """

    results: tuple[Result, ...]
    labels: tuple[str, ...]
    level: float

    # -- frames -----------------------------------------------------------------------------------

    def fixed_effects(self) -> pd.DataFrame:
        """Fixed effects by every method.

        Returns
        -------
        DataFrame
            Columns ``term method estimate std_error low high``; one row per term and method.
        """
        return _stack([_fixed(r, self.level) for r in self.results], self.labels, ["term"])

    def variance_components(self) -> pd.DataFrame:
        """Standard deviations and correlations by every method.

        Returns
        -------
        DataFrame
            Columns ``group term1 term2 method estimate std_error low high``; SDs where ``term2`` is
            missing, correlations otherwise. ``std_error low high`` are missing for ML and REML.
        """
        frames = [_variance(r, self.level) for r in self.results]
        return _stack(frames, self.labels, COMPONENT)

    def random_effects(self, group: str | None = None) -> pd.DataFrame:
        """Random effects of every level by every method: BLUPs beside posteriors.

        Parameters
        ----------
        group : str, optional
            May be left out where there is one grouping factor.

        Returns
        -------
        DataFrame
            One row per level, term and method with columns

            - ``estimate sd low high``: BLUP, conditional SD given β, θ and σ, and its normal
              interval; or posterior mean, SD and interval.
            - ``rank``: of the level within term and method, 1 is the largest.
            - ``shrinkage``: 1 - sd² / Var(b). Near 1 the level's own data decide, near 0 it is
              drawn wholly to the population.
            - ``std_diff``: (estimate - reference) / sd of the reference.
            - ``sd_ratio``: sd of the reference / sd.

            The reference is :attr:`reference`.
        """
        group = self._group(group)
        frames = [_random(r, group, self.level) for r in self.results if group in r.model.groups]
        labels = [
            label
            for label, r in zip(self.labels, self.results, strict=True)
            if group in r.model.groups
        ]
        frame = _stack(frames, labels, ["level", "term"])
        frame["rank"] = _ranks(frame)
        return _against(frame, self.reference if self.reference in labels else labels[0])

    def coefficients(self, group: str | None = None, method: str | None = None) -> pd.DataFrame:
        """Coefficients of every level without, with partial and with complete pooling.

        Parameters
        ----------
        group : str, optional
        method : str, optional
            One of :attr:`labels`; by default the first that is a REML fit, or the first of all.

        Returns
        -------
        DataFrame
            Columns ``level term none partial population``: the least-squares estimate from the
            level's own rows (all other effects held at their estimates; missing where the level has
            too few rows), fixed effect plus random effect, and the fixed effect.
        """
        group = self._group(group)
        return _coefficients(self._result(method, group), group)

    def agreement(self) -> pd.DataFrame:
        """How well each pair of methods agrees.

        Returns
        -------
        DataFrame
            One row per pair of methods and kind of quantity; random effects by ``what`` = term |
            group. Columns ``kind what method1 method2 n``, then

            - ``max_std_diff mean_std_diff``: of |a - b| / pooled SD; the SD of one method where
              the other has none, missing where neither has.
            - ``correlation ccc``: of random effects over levels; Lin's concordance.
            - ``overlap``: mean of intersection / union of the intervals (Jaccard).

        References
        ----------
        Lin (1989). A concordance correlation coefficient to evaluate reproducibility. Biometrics
        45, 255-268.
        """
        import pandas as pd

        rows = []
        for kind, what, table in self._quantities():
            for a, b in combinations([m for m in self.labels if m in set(table["method"])], 2):
                rows.append(
                    {"kind": kind, "what": what, **agreement.pair(table, a, b, kind == RANDOM)}
                )
        return pd.DataFrame(rows, columns=agreement.COLUMNS)

    def _quantities(self) -> Iterator[tuple[str, str, pd.DataFrame]]:
        """Everything comparable: kind, what, and a frame with a column ``key``."""
        fixed = self.fixed_effects()
        yield FIXED, "all", fixed.assign(key=fixed["term"], sd=fixed["std_error"])
        variance = self.variance_components()
        key = _key(variance[COMPONENT]).agg("|".join, axis=1)
        yield VARIANCE, "all", variance.assign(key=key, sd=variance["std_error"])
        for group in self.groups:
            effects = self.random_effects(group)
            for term, table in effects.groupby("term", sort=False):
                yield RANDOM, f"{term} | {group}", table.assign(key=table["level"])

    def diagnostics(self) -> pd.DataFrame:
        """Run time and what the checks of each method say.

        Returns
        -------
        DataFrame
            Index method; ``seconds`` and, as far as they apply, ``converged singular message`` of
            fits, and the diagnostics of posteriors.
        """
        import pandas as pd

        return pd.DataFrame(self.diagnostics_records(), index=pd.Index(self.labels, name="method"))

    def diagnostics_records(self) -> list[dict[str, Any]]:
        """:meth:`diagnostics` as one dict a method, without what does not apply to it."""
        return [_diagnostics(r) for r in self.results]

    def timing(self) -> pd.Series:
        """Run time of each method in seconds, compilation included where it was needed."""
        import pandas as pd

        index = pd.Index(self.labels, name="method")
        return pd.Series([float(r.seconds) for r in self.results], index=index, name="seconds")

    # -- what is compared --------------------------------------------------------------------------

    @property
    def reference(self) -> str:
        """Label that others are held against: the first posterior, or else the first result."""
        kinds = [is_posterior(r) for r in self.results]
        return self.labels[kinds.index(True) if any(kinds) else 0]

    @property
    def groups(self) -> list[str]:
        """Grouping factors of all results."""
        return list(dict.fromkeys(g for r in self.results for g in r.model.groups))

    def _group(self, group: str | None) -> str:
        if group is None and len(self.groups) == 1:
            return self.groups[0]
        if group not in self.groups:
            raise ComparisonError(
                f"group={group!r} is not a grouping factor of these models; expected one of "
                f"{self.groups}."
            )
        return group

    def _result(self, method: str | None, group: str) -> Result:
        if method is not None and method not in self.labels:
            raise ComparisonError(
                f"method={method!r} is not compared here; expected one of {list(self.labels)}."
            )
        pairs = [
            (label, r)
            for label, r in zip(self.labels, self.results, strict=True)
            if group in r.model.groups and method in (None, label)
        ]
        if not pairs:
            raise ComparisonError(f"{method} has no random effects of {group!r}; choose another.")
        preferred = [r for _, r in pairs if r.method == "REML"]
        return (preferred or [pairs[0][1]])[0]

    # -- people -----------------------------------------------------------------------------------

    def explain(self) -> str:
        """Where the methods differ, and why, in words; one line each."""
        from lmmjax.explain import explain

        return "\n".join(explain(self))

    def __repr__(self) -> str:
        from lmmjax.report import comparison_page

        return comparison_page(self).text()

    def _repr_html_(self) -> str:
        from lmmjax.report import comparison_page

        return comparison_page(self).html()

    def to_html(self, path: str | os.PathLike[str], *, plots: bool = True) -> Path:
        """Write a report that needs no other file: tables, words and pictures.

        Parameters
        ----------
        path : path
            Folders are made where needed.
        plots : bool
            With pictures, which need Matplotlib (``pip install 'lmmjax[plots]'``).

        Returns
        -------
        pathlib.Path
        """
        from lmmjax.report import write_report

        return write_report(self, path, plots=plots)

    # -- pictures ----------------------------------------------------------------------------------

    def plot_fixed(self) -> Any:
        """Fixed effects by method with intervals; an array of Axes, one panel a term."""
        from lmmjax import plots

        return plots.forest(self.fixed_effects().rename(columns={"term": "label"}))

    def plot_variance(self) -> Any:
        """SDs and correlations by method, with intervals where there are any."""
        from lmmjax import plots

        frame = self.variance_components()
        labels = [component_label(*row) for row in frame[COMPONENT].itertuples(index=False)]
        return plots.forest(frame.assign(label=labels))

    def plot_caterpillar(self, group: str | None = None) -> Any:
        """Random effects of each level by method with intervals; one panel a term."""
        from lmmjax import plots

        group = self._group(group)
        return plots.caterpillar(self.random_effects(group), group)

    def plot_shrinkage(self, group: str | None = None, method: str | None = None) -> Any:
        """How partial pooling moves the levels' own estimates towards the population."""
        from lmmjax import plots

        group = self._group(group)
        return plots.shrinkage(self.coefficients(group, method), group)


# -------------------------------------------------------------------------------------------------
# What may be compared
# -------------------------------------------------------------------------------------------------


def is_posterior(result: Any) -> bool:
    """Whether a result is Bayesian; does not import the Bayesian half for fits."""
    if isinstance(result, Fit):
        return False
    from lmmjax.bayes.posterior import Posterior

    return isinstance(result, Posterior)


def _check_kind(result: Any) -> None:
    if not isinstance(result, Fit) and not is_posterior(result):
        raise ComparisonError(
            f"found a {type(result).__name__}; expected results of Model.fit or Model.sample."
        )


def _check_same_data(a: Result, b: Result) -> None:
    """Refuse results of different rows or responses."""
    one, two = a.model.design, b.model.design
    if one is two:
        return
    if not one.rows.equals(two.rows):
        raise ComparisonError(
            f"found different rows: {a.method} used {one.n}, {b.method} used {two.n} "
            f"({len(one.rows.symmetric_difference(two.rows))} rows are in one of them only); "
            "expected the same rows in the same order. Drop rows with missing values in any of the "
            "variables before building the models."
        )
    if not np.array_equal(one.y, two.y):
        raise ComparisonError(
            f"found different responses: {one.response} and {two.response}; expected the same "
            "values in both models."
        )


def _names(result: Result) -> set[str]:
    """Names of the fixed effects, and term | group of the random ones."""
    design = result.model.design
    return {*design.x_names, *(f"{name} | {t.group}" for t in design.terms for name in t.names)}


def _check_overlap(results: tuple[Result, ...], labels: tuple[str, ...]) -> None:
    first = _names(results[0])
    for label, result in zip(labels[1:], results[1:], strict=True):
        if not first & _names(result):
            raise ComparisonError(
                f"{labels[0]} ({results[0].model.formula}) and {label} ({result.model.formula}) "
                "have no term in common; expected models that share some fixed or random effects."
            )


def lacking(comparison: Comparison) -> dict[str, list[str]]:
    """Per method, the effects that another method has and it has not."""
    names = [_names(r) for r in comparison.results]
    everything = set().union(*names)
    pairs = zip(comparison.labels, names, strict=True)
    return {label: sorted(everything - mine) for label, mine in pairs if everything - mine}


def _labels(methods: list[str]) -> tuple[str, ...]:
    """Methods as labels, numbered where one occurs more than once."""
    counts, labels = Counter(methods), []
    seen: Counter[str] = Counter()
    for method in methods:
        seen[method] += 1
        labels.append(f"{method} [{seen[method]}]" if counts[method] > 1 else method)
    return tuple(labels)


def component_label(group: str, term1: Any, term2: Any) -> str:
    """Name a variance component for people.

    Examples
    --------
    >>> component_label("Subject", "(Intercept)", "Days")
    'cor (Intercept), Days | Subject'
    >>> component_label("Residual", None, None), component_label("Residual", "phi", None)
    ('sigma', 'phi')
    """
    if group == "Residual" and isinstance(term1, str):
        return term1
    if not isinstance(term1, str):
        return "sigma"
    if not isinstance(term2, str):
        return f"SD {term1} | {group}"
    return f"cor {term1}, {term2} | {group}"


# -------------------------------------------------------------------------------------------------
# Frames of one result
# -------------------------------------------------------------------------------------------------


def _fixed(result: Result, level: float) -> pd.DataFrame:
    table = result.coef_table(level=level).rename(columns={"ci_low": "low", "ci_high": "high"})
    table = table[["estimate", "std_error", "low", "high"]]
    return table.rename_axis("term").reset_index()


def _variance(result: Result, level: float) -> pd.DataFrame:
    import pandas as pd

    if isinstance(result, Fit):
        table = result.varcorr().assign(sd=np.nan, low=np.nan, high=np.nan)
    else:
        table = result.varcorr(level=level)
    table = table.rename(columns={"sdcor": "estimate", "sd": "std_error"})
    table = table[[*COMPONENT, "estimate", "std_error", "low", "high"]]
    return pd.concat([table, _residual(result, level)]) if result.model.is_structured else table


def _residual(result: Result, level: float) -> pd.DataFrame:
    """Residual parameters as components: Wald intervals on a transformed scale, or quantiles."""
    frame = result.residual_intervals(level)[["estimate", "std_error", "low", "high"]]
    frame = frame.rename_axis("term1").reset_index()
    return frame.assign(group="Residual", term2=None)


def _random(result: Result, group: str, level: float) -> pd.DataFrame:
    """Estimates of one method, level by term in rows."""
    import pandas as pd

    mean, sd = result.ranef(group), result.ranef_se(group)
    low, high = _ranef_interval(result, group, mean, sd, level)
    table = {
        "level": np.repeat(np.asarray(mean.index, object), mean.shape[1]),
        "term": np.tile(np.asarray(mean.columns, object), mean.shape[0]),
    }
    for name, frame in (("estimate", mean), ("sd", sd), ("low", low), ("high", high)):
        table[name] = np.asarray(frame, float).reshape(-1)
    prior = np.tile(_prior_variances(result, group), mean.shape[0])
    with np.errstate(invalid="ignore", divide="ignore"):
        table["shrinkage"] = np.where(prior > 0, 1 - table["sd"] ** 2 / prior, np.nan)
    return pd.DataFrame(table)


def _ranef_interval(
    result: Result, group: str, mean: pd.DataFrame, sd: pd.DataFrame, level: float
) -> tuple[Any, Any]:
    """Normal intervals given θ for BLUPs; the posterior's own otherwise."""
    if not isinstance(result, Fit):
        return result.ranef_interval(group, level)
    from scipy.special import ndtri

    half = ndtri(0.5 + level / 2) * sd
    return mean - half, mean + half


def _prior_variances(result: Result, group: str) -> np.ndarray:
    """Var(b) of each term of a group, in the order of ``ranef``'s columns."""
    table = result.varcorr()
    mine = table[(table["group"] == group) & table["term2"].isna()]
    return mine["vcov"].to_numpy(float)


def _coefficients(result: Result, group: str) -> pd.DataFrame:
    """See :meth:`Comparison.coefficients`."""
    import pandas as pd

    design, blups = result.model.design, result.ranef(group)
    beta = dict(zip(design.x_names, np.asarray(result.beta, float), strict=True))
    own = [t for t in design.terms if t.group == group]
    z, codes = np.hstack([t.z for t in own]), own[0].codes
    names = [name for t in own for name in t.names]
    none = _per_level(z, _partial_response(result, group, names), codes, design.weights)
    population = np.array([beta.get(name, 0.0) for name in names])
    partial = blups.to_numpy(float) + population
    return pd.DataFrame(
        {
            "level": np.repeat(np.asarray(blups.index, object), len(names)),
            "term": np.tile(np.asarray(names, object), len(blups)),
            "none": none.reshape(-1),
            "partial": partial.reshape(-1),
            "population": np.tile(population, len(blups)),
        }
    )


def _partial_response(result: Result, group: str, names: list[str]) -> np.ndarray:
    """y without offset, other fixed effects and the effects of other groups."""
    design, beta = result.model.design, np.asarray(result.beta, float)
    others = np.array([name not in names for name in design.x_names], bool)
    y = design.y - design.offset - design.X[:, others] @ beta[others]
    seen: Counter[str] = Counter()
    for term in design.terms:
        first, S = seen[term.group], term.z.shape[1]
        seen[term.group] += S
        if term.group != group:
            b = result.ranef(term.group).to_numpy(float)[:, first : first + S]
            y = y - np.einsum("is,is->i", term.z, b[term.codes])
    return y


def _per_level(z: np.ndarray, y: np.ndarray, codes: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Least squares within each level, (J, S); NaN where the level's rows do not determine it."""
    root = np.sqrt(w)
    z, y = z * root[:, None], y * root
    out = np.full((codes.max() + 1, z.shape[1]), np.nan)
    order = np.argsort(codes, kind="stable")
    for rows in np.split(order, np.cumsum(np.bincount(codes))[:-1]):
        solution, _, rank, _ = np.linalg.lstsq(z[rows], y[rows])
        if rank == z.shape[1]:
            out[codes[rows[0]]] = solution
    return out


def _diagnostics(result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {"seconds": float(result.seconds)}
    if isinstance(result, Fit):
        names = ("converged", "singular", "message", "n_evals")
        return row | {name: getattr(result, name) for name in names}
    return row | dict(result.diagnostics())


# -------------------------------------------------------------------------------------------------
# Frames of several results
# -------------------------------------------------------------------------------------------------


def _stack(frames: list[pd.DataFrame], labels: Any, key: list[str]) -> pd.DataFrame:
    """Stack frames of one shape: quantities in first-seen order, methods side by side in each."""
    import pandas as pd

    long = pd.concat([f.assign(method=m) for f, m in zip(frames, labels, strict=True)])
    position = _key(long[key]).groupby(key, sort=False).ngroup()
    long = long.assign(_at=position.to_numpy()).sort_values("_at", kind="stable")
    values = [c for c in long.columns if c not in (*key, "method", "_at")]
    return long[[*key, "method", *values]].reset_index(drop=True)


def _key(names: pd.DataFrame) -> pd.DataFrame:
    """Names as text, empty where missing; a column without any name is not a column of floats."""
    return names.astype(object).where(names.notna(), "").astype(str)


def _ranks(frame: pd.DataFrame) -> pd.Series:
    groups = frame.groupby(["term", "method"], sort=False)["estimate"]
    return groups.rank(ascending=False, method="min").astype(int)


def _against(frame: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Add differences from the reference method, in its SDs, and the ratio of SDs."""
    key = ["level", "term"]
    ours = frame.loc[frame["method"] == reference, [*key, "estimate", "sd"]]
    both = frame[key].merge(ours, on=key, how="left")
    difference = frame["estimate"].to_numpy() - both["estimate"].to_numpy()
    frame["std_diff"] = agreement.ratio(difference, both["sd"].to_numpy())
    with np.errstate(invalid="ignore", divide="ignore"):
        frame["sd_ratio"] = both["sd"].to_numpy() / frame["sd"].to_numpy()
    return frame

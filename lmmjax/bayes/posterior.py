"""The result of sampling: draws of every parameter and effect, and questions to them.

A :class:`Posterior` holds NumPy arrays only. Its tables have the shape of those of
:class:`~lmmjax.fit.Fit`, with posterior means, SDs and quantile intervals.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax import pointwise
from lmmjax.bayes import draws as exact
from lmmjax.bayes.priors import Priors
from lmmjax.errors import DataError, LmmError, PriorError
from lmmjax.precision import in_float64
from lmmjax.tables import check_level, missing_as_nan

if TYPE_CHECKING:
    import pandas as pd
    from xarray import DataArray, DataTree

    from lmmjax.model import Model

#: thresholds of the warnings (Vehtari et al. 2021; Betancourt 2016 for E-BFMI)
RHAT_LIMIT = 1.01
ESS_PER_CHAIN = 100
BFMI_LIMIT = 0.3

#: the largest log-likelihood array (draws x rows) that ``Posterior.data`` holds
LOGLIK_NUMBERS = 20_000_000


@dataclass(frozen=True, eq=False)
class Posterior:
    """Draws from the posterior of a model. Immutable; made by :meth:`lmmjax.Model.sample`.

    Attributes
    ----------
    model : Model
    form : str
        "marginal", "noncentered" or "centered".
    priors : Priors
    seed : int
    draws, warmup, chains : int
        Draws kept and warm-up iterations per chain, and number of chains.
    target_accept : float
    seconds : float
        Wall-clock time of sampling, compilation included.
    values : dict of arrays (chains, draws, ...)
        ``beta``, ``sigma``, ``sd_<group>``, ``cor_<group>``, ``ranef_<group>`` and the residual
        parameters by name, in the units of the data.
    stats : dict of arrays (chains, draws)
        What the sampler tells of each draw.
    phi : array (chains, draws, n_phi)
        Free residual parameters, as ``Fit.phi``.
    """

    model: Model
    form: str
    priors: Priors
    seed: int
    draws: int
    warmup: int
    chains: int
    target_accept: float
    seconds: float
    values: dict[str, np.ndarray] = field(repr=False)
    stats: dict[str, np.ndarray] = field(repr=False)
    phi: np.ndarray = field(repr=False)

    @property
    def method(self) -> str:
        """Sampler and parametrisation, such as "NUTS (marginal)"."""
        return f"NUTS ({self.form})"

    @property
    def n_obs(self) -> int:
        """Number of rows used."""
        return self.model.n_obs

    # -- numbers ------------------------------------------------------------------------------

    def _flat(self, name: str) -> np.ndarray:
        """Draws of all chains one after the other: (chains * draws, ...)."""
        value = self.values[name]
        return value.reshape(self.chains * self.draws, *value.shape[2:])

    @property
    def beta(self) -> pd.Series:
        """Posterior means of the fixed effects, indexed by R's names."""
        import pandas as pd

        names = list(self.model.design.x_names)
        return pd.Series(self._flat("beta").mean(axis=0), index=names, name="estimate")

    @property
    def sigma(self) -> float:
        """Posterior mean of the residual SD (of a row of weight 1)."""
        return float(self.values["sigma"].mean())

    def coef_table(self, level: float = 0.95) -> pd.DataFrame:
        """Posterior means, SDs, quantile intervals and diagnostics of the fixed effects.

        Returns
        -------
        DataFrame
            Columns ``estimate std_error ci_low ci_high ess rhat``; ``std_error`` is the posterior
            SD, ``ess`` the bulk effective sample size.
        """
        import pandas as pd

        table = _summary(self.values["beta"], level)
        table.columns = ["estimate", "std_error", "ci_low", "ci_high", "ess", "rhat"]
        return table.set_index(pd.Index(self.model.design.x_names, dtype=object))

    # -- variance components ----------------------------------------------------------------------

    def varcorr(self, level: float = 0.95) -> pd.DataFrame:
        """Variances, covariances, SDs and correlations, in the rows of ``Fit.varcorr``.

        Returns
        -------
        DataFrame
            Columns ``group term1 term2 vcov sdcor sd low high ess rhat``: posterior means of the
            variance or covariance (``vcov``) and of the SD or correlation (``sdcor``); posterior
            SD, interval, effective sample size and R-hat on the scale of ``sdcor``. ``Residual``
            last.
        """
        import pandas as pd

        labels, vcov, sdcor = [], [], []
        for term, sd, corr in self._term_draws():
            for i, name in enumerate(term.names):
                labels.append((term.group, name, None))
                vcov.append(np.mean(sd[..., i] ** 2))
                sdcor.append(sd[..., i])
            for i, j in _upper_pairs(len(term.names)):
                labels.append((term.group, term.names[i], term.names[j]))
                vcov.append(np.mean(corr[..., i, j] * sd[..., i] * sd[..., j]))
                sdcor.append(corr[..., i, j])
        labels.append(("Residual", None, None))
        vcov.append(np.mean(self.values["sigma"] ** 2))
        sdcor.append(self.values["sigma"])
        left = missing_as_nan(pd.DataFrame(labels, columns=["group", "term1", "term2"]))
        right = _summary(np.stack(sdcor, axis=-1), level)
        right.columns = ["sdcor", "sd", "low", "high", "ess", "rhat"]
        return pd.concat([left.assign(vcov=vcov), right], axis=1)

    def residual_params(self) -> pd.Series:
        """Posterior means of the residual parameters by name; see ``Fit.residual_params``."""
        import pandas as pd

        names = self.model.phi_names
        values = [self.values[name].mean() for name in names]
        return pd.Series(values, index=names, name="estimate", dtype=float)

    def residual_intervals(self, level: float = 0.95) -> pd.DataFrame:
        """Posterior means, SDs and quantile intervals of the residual parameters.

        Returns
        -------
        DataFrame
            Index ``Model.phi_names``, columns ``estimate std_error low high ess rhat``.
        """
        names = self.model.phi_names
        draws = [self.values[name] for name in names]
        table = _summary(np.stack([*draws, self.values["sigma"]], axis=-1)[..., :-1], level)
        table.columns = ["estimate", "std_error", "low", "high", "ess", "rhat"]
        return table.set_axis(names, axis="index")

    def _term_draws(self) -> list[tuple[Any, np.ndarray, np.ndarray]]:
        """Each term with its SDs (chains, draws, S) and correlations (chains, draws, S, S)."""
        first_sd: dict[str, int] = {}
        first_cor: dict[str, int] = {}
        out = []
        for term in self.model.design.terms:
            S, group = len(term.names), term.group
            at = first_sd.get(group, 0)
            sd = self.values[f"sd_{group}"][..., at : at + S]
            first_sd[group] = at + S
            corr = np.broadcast_to(np.eye(S), (*sd.shape[:2], S, S)).copy()
            if S > 1 and term.cov in ("us", "cs", "homcs"):
                at, n_pairs = first_cor.get(group, 0), S * (S - 1) // 2
                pairs = self.values[f"cor_{group}"][..., at : at + n_pairs]
                first_cor[group] = at + n_pairs
                columns, rows = np.triu_indices(S, 1)
                corr[..., rows, columns] = corr[..., columns, rows] = pairs
            out.append((term, sd, corr))
        return out

    def _factors(self) -> list[np.ndarray]:
        """A factor of D of each term by draw, (chains * draws, S, S); singular ones included."""
        out = []
        for _, sd, corr in self._term_draws():
            values, vectors = np.linalg.eigh(corr)
            root = vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]
            out.append((sd[..., None] * root).reshape(-1, *root.shape[2:]))
        return out

    # -- random effects -------------------------------------------------------------------------

    def _group(self, group: str | None) -> tuple[str, list[str], list[str]]:
        """The group meant, its levels and its terms' columns in formula order."""
        known = list(self.model.groups)
        if group is None and len(known) == 1:
            group = known[0]
        if group not in known:
            raise DataError(
                f"group={group!r} is not a grouping factor of this model; expected one of {known}."
            )
        mine = [t for t in self.model.design.terms if t.group == group]
        return group, list(mine[0].levels), [name for t in mine for name in t.names]

    def _ranef_frame(self, group: str, values: np.ndarray) -> pd.DataFrame:
        import pandas as pd

        group, levels, names = self._group(group)
        return pd.DataFrame(values, index=pd.Index(levels, name=group), columns=names)

    def ranef(self, group: str | None = None) -> pd.DataFrame:
        """Posterior means of the random effects: levels by terms."""
        group = self._group(group)[0]
        return self._ranef_frame(group, self._flat(f"ranef_{group}").mean(axis=0))

    def ranef_se(self, group: str | None = None) -> pd.DataFrame:
        """Posterior SDs of the random effects: the uncertainty of β, θ and σ is in them."""
        group = self._group(group)[0]
        return self._ranef_frame(group, self._flat(f"ranef_{group}").std(axis=0, ddof=1))

    def ranef_interval(
        self, group: str | None = None, level: float = 0.95
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Quantile intervals of the random effects: lower and upper limits, levels by terms."""
        group = self._group(group)[0]
        low, high = np.quantile(self._flat(f"ranef_{group}"), _tails(level), axis=0)
        return self._ranef_frame(group, low), self._ranef_frame(group, high)

    def _term_effects(self) -> list[np.ndarray]:
        """Draws of the effects of each term, (chains * draws, J, S), in formula order."""
        first: dict[str, int] = {}
        out = []
        for term in self.model.design.terms:
            at, S = first.get(term.group, 0), len(term.names)
            out.append(self._flat(f"ranef_{term.group}")[..., at : at + S])
            first[term.group] = at + S
        return out

    # -- predictions ----------------------------------------------------------------------------

    def predict(
        self,
        newdata: Any = None,
        kind: str = "conditional",
        interval: str | None = None,
        level: float = 0.95,
        new_levels: str = "raise",
        offset: Any = None,
        seed: int = 0,
    ) -> Any:
        """Predict the response; see :meth:`lmmjax.fit.Fit.predict` for the parameters.

        Estimates and standard errors are posterior means and SDs of the expected response;
        ``interval="prediction"`` is that of a new observation of weight 1, intervals are
        quantiles; ``kind="next"`` averages over the residual parameters too. Effects of new levels,
        and those that a population prediction leaves out, are drawn from N(0, D).

        Returns
        -------
        Series, or DataFrame ``estimate std_error low high`` with ``interval``, on the row labels
        of ``newdata``
        """
        from lmmjax.bayes.predict import predict

        return predict(self, newdata, kind, interval, level, new_levels, offset, seed)

    def posterior_predictive(self, n: int | None = None, seed: int = 0) -> DataTree:
        """New responses for the rows of the data, given their random effects.

        Parameters
        ----------
        n : int, optional
            Draws to use, evenly thinned from each chain; all by default.

        Returns
        -------
        DataTree
            :attr:`data` with a group ``posterior_predictive``, variable ``y`` (chain, draw, obs).
        """
        from lmmjax.bayes.tree import with_posterior_predictive

        return with_posterior_predictive(self, n, seed)

    def prior_predictive(self, n: int = 500, seed: int = 0) -> DataTree:
        """Parameters drawn from the prior, and responses drawn from them.

        Returns
        -------
        DataTree
            :attr:`data` with groups ``prior`` and ``prior_predictive``.

        Raises
        ------
        PriorError
            Where a prior is improper: nothing can be drawn from it.
        """
        from lmmjax.bayes.tree import with_prior

        if self.priors.improper:
            raise PriorError(
                f"priors={self.priors.base!r} has improper parts, from which nothing can be "
                "drawn; expected proper priors. Sample with priors='default' or a dict."
            )
        return with_prior(self, n, seed)

    # -- log-likelihoods ------------------------------------------------------------------------

    def log_likelihood(self, kind: str = "conditional") -> DataArray:
        """Log-likelihood by draw, of rows given the random effects or of groups without them.

        Parameters
        ----------
        kind : {"conditional", "marginal"}
            log p(y_i | β, b, σ) per row; or log p(y_g | β, θ, σ) per level of the outermost
            grouping factor or residual subject, the random effects integrated out. With correlated
            errors the term of a row is that given the other rows of its subject as well,
            log p(y_i | y_-i, β, b, σ, φ), which is what leave-one-out by importance sampling needs
            (such terms do not add up to a joint density).

        Returns
        -------
        DataArray
            Dimensions (chain, draw, obs), or (chain, draw, <group>).

        Raises
        ------
        DesignError
            ``kind="marginal"`` with crossed factors: no group's likelihood stands alone.

        Notes
        -----
        O(draws n (p + S)) time, memory for the result; by group with a residual structure
        O(draws Σ n_g³).

        References
        ----------
        Bürkner, Gabry and Vehtari (2021). Efficient leave-one-out cross-validation for Bayesian
        non-factorized normal and Student-t models. Comput. Statist. 36.
        """
        if kind == "conditional":
            return self._wrap(self._row_loglik(), "obs", self.model.design.rows)
        if kind != "marginal":
            raise LmmError(
                f"log_likelihood(kind={kind!r}) is unknown; expected 'conditional' or 'marginal'."
            )
        by = self._group_loglik()
        return self._wrap(by.values, by.group, by.levels)

    def _wrap(self, values: np.ndarray, dim: str, labels: Any) -> DataArray:
        from xarray import DataArray

        shaped = values.reshape(self.chains, self.draws, -1)
        coords = {dim: np.asarray(labels)}
        return DataArray(shaped, coords, ("chain", "draw", dim), name="y")

    @in_float64
    def _row_loglik(self) -> np.ndarray:
        design, phi = self.model.design, self._phi()
        out = np.empty((self.chains * self.draws, design.n))
        for part in exact.slices(len(out), design.n):
            residuals = design.y - self._expected(part)
            sigma = self._flat("sigma")[part]
            out[part] = pointwise.row_loglik(design, residuals, sigma, phi[part])
        return out

    def _phi(self) -> np.ndarray:
        """Draws of the free residual parameters, (chains * draws, n_phi)."""
        return self.phi.reshape(self.chains * self.draws, -1)

    def _expected(self, part: slice, rows: Any = slice(None)) -> np.ndarray:
        """Xβ + offset + Zb of (some of) the training rows for a part of the draws."""
        design = self.model.design
        effects = [b[part] for b in self._term_effects()]
        terms = [(t.z[rows], t.codes[rows]) for t in design.terms]
        beta = self._flat("beta")[part]
        return exact.linear_predictor(design.X[rows], design.offset[rows], terms, beta, effects)

    @in_float64
    def _group_loglik(self) -> pointwise.ByGroup:
        beta, sigma = self._flat("beta"), self._flat("sigma")
        return pointwise.group_loglik(self.model.design, beta, sigma, self._factors(), self._phi())

    # -- how far to trust it ----------------------------------------------------------------------

    @cached_property
    def _checks(self) -> dict[str, float]:
        names = [k for k in self.values if not k.startswith("ranef_") or self.form != "marginal"]
        found = [self.values[k] for k in names if self.values[k].size]
        parts = [value.reshape(self.chains, self.draws, -1) for value in found]
        values = np.concatenate(parts, axis=-1)
        stats = _array_stats()
        return {
            "rhat_max": float(np.max(_rhat(values))),
            "ess_bulk_min": float(np.min(_ess(values, "bulk"))),
            "ess_tail_min": float(np.min(_ess(values, "tail"))),
            "divergences": int(self.stats["diverging"].sum()),
            "ebfmi_min": float(np.min(stats.bfmi(self.stats["energy"], chain_axis=0, draw_axis=1))),
        }

    def diagnostics(self) -> pd.Series:
        """The worst of each check over all parameters (and effects, unless drawn exactly).

        Returns
        -------
        Series
            ``rhat_max ess_bulk_min ess_tail_min divergences ebfmi_min``.
        """
        import pandas as pd

        return pd.Series(self._checks, dtype=object, name=self.method)

    @property
    def problems(self) -> list[str]:
        """What the diagnostics object to, in words; empty where nothing is wrong."""
        c, enough = self._checks, ESS_PER_CHAIN * self.chains
        ess = min(c["ess_bulk_min"], c["ess_tail_min"])
        found = []
        if not c["rhat_max"] <= RHAT_LIMIT:
            found.append(f"R-hat up to {c['rhat_max']:.3f} (more than {RHAT_LIMIT})")
        if not ess >= enough:
            found.append(f"effective sample size down to {ess:.0f} (fewer than {enough})")
        if c["divergences"]:
            found.append(f"{c['divergences']} divergent transitions")
        if not c["ebfmi_min"] >= BFMI_LIMIT:
            found.append(f"E-BFMI down to {c['ebfmi_min']:.2f} (less than {BFMI_LIMIT})")
        return found

    @property
    def converged(self) -> bool:
        """Whether the diagnostics object to nothing."""
        return not self.problems

    # -- ArviZ ----------------------------------------------------------------------------------

    @cached_property
    def data(self) -> DataTree:
        """The draws as an ArviZ DataTree with named dimensions and labels.

        Groups ``posterior``, ``sample_stats``, ``observed_data``, ``constant_data`` and
        ``log_likelihood`` (rows given b). The last is left out where it would hold more than
        20 million numbers; :meth:`log_likelihood` makes it all the same.
        """
        from lmmjax.bayes.tree import data_tree

        return data_tree(self)

    # -- people ---------------------------------------------------------------------------------

    def summary(self) -> str:
        """The posterior in words and tables, for people."""
        from lmmjax.bayes.text import page

        return page(self).text()

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        from lmmjax.bayes.text import page

        return page(self).html()


# -------------------------------------------------------------------------------------------------
# Summaries of draws
# -------------------------------------------------------------------------------------------------


def _array_stats() -> Any:
    from arviz_stats.base import array_stats

    return array_stats


def _ess(values: np.ndarray, method: str) -> np.ndarray:
    """Effective sample size (chains, draws, k) -> (k,)."""
    # the tails are those of a 90 % interval, as in Stan and ArviZ
    tails = {"prob": (0.05, 0.95)} if method == "tail" else {}
    ess = _array_stats().ess(values, chain_axis=0, draw_axis=1, method=method, **tails)
    return np.asarray(ess)


def _rhat(values: np.ndarray) -> np.ndarray:
    """Rank-normalised split R-hat (chains, draws, k) -> (k,)."""
    return np.asarray(_array_stats().rhat(values, chain_axis=0, draw_axis=1))


def _tails(level: float) -> tuple[float, float]:
    half = 0.5 * (1 - check_level(level))
    return half, 1 - half


def _upper_pairs(S: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(S) for j in range(i + 1, S)]


def _summary(values: np.ndarray, level: float) -> pd.DataFrame:
    """Mean, SD, interval, bulk ESS and R-hat of (chains, draws, k), one row each."""
    import pandas as pd

    flat = values.reshape(values.shape[0] * values.shape[1], values.shape[-1])
    low, high = np.quantile(flat, _tails(level), axis=0)
    columns = (flat.mean(axis=0), flat.std(axis=0, ddof=1), low, high)
    if values.shape[-1] == 0:
        return pd.DataFrame(np.empty((0, 6)))
    return pd.DataFrame(np.column_stack([*columns, _ess(values, "bulk"), _rhat(values)]))

"""The result of a fit: what was estimated, and questions to it. Nothing here knows the likelihood;
every number is read off, or asked of, the compiled programs of estimate.py when it is wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax import estimate, tables
from lmmjax.boundary import rectify
from lmmjax.derivatives import is_approximate
from lmmjax.errors import DataError
from lmmjax.gram import Gram, Rhs
from lmmjax.inference.methods import InferenceMethods
from lmmjax.optimize import SINGULAR_TOLERANCE
from lmmjax.precision import float64, in_float64
from lmmjax.simulate import simulate
from lmmjax.threads import one_blas_thread

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.bootstrap import Bootstrap
    from lmmjax.model import Model
    from lmmjax.solution import Solution


#: the two readings of the model: given the random effects, or with them integrated out
LEVELS = ("conditional", "marginal")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise DataError(
            f"{name}={value!r} is unknown; expected one of {', '.join(map(repr, allowed))}."
        )


class MarginalCov(NamedTuple):
    """V_i of one subject and its correlation matrix, rows labelled as in the data."""

    cov: pd.DataFrame
    corr: pd.DataFrame


@dataclass(frozen=True, eq=False)
class Fit(InferenceMethods):
    """A fitted model (frequentist). Immutable; made by :meth:`lmmjax.Model.fit`.

    Attributes
    ----------
    model : Model
    method : str
        "REML" or "ML".
    beta : Series (p,)
        Fixed effects under R's names.
    sigma : float
        Residual standard deviation (of a row of weight 1): √(RSS/n) in a linear model fitted by
        ML, whose tests use RSS/(n - p), as those of R's ``lm`` and of ``nlme::gls``.
    theta : ndarray (n_theta,)
        Relative covariance parameters, terms in formula order, each column-major (lme4).
    phi : ndarray (n_phi,)
        Free parameters of the residual structure; :meth:`residual_params` has them as reported.
    loglik, deviance : float
        (Restricted) log-likelihood, and -2 times it.
    converged, singular : bool
    message : str
        What the convergence checks found, in words.
    n_evals : int
        Evaluations of the criterion.
    seconds : float
        Time of the optimisation, with its compilation where that was needed (s).
    """

    model: Model
    method: str
    df: str
    optimizer: str
    converged: bool
    singular: bool
    seconds: float
    information: str  # of Kenward-Roger, by default
    _solution: Solution = field(repr=False)

    # -- what the compiled fit returned, in the units of the data -------------------------------

    @property
    def n_evals(self) -> int:
        """Evaluations of the criterion."""
        return self._solution.n_evals

    @property
    def gradient(self) -> np.ndarray:
        """Gradient of the criterion where the optimiser saw it last, in standardised units."""
        return self._solution.gradient

    @property
    def _theta_s(self) -> np.ndarray:
        return self._solution.free[: self.model._plan.layout.n_theta]

    @property
    def phi(self) -> np.ndarray:
        """Free parameters of the residual structure, those that the optimiser moves.

        Unconstrained (log ratios of SDs, transformed correlations, in units of the optimiser), so
        not what R or SAS print: :meth:`residual_params` has those, under their names.
        """
        return self._solution.free[self.model._plan.layout.n_theta :]

    @cached_property
    def _residual_sd(self) -> float:
        """S of the row that σ refers to, in the units of the source; 1 for equal variances."""
        if self.model.design.residual is None:
            return 1.0
        s = self.model.design.residual.structure
        with float64():
            return float(s.variances.reference(jnp.asarray(self.phi[s.n_corr :])))

    @cached_property
    def theta(self) -> np.ndarray:
        """Relative covariance parameters, terms in formula order, each column-major (lme4).

        A relative SD that counts as 0 (``singular``) is 0; so are those that are made of it.
        """
        model = self.model
        free = model._theta_public(self._theta_s, self._residual_sd)
        structures, at, pieces = model._plan.layout.structures, 0, [np.zeros(0)]
        for s, zero in zip(structures, self._at_zero, strict=True):
            pieces.append(rectify(s, free[at : at + s.n_theta], zero))
            at += s.n_theta
        theta = np.concatenate(pieces)
        theta.setflags(write=False)
        return theta

    @cached_property
    def _at_zero(self) -> list[np.ndarray]:
        """Which SDs of each term are on their boundary, where 0 is what the optimiser means."""
        out = []
        for lam, B in zip(self.model._factors(self._theta_s), self.model._units.B, strict=True):
            size = np.sqrt(np.sum((B @ lam) ** 2, axis=1))
            out.append(size < SINGULAR_TOLERANCE * np.abs(np.diag(B)))
        return out

    @cached_property
    def sigma(self) -> float:
        """Residual standard deviation (of a row of weight 1)."""
        return self.model._units.scale * math.sqrt(self._solution.sigma2) * self._residual_sd

    @cached_property
    def loglik(self) -> float:
        """(Restricted) log-likelihood."""
        return -0.5 * (self._solution.value + self.model._units.constant(self.method))

    @cached_property
    def message(self) -> str:
        """What the convergence checks found, in words."""
        from lmmjax.fitting import message

        return message(self)

    @cached_property
    def _beta(self) -> np.ndarray:
        units = self.model._units
        return units.beta0 + units.scale * units.A @ self._solution.beta

    @cached_property
    def _unscaled_vcov(self) -> np.ndarray:
        A = self.model._units.A
        return A @ self._solution.unscaled_vcov @ A.T / self._residual_sd**2

    # -- numbers ------------------------------------------------------------------------------

    @property
    def beta(self) -> pd.Series:
        """Fixed effects, indexed by R's coefficient names."""
        import pandas as pd

        return pd.Series(self._beta, index=self.model._x_index, name="estimate")

    @property
    def deviance(self) -> float:
        """-2 log-likelihood (the REML criterion for REML fits)."""
        return -2.0 * self.loglik

    @property
    def n_obs(self) -> int:
        """Number of rows used."""
        return self.model.n_obs

    @property
    def n_params(self) -> int:
        """Fixed effects, covariance parameters and σ."""
        return len(self._beta) + len(self.theta) + len(self.phi) + 1

    @property
    def aic(self) -> float:
        """-2 log-likelihood + 2 n_params."""
        return self.deviance + 2 * self.n_params

    @property
    def aicc(self) -> float:
        """AIC with the small-sample correction, n = rows."""
        k, n = self.n_params, self.n_obs
        return self.aic + 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else math.inf

    @property
    def bic(self) -> float:
        """-2 log-likelihood + log(n) n_params, n = rows (as lme4, for ML and REML)."""
        return self.deviance + math.log(self.n_obs) * self.n_params

    @property
    def std_errors(self) -> np.ndarray:
        """Standard errors of the fixed effects, (p,); see :meth:`vcov`."""
        return np.sqrt(np.diag(self._model_vcov))

    @property
    def _sigma2(self) -> float:
        """σ² of tests, intervals and predictions: RSS / (n - p) in linear models, where t and F are
        exact with it, whichever way the model was fitted; otherwise σ̂²."""
        n, p = self.n_obs, len(self._beta)
        if self.method == "REML" or not self.model.is_linear:
            return self.sigma**2
        return self.sigma**2 * n / (n - p) if n > p else math.nan

    @cached_property
    @in_float64
    def _hessian_s(self) -> np.ndarray:
        """Exact Hessian in standardised units; for a large crossed core only now computed."""
        layout = self.model._plan.layout
        if self.model.is_structured or not is_approximate(layout):
            return self._solution.hessian
        the_gram, rhs = self.model._on_device
        with one_blas_thread():
            return np.asarray(estimate.hessian(layout, self.method, self._theta_s, the_gram, rhs))

    @property
    def _products(self) -> tuple[Gram, Rhs]:
        """Cross-products at the estimated residual parameters (constants where there are none)."""
        return self._structured_products if self.model.is_structured else self.model._on_device

    @cached_property
    @in_float64
    def _structured_products(self) -> tuple[Gram, Rhs]:
        from lmmjax.residual import program

        arrays = program.crossproducts(self.model._prepared[2], jnp.asarray(self.phi))
        return jax.tree.map(np.asarray, arrays)

    # -- variance components ----------------------------------------------------------------------

    def varcorr(self) -> pd.DataFrame:
        """Variances, covariances, SDs and correlations, as lme4's ``as.data.frame(VarCorr(.))``.

        Returns
        -------
        DataFrame
            Columns ``group term1 term2 vcov sdcor``; ``term2`` missing on variances, ``Residual``
            last.
        """
        terms = [(t.group, t.names) for t in self.model.design.terms]
        return tables.varcorr_frame(terms, self._term_covs(), self.sigma)

    def _term_covs(self) -> list[np.ndarray]:
        return [self.sigma**2 * lam @ lam.T for lam in self.model._factors(self.theta)]

    def residual_params(self) -> pd.Series:
        """Parameters of the residual structure by name; empty for independent residuals.

        ``phi rho phi1 theta1 rho[a,b] range nugget sd_ratio[level] delta``: with unequal variances
        σ is the SD of the first level or position (of |x| = 1 for varpower, x = 0 for varexp).
        """
        import pandas as pd

        if not self.model.is_structured:
            return pd.Series(dtype=float, name="estimate")
        from lmmjax.residual.intervals import natural

        return pd.Series(natural(self), index=self.model.phi_names, name="estimate")

    # -- random effects -------------------------------------------------------------------------

    @cached_property
    @in_float64
    def _effects(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Per group: BLUPs (J, S) and conditional covariances (J, S, S), in the data's units."""
        the_gram, rhs = self._products
        layout = self.model._plan.layout
        sigma = self.sigma / self._residual_sd
        b, cov = estimate.effects(layout, the_gram, rhs, jnp.asarray(self._theta_s))
        out = {}
        for factor, b_f, cov_f in zip(self.model._plan.factors, b, cov, strict=True):
            B = _block_diagonal([self.model._units.B[k] for k in factor.terms])
            C = np.moveaxis(np.asarray(cov_f), -1, 0)
            positive = ~np.concatenate([self._at_zero[k] for k in factor.terms])
            values = self.model._units.scale * np.asarray(b_f).T @ B.T
            both = np.outer(positive, positive)
            out[factor.group] = (values * positive, sigma**2 * (B @ C @ B.T) * both)
        return out

    def _group(self, group: str | None) -> tuple[str, list[str], list[str]]:
        """The group meant, its levels and its terms' columns in formula order."""
        terms = self.model.design.terms
        known = list(self.model.groups)
        if group is None and len(known) == 1:
            group = known[0]
        if group not in known:
            raise DataError(
                f"group={group!r} is not a grouping factor of this model; expected one of {known}."
            )
        mine = [t for t in terms if t.group == group]
        return group, list(mine[0].levels), [name for t in mine for name in t.names]

    def ranef(self, group: str | None = None) -> pd.DataFrame:
        """BLUPs (conditional modes): levels by terms."""
        import pandas as pd

        group, levels, names = self._group(group)
        return pd.DataFrame(
            self._effects[group][0], index=pd.Index(levels, name=group), columns=names
        )

    def ranef_se(self, group: str | None = None, *, prediction_error: bool = False) -> pd.DataFrame:
        """SDs of the random effects given θ and σ, in the shape of :meth:`ranef`.

        Given β too, or with ``prediction_error=True`` of b̂ - b, which carries the uncertainty of β̂.
        """
        import pandas as pd

        name, levels, names = self._group(group)
        cov = self.ranef_cov(name, prediction_error=prediction_error)
        sd = np.sqrt(np.maximum(np.einsum("jss->js", cov), 0.0))
        return pd.DataFrame(sd, index=pd.Index(levels, name=name), columns=names)

    def ranef_cov(self, group: str | None = None, *, prediction_error: bool = False) -> np.ndarray:
        """Covariances of the random effects, (levels, S, S); as :meth:`ranef_se`."""
        name = self._group(group)[0]
        given = self._effects[name][1]
        if not prediction_error:
            return given.copy()
        slope = self._effect_slopes[name]
        return given + slope @ self._model_vcov @ np.swapaxes(slope, 1, 2)

    def joint_cov(self, group: str | None = None) -> np.ndarray:
        r"""Joint covariance of the errors of fixed and random effects, given θ and σ.

            Var(β̂ - β, b̂_j - b_j) = σ² times these rows and columns of Henderson's C⁻¹

        Parameters
        ----------
        group : str, optional
            A grouping factor; may be left out where there is one.

        Returns
        -------
        (levels, p + S, p + S) array
            β first, then the effects of the level in the order of :meth:`ranef`.

        Notes
        -----
        O(J (p + S)²) after one pass over the factors.

        References
        ----------
        Henderson (1975). Best linear unbiased estimation and prediction under a selection model.
        Biometrics 31.

        Examples
        --------
        >>> import lmmjax as lmm
        >>> fit = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff")).fit()
        >>> fit.joint_cov("Batch").shape
        (6, 2, 2)
        """
        name = self._group(group)[0]
        V, slope = self._model_vcov, self._effect_slopes[name]
        across = V @ np.swapaxes(slope, 1, 2)
        fixed = np.broadcast_to(V, (len(slope), *V.shape))
        own = self.ranef_cov(name, prediction_error=True)
        return np.block([[fixed, across], [np.swapaxes(across, 1, 2), own]])

    @property
    def _model_vcov(self) -> np.ndarray:
        """Covariance of β̂ given θ and σ, (p, p)."""
        return self._sigma2 * self._unscaled_vcov

    @cached_property
    @in_float64
    def _effect_slopes(self) -> dict[str, np.ndarray]:
        """Per group: slopes of the BLUPs in β, (J, S, p), in the data's units."""
        the_gram, rhs = self._products
        layout, units = self.model._plan.layout, self.model._units
        slopes = estimate.effect_slopes(layout, the_gram, rhs, jnp.asarray(self._theta_s))
        out = {}
        for factor, slope in zip(self.model._plan.factors, slopes, strict=True):
            B = _block_diagonal([units.B[k] for k in factor.terms])
            moved = B @ np.moveaxis(np.asarray(slope), 1, 0)
            out[factor.group] = moved @ np.linalg.inv(units.A)
        return out

    # -- fitted values, residuals, predictions ----------------------------------------------------

    def fitted(self, level: str = "conditional") -> pd.Series:
        """Fitted values on the caller's row labels.

        Parameters
        ----------
        level : {"conditional", "marginal"}
            Xβ + offset + Zb with the BLUPs, or Xβ + offset: the mean of y given b, or without.
        """
        import pandas as pd

        _check_choice("level", level, LEVELS)
        design = self.model.design
        values = design.X @ self._beta + design.offset
        if level == "conditional":
            for term, b in zip(design.terms, self._term_effects(), strict=True):
                values = values + np.einsum("is,is->i", term.z, b[term.codes])
        return pd.Series(values, index=design.rows, name="fitted")

    def _term_effects(self) -> list[np.ndarray]:
        """BLUPs per term, (J, S), in formula order."""
        at: dict[str, int] = {}
        out = []
        for term in self.model.design.terms:
            first = at.get(term.group, 0)
            S = len(term.names)
            out.append(self._effects[term.group][0][:, first : first + S])
            at[term.group] = first + S
        return out

    def residuals(self, kind: str = "response", level: str = "conditional") -> pd.Series:
        r"""Residuals of the hierarchical or of the marginal model.

            conditional  y - Xβ̂ - Zb̂  against Σ = σ²R;   marginal  y - Xβ̂  against V = ZDZ' + Σ

        Parameters
        ----------
        kind : {"response", "pearson", "normalized"}
            The difference itself; divided by its row's SD, the root of the diagonal of Σ or V;
            multiplied by the inverse of the lower Cholesky factor of Σ or V of its group, in row
            order (uncorrelated, were the estimates the truth).
        level : {"conditional", "marginal"}
            Normalised marginal residuals go by independent groups of rows: levels of the outermost
            factor, or all that crossed factors connect.

        Raises
        ------
        DesignError
            Normalised marginal residuals of more than 5,000 rows that are correlated with each
            other.

        Notes
        -----
        O(n), normalised ones O(Σ n_i³) over residual subjects or independent groups.

        References
        ----------
        Santos Nobre and da Motta Singer (2007). Residual analysis for linear mixed models.
        Biometrical Journal 49.

        Examples
        --------
        >>> import lmmjax as lmm
        >>> fit = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff")).fit()
        >>> float(fit.residuals("normalized", level="marginal").iloc[0])
        0.269
        """
        import pandas as pd

        from lmmjax.marginal import marginal_sd, whiten
        from lmmjax.residual.covariance import normalise, relative_sd

        _check_choice("kind", kind, ("response", "pearson", "normalized"))
        design, covs = self.model.design, self._term_covs()
        values = design.y - self.fitted(level).to_numpy()
        if kind == "normalized" and level == "marginal":
            values = whiten(design, covs, self.sigma, self.phi, values)
        elif kind != "response":
            sd = relative_sd(design.residual, self.phi, design.weights)
            marginal = level == "marginal"
            values = values / (
                marginal_sd(design, covs, self.sigma, sd) if marginal else self.sigma * sd
            )
            if kind == "normalized":
                values = normalise(design.residual, self.phi, values)
        return pd.Series(values, index=design.rows, name="residual")

    @in_float64
    def log_likelihood(self, kind: str = "conditional") -> pd.Series:
        r"""Log-likelihood at the estimates, by row given the random effects or by group without.

            conditional  log p(y_i | β̂, b̂, σ̂);   marginal  log N(y_g; X_g β̂, V_g)

        With correlated errors the term of a row is that given the other rows of its residual
        subject as well, log p(y_i | y_-i, β̂, b̂, σ̂), as leave-one-out wants it; such terms do not
        add up to a joint density.

        Parameters
        ----------
        kind : {"conditional", "marginal"}
            As :meth:`lmmjax.bayes.posterior.Posterior.log_likelihood`. The marginal ones, one for
            each level of the outermost grouping factor (or residual subject), add up to the
            log-likelihood at the estimates: ``Fit.loglik`` of a fit by ML.

        Raises
        ------
        DesignError
            ``kind="marginal"`` without a grouping factor, or with crossed ones.

        Notes
        -----
        O(n), by group O(J S³); O(Σ n_g³) with a residual structure.

        References
        ----------
        Bürkner, Gabry and Vehtari (2021). Efficient leave-one-out cross-validation for Bayesian
        non-factorized normal and Student-t models. Comput. Statist. 36.

        Examples
        --------
        >>> import lmmjax as lmm
        >>> model = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff"))
        >>> fit = model.fit(method="ML")
        >>> float(fit.log_likelihood("marginal").sum() - fit.loglik)
        0.0
        """
        import pandas as pd

        from lmmjax import pointwise

        _check_choice("kind", kind, LEVELS)
        design, sigma, phi = self.model.design, np.array([self.sigma]), self.phi[None]
        if kind == "conditional":
            values = pointwise.row_loglik(design, self.residuals().to_numpy()[None], sigma, phi)
            return pd.Series(values[0], index=design.rows, name="log_likelihood")
        factors = [self.sigma * lam[None] for lam in self.model._factors(self.theta)]
        by = pointwise.group_loglik(design, self._beta[None], sigma, factors, phi)
        index = pd.Index(by.levels, name=by.group)
        return pd.Series(by.values[0], index=index, name="log_likelihood")

    def predict(
        self,
        newdata: Any = None,
        kind: str = "conditional",
        interval: str | None = None,
        level: float = 0.95,
        new_levels: str = "raise",
        offset: Any = None,
    ) -> Any:
        """Predict the response.

        Parameters
        ----------
        newdata : table, optional
            The training rows by default.
        kind : {"conditional", "population", "next"}
            With the BLUPs of each row's levels, or with the fixed part alone. "next" adds the BLUP
            of the row's residual given those of its subject's rows (correlated residuals).
        interval : {"confidence", "prediction"}, optional
            Given: a frame ``estimate std_error low high``. The standard error carries the
            uncertainty of β (and of b, for conditional predictions) given θ; a prediction
            interval adds the variance of what is not conditioned on: that of a training row is
            σ²/w with its weight w, new rows have weight 1. t quantiles on n - p df for linear
            models, normal quantiles otherwise.
        new_levels : {"raise", "population"}
            What to do with levels that were not in the training data: an error, or effects of 0
            (with their full variance in an interval).
        offset : array, optional
            For models fitted with an offset array.

        Returns
        -------
        Series, or DataFrame with ``interval``, on the row labels of ``newdata``
        """
        from lmmjax.predict import predict

        return predict(self, newdata, kind, interval, level, new_levels, offset)

    @in_float64
    def _prediction_variance(self, rows: Rhs) -> np.ndarray:
        """Var / σ² of prediction errors for rows in standardised units (leading axis)."""
        layout = self.model._plan.layout
        theta = jnp.asarray(self._theta_s)
        variance = estimate.unscaled_prediction_variance(layout, theta, self._products[0], rows)
        return np.asarray(variance) / self._residual_sd**2

    def simulate(self, n: int = 1, seed: int = 0) -> pd.DataFrame:
        """Simulate responses from the fit, with new random effects and residuals: (n_obs, n)."""
        lams = self.model._factors(self.theta)
        return simulate(
            self.model.design, self._beta, lams, self.sigma, n=n, seed=seed, phi=self.phi
        )

    def marginal_cov(self, level: Any = None, group: str | None = None) -> MarginalCov:
        """V_i = Z_i D Z_i' + Σ_i of one subject, and its correlation matrix.

        Parameters
        ----------
        level : label, optional
            A level of ``group``; by default the first, as nlme's getVarCov.
        group : str, optional
            May be left out where the model has one grouping factor, or a nested hierarchy (then
            the outermost). The residual subjects count as a group.

        Raises
        ------
        DesignError
            For crossed groups, whose rows are correlated across the levels of any one factor.
        """
        from lmmjax.marginal import marginal_cov

        cov, corr = marginal_cov(
            self.model.design, self._term_covs(), self.sigma, level, group, self.phi
        )
        return MarginalCov(cov, corr)

    def hierarchical_counterpart(self) -> str | None:
        """Why no random intercept implies this marginal model, in words; None if correlations >= 0.

        Compound symmetry without random effects is judged; of other structures with negative
        correlations the text says that they were not.
        """
        from lmmjax.residual.checks import hierarchical_counterpart

        return hierarchical_counterpart(self)

    def residual_intervals(self, level: float = 0.95) -> pd.DataFrame:
        """Wald intervals of the residual parameters; see :mod:`lmmjax.residual.intervals`."""
        from lmmjax.residual.intervals import wald

        return wald(self, level)

    # -- resampling -----------------------------------------------------------------------------

    def bootstrap(self, n: int = 1000, seed: int = 0) -> Bootstrap:
        """Parametric bootstrap: simulate from the fit, refit every replicate in one batch.

        Parameters
        ----------
        n : int
            Replicates.
        seed : int
            The same seed gives the same numbers.

        Returns
        -------
        lmmjax.bootstrap.Bootstrap
            ``.replicates``, ``.confint(kind="percentile" | "studentized")``, ``.n_failed`` ...

        Notes
        -----
        Replicates are drawn as cross-products, exactly, at no cost in the number of rows. With
        residual parameters rows are simulated, and intervals include ``residual_params``.

        Examples
        --------
        >>> import lmmjax as lmm
        >>> fit = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff")).fit()
        >>> fit.bootstrap(200, seed=1).replicates.shape
        (200, 3)
        """
        from lmmjax.bootstrap import bootstrap

        return bootstrap(self, n, seed)

    # -- people ---------------------------------------------------------------------------------

    def summary(self) -> str:
        """The fit in words and tables, for people."""
        from lmmjax.display import fit_text

        return fit_text(self)

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        from lmmjax.display import fit_html

        return fit_html(self)


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    from scipy.linalg import block_diag

    return block_diag(*blocks)

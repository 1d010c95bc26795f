"""The inferential methods of a fit: thin, each asks one of the files beside this one."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from lmmjax import estimate
from lmmjax.errors import LmmError
from lmmjax.inference import hypothesis, variances
from lmmjax.inference import kenward_roger as kr
from lmmjax.inference.diagnostics import DiagnosticMethods
from lmmjax.inference.information import Tables
from lmmjax.inference.likelihood_methods import LikelihoodMethods
from lmmjax.inference.linear import Directions
from lmmjax.precision import in_float64
from lmmjax.tables import check_level

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.inference.containment import Containment
    from lmmjax.inference.robust import Sandwich
    from lmmjax.residual.source import Source


class InferenceMethods(LikelihoodMethods, DiagnosticMethods):
    """Tests, marginal means, variance shares and robust covariances of a :class:`lmmjax.Fit`.

    Wherever ``df=`` can be said it is one of ``"satterthwaite"``, ``"kenward-roger"`` (REML fits
    only; ``information="expected"`` as pbkrtest or ``"observed"`` as SAS), ``"residual"`` (n - p),
    ``"containment"`` (nlme's inner-outer rule, nested factors) and ``"wald"`` (infinite). It is by
    default that of the fit. Linear models have n - p degrees of freedom by every method but Wald,
    and standard errors with RSS/(n - p) by ML and REML: t and F are exact.
    """

    # -- coefficients -----------------------------------------------------------------------------

    def vcov(
        self,
        kind: str = "model",
        *,
        information: str | None = None,
        second_order: bool = True,
        group: Any = None,
        correction: str = "CR2",
    ) -> pd.DataFrame:
        """Covariance of the fixed effects, (p, p).

        Parameters
        ----------
        kind : {"model", "kenward-roger", "robust"}
            σ²(X'V⁻¹X)⁻¹ at the estimates, in linear models with σ² = RSS/(n - p) by ML too, so
            that t and F are exact (as ``lm`` and ``nlme::gls``); Kenward and Roger's adjustment of
            it (REML only); the sandwich by group.
        information : {"expected", "observed"}, optional
            For Kenward-Roger: as pbkrtest, or as SAS. Default: the fit's. They differ most in a
            singular fit: "expected" treats a variance estimated at 0 as uncertain (Dyestuff2: 5
            degrees of freedom), "observed" leaves it out as SAS and Satterthwaite do (29).
        second_order : bool
            For Kenward-Roger: include the second derivatives of V (SAS's default) or not (SAS's
            FIRSTORDER, mmrm's "Kenward-Roger-Linear"). They depend on the parametrisation, which is
            SAS's, and vanish where V is linear in variances and covariances: all structures of
            random terms but ``cs`` with own variances; of residuals ``cs toep symm un varident``
            (:mod:`lmmjax.residual.parameters`). mmrm's "Kenward-Roger" takes them in parameters of
            its own: the same df, standard errors 7e-5 apart (ar1 on its example data).
        group : str or array (n_obs,), optional
            For the sandwich: independent groups; by default the outermost grouping factor or
            residual subject, rows in a linear model.
        correction : {"CR0", "CR1", "CR2"}
            For the sandwich; CR2 is unbiased under the model.

        Raises
        ------
        LmmError
            Unknown names, or Kenward-Roger for an ML fit.

        Examples
        --------
        >>> import lmmjax as lmm
        >>> model = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff"))
        >>> float(model.fit().vcov("kenward-roger").iloc[0, 0])
        375.72...
        """
        import pandas as pd

        if kind == "model":
            V = self._fit._model_vcov
        elif kind == "kenward-roger":
            V = hypothesis.method(self._fit, "kenward-roger", information, second_order).vcov
        elif kind == "robust":
            V = self._sandwich(group, correction).vcov
        else:
            raise LmmError(
                f"vcov(kind={kind!r}) is unknown; expected 'model', 'kenward-roger' or 'robust'."
            )
        names = list(self._fit.model.design.x_names)
        return pd.DataFrame(V, index=names, columns=names)

    def coef_table(
        self,
        df: str | None = None,
        level: float = 0.95,
        *,
        information: str | None = None,
        second_order: bool = True,
        vcov: str | None = None,
        group: Any = None,
        correction: str = "CR2",
    ) -> pd.DataFrame:
        """Estimates, standard errors, degrees of freedom, tests and intervals per coefficient.

        Parameters
        ----------
        df : str, optional
            Degrees of freedom, see the class; "kenward-roger" takes its adjusted standard errors.
        level : float
            Of the confidence intervals.
        information, second_order
            Of Kenward-Roger, see :meth:`vcov`.
        vcov : {"robust"}, optional
            Sandwich standard errors by ``group`` with Bell and McCaffrey's degrees of freedom (or
            infinite ones with ``df="wald"``).

        Returns
        -------
        DataFrame
            Columns ``estimate std_error df statistic p_value ci_low ci_high``; ``attrs["note"]``
            where another method stands in: residual for containment without grouping factors.
        """
        fit = self._fit
        p, names = len(fit._beta), list(fit.model.design.x_names)
        m = self._method(df, information, second_order, vcov, group, correction)
        table = hypothesis.t_table(m, np.eye(p), np.zeros(p), names, level)
        if df == "containment" and m.name == "residual":
            table.attrs["note"] = "containment without grouping factors: as residual"
        return table

    def _method(
        self,
        df: str | None,
        information: str | None,
        second_order: bool,
        vcov: str | None,
        group: Any,
        correction: str,
    ) -> hypothesis.Method:
        if vcov not in (None, "model", "robust"):
            raise LmmError(f"vcov={vcov!r} is unknown; expected 'model' or 'robust'.")
        if vcov == "robust":
            return self._robust_method(df, group, correction)
        return hypothesis.method(self._fit, df, information, second_order)

    def _robust_method(self, df: str | None, group: Any, correction: str) -> hypothesis.Method:
        s = self._sandwich(group, correction)
        if df not in (None, "wald"):
            raise LmmError(
                f"df={df!r} does not go with vcov='robust', which has Bell and McCaffrey's; leave "
                "it out, or give 'wald'."
            )

        def degrees(L: np.ndarray) -> np.ndarray:
            return np.full(len(L), np.inf) if df == "wald" else s.degrees(L)

        def joint(L: np.ndarray) -> tuple[float, float]:
            return (np.inf, 1.0) if df == "wald" else s.joint(L)

        return hypothesis.Method("robust", self._fit._beta, s.vcov, degrees, joint, s.check)

    # -- hypotheses -------------------------------------------------------------------------------

    def test(
        self,
        L: Any,
        rhs: Any = 0.0,
        df: str | None = None,
        joint: bool = True,
        *,
        information: str | None = None,
        second_order: bool = True,
        level: float = 0.95,
        vcov: str | None = None,
        group: Any = None,
        correction: str = "CR2",
    ) -> pd.DataFrame:
        """Test linear hypotheses Lβ = rhs about the fixed effects.

        Parameters
        ----------
        L : array (r, p) or (p,), DataFrame, Series, dict, str or list of these
            A matrix, with the columns of ``beta``, or of all columns with the aliased ones (then
            each row must be estimable). A frame, a Series or a dict with text labels is read by
            them, whatever their order, coefficients without a label having weight 0:
            ``{"MachineB": 1, "MachineC": -1}``; without labels by position. Or words:
            ``"Days = 10"``, ``"MachineB - MachineC = 0, MachineB = 8"``.
        rhs : float or array (r,)
            Right-hand sides, for a matrix.
        df, information, second_order
            See the class and :meth:`vcov`.
        joint : bool
            One F test of all rows, or a t test a row.
        level : float
            Of the intervals with ``joint=False``.
        vcov, group, correction
            As :meth:`coef_table`; several rows by the approximate Hotelling T² of Pustejovsky and
            Tipton (2018), HTZ in clubSandwich.

        Returns
        -------
        DataFrame
            ``num_df den_df statistic p_value scaling`` (scaling λ of Kenward-Roger is contained in
            the statistic), or the columns of :meth:`coef_table`.

        Raises
        ------
        LmmError
            Unknown or aliased coefficients, wrong shapes, rows that contradict each other.
        """
        from lmmjax.inference.estimable import hypotheses

        h = hypotheses(self._fit.model.design, L, rhs)
        m = self._method(df, information, second_order, vcov, group, correction)
        if not joint:
            return hypothesis.t_table(m, h.L, h.rhs, h.names, level)
        return hypothesis.f_frame({"; ".join(h.names): m.f_test(h.L, h.rhs)}, scaling=True)

    def tests(
        self, parm: str, *, level: float = 0.95, n: int = 1000, seed: int = 0
    ) -> pd.DataFrame:
        """Test one coefficient against 0 by every method, side by side.

        Parameters
        ----------
        parm : str
            Name of a fixed effect.
        level : float
            Of the intervals.
        n, seed : int
            Replicates of the parametric bootstrap, and its seed.

        Returns
        -------
        DataFrame
            Index ``method``: Wald z, residual, containment, Satterthwaite and Kenward-Roger
            (expected and observed information) t, robust CR2, the likelihood ratio (ML refits), the
            profile likelihood, the bootstrap. Columns ``estimate std_error df statistic p_value
            ci_low ci_high note``; a method that cannot be had is a row of NaN whose note says why.

        Notes
        -----
        Two ML refits, a profile and ``n`` refits in one batch.

        Examples
        --------
        >>> import lmmjax as lmm
        >>> fit = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff")).fit()
        >>> fit.tests("(Intercept)", n=200)["ci_low"].round(0).iloc[[0, 1, 3]].tolist()
        [1490.0, 1488.0, 1478.0]
        """
        from lmmjax.inference.side_by_side import side_by_side

        return side_by_side(self._fit, parm, level, n, seed)

    def anova(
        self,
        type: int | str = 3,
        df: str | None = None,
        *,
        information: str | None = None,
        second_order: bool = True,
        vcov: str | None = None,
        group: Any = None,
        correction: str = "CR2",
    ) -> pd.DataFrame:
        """F tests of the fixed terms.

        Parameters
        ----------
        type : {1, 2, 3}
            Sequential; adjusted for all terms that do not contain the term; marginal, as with
            sum-to-zero coding whatever the contrasts in use. Type III is free of the coding,
            Satterthwaite's ``den_df`` included, which are lmerTest's; of types I and II F is.
        df, information, second_order
            See the class and :meth:`vcov`.
        vcov, group, correction
            As :meth:`test`.

        Returns
        -------
        DataFrame
            Index term; ``sum_sq mean_sq num_df den_df statistic p_value``. In mixed models mean_sq
            is F σ² (as lmerTest); Kenward-Roger's scaling is in the statistic, not in it.

        Warns
        -----
        EstimabilityWarning
            Where columns are aliased, by empty cells for instance.
        """
        from lmmjax.inference import anova

        fit = self._fit
        m = self._method(df, information, second_order, vcov, group, correction)
        by_term = anova.hypotheses(fit, type)
        tests = {t: m.f_test(L, np.zeros(len(L))) for t, L in by_term.items()}
        if m.name == "containment":
            own = dict(zip(fit.model.design.x_terms, fit._containment.terms, strict=True))
            tests = {
                t: f._replace(
                    den_df=own[t], p_value=hypothesis.f_tail(f.statistic, f.num_df, own[t])
                )
                for t, f in tests.items()
            }
        table = hypothesis.f_frame(tests)
        mean = np.array([t.statistic / t.scaling for t in tests.values()]) * fit._sigma2
        table.insert(0, "mean_sq", mean.astype(float))
        table.insert(0, "sum_sq", table["mean_sq"] * table["num_df"])
        return table.rename_axis("term")

    # -- marginal means -------------------------------------------------------------------------

    def emmeans(
        self,
        specs: Any,
        by: Any = None,
        weights: str = "equal",
        df: str | None = None,
        *,
        at: Mapping[str, Any] | None = None,
        level: float = 0.95,
        information: str | None = None,
        second_order: bool = True,
        vcov: str | None = None,
        group: Any = None,
        correction: str = "CR2",
    ) -> pd.DataFrame:
        """Estimated marginal means of factors.

        Parameters
        ----------
        specs, by : str or list of str
            Factors of the fixed part; the means are given for each combination, ``by`` last.
        weights : {"equal", "proportional"}
            How the other factors' levels are averaged: alike, or by their frequency in the data.
        df, information, second_order
            See the class and :meth:`vcov`.
        at : dict, optional
            Values of covariates (their means by default) or levels of factors.
        level : float
        vcov, group, correction
            As :meth:`coef_table`.

        Returns
        -------
        DataFrame
            A column per factor, then ``emmean std_error df ci_low ci_high``; a mean offset of the
            model is included. ``attrs["note"]`` names what is averaged over though it interacts.

        Warns
        -----
        EstimabilityWarning
            Means that need an empty cell are NaN.
        """
        from lmmjax.inference import means

        m = self._method(df, information, second_order, vcov, group, correction)
        design = self._fit.model.design
        names = (*means.names_of(specs), *means.names_of(by))
        c = means.averages(design, names, weights, at)
        out = means.frame(m, design, c, "emmean", float(np.mean(design.offset)), level)
        return means.noted(out, means.interaction_note(design, names, at))

    def emtrends(
        self,
        var: str,
        by: Any = None,
        weights: str = "equal",
        df: str | None = None,
        *,
        at: Mapping[str, Any] | None = None,
        level: float = 0.95,
        information: str | None = None,
        second_order: bool = True,
        vcov: str | None = None,
        group: Any = None,
        correction: str = "CR2",
    ) -> pd.DataFrame:
        """Slopes in a covariate for each level of ``by``, at the other covariates' means.

        Returns
        -------
        DataFrame
            A column per factor, then ``<var>.trend std_error df ci_low ci_high``. Options as
            :meth:`emmeans`.
        """
        from lmmjax.inference import means

        m = self._method(df, information, second_order, vcov, group, correction)
        design, names = self._fit.model.design, means.names_of(by)
        c = means.trends(design, var, names, weights, at)
        out = means.frame(m, design, c, f"{var}.trend", 0.0, level)
        return means.noted(out, means.interaction_note(design, names, at, var))

    def contrasts(
        self,
        specs: Any,
        method: str | Mapping[str, Sequence[float]] = "pairwise",
        adjust: str | None = None,
        by: Any = None,
        df: str | None = None,
        *,
        trend: str | None = None,
        weights: str = "equal",
        at: Mapping[str, Any] | None = None,
        information: str | None = None,
        second_order: bool = True,
        seed: int = 0,
        ref: Any = None,
        level: float | None = None,
        vcov: str | None = None,
        group: Any = None,
        correction: str = "CR2",
    ) -> pd.DataFrame:
        """Contrasts of marginal means, or of trends.

        Parameters
        ----------
        specs, by : str or list of str
            Factors whose means are compared; separately for each combination of ``by``.
        method : {"pairwise", "trt.vs.ctrl", "control", "poly"} or dict
            All pairs; each level against the first (two names); orthogonal polynomials with whole
            coefficients; or ``{"label": weights}``.
        adjust : {"tukey", "dunnett", "mvt", "holm", "bonferroni", "bh" or "fdr", "none"}, optional
            Within each family. Default: Tukey for pairs, Holm against a control, else none. "mvt"
            is the single-step adjustment of any family by its multivariate t distribution (exact
            but for integration: its error is in ``attrs["mc_se"]``); "dunnett" the same for
            comparisons with a control (emmeans calls ``dunnettx`` an approximation of it).
        seed : int
            Of that integration.
        ref : str, optional
            The control of ``method="control"`` if it is not the first level.
        trend : str, optional
            Compare slopes in this covariate instead of means.
        level : float, optional
            Given: the limits ``ci_low ci_high`` of intervals that hold together at this level in
            each family: Tukey's by the studentized range, "dunnett" and "mvt" by their equal
            quantile, Bonferroni's; "holm" and "bh" have none of their own and take Bonferroni's (as
            emmeans; ``attrs["note"]`` says so); with "none" each interval has the level itself.
        df, information, second_order, weights, at, vcov, group, correction
            As :meth:`emmeans`.

        Returns
        -------
        DataFrame
            ``contrast``, the columns of ``by``, ``estimate std_error df statistic p_value`` and
            with ``level`` the limits. ``attrs["note"]`` names what is averaged over though it
            interacts.

        Warns
        -----
        EstimabilityWarning
            Contrasts that the data do not determine are NaN.

        Notes
        -----
        A quantile of Tukey's takes 0.1 s for each different number of degrees of freedom.
        """
        from lmmjax.inference import means

        if level is not None:
            check_level(level)
        m = self._method(df, information, second_order, vcov, group, correction)
        design, conditions = self._fit.model.design, means.names_of(by)
        names = (*means.names_of(specs), *conditions)
        if trend is None:
            c = means.averages(design, names, weights, at)
        else:
            c = means.trends(design, trend, names, weights, at)
        out = means.compare(m, design, c, len(conditions), method, adjust, seed, ref, level)
        return means.noted(out, means.interaction_note(design, names, at, trend))

    # -- variances --------------------------------------------------------------------------------

    def variance_tests(self) -> pd.DataFrame:
        """Wald tests of the variance components and the residual parameters.

        Returns
        -------
        DataFrame
            ``group term1 term2 estimate std_error statistic p_value caveat``, rows as
            :meth:`lmmjax.Fit.varcorr`: variances (one-sided) and covariances (two-sided) with SEs
            from the observed information. On the boundary z and p are NaN, and the caveat says so.
            Then :meth:`lmmjax.Fit.residual_params` under ``term1``, two-sided on the scale that the
            caveat names: no correlation, equal SDs, δ = 0; NaN where the null is no inner point.
        """
        from lmmjax.inference.components import wald

        return wald(self._fit)

    def variance_partition(self) -> pd.DataFrame:
        """Shares of the variance of a row: fixed part, each grouping factor, residual.

        With unequal residual variances the residual's is their mean over the rows.

        Returns
        -------
        DataFrame
            Index ``source``; ``variance proportion``. Random slopes count by their mean over rows.
        """
        import pandas as pd

        from lmmjax.inference.explained import shares

        fixed, random, residual = shares(self._fit)
        variance = pd.Series({"Fixed": fixed, **random, "Residual": residual}, name="variance")
        table = pd.DataFrame({"variance": variance, "proportion": variance / variance.sum()})
        return table.rename_axis("source")

    def r2(self) -> pd.Series:
        """Nakagawa's R²: ``marginal`` (fixed part) and ``conditional`` (with random effects)."""
        import pandas as pd

        from lmmjax.inference.explained import shares

        fixed, random, residual = shares(self._fit)
        total = fixed + sum(random.values()) + residual
        both = (fixed / total, (fixed + sum(random.values())) / total)
        return pd.Series(both, index=["marginal", "conditional"], name="r2")

    def icc(self) -> pd.Series:
        """Intraclass correlation: ``adjusted`` for, and ``unadjusted`` for, the fixed part."""
        import pandas as pd

        from lmmjax.inference.explained import intraclass

        return pd.Series(intraclass(self._fit), index=["adjusted", "unadjusted"], name="icc")

    # -- what the methods share -------------------------------------------------------------------

    def _satterthwaite(self, L: np.ndarray) -> np.ndarray:
        """Satterthwaite df of each row of L β; see :func:`lmmjax.satterthwaite.degrees`."""
        from lmmjax.satterthwaite import degrees

        fit = self._fit
        V, dV = self._vcov_derivative
        nu = fit.n_obs - (len(fit._beta) if fit.method == "REML" else 0)
        return degrees(L, V, dV, fit._hessian_s, float(nu))

    @cached_property
    @in_float64
    def _vcov_derivative(self) -> tuple[np.ndarray, np.ndarray]:
        fit = self._fit
        layout = fit.model._plan.layout
        if fit.model.is_structured:
            from lmmjax.residual import program

            free = jnp.asarray(np.concatenate([fit._theta_s, fit.phi]))
            V, dV = program.vcov_and_derivative(layout, fit.method, free, fit.model._prepared[2])
        else:
            V, dV = estimate.vcov_and_derivative(
                layout, fit.method, jnp.asarray(fit._theta_s), *fit._products
            )
        units = fit.model._units
        back = units.scale * units.A
        return back @ np.asarray(V) @ back.T, np.einsum(
            "ia,abk,jb->ijk", back, np.asarray(dV), back
        )

    @cached_property
    def _containment(self) -> Containment:
        from lmmjax.inference.containment import containment

        return containment(self._fit.model.design)

    @cached_property
    def _residual_source(self) -> Source | None:
        return variances.source(self._fit)

    @cached_property
    def _variance_tables(self) -> tuple[kr.Extended, Directions, float]:
        """Tables for (V, ω, φ), the directions, and σ̂², all in standardised units."""
        return variances.variance_tables(self._fit)

    @cached_property
    def _second_tables(self) -> Tables | None:
        """Tables for the directions ∂²Σ/∂ω_i∂ω_j; None where Σ is linear in ω."""
        return variances.second_tables(self._fit)

    @cached_property
    def _adjustments(self) -> dict[tuple[str, bool], kr.Adjustment]:
        return {}

    def _kenward_roger(self, information: str, second_order: bool) -> kr.Adjustment:
        """The adjustment in the units of the data, made once for each choice."""
        key = (information, second_order)
        if key not in self._adjustments:
            fit, (e, _, sigma2) = self._fit, self._variance_tables
            W = variances.covariance(fit, information)
            curved = functools.partial(variances.second_order, fit) if second_order else None
            units = fit.model._units
            a = kr.adjust(e, sigma2, W, curved)
            self._adjustments[key] = kr.change_units(a, units.scale * units.A)
        return self._adjustments[key]

    def _sandwich(self, group: Any, correction: str) -> Sandwich:
        from lmmjax.inference.robust import sandwich

        return sandwich(self._fit, group, correction)

"""The methods of a fit that rest on its likelihood elsewhere than at the optimum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit


class LikelihoodMethods:
    """Intervals, profiles, tests of random terms and conditional AIC of a :class:`lmmjax.Fit`."""

    @property
    def _fit(self) -> Fit:
        return cast("Fit", self)

    # -- intervals --------------------------------------------------------------------------------

    def confint(
        self,
        method: str = "wald",
        level: float = 0.95,
        parm: Any = None,
        *,
        criterion: str | None = None,
        n: int = 1000,
        seed: int = 0,
        kind: str | None = None,
        df: str | None = None,
        information: str | None = None,
        second_order: bool = True,
    ) -> pd.DataFrame:
        """Confidence intervals of variance parameters and fixed effects.

        Parameters
        ----------
        method : {"wald", "profile", "bootstrap"}
            Wald: t intervals of β, variance parameters on the log or Fisher-z scale (NaN where the
            fit is singular), residual parameters as :meth:`lmmjax.Fit.residual_intervals`. Profile
            likelihood: right at boundaries, an SD's interval may begin at 0. Parametric bootstrap.
        level : float
        parm : str or list of str, optional
            Parameters, by name; "beta_" or "theta_" for all fixed effects or all variance
            parameters. All by default.
        criterion : {"ML", "REML"}, optional
            Profiled for variance parameters; default: that of the fit. Fixed effects are always
            profiled by ML, as REML integrates them out; ``attrs["note"]`` says so.
        n, seed, kind
            Of the bootstrap; kind "percentile" (default) or "studentized".
        df, information, second_order
            Of Wald intervals of β, as :meth:`lmmjax.Fit.coef_table`.

        Returns
        -------
        DataFrame
            ``estimate low high`` under lme4's names: ``sd_(Intercept)|Subject``,
            ``cor_Days.(Intercept)|Subject``, ``sigma``, residual parameters, fixed effects.
            Estimates are those of the fit; with another ``criterion``, variance parameters are its
            optimum.

        Raises
        ------
        LmmError
            Unknown names; options of another method than the one asked for.

        Notes
        -----
        A limit of a profile costs about ten fits of the other parameters, with a Hessian by
        automatic differentiation; for crossed factors whose dense core has more than 300 columns
        with a Hessian now and then. A core of 1,000 columns takes seconds a parameter, one of d
        columns (d/1,000)³ times as long (minutes at 3,000); choose parameters by ``parm``. With
        three nested factors or more beside such a core, or a residual structure, gradients are
        automatic and several times slower.

        Examples
        --------
        >>> import lmmjax as lmm
        >>> model = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff"))
        >>> model.fit(method="ML").confint("profile", parm="sigma").round(2).iloc[0].tolist()
        [49.51, 38.23, 67.66]
        """
        from lmmjax.inference.intervals import confint

        beta = {"df": df, "information": information, "second_order": second_order}
        return confint(self._fit, method, level, parm, criterion, n, seed, kind, beta)

    def profile(
        self,
        parm: Any = None,
        *,
        criterion: str | None = None,
        level: float = 0.99,
        points: int = 21,
    ) -> pd.DataFrame:
        """Profile likelihoods for plotting: ζ against the parameter (a straight line if normal).

        Parameters
        ----------
        parm, criterion
            As for :meth:`confint`.
        level : float
            The values span the interval of this level.
        points : int
            Values for each parameter, equally spaced.

        Returns
        -------
        DataFrame
            ``parameter value zeta``, ζ = sign(v - v̂) √(excess of -2 log L over its minimum).
        """
        from lmmjax.inference.intervals import curves

        return curves(self._fit, parm, criterion, level, points)

    # -- random terms -----------------------------------------------------------------------------

    def ranova(self, method: str = "chi2", *, n: int | None = None, seed: int = 0) -> pd.DataFrame:
        """Likelihood-ratio tests of the random terms, each dropped in turn.

        Parameters
        ----------
        method : {"chi2", "mixture", "bootstrap", "exact"}
            Null distribution, see :func:`lmmjax.lrt`; chi2 is conservative (as lmerTest).
        n, seed
            Of simulated null distributions.

        Returns
        -------
        DataFrame
            Index ``<none>`` (the fit), then ``(1 | g)`` for terms that are dropped and
            ``x in (x | g)`` for those that lose a variable; ``n_params loglik aic statistic df
            p_value note``. Where ``method`` does not apply to a row its p-value is NaN and the note
            says why.

        Raises
        ------
        ComparisonError
            No random term, a streamed table, or a method that applies to none of the rows.

        Examples
        --------
        >>> import lmmjax as lmm
        >>> model = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff"))
        >>> model.fit().ranova("mixture")["p_value"].round(4).tolist()
        [nan, 0.0058]
        """
        from lmmjax.inference.ranova import ranova

        return ranova(self._fit, method, n, seed)

    def caic(self) -> pd.Series:
        """Conditional AIC: ``caic loglik df``, for questions about these very groups.

        ``loglik`` is log N(y; Xβ̂ + Zb̂, σ̂²R̂); ``df`` = 1 + tr(∂ŷ/∂y), the estimation of θ and of the
        residual parameters included (Greven and Kneib 2010), also for singular fits. Each residual
        parameter that the data determine adds 1, as σ does (inference/conditional.py): for known R
        the trace is the exact penalty, and an estimated parameter of R costs 1 to first order.
        Without random effects the conditional likelihood is the marginal one, at Xβ̂.

        Notes
        -----
        cAIC4 1.0 halves one of the terms, so its df differ somewhat. From cross-products: nothing
        in the number of rows, except where a residual structure needs them.

        Examples
        --------
        >>> import lmmjax as lmm
        >>> lmm.Model("Yield ~ 1", lmm.load_dataset("Dyestuff")).fit().caic()["df"].item()
        2.0
        """
        from lmmjax.inference.conditional import caic

        return caic(self._fit)

"""The model: formula and data stated once, to be fitted by likelihood or sampled."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax import blocks, buckets, derivatives, gram, start
from lmmjax import likelihood as lk
from lmmjax.collapse import collapse
from lmmjax.design import Design, build_design
from lmmjax.errors import DataError, DesignError, LmmError
from lmmjax.gram import Gram, Layout, Rhs
from lmmjax.precision import require_float64
from lmmjax.residual.language import ResidualSpec, parse_residual
from lmmjax.texts import given

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.bayes.posterior import Posterior
    from lmmjax.fit import Fit
    from lmmjax.residual.source import Source

METHODS = ("ML", "REML")

#: from this many levels on, a fit looks for levels with equal blocks
MANY_LEVELS = 1000


def check_method(method: str) -> str:
    """Normalise "reml" / "REML" and refuse anything else."""
    if not isinstance(method, str) or method.upper() not in METHODS:
        raise LmmError(f"method={method!r} is unknown; expected 'REML' or 'ML'.")
    return method.upper()


class Model:
    """A linear mixed model y = Xβ + Zb + ε, b ~ N(0, D), ε ~ N(0, Σ), for one data set.

    Parameters
    ----------
    formula : str
        R and lme4 syntax: ``"Reaction ~ Days + (Days | Subject)"``. Without bars a linear model.
        Formulas are evaluated as code; see ``safe``.
    data : DataFrame
        Any table that narwhals knows (pandas, polars, pyarrow ...). It is not changed.
    residual : str, optional
        Structure of the residuals, for example ``"ar1(day | id) * varident(diet)"``; None means
        independent with equal variances. See :func:`lmmjax.residual.language.parse_residual`.
        ``"varfixed(v)"`` is Var(ε_i) = σ² v_i, ``v`` a column or an expression such as ``1/w``.
    weights : str or array, shape (rows,), optional
        Precision weights, Var(ε_i) = σ²/w_i; a column name or an array by row. A pandas series
        whose index contradicts that of the data is refused.
    offset : str or array, shape (rows,), optional
        Known part of the mean; adds to any ``offset(x)`` in the formula.
    contrasts : dict, optional
        ``{"f": "treatment" | "sum" | "helmert" | "poly"}``; default as R: treatment for factors,
        polynomial for ordered ones.
    missing : {"drop", "raise"}
        Drop rows with missing values in any variable used (and count them), or raise.
    safe : bool
        Accept only a fixed list of functions in the formula, for text from untrusted sources.
    dtype : {"float64", "float32"}
        Precision of the arithmetic; float32 loses digits and is for accelerators and study.

    Raises
    ------
    FormulaError, DataError, DesignError
        Each says what was found, what was expected and what to do.

    Notes
    -----
    Building costs one pass over the rows: O(n (p + S + d)²) at worst. What is fitted afterwards no
    longer depends on n.

    References
    ----------
    Bates, Maechler, Bolker and Walker (2015). Fitting linear mixed-effects models using lme4.
    J. Stat. Soft. 67(1).

    Examples
    --------
    >>> import lmmjax as lmm
    >>> model = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff"))
    >>> model.n_obs, model.groups
    (30, {'Batch': 6})
    """

    def __init__(
        self,
        formula: str,
        data: Any,
        *,
        residual: str | None = None,
        weights: Any = None,
        offset: Any = None,
        contrasts: dict[str, str] | None = None,
        missing: str = "drop",
        safe: bool = False,
        dtype: str = "float64",
    ) -> None:
        if dtype not in ("float64", "float32"):
            raise DataError(f"dtype={dtype!r} is unknown; expected 'float64' or 'float32'.")
        self.formula = formula
        self.residual = residual
        self.dtype = dtype
        spec = None if residual is None else parse_residual(residual)
        self.design: Design = build_design(
            formula,
            data,
            residual=spec,
            weights=known_variances(spec, weights),
            offset=offset,
            contrasts=contrasts,
            missing=missing,
            safe=safe,
        )

    @classmethod
    def from_table(
        cls,
        formula: str,
        source: Any,
        *,
        residual: str | None = None,
        weights: str | None = None,
        offset: str | None = None,
        contrasts: dict[str, str] | None = None,
        missing: str = "drop",
        safe: bool = False,
        dtype: str = "float64",
    ) -> Model:
        """Build the model of a table larger than memory: two passes, bounded memory.

        Parameters
        ----------
        formula, residual, contrasts, missing, safe, dtype
            As for `Model`.
        source : object
            Path, pattern or list of paths of Parquet files; DuckDB relation; pyarrow dataset;
            polars lazy frame; Spark frame; or anything with an Arrow C stream that can be read
            twice.
        weights, offset : str, optional
            A column or an expression of columns.

        Returns
        -------
        Model
            The same as in memory, without the rows: ``fitted``, ``residuals`` and ``simulate``
            raise, `Fit.predict` needs ``newdata``.

        Raises
        ------
        FormulaError, DataError, DesignError

        Notes
        -----
        Each step of transforms upon transforms (``poly(scale(x), 2)``) costs one more pass, and so
        do nearly dependent columns of X. Transforms that learn (``scale``, ``poly``, ``bs`` ...)
        spool their argument to a temporary file, 8 bytes a row.

        Examples
        --------
        >>> import lmmjax as lmm, pyarrow as pa
        >>> table = pa.Table.from_pandas(lmm.load_dataset("Dyestuff"))
        >>> lmm.Model.from_table("Yield ~ 1 + (1 | Batch)", table).groups
        {'Batch': 6}
        """
        from lmmjax.stream import build_streamed

        if dtype not in ("float64", "float32"):
            raise DataError(f"dtype={dtype!r} is unknown; expected 'float64' or 'float32'.")
        spec = None if residual is None else parse_residual(residual)
        if spec is not None and spec.structured:
            raise DesignError(
                f"residual={residual!r} needs the rows of a subject together; expected None or "
                '"varfixed(v)" for a table that is streamed. Use Model(formula, data) for it.'
            )
        model = cls.__new__(cls)
        model.formula, model.residual, model.dtype = formula, residual, dtype
        design, standard = build_streamed(
            formula,
            source,
            weights=known_variances(spec, weights),
            offset=offset,
            contrasts=contrasts,
            missing=missing,
            safe=safe,
        )
        model.design = design  # type: ignore[assignment]
        model.__dict__["_prepared"] = (*standard[:2], standard[2:])
        return model

    # -- what it is ---------------------------------------------------------------------------

    @property
    def n_obs(self) -> int:
        """Number of rows used."""
        return self.design.n

    @property
    def n_dropped(self) -> int:
        """Number of rows dropped for missing values."""
        return self.design.n_dropped

    @property
    def rows(self) -> pd.Index:
        """The caller's labels of the rows used."""
        return self.design.rows

    @property
    def groups(self) -> dict[str, int]:
        """Grouping factors and their numbers of levels, in formula order."""
        return {t.group: len(given(t, "levels")) for t in self.design.terms}

    @property
    def engine(self) -> str:
        """How the likelihood is computed for these data, in words: chosen by count."""
        return self._plan.words()

    @property
    def is_mixed(self) -> bool:
        """Whether the model has random effects."""
        return bool(self.design.terms)

    @property
    def is_linear(self) -> bool:
        """Whether σ is the only variance parameter: an ordinary (or weighted) linear model."""
        return not self.is_mixed and not self.is_structured

    @property
    def is_structured(self) -> bool:
        """Whether residual parameters beside σ are to be estimated."""
        return self.design.residual is not None

    @property
    def theta_names(self) -> list[str]:
        """Names of θ: lower triangles of the relative factors, terms in formula order (lme4)."""
        names = []
        for term, structure in zip(self.design.terms, self._plan.layout.structures, strict=True):
            names += [f"{term.group}.{x}" for x in structure.theta_names(term.names)]
        return names

    @property
    def phi_names(self) -> list[str]:
        """Names of the residual parameters φ; empty for independent residuals."""
        return self.design.residual.structure.names if self.design.residual is not None else []

    @property
    def theta0(self) -> np.ndarray:
        """The start of the optimisation as :meth:`deviance` takes it: θ in the units of the data,
        then the free residual parameters φ, if any; shape (n_theta + n_phi,).

        Variances of the random effects by the method of moments (MINQUE(0)), kept away from 0.
        """
        theta_s, phi = np.split(self._start, [self._plan.layout.n_theta])
        return np.concatenate([self._theta_public(theta_s), phi])

    # -- the pieces of the likelihood -----------------------------------------------------------

    @cached_property
    def _prepared(self) -> tuple[gram.Plan, gram.Units, tuple[Gram, Rhs] | Source]:
        the_plan = self._plan
        structured = self.design.residual is not None
        found = None if structured else blocks.products(self.design, the_plan)
        if found is not None:
            return the_plan, found[0], found[1:]
        standardised = gram.standardise(self.design)
        if not structured:
            sums = gram.crossproducts(self.design, the_plan, standardised)
            self.design.release()
            return the_plan, standardised.units, sums
        from lmmjax.residual.setup import make_source

        source = make_source(self.design, the_plan, standardised)
        return the_plan, standardised.units, source

    @property
    def _standard(self) -> tuple[gram.Plan, gram.Units, Gram, Rhs]:
        the_plan, units, products = self._prepared
        if self.design.residual is not None:
            raise LmmError(
                f"the residual structure {self.residual} makes the cross-products depend on its "
                "parameters, and what was asked for expects independent residuals; it is not "
                "available for this model. Leave out residual=, or use model.fit()."
            )
        assert isinstance(products, tuple)
        return the_plan, units, *products

    @cached_property
    def _start(self) -> np.ndarray:
        """Start in standardised units: θ, then φ."""
        if self.is_structured:
            return np.append(start.identity(self._plan.layout), self._source().start())
        return start.moments(self._plan.layout, *self._standard[2:])

    @cached_property
    def _device_start(self) -> jax.Array:
        """:attr:`_start`, where a fit begins; as ``_on_device``."""
        return jnp.asarray(self._start, self.dtype)

    @cached_property
    def _on_device(self) -> tuple[Gram, Rhs]:
        """:meth:`_arrays` as JAX arrays; for use inside ``float64()`` only."""
        return jax.tree.map(jnp.asarray, self._arrays())

    @cached_property
    def _padded(self) -> tuple[Layout, Gram, Rhs]:
        """What is fitted: levels with equal blocks collapsed where they are many (collapse.py),
        shapes rounded up to buckets (buckets.py); as ``_on_device``."""
        layout, (the_gram, rhs) = self._plan.layout, self._standard[2:]
        if layout.d == 0 and layout.chain and layout.chain[0][2] >= MANY_LEVELS:
            small = collapse(layout, the_gram)
            if small is not None:
                layout, the_gram, rhs = small.layout, small.gram, small.rhs(rhs)
        to, the_gram, rhs = buckets.pad(layout, *self._cast((the_gram, rhs)))
        if to == self._plan.layout:
            return (to, *self._on_device)
        # nobody else has these arrays, so JAX may use their memory
        return (to, *jax.tree.map(jax.device_put, (the_gram, rhs)))

    @cached_property
    def _fitted_arrays(self) -> dict[str, tuple[Layout, Gram, Rhs]]:
        """:attr:`_padded` by method: what n counts depends on it (buckets.py)."""
        layout, the_gram, rhs = self._padded
        dummies = layout.p - self.design.p
        return {m: (layout, buckets.with_dummies(the_gram, dummies, m), rhs) for m in METHODS}

    def __getstate__(self) -> dict[str, Any]:
        arrays = ("_device_start", "_on_device", "_padded", "_fitted_arrays")
        return {k: v for k, v in self.__dict__.items() if k not in arrays}

    @cached_property
    def _x_index(self) -> pd.Index:
        """Names of the fixed effects."""
        import pandas as pd

        return pd.Index(self.design.x_names, dtype=object)

    @cached_property
    def _plan(self) -> gram.Plan:
        """Order of elimination; it needs no products."""
        made = self.__dict__.get("_prepared")
        return gram.plan(self.design) if made is None else made[0]

    @property
    def _units(self) -> gram.Units:
        return self._prepared[1]

    def _cast(self, arrays: Any) -> Any:
        """Arrays in the model's precision (integers stay integers)."""
        if self.dtype == "float64":
            return arrays
        cast = lambda a: a.astype(np.float32) if a.dtype == np.float64 else a  # noqa: E731
        return jax.tree.map(cast, arrays)

    def _arrays(self) -> tuple[Gram, Rhs]:
        """Constant cross-products in the model's precision."""
        return self._cast(self._standard[2:])

    def _source(self) -> Source:
        """Cross-products that depend on φ, in the model's precision."""
        return self._cast(self._prepared[2])

    def _theta_public(self, theta_s: np.ndarray, sd: float = 1.0) -> np.ndarray:
        """θ of the standardised problem -> θ in the units of the data, relative to σ.

        ``sd`` is S of the row that σ refers to, where the residual variances are unequal.
        """
        pieces = []
        for lam, B, s in zip(
            self._factors(theta_s), self._units.B, self._plan.layout.structures, strict=True
        ):
            pieces.append(s.from_factor(B @ lam / sd))
        return np.concatenate([np.zeros(0), *pieces])

    def _theta_standard(self, theta: np.ndarray) -> np.ndarray:
        """θ in the units of the data -> θ of the standardised problem."""
        pieces = []
        for lam, B, s in zip(
            self._factors(theta), self._units.B, self._plan.layout.structures, strict=True
        ):
            pieces.append(s.from_factor(np.linalg.solve(B, lam)))
        return np.concatenate([np.zeros(0), *pieces])

    def _factors(self, theta: Any) -> list[np.ndarray]:
        return lk.factors(self._plan.layout, np.asarray(theta, float))

    def deviance(self, theta: Any, method: str = "REML") -> jax.Array:
        """-2 log-likelihood as a pure function of θ, β and σ profiled out (β integrated in REML).

        Made to be transformed: ``jax.jit``, ``grad``, ``hessian``, ``vmap`` and ``scan`` of it
        work, in the caller's precision.

        Parameters
        ----------
        theta : array, shape (n_theta + n_phi,)
            As ``Fit.theta``: relative to σ, in the units of the data, terms in formula order, each
            the lower triangle of Λ column by column. Behind it, for structured residuals, their
            free parameters as ``Fit.phi`` (unconstrained, in the order of ``phi_names``).
        method : {"REML", "ML"}

        Raises
        ------
        PrecisionError
            Outside ``with lmmjax.float64():``, unless the model was built with dtype="float32".

        Notes
        -----
        O(J S³ + (d + p)³); independent of the number of rows. Bates et al. (2015), eqs 34 and 42.
        """
        method = check_method(method)
        if self.dtype == "float64":
            require_float64("Model.deviance")
        theta = jnp.asarray(theta, self.dtype)
        layout = self._plan.layout
        names = [*self.theta_names, *self.phi_names]
        if theta.shape != (len(names),):
            raise DataError(
                f"theta has shape {theta.shape}; expected ({len(names)},), "
                f"one value for each of {names}."
            )
        undo: list[Any] = [np.linalg.inv(B).astype(self.dtype) for B in self._units.B]
        if self.design.residual is None:
            value = derivatives.profiled(layout, method, theta, *self._arrays(), undo)
            return value + self._units.constant(method)
        theta, phi = theta[: layout.n_theta], theta[layout.n_theta :]
        s = self.design.residual.structure
        undo = [B * s.variances.reference(phi[s.n_corr :]) for B in undo]
        red = lk.reduce(layout, theta, *self._source().gram(phi), undo)
        return lk.deviance(red, method) + self._units.constant(method)

    # -- what to do with it ---------------------------------------------------------------------

    def fit(
        self,
        method: str = "REML",
        *,
        df: str | None = None,
        optimizer: Any = "newton",
        start: Any = None,
        information: str = "expected",
        mesh: Any = None,
    ) -> Fit:
        """Estimate by restricted or plain maximum likelihood.

        Parameters
        ----------
        method : {"REML", "ML"}
        df : {"satterthwaite", "kenward-roger", "residual", "containment", "wald"}, optional
            Default degrees of freedom of the result's tests; Satterthwaite for mixed models,
            residual for linear ones.
        optimizer : {"newton", "lbfgs", "adam"} or optax transformation
            Trust-region Newton on exact derivatives by default; all minimise the same objective.
        start : array, shape (n_theta,), optional
            θ to start from, in the units of the data; no parameter may be 0.
        information : {"expected", "observed"}
            Which information matrix Kenward-Roger takes by default: as pbkrtest, or as SAS.
        mesh : jax.sharding.Mesh, optional
            Devices (of one or several hosts) to share the levels of the largest grouping factor
            among: for one large fit. The same numbers as on one device; every process makes the
            same call. Not with residual parameters.

        Returns
        -------
        Fit

        Warns
        -----
        ConvergenceWarning, SingularFitWarning
        """
        from lmmjax.fitting import fit_model

        return fit_model(
            self,
            check_method(method),
            df=df,
            optimizer=optimizer,
            start=start,
            information=information,
            mesh=mesh,
        )

    def sample(
        self,
        method: str = "nuts",
        *,
        form: str = "marginal",
        draws: int = 1000,
        warmup: int = 1000,
        chains: int = 4,
        target_accept: float = 0.9,
        seed: int = 0,
        priors: Any = "default",
        progress: bool = False,
    ) -> Posterior:
        """Draw from the posterior by NUTS; see :func:`lmmjax.bayes.sample.sample_model`.

        Parameters
        ----------
        method : {"nuts", "auto"}
        form : {"marginal", "noncentered", "centered"}
            Random effects integrated out and drawn exactly afterwards, or sampled; one posterior.
        draws, warmup, chains : int
            Draws kept and warm-up iterations per chain.
        target_accept : float
            Mean acceptance probability that the step size aims at; raise it against divergences.
        seed : int
        priors : {"default", "reml", "flat"} or dict
            A dict maps ``"Days"``, ``"sd_Days|Subject"``, ``"cor_Subject"``, ``"sigma"`` and the
            names of residual parameters (``"phi"``, ``"sd_ratio[b]"`` ...; see
            :mod:`lmmjax.bayes.residual`) to NumPyro distributions in the units of the data.
        progress : bool
            Show a progress bar.

        Returns
        -------
        Posterior
        """
        from lmmjax.bayes.sample import sample_model

        return sample_model(
            self,
            method=method,
            form=form,
            draws=draws,
            warmup=warmup,
            chains=chains,
            target_accept=target_accept,
            seed=seed,
            priors=priors,
            progress=progress,
        )

    def numpyro_model(self, form: str = "marginal", priors: Any = "default") -> Any:
        """The model as a NumPyro function; see :func:`lmmjax.bayes.numpyro_model.build`."""
        from lmmjax.bayes.numpyro_model import build

        return build(self, form=form, priors=priors)

    def simulate(
        self,
        *,
        beta: Any = None,
        theta: Any = None,
        sigma: float,
        phi: Any = None,
        seed: int = 0,
        n: int = 1,
    ) -> pd.DataFrame:
        """Simulate responses on this design.

        Parameters
        ----------
        beta : array (p,), optional
            Fixed effects in the order of the design; zeros by default.
        theta : array (n_theta,), optional
            Relative covariance parameters; zeros by default (no random effects).
        sigma : float
            Residual standard deviation.
        phi : array (n_phi,), optional
            Free residual parameters as ``Fit.phi``; the start of the optimiser by default.
        seed, n : int
            Seed, and number of responses.

        Returns
        -------
        DataFrame, shape (n_obs, n)
            Columns ``sim_1`` ..., on the row labels of the rows used.
        """
        from lmmjax.simulate import simulate

        layout = self._plan.layout
        beta = np.zeros(self.design.p) if beta is None else np.asarray(beta, float)
        theta = np.zeros(layout.n_theta) if theta is None else np.asarray(theta, float)
        if phi is None and self.design.residual is not None:
            phi = self.design.residual.structure.start()
        return simulate(
            self.design, beta, self._factors(theta), float(sigma), n=n, seed=seed, phi=phi
        )

    # -- people ---------------------------------------------------------------------------------

    def __repr__(self) -> str:
        from lmmjax.display import model_text

        return model_text(self)

    def _repr_html_(self) -> str:
        from lmmjax.display import preformatted

        return preformatted(repr(self))


def known_variances(spec: ResidualSpec | None, weights: Any) -> Any:
    """Weights of the model; ``varfixed(v)`` is weights 1/v, and both at once is an error."""
    known = None if spec is None else spec.weights()
    if known is None:
        return weights
    if weights is not None:
        raise DesignError(
            f"both weights= and residual={spec.text!r} were given; each states the "  # type: ignore[union-attr]
            "known variances (weights = 1/v). Give one of them."
        )
    return known

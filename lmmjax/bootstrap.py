r"""Parametric bootstrap of a fit: simulate from it, refit every replicate in one batch.

Replicates are drawn as cross-products (rowfree.py), so the cost does not depend on the number of
rows, and levels with equal blocks are collapsed (collapse.py). With residual parameters rows are
simulated, of which only y differs from replicate to replicate (residual/responses.py). Refits that
fail are counted and left out.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax import batch, boundary, collapse, components, estimate, rowfree
from lmmjax import likelihood as lk
from lmmjax.determined import delta_variance
from lmmjax.errors import DataError, LmmError
from lmmjax.gram import Layout, Rhs, standardise
from lmmjax.precision import in_float64
from lmmjax.residual.intervals import bounded, unbounded
from lmmjax.residual.responses import StructuredResponses
from lmmjax.residual.source import Source
from lmmjax.responses import Responses
from lmmjax.start import moments_of_many
from lmmjax.tables import check_level, check_seed

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit

KINDS = ("percentile", "studentized")

#: replicates drawn and fitted at a time at most, and numbers in the products of a chunk
CHUNK, NUMBERS = 4096, 2**24

#: free residual parameters beyond this are as good as on a boundary
FAR = 10.0

#: products of all replicates are kept, for studentised intervals, up to so many numbers
KEPT = 2**26


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Replicates of a fit under its own estimates.

    Attributes
    ----------
    fit : Fit
    n, seed : int
    replicates : DataFrame, shape (n, parameters)
        Refitted fixed effects under R's names, then ``sd_...|group``, ``cor_...|group`` and
        ``sigma`` under lme4's, then those of ``Fit.residual_params``; a replicate that failed is a
        row of NaN.
    std_errors : DataFrame, shape (n, p)
        Standard errors of the fixed effects in each refit.
    deviance : ndarray (n,)
        Criterion of each refit, in the units of the data.
    status : ndarray (n,)
        Keys of ``lmmjax.batch.WORDS``.
    retried : int
        Replicates that were tried from other starts.
    seconds : float
    """

    fit: Fit
    n: int
    seed: int
    replicates: pd.DataFrame
    std_errors: pd.DataFrame
    deviance: np.ndarray
    status: np.ndarray
    retried: int
    seconds: float
    _pieces: Any = field(repr=False)

    @property
    def n_failed(self) -> int:
        """Replicates whose refit failed; they are left out of every summary."""
        return int(np.sum(self.status > batch.SINGULAR))

    @property
    def n_singular(self) -> int:
        """Replicates with a component on the boundary; they count as they are."""
        return int(np.sum(self.status == batch.SINGULAR))

    @cached_property
    def estimates(self) -> pd.Series:
        """The fit's own values of the parameters."""
        import pandas as pd

        terms = self.fit.model.design.terms
        parts = components.values(terms, self.fit._term_covs(), np.asarray(self.fit.sigma))
        both = np.concatenate([self.fit.beta.to_numpy(), parts, self.fit.residual_params()])
        return pd.Series(both, index=self.replicates.columns, name="estimate")

    def summary_table(self) -> pd.DataFrame:
        """Estimate, bootstrap bias and standard error per parameter, with the error's own MC error.

        Returns
        -------
        DataFrame
            Columns ``estimate bias std_error mc_error``; ``mc_error`` is the Monte Carlo standard
            error of the bias.
        """
        import pandas as pd

        se = self.replicates.std(ddof=1)
        used = self.replicates.notna().sum()
        columns = {
            "estimate": self.estimates,
            "bias": self.replicates.mean() - self.estimates,
            "std_error": se,
            "mc_error": se / np.sqrt(used),
        }
        return pd.DataFrame(columns)

    def confint(
        self, level: float = 0.95, kind: str = "percentile", parm: Any = None
    ) -> pd.DataFrame:
        """Bootstrap confidence intervals.

        Parameters
        ----------
        level : float
        kind : {"percentile", "studentized"}
            Quantiles of the replicates; or of (replicate - estimate) / standard error, turned round
            the estimate (bootstrap-t). SDs are studentised on the log scale, correlations on
            Fisher's z scale, residual parameters where they are unbounded. A component on its
            boundary has no standard error: such replicates are left out of the studentised
            intervals of components (``n_singular`` counts them), and these are NaN where the fit
            itself is singular.
        parm : str or list of str, optional
            Parameters; all by default.

        Returns
        -------
        DataFrame
            Columns ``estimate low high``.

        References
        ----------
        Davison and Hinkley (1997). Bootstrap Methods and their Application, eqs 5.6 and 5.18.
        """
        if kind not in KINDS:
            raise LmmError(f"kind={kind!r} is unknown; expected 'percentile' or 'studentized'.")
        tails = np.array([0.5 - check_level(level) / 2, 0.5 + level / 2])
        columns = self._columns(parm)
        low, high = (self._percentile if kind == "percentile" else self._studentized)(tails)
        import pandas as pd

        frame = pd.DataFrame(
            {"estimate": self.estimates, "low": low, "high": high}, index=self.replicates.columns
        )
        return frame.loc[columns]

    def _columns(self, parm: Any) -> list[str]:
        known = list(self.replicates.columns)
        wanted = known if parm is None else [parm] if isinstance(parm, str) else list(parm)
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise DataError(f"parm names {unknown}; expected some of {known}.")
        return wanted

    def _usable(self) -> np.ndarray:
        usable = self.status <= batch.SINGULAR
        if np.sum(usable) < 10:
            raise LmmError(
                f"only {int(np.sum(usable))} of {self.n} replicates could be refitted; expected at "
                "least 10 for an interval. Look at .status, or raise n."
            )
        return usable

    def _percentile(self, tails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = self.replicates.to_numpy()[self._usable()]
        return _quantiles(values, tails)

    def _studentized(self, tails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        usable = self._usable()
        p = len(self.fit.beta)
        beta, beta_se = self.fit.beta.to_numpy(), self.fit.std_errors
        t_beta = (self.replicates.to_numpy()[:, :p] - beta) / self.std_errors.to_numpy()
        centre, centre_se = self._scales[0][0], self._scales[1][0]
        t_rest = (self._scales[0][1:] - centre) / self._scales[1][1:]
        low_t, high_t = _quantiles(np.concatenate([t_beta, t_rest], axis=1)[usable], tails)
        est, se = np.concatenate([beta, centre]), np.concatenate([beta_se, centre_se])
        low, high = est - high_t * se, est - low_t * se
        r = len(est) - len(self.fit.phi)
        back = _back(list(self.replicates.columns)[p:r])
        for limit in (low, high):
            limit[p:r] = back(limit[p:r])
            limit[r:] = bounded(self.fit, limit[r:])
        return low, high

    @cached_property
    @in_float64
    def _scales(self) -> tuple[np.ndarray, np.ndarray]:
        """Components and residual parameters on unbounded scales and their standard errors; the
        fit's own in row 0."""
        layout, gram, rhs, theta, hessian, scale, structure = self._pieces
        if rhs is None:
            raise LmmError(
                f"the products of {self.n} replicates were too large to keep for studentised "
                "intervals; expected fewer replicates or groups. Use kind='percentile'."
            )
        value, slope, direct = jax.device_get(
            _transformed(layout, self.fit.method, structure, gram, rhs, theta)
        )
        failed = np.append([False], self.status > batch.SINGULAR)
        theta = np.where(failed[:, None], theta[0], theta)
        hessian = np.where(failed[:, None, None], hessian[0], hessian)
        value, se = on_active_face(self.fit, value, slope, direct, theta, hessian)
        se[failed] = np.nan
        se[1:][np.isinf(se[1:])] = np.nan  # not determined by that replicate: it has no pivot
        r = len(self.fit.phi)
        K = value.shape[1] - r
        names = self.replicates.columns[-(K + r) :][:K]
        value[:, :K] += scale * np.array([not c.startswith("cor_") for c in names])
        value[:, K:], se[:, K:] = unbounded(self.fit, value[:, K:], se[:, K:])
        return value, se

    def __repr__(self) -> str:
        lines = [
            f"Parametric bootstrap of {self.fit.model.formula} ({self.fit.method})",
            f"{self.n} replicates, seed {self.seed}: {self.n_failed} failed, {self.n_singular} "
            f"singular, {self.retried} tried from other starts",
            "",
            self.summary_table().to_string(float_format=lambda x: f"{x:.4g}"),
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from lmmjax.display import preformatted

        return preformatted(repr(self))


def _quantiles(values: np.ndarray, tails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles at (R + 1)α of the numbers in each column; NaN where there are none."""
    out = np.full((2, values.shape[1]), np.nan)
    for j, column in enumerate(values.T):
        known = column[np.isfinite(column)]
        if len(known):
            out[:, j] = np.quantile(known, tails, method="weibull")
    return out[0], out[1]


def _back(names: list[str]) -> Any:
    """From log and Fisher scales to SDs and correlations."""
    is_cor = np.array([name.startswith("cor_") for name in names])
    return lambda x: np.where(is_cor, np.tanh(x), np.exp(np.where(is_cor, 0.0, x)))


# -------------------------------------------------------------------------------------------------
# Standard errors of components, for studentised intervals
# -------------------------------------------------------------------------------------------------


def on_active_face(
    fit: Fit,
    value: np.ndarray,
    slope: np.ndarray,
    direct: np.ndarray,
    theta: np.ndarray,
    hessian: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Components and their standard errors in m fits of a model, NaN for those on a boundary.

    Parameters
    ----------
    value, slope, direct : (m, K), (m, K, k), (m, K)
        Of :func:`_transformed`.
    theta, hessian : (m, k), (m, k, k)

    Notes
    -----
    A relative SD of 0 is a stationary point by symmetry: it drops out of all other slopes.
    """
    model, layout = fit.model, fit.model._plan.layout
    own = np.ascontiguousarray(theta[:, : layout.n_theta])
    lams = [np.stack(a) for a in zip(*(model._factors(t) for t in own), strict=True)]
    lost = np.zeros(value.shape, bool)
    if lams:
        at = boundary.reached(model.design.terms, lams, model._units.B)
        lost[:, : at.shape[1]] = at
    value, direct = np.where(lost, np.nan, value), np.where(lost, 0.0, direct)
    slope = np.where(lost[..., None], 0.0, slope)
    still = np.zeros(theta.shape, bool)
    still[:, : layout.n_theta] = ~boundary.moving(layout, own)
    slope = np.where(still[:, None], 0.0, slope)
    hessian = np.where(still[:, :, None] | still[:, None], 0.0, hessian)
    nu = fit.n_obs - (len(fit.beta) if fit.method == "REML" else 0)
    variance = 2.0 * delta_variance(slope, hessian) + direct**2 * 2.0 / nu
    with np.errstate(invalid="ignore"):  # negative beside a Hessian that is no minimum's: NaN
        return value, np.where(lost, np.nan, np.sqrt(variance))


class _Structure(NamedTuple):
    """Static: per term its places (i, j) in the covariance, and B of the standardisation."""

    places: tuple[tuple[tuple[int, int], ...], ...]
    units: tuple[tuple[tuple[float, ...], ...], ...]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _transformed(
    layout: Layout, method: str, structure: _Structure, gram: Any, rhs: Any, theta: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log SDs, Fisher's z, log σ, residual parameters as reported; slopes in (θ, φ) along the
    profile, and in log σ² at fixed (θ, φ).

    ``gram`` is a Gram or a source whose parts are ``rhs``, with φ behind θ.
    """
    k = layout.n_theta
    residual = gram.structure if isinstance(gram, Source) else None

    def at(t: jax.Array, log_s2: jax.Array) -> jax.Array:
        out = []
        lams = lk.factors(layout, t[:k], [jnp.asarray(B) for B in structure.units])
        for lam, places in zip(lams, structure.places, strict=True):
            cov = lam @ lam.T
            for i, j in places:
                if i == j:
                    out.append(0.5 * (jnp.log(cov[i, i]) + log_s2))
                else:
                    out.append(jnp.arctanh(cov[i, j] / jnp.sqrt(cov[i, i] * cov[j, j])))
        if residual is None:
            return jnp.stack([*out, 0.5 * log_s2])
        reference = jnp.log(residual.variances.reference(t[k + residual.n_corr :]))
        own = jnp.stack([*out, 0.5 * log_s2 + reference])
        return jnp.concatenate([own, residual.natural(t[k:])])

    def one(args: tuple[Any, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        part, t = args

        def log_s2(t: jax.Array) -> jax.Array:
            products = (gram, part) if residual is None else gram.with_response(part).gram(t[k:])
            return jnp.log(lk.profiled_sigma2(lk.reduce(layout, t[:k], *products), method))

        along = jax.jacfwd(lambda t: at(t, log_s2(t)))(t)
        return at(t, log_s2(t)), along, jax.jacfwd(at, 1)(t, log_s2(t))

    return batch.map_lanes(one, (rhs, theta), batch.choose_lanes(layout, rhs))


def _structure(model: Any) -> _Structure:
    places = tuple(tuple(components.places(len(t.names), t.cov)) for t in model.design.terms)
    units = tuple(tuple(map(tuple, B.tolist())) for B in model._units.B)
    return _Structure(places, units)


# -------------------------------------------------------------------------------------------------
# Making replicates
# -------------------------------------------------------------------------------------------------


@in_float64
def bootstrap(fit: Fit, n: int = 1000, seed: int = 0) -> Bootstrap:
    """Simulate ``n`` responses from ``fit`` and refit them; see :meth:`lmmjax.Fit.bootstrap`."""
    began = time.perf_counter()
    if not (isinstance(n, int | np.integer) and n >= 1):
        raise DataError(f"n={n!r} is not a number of replicates; expected an integer, 1 or more.")
    check_seed(seed)
    made = _with_residual(fit) if fit.model.is_structured else _without_rows(fit)
    rng = np.random.default_rng(seed)
    start = start_of(fit)
    parts, rights = [], []
    chunk = int(np.clip(NUMBERS // made.drawn, 16, CHUNK))
    size = chunk if n > chunk else None
    keep = n * made.kept <= KEPT
    for at in range(0, int(n), chunk):
        drawn = made.draw(rng, min(chunk, int(n) - at))
        rights += [drawn] if keep else []
        parts.append(batch.fit_items(made.layout, fit.method, made.gram, drawn, start, size=size))
    whole = jax.tree.map(lambda *a: np.concatenate(a), *parts)
    rhs = jax.tree.map(lambda *a: np.concatenate(a), made.own, *rights) if keep else None
    return _result(fit, int(n), seed, whole, made, rhs, time.perf_counter() - began)


class _Replicates(NamedTuple):
    """How replicates of a fit are drawn, and what they have in common."""

    layout: Layout
    gram: Any  # Gram, or a source of cross-products
    own: Any  # right-hand side of the fit itself, with a leading axis of 1
    draw: Callable[[np.random.Generator, int], Any]
    drawn: int  # numbers that drawing one replicate takes
    kept: int  # numbers of its right-hand side


def _without_rows(fit: Fit) -> _Replicates:
    """Replicates as cross-products, levels with equal blocks collapsed."""
    plan, _, gram, own = batch.standard(fit.model)
    layout = plan.layout
    small = collapse.collapse(layout, gram)
    the_layout, the_gram = (layout, gram) if small is None else (small.layout, small.gram)
    rotate = (lambda r: r) if small is None else small.rhs
    the_root = rowfree.root(layout, gram)
    return _Replicates(
        the_layout,
        the_gram,
        rotate(jax.tree.map(lambda a: np.asarray(a)[None], own)),
        lambda rng, m: rotate(_draw(fit, layout, the_root, rng, m)),
        layout.q + layout.p + 1,
        the_layout.q + the_layout.p + 1,
    )


def _with_residual(fit: Fit) -> _Replicates:
    """Replicates as simulated rows."""
    responses = _structured_responses(fit)
    source = responses.source

    def draw(rng: np.random.Generator, m: int) -> Any:
        return responses.on_units(fit.simulate(m, seed=int(rng.integers(2**63))).to_numpy())

    own = jax.tree.map(lambda a: np.asarray(a)[None], source.response)
    kept = batch.numbers_of_one(own)
    drawn = 4 * (fit.n_obs + kept)
    return _Replicates(fit.model._plan.layout, source, own, draw, drawn, kept)


def _structured_responses(fit: Fit) -> StructuredResponses:
    model = fit.model
    plan, _, source = model._prepared
    return StructuredResponses(model.design, plan, standardise(model.design), source)  # type: ignore[arg-type]


def _draw(
    fit: Fit, layout: Layout, the_root: rowfree.Root, rng: np.random.Generator, m: int
) -> Rhs:
    """Replicates in the standardised units of the model."""
    units = fit.model._units
    beta = np.linalg.solve(units.A, fit._beta - units.beta0) / units.scale if units.p else fit._beta
    lams = [np.asarray(lam) for lam in lk.factors(layout, fit._theta_s)]
    return rowfree.simulate(layout, the_root, beta, lams, fit.sigma / units.scale, rng, m)


def start_of(fit: Fit) -> np.ndarray:
    """The fit's (θ, φ) where they are well inside, the usual start otherwise."""
    lams = fit.model._factors(fit._theta_s)
    inside = all(np.min(np.abs(np.diag(np.linalg.qr(lam.T, mode="r")))) > 0.1 for lam in lams)
    theta = fit._theta_s if inside else estimate.start(fit.model._plan.layout)
    if not fit.model.is_structured:
        return theta
    far = np.max(np.abs(fit.phi)) > FAR
    return np.append(theta, fit.model._source().start() if far else fit.phi)


def _result(
    fit: Fit,
    n: int,
    seed: int,
    whole: batch.Batch,
    made: _Replicates,
    rhs: Any,
    seconds: float,
) -> Bootstrap:
    import pandas as pd

    model, units, items = fit.model, fit.model._units, whole.items
    usable = whole.status <= batch.SINGULAR
    sigma = units.scale * np.sqrt(items.sigma2)
    beta = units.beta0 + units.scale * items.beta @ units.A.T
    covs = [
        (sigma**2)[:, None, None] * (B @ lam) @ np.swapaxes(B @ lam, 1, 2)
        for B, lam in zip(units.B, items.lams, strict=True)
    ]
    residual = model.design.residual
    structure = None if residual is None else residual.structure
    natural, sd = batch.reported(structure, items.theta)
    own = components.values(model.design.terms, covs, sigma * sd)
    names = [*model.design.x_names, *components.names(model.design.terms), *model.phi_names]
    both = np.concatenate([beta, own, natural], axis=1)
    vcov = np.einsum("ia,mab,ib->mi", units.A, items.unscaled_vcov, units.A)
    se = sigma[:, None] * np.sqrt(vcov) * math.sqrt(fit._sigma2) / fit.sigma
    hessian = np.concatenate([fit._hessian_s[None], items.hessian])
    theta = np.concatenate([np.append(fit._theta_s, fit.phi)[None], items.theta])
    scale = float(np.log(units.scale))
    pieces = (made.layout, made.gram, rhs, theta, hessian, scale, _structure(model))
    return Bootstrap(
        fit=fit,
        n=n,
        seed=seed,
        replicates=pd.DataFrame(np.where(usable[:, None], both, np.nan), columns=names),
        std_errors=pd.DataFrame(
            np.where(usable[:, None], se, np.nan), columns=names[: len(beta.T)]
        ),
        deviance=np.where(usable, items.value + units.constant(fit.method), np.nan),
        status=whole.status,
        retried=int(np.sum(whole.retried)),
        seconds=seconds,
        _pieces=pieces,
    )


# -------------------------------------------------------------------------------------------------
# The null distribution of a likelihood ratio
# -------------------------------------------------------------------------------------------------


class NullStatistics(NamedTuple):
    """Likelihood-ratio statistics of responses simulated under the smaller model."""

    statistics: np.ndarray  # (n,), NaN where a refit failed
    n_failed: int


@in_float64
def null_statistics(small: Fit, big: Fit, n: int = 1000, seed: int = 0) -> NullStatistics:
    """Simulate from ``small``, refit both models, return the likelihood-ratio statistics.

    Parameters
    ----------
    small, big : Fit
        Nested, of the same rows, by the same method.
    n, seed : int

    Returns
    -------
    NullStatistics
        The bootstrap p-value is (1 + number of statistics at least as large as the observed one) /
        (1 + number that are not NaN).

    Notes
    -----
    Rows are simulated, 256 responses at a time, since the designs differ: O(n_obs n) and two
    batches.

    References
    ----------
    Davison and Hinkley (1997). Bootstrap Methods and their Application, eq. 4.11.
    """
    if small.n_obs != big.n_obs or small.method != big.method:
        raise DataError(
            f"found fits of {small.n_obs} rows by {small.method} and of {big.n_obs} rows by "
            f"{big.method}; expected the same rows and method. Refit one of them."
        )
    check_seed(seed)
    block, parts = min(256, int(n)), []
    for at in range(0, int(n), block):
        key = int(np.random.SeedSequence((seed, at)).generate_state(1)[0])
        Y = small.simulate(min(block, int(n) - at), seed=key).to_numpy()
        parts.append(_refit(small, Y, block) - _refit(big, Y, block))
    statistics = np.concatenate(parts)
    return NullStatistics(statistics, int(np.sum(np.isnan(statistics))))


def _refit(fit: Fit, Y: np.ndarray, size: int) -> np.ndarray:
    """Criterion of the fit's model for every column of Y, NaN where it failed."""
    if fit.model.is_structured:
        responses, layout = _structured_responses(fit), fit.model._plan.layout
        parts = responses.on_units(Y)
        done = batch.fit_items(
            layout, fit.method, responses.source, parts, start_of(fit), size=size
        )
        value = done.items.value + fit.model._units.constant(fit.method)
        return np.where(done.status <= batch.SINGULAR, value, np.nan)
    plan, units, gram, _ = batch.standard(fit.model)
    design = fit.model.design
    made = Responses(design, plan, standardise(design), gram)(Y)
    theta0 = moments_of_many(plan.layout, gram, made.rhs)
    done = batch.fit_items(plan.layout, fit.method, gram, made.rhs, theta0, size=size)
    nu = units.n - (units.p if fit.method == "REML" else 0)
    extra = 2 * units.logdet_A if fit.method == "REML" else 0.0
    value = done.items.value + 2 * nu * np.log(made.scale) - extra
    return np.where(done.status <= batch.SINGULAR, value, np.nan)

r"""The model as NumPyro functions: one posterior, three parametrisations.

    y ~ N(Xβ + offset + Σ_g Z_g b_g, σ²W⁻¹),   b_g[j] ~ N(0, D_g),   D_g = diag(sd) C diag(sd)

    site             shape       meaning, in the units of the data
    beta             (p,)        fixed effects (marginal form: only if it cannot be integrated out)
    sd_<group>       (S,)        SDs of the columns of all terms on the group, formula order
    chol_<group>_<k> (S_k, S_k)  Cholesky factor of the correlation matrix of the us term k
    rho_<group>_<k>  ()          the one correlation of a cs or homcs term
    cor_<group>      (pairs,)    deterministic: correlations within terms, lower triangle by column
    sigma            ()          residual SD of a row of weight 1
    u_<group>        (J, S)      standard normal effects                     (noncentered)
    ranef_<group>    (J, S)      b; sampled (centered) or deterministic (noncentered)
    y                (n,)        observed                                    (not marginal)

With a residual structure ε ~ N(0, σ²R(φ)), and three more kinds of site:

    residual         (k,)        residual parameters that have a scalar prior (residual.py)
    chol_residual    (T, T)      Cholesky factor of the correlation matrix of un and symm
    phi, range ...   ()          deterministic: the residual parameters as reported, by name

``marginal`` integrates b out, and β where its priors are normal or flat, through the one
factorisation of likelihood.py: a gradient costs nothing in n. ``noncentered`` and ``centered`` go
by rows, the errors of a subject whitened (subjects.py). All unconstrained coordinates fit the
data's units (charts.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array

from lmmjax import likelihood as lk
from lmmjax.bayes import residual
from lmmjax.bayes.charts import Affine, Charted, coefficients, positive, positive_chart
from lmmjax.bayes.priors import Priors, is_flat, resolve, sd_keys
from lmmjax.errors import LmmError
from lmmjax.gram import Gram, Layout, Rhs
from lmmjax.precision import require_float64
from lmmjax.residual.structures import Structure
from lmmjax.residual.subjects import subjects

if TYPE_CHECKING:
    from lmmjax.model import Model

FORMS = ("marginal", "noncentered", "centered")


# -------------------------------------------------------------------------------------------------
# What is static, and what is data
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The terms on one grouping factor. ``free`` says which free SD each column has."""

    name: str
    terms: tuple[int, ...]  # positions in the formula
    kinds: tuple[str, ...]  # structure of each term
    sizes: tuple[int, ...]  # columns of each term
    J: int

    @property
    def S(self) -> int:
        return sum(self.sizes)

    @property
    def free(self) -> tuple[int, ...]:
        """Index of the free SD of each column."""
        out: list[int] = []
        at = 0
        for kind, S in zip(self.kinds, self.sizes, strict=True):
            shared = kind in ("hom", "homcs")
            out += [at] * S if shared else range(at, at + S)
            at += 1 if shared else S
        return tuple(out)

    @property
    def n_free(self) -> int:
        return max(self.free) + 1

    def correlation(self, k: int) -> str | None:
        """How the correlations of term ``k`` of the group are sampled: chol, rho or not at all."""
        if self.sizes[k] < 2 or self.kinds[k] in ("diag", "hom"):
            return None
        return "chol" if self.kinds[k] == "us" else "rho"

    @property
    def has_correlations(self) -> bool:
        return any(self.correlation(k) for k in range(len(self.kinds)))


@dataclass(frozen=True)
class Spec:
    """All that is static about a NumPyro model: hashable, free of labels but for site names."""

    layout: Layout
    groups: tuple[Group, ...]  # formula order
    form: str
    integrate: bool  # β integrated out
    residual: Structure | None = None
    fills: tuple[bool, ...] = ()  # residual priors that reach over the whole range
    typical_sigma: bool = False  # prior of σ on a row of average log SD

    def anonymous(self) -> Spec:
        """The same with numbers for group names, so that models of equal shape share code."""
        named = tuple(replace(g, name=str(i)) for i, g in enumerate(self.groups))
        return replace(self, groups=named)


class Sites(NamedTuple):
    """The priors by site (a pytree: distributions are)."""

    beta: tuple[Any, ...]  # p scalar distributions
    sd: tuple[tuple[Any, ...], ...]  # per group, per free SD
    concentration: tuple[tuple[float, ...], ...]  # per group, per term
    sigma: Any
    residual: tuple[Any, ...] = ()  # residual parameters with a scalar prior
    residual_concentration: float = 1.0  # of their correlation matrix


class Data(NamedTuple):
    """Arrays of the model in either form; what a form does not need is None."""

    A: Any  # units: (p, p)
    beta0: Any
    scale: Any
    B: tuple[Any, ...]  # per term (S, S)
    undo: tuple[Any, ...]  # B⁻¹
    sd_size: tuple[Any, ...]  # per group: a size for each free SD
    gram: Gram | None = None
    rhs: Rhs | None = None
    source: Any = None  # cross-products that depend on the residual parameters
    subjects: Any = None  # rows of each residual subject
    X: Any = None
    y: Any = None
    offset: Any = None
    root_weight: Any = None
    z: tuple[Any, ...] = ()  # per group (n, S)
    codes: tuple[Any, ...] = ()  # per group (n,)


def describe(model: Model, form: str, priors: Priors) -> Spec:
    """The static part of a model under ``priors``."""
    if form not in FORMS:
        raise LmmError(f"form={form!r} is unknown; expected one of {', '.join(map(repr, FORMS))}.")
    design = model.design
    gaussian = all(
        is_flat(d) or type(d) is dist.Normal for d in (priors.entries[k] for k in design.x_names)
    )
    spec = Spec(model._plan.layout, groups(design), form, form == "marginal" and gaussian)
    if design.residual is None:
        return spec
    structure = design.residual.structure
    fills = residual.fills_range(structure, _residual_priors(structure, priors))
    return replace(spec, residual=structure, fills=fills, typical_sigma=priors.typical_sigma)


def _residual_priors(structure: Structure, priors: Priors) -> tuple[Any, ...]:
    return tuple(priors.entries[p.key] for p in residual.parameters(structure))


def groups(design: Any) -> tuple[Group, ...]:
    """Terms by grouping factor, in formula order."""
    members: dict[str, list[int]] = {}
    for k, term in enumerate(design.terms):
        members.setdefault(term.group, []).append(k)
    return tuple(
        Group(
            name,
            tuple(ks),
            tuple(design.terms[k].cov for k in ks),
            tuple(design.terms[k].z.shape[1] for k in ks),
            len(design.terms[ks[0]].levels),
        )
        for name, ks in members.items()
    )


def prior_sites(model: Model, spec: Spec, priors: Priors) -> Sites:
    """The priors in the order of the sites."""
    design, entries = model.design, priors.entries
    sds, concentrations = [], []
    for group in spec.groups:
        terms = [design.terms[k] for k in group.terms]
        sds.append(tuple(entries[key] for t in terms for key in sd_keys(t)))
        concentrations.append(tuple(float(entries.get(f"cor_{t.group}", 1.0)) for t in terms))
    beta = tuple(entries[name] for name in design.x_names)
    sites = Sites(beta, tuple(sds), tuple(concentrations), entries["sigma"])
    if spec.residual is None:
        return sites
    concentration = float(entries.get(residual.MATRIX, 1.0))
    return sites._replace(
        residual=_residual_priors(spec.residual, priors), residual_concentration=concentration
    )


def arrays(model: Model, spec: Spec) -> Data:
    """The arrays that a form needs, in the model's precision (NumPy)."""
    design, units = model.design, model._units
    sizes = []
    for g in spec.groups:
        diagonal = np.concatenate([units.scale * np.abs(np.diag(units.B[k])) for k in g.terms])
        sizes.append(diagonal[[g.free.index(i) for i in range(g.n_free)]])
    undo = tuple(np.linalg.inv(B) for B in units.B)
    data = Data(units.A, units.beta0, np.float64(units.scale), units.B, undo, tuple(sizes))
    if spec.form == "marginal" and model.is_structured:
        data = data._replace(source=model._source())
    elif spec.form == "marginal":
        the_gram, rhs = model._arrays()
        data = data._replace(gram=the_gram, rhs=rhs)
    else:
        z = [np.concatenate([design.terms[k].z for k in g.terms], axis=1) for g in spec.groups]
        data = data._replace(
            X=design.X,
            y=design.y,
            offset=design.offset,
            root_weight=np.sqrt(design.weights),
            z=tuple(z),
            codes=tuple(design.terms[g.terms[0]].codes for g in spec.groups),
            subjects=subjects(design) if model.is_structured else None,
        )
    cast = lambda a: np.asarray(a, model.dtype) if np.asarray(a).dtype == np.float64 else a  # noqa: E731
    return jax.tree.map(cast, data)


# -------------------------------------------------------------------------------------------------
# Covariance of the random effects
# -------------------------------------------------------------------------------------------------


def cs_cholesky(rho: Array, S: int) -> Array:
    """Cholesky factor of the S x S correlation matrix with one correlation."""
    C = rho * jnp.ones((S, S)) + (1 - rho) * jnp.eye(S)
    return jnp.linalg.cholesky(C)


def term_factors(spec: Spec, sds: list[Array], chols: list[list[Array | None]]) -> list[Array]:
    """Factors of D, in the units of the data, of each term in formula order: (S, S)."""
    out: dict[int, Array] = {}
    for g, sd, by_term in zip(spec.groups, sds, chols, strict=True):
        at = 0
        for k, S, L in zip(g.terms, g.sizes, by_term, strict=True):
            part = sd[at : at + S]
            out[k] = jnp.diag(part) if L is None else part[:, None] * L
            at += S
    return [out[k] for k in range(len(out))]


def _sample_sds(g: Group, prior: tuple[Any, ...], sizes: Any) -> Array:
    if g.n_free == g.S:
        return numpyro.sample(f"sd_{g.name}", positive(prior, sizes))
    free = numpyro.sample(f"sd_{g.name}_free", positive(prior, sizes))
    return numpyro.deterministic(f"sd_{g.name}", free[jnp.array(g.free)])


def _sample_correlations(g: Group, concentration: tuple[Any, ...]) -> list[Array | None]:
    chols: list[Array | None] = []
    for k, S in enumerate(g.sizes):
        how = g.correlation(k)
        if how == "chol":
            site = dist.LKJCholesky(S, concentration[k])
            chols.append(numpyro.sample(f"chol_{g.name}_{k}", site))
        elif how == "rho":
            rho = numpyro.sample(f"rho_{g.name}_{k}", dist.Uniform(-1 / (S - 1), 1.0))
            chols.append(cs_cholesky(rho, S))
        else:
            chols.append(None)
    if g.has_correlations:
        numpyro.deterministic(f"cor_{g.name}", _pairs(chols))
    return chols


def _pairs(chols: list[Array | None]) -> Array:
    """Correlations below the diagonal, column by column, term after term."""
    parts = []
    for L in chols:
        if L is not None:
            columns, rows = np.triu_indices(L.shape[0], 1)
            parts.append((L @ L.T)[rows, columns])
    return jnp.concatenate(parts)


class Variances(NamedTuple):
    """What the covariance sites give: σ, the factor of D per term, free residual parameters."""

    sigma: Array
    factors: list[Array]
    phi: Array | None = None


def _variances(spec: Spec, data: Data, prior: Sites) -> Variances:
    phi, size = None, jnp.ones((), data.A.dtype)
    sigma_prior = prior.sigma
    if spec.residual is not None:
        concentration = prior.residual_concentration
        phi = residual.sample(spec.residual, spec.fills, prior.residual, concentration)
        size = spec.residual.variances.reference(phi[spec.residual.n_corr :])
        if spec.typical_sigma:
            sigma_prior = residual.Scaled(prior.sigma, size)
    chart = positive_chart(sigma_prior, data.scale * size)
    sigma = numpyro.sample("sigma", Charted(sigma_prior, chart))
    sds, chols = [], []
    for i, g in enumerate(spec.groups):
        sds.append(_sample_sds(g, prior.sd[i], data.sd_size[i]))
        chols.append(_sample_correlations(g, prior.concentration[i]))
    return Variances(sigma, term_factors(spec, sds, chols), phi)


def variances_of(spec: Spec, values: dict[str, Array]) -> Variances:
    """σ and the factors of D from the values of the sites."""
    sds, chols = [], []
    for g in spec.groups:
        sds.append(values[f"sd_{g.name}"])
        by_term: list[Array | None] = []
        for k, S in enumerate(g.sizes):
            how = g.correlation(k)
            if how is None:
                by_term.append(None)
                continue
            value = values[f"{how}_{g.name}_{k}"]
            by_term.append(cs_cholesky(value, S) if how == "rho" else value)
        chols.append(by_term)
    phi = None if spec.residual is None else residual.free(spec.residual, values)
    return Variances(values["sigma"], term_factors(spec, sds, chols), phi)


# -------------------------------------------------------------------------------------------------
# The forms
# -------------------------------------------------------------------------------------------------


class GaussianBeta(NamedTuple):
    """A normal or flat prior of β in standardised coordinates, and the log-density's constant."""

    mean: Array
    precision: Array
    logdet: Array
    constant: Array


def gaussian_beta(data: Data, prior: Sites) -> GaussianBeta:
    """β ~ N(m, diag(s²)) as a prior of β_s, β = β₀ + c A β_s; flat entries have precision 0."""
    p = len(prior.beta)
    ok = np.array([not is_flat(d) for d in prior.beta], bool)
    pairs = zip(prior.beta, ok, data.beta0, strict=True)
    m = jnp.asarray([d.loc if proper else b for d, proper, b in pairs], data.A.dtype)
    sds = [d.scale if proper else 1.0 for d, proper in zip(prior.beta, ok, strict=True)]
    s = jnp.asarray(sds, data.A.dtype)
    M = data.scale * data.A
    precision = M.T @ (jnp.where(ok, s**-2.0, 0.0)[:, None] * M)
    logdet_M = jnp.linalg.slogdet(M)[1] if p else jnp.zeros(())
    logdet = 2 * logdet_M - 2 * jnp.sum(jnp.where(ok, jnp.log(s), 0.0))
    # a flat prior leaves one factor sqrt(2 pi) of the integral that a normal one cancels
    constant = 0.5 * (p - ok.sum()) * lk.LOG_2PI
    mean = jnp.linalg.solve(M, m - data.beta0) if p else m
    return GaussianBeta(mean, precision, logdet, jnp.asarray(constant))


def reduction(spec: Spec, data: Data, v: Variances) -> tuple[lk.Reduction, Array, Gram]:
    """The factorisation at these variances, σ² in the units of the Gram, and the Gram."""
    sigma, gram, rhs = v.sigma, data.gram, data.rhs
    if data.source is not None:
        s = data.source.structure
        gram, rhs = data.source.gram(v.phi)
        sigma = sigma / s.variances.reference(v.phi[s.n_corr :])  # type: ignore[index]
    lams = [u @ lam / sigma for u, lam in zip(data.undo, v.factors, strict=True)]
    assert gram is not None and rhs is not None, "the marginal form has cross-products"
    return lk.reduce_factors(spec.layout, lams, gram, rhs), (sigma / data.scale) ** 2, gram


def marginal(spec: Spec, data: Data, prior: Sites) -> None:
    """Random effects integrated out; β too where ``spec.integrate``."""
    v = _variances(spec, data, prior)
    red, sigma2, _ = reduction(spec, data, v)
    jacobian = -red.n * jnp.log(data.scale)
    if spec.integrate:
        b = gaussian_beta(data, prior)
        loglik = lk.loglik_gaussian_beta(red, b.mean, b.precision, b.logdet, sigma2) + b.constant
    else:
        beta = numpyro.sample("beta", _beta_prior(data, prior))
        beta_s = jnp.linalg.solve(data.scale * data.A, beta - data.beta0)
        loglik = lk.loglik_given_beta(red, beta_s, sigma2)
    numpyro.factor("log_likelihood", loglik + jacobian)


def _beta_prior(data: Data, prior: Sites) -> Any:
    return coefficients(prior.beta, data.beta0, data.scale * data.A)


def hierarchy(spec: Spec, data: Data, prior: Sites, obs: bool = True) -> None:
    """All effects sampled, y given them row by row. ``obs=False`` leaves y to be drawn."""
    v = _variances(spec, data, prior)
    eta = data.offset
    if prior.beta:
        eta = eta + data.X @ numpyro.sample("beta", _beta_prior(data, prior))
    for i, g in enumerate(spec.groups):
        b = _effects(spec, g, data, v)
        eta = eta + jnp.einsum("is,is->i", data.z[i], b[data.codes[i]])
    likelihood: Any = dist.Normal(eta, v.sigma / data.root_weight).to_event(1)
    if v.phi is not None:
        likelihood = residual.CorrelatedRows(eta, v.sigma, v.phi, data.subjects)
    numpyro.sample("y", likelihood, obs=data.y if obs else None)


def _effects(spec: Spec, g: Group, data: Data, v: Variances) -> Array:
    factor = jax.scipy.linalg.block_diag(*[v.factors[k] for k in g.terms])
    if spec.form == "noncentered":
        standard = dist.Normal(jnp.zeros((g.J, g.S)), 1.0).to_event(2)
        u = numpyro.sample(f"u_{g.name}", standard)
        return numpyro.deterministic(f"ranef_{g.name}", u @ factor.T)
    rows = dist.MultivariateNormal(jnp.zeros(g.S), scale_tril=factor).expand([g.J]).to_event(1)
    M = data.scale * jax.scipy.linalg.block_diag(*[data.B[k] for k in g.terms])
    return numpyro.sample(f"ranef_{g.name}", Charted(rows, Affine(0.0, M, 2)))


def body(spec: Spec, data: Data, prior: Sites) -> None:
    """The NumPyro model of ``spec.form``."""
    (marginal if spec.form == "marginal" else hierarchy)(spec, data, prior)


def unconstrained_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Shapes of the sites in the sampler's coordinates."""
    out: dict[str, tuple[int, ...]] = {"sigma": ()}
    if spec.residual is not None:
        out |= residual.unconstrained_shapes(spec.residual)
    if spec.layout.p and not spec.integrate:
        out["beta"] = (spec.layout.p,)
    for g in spec.groups:
        out[f"sd_{g.name}" if g.n_free == g.S else f"sd_{g.name}_free"] = (g.n_free,)
        for k, S in enumerate(g.sizes):
            how = g.correlation(k)
            if how:
                out[f"{how}_{g.name}_{k}"] = (math.comb(S, 2),) if how == "chol" else ()
        if spec.form != "marginal":
            out[f"{'u' if spec.form == 'noncentered' else 'ranef'}_{g.name}"] = (g.J, g.S)
    return out


def build(model: Model, form: str = "marginal", priors: Any = "default") -> Callable[[], None]:
    """The model as a NumPyro function without arguments.

    Works with ``numpyro.infer.MCMC``, ``Predictive``, ``log_density`` and so on, in the caller's
    precision. Sites are listed at the top of this module; all are in the units of the data.

    Parameters
    ----------
    form : {"marginal", "noncentered", "centered"}
        Marginal: random effects integrated out, and β too if its priors are normal or flat (then
        there is no site ``beta``); the others sample all effects.
    priors : {"default", "reml", "flat"}, dict or Priors
        See :func:`lmmjax.bayes.priors.resolve`.

    Raises
    ------
    PrecisionError
        Outside ``with lmmjax.float64():``, unless the model was built with dtype="float32".
    PriorError

    Notes
    -----
    A gradient of the marginal form costs O(J S³ + (d + p)³), of the others O(n (p + S)). With a
    residual structure the cross-products are made anew each time (source.py), and the errors of
    the others are whitened: O(n) for Markov chains and cs, a Cholesky factor per set of positions
    otherwise.
    """
    if model.dtype == "float64":
        require_float64("Model.numpyro_model")
    resolved = resolve(model.design, priors)
    spec = describe(model, form, resolved)
    data, prior = arrays(model, spec), prior_sites(model, spec, resolved)

    def lmm() -> None:
        if model.dtype == "float64":
            require_float64("The NumPyro model")
        body(spec, jax.tree.map(jnp.asarray, data), prior)

    return lmm

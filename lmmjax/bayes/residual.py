r"""Residual parameters as random variables: prior keys, coordinates for the sampler, the law of y.

    key                  parameter, as reported                       default prior
    ``phi rho rho[a,b]`` correlations                                 uniform over their range
    ``cor_residual``     correlation matrix of un, symm               LKJ(1)
    ``partial1`` ...     partial autocorrelations of toep             uniform over (-1, 1)
    ``partial_phi1`` ... those of the parts of arma of order > 1      uniform over (-1, 1)
    ``range``            range, and phi or rho = exp(-1/range)        log-normal, typical distance
    ``nugget``           share of the nugget                          uniform over (0, 1)
    ``sd_ratio[level]``  SD relative to the first                     log-normal(0, 1)
    ``delta``            power or rate of the SD                      normal(0, 1 / SD of covariate)

Priors are densities of these parameters; the free φ of structures.py follow from them one by one,
or from the Cholesky factor of the correlation matrix.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints, transforms

from lmmjax.bayes.charts import Charted, Elementwise, Joint
from lmmjax.errors import PriorError
from lmmjax.residual.structures import (
    ARMA,
    Antedependence,
    Autoregressive,
    CompoundSymmetry,
    Family,
    Spatial,
    Structure,
    Toeplitz,
    Unstructured,
    Variances,
)

if TYPE_CHECKING:
    from lmmjax.design import Design

#: prior key of the correlation matrix of an unstructured correlation
MATRIX = "cor_residual"


class RangeToCorrelation(transforms.Transform):
    """r -> exp(-1/r): the correlation at distance 1 of a range r."""

    domain = constraints.positive
    codomain = constraints.unit_interval

    def __call__(self, x: Array) -> Array:
        return jnp.exp(-1.0 / x)

    def _inverse(self, y: Array) -> Array:
        return -1.0 / jnp.log(y)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        return -1.0 / x - 2.0 * jnp.log(x)

    def tree_flatten(self) -> Any:
        return (), ((), {})


class Parameter(NamedTuple):
    """One free parameter: ``chart`` takes φ to the value that has a prior, in (low, high)."""

    key: str
    low: float
    high: float
    chart: Any
    default: Any


# -------------------------------------------------------------------------------------------------
# What has a prior
# -------------------------------------------------------------------------------------------------


def _interval(key: str, low: float, high: float, slope: float) -> Parameter:
    """A correlation: low + (high - low) logistic(slope φ)."""
    chart = transforms.ComposeTransform(
        [
            transforms.AffineTransform(0.0, slope),
            transforms.SigmoidTransform(),
            transforms.AffineTransform(low, high - low, constraints.unit_interval),
        ]
    )
    return Parameter(key, low, high, chart, dist.Uniform(low, high))


def _partial(key: str) -> Parameter:
    """tanh φ."""
    return _interval(key, -1.0, 1.0, 2.0)


def _decay(family: Spatial, key: str) -> Parameter:
    """A range, or the correlation at distance 1."""
    scale = family.scale
    law = dist.LogNormal(math.log(scale), 1.0)
    if family.kind not in ("pow", "time"):
        minus = transforms.AffineTransform(0.0, -1.0)
        size = transforms.AffineTransform(0.0, scale, constraints.positive)
        chart = transforms.ComposeTransform([minus, transforms.ExpTransform(), size])
        return Parameter(key, 0.0, math.inf, chart, law)
    chart = transforms.ComposeTransform(
        [
            transforms.ExpTransform(),
            transforms.AffineTransform(0.0, -1.0 / scale, constraints.positive),
            transforms.ExpTransform(constraints.less_than(0.0)),
        ]
    )
    default = dist.TransformedDistribution(law, RangeToCorrelation())
    return Parameter(key, 0.0, 1.0, chart, default)


def _of_family(family: Family | None) -> list[Parameter]:
    """Parameters of the correlation one by one; none where it has a matrix's prior."""
    if family is None or isinstance(family, Unstructured):
        return []
    names = family.names()
    if isinstance(family, CompoundSymmetry):
        return [_interval("rho", family._lowest, 1.0, 1.0)]
    if isinstance(family, Autoregressive | Antedependence):
        return [_partial(name) for name in names]
    if isinstance(family, Toeplitz):
        return [_partial(f"partial{k}") for k in range(1, family.T)]
    if isinstance(family, ARMA):
        ar, ma = names[: family.p], names[family.p :]
        parts = [
            name if len(part) == 1 else f"partial_{name}" for part in (ar, ma) for name in part
        ]
        return [_partial(name) for name in parts]
    assert isinstance(family, Spatial)
    nugget = [_interval("nugget", 0.0, 1.0, 1.0)] if family.nugget else []
    return [_decay(family, names[0]), *nugget]


def _of_variances(v: Variances) -> list[Parameter]:
    out = []
    for name, kind, scale in zip(v.names, v.kinds, v.scales, strict=True):
        if kind == "ratio":
            law: Any = dist.LogNormal(0.0, 1.0)
            out.append(Parameter(name, 0.0, math.inf, transforms.ExpTransform(), law))
        else:
            chart = transforms.AffineTransform(0.0, 1.0 / scale)
            law = dist.Normal(0.0, 1.0 / scale)
            out.append(Parameter(name, -math.inf, math.inf, chart, law))
    return out


def parameters(structure: Structure) -> list[Parameter]:
    """Parameters that have a scalar prior each, in the order of φ."""
    return [*_of_family(structure.family), *_of_variances(structure.variances)]


def has_matrix(structure: Structure) -> bool:
    """Whether the correlation has the prior of a matrix."""
    return isinstance(structure.family, Unstructured)


def keys(design: Design) -> list[str]:
    """Prior keys of the residual parameters beside σ."""
    if design.residual is None:
        return []
    s = design.residual.structure
    return [*([MATRIX] if has_matrix(s) else []), *(p.key for p in parameters(s))]


def default_set(design: Design) -> dict[str, Any]:
    """Default priors by key."""
    if design.residual is None:
        return {}
    s = design.residual.structure
    matrix = {MATRIX: 1.0} if has_matrix(s) else {}
    return matrix | {p.key: p.default for p in parameters(s)}


def flat_set(design: Design) -> dict[str, Any]:
    """Uniform over the range of each parameter; improper where that is unbounded."""
    out = default_set(design)
    if design.residual is None:
        return out
    for p in parameters(design.residual.structure):
        if math.isfinite(p.low) and math.isfinite(p.high):
            out[p.key] = dist.Uniform(p.low, p.high)
        else:
            support = constraints.positive if p.low == 0 else constraints.real
            out[p.key] = dist.ImproperUniform(support, (), ())
    return out


def check_support(design: Design, key: str, prior: Any) -> None:
    """Refuse a prior that leaves the range of its residual parameter."""
    assert design.residual is not None
    p = next(x for x in parameters(design.residual.structure) if x.key == key)
    low, high = _bounds(prior)
    if low < p.low or high > p.high:
        raise PriorError(
            f"the prior of {key!r} has the support {prior.support}; expected one within "
            f"({p.low:.4g}, {p.high:.4g}). Use a Uniform, a Beta or a truncated distribution there."
        )


def _bounds(prior: Any) -> tuple[float, float]:
    support = getattr(prior.support, "base_constraint", prior.support)
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    return (-math.inf if low is None else float(low), math.inf if high is None else float(high))


def fills_range(structure: Structure, priors: tuple[Any, ...]) -> tuple[bool, ...]:
    """Whether each prior reaches over the whole range, so that φ are its coordinates."""
    pairs = zip(parameters(structure), priors, strict=True)
    return tuple(_bounds(d) == (p.low, p.high) for p, d in pairs)


def has_distant_sigma(structure: Structure) -> bool:
    """Whether σ belongs to |x| = 1 or x = 0, which may lie far from the rows."""
    return "delta" in structure.variances.kinds


# -------------------------------------------------------------------------------------------------
# Sampling
# -------------------------------------------------------------------------------------------------


def free(structure: Structure, values: dict[str, Array]) -> Array:
    """φ from the values of the sites ``chol_residual`` and ``residual``."""
    parts = []
    if has_matrix(structure):
        L = values["chol_residual"]
        below = np.tril_indices(L.shape[-1], -1)
        parts.append((L / jnp.diagonal(L)[:, None])[below])
    if "residual" in values:
        charts = [p.chart for p in parameters(structure)]
        x = values["residual"]
        parts.append(jnp.stack([t.inv(x[k]) for k, t in enumerate(charts)]))
    return jnp.concatenate(parts)


def sample(
    structure: Structure, own: tuple[bool, ...], priors: tuple[Any, ...], concentration: float
) -> Array:
    """The sites of the residual parameters, and the reported ones by name; φ."""
    values = {}
    if has_matrix(structure):
        site = dist.LKJCholesky(len(structure.family.labels), concentration)  # type: ignore[union-attr]
        values["chol_residual"] = numpyro.sample("chol_residual", site)
    if priors:
        charts = tuple(
            p.chart if mine else transforms.biject_to(_support(d))
            for p, mine, d in zip(parameters(structure), own, priors, strict=True)
        )
        values["residual"] = numpyro.sample("residual", Charted(Joint(priors), Elementwise(charts)))
    phi = free(structure, values)
    for name, value in zip(structure.names, structure.natural(phi), strict=True):
        numpyro.deterministic(name, value)
    return phi


def _support(prior: Any) -> Any:
    return getattr(prior.support, "base_constraint", prior.support)


def unconstrained_shapes(structure: Structure) -> dict[str, tuple[int, ...]]:
    """Shapes of the sites in the sampler's coordinates."""
    n = len(parameters(structure))
    out: dict[str, tuple[int, ...]] = {"residual": (n,)} if n else {}
    return out | ({"chol_residual": (structure.n_corr,)} if has_matrix(structure) else {})


class Scaled(dist.Distribution):
    """``size`` times a positive variable: σ of the reference row from that of a typical row."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (NumPyro's own declaration)
    pytree_data_fields = ("base", "size")
    support = constraints.positive

    def __init__(self, base: Any, size: Array) -> None:
        self.base, self.size = base, size
        super().__init__(base.batch_shape, base.event_shape)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.size * self.base.sample(key, sample_shape)

    def log_prob(self, value: Any) -> Array:
        return self.base.log_prob(value / self.size) - jnp.log(self.size)


class CorrelatedRows(dist.Distribution):
    """y ~ N(η, σ²R(φ)): the errors of a subject are correlated, those of others independent."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    pytree_data_fields = ("loc", "sigma", "phi", "subjects")
    support = constraints.real_vector

    def __init__(self, loc: Array, sigma: Array, phi: Array, subjects: Any) -> None:
        self.loc, self.sigma, self.phi, self.subjects = loc, sigma, phi, subjects
        super().__init__((), loc.shape)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        white = jax.random.normal(key, (*sample_shape, *self.loc.shape), self.loc.dtype)
        colour = jnp.vectorize(
            lambda e: self.subjects.colour(self.phi, self.sigma, e), signature="(n)->(n)"
        )
        return self.loc + colour(white)

    def log_prob(self, value: Any) -> Array:
        return self.subjects.logpdf(self.phi, self.sigma, value - self.loc)


# -------------------------------------------------------------------------------------------------
# Where flat priors are improper
# -------------------------------------------------------------------------------------------------


def check_proper(design: Design, entries: Any, base: str) -> None:
    """Refuse flat priors under which the posterior is improper, or may be.

    A flat range: the likelihood of a process with a constant mean does not fall off as the range
    grows (Berger, De Oliveira and Sansó 2001, J. Amer. Statist. Assoc. 96). A flat delta: σ is the
    SD at |x| = 1 or x = 0, and its flat measure grows with delta as fast as that row is far from
    the data. A flat ratio needs rows of its level that the fixed effects leave free, and, since σ
    may go to 0 while the other SDs stay, reference rows that the effects cannot fit exactly.
    """
    r = design.residual
    if r is None:
        return
    flat = [k for k in keys(design) if isinstance(entries[k], dist.ImproperUniform)]
    for key in flat:
        if not key.startswith("sd_ratio"):
            what = "a flat measure of the range" if key == "range" else "a flat measure of delta"
            _refuse(key, f"the likelihood need not fall off against {what}", base)
    if any(key.startswith("sd_ratio") for key in flat):
        _check_ratios(design, flat, base)
    if has_matrix(r.structure) and isinstance(entries["sigma"], dist.ImproperUniform):
        T, J = len(r.grid), len(r.subjects)
        if J - design.p < T:
            raise PriorError(
                f"flat priors with an unstructured correlation of {T} positions make the posterior "
                f"improper: found {J} subjects for {design.p} fixed effects; expected at least "
                f"{T + design.p}. Use priors='default' (now priors={base!r})."
            )


def _check_ratios(design: Design, flat: list[str], base: str) -> None:
    r = design.residual
    assert r is not None
    v, H = r.structure.variances, r.H
    ratios = np.array([k == "ratio" for k in v.kinds], bool)
    reference = np.all(H[:, ratios] == 0, axis=1)
    effects = design.p + sum(
        len(np.unique(t.codes[reference])) * t.z.shape[1] for t in design.terms
    )
    if reference.sum() <= effects:
        found = f"{int(reference.sum())} rows of the first level or position for {effects} effects"
        _refuse(flat[0], f"sigma may be 0 where they are fitted exactly: found {found}", base)
    for k in np.flatnonzero(ratios):
        rows = H[:, k] != 0
        left = design.p - (np.linalg.matrix_rank(design.X[~rows]) if design.p else 0)
        if v.names[k] in flat and rows.sum() - left < 2:
            _refuse(v.names[k], f"found {int(rows.sum())} rows of its level", base)


def _refuse(key: str, why: str, base: str) -> None:
    raise PriorError(
        f"a flat prior on {key!r} may make the posterior improper: {why}. Give {key!r} a proper "
        f"prior, as in priors={{'base': {base!r}, {key!r}: LogNormal(...)}}, or use "
        "priors='default'."
    )

r"""From draws of the sampler's coordinates to draws of everything, in the units of the data.

In the marginal form β and b have been integrated out; given (θ, σ) they are Gaussian, so they are
drawn exactly, β first and then b given β, from the same factorisation that gave the likelihood.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.infer.util import constrain_fn

from lmmjax import likelihood as lk
from lmmjax.bayes.numpyro_model import (
    Data,
    Sites,
    Spec,
    body,
    gaussian_beta,
    reduction,
    variances_of,
)
from lmmjax.errors import DesignError
from lmmjax.gram import Factor, Gram, Layout, Plan, Rhs, crossproducts, plan, standardise
from lmmjax.marginal import _nested

if TYPE_CHECKING:
    from lmmjax.design import Design

#: numbers that one compiled batch of draws may hold: bounds the memory
BATCH_NUMBERS = 2_000_000

#: each draw is completed once, so that compiling fast beats running fast
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def batch_size(numbers_per_draw: int) -> int:
    """How many draws go through a compiled program at once."""
    return max(1, min(256, BATCH_NUMBERS // max(1, numbers_per_draw)))


# -------------------------------------------------------------------------------------------------
# Values of all sites
# -------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("spec", "batch"), compiler_options=QUICK)
def complete(
    spec: Spec, data: Data, prior: Sites, z: dict[str, Array], keys: Array, batch: int
) -> dict[str, Array]:
    """All parameters and effects of each draw (leading axis) in the units of the data."""

    def one(draw: tuple[dict[str, Array], Array]) -> dict[str, Array]:
        position, key = draw
        values = constrain_fn(body, (spec, data, prior), {}, position, return_deterministic=True)
        if spec.form == "marginal":
            values |= _effects_given(spec, data, prior, values, key)
        keep = ("beta", "sigma", "sd_", "cor_", "ranef_")
        return {k: v for k, v in values.items() if k.startswith(keep) and not k.endswith("_free")}

    return jax.lax.map(one, (z, keys), batch_size=batch)


def _effects_given(
    spec: Spec, data: Data, prior: Sites, values: dict[str, Array], key: Array
) -> dict[str, Array]:
    """An exact draw of β given (θ, σ) where it was integrated out, then of b given β."""
    v = variances_of(spec, values)
    red, sigma2 = reduction(spec, data, v)
    key_beta, key_b = jax.random.split(key)
    M = data.scale * data.A
    if spec.integrate:
        beta_s = _draw_beta(red, data, prior, sigma2, key_beta)
    else:
        beta_s = jnp.linalg.solve(M, values["beta"] - data.beta0)
    out = {"beta": data.beta0 + M @ beta_s} if spec.layout.p else {}
    every = (*spec.layout.chain, *spec.layout.core)
    keys = jax.random.split(key_b, len(every) + 1)
    noise = tuple(
        jnp.sqrt(sigma2) * jax.random.normal(k, (S, J), beta_s.dtype)
        for k, (_, S, J) in zip(keys[:-1], every, strict=True)
    )
    assert data.gram is not None, "the marginal form has cross-products"
    b = lk.ranef(spec.layout, data.gram, red, beta_s, noise)
    by_terms = {terms: effects for (terms, _, _), effects in zip(every, b, strict=True)}
    for g in spec.groups:
        B = data.scale * jax.scipy.linalg.block_diag(*[data.B[k] for k in g.terms])
        out[f"ranef_{g.name}"] = (B @ by_terms[g.terms]).T
    return out


def _draw_beta(red: lk.Reduction, data: Data, prior: Sites, sigma2: Array, key: Array) -> Array:
    """β_s ~ N(Q⁻¹h, Q⁻¹), Q = X'V⁻¹X/σ² + P, h = X'V⁻¹y/σ² + P m."""
    b = gaussian_beta(data, prior)
    xx, xy, _ = lk.quadratic(red)
    L = jnp.linalg.cholesky(xx / sigma2 + b.precision)
    half = jax.scipy.linalg.solve_triangular(L, xy / sigma2 + b.precision @ b.mean, lower=True)
    half = half + jax.random.normal(key, half.shape, half.dtype)
    return jax.scipy.linalg.solve_triangular(L, half, lower=True, trans=1)


# -------------------------------------------------------------------------------------------------
# By row
# -------------------------------------------------------------------------------------------------


def slices(n_draws: int, numbers_per_draw: int) -> Iterator[slice]:
    """Parts of the draws that keep an array of ``numbers_per_draw`` a draw within bounds."""
    step = max(1, BATCH_NUMBERS // max(1, numbers_per_draw))
    for first in range(0, n_draws, step):
        yield slice(first, min(first + step, n_draws))


def linear_predictor(
    X: np.ndarray, offset: np.ndarray, terms: Any, beta: np.ndarray, effects: list[np.ndarray]
) -> np.ndarray:
    """Xβ + offset + Zb by draw: (draws, rows). Codes of -1 contribute nothing.

    ``terms`` are (z, codes) by term and ``effects`` their draws (draws, J, S).
    """
    out = beta @ X.T + offset
    for (z, codes), b in zip(terms, effects, strict=True):
        known = codes >= 0
        for s in range(z.shape[1]):
            out[:, known] += z[known, s] * b[:, codes[known], s]
    return out


def normal_logpdf(y: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """log N(y; mean, sd²), elementwise."""
    return -0.5 * ((y - mean) / sd) ** 2 - np.log(sd) - 0.5 * lk.LOG_2PI


# -------------------------------------------------------------------------------------------------
# By group: log p(y_i | β, θ, σ)
# -------------------------------------------------------------------------------------------------


def nested_plan(design: Design) -> Plan:
    """All factors in one chain, innermost first.

    Raises
    ------
    DesignError
        No grouping factor, or crossed ones: then no group's likelihood stands alone.
    """
    if not design.terms:
        raise DesignError(
            "the model has no grouping factor, so there is no likelihood per group; expected "
            "random effects. Use kind='conditional', one value per row."
        )
    members: dict[str, list[int]] = {}
    for k, term in enumerate(design.terms):
        members.setdefault(term.group, []).append(k)
    found = [
        Factor(
            name,
            tuple(ks),
            sum(design.terms[k].z.shape[1] for k in ks),
            len(design.terms[ks[0]].levels),
        )
        for name, ks in members.items()
    ]
    found.sort(key=lambda f: -f.J)
    for inner, outer in itertools.pairwise(found):
        if not _nested(design.terms[inner.terms[0]], design.terms[outer.terms[0]]):
            raise DesignError(
                f"the grouping factors {[f.group for f in found]} are crossed, so the rows of one "
                "level are correlated with those of others and no group's likelihood stands "
                "alone; expected nested factors. Use kind='conditional'."
            )
    structures = plan(design).layout.structures
    layout = Layout(structures, tuple((f.terms, f.S, f.J) for f in found), (), design.p)
    return Plan(layout, tuple(found))


def group_loglik(
    design: Design, beta: np.ndarray, sigma: np.ndarray, factors: list[np.ndarray]
) -> tuple[str, np.ndarray]:
    """log p(y_i | β, θ, σ) per level of the outermost factor and draw.

    Parameters
    ----------
    beta : (draws, p)
    sigma : (draws,)
    factors : per term (draws, S, S)
        Factors of D in the units of the data.

    Returns
    -------
    str, array (draws, J)
        Name of the outermost factor, and the log-likelihoods.

    Notes
    -----
    O(draws (n p + J S³)).
    """
    the_plan = nested_plan(design)
    std = standardise(design)
    units = std.units
    gram, _ = crossproducts(design, the_plan, std)
    lams = [
        np.linalg.solve(B, f / sigma[:, None, None]) for B, f in zip(units.B, factors, strict=True)
    ]
    outer = the_plan.factors[-1]
    codes = {f.group: design.terms[f.terms[0]].codes for f in the_plan.factors}
    stacked = [np.concatenate([std.Z[k] for k in f.terms], axis=1) for f in the_plan.factors]
    # β in the standardised units: the residual is exact whatever the origin of X
    beta_s = np.linalg.solve(units.A, (beta - units.beta0).T / units.scale).T
    rows = _Rows(
        jnp.asarray(std.X),
        jnp.asarray(std.y),
        jnp.asarray(design.weights),
        tuple(jnp.asarray(z) for z in stacked),
        tuple(jnp.asarray(codes[f.group]) for f in the_plan.factors),
    )
    values = _group_loglik(
        the_plan.layout,
        jax.tree.map(jnp.asarray, gram),
        rows,
        [jnp.asarray(a) for a in lams],
        jnp.asarray(beta_s),
        jnp.asarray((sigma / units.scale) ** 2),
        batch_size(design.n * (1 + sum(f.S for f in the_plan.factors))),
    )
    size = np.bincount(codes[outer.group], minlength=outer.J)
    return outer.group, np.asarray(values) - size * np.log(units.scale)


class _Rows(NamedTuple):
    """Rows in standardised units; z and codes per factor of the chain."""

    X: Array
    y: Array
    w: Array
    z: tuple[Array, ...]
    codes: tuple[Array, ...]


@functools.partial(jax.jit, static_argnames=("layout", "batch"))
def _group_loglik(
    layout: Layout,
    gram: Gram,
    rows: _Rows,
    lams: list[Array],
    beta: Array,
    sigma2: Array,
    batch: int,
) -> Array:
    def one(draw: tuple[list[Array], Array, Array]) -> Array:
        lam, b, s2 = draw
        factorised = lk.factorise(layout, lam, gram)
        residual = rows.y - rows.X @ b
        border = tuple(
            jnp.zeros((S, J)).at[:, codes].add((z * (rows.w * residual)[:, None]).T)
            for z, codes, (_, S, J) in zip(rows.z, rows.codes, layout.chain, strict=True)
        )
        rhs = Rhs(border, jnp.zeros(layout.p), jnp.zeros(()))
        forward = lk.forward(layout, factorised, gram, rhs).chain
        return _by_outermost(layout, gram, rows, factorised.U, forward, residual, s2)

    return jax.lax.map(one, (lams, beta, sigma2), batch_size=batch)


def _by_outermost(
    layout: Layout,
    gram: Gram,
    rows: _Rows,
    U: tuple[Array, ...],
    forward: tuple[Array, ...],
    residual: Array,
    sigma2: Array,
) -> Array:
    """-½ (n_i log 2πσ² + log|V_i| + r_i'V_i⁻¹r_i/σ²), gathered by level of the last factor."""
    J = layout.chain[-1][2]
    outer = rows.codes[-1]
    row = rows.w * residual**2 / sigma2 - jnp.log(rows.w) + jnp.log(sigma2) + lk.LOG_2PI
    total = jnp.zeros(J).at[outer].add(row)
    for i, (U_i, solved) in enumerate(zip(U, forward, strict=True)):
        piece = 2 * jnp.sum(jnp.log(jnp.diagonal(U_i)), axis=-1)
        piece = piece - jnp.sum(solved**2, axis=0) / sigma2
        parent = gram.parent[i][-1] if gram.parent[i] else jnp.arange(J)
        total = total.at[parent].add(piece)
    return -0.5 * total

r"""The log-likelihood cut up: by row given the random effects, by independent group without them.

    conditional   log p(y_i | β, b, σ), with correlated errors given the subject's other rows too
    marginal      log N(y_g; X_g β, V_g),   V_g = Z_g D Z_g' + σ²R_g

Each for any number of draws of the parameters; a fit is one draw. Groups of independent rows go
through the factorisation of likelihood.py; where errors have a structure, and where factors are
crossed within the outermost one, V_g is formed.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmmjax import likelihood as lk
from lmmjax.gram import (
    Factor,
    Gram,
    Layout,
    Plan,
    Rhs,
    crossproducts,
    plan,
    standardise,
)
from lmmjax.marginal import (
    BATCH_NUMBERS,
    GroupRows,
    _nested,
    gather,
    outermost,
    whiten_group,
)
from lmmjax.residual.structures import Structure
from lmmjax.residual.subjects import Subjects, subjects

if TYPE_CHECKING:
    from lmmjax.design import Design


def batch_size(numbers_per_draw: int) -> int:
    """How many draws go through a compiled program at once."""
    return max(1, min(256, BATCH_NUMBERS // max(1, numbers_per_draw)))


# -------------------------------------------------------------------------------------------------
# By row
# -------------------------------------------------------------------------------------------------


def row_loglik(
    design: Design, residuals: np.ndarray, sigma: np.ndarray, phi: np.ndarray
) -> np.ndarray:
    """log p(y_i | β, b, σ, φ, and where errors are correlated y of the subject's other rows).

    Parameters
    ----------
    residuals : (draws, n)
        y - Xβ - Zb.
    sigma : (draws,)
    phi : (draws, n_phi)
        Free residual parameters.

    Returns
    -------
    array (draws, n)

    Notes
    -----
    O(draws n); with dense correlations a Cholesky factor per set of positions and draw.
    """
    if design.residual is None:
        sd = sigma[:, None] / np.sqrt(design.weights)
        return -0.5 * ((residuals / sd) ** 2 + lk.LOG_2PI) - np.log(sd)
    the_subjects = jax.tree.map(jnp.asarray, subjects(design))
    draws = jax.tree.map(jnp.asarray, (phi, sigma, residuals))
    return np.asarray(_row_loglik(the_subjects, draws, batch_size(4 * design.n)))


@functools.partial(jax.jit, static_argnames="batch")
def _row_loglik(the_subjects: Subjects, draws: tuple[Array, Array, Array], batch: int) -> Array:
    return jax.lax.map(lambda d: the_subjects.conditional_logpdf(*d), draws, batch_size=batch)


# -------------------------------------------------------------------------------------------------
# By group
# -------------------------------------------------------------------------------------------------


class ByGroup(NamedTuple):
    """Log-likelihoods (draws, J) of the levels of the outermost factor."""

    group: str
    levels: list[str]
    values: np.ndarray


def group_loglik(
    design: Design,
    beta: np.ndarray,
    sigma: np.ndarray,
    factors: list[np.ndarray],
    phi: np.ndarray,
) -> ByGroup:
    """log p(y_g | β, θ, σ, φ) per level of the outermost factor and draw.

    Parameters
    ----------
    beta : (draws, p)
    sigma : (draws,)
    factors : per term (draws, S, S)
        Factors of D in the units of the data.
    phi : (draws, n_phi)
        Free residual parameters.

    Raises
    ------
    DesignError
        No grouping factor, or crossed ones: then no group's likelihood stands alone.

    Notes
    -----
    O(draws (n p + J S³)) for nested factors and independent errors, otherwise O(draws Σ n_g³).
    """
    outer = outermost(design)
    the_plan = _nested_plan(design) if design.residual is None else None
    if the_plan is not None:
        outer = design.terms[the_plan.factors[-1].terms[0]]
        values = _by_elimination(design, the_plan, beta, sigma, factors)
    else:
        covs = [f @ np.swapaxes(f, 1, 2) for f in factors]
        values = _by_covariance(design, outer.codes, beta, sigma, covs, phi)
    return ByGroup(outer.group, [str(x) for x in outer.levels], values)


# Dense V_g --------------------------------------------------------------------------------------


def _by_covariance(
    design: Design,
    codes: np.ndarray,
    beta: np.ndarray,
    sigma: np.ndarray,
    covs: list[np.ndarray],
    phi: np.ndarray,
) -> np.ndarray:
    blocks = jax.tree.map(jnp.asarray, gather(design, codes))
    structure = None if design.residual is None else design.residual.structure
    numbers = sum(g.mask.size * g.mask.shape[1] for g in blocks)
    step = max(1, BATCH_NUMBERS // max(1, design.n))
    found = []
    for at in range(0, len(sigma), step):
        part = slice(at, at + step)
        residuals = design.y - design.offset - beta[part] @ design.X.T
        draws = jax.tree.map(
            jnp.asarray, ([c[part] for c in covs], sigma[part], phi[part], residuals)
        )
        found.append(np.asarray(_dense_loglik(structure, blocks, draws, batch_size(numbers))))
    by = np.concatenate([codes[g.rows[:, 0]] for g in gather(design, codes)])
    out = np.empty((len(sigma), len(by)))
    out[:, by] = np.concatenate(found)
    return out


@functools.partial(jax.jit, static_argnames=("structure", "batch"))
def _dense_loglik(
    structure: Structure | None, blocks: tuple[GroupRows, ...], draws: Any, batch: int
) -> Array:
    """log N(r_g; 0, V_g) by draw and group, groups in the order of the blocks."""

    def one(draw: tuple[list[Array], Array, Array, Array]) -> Array:
        covs, sigma, phi, residuals = draw

        def group(g: GroupRows) -> Array:
            white, logs = whiten_group(structure, g, covs, sigma, phi, residuals[g.rows])
            return -0.5 * jnp.sum(white**2 + g.mask * (lk.LOG_2PI + 2 * logs))

        sizes = [max(1, BATCH_NUMBERS // b.mask.shape[1] ** 2) for b in blocks]
        pairs = zip(blocks, sizes, strict=True)
        return jnp.concatenate([jax.lax.map(group, b, batch_size=m) for b, m in pairs])

    return jax.lax.map(one, draws, batch_size=batch)


# Elimination level by level ---------------------------------------------------------------------


def _nested_plan(design: Design) -> Plan | None:
    """All factors in one chain, innermost first; None where each is not nested in the next."""
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
            return None
    structures = plan(design).layout.structures
    layout = Layout(structures, tuple((f.terms, f.S, f.J) for f in found), (), design.p)
    return Plan(layout, tuple(found))


def _by_elimination(
    design: Design,
    the_plan: Plan,
    beta: np.ndarray,
    sigma: np.ndarray,
    factors: list[np.ndarray],
) -> np.ndarray:
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
    values = _chain_loglik(
        the_plan.layout,
        jax.tree.map(jnp.asarray, gram),
        rows,
        [jnp.asarray(a) for a in lams],
        jnp.asarray(beta_s),
        jnp.asarray((sigma / units.scale) ** 2),
        batch_size(design.n * (1 + sum(f.S for f in the_plan.factors))),
    )
    size = np.bincount(codes[outer.group], minlength=outer.J)
    return np.asarray(values) - size * np.log(units.scale)


class _Rows(NamedTuple):
    """Rows in standardised units; z and codes per factor of the chain."""

    X: Array
    y: Array
    w: Array
    z: tuple[Array, ...]
    codes: tuple[Array, ...]


@functools.partial(jax.jit, static_argnames=("layout", "batch"))
def _chain_loglik(
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

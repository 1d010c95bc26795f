r"""Deleting rows from a fit at fixed θ: what β̂ and σ̂ become, without a refit.

Let D be the rows deleted, a = X'V⁻¹E_D, s = E_D'V⁻¹E_D, r = E_D'V⁻¹(y - Xβ̂), in units of σ, and
L L' = X'V⁻¹X. Deleting D is the same as a parameter for each of its rows, so (Christensen, Pearson
and Johnson 1992, Technometrics 34, 38-45, eqs 2.3 to 2.8)

    T = L⁻¹ a s⁻¹ a' L⁻ᵀ,   t = L⁻¹ a s⁻¹ r,   q = r's⁻¹r,
    L'(β̂ - β̂_D) = (I - T)⁻¹ t = δ,   X_D'V_D⁻¹X_D = L (I - T) L',   r²_D = r² - q - t'δ.

Two routes give T, t and q:

* *clusters* (the rows of D depend on no others): they are the cross-products of the cluster after
  elimination, T = L⁻¹ X_D'V_D⁻¹X_D L⁻ᵀ and so on: a sum over its levels, no matrix of size n_D;
* *any rows*: with l the row of the factorisation that belongs to one row of data
  (:func:`lmmjax.likelihood.forward_rows`), s = w^½ (I - l_Z l_Z') w^½ and L⁻¹a = l_X'w^½, from the
  smaller of n_D x n_D and (random effects of D)².

Single rows need neither: all is elementwise. Correlated residuals go cluster by cluster with the
dense V_i.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax import gram as gr
from lmmjax import likelihood as lk
from lmmjax.errors import DesignError, LmmError
from lmmjax.gram import Gram, Layout, LevelSums, Rhs
from lmmjax.precision import in_float64
from lmmjax.threads import one_blas_thread

if TYPE_CHECKING:
    from lmmjax.fit import Fit

#: 1 - the largest eigenvalue of T, below which a coefficient is not estimable without the rows
ESTIMABLE = 1e-9

#: numbers gathered for a chunk of rows
CHUNK = 2**22

#: rows of one subject of a residual structure, or of one dense block, at most
MOST = 5000


@dataclass(frozen=True, eq=False)
class Deletion:
    """What deleting each of m sets of rows does, in units of σ."""

    root: np.ndarray  # σ L⁻ᵀ, (p, p): vcov = root root'
    T: np.ndarray  # (m, p, p)
    t: np.ndarray  # (m, p)
    q: np.ndarray  # (m,)
    n: np.ndarray  # rows deleted, (m,)

    @functools.cached_property
    def inverse(self) -> np.ndarray:
        """(I - T)⁻¹, NaN where a coefficient is not estimable from the rows that are left."""
        e, Q = np.linalg.eigh(np.eye(self.t.shape[1]) - self.T)
        known = np.all(e > ESTIMABLE, axis=1)
        e = np.where(known[:, None], e, np.nan)
        return (Q / e[:, None]) @ np.swapaxes(Q, 1, 2)

    @property
    def delta(self) -> np.ndarray:
        """L'(β̂ - β̂_D), (m, p)."""
        return np.einsum("mij,mj->mi", self.inverse, self.t)

    @property
    def dfbeta(self) -> np.ndarray:
        """β̂ - β̂_D, (m, p)."""
        return self.delta @ self.root.T

    def vcov(self) -> np.ndarray:
        """Covariance of β̂_D at the σ of the fit, (m, p, p)."""
        return self.root @ self.inverse @ self.root.T

    def sigma(self, sigma: float, nu: float) -> np.ndarray:
        """σ̂ without the rows, θ fixed: √(r²_D/(ν - n_D)); NaN where no degrees are left."""
        r2 = nu - self.q - np.einsum("mi,mi->m", self.t, self.delta)
        with np.errstate(invalid="ignore", divide="ignore"):
            return sigma * np.sqrt(np.maximum(r2, 0.0) / np.where(nu > self.n, nu - self.n, np.nan))


class RowDeletion(NamedTuple):
    """The same for every single row: a, s and r, and the leverages."""

    root: np.ndarray  # (p, p)
    a: np.ndarray  # L⁻¹X'V⁻¹e_i, (n, p)
    s: np.ndarray  # e_i'V⁻¹e_i, (n,)
    r: np.ndarray  # e_i'V⁻¹(y - Xβ̂) in units of σ, (n,)
    leverage: np.ndarray  # ∂ŷ_i/∂y_i given θ, (n,)
    leverage_fixed: np.ndarray  # ∂(x_i'β̂)/∂y_i given θ, (n,)

    @property
    def left(self) -> np.ndarray:
        """s - a'a: the precision of y_i given all other rows, β estimated from them."""
        left = self.s - np.sum(self.a**2, axis=1)
        return np.where(left > ESTIMABLE * self.s, left, np.nan)

    def dfbeta(self) -> np.ndarray:
        """β̂ - β̂ without the row, (n, p)."""
        return (self.a * (self.r / self.left)[:, None]) @ self.root.T


# -------------------------------------------------------------------------------------------------
# What both routes start from
# -------------------------------------------------------------------------------------------------


class Pieces(NamedTuple):
    """The factorisation at θ̂ with all nested factors in the chain, and the rows."""

    plan: gr.Plan
    X: np.ndarray  # standardised, (n, p)
    Z: list[np.ndarray]  # per factor of the plan (n, S)
    codes: list[np.ndarray]
    e: np.ndarray  # (y - offset - Xβ̂)/σ
    w: np.ndarray
    factor: lk.Factorised
    chain: list[np.ndarray]  # rows of L for e by level, chain i: (S, J)
    root: np.ndarray


def check(fit: Fit) -> None:
    """Refuse models without fixed effects (and, by asking, those that keep no rows)."""
    if fit.model.design.X.shape[1] == 0:
        raise DesignError(
            "influence is about fixed effects; found a model without any. Use residuals() and qq()."
        )


@functools.partial(jax.jit, static_argnums=0)
def _factorise(
    layout: Layout, theta: jax.Array, gram: Gram, rhs: Rhs
) -> tuple[lk.Factorised, jax.Array, list[jax.Array]]:
    red = lk.reduce(layout, theta, gram, rhs)
    beta = lk.fixef(red)
    borders = [W[:, layout.d :] for W in red.factorised.border]
    rows = [
        r - jnp.einsum("sxj,x->sj", W, beta) for r, W in zip(red.row.chain, borders, strict=True)
    ]
    return red.factorised, beta, rows


@in_float64
def pieces(fit: Fit) -> Pieces:
    """Factorise at θ̂: one pass over the rows for cross-products, unless the model has them."""
    design, model = fit.model.design, fit.model
    the_plan = gr.plan(design, dense=0)
    layout = dataclasses.replace(the_plan.layout, sparse=False)
    the_plan = dataclasses.replace(the_plan, layout=layout)
    s = gr.standardise(design)
    products = (
        model._standard[2:]
        if layout == model._plan.layout
        else gr.crossproducts(design, the_plan, s)
    )
    theta = jnp.asarray(np.asarray(fit._theta_s, float))
    with one_blas_thread():
        factor, beta, chain = jax.device_get(_factorise(layout, theta, *products))
    L = factor.core[layout.d :, layout.d :]
    sigma = fit.sigma / s.units.scale
    return Pieces(
        the_plan,
        s.X,
        [gr._stack(s, f) for f in the_plan.factors],
        [design.terms[f.terms[0]].codes for f in the_plan.factors],
        (s.y - s.X @ beta) / sigma,
        np.asarray(design.weights, float),
        factor,
        [row / sigma for row in chain],
        fit.sigma * np.linalg.solve(L, s.units.A.T).T,
    )


# -------------------------------------------------------------------------------------------------
# Rows of the factorisation
# -------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _rows_of_l(
    layout: Layout, factor: lk.Factorised, rows: lk.Rows
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    return lk.forward_rows(layout, factor, None, rows)  # type: ignore[arg-type]


class RowsOfL(NamedTuple):
    """l of some rows: chain i (m, S_i), core columns of Z (m, d), X (m, p)."""

    chain: list[np.ndarray]
    core: np.ndarray
    x: np.ndarray


@in_float64
def rows_of_l(p: Pieces, rows: np.ndarray) -> RowsOfL:
    """l of the rows with these numbers, padded to a power of two for the compiler."""
    layout, c = p.plan.layout, p.plan.n_chain
    m = len(rows)
    at = np.concatenate([rows, np.full(2 ** int(np.ceil(np.log2(max(m, 1)))) - m, rows[-1])])
    core = np.zeros((len(at), layout.d + layout.p))
    core[:, layout.d :] = p.X[at]
    first = 0
    for f, Z, code in list(zip(p.plan.factors, p.Z, p.codes, strict=True))[c:]:
        place = first + f.S * code[at][:, None] + np.arange(f.S)
        np.put_along_axis(core, place, Z[at], axis=1)
        first += f.S * f.J
    z, codes = tuple(z[at] for z in p.Z[:c]), tuple(k[at] for k in p.codes[:c])
    given: Any = lk.Rows(z, codes, core)  # type: ignore[arg-type]
    chain, out = jax.device_get(_rows_of_l(layout, p.factor, given))
    return RowsOfL([a.T[:m] for a in chain], out[:m, : layout.d], out[:m, layout.d :])


def _chunks(p: Pieces) -> Iterator[np.ndarray]:
    layout = p.plan.layout
    width = (layout.d + layout.p) * (2 + sum(S for _, S, _ in layout.chain))
    step = 2 ** int(np.log2(max(CHUNK // width, 16)))
    n = len(p.e)
    for at in range(0, n, step):
        yield np.arange(at, min(at + step, n))


def single_rows(fit: Fit) -> RowDeletion:
    """Leverage, and what deleting each row does: one pass over the rows.

    Notes
    -----
    O(n (S² + S m + m²)) with m columns of crossed factors and X, whatever the number of levels.
    """
    check(fit)
    if fit.model.is_structured:
        return _dense_rows(fit)
    p = pieces(fit)
    n, layout = len(p.e), p.plan.layout
    a, z2 = np.empty((n, layout.p)), np.empty(n)
    for rows in _chunks(p):
        made = rows_of_l(p, rows)
        a[rows] = made.x
        z2[rows] = sum((x**2).sum(axis=1) for x in (*made.chain, made.core))
    inner = _conditional_residuals(fit)
    L = p.factor.core[layout.d :, layout.d :]
    fixed = np.einsum("ni,ni->n", p.X, np.linalg.solve(L.T, a.T).T)
    conditional = z2 + np.sum(a**2, axis=1)
    w = p.w
    return RowDeletion(
        p.root, w[:, None] * a, w * (1.0 - w * z2), w * inner, w * conditional, w * fixed
    )


def _conditional_residuals(fit: Fit) -> np.ndarray:
    """(y - ŷ)/σ; times the weight it is e_i'V⁻¹(y - Xβ̂)."""
    return (fit.model.design.y - fit.fitted().to_numpy()) / fit.sigma


# -------------------------------------------------------------------------------------------------
# Groups of rows
# -------------------------------------------------------------------------------------------------


def groups(fit: Fit, codes: np.ndarray, m: int) -> Deletion:
    """What deleting the rows of each of ``m`` groups does.

    Parameters
    ----------
    codes : (n,) int
        Group of each row.

    Notes
    -----
    O(n p²) and O(p³) a group where the rows of a group depend on no others; else the rows are laid
    out group by group, O(min(n_D, q_D)³) for n_D rows with q_D random effects.

    Raises
    ------
    LmmError
        For blocks of dependent rows that are too large to be laid out.
    """
    check(fit)
    if fit.model.is_structured:
        return _dense_groups(fit, codes, m)
    p = pieces(fit)
    levels = _levels_of_groups(p, codes)
    if levels is None:
        return _any_rows(fit, p, codes, m)
    return _clusters(p, codes, m, levels)


def _levels_of_groups(p: Pieces, codes: np.ndarray) -> list[np.ndarray] | None:
    """Group of each level of each chain factor; None where a level lies in several groups."""
    if p.plan.layout.core:
        return None
    out = []
    for f, own in zip(p.plan.factors, p.codes, strict=True):
        lies_in = gr._parents(own, f.J, codes)
        if lies_in is None:
            return None
        out.append(lies_in)
    return out


def _sums(left: np.ndarray, right: np.ndarray, sums: LevelSums) -> np.ndarray:
    """Σ left' right by group: (n, a), (n, b) -> (m, a, b)."""
    return np.stack([np.stack([sums(x * y) for y in right.T], axis=-1) for x in left.T], axis=-2)


def _clusters(p: Pieces, codes: np.ndarray, m: int, levels: list[np.ndarray]) -> Deletion:
    """From the cross-products of each group after elimination."""
    both = np.column_stack([p.X, p.e])
    S = _sums(both * p.w[:, None], both, LevelSums(codes, m))
    for W, row, lies_in in zip(p.factor.border, p.chain, levels, strict=True):
        by_level = LevelSums(lies_in, m)
        for s in range(len(W)):
            eliminated = np.concatenate([W[s], row[s][None]]).T
            S -= _sums(eliminated, eliminated, by_level)
    L = p.factor.core
    k = len(L)
    T = np.linalg.solve(L, np.swapaxes(np.linalg.solve(L, S[:, :k, :k]), 1, 2))
    t = np.linalg.solve(L, S[:, :k, k].T).T
    return Deletion(p.root, T, t, S[:, k, k], np.bincount(codes, minlength=m))


def _any_rows(fit: Fit, p: Pieces, codes: np.ndarray, m: int) -> Deletion:
    """From rows of the factorisation, group by group."""
    k, n = p.plan.layout.p, np.bincount(codes, minlength=m)
    T, t, q = np.empty((m, k, k)), np.empty((m, k)), np.empty(m)
    e = _conditional_residuals(fit)
    order = np.argsort(codes, kind="stable")
    with one_blas_thread():
        for g, rows in enumerate(np.split(order, np.cumsum(n)[:-1])):
            made = rows_of_l(p, rows)
            root_w = np.sqrt(p.w[rows])
            right = root_w[:, None] * np.column_stack([made.x, e[rows]])
            S = right.T @ _solve(_random_part(p, rows, made, root_w), right)
            T[g], t[g], q[g] = S[:k, :k], S[:k, k], S[k, k]
    return Deletion(p.root, T, t, q, n)


def _random_part(p: Pieces, rows: np.ndarray, made: RowsOfL, root_w: np.ndarray) -> np.ndarray:
    """w^½ l_Z with one column for each random effect that the rows have, (n_D, q_D)."""
    parts = [made.core]
    for z, codes in zip(made.chain, p.codes, strict=False):
        levels, own = np.unique(codes[rows], return_inverse=True)
        block = np.zeros((len(rows), len(levels), z.shape[1]))
        block[np.arange(len(rows)), own.ravel()] = z
        parts.append(block.reshape(len(rows), -1))
    out = root_w[:, None] * np.concatenate(parts, axis=1)
    if min(out.shape) > MOST:
        raise LmmError(
            f"a group has {out.shape[0]} rows and {out.shape[1]} random effects, tied to those of "
            f"other groups; influence is computed for at most {MOST} of either. Leave out a factor "
            "of smaller groups."
        )
    return out


def _solve(A: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(I - A A')⁻¹ right, from the smaller side of A."""
    if A.shape[0] <= A.shape[1]:
        return np.linalg.solve(np.eye(len(A)) - A @ A.T, right)
    inner = np.linalg.solve(np.eye(A.shape[1]) - A.T @ A, A.T @ right)
    return right + A @ inner


# -------------------------------------------------------------------------------------------------
# Residual structures: dense V_i
# -------------------------------------------------------------------------------------------------


class _Cluster(NamedTuple):
    """Rows that depend on no others, V_i relative to σ²."""

    rows: np.ndarray
    R: np.ndarray  # (n_i, n_i)
    inverse: np.ndarray  # V_i⁻¹
    a: np.ndarray  # V_i⁻¹X_iL⁻ᵀ, (n_i, p)


def _dense(fit: Fit) -> tuple[np.ndarray, Iterator[_Cluster]]:
    """The root of vcov, and the clusters of dependent rows one after the other: O(Σ n_i³)."""
    design = fit.model.design
    codes = _clusters_of(design)
    n = np.bincount(codes)
    if n.max() > MOST:
        raise LmmError(
            f"found {n.max()} rows that depend on each other; influence beside a residual "
            f"structure is computed with dense blocks of at most {MOST} rows."
        )
    half = np.linalg.cholesky(fit._unscaled_vcov)
    parts = np.split(np.argsort(codes, kind="stable"), np.cumsum(n)[:-1])
    return fit.sigma * half, (_cluster(fit, rows, half) for rows in parts)


def _cluster(fit: Fit, rows: np.ndarray, half: np.ndarray) -> _Cluster:
    from lmmjax.residual.covariance import block

    design = fit.model.design
    R = block(design.residual, fit.phi, design.weights, rows)
    V = R.copy()
    for term, cov in zip(design.terms, fit._term_covs(), strict=True):
        same = term.codes[rows, None] == term.codes[rows]
        V += np.where(same, term.z[rows] @ (cov / fit.sigma**2) @ term.z[rows].T, 0.0)
    inverse = np.linalg.inv(V)
    return _Cluster(rows, R, inverse, inverse @ design.X[rows] @ half)


def _clusters_of(design: Any) -> np.ndarray:
    """Connected rows: those that share a level of a factor or a residual subject."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n, first, pairs = design.n, design.n, []
    factors = [t.codes for t in design.terms]
    if design.residual.correlated:
        factors.append(design.residual.subject)
    for codes in factors:
        pairs.append(np.stack([np.arange(n), first + codes]))
        first += int(codes.max()) + 1
    i, j = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), int)
    graph = coo_array((np.ones(len(i)), (i, j)), shape=(first, first))
    labels = connected_components(graph, directed=False)[1][:n]
    return np.unique(labels, return_inverse=True)[1].ravel()


def _dense_rows(fit: Fit) -> RowDeletion:
    design = fit.model.design
    root, clusters = _dense(fit)
    half = root / fit.sigma
    e = (design.y - design.offset - design.X @ fit._beta) / fit.sigma
    n, p = design.X.shape
    a, (s, r, conditional, fixed) = np.empty((n, p)), np.empty((4, n))
    for c in clusters:
        a[c.rows], s[c.rows], r[c.rows] = c.a, np.diag(c.inverse), c.inverse @ e[c.rows]
        P = c.inverse - c.a @ c.a.T
        conditional[c.rows] = 1.0 - np.sum(c.R * P, axis=1)
        fixed[c.rows] = np.sum((design.X[c.rows] @ half) * c.a, axis=1)
    return RowDeletion(root, a, s, r, conditional, fixed)


def _dense_groups(fit: Fit, codes: np.ndarray, m: int) -> Deletion:
    """s is block-diagonal over clusters, so T, t and q are sums over them."""
    design = fit.model.design
    root, clusters = _dense(fit)
    e = (design.y - design.offset - design.X @ fit._beta) / fit.sigma
    p = design.p
    S = np.zeros((m, p + 1, p + 1))
    for c in clusters:
        right = np.column_stack([c.a, c.inverse @ e[c.rows]])
        for g in np.unique(codes[c.rows]):
            here = np.flatnonzero(codes[c.rows] == g)
            s = c.inverse[np.ix_(here, here)]
            S[g] += right[here].T @ np.linalg.solve(s, right[here])
    return Deletion(root, S[:, :p, :p], S[:, :p, p], S[:, p, p], np.bincount(codes, minlength=m))

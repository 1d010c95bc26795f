r"""The batched core: many fits of one layout in one compiled call, each with a status of its own.

Nothing here knows the likelihood. ``estimate.optimise`` and ``derivatives.vcov_and_derivative`` are
mapped over items: ``lanes`` items side by side (``vmap``), the groups of lanes one after the other
(``lax.map``), so that a straggler holds up its own group only and memory does not grow with the
batch. The lanes share no number: an item that is not finite changes no bit of another.

With residual parameters a source of cross-products (residual/source.py) stands in the place of the
Gram, what involves y of it (``source.response``) in that of the right-hand side, and (θ, φ) in that
of θ.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax import derivatives, estimate
from lmmjax import gram as gr
from lmmjax import likelihood as lk
from lmmjax.gram import Gram, Layout, Plan, Rhs, Units
from lmmjax.optimize import (
    CONVERGED,
    FLAT_STOP,
    MAX_ITERATIONS,
    PROMISE,
    SINGULAR_TOLERANCE,
    Optimum,
    certified,
)
from lmmjax.residual import program as structured
from lmmjax.residual.source import Source
from lmmjax.residual.structures import Structure

#: verdicts; the first two are usable fits
OK, SINGULAR, LIMIT, NOT_FINITE, STUCK, EXACT, TOO_FEW, NOT_RUN, UNFIT = range(9)

WORDS = {
    OK: "converged",
    SINGULAR: "singular",
    LIMIT: "failed: stopped at the limit of iterations",
    NOT_FINITE: "failed: missing or infinite values in the data of this item",
    STUCK: "failed: the gradient is not zero, or a saddle point",
    EXACT: "failed: the fixed effects reproduce the response exactly",
    TOO_FEW: "failed: too few rows or levels for the effects of the model",
    NOT_RUN: "not run",
    UNFIT: "failed: the residual structure does not fit the data of this item",
}

#: factors on the identity from which items that did not converge are tried again
OTHER_STARTS = (0.2, 4.0)

#: columns of the dense core above which items run one after the other
LARGE_CORE = 64


class Items(NamedTuple):
    """Fitted items in standardised units, NumPy arrays with the item as first axis."""

    theta: Any  # (m, n_theta), residual parameters φ behind θ where there are any
    value: Any  # (m,) profiled -2 log-likelihood
    gradient: Any
    hessian: Any  # (m, n_theta, n_theta)
    n_evals: Any
    raw_status: Any  # of optimize.STATUS
    promised: Any  # (m,) decrease that a Newton step still promises
    lowest: Any  # (m,) eigenvalue of the Hessian
    beta: Any  # (m, p)
    unscaled_vcov: Any  # (m, p, p), times sigma2
    sigma2: Any  # (m,)
    dvcov: Any  # (m, p, p, n_theta), of sigma2 * unscaled_vcov along the profile
    lams: Any  # per term (m, S, S)


class Batch(NamedTuple):
    """What :func:`fit_items` returns."""

    items: Items
    status: np.ndarray  # (m,) keys of WORDS
    retried: np.ndarray  # (m,) bool: had to be tried from other starts


def _one(layout: Layout, method: str, gram: Any, rhs: Any, theta0: jax.Array) -> Items:
    if isinstance(gram, Source):
        source = gram.with_response(rhs)
        best, est = structured.optimise(layout, method, source, theta0)
        _, dV = structured.vcov_and_derivative(layout, method, best.theta, source)
        return _items(layout, best, est, dV)
    best, est = estimate.optimise(layout, method, gram, rhs, theta0)
    if layout.core:  # the optimiser may have used an approximate curvature
        _, gradient, hessian = derivatives.value_gradient_hessian(
            layout, method, best.theta, gram, rhs
        )
        best = certified(best, gradient, hessian)
    _, dV = derivatives.vcov_and_derivative(layout, method, best.theta, gram, rhs)
    return _items(layout, best, est, dV)


def _items(layout: Layout, best: Optimum, est: estimate.Estimates, dV: jax.Array) -> Items:
    lams = tuple(lk.factors(layout, best.theta[: layout.n_theta]))
    return Items(
        best.theta,
        best.value,
        best.gradient,
        best.hessian,
        best.n_evals,
        best.status,
        best.promised,
        best.lowest,
        est.beta,
        est.unscaled_vcov,
        est.sigma2,
        dV,
        lams,
    )


def program(
    layout: Layout, method: str, lanes: int, shared: bool, gram: Any, rhs: Any, theta0: jax.Array
) -> Items:
    """All items of a batch; pure, to be compiled by :func:`compiled`.

    Parameters
    ----------
    lanes : int
        Items that run side by side.
    shared : bool
        One Gram (or source) for all items, or one each (leading axis).
    rhs, theta0
        With a leading axis of items.
    """

    def one(args: Any) -> Items:
        return _one(layout, method, *((gram, *args) if shared else args))

    mapped = (rhs, theta0) if shared else (gram, rhs, theta0)
    if theta0.shape[-1] == 0:  # closed form: nothing can straggle
        return jax.vmap(one)(mapped)
    return map_lanes(one, mapped, lanes)


def map_lanes(one: Any, items: Any, lanes: int) -> Any:
    """``lanes`` items side by side, the groups one after the other.

    ``jax.lax.map(batch_size=)`` refuses arrays without numbers: a model without fixed effects, or
    without random ones.
    """
    m = _count(items)
    whole = m // lanes * lanes
    parts = []
    if whole:
        shape = (whole // lanes, lanes)
        groups = jax.tree.map(lambda a: a[:whole].reshape(*shape, *a.shape[1:]), items)
        done = jax.lax.map(jax.vmap(one), groups)
        parts.append(jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), done))
    if whole < m:
        parts.append(jax.vmap(one)(jax.tree.map(lambda a: a[whole:], items)))
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


compiled = jax.jit(program, static_argnums=(0, 1, 2, 3))


def standard(model: Any) -> tuple[Plan, Units, Gram, Rhs]:
    """Plan, units and products of a model with dense blocks, as batches use them.

    A single fit of large crossed factors may keep products by entry; every block of a batch has the
    layout's full shape.
    """
    the_plan, units, the_gram, rhs = model._standard
    if not the_plan.layout.sparse:
        return the_plan, units, the_gram, rhs
    layout = dataclasses.replace(the_plan.layout, sparse=False)
    the_plan = dataclasses.replace(the_plan, layout=layout)
    standardised = gr.standardise(model.design)
    return the_plan, units, *gr.crossproducts(model.design, the_plan, standardised)


def reported(structure: Structure | None, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Residual parameters as reported, (m, r), and S of the row that σ refers to, (m,).

    For (θ, φ) (m, n_theta + n_phi) of items of one structure; (m, 0) and ones without one.
    """
    if structure is None or len(theta) == 0:
        return np.zeros((len(theta), 0)), np.ones(len(theta))
    phi = theta[:, theta.shape[1] - structure.n_phi :]
    reference = lambda at: structure.variances.reference(at[structure.n_corr :])  # noqa: E731
    natural, sd = jax.vmap(lambda at: (structure.natural(at), reference(at)))(phi)
    return np.asarray(natural), np.asarray(sd)


def choose_lanes(layout: Layout, rhs: Any = None, k: int = 1, platform: str | None = None) -> int:
    """Items side by side: all that an accelerator holds; on a CPU as many as fit its cache.

    ``rhs`` are the parts of the items where these are more than the blocks of the layout: rows or
    patterns of a residual structure with k parameters in all. The more there are, the more an
    evaluation costs and the more iterations differ, so that lanes would wait for one another.
    """
    if layout.d > LARGE_CORE:
        return 1
    numbers = sum(S * (S + layout.d + layout.p + 1) * J for _, S, J in layout.chain)
    own = 0 if rhs is None or isinstance(rhs, Rhs) else numbers_of_one(rhs) * (layout.p + 1) * k
    if (platform or jax.default_backend()) != "cpu":
        return int(np.clip(2 ** int(np.log2(1e8 / (own + 1))), 1, 1024))
    least = 1 if own > numbers else 4
    return int(np.clip(2 ** int(np.log2(1e5 / (max(own, numbers) + 50)).clip(0)), least, 64))


def numbers_of_one(rhs: Any) -> int:
    """Numbers in the part of one item; leaves have a leading axis of items."""
    return sum(int(np.prod(np.shape(a)[1:])) for a in jax.tree.leaves(rhs))


def _count(rhs: Any) -> int:
    return len(jax.tree.leaves(rhs)[0])


def bucket(m: int, lanes: int) -> int:
    """The padded number of items: lanes times a power of two, so that few shapes are compiled."""
    return lanes * 2 ** int(np.ceil(np.log2(max(-(-m // lanes), 1))))


def pad_items(tree: Any, m: int, size: int) -> Any:
    """Repeat the last item until there are ``size``; the lanes do not see one another."""
    return jax.tree.map(lambda a: np.concatenate([a, np.repeat(a[-1:], size - m, axis=0)]), tree)


def fit_items(
    layout: Layout,
    method: str,
    gram: Any,
    rhs: Any,
    theta0: np.ndarray | None = None,
    *,
    shared: bool = True,
    lanes: int | None = None,
    size: int | None = None,
    mesh: Any = None,
    retry: bool = True,
    exact: np.ndarray | None = None,
) -> Batch:
    """Fit every item; retry those that fail from other starts.

    Parameters
    ----------
    layout : Layout
    method : {"REML", "ML"}
    gram : Gram or source
        One for all items, or with a leading axis of items (``shared=False``).
    rhs : Rhs or parts of the source
        With a leading axis of items.
    theta0 : array, shape (m, n_theta) or (n_theta,), optional
        Starts; the identity (and the structure's own start) by default.
    lanes : int, optional
        Items side by side; chosen from the size of the blocks by default.
    size : int, optional
        Pad to this many items, so that the last chunk of many runs the program of the others.
    mesh : jax.sharding.Mesh, optional
        Devices to share the items among.
    retry : bool
        Try failed items again.
    exact : (m,) bool, optional
        Items that X reproduces: there is nothing to find, and they are not tried again.

    Returns
    -------
    Batch

    Notes
    -----
    Call it inside :func:`lmmjax.float64`. One program is compiled for each layout and each power of
    two of items.
    """
    m = _count(rhs)
    start = _start(layout, gram) if theta0 is None else np.asarray(theta0)
    lanes = min(
        lanes or choose_lanes(layout, rhs, start.shape[-1]), 2 ** int(np.ceil(np.log2(max(m, 1))))
    )
    size = bucket(max(m, size or 0), lanes * (1 if mesh is None else mesh.size))
    run = functools.partial(_run, layout, method, shared, lanes, size, mesh)
    items = run(gram, rhs, start)
    status = judge(layout, items, rhs)
    again = (status == LIMIT) | (status == STUCK) if retry else np.zeros(m, bool)
    failed = np.flatnonzero(again if exact is None else again & ~np.asarray(exact))
    retried = np.isin(np.arange(m), failed)
    for factor in OTHER_STARTS:
        if not len(failed):
            break
        pick = lambda a: np.asarray(a)[failed]  # noqa: B023, E731
        some, few = (gram if shared else jax.tree.map(pick, gram)), jax.tree.map(pick, rhs)
        other = run(some, few, _start(layout, gram, factor))
        verdict = judge(layout, other, few)
        better = verdict <= SINGULAR
        items = jax.tree.map(functools.partial(_replace, failed[better], better), items, other)
        status[failed[better]] = verdict[better]
        failed = failed[~better]
    return Batch(items, status, retried)


def _start(layout: Layout, gram: Any, factor: float = 1.0) -> np.ndarray:
    """Factors on the identity, residual parameters where their structure begins."""
    theta = factor * estimate.start(layout)
    return np.append(theta, gram.structure.start()) if isinstance(gram, Source) else theta


def _replace(at: np.ndarray, which: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    out = np.array(old)
    out[at] = new[which]
    return out


def _run(
    layout: Layout,
    method: str,
    shared: bool,
    lanes: int,
    size: int,
    mesh: Any,
    gram: Any,
    rhs: Any,
    start: np.ndarray,
) -> Items:
    """One compiled call on padded items; NumPy out. A retry runs the program of the first try."""
    m = _count(rhs)
    theta0 = np.broadcast_to(start, (m, start.shape[-1]))
    theta0 = pad_items(theta0, m, size)
    # a number that is not finite stops its lane at once; copies of a straggler would not
    blank = lambda a: np.full((size - m, *np.shape(a)[1:]), np.nan)  # noqa: E731
    rhs = jax.tree.map(lambda a: np.concatenate([a, blank(a)]), rhs)
    gram = gram if shared else pad_items(gram, m, size)
    if mesh is None:
        out = compiled(layout, method, lanes, shared, gram, rhs, theta0)
    else:
        from lmmjax.sharding import run_sharded

        out = run_sharded(mesh, layout, method, lanes, shared, gram, rhs, theta0)
    return jax.tree.map(lambda a: np.asarray(a)[:m], out)


def judge(layout: Layout, items: Items, rhs: Any) -> np.ndarray:
    """The verdict on each item, by the checks of a single fit; (m,) keys of WORDS."""
    value, gradient, hessian = (np.asarray(a) for a in (items.value, items.gradient, items.hessian))
    raw = np.asarray(items.raw_status)
    given = np.ones(len(value), bool)
    for part in jax.tree.leaves(rhs):
        given &= np.all(np.isfinite(np.asarray(part)).reshape(len(value), -1), axis=1)
    finite = np.isfinite(value) & np.all(np.isfinite(hessian), axis=(-1, -2))
    finite &= np.all(np.isfinite(gradient), axis=-1)
    status = np.zeros(len(value), np.int8)
    if gradient.shape[-1]:
        largest = np.maximum(1.0, np.max(np.abs(hessian), axis=(-1, -2)))
        curved = np.asarray(items.lowest) > -1e-6 * largest
        good = (np.asarray(items.promised) < PROMISE["float64"]) & curved
        good &= np.isin(raw, (CONVERGED, FLAT_STOP, MAX_ITERATIONS))
        status[is_singular(items)] = SINGULAR
        status[~good] = np.where(raw[~good] == MAX_ITERATIONS, LIMIT, STUCK)
    status[~finite] = STUCK
    status[~given] = NOT_FINITE
    return status


def is_singular(items: Items) -> np.ndarray:
    """Whether a relative factor of an item is on the boundary, (m,)."""
    out = np.zeros(len(items.value), bool)
    for lam in items.lams:
        lam = np.asarray(lam)
        known = np.all(np.isfinite(lam), axis=(-1, -2), keepdims=True)
        diagonal = np.linalg.qr(np.swapaxes(np.where(known, lam, 1.0), -1, -2), mode="r")
        smallest = np.min(np.abs(np.diagonal(diagonal, axis1=-2, axis2=-1)), axis=-1)
        out |= (smallest < SINGULAR_TOLERANCE) & known[:, 0, 0]
    return out

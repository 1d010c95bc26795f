r"""Several devices, several hosts: items of a batch, or the levels of one large fit, over a mesh.

Items need no communication: every device runs the program of :mod:`lmmjax.batch` on its share
(``shard_map``). The levels of the chain's first factor meet only in sums; with their axis sharded,
XLA adds one all-reduce to each evaluation of the likelihood. Nothing else of the code changes, and
the numbers are those of one device up to the order of summation.

Under ``jax.distributed`` every process makes the same calls on the same data; each reads its share.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmmjax import batch, estimate
from lmmjax.batch import Items
from lmmjax.errors import LmmError
from lmmjax.gram import Gram, Layout, Rhs
from lmmjax.model import Model


def _automatic(mesh: Mesh) -> Mesh:
    """The same devices with axes that XLA partitions itself; jax.make_mesh makes explicit ones."""
    return Mesh(mesh.devices, mesh.axis_names)


def _place(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Arrays on the mesh, each process giving the parts of its own devices."""
    sharding = NamedSharding(_automatic(mesh), spec)

    def one(a: Any) -> jax.Array:
        a = np.asarray(a)
        return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])

    return jax.tree.map(one, tree)


def _gather(tree: Any) -> Any:
    """Whole NumPy arrays, on every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


@functools.cache
def _program(mesh: Mesh, layout: Layout, method: str, lanes: int, shared: bool) -> Any:
    items, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    run = functools.partial(batch.program, layout, method, lanes, shared)
    specs = (whole if shared else items, items, items)
    mapped = jax.shard_map(
        run, mesh=_automatic(mesh), in_specs=specs, out_specs=items, check_vma=False
    )
    return jax.jit(mapped)


def run_sharded(
    mesh: Mesh,
    layout: Layout,
    method: str,
    lanes: int,
    shared: bool,
    gram: Any,
    rhs: Any,
    theta0: Any,
) -> Items:
    """:func:`lmmjax.batch.program` with the items shared among the devices of ``mesh``.

    The number of items must be a multiple of lanes times devices.
    """
    items, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    gram = _place(gram, mesh, whole if shared else items)
    rhs, theta0 = _place((rhs, theta0), mesh, items)
    return _gather(_program(mesh, layout, method, lanes, shared)(gram, rhs, theta0))


def shard_levels(layout: Layout, gram: Gram, rhs: Rhs, mesh: Mesh) -> tuple[Layout, Gram, Rhs]:
    """Share the levels of the chain's first factor among the devices of ``mesh``.

    Parameters
    ----------
    layout, gram, rhs
        Of one model, NumPy arrays; levels without rows are added until they divide evenly.

    Returns
    -------
    Layout, Gram, Rhs
        For :func:`lmmjax.estimate.optimise` and everything else that takes them.
    """
    if not layout.chain:
        whole = PartitionSpec()
        return layout, _place(gram, mesh, whole), _place(rhs, mesh, whole)
    terms, S, J = layout.chain[0]
    extra = -J % mesh.size
    chain = ((terms, S, J + extra), *layout.chain[1:])

    def levels(a: Any) -> Any:
        a = np.asarray(a)
        padded = np.concatenate([a, np.zeros((*a.shape[:-1], extra), a.dtype)], axis=-1)
        return _place(padded, mesh, PartitionSpec(*[None] * (a.ndim - 1), mesh.axis_names))

    def first(parts: tuple[Any, ...]) -> tuple[Any, ...]:
        mine = jax.tree.map(levels, parts[0])
        return (mine, *_place(parts[1:], mesh, PartitionSpec()))

    gram = _place(
        gram._replace(own=(), up=(), parent=(), border=()), mesh, PartitionSpec()
    )._replace(
        own=first(gram.own), up=first(gram.up), parent=first(gram.parent), border=first(gram.border)
    )
    rest = _place(rhs._replace(border=()), mesh, PartitionSpec())
    return dataclasses.replace(layout, chain=chain), gram, rest._replace(border=first(rhs.border))


def check_mesh(mesh: Any) -> None:
    """Refuse what is not a mesh of devices."""
    if not isinstance(mesh, Mesh):
        raise LmmError(
            f"mesh is a {type(mesh).__name__}; expected a jax.sharding.Mesh, such as "
            "jax.make_mesh((jax.device_count(),), ('group',))."
        )


def solve(
    model: Model, mesh: Mesh, method: str, theta0: Any, optimizer: Any = "newton"
) -> np.ndarray:
    """Fit one large model with its groups shared among the devices of ``mesh``.

    Parameters
    ----------
    model : Model
        Without residual parameters.
    mesh : jax.sharding.Mesh
    method : {"REML", "ML"}
    theta0, optimizer
        As for :func:`lmmjax.estimate.solve`.

    Returns
    -------
    ndarray
        For :class:`lmmjax.solution.Solution`, on every process; one device finds the same.

    Raises
    ------
    LmmError
        Residual parameters, or not a mesh.
    """
    check_mesh(mesh)
    if model.is_structured:
        raise LmmError(
            f"found mesh= with the residual structure {model.residual}; one fit is shared among "
            "devices by its cross-products, which must not depend on residual parameters. Leave "
            "mesh= out."
        )
    plan, _, gram, rhs = batch.standard(model)
    gram, rhs = model._cast((gram, rhs))
    layout, gram, rhs = shard_levels(plan.layout, gram, rhs, mesh)
    return _gather_replicated(estimate.solve(layout, method, gram, rhs, theta0, optimizer))


def _gather_replicated(tree: Any) -> Any:
    """The same numbers on every device, from the first of this process."""
    return jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), tree)

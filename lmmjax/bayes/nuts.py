r"""The compiled sampling loop: NUTS on the potential of a NumPyro model, chains side by side.

The loop is a pure function of arrays with a static specification, so models of equal shape and
families of priors share one compiled program, and progress is the same program run in parts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.infer.hmc import hmc
from numpyro.infer.util import potential_energy

from lmmjax.bayes.numpyro_model import Data, Sites, Spec, body, unconstrained_shapes


@dataclass(frozen=True)
class Settings:
    """What is static about a run."""

    warmup: int
    draws: int
    chains: int
    target_accept: float
    max_tree_depth: int = 10


class Trail(NamedTuple):
    """What is kept of each draw; axes (chain, draw, ...)."""

    z: dict[str, Array]  # unconstrained
    lp: Array
    energy: Array
    acceptance_rate: Array
    n_steps: Array
    diverging: Array
    step_size: Array


def _kernel(spec: Spec, settings: Settings, data: Data, prior: Sites, keys: Array) -> Any:
    """States of all chains at their start, and the transition of one chain."""

    def potential(z: dict[str, Array]) -> Array:
        return potential_energy(body, (spec, data, prior), {}, z)

    init, step = hmc(potential, algo="NUTS")

    def begin(key: Array) -> Any:
        key_z, key_chain = jax.random.split(key)
        return init(
            _start(spec, key_z, data.A.dtype),
            settings.warmup,
            dense_mass=_mass(spec),
            target_accept_prob=settings.target_accept,
            max_tree_depth=settings.max_tree_depth,
            rng_key=key_chain,
        )

    return jax.vmap(begin)(keys), step


def _start(spec: Spec, key: Array, dtype: Any) -> dict[str, Array]:
    """Scattered starts: the coordinates are scaled so that 0 is a sensible value of each site."""
    shapes = unconstrained_shapes(spec)
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.uniform(k, shape, dtype, -1.0, 1.0)
        for (name, shape), k in zip(shapes.items(), keys, strict=True)
    }


def _mass(spec: Spec) -> Any:
    """Dense mass matrix for the parameters; diagonal for effects, of which there may be many."""
    if spec.form == "marginal":
        return True
    effects = ("u_", "ranef_")
    return [tuple(name for name in unconstrained_shapes(spec) if not name.startswith(effects))]


def _record(state: Any) -> Trail:
    return Trail(
        state.z,
        -state.potential_energy,
        state.energy,
        state.accept_prob,
        state.num_steps,
        state.diverging,
        state.adapt_state.step_size,
    )


@functools.partial(jax.jit, static_argnames=("spec", "settings"), donate_argnames="carry")
def advance(
    spec: Spec,
    settings: Settings,
    data: Data,
    prior: Sites,
    keys: Array,
    first: Array,
    last: Array,
    carry: tuple[Any, Trail] | None = None,
) -> tuple[Any, Trail]:
    """Iterations ``first`` to ``last`` - 1 of all chains; those after warm-up are recorded.

    Without a ``carry`` the chains start here.
    """
    # the kernel learns its settings while it makes a first state, so that is made in any case
    fresh, step = _kernel(spec, settings, data, prior, keys)

    def one(i: Array, carry: tuple[Any, Trail]) -> tuple[Any, Trail]:
        state, trail = carry
        state = jax.vmap(step)(state)
        # warm-up writes into slot 0, which the first draw overwrites
        slot = jnp.maximum(i - settings.warmup, 0)
        trail = jax.tree.map(lambda t, a: t.at[:, slot].set(a), trail, _record(state))
        return state, trail

    if carry is None:
        carry = fresh, _empty(settings, _record(fresh))
    return jax.lax.fori_loop(first, last, one, carry)


def _empty(settings: Settings, record: Trail) -> Trail:
    shape = (settings.chains, settings.draws)
    return jax.tree.map(lambda a: jnp.zeros((*shape, *a.shape[1:]), a.dtype), record)


def run(
    spec: Spec, settings: Settings, data: Data, prior: Sites, seed: int, progress: bool = False
) -> Trail:
    """Warm up and draw; with ``progress`` in a hundred parts, with a bar."""
    keys = jax.random.split(jax.random.key(seed), settings.chains)
    carry = None
    for first, last in _parts(settings.warmup + settings.draws, progress):
        bounds = jnp.asarray(first), jnp.asarray(last)
        carry = advance(spec, settings, data, prior, keys, *bounds, carry)
    assert carry is not None, "a run has at least one iteration"
    return carry[1]


def _parts(total: int, progress: bool) -> Any:
    if not progress:
        return [(0, total)]
    from tqdm.auto import tqdm

    step = max(1, total // 100)
    parts = [(a, min(a + step, total)) for a in range(0, total, step)]
    return tqdm(parts, desc="sampling", unit="%")

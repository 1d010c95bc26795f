r"""Coordinates for samplers: any prior, with a bijection of our choice from the real line.

NumPyro derives the unconstrained coordinates of a site from the support of its distribution, so
an SD is sampled as log(SD) whatever its unit, and a vector of coefficients as it stands, however
correlated. :class:`Charted` gives a distribution a support that carries its own bijection. The
density, and hence the posterior, is untouched; only the sampler's coordinates x change:

    β = β₀ + c A x      (standardised coefficients; a column of years is no longer a ridge)
    SD = s exp(x)       (x = 0 is a value of the right size)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints, transforms


class Chart(constraints.Constraint):
    """A support together with its bijection from unconstrained coordinates."""

    def __init__(self, transform: Any, base: Any) -> None:
        self.transform = transform
        self.base = base
        self.event_dim = transform.codomain.event_dim

    def __call__(self, x: Any) -> Any:
        return self.base(x)

    def feasible_like(self, prototype: Any) -> Any:
        return self.transform(jnp.zeros_like(prototype))

    def tree_flatten(self) -> Any:
        return (self.transform, self.base), (("transform", "base"), {"event_dim": self.event_dim})

    def __hash__(self) -> int:
        return id(self)

    def eq(self, other: object, static: bool = False) -> bool:
        return self is other


@transforms.biject_to.register(Chart)
def _chart_transform(chart: Chart) -> Any:
    return chart.transform


class Affine(transforms.Transform):
    """x -> loc + x M' on the last axis; ``event_dim`` axes form one event."""

    def __init__(self, loc: Any, M: Any, event_dim: int) -> None:
        self.loc, self.M, self.event_dim = loc, M, event_dim

    @property
    def domain(self) -> Any:
        return constraints.independent(constraints.real, self.event_dim)

    codomain = domain

    def __call__(self, x: Array) -> Array:
        return self.loc + x @ self.M.T

    def _inverse(self, y: Array) -> Array:
        return jnp.linalg.solve(self.M, (y - self.loc)[..., None])[..., 0]

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        copies = 1 if self.event_dim == 1 else x.shape[-2]
        logdet = copies * jnp.linalg.slogdet(self.M)[1]
        return jnp.broadcast_to(logdet, x.shape[: x.ndim - self.event_dim])

    def tree_flatten(self) -> Any:
        return (self.loc, self.M), (("loc", "M"), {"event_dim": self.event_dim})


class Elementwise(transforms.Transform):
    """One scalar bijection for each entry of a vector."""

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.parts = parts

    def __call__(self, x: Array) -> Array:
        return jnp.stack([t(x[..., i]) for i, t in enumerate(self.parts)], axis=-1)

    def _inverse(self, y: Array) -> Array:
        return jnp.stack([t.inv(y[..., i]) for i, t in enumerate(self.parts)], axis=-1)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        terms = [t.log_abs_det_jacobian(x[..., i], y[..., i]) for i, t in enumerate(self.parts)]
        return sum(terms[1:], start=terms[0])

    def tree_flatten(self) -> Any:
        return (self.parts,), (("parts",), {})


class Joint(dist.Distribution):
    """A vector of independent scalars, each with its own distribution."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (NumPyro's own declaration)
    pytree_data_fields = ("parts",)
    support = constraints.real_vector

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.parts = tuple(parts)
        super().__init__((), (len(self.parts),))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        draws = [
            d.sample(k, sample_shape)
            for d, k in zip(self.parts, jax.random.split(key, len(self.parts)), strict=True)
        ]
        return jnp.stack([jnp.asarray(x, float) for x in draws], axis=-1)

    def log_prob(self, value: Any) -> Any:
        terms = [d.log_prob(value[..., i]) for i, d in enumerate(self.parts)]
        return sum(terms[1:], start=terms[0])


class Charted(dist.Distribution):
    """A distribution seen in other unconstrained coordinates."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    pytree_data_fields = ("base", "chart")
    support = constraints.dependent

    def __init__(self, base: Any, transform: Any) -> None:
        self.base = base
        self.support = Chart(transform, base.support)
        super().__init__(base.batch_shape, base.event_shape)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        return self.base.sample(key, sample_shape)

    def log_prob(self, value: Any) -> Any:
        return self.base.log_prob(value)


def _is(support: Any, kind: Any) -> bool:
    """Whether a support is of the kind of a NumPyro constant (identity is lost under jit)."""
    return type(getattr(support, "base_constraint", support)) is type(kind)


def positive_chart(prior: Any, size: Any) -> Any:
    """log(x / size) for a prior on the positive half-line; NumPyro's own choice elsewhere."""
    if not (
        _is(prior.support, constraints.positive) or _is(prior.support, constraints.nonnegative)
    ):
        return transforms.biject_to(getattr(prior.support, "base_constraint", prior.support))
    return transforms.ComposeTransform(
        [transforms.ExpTransform(), transforms.AffineTransform(0.0, size, constraints.positive)]
    )


def coefficients(parts: tuple[Any, ...], loc: Any, M: Any) -> Any:
    """Prior of the fixed effects, sampled in standardised coordinates where all are unbounded."""
    joint = Joint(parts)
    if all(_is(d.support, constraints.real) for d in parts):
        return Charted(joint, Affine(loc, M, 1))
    bases = [getattr(d.support, "base_constraint", d.support) for d in parts]
    return Charted(joint, Elementwise(tuple(transforms.biject_to(base) for base in bases)))


def positive(parts: tuple[Any, ...], sizes: Any) -> Any:
    """Prior of a vector of SDs, sampled as log(SD / size)."""
    charts = tuple(positive_chart(d, size) for d, size in zip(parts, sizes, strict=True))
    return Charted(Joint(parts), Elementwise(charts))

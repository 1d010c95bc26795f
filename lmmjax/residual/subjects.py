r"""The errors of the rows at hand: whitened, their log-density, and each given its neighbours.

    ε_i ~ N(0, σ² R_i),   R_i = S_i C_i S_i / w,   one residual subject i after the other

:class:`Subjects` holds where the rows of each subject are, and goes through the whitening of
source.py, so that what is sampled by rows is the likelihood that is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax.likelihood import LOG_2PI
from lmmjax.residual.setup import _block, groups_of_rows
from lmmjax.residual.source import Block, _pytree, correlations, inverse_diagonal, whiten
from lmmjax.residual.structures import Structure

Array = Any


@_pytree("structure")
@dataclass(frozen=True)
class Subjects:
    """Rows by residual subject, padded; a pytree whose structure is static."""

    structure: Structure
    blocks: tuple[Block, ...]  # without columns
    rows: tuple[Array, ...]  # (G, T) per block
    weights: Array  # (n,)

    def _gather(self, values: Array) -> list[Block]:
        """The blocks with one column each: values (n,) times √w."""
        weighted = values * jnp.sqrt(self.weights)
        parts = zip(self.blocks, self.rows, strict=True)
        return [replace(b, M=(weighted[at] * b.mask)[..., None]) for b, at in parts]

    def _scatter(self, parts: list[Array]) -> Array:
        """Values by block (G, T) back to rows (n,)."""
        out = jnp.zeros(self.weights.shape, parts[0].dtype)
        for part, b, at in zip(parts, self.blocks, self.rows, strict=True):
            out = out.at[at].add(part * b.mask)
        return out

    def inner_sigma(self, phi: Array, sigma: Array) -> Array:
        """σ in the units of the source, from that of the reference row."""
        s = self.structure
        return sigma / s.variances.reference(phi[s.n_corr :])

    def square(self, phi: Array, values: Array) -> tuple[Array, Array]:
        """e'R⁻¹e and log|R| of errors e (n,), R in the units of the source."""
        white = [whiten(self.structure, phi, b) for b in self._gather(values)]
        logdet = sum(log for _, log in white) - jnp.sum(jnp.log(self.weights))
        return sum(jnp.sum(w**2) for w, _ in white), logdet  # type: ignore[return-value]

    def logpdf(self, phi: Array, sigma: Array, values: Array) -> Array:
        """log N(e; 0, σ²R) of the errors of all rows together.

        O(n) for Markov chains and compound symmetry, one Cholesky factor per set of positions
        otherwise.
        """
        square, logdet = self.square(phi, values)
        s2 = self.inner_sigma(phi, sigma) ** 2
        return -0.5 * (len(values) * (LOG_2PI + jnp.log(s2)) + logdet + square / s2)

    def conditional_logpdf(self, phi: Array, sigma: Array, values: Array) -> Array:
        r"""log p(e_i | e of the other rows of its subject), (n,).

        With K = R⁻¹/σ²: e_i given the others has precision K_ii and is (Ke)_i / K_ii off its mean
        (Bürkner, Gabry and Vehtari 2021, Comput. Statist. 36).
        """
        Ke = jax.grad(lambda e: 0.5 * self.square(phi, e)[0])(values)
        s2 = self.inner_sigma(phi, sigma) ** 2
        diagonal = [inverse_diagonal(self.structure, phi, b) for b in self.blocks]
        K = self._scatter(diagonal) * self.weights / s2
        return 0.5 * (jnp.log(K) - LOG_2PI - (Ke / s2) ** 2 / K)

    def colour(self, phi: Array, sigma: Array, white: Array) -> Array:
        """Errors with covariance σ²R from independent standard normal ones (n,): O(Σ T³)."""
        parts = []
        for b, at in zip(self.blocks, self.rows, strict=True):
            e = white[at] * b.mask
            if self.structure.family is not None:
                C = correlations(self.structure, phi, b.pos, b.mask)
                e = jnp.einsum("gtu,gu->gt", jnp.linalg.cholesky(C), e)
            parts.append(e * jnp.exp(b.H @ phi[self.structure.n_corr :]))
        out = self._scatter(parts) / jnp.sqrt(self.weights)
        return out * self.inner_sigma(phi, sigma)


def subjects(design: Any) -> Subjects:
    """Where the rows of each residual subject are (NumPy); in order of position."""
    r = design.residual
    order = np.lexsort((*r.pos.T[::-1], r.subject))
    groups = groups_of_rows(r.subject, order)
    empty = np.zeros((design.n, 0))
    blocks = tuple(_block(r, empty, rows, mask.astype(float)) for rows, mask in groups)
    return Subjects(r.structure, blocks, tuple(rows for rows, _ in groups), design.weights)


def errors(design: Any, sigma: np.ndarray, phi: np.ndarray, white: np.ndarray) -> np.ndarray:
    """Errors of the rows by draw, (draws, n), from independent standard normal ones.

    ``sigma`` (draws,), ``phi`` (draws, n_phi): one covariance a draw. In float64 only.
    """
    if design.residual is None:
        return sigma[:, None] / np.sqrt(design.weights) * white
    arrays = jax.tree.map(jnp.asarray, (subjects(design), phi, sigma, white))
    return np.asarray(_errors(*arrays))


@jax.jit
def _errors(the_subjects: Subjects, phi: Array, sigma: Array, white: Array) -> Array:
    return jax.lax.map(lambda d: the_subjects.colour(*d), (phi, sigma, white))

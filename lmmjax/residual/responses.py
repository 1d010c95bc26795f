r"""Many responses on one design with a residual structure: what involves y, for all of them.

The products of Z and X, the positions and the patterns are those of the design; a response adds its
padded rows (``Rows``), its right-hand sides (``Basis``) or its sums of outer products
(``Patterns``), and ``source.with_response`` puts one of them in place.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lmmjax.gram import Plan, Rhs, Standardised
from lmmjax.residual import setup
from lmmjax.residual.source import Basis, Rows, Source, assemble_rhs
from lmmjax.responses import Products, Responses


class StructuredResponses:
    """The part of a structured design that many responses share.

    Parameters
    ----------
    design : Design
        With ``residual``; its response is not used.
    plan : Plan
    standardised : Standardised
    source : Rows, Basis or Patterns
        Of the same design.
    """

    def __init__(self, design: Any, plan: Plan, standardised: Standardised, source: Source) -> None:
        self.source, self.units = source, standardised.units
        self.design, self.X = design, standardised.X
        self.weights = design.weights if design.has_weights else None
        if isinstance(source, Basis) and source.kind == "strata":
            none = source.grams._replace(parent=(), n=np.zeros(1), logdet_R=np.zeros(1))
            one = jax.tree.map(lambda a: a[0], none)
            self.ready = Responses(design, plan, standardised, one)
            self.codes = np.unique(design.residual.H, axis=0, return_inverse=True)[1].ravel()
            return
        self.groups = setup.row_groups(design.residual)
        if not isinstance(source, Rows):
            self.rows = setup.whitened_rows(design, plan, standardised)
            self.coded = setup.coded(self.rows)

    def __call__(self, Y: np.ndarray) -> Products:
        """Parts with the columns of ``Y`` (n, m), each standardised on its own.

        O(n m (p + T)) time; memory a few times that of Y.
        """
        with np.errstate(invalid="ignore", over="ignore"):  # items that are not finite are told
            rest, coefficients = self._without_x(Y)
            size = np.sqrt(np.mean(rest**2, axis=0))
            exact = size <= 1e-14 * np.max(np.abs(Y), axis=0)
            scale = np.where(exact, 1.0, size)
            beta0 = (self.units.A @ coefficients).T
            return Products(self.parts(rest / scale), beta0, scale, exact)

    def _without_x(self, Y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residuals of the least-squares fit on X, and its coefficients (p, m)."""
        Y = Y - self.design.offset[:, None]
        coefficients = np.zeros((self.X.shape[1], Y.shape[1]))
        if not len(coefficients):
            return Y, coefficients
        WX = self.X if self.weights is None else self.X * self.weights[:, None]
        for _ in range(2):  # the second pass restores the digits that a large offset costs
            coefficients += np.linalg.solve(WX.T @ self.X, WX.T @ (Y - self.X @ coefficients))
        return Y - self.X @ coefficients, coefficients

    def on_units(self, Y: np.ndarray) -> Any:
        """Parts of responses in the units of the design's own: (Y - offset - Xβ₀) / c."""
        mean = self.design.offset + self.design.X @ self.units.beta0
        return self.parts((Y - mean[:, None]) / self.units.scale)

    def parts(self, Y: np.ndarray) -> Any:
        """``source.response`` of standardised responses (n, m), the response as first axis."""
        if isinstance(self.source, Basis) and self.source.kind == "strata":
            return self._by_strata(Y)
        if self.weights is not None:
            Y = Y * np.sqrt(self.weights)[:, None]
        blocks = [Y[rows] * mask[..., None] for rows, mask in self.groups]  # (G, T, m)
        if isinstance(self.source, Rows):
            return tuple(np.ascontiguousarray(np.moveaxis(b, -1, 0)) for b in blocks)
        T = self.coded.M.shape[1]
        y = np.concatenate([setup.padded(b, T) for b in blocks])
        return self._by_matrices(y) if isinstance(self.source, Basis) else self._by_pattern(y)

    def _by_strata(self, Y: np.ndarray) -> Rhs:
        """A right-hand side per stratum of equal variance."""
        parts = []
        for k in range(len(self.source.sizes)):  # type: ignore[union-attr]
            rows = np.flatnonzero(self.codes == k)
            y = Y[rows]
            w = 1.0 if self.weights is None else self.weights[rows, None]
            sums = [
                *np.split(self.ready.ZX[:, rows] @ y, self.ready.cuts),
                np.sum(w * y**2, axis=0),
            ]
            parts.append(self.ready._rhs(sums, np.ones(Y.shape[1])))
        return jax.tree.map(lambda *a: np.stack(a, axis=1), *parts)

    def _by_matrices(self, y: np.ndarray) -> Rhs:
        """M'Q_k y summed by level, for the fixed matrices Q_k."""
        found = setup.operators(self.rows)
        assert found is not None
        layout, where, parts = self.rows.layout, self.rows.where, []
        for Q in found[1]:
            Qy = Q(y)
            own = np.einsum("gtk,gtm->gkm", self.coded.M[..., :-1], Qy, optimize=True)
            both = np.concatenate([own, np.einsum("gtm,gtm->gm", y, Qy)[:, None]], axis=1)
            with jax.enable_x64(True):
                parts.append(jax.tree.map(np.asarray, _by_level(layout, where, both)))
        return jax.tree.map(lambda *a: np.stack(a, axis=1), *parts)

    def _by_pattern(self, y: np.ndarray) -> np.ndarray:
        """Σ over the subjects of a pattern of x_t y_u + x_u y_t and y_t y_u, (m, P TT, K)."""
        (T, K), m = self.coded.M.shape[1:], y.shape[2]
        t, u = np.tril_indices(T)
        P = len(self.coded.patterns)
        sums = np.empty((m, P, len(t), K))
        twice = np.where(t == u, 1.0, 2.0)[:, None]
        for q in range(P):
            mine = self.coded.code == q
            X, own = self.coded.M[mine, :, :-1], y[mine]
            g = len(own)
            crossed = X.reshape(g, -1).T @ own.reshape(g, -1)
            crossed = crossed.reshape(T, K - 1, T, m)
            both = crossed[t, :, u] + np.where((t != u)[:, None, None], crossed[u, :, t], 0.0)
            sums[:, q, :, :-1] = np.moveaxis(both, -1, 0)
            squares = np.einsum("gtm,gum->tum", own, own, optimize=True)
            sums[:, q, :, -1] = (squares[t, u] * twice).T
        return sums.reshape(m, P * len(t), K)


_by_level = jax.jit(jax.vmap(assemble_rhs, in_axes=(None, None, -1)), static_argnums=0)

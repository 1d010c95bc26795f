r"""Cross-products of one design with many responses, in one pass over Y.

The Gram of a design does not involve y; all that a response adds is Z'Wy, X'Wy and y'Wy. For a
block of responses these are sums by level (a sparse product that reads each row of Y once for every
column of Z), one dense product and the squares. Digits are kept as for a single response: a number
near the mean is taken off first where the mean is large beside the spread, and the least-squares
fit on X is removed afterwards, on the products. Columns of which X explains nearly all are done
again with the fit subtracted from the rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lmmjax import gram as gr
from lmmjax.gram import Gram, Plan, Rhs, Standardised

#: mean over spread above which a shift is subtracted before the products are formed
FAR = 30.0

#: share of a response that X leaves, below which its least-squares fit is subtracted row by row
LITTLE = 1e-4


class Products(NamedTuple):
    """Right-hand sides in standardised units, and the way back for each response."""

    rhs: Rhs  # leading axis of m responses
    beta0: np.ndarray  # (m, p) in the units of the data
    scale: np.ndarray  # (m,)
    exact: np.ndarray  # (m,) bool: X reproduces the response


class Responses:
    """The part of a design that many responses share.

    Parameters
    ----------
    design : Design
        Its response is not used.
    plan : Plan
    standardised : Standardised
    gram : Gram
        Cross-products of the same design.
    """

    def __init__(self, design: Any, plan: Plan, standardised: Standardised, gram: Gram) -> None:
        self.n, self.p = design.n, design.p
        self.d = plan.layout.d
        self.X, self.A = standardised.X, standardised.units.A
        self.constant = gr._constant_direction(design.X)
        self.w = gr._weights(design)
        self.offset = design.offset if design.has_offset else None
        self.gram = gram
        self.xx = np.asarray(gram.core)[self.d :, self.d :]
        self.sizes = [(f.S, f.J) for f in plan.factors]
        self.n_chain = plan.n_chain
        self.ZX = self._stacked(design, plan, standardised)
        self.cuts = np.cumsum([J * S for S, J in self.sizes])

    def _stacked(self, design: Any, plan: Plan, standardised: Standardised) -> Any:
        """W[Z X] of all factors as one sparse matrix, row by row of the data: (q + p, n).

        Its product with Y reads each row of Y once and adds it to S + p rows of the result.
        """
        from scipy.sparse import csc_array

        parts, rows, at = [], [], 0
        for f in plan.factors:
            codes = design.terms[f.terms[0]].codes.astype(np.int32)
            parts.append(gr._stack(standardised, f))
            rows.append(at + codes[:, None] * f.S + np.arange(f.S, dtype=np.int32))
            at += f.J * f.S
        parts.append(standardised.X)
        rows.append(np.broadcast_to(at + np.arange(self.p, dtype=np.int32), (self.n, self.p)))
        values = gr._weighted(np.concatenate(parts, axis=1), self.w)
        start = np.arange(self.n + 1, dtype=np.int32) * values.shape[1]
        size = (at + self.p, self.n)
        return csc_array((values.ravel(), np.concatenate(rows, axis=1).ravel(), start), shape=size)

    def __call__(self, Y: np.ndarray) -> Products:
        """Products with the columns of ``Y`` (n, m); O(n m (S + p)) time, O(m (q + p)) memory."""
        with np.errstate(invalid="ignore", over="ignore"):  # items that are not finite are told
            return self._products(np.asarray(Y, float))

    def _products(self, Y: np.ndarray) -> Products:
        if self.offset is not None:
            Y = Y - self.offset[:, None]
        shift = self._shift(Y)
        if shift.any():
            Y = Y - shift
        sums = self._sums(Y)
        total = sums[-1]
        coefficients, sums = self._without_x(sums)
        again = np.flatnonzero(sums[-1] < LITTLE * total)
        if len(again):
            rest = Y[:, again] - self.X @ coefficients[:, again]
            more, exact_sums = self._without_x(self._sums(rest))
            coefficients[:, again] += more
            sums = [self._put(a, again, b) for a, b in zip(sums, exact_sums, strict=True)]
        exact = sums[-1] <= 1e-28 * total
        scale = np.sqrt(np.where(exact, 1.0, sums[-1]) / self.n)
        beta0 = (self.A @ coefficients).T + np.outer(shift, self.constant)
        return Products(self._rhs(sums, scale), beta0, scale, exact)

    def _shift(self, Y: np.ndarray) -> np.ndarray:
        """A number near the mean of each response, or zeros where it would gain nothing."""
        if not self.constant.any():
            return np.zeros(Y.shape[1])
        some = Y[:: max(1, self.n // 64)]
        near, spread = some.mean(axis=0), some.std(axis=0)
        far = bool(np.any(np.abs(near) > FAR * spread))
        return np.where(np.isfinite(near), near, 0.0) if far else np.zeros(Y.shape[1])

    def _sums(self, Y: np.ndarray) -> list[np.ndarray]:
        """Z'WY per factor (J S, m), X'WY (p, m) and the diagonal of Y'WY (m,)."""
        squares = np.einsum("ij,ij->j", Y, Y if self.w is None else Y * self.w[:, None])
        return [*np.split(self.ZX @ Y, self.cuts), squares]

    def _without_x(self, sums: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Remove the least-squares fit on X from the products; its coefficients (p, m)."""
        *zy, xy, yy = sums
        if not self.p:
            return xy, sums
        coefficients = np.linalg.solve(self.xx, xy)
        left = [z - ZX @ coefficients for z, ZX in zip(zy, self._zx(), strict=True)]
        fitted = np.einsum("jm,jm->m", xy, coefficients)
        return coefficients, [*left, xy - self.xx @ coefficients, yy - fitted]

    def _zx(self) -> list[np.ndarray]:
        """Z'WX per factor, (J S, p)."""
        out, at = [], 0
        for i, (S, J) in enumerate(self.sizes):
            if i < self.n_chain:
                border = np.asarray(self.gram.border[i])[:, self.d :]
                out.append(np.moveaxis(border, -1, 0).reshape(J * S, self.p))
            else:
                out.append(np.asarray(self.gram.core)[at : at + J * S, self.d :])
                at += J * S
        return out

    @staticmethod
    def _put(old: np.ndarray, at: np.ndarray, new: np.ndarray) -> np.ndarray:
        old[..., at] = new
        return old

    def _rhs(self, sums: list[np.ndarray], scale: np.ndarray) -> Rhs:
        *zy, xy, yy = sums
        m = len(yy)
        blocks = []
        for a, (S, J) in zip(zy[: self.n_chain], self.sizes, strict=False):
            blocks.append(
                np.ascontiguousarray(np.moveaxis(a.reshape(J, S, m), 2, 0).swapaxes(1, 2))
            )
        core = np.concatenate([*zy[self.n_chain :], xy]).T
        border = tuple(b / scale[:, None, None] for b in blocks)
        return Rhs(border, core / scale[:, None], yy / scale**2)

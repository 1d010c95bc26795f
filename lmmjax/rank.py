"""Which columns of X depend linearly on those before them.

The rule is that of R's ``lm`` (LINPACK's dqrdc2): a column is dropped when the part of it that the
columns before it leave unexplained is shorter than 1e-7 of the column. Unlike R, columns are judged
after centring and scaling, so a year or ``x + 1e8`` beside an intercept is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

__all__ = [
    "ColumnJudge",
    "Moments",
    "clearly_independent",
    "independent_columns",
    "proves_rank",
    "triangle",
]

TOLERANCE = 1e-7
_CLEAR = 1e-8  # squared length below which cross-products can no longer tell
_ROWS = 65_536


def _chunks(X: np.ndarray):
    for start in range(0, X.shape[0], _ROWS):
        yield X[start : start + _ROWS]


@dataclass
class Moments:
    """Sums over rows of columns less ``shift``, and of their products."""

    n: int
    shift: np.ndarray  # (k,)
    total: np.ndarray  # (k,)
    gram: np.ndarray  # (k, k)

    @classmethod
    def of(cls, blocks: Iterable[np.ndarray], shifted: bool) -> Moments:
        """Sum over (m, k) blocks of rows; the shift is the first row, or nothing. O(n k^2)."""
        out = cls(0, np.zeros(0), np.zeros(0), np.zeros((0, 0)))
        for block in blocks:
            if out.n == 0:
                k = block.shape[1]
                shift = block[0].copy() if shifted and len(block) else np.zeros(k)
                out = cls(0, shift, np.zeros(k), np.zeros((k, k)))
            moved = block - out.shift
            with np.errstate(over="ignore", invalid="ignore"):  # then they prove nothing
                out.gram += moved.T @ moved
            out.total += moved.sum(axis=0)
            out.n += len(block)
        return out

    @property
    def mean(self) -> np.ndarray:
        """Means of the columns, (k,)."""
        return self.shift + self.total / self.n

    def centred(self) -> np.ndarray:
        """Products of the columns less their means, (k, k)."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self.gram - np.outer(self.total, self.total) / self.n

    def precise(self) -> bool:
        """Whether the shifts are so near the means that centring costs few digits."""
        return bool(np.all(np.diag(self.centred()) > self._least()))

    def _least(self) -> np.ndarray:
        with np.errstate(over="ignore"):
            return 1e-6 * self.total**2 / self.n

    def independent(self, p: int, intercept: bool) -> bool:
        """Whether the products alone prove that the first p columns are independent.

        With an intercept: of each other and the constant; the moments are shifted then.
        """
        if p == 0:
            return True
        if self.n <= p:
            return False
        if not intercept:
            return proves_rank(self.gram[:p, :p])
        # A mean far from the first row costs digits; then the careful way decides.
        return proves_rank(self.centred()[:p, :p], self._least()[:p])


def clearly_independent(X: np.ndarray, intercept: bool) -> bool:
    """Return True if the cross-products alone prove full column rank.

    Parameters
    ----------
    X : (n, p) array
        The first column is the constant if `intercept`.

    Notes
    -----
    One pass, O(n p^2). False means "look closer", not "dependent".
    """
    Y = X[:, 1:] if intercept else X
    return Moments.of(_chunks(Y), intercept).independent(Y.shape[1], intercept)


def proves_rank(gram: np.ndarray, least: np.ndarray | float = 0.0) -> bool:
    """Return True if cross-products (p, p) prove full rank; squared lengths must exceed `least`."""
    lengths = np.sqrt(np.maximum(np.diag(gram), 0.0))
    if not np.all(lengths**2 > least) or not np.all(lengths > 0):
        return False
    try:
        root = np.linalg.cholesky(gram / np.outer(lengths, lengths))
    except np.linalg.LinAlgError:
        return False
    return bool(np.min(np.diag(root), initial=1.0) ** 2 > _CLEAR)


def independent_columns(X: np.ndarray, intercept: bool) -> np.ndarray:
    """Return (p,) bool: True for the columns that ``lm`` would keep.

    Parameters
    ----------
    X : (n, p) array
        Columns, already centred by variable where the column space allows it.
    intercept : bool
        The first column is the constant: it is kept, and the others are centred.

    Notes
    -----
    O(n p^2) for the triangular factor, taken in chunks of rows, then O(p^3).
    """
    if not intercept:
        return _keep(triangle(X), np.ones(X.shape[1], bool))
    keep = np.ones(X.shape[1], bool)
    Y = X[:, 1:]
    shift = Y[0].copy()  # exact zeros for constant columns
    mean = np.zeros_like(shift)
    for chunk in _chunks(Y):
        mean += (chunk - shift).sum(axis=0) / X.shape[0]
    varies = np.array([bool(np.any(Y[:, j] != shift[j])) for j in range(Y.shape[1])], bool)
    keep[1:] = _keep(triangle(Y, (shift, mean)), varies)
    return keep


class ColumnJudge:
    """The rule of `independent_columns` for rows that come in batches.

    With an intercept, the constant is the first column of the triangle, so that what stands below
    its row is the triangle of the centred columns.
    """

    def __init__(self, intercept: bool) -> None:
        self.intercept = intercept
        self._first: np.ndarray | None = None
        self._R: np.ndarray | None = None
        self._varies: np.ndarray | None = None

    def add(self, X: np.ndarray) -> None:
        """Take in rows, centred by variable where the column space allows it."""
        if not len(X):
            return
        if self._first is None or self._R is None or self._varies is None:
            self._first = X[0] * 1.0 if self.intercept else np.zeros(X.shape[1])
            self._first[: int(self.intercept)] = 0.0
            self._R = np.zeros((0, X.shape[1]))
            self._varies = np.full(X.shape[1], not self.intercept)
        moved = X - self._first
        self._varies = self._varies | np.any(moved != 0.0, axis=0)
        for chunk in _chunks(moved):
            self._R = np.linalg.qr(np.vstack([self._R, chunk]), mode="r")

    def keep(self) -> np.ndarray:
        """Return (p,) bool: True for the columns that ``lm`` would keep."""
        if self._R is None or self._varies is None:
            raise ValueError("no rows were added")
        skip = int(self.intercept)
        kept = np.ones(self._R.shape[1], bool)
        kept[skip:] = _keep(self._R[skip:, skip:], self._varies[skip:])
        return kept


def triangle(X: np.ndarray, centre: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
    """Return R of the QR decomposition of the (centred) columns, in chunks of rows."""
    R = np.zeros((0, X.shape[1]))
    for chunk in _chunks(X):
        moved = chunk if centre is None else (chunk - centre[0]) - centre[1]
        R = np.linalg.qr(np.vstack([R, moved]), mode="r")
    return R


def _keep(R: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Project each column of R on the columns kept so far; R has the inner products of X."""
    keep = np.zeros(R.shape[1], bool)
    basis = np.zeros((R.shape[0], 0))
    for j in np.flatnonzero(candidates):
        largest = np.max(np.abs(R[:, j]), initial=0.0)
        if largest == 0.0:
            continue
        rest = R[:, j] / largest  # no overflow in its length
        rest = rest / np.linalg.norm(rest)
        for _ in range(2):  # twice is enough (Kahan)
            rest = rest - basis @ (basis.T @ rest)
        left = np.linalg.norm(rest)
        if left >= TOLERANCE:
            keep[j] = True
            basis = np.column_stack([basis, rest / left])
    return keep

"""The values of one column, in memory or on disk, and the statistics that transforms learn from.

What `poly`, `scale`, splines and ``mean(x)`` remember of the training data are a few sums and order
statistics. They are taken chunk by chunk, so that a column of an in-memory table and one that was
streamed past (`Spool`) go through the same arithmetic.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import numpy as np

__all__ = ["Spool", "Values"]

Array = np.ndarray

#: values per chunk of a spool: 8 MB
CHUNK = 1 << 20
#: order statistics are sorted in memory once this many candidates are left
_FEW = 1 << 20
_DIGITS = 16


class Values:
    """Numbers without NaN, in one or several chunks.

    Parameters
    ----------
    x : array (n,)
        NaN are left out.
    """

    def __init__(self, x: Array) -> None:
        self._x = x[~np.isnan(x)]

    def chunks(self) -> Iterator[Array]:
        """Yield the values, once, in any partition."""
        yield self._x

    def finite(self) -> Values:
        """Return the values without infinities."""
        return self if np.isfinite(self._x).all() else Values(self._x[np.isfinite(self._x)])

    @property
    def size(self) -> int:
        """Number of values."""
        return self._x.size

    def min(self) -> float:
        """Return the smallest value."""
        return float(min(chunk.min() for chunk in self.chunks()))

    def max(self) -> float:
        """Return the largest value."""
        return float(max(chunk.max() for chunk in self.chunks()))

    def mean(self) -> float:
        """Return the mean, summed after a shift near it."""
        shift = float(next(self.chunks()).mean())
        return shift + sum(float((c - shift).sum()) for c in self.chunks()) / self.size

    def sum_squares(self, shift: float) -> float:
        """Return Σ (x - shift)²."""
        return sum(float(np.sum((c - shift) ** 2)) for c in self.chunks())

    def sd(self) -> float:
        """Return the standard deviation, divisor n - 1; NaN for one value."""
        if self.size < 2:
            return float("nan")
        return float(np.sqrt(self.sum_squares(self.mean()) / (self.size - 1)))

    def distinct(self, enough: int) -> int:
        """Count distinct values, stopping beyond `enough`."""
        found = np.empty(0)
        for chunk in self.chunks():
            found = np.union1d(found, chunk)
            if found.size > enough:
                break
        return int(found.size)

    def quantiles(self, probs: Array, low: float = -np.inf, high: float = np.inf) -> Array:
        """Return linearly interpolated quantiles (R's type 7) of the values in [low, high]."""
        inside = self._x[(self._x >= low) & (self._x <= high)]
        return np.quantile(inside, probs)


class Spool(Values):
    """Values written to a temporary file as they stream past: 8 bytes each on disk, none in memory.

    The file has no name and goes with the object.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._count = 0
        self._finite_only = False

    def append(self, x: Array) -> None:
        """Add a batch; NaN are left out."""
        kept = np.ascontiguousarray(x[~np.isnan(x)])
        self._file.seek(0, 2)
        self._file.write(kept.data)
        self._count += kept.size

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(c.size for c in self.chunks()) if self._finite_only else self._count

    def finite(self) -> Values:
        """Return a view of the same file without infinities."""
        view = object.__new__(Spool)
        view._file, view._count, view._finite_only = self._file, self._count, True
        return view

    def chunks(self) -> Iterator[Array]:
        """Read the file from its start."""
        for start in range(0, self._count, CHUNK):
            self._file.seek(8 * start)
            chunk = np.frombuffer(self._file.read(8 * min(CHUNK, self._count - start)))
            if self._finite_only:
                chunk = chunk[np.isfinite(chunk)]
            if chunk.size:
                yield chunk

    def quantiles(self, probs: Array, low: float = -np.inf, high: float = np.inf) -> Array:
        """Return exact quantiles by radix selection: a few scans of the file, bounded memory."""
        count = sum(int(np.count_nonzero((c >= low) & (c <= high))) for c in self.chunks())
        place = np.asarray(probs, float) * (count - 1)
        below = np.floor(place).astype(np.int64)
        above = np.minimum(below + 1, count - 1)
        at = {int(r): self._order(int(r), low, high) for r in np.union1d(below, above)}
        pairs = zip(below, above, place - below, strict=True)
        return np.array([np.quantile([at[int(a)], at[int(b)]], t) for a, b, t in pairs])

    def _order(self, rank: int, low: float, high: float) -> float:
        """Return the value of `rank` (from 0) among those in [low, high]."""
        prefix, bits, left = np.uint64(0), 0, rank
        while bits < 64:
            counts = np.zeros(1 << _DIGITS, np.int64)
            shift = np.uint64(64 - bits - _DIGITS)
            for keys in self._keys(prefix, bits, low, high):
                digits = (keys >> shift) & np.uint64((1 << _DIGITS) - 1)
                counts += np.bincount(digits.astype(np.int64), minlength=counts.size)
            ends = np.cumsum(counts)
            digit = int(np.searchsorted(ends, left, side="right"))
            left -= int(ends[digit] - counts[digit])
            prefix, bits = prefix << np.uint64(_DIGITS) | np.uint64(digit), bits + _DIGITS
            if counts[digit] <= _FEW:
                found = np.concatenate(list(self._keys(prefix, bits, low, high)))
                return float(_unkey(np.partition(found, left)[left : left + 1])[0])
        return float(_unkey(np.array([prefix]))[0])

    def _keys(self, prefix: np.uint64, bits: int, low: float, high: float) -> Iterator[Array]:
        """Yield the order-preserving integers that begin with `prefix`."""
        for chunk in self.chunks():
            keys = _key(chunk[(chunk >= low) & (chunk <= high)])
            yield keys if bits == 0 else keys[keys >> np.uint64(64 - bits) == prefix]


_SIGN = np.uint64(1 << 63)


def _key(x: Array) -> Array:
    """Map floats to integers of the same order (IEEE 754: flip the sign, or all bits)."""
    bits = (x + 0.0).view(np.uint64)  # + 0.0 turns -0.0 into 0.0
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _unkey(keys: Array) -> Array:
    return np.where(keys & _SIGN, keys ^ _SIGN, ~keys).view(np.float64)

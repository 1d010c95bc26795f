"""Levels of factors, gathered batch by batch and then frozen.

While a source is read for the first time, a `Gathering` numbers the distinct values of a column as
they arrive. `Gathering.freeze` puts them in the order that an in-memory factor has (categories in
theirs, other values sorted) and makes `Levels`, which code every later batch alike. A combination
of factors (``a:b``) is gathered as the integers that `pair` makes of the codes of its parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lmmjax.errors import DataError
from lmmjax.evaluate import label

__all__ = ["Gathering", "Levels", "pair", "unpair"]

Array = np.ndarray

#: widest range of integers that are coded by a table instead of hashing: 64 MB
_RANGE = 1 << 24
_HALF = np.int64(1 << 31)


def pair(first: Array, second: Array) -> Array:
    """Combine two codes (below 2^31) into one integer, -1 where either is missing."""
    key = first.astype(np.int64) * _HALF + second
    return np.where((first < 0) | (second < 0), np.int64(-1), key)


def unpair(key: Array) -> tuple[Array, Array]:
    """Undo `pair`."""
    first, second = np.divmod(key, _HALF)
    return first.astype(np.int32), second.astype(np.int32)


class _Table:
    """Integer -> code by direct lookup."""

    def __init__(self) -> None:
        self.low = 0
        self.codes = np.empty(0, np.int32)

    def cover(self, low: int, high: int) -> bool:
        """Widen the table to [low, high]; False if it would become too wide."""
        if self.codes.size:
            low, high = min(low, self.low), max(high, self.low + self.codes.size - 1)
        if high - low >= _RANGE or max(-low, high) >= 1 << 62:
            return False
        if high - low + 1 > self.codes.size:
            wider = np.full(high - low + 1, -1, np.int32)
            at = self.low - low if self.codes.size else 0
            wider[at : at + self.codes.size] = self.codes
            self.low, self.codes = low, wider
        return True


class Gathering:
    """Distinct values in order of arrival, and which of them complete rows have.

    Parameters
    ----------
    name : str
        For messages.
    category : bool
        The column is a categorical: its order of levels is its own.
    ordered, sort_text : bool
        Of a categorical: whether it is ordered; whether its categories are to be sorted.
    """

    def __init__(
        self, name: str, category: bool = False, ordered: bool = False, sort_text: bool = False
    ) -> None:
        self.name, self.category, self.ordered = name, category, ordered
        self.sort_text = sort_text
        self.used = np.zeros(0, bool)
        self._table: _Table | None = None if category else _Table()
        self._parts: list[Any] = []
        self._old = self._new = pd.Index([])  # two indices, merged when the new one has grown
        self.size = 0

    def codes(self, series: pd.Series) -> Array:
        """Return (n,) int32 numbers by arrival, -1 for missing; unseen values get new numbers."""
        if self.category:
            categories = pd.Index([label(v) for v in series.cat.categories], dtype=object)
            place = self._find(categories)
            return np.append(place, np.int32(-1))[series.cat.codes.to_numpy()]
        plain = isinstance(series.dtype, np.dtype) and series.dtype.kind in "iu" and len(series)
        if self._table is not None and plain:
            values = series.to_numpy()
            low, high = int(values.min()), int(values.max())
            if self._table.cover(low, high):
                return self._by_table(self._table, values)
        self._leave_table()
        found, uniques = pd.factorize(series)
        place = self._find(_plain(uniques))
        return np.append(place, np.int32(-1))[found]

    def mark(self, codes: Array) -> None:
        """Note that complete rows have these levels."""
        if self.used.size < self.size:
            more = np.zeros(max(self.size, 2 * self.used.size) - self.used.size, bool)
            self.used = np.concatenate([self.used, more])
        self.used[codes[codes >= 0] if codes.size and codes.min() < 0 else codes] = True

    def _by_table(self, table: _Table, values: Array) -> Array:
        shifted = values.astype(np.int64) - table.low
        codes = table.codes[shifted]
        if codes.min() < 0:
            fresh = np.zeros(table.codes.size, bool)
            fresh[shifted] = True
            at = np.flatnonzero(fresh & (table.codes < 0))
            table.codes[at] = np.arange(self.size, self.size + at.size, dtype=np.int32)
            self._parts.append(pd.Index(at + table.low))
            self.size += at.size
            codes = table.codes[shifted]
        return codes

    def _leave_table(self) -> None:
        """Go over from the table to hashing."""
        if self._table is not None:
            self._table = None
            self._old = self.keys()

    def _find(self, uniques: pd.Index) -> Array:
        place = _lookup(self._old, uniques)
        absent = np.flatnonzero(place < 0)
        if absent.size:
            recent = _lookup(self._new, uniques[absent])
            place[absent] = np.where(recent >= 0, recent + len(self._old), -1)
            self._add(uniques, place)
        return place

    def _add(self, uniques: pd.Index, place: Array) -> None:
        fresh = np.flatnonzero(place < 0)
        if not fresh.size:
            return
        place[fresh] = np.arange(self.size, self.size + fresh.size, dtype=np.int32)
        self._parts.append(uniques[fresh])
        self._new = self._new.append(uniques[fresh]) if len(self._new) else uniques[fresh]
        self.size += fresh.size
        if 2 * len(self._new) > len(self._old):
            self._old, self._new = self.keys(), pd.Index([])

    def keys(self) -> pd.Index:
        """Return the values in order of arrival."""
        if len(self._parts) > 1:
            self._parts = [self._parts[0].append(self._parts[1:])]
        return self._parts[0] if self._parts else pd.Index([])

    def freeze(self) -> tuple[Levels, Array]:
        """Return the levels in their order, and the code of each number by arrival."""
        keys = self.keys()
        self.mark(np.empty(0, np.int32))
        used = self.used[: self.size]
        if self.category and not self.sort_text:
            order = np.arange(self.size)
        else:
            try:
                order = np.asarray(keys.argsort())
            except TypeError as err:
                raise DataError(
                    f"found values of several types in {self.name}; turn it into text or a "
                    "categorical."
                ) from err
        rank = np.empty(self.size, np.int32)
        rank[order] = np.arange(self.size, dtype=np.int32)
        levels = Levels(keys[order], self.category, self.ordered, used[order])
        return levels, np.append(rank, np.int32(-1))


def _plain(uniques: Any) -> pd.Index:
    """Index distinct values; nullable integers and booleans, without NA here, become NumPy's."""
    index = pd.Index(uniques)
    if isinstance(index.dtype, pd.BooleanDtype):
        return pd.Index(index.to_numpy(dtype=bool))
    if pd.api.types.is_integer_dtype(index.dtype):
        unsigned = index.dtype in (np.dtype(np.uint64), pd.UInt64Dtype())
        return pd.Index(index.to_numpy(dtype=np.uint64 if unsigned else np.int64))
    return index


def _lookup(index: pd.Index, values: pd.Index) -> Array:
    if not len(index):
        return np.full(len(values), -1, np.int32)
    return index.get_indexer(values).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Levels:
    """The levels of a column in their order; codes batches.

    Attributes
    ----------
    keys : pandas.Index (J,)
        Values; text for a categorical.
    category, ordered : bool
    used : (J,) bool
        Levels that complete rows have.
    """

    keys: pd.Index
    category: bool
    ordered: bool
    used: Array

    def labels(self) -> Array:
        """Print the levels, (J,) array of str."""
        if self.category or pd.api.types.is_string_dtype(self.keys.dtype):
            return self.keys.to_numpy(dtype=object)
        if self.keys.dtype.kind in "iu" and isinstance(self.keys.dtype, np.dtype):
            return self.keys.to_numpy().astype(str).astype(object)
        return np.array([label(v) for v in self.keys], dtype=object)

    def codes(self, series: pd.Series) -> Array:
        """Return (n,) int32 codes, -1 for missing values and unknown levels."""
        if self.category:
            categories = pd.Index([label(v) for v in series.cat.categories], dtype=object)
            place = _lookup(self.keys, categories)
            return np.append(place, np.int32(-1))[series.cat.codes.to_numpy()]
        plain = isinstance(series.dtype, np.dtype) and series.dtype.kind in "iu"
        if plain and self._dense_range():
            return self._by_table(series.to_numpy())
        found, uniques = pd.factorize(series)
        return np.append(_lookup(self.keys, _plain(uniques)), np.int32(-1))[found]

    def _dense_range(self) -> bool:
        if not (isinstance(self.keys.dtype, np.dtype) and self.keys.dtype.kind in "iu"):
            return False
        return len(self.keys) > 0 and int(self.keys[-1]) - int(self.keys[0]) < _RANGE

    def _by_table(self, values: Array) -> Array:
        low, high = int(self.keys[0]), int(self.keys[-1])
        values = values.astype(self.keys.dtype, copy=False)  # int8 holds no differences
        if len(self.keys) == high - low + 1:
            return (values - low).astype(np.int32)
        table = self.__dict__.get("_table")
        if table is None:
            table = np.full(high - low + 1, -1, np.int32)
            table[self.keys.to_numpy() - low] = np.arange(len(self.keys), dtype=np.int32)
            object.__setattr__(self, "_table", table)
        return table[values - low]

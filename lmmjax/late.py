r"""Model matrices that are made when somebody asks for them.

A large fit reads its rows once, block by block, for their cross-products; only residuals,
predictions and the like want the whole of X or Z. A `Recipe` keeps what the columns are made of,
mostly the caller's own columns and codes, and makes all rows or some, always to the same bits. The
attributes that hold such arrays are `lmmjax.texts.Late`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lmmjax.formula import Terms
from lmmjax.rank import Moments
from lmmjax.terms import Coding, Encoded, encode
from lmmjax.texts import given

__all__ = ["Made", "Recipe", "moments_of", "protected", "release", "replaced", "rows_of", "sharing"]

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Recipe:
    """What `lmmjax.terms.encode` makes a model matrix of, n rows."""

    terms: Terms
    codings: Mapping[str, Coding]
    values: Mapping[str, Array]
    n: int

    def encode(self, rows: slice | None = None) -> Encoded:
        """Make all rows or some, with their labels; O(m p)."""
        if rows is None:
            return encode(self.terms, self.codings, self.values, self.n)
        values = {name: self.values[name][rows] for name in self.terms.variables}
        return encode(self.terms, self.codings, values, len(range(*rows.indices(self.n))))


class Made:
    """Those columns of a recipe of which ``keep`` (P,) is True: (n, p) float64, Fortran order.

    Made at the first call. Pickled, it is the recipe alone. ``moments`` are what somebody found out
    about the columns, and those of the response.
    """

    def __init__(self, recipe: Recipe, array: Array | None = None, keep: Array | None = None):
        self.recipe, self.array = recipe, array
        self.keep = None if keep is None or keep.all() else keep
        self.moments: Moments | None = None

    def __call__(self) -> Array:
        """Return the array."""
        if self.array is None:
            self.array = self._chosen(self.recipe.encode().X)
        return self.array

    def rows(self, rows: slice) -> Array:
        """Return a copy of some rows, without making the others."""
        if self.array is not None:
            return self.array[rows].copy(order="F")
        return self._chosen(self.recipe.encode(rows).X)

    def kept(self, keep: Array) -> Made:
        """Keep some of the columns."""
        if keep.all():
            return self
        whole = keep
        if self.keep is not None:
            whole = self.keep.copy()
            whole[self.keep] = keep
        array = None if self.array is None else np.asfortranarray(self.array[:, keep])
        return Made(self.recipe, array, whole)

    def _chosen(self, X: Array) -> Array:
        return X if self.keep is None else np.asfortranarray(X[:, self.keep])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "array": None}


def moments_of(holder: Any, name: str) -> Moments | None:
    """Return the moments that an attribute came with; none where another array was put there."""
    value = given(holder, name)
    return value.moments if isinstance(value, Made) else None


def rows_of(holder: Any, name: str, rows: slice) -> Array:
    """Return a copy of some rows of an attribute, which is not made for it."""
    value = given(holder, name)
    return value.rows(rows) if isinstance(value, Made) else value[rows].copy(order="F")


def replaced(holder: Any, **changes: Any) -> Any:
    """`dataclasses.replace` that makes no attribute which nobody has read.

    Moments, which are those of a response too, do not outlive it.
    """
    old = {f.name: given(holder, f.name) for f in dataclasses.fields(holder)}
    if not changes.keys().isdisjoint(("y", "offset", "weights")):
        old = {name: _without_moments(value) for name, value in old.items()}
    return type(holder)(**{**old, **changes})


def _without_moments(value: Any) -> Any:
    if not isinstance(value, Made):
        return value
    other = copy.copy(value)
    other.array, other.moments = value.array, None  # copying is pickling: it leaves out the array
    return other


def release(*holders: Any) -> None:
    """Forget the arrays that attributes have made."""
    for holder in holders:
        for value in vars(holder).values():
            if isinstance(value, Made):
                value.array = None


def sharing(columns: Iterable[pd.Series], arrays: Iterable[Array]) -> tuple[pd.Series, ...]:
    """Return the columns whose memory the arrays use."""
    arrays = list(arrays)
    plain = ((c, c.to_numpy()) for c in columns if isinstance(c.dtype, np.dtype))
    return tuple(c for c, x in plain if any(np.may_share_memory(a, x) for a in arrays))


def protected(value: Array, columns: Iterable[pd.Series]) -> Array:
    """Return values that the caller cannot change: a copy only where they are his memory.

    Under pandas' copy-on-write the arrays of columns are read-only, and pandas writes elsewhere as
    long as somebody holds the columns: see `sharing`.
    """
    return value.copy() if value.flags.writeable and sharing(columns, [value]) else value

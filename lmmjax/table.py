"""The border to data frames: any table in, named pandas columns and row labels out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from lmmjax.errors import DataError
from lmmjax.evaluate import CONSTANTS, LITERALS
from lmmjax.expr import Name, Node, deparse, names_in

__all__ = ["Table"]


class Table:
    """Read-only view of a pandas, polars, pyarrow or narwhals table, or a dict of columns.

    Only columns asked for are converted; the caller's object is never changed.

    Parameters
    ----------
    data : table
        pandas.DataFrame, dict of equally long columns, or anything narwhals knows.
    what : str
        Name of the argument, for messages.

    Raises
    ------
    DataError
        Not a table.
    """

    def __init__(self, data: Any, what: str = "data") -> None:
        self.what = what
        self._frame = _open(data, what)
        self._n: int | None = None
        lazy = hasattr(self._frame, "collect_schema")
        columns = self._frame.collect_schema().names() if lazy else self._frame.columns
        self.names = [str(c) for c in columns]

    @property
    def rows(self) -> pd.Index:
        """Row labels: those of pandas, else positions."""
        if isinstance(self._frame, pd.DataFrame):
            return self._frame.index
        return pd.RangeIndex(len(self))

    def __len__(self) -> int:
        if self._n is None:
            self._n = _count_rows(self._frame)
        return self._n

    def read(self, nodes: Iterable[Node]) -> dict[str, pd.Series]:
        """Return the columns that the expressions name.

        Raises
        ------
        DataError
            A name is neither a column nor a constant, or stands for two columns.
        """
        wanted = dict.fromkeys(name.id for node in nodes for name in names_in(node))
        columns = known_columns(wanted, self.names, self.what)
        if isinstance(self._frame, pd.DataFrame):
            return {name: self._frame[name] for name in columns}
        if not columns:
            return {}
        converted = _convert(self._frame, columns)
        self._n = len(converted[columns[0]])
        return converted


def check_index(values: Any, rows: pd.Index, what: str) -> None:
    """Refuse values whose row labels contradict those of the data; they are taken by position.

    Raises
    ------
    DataError
        Both indexes are more than positions 0, 1 ..., and differ.
    """
    index = values.index if isinstance(values, pd.Series | pd.DataFrame) else None
    if index is None or _is_default(index) or _is_default(rows) or len(index) != len(rows):
        return
    if not index.equals(rows):
        raise DataError(
            f"found an index of {what} that differs from that of the data; expected the same "
            f"rows in the same order. Align them with {what}.loc[data.index], or, where the "
            f"order is right, take the index off with {what}.to_numpy()."
        )


def _is_default(index: pd.Index) -> bool:
    return isinstance(index, pd.RangeIndex) and index.start == 0 and index.step == 1


def known_columns(wanted: Iterable[str], names: list[str], what: str) -> list[str]:
    """Return the names that are columns; the others must be constants.

    Raises
    ------
    DataError
        A name is neither, or stands for two columns.
    """
    found = []
    for name in wanted:
        count = names.count(name)
        if count > 1:
            raise DataError(
                f"found {count} columns named {name!r} in {what}; expected one. "
                "Rename or remove the others."
            )
        if count == 0 and name not in CONSTANTS and name not in LITERALS:
            raise DataError(_unknown(name, names, what))
        if count:
            found.append(name)
    return found


def _unknown(name: str, names: list[str], what: str) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    close = close or [c for c in names if c.lower() == name.lower()]
    shown = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
    hint = f" Did you mean {' or '.join(close)}?" if close else " Check the spelling."
    return f"found no column {deparse(Name(name))} in {what}; expected one of {shown}.{hint}"


def _open(data: Any, what: str) -> Any:
    if isinstance(data, pd.DataFrame):
        return data
    if isinstance(data, dict):
        return _from_dict(data, what)
    import narwhals as nw

    try:
        return nw.from_native(data)
    except TypeError as err:
        raise DataError(
            f"found {type(data).__name__} as {what}; expected a table (pandas, polars, pyarrow "
            "or another that narwhals knows) or a dict of columns."
        ) from err


def _count_rows(frame: Any) -> int:
    if isinstance(frame, pd.DataFrame):
        return len(frame)
    import narwhals as nw

    if isinstance(frame, nw.LazyFrame):
        return int(frame.select(nw.len()).collect().item())
    return len(frame)


def _from_dict(data: dict, what: str) -> pd.DataFrame:
    lengths = {name: np.shape(column)[:1] for name, column in data.items()}
    if len(set(lengths.values())) > 1 or () in lengths.values():
        shown = ", ".join(
            f"{name}: {size[0] if size else 'one value'}" for name, size in lengths.items()
        )
        raise DataError(f"found columns of unequal length in {what} ({shown}); make them equal.")
    return pd.DataFrame({n: c.array if isinstance(c, pd.Series) else c for n, c in data.items()})


def _convert(frame: Any, columns: list[str]) -> dict[str, pd.Series]:
    """Convert the columns to pandas, with the level order that the source means."""
    import narwhals as nw

    frame = frame.select(columns)
    frame = frame.collect() if isinstance(frame, nw.LazyFrame) else frame
    converted = frame.to_pandas()
    result = {}
    for name in columns:
        series = converted[name]
        if frame.implementation.is_polars() and isinstance(series.dtype, pd.CategoricalDtype):
            # An Enum is ordered for polars only in the sense that its levels have an order; the
            # categories of a polars Categorical come in no order that its user chose.
            series = series.cat.as_unordered()
            if frame.schema[name] == nw.Categorical:
                series = series.cat.reorder_categories(sorted(series.cat.categories))
        result[name] = series
    return result

"""Where the responses of a batch come from: arrays, columns, sparse matrices, AnnData, streams.

A source hands out blocks of at most ``chunk`` responses as dense float64 (n, k), so memory does not
grow with the number of responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lmmjax.errors import DataError


class Source(NamedTuple):
    """Responses in blocks.

    ``labels`` may be None for a stream, which names its own; ``column`` gives one response by
    position, or is None where they are not kept.
    """

    labels: list[Any] | None
    blocks: Callable[[int], Iterator[tuple[list[Any], np.ndarray]]]
    column: Callable[[int], np.ndarray] | None


def open_source(responses: Any, n: int, columns: Callable[[list[str]], Any], layer: Any) -> Source:
    """Make a source of any supported kind.

    Parameters
    ----------
    responses : array (n, m), memory map, DataFrame, list of str, sparse matrix, AnnData or iterator
        An iterator yields blocks (n, k), or pairs (labels, block).
    n : int
        Rows of the data.
    columns : callable
        Reads columns of the data by name.
    layer : str, optional
        Layer of an AnnData object.

    Raises
    ------
    DataError
    """
    if hasattr(responses, "var_names") and hasattr(responses, "X"):
        matrix = responses.X if layer is None else responses.layers[layer]
        return _matrix(matrix, list(responses.var_names), n)
    if layer is not None:
        raise DataError("layer= names a layer of an AnnData object; responses is not one.")
    if isinstance(responses, list | tuple) and all(isinstance(r, str) for r in responses):
        frame = columns(list(responses))
        return _matrix(_numeric(frame), list(responses), n)
    if hasattr(responses, "columns") and not isinstance(responses, np.ndarray):
        import narwhals as nw

        frame = nw.from_native(responses).to_pandas()
        return _matrix(_numeric(frame), list(frame.columns), n)
    if hasattr(responses, "shape") and hasattr(responses, "dtype"):
        if len(responses.shape) != 2:
            raise DataError(
                f"responses has shape {responses.shape}; expected (rows, responses), a column each."
            )
        return _matrix(responses, list(range(responses.shape[1])), n)
    if hasattr(responses, "__next__") or hasattr(responses, "__iter__"):
        return _stream(responses, n)
    raise DataError(
        f"found {type(responses).__name__} as responses; expected an array (rows, responses), a "
        "table, a list of column names, a sparse matrix, AnnData, or an iterator of blocks."
    )


def _numeric(frame: Any) -> np.ndarray:
    text = [c for c in frame.columns if frame[c].dtype.kind not in "fiub"]
    if text:
        raise DataError(f"found responses that are not numbers: {text[:5]}; expected numbers.")
    return frame.to_numpy(dtype=float, na_value=np.nan)


def _floats(values: Any) -> np.ndarray:
    """Real numbers as float64; nothing is cut off."""
    kind = values.dtype.kind
    if kind in "fiub":
        return np.asarray(values, dtype=np.float64)
    try:
        if kind == "O":
            return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"found responses that are not real numbers ({error}); expected numbers."
        ) from error
    raise DataError(f"found responses of type {values.dtype}; expected real numbers.")


@dataclass(frozen=True, eq=False)
class Matrix:
    """Responses that are kept: an array, a memory map or a sparse matrix, a column each."""

    matrix: Any
    labels: list[Any]

    def cut(self, a: int, b: int) -> np.ndarray:
        """Columns a ... b - 1, dense."""
        block = self.matrix[:, a:b]
        dense = block.toarray() if hasattr(block, "toarray") else block
        return _floats(dense)

    def blocks(self, chunk: int) -> Iterator[tuple[list[Any], np.ndarray]]:
        """All columns in blocks."""
        for at in range(0, len(self.labels), chunk):
            end = min(at + chunk, len(self.labels))
            yield self.labels[at:end], self.cut(at, end)

    def column(self, i: int) -> np.ndarray:
        """One response."""
        return self.cut(i, i + 1)[:, 0]


def _matrix(matrix: Any, labels: list[Any], n: int) -> Source:
    _check_rows(matrix.shape[0], n)
    kept = Matrix(matrix.tocsc() if hasattr(matrix, "tocsc") else matrix, labels)
    return Source(labels, kept.blocks, kept.column)


def _stream(responses: Any, n: int) -> Source:
    def blocks(chunk: int) -> Iterator[tuple[list[Any], np.ndarray]]:
        at = 0
        for item in responses:
            named = isinstance(item, tuple) and len(item) == 2
            block = _floats(np.asarray(item[1] if named else item))
            block = block[:, None] if block.ndim == 1 else block
            _check_rows(block.shape[0], n)
            labels = list(item[0]) if named else list(range(at, at + block.shape[1]))
            at += block.shape[1]
            for a in range(0, block.shape[1], chunk):
                yield labels[a : a + chunk], block[:, a : a + chunk]

    return Source(None, blocks, None)


def _check_rows(rows: int, n: int) -> None:
    if rows != n:
        raise DataError(
            f"found responses of {rows} rows and data of {n}; expected one row of responses for "
            "each row of the data."
        )

"""Cross-products on a Spark cluster: each partition is coded and summed where it lies.

The first pass streams the columns of the model past the driver, partition by partition. The second
runs the same `lmmjax.stream.Encoder` under ``mapInArrow`` on the workers, which need lmmjax
installed; each yields its sums as rows of 16 numbers under the key (part, row, block), and Spark
adds them by key. Only sums, as many as the model has levels, reach the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from lmmjax.stream import Encoder, Sums

__all__ = ["arrow_batches", "arrow_schema", "distributed", "partial_sums", "restore"]

#: numbers in a row of sums
WIDTH = 16
_KEYS = ("part", "row", "block")
_VALUES = tuple(f"v{i}" for i in range(WIDTH))
SCHEMA = ", ".join(["part int, row long, block int", *(f"{v} double" for v in _VALUES)])
_ARROW = pa.schema(
    [("part", pa.int32()), ("row", pa.int64()), ("block", pa.int32())]
    + [(v, pa.float64()) for v in _VALUES]
)


def arrow_schema(frame: Any) -> pa.Schema:
    """Return the Arrow schema of a Spark frame."""
    return frame.limit(0).toArrow().schema


def arrow_batches(frame: Any, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Stream a Spark frame to the driver; memory of one partition."""
    for row in frame.select(*columns).mapInArrow(_as_bytes, "batch binary").toLocalIterator():
        with pa.ipc.open_stream(row[0]) as reader:
            yield from reader


def _as_bytes(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        data = pa.array([sink.getvalue().to_pybytes()], pa.binary())
        yield pa.RecordBatch.from_arrays([data], ["batch"])


def distributed(frame: Any) -> Callable[[Encoder], Sums]:
    """Return the function that sums a Spark frame with an encoder."""

    def run(encoder: Encoder) -> Sums:
        from pyspark.sql import functions as F

        rows = frame.select(*encoder.learned.columns).mapInArrow(partial_sums(encoder), SCHEMA)
        added = rows.groupBy(*_KEYS).agg(*(F.sum(v).alias(v) for v in _VALUES))
        return restore(encoder, arrow_batches(added, [*_KEYS, *_VALUES]))

    return run


def partial_sums(
    encoder: Encoder,
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Return the function for ``mapInArrow``: record batches of a partition -> rows of its sums."""

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        sums = encoder.sum(batches)
        for part, matrix in enumerate(_matrices(encoder, sums)):
            yield from _rows(part, matrix)

    return run


def restore(encoder: Encoder, batches: Iterator[pa.RecordBatch]) -> Sums:
    """Put sums together from rows; rows with equal keys must have been added, or are added here."""
    sums = encoder.empty()
    matrices = _matrices(encoder, sums)
    for batch in batches:
        part, row, block = (batch.column(name).to_numpy() for name in _KEYS)
        values = np.column_stack([batch.column(name).to_numpy() for name in _VALUES])
        for number in np.unique(part):
            mine = part == number
            target, first = matrices[number], block[mine] * WIDTH
            for i in range(WIDTH):
                inside = first + i < target.shape[1]
                at = (row[mine][inside], first[inside] + i)
                np.add.at(target, at, values[mine, i][inside])
    _write_back(encoder, sums, matrices)
    return sums


def _rows(part: int, matrix: np.ndarray) -> Iterator[pa.RecordBatch]:
    """Cut a matrix into rows of `WIDTH` numbers; rows of zeros are left out."""
    for block, start in enumerate(range(0, matrix.shape[1], WIDTH)):
        piece = matrix[:, start : start + WIDTH]
        row = np.flatnonzero(np.any(piece != 0.0, axis=1))
        full = np.zeros((row.size, WIDTH))
        full[:, : piece.shape[1]] = piece[row]
        keys = [np.full(row.size, part, np.int32), row, np.full(row.size, block, np.int32)]
        if row.size:
            yield pa.RecordBatch.from_arrays([pa.array(c) for c in (*keys, *full.T)], schema=_ARROW)


def _names(encoder: Encoder) -> list[str]:
    """Everything that may have missing values."""
    parsed, learned = encoder.learned.parsed, encoder.learned
    values = [v for r in encoder.random for v in r.terms.variables]
    groups = [bar.group for bar in parsed.bars]
    names = [*learned.columns, parsed.response, *parsed.terms.variables, *values, *groups]
    return list(dict.fromkeys([*names, "offset", "weights"]))


def _matrices(encoder: Encoder, sums: Sums) -> list[np.ndarray]:
    """All sums as matrices of numbers, levels and rows of the core first."""
    counts, totals = sums.counts, sums.totals
    out = [np.concatenate([a.reshape(-1, a.shape[-1]) for a in part]).T for part in totals.levels]
    for array in totals.flat.values():
        out.append(np.array(array, float).reshape(array.shape if array.ndim == 2 else (1, -1)))
    numbers = [counts.rows, counts.complete, counts.differing]
    numbers += [counts.missing.get(name, 0) for name in _names(encoder)]
    out.append(np.array([numbers], float))
    used = [*counts.leaves.values(), *counts.crosses.values()]
    return out + [array.astype(float)[:, None] for array in used]


def _write_back(encoder: Encoder, sums: Sums, matrices: list[np.ndarray]) -> None:
    """Undo `_matrices`."""
    counts, totals, rest = sums.counts, sums.totals, iter(matrices)
    for part in totals.levels:
        matrix, start = next(rest).T, 0
        for array in part:
            rows = array.size // array.shape[-1]
            array[...] = matrix[start : start + rows].reshape(array.shape)
            start += rows
    for key, array in totals.flat.items():
        totals.flat[key] = next(rest).reshape(array.shape)
    numbers = [int(v) for v in next(rest)[0]]
    counts.rows, counts.complete, counts.differing = numbers[:3]
    missing = zip(_names(encoder), numbers[3:], strict=True)
    counts.missing = {name: count for name, count in missing if count}
    for used in (counts.leaves, counts.crosses):
        for key in used:
            used[key] = next(rest)[:, 0] > 0

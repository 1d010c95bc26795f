"""Tables larger than memory: anything that can be streamed as Arrow record batches, more than once.

A `Source` knows its columns and yields batches of those asked for. Parquet files go through
pyarrow's scanner; DuckDB relations, polars lazy frames and Spark frames are asked for Arrow batches
by their own engines; any other object with an Arrow C stream is asked for a new stream per pass.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lmmjax.errors import DataError

__all__ = ["ROWS", "Source", "open_source", "to_series"]

#: rows of a batch, at most: bounds the memory, and amortises what a batch costs
ROWS = 1 << 20


@dataclass(frozen=True)
class Source:
    """A table that can be streamed again and again.

    Attributes
    ----------
    schema : pyarrow.Schema
    sorted_categories : frozenset of str
        Dictionary columns whose order of levels nobody chose (polars ``Categorical``).
    unordered : bool
        Dictionary columns never make an ordered factor (polars ``Enum``).
    distributed : callable, optional
        Encoder -> sums over the whole table, where the source's engine can run it.
    stream : callable
        Columns and rows of a batch -> record batches of those columns, in that order.
    native : object
        What the user gave.
    """

    schema: pa.Schema
    stream: Callable[[list[str], int], Iterator[pa.RecordBatch]]
    native: Any
    sorted_categories: frozenset[str] = frozenset()
    unordered: bool = False
    distributed: Callable[[Any], Any] | None = None

    @property
    def names(self) -> list[str]:
        """Names of all columns."""
        return list(self.schema.names)

    def batches(self, columns: list[str], rows: int = ROWS) -> Iterator[pa.RecordBatch]:
        """Yield batches of `rows` rows (the last one of fewer) with these columns."""
        waiting: list[pa.RecordBatch] = []
        held = 0
        for batch in self.stream(columns, rows):
            for start in range(0, batch.num_rows, rows):
                waiting.append(batch.slice(start, rows))
                held += waiting[-1].num_rows
                if held >= rows:
                    whole = _join(waiting)
                    yield whole.slice(0, rows)
                    waiting, held = [whole.slice(rows)], held - rows
        if held:
            yield _join(waiting)


def _join(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    """Put batches together; what the engine makes is often small."""
    parts = [batch for batch in batches if batch.num_rows]
    if len(parts) == 1:
        return parts[0]
    table = pa.Table.from_batches(parts)
    if any(pa.types.is_dictionary(kind) for kind in table.schema.types):
        table = table.unify_dictionaries()
    return table.combine_chunks().to_batches()[0]


def open_source(source: Any) -> Source:
    """Make a `Source` of a path, dataset, relation, lazy frame or Arrow stream.

    Parameters
    ----------
    source : object
        Path, glob pattern or list of paths of Parquet files (or a folder of them); pyarrow dataset
        or table; DuckDB relation; polars lazy or eager frame; Spark frame; or any object with
        ``__arrow_c_stream__`` that can be streamed twice.

    Raises
    ------
    DataError
        Nothing that can be streamed, or something that can be streamed only once.
    """
    if isinstance(source, pa.RecordBatchReader):
        raise DataError(
            "found a RecordBatchReader as source, which can be read once; expected a source that "
            "can be read again (two passes are needed). Give what the reader was made from, or "
            "write it to a Parquet file."
        )
    package = type(source).__module__.partition(".")[0]
    if package == "narwhals":
        return open_source(source.to_native())
    if isinstance(source, str | os.PathLike | list | tuple):
        return _parquet(_files(source), source)
    if package == "pyarrow":
        return _dataset(source, source)
    opener = {"polars": _polars, "pyspark": _spark}.get(package)
    if opener is not None:
        return opener(source)
    if package in ("duckdb", "_duckdb") and hasattr(source, "to_arrow_reader"):
        return _duckdb(source)
    if isinstance(source, pd.DataFrame):
        return _dataset(pa.Table.from_pandas(source, preserve_index=False), source)
    if hasattr(source, "__arrow_c_stream__"):
        return _c_stream(source)
    raise DataError(
        f"found {type(source).__name__} as source; expected a Parquet path or pattern, a pyarrow "
        "dataset, a DuckDB relation, a polars lazy frame, a Spark frame, or an object with an "
        "Arrow C stream. Tables in memory can also be given to Model(formula, data)."
    )


def _files(source: Any) -> list[str]:
    """Expand patterns and folders to the paths of Parquet files."""
    given = [source] if isinstance(source, str | os.PathLike) else list(source)
    paths: list[str] = []
    for one in (os.fspath(path) for path in given):
        found = sorted(glob.glob(one, recursive=True)) if not Path(one).exists() else [one]
        if not found:
            raise DataError(f"found no file {one!r}; expected a Parquet file, folder or pattern.")
        for path in found:
            inside = sorted(map(str, Path(path).rglob("*.parquet"))) if Path(path).is_dir() else []
            paths += inside or [path]
    return paths


def _parquet(paths: list[str], native: Any) -> Source:
    """Read files one after the other; a dataset's scanner would run far ahead of its reader."""
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    try:
        schema = ds.dataset(paths, format="parquet").schema
    except pa.ArrowInvalid as err:
        raise DataError(
            f"found {', '.join(paths[:3])}, which cannot be read as Parquet; expected Parquet "
            "files. Give another format as a pyarrow dataset, such as "
            'pyarrow.dataset.dataset("x.csv", format="csv"), or write it to Parquet.'
        ) from err

    def stream(columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        kinds = pa.schema([schema.field(name) for name in columns])

        def read() -> Iterator[pa.RecordBatch]:
            for path in paths:
                with pq.ParquetFile(path, pre_buffer=False) as file:
                    for batch in file.iter_batches(rows, columns=columns):
                        yield batch.select(columns).cast(kinds)

        yield from _one_ahead(read())

    return Source(schema, stream, native)


def _one_ahead(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Read the next batch in another thread while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, batches, None)
        while (batch := waiting.result()) is not None:
            waiting = pool.submit(next, batches, None)
            yield batch


def _dataset(source: Any, native: Any) -> Source:
    import pyarrow.dataset as ds

    if isinstance(source, pa.Table | pa.RecordBatch):
        source = ds.InMemoryDataset(source)
    if not isinstance(source, ds.Dataset):
        raise DataError(f"found {type(native).__name__} as source; expected a pyarrow dataset.")

    def stream(columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        # By default the scanner buffers whole files and runs far ahead of its reader
        options: dict[str, Any] = {"batch_readahead": 4, "fragment_readahead": 1}
        if isinstance(source, ds.FileSystemDataset) and source.format.default_extname == "parquet":
            parquet = ds.ParquetFragmentScanOptions(pre_buffer=False)
            options |= {"fragment_scan_options": parquet, "cache_metadata": False}
        yield from source.to_batches(columns=columns, batch_size=rows, **options)

    return Source(source.schema, stream, native)


def _duckdb(relation: Any) -> Source:
    import duckdb

    def stream(columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        wanted = [duckdb.ColumnExpression(name) for name in columns]
        yield from relation.select(*wanted).to_arrow_reader(rows)

    schema = relation.limit(0).to_arrow_table().schema
    return Source(schema, stream, relation)


def _polars(frame: Any) -> Source:
    import polars as pl

    lazy = frame.lazy()
    kinds = lazy.collect_schema()
    free = frozenset(name for name, kind in kinds.items() if kind == pl.Categorical)

    def stream(columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        batches = lazy.select(columns).collect_batches(chunk_size=rows, maintain_order=False)
        for part in batches:
            yield from part.to_arrow().to_batches()

    return Source(lazy.head(0).collect().to_arrow().schema, stream, frame, free, True)


def _spark(frame: Any) -> Source:
    from lmmjax.spark import arrow_batches, arrow_schema, distributed

    def stream(columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        yield from arrow_batches(frame, columns)

    return Source(arrow_schema(frame), stream, frame, distributed=distributed(frame))


def _c_stream(source: Any) -> Source:
    def stream(columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        for batch in pa.RecordBatchReader.from_stream(source):
            yield batch.select(columns)

    return Source(pa.RecordBatchReader.from_stream(source).schema, stream, source)


# Arrow columns as the evaluator reads them ----------------------------------------------------


_NULLABLE = {
    pa.bool_(): pd.BooleanDtype(),
    pa.int8(): pd.Int8Dtype(),
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.uint8(): pd.UInt8Dtype(),
    pa.uint16(): pd.UInt16Dtype(),
    pa.uint32(): pd.UInt32Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
}


def to_series(array: pa.Array) -> pd.Series:
    """Convert a column; integers and booleans with nulls stay what they are in every batch."""
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    if pa.types.is_null(array.type):
        return pd.Series(np.full(len(array), np.nan))
    if array.null_count and array.type in _NULLABLE:
        return array.to_pandas(types_mapper=_NULLABLE.get)
    return array.to_pandas()

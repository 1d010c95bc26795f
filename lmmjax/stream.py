"""A model of a table larger than memory: two passes over its batches, then nothing of size n.

The first pass (`lmmjax.scout`) learns levels and states, the second codes each batch as
`DesignSpec.new` would and sums its products (`lmmjax.totals`). The result is what an in-memory
model keeps: labels, a `DesignSpec` for new data, units and cross-products. A further pass is made
only where columns of X are nearly dependent, or where a level turns out to have no complete row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lmmjax import design as ds
from lmmjax.errors import DataError, DesignError
from lmmjax.expr import Name, Node, deparse
from lmmjax.formula import ParsedFormula, expand, parse
from lmmjax.gram import Gram, Plan, Rhs, Units, Workspace, arrange
from lmmjax.rank import ColumnJudge, proves_rank
from lmmjax.scout import Learned, Scouted, scout
from lmmjax.source import ROWS, Source, open_source
from lmmjax.terms import Coding, centrable, constant_columns, encode
from lmmjax.totals import (
    Columns,
    Rough,
    Totals,
    aliases,
    empty_totals,
    exact,
    rough_units,
    sum_batch,
)
from lmmjax.variables import (
    columns_of,
    incomplete_rows,
    refuse_empty,
    refuse_missing,
    side_source,
    variables,
)

__all__ = ["Encoder", "StreamedDesign", "StreamedTerm", "build_streamed"]

Array = np.ndarray

#: batches have fewer rows where X and Z have more columns than this
WIDTH = 12


def _no_rows(name: str) -> DataError:
    return DataError(
        f"found a model made by Model.from_table, which keeps no rows, and a request for their "
        f"{name}; expected a question that sums can answer. Use predict(newdata) on a part of the "
        "table, or Model(formula, data) on a table in memory."
    )


@dataclass(frozen=True, eq=False)
class StreamedTerm:
    """The labels of a random-effects term; as `lmmjax.design.Term` without its rows."""

    group: str
    names: tuple[str, ...]
    cov: str
    levels: Array

    def __getattr__(self, name: str) -> Any:
        if name in ("z", "codes"):
            raise _no_rows(f"{name} of {self.group}")
        raise AttributeError(name)


@dataclass(frozen=True, eq=False)
class StreamedDesign:
    """The labels of a streamed model; as `lmmjax.design.Design` without its rows.

    Asking for ``y X offset weights rows columns`` raises a DataError that says so.
    """

    formula: str
    response: str
    x_names: tuple[str, ...]
    x_terms: tuple[str, ...]
    x_assign: Array
    aliased: tuple[str, ...]
    has_offset: bool
    has_weights: bool
    terms: tuple[StreamedTerm, ...]
    n: int
    n_dropped: int
    missing: dict[str, int]
    spec: ds.DesignSpec = field(repr=False)
    residual: None = None

    @property
    def p(self) -> int:
        """Fixed effects."""
        return len(self.x_names)

    def __getattr__(self, name: str) -> Any:
        if name in ("y", "X", "offset", "weights", "rows", "columns"):
            raise _no_rows(name)
        raise AttributeError(name)


# Coding a batch -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Encoder:
    """Codes record batches into the sums of their products. Picklable: workers can have it.

    Attributes
    ----------
    learned : Learned
    fixed : dict of Coding
    random : tuple of RandomSpec
    x_names, x_assign : labels of all columns of X
    plan : Plan
        Order of elimination, for all columns of X.
    rough : Rough
    first : float
        Some response, to see whether all are equal.
    centre : dict of float
        A number near the mean of each variable that may be centred.
    """

    learned: Learned
    fixed: dict[str, Coding]
    random: tuple[ds.RandomSpec, ...]
    x_names: tuple[str, ...]
    x_assign: Array
    plan: Plan
    rough: Rough
    first: float
    centre: dict[str, float]

    def read(self, batch: pa.RecordBatch) -> _Read:
        """Evaluate a batch, without its incomplete rows."""
        return _read(self.learned, batch)

    def columns(self, read: _Read) -> Columns:
        """Code the rows of a batch."""
        return _columns(self.learned.parsed, self.fixed, self.random, read)

    def judged(self, read: _Read) -> Array:
        """X with centred variables, for the judgement of its rank."""
        arrays = dict(read.arrays)
        for name, centre in self.centre.items():
            arrays[name] = arrays[name] - centre
        return encode(self.learned.parsed.terms, self.fixed, arrays, read.n).X

    def empty(self) -> Sums:
        """Return sums of no rows."""
        return Sums(empty_totals(self.plan), Counts.none(self.learned))

    def sum(self, batches: Iterator[pa.RecordBatch]) -> Sums:
        """Sum over batches; those of parts of a table add."""
        sums, space = self.empty(), Workspace()
        for batch in batches:
            read = self.read(batch)
            sums.counts.add(read, self.first)
            if read.n:
                sums.totals.add(sum_batch(self.columns(read), self.plan, self.rough, space))
        return sums


@dataclass(frozen=True, eq=False)
class _Read:
    """The evaluated variables of a batch's complete rows."""

    n: int
    rows: int
    y: Array
    offset: Array | None
    weights: Array | None
    values: dict[str, Any]
    arrays: dict[str, Array]
    groups: dict[str, Array]
    missing: dict[str, int]
    leaves: dict[str, Array]
    combinations: dict[str, Array]


def _read(learned: Learned, batch: pa.RecordBatch) -> _Read:
    ev = learned.evaluator(batch)
    index = pd.RangeIndex(ev.n)
    raw = variables(learned.parsed, ev, index, learned.weights, learned.offset)
    dropped, missing = incomplete_rows(raw)
    mask = ~dropped if missing else None
    take = _taker(mask)
    values = {name: take(value) for name, value in raw.values.items()}
    y, offset, weights = take(raw.y), take(raw.offset), take(raw.weights)
    _check(raw.response, y, values, offset, weights)
    groups = dict(zip(raw.group_names, raw.groups, strict=True))
    return _Read(
        n=len(y),
        rows=ev.n,
        y=np.asarray(y, float),
        offset=offset,
        weights=weights,
        values=values,
        arrays={name: ds._array(value) for name, value in values.items()},
        groups={name: take(factor.codes) for name, factor in groups.items()},
        missing=missing,
        leaves={key: take(ev.leaf_codes(key)) for key in learned.leaves},
        combinations={
            name: take(ev.group_leaf_codes(learned.groups[name])) for name in learned.crosses
        },
    )


def _taker(mask: Array | None) -> Any:
    def take(value: Any) -> Any:
        if value is None or mask is None:
            return value
        if isinstance(value, ds.Factor):
            return dataclasses.replace(value, codes=value.codes[mask])
        if isinstance(value, ds.Logical | ds.Matrix):
            return type(value)(value.values[mask])
        return value[mask]

    return take


def _check(
    response: str, y: Array, values: Mapping[str, Any], offset: Array | None, weights: Array | None
) -> None:
    for name, value in {response: y, **values, "offset": offset, "weights": weights}.items():
        if value is not None:
            ds._check_finite(value, name)
    if weights is not None:
        ds._check_weights(weights, pd.RangeIndex(len(weights)))


def _columns(
    parsed: ParsedFormula,
    fixed: Mapping[str, Coding],
    random: tuple[ds.RandomSpec, ...],
    read: _Read,
) -> Columns:
    return Columns(
        X=encode(parsed.terms, fixed, read.arrays, read.n).X,
        y=read.y if read.offset is None else read.y - read.offset,
        weights=read.weights,
        Z=tuple(encode(r.terms, r.codings, read.arrays, read.n).X for r in random),
        codes=tuple(read.groups[r.bar.group] for r in random),
    )


# What is counted ------------------------------------------------------------------------------


@dataclass
class Counts:
    """What a pass counts besides products; everything adds."""

    rows: int
    complete: int
    differing: int
    missing: dict[str, int]
    leaves: dict[str, Array]
    crosses: dict[str, Array]

    @staticmethod
    def none(learned: Learned) -> Counts:
        """Return counts of no rows."""
        leaves = {key: np.zeros(len(v.keys), bool) for key, v in learned.leaves.items()}
        crosses = {key: np.zeros(len(v[-1].keys), bool) for key, v in learned.crosses.items()}
        return Counts(0, 0, 0, {}, leaves, crosses)

    def add(self, read: _Read, first: float) -> None:
        """Count a batch."""
        self.rows += read.rows
        self.complete += read.n
        y = read.y if read.offset is None else read.y - read.offset
        self.differing += int(np.count_nonzero(y != first))
        for name, count in read.missing.items():
            self.missing[name] = self.missing.get(name, 0) + count
        for key, codes in read.leaves.items():
            self.leaves[key][codes[codes >= 0] if codes.size and codes.min() < 0 else codes] = True
        for key, codes in read.combinations.items():
            self.crosses[key][codes] = True


@dataclass
class Sums:
    """Products and counts of some batches."""

    totals: Totals
    counts: Counts


# The passes -----------------------------------------------------------------------------------


def build_streamed(
    formula: str,
    source: Any,
    *,
    weights: str | None = None,
    offset: str | None = None,
    contrasts: Mapping[str, str] | None = None,
    missing: str = "drop",
    safe: bool = False,
    rows: int = ROWS,
) -> tuple[StreamedDesign, tuple[Plan, Units, Gram, Rhs]]:
    """Build labels and cross-products of a model from a streamed table.

    Parameters
    ----------
    formula, weights, offset, contrasts, missing, safe
        As for `lmmjax.design.build_design`; weights and offset are columns or expressions.
    source : object
        See `lmmjax.source.open_source`.
    rows : int
        Rows of a batch, at most.

    Raises
    ------
    FormulaError, DataError, DesignError
        As for a table in memory.

    Notes
    -----
    Two passes; O(n (p + S)²) time; memory of a batch, of the levels and of the cross-products.
    """
    if missing not in ("drop", "raise"):
        raise DataError(f'found missing={missing!r}; expected "drop" or "raise".')
    parsed, table = parse(formula), open_source(source)
    w = _column_source(weights, "weights", table)
    o = _column_source(offset, "offset", table)
    found = scout(parsed, table, w, o, safe, rows)
    if not found.sample:
        counts = _missing_alone(found.learned, table, rows)
        refuse_empty(found.rows, counts)
    first: Counts | None = None
    constant = True
    while True:
        encoder = make_encoder(found, contrasts or {}, constant)
        sums = _sum(encoder, table, rows)
        first = first or sums.counts
        _check_counts(found, sums.counts, encoder, missing)
        if not _same_levels(found.learned, sums.counts):
            learned = found.learned.with_used(sums.counts.leaves, sums.counts.crosses)
            found = dataclasses.replace(found, learned=learned)
            continue
        keep = _keep(encoder, sums, table, rows)
        if keep[encoder.rough.x.a != 0.0].all():
            break
        constant = False  # the columns that add up to 1 are not all kept: do without shifts
    alias = None if keep.all() else aliases(sums.totals, encoder.rough, keep)
    standard = exact(sums.totals, encoder.plan, encoder.rough, keep, _parents(found, encoder))
    design = _labels(encoder, keep, alias, first, sums.counts)
    for term, spec in zip(design.terms, encoder.random, strict=True):
        if len(term.levels) < 2:
            ds.refuse_one_level(term, spec)
    return design, standard


def _column_source(given: Any, what: str, table: Source) -> Node | None:
    source = side_source(given, what, table.names)
    if isinstance(source, np.ndarray):
        raise DataError(
            f"found an array as {what} of a streamed table; expected a column name or an "
            "expression of columns, since rows may come in any order."
        )
    return source


def _sum(encoder: Encoder, table: Source, rows: int) -> Sums:
    if table.distributed is not None:
        return table.distributed(encoder)
    width = len(encoder.x_names) + sum(len(r.names) for r in encoder.random)
    fewer = max(ROWS * WIDTH // max(width, WIDTH), 1 << 12)
    return encoder.sum(table.batches(list(encoder.learned.columns), min(rows, fewer)))


def _missing_alone(learned: Learned, table: Source, rows: int) -> dict[str, int]:
    """Count missing values by column, for the message where no row is complete."""
    counts = dict.fromkeys(learned.columns, 0)
    for batch in table.batches(list(learned.columns), rows):
        for name in learned.columns:
            counts[name] += batch.column(name).null_count
    return {name: count for name, count in counts.items() if count}


def _same_levels(learned: Learned, counts: Counts) -> bool:
    leaves = all(np.array_equal(v.used, counts.leaves[k]) for k, v in learned.leaves.items())
    crosses = learned.crosses.items()
    return leaves and all(np.array_equal(v[-1].used, counts.crosses[k]) for k, v in crosses)


def _check_counts(found: Scouted, counts: Counts, encoder: Encoder, missing: str) -> None:
    """Refuse a source that changed, missing values, an empty table and a constant response."""
    if counts.rows != found.rows:
        raise DataError(
            f"found {found.rows} rows in the first pass over the source and {counts.rows} in the "
            "second; expected the same table each time. Give a source that can be read again."
        )
    if missing == "raise":
        refuse_missing(found.rows - counts.complete, counts.missing)
    if not counts.complete:
        refuse_empty(found.rows, counts.missing)
    if counts.differing == 0:
        response = found.learned.parsed.response
        raise DataError(
            f"found a constant response ({response}: {encoder.first:g} in all "
            f"{counts.complete} rows); expected numbers that vary. Check the column."
        )


def make_encoder(found: Scouted, contrasts: Mapping[str, str], constant: bool) -> Encoder:
    """Choose codings, shifts and the order of elimination from what the first pass found."""
    learned, parsed = found.learned, found.learned.parsed
    reads = [read for batch in found.sample if (read := _read(learned, batch)).n]
    if not reads:
        raise DesignError("found no complete row in a sample of the source; check the data.")
    values = reads[0].values
    kinds = ds._check_contrasts(contrasts, parsed, values)
    fixed = ds._codings(parsed.terms, values, kinds)
    random = tuple(_random_spec(learned, bar, values) for bar in parsed.bars)
    labels = encode(parsed.terms, fixed, reads[0].arrays, reads[0].n)
    sample = _stack([_columns(parsed, fixed, random, read) for read in reads])
    terms = tuple(StreamedTerm(r.bar.group, r.names, r.bar.cov, r.levels) for r in random)
    plan = arrange(
        terms,
        len(labels.names),
        nested=lambda child, parent: (child, parent) in found.parents,
        sparse=lambda chain, core: False,  # which entries there are is not known beforehand
    )
    rough = rough_units(
        sample,
        constant_columns(parsed.terms, fixed, labels.assign) * constant,
        [0 if r.terms.intercept else None for r in random],
        [r.bar.cov for r in random],
    )
    centre = {
        name: float(np.mean(np.concatenate([read.arrays[name].ravel() for read in reads])))
        for name in centrable(parsed.terms, fixed)
    }
    return Encoder(
        learned, fixed, random, labels.names, labels.assign, plan, rough, sample.y[0], centre
    )


def _random_spec(learned: Learned, bar: Any, values: Mapping[str, Any]) -> ds.RandomSpec:
    terms = expand(bar.expr, learned.parsed.text)
    codings = ds._codings(terms, values, {})
    arrays = {name: ds._array(values[name])[:1] for name in terms.variables}
    names = encode(terms, codings, arrays, 1).names
    return ds.RandomSpec(bar, terms, codings, names, learned.groups[bar.group].labels)


def _stack(parts: list[Columns]) -> Columns:
    join = np.concatenate
    return Columns(
        join([p.X for p in parts]),
        join([p.y for p in parts]),
        None if parts[0].weights is None else join([p.weights for p in parts]),
        tuple(join(z) for z in zip(*(p.Z for p in parts), strict=True)),
        tuple(join(c) for c in zip(*(p.codes for p in parts), strict=True)),
    )


def _keep(encoder: Encoder, sums: Sums, table: Source, rows: int) -> Array:
    """Which columns of X are independent; a pass of its own only where products cannot tell."""
    p = len(encoder.x_names)
    products = sums.totals.flat["core"][encoder.plan.layout.d :, encoder.plan.layout.d :]
    if p == 0 or (sums.counts.complete > p and proves_rank(products)):
        return np.ones(p, bool)
    judge = ColumnJudge(encoder.learned.parsed.terms.intercept)
    for batch in table.batches(list(encoder.learned.columns), rows):
        judge.add(encoder.judged(encoder.read(batch)))
    return judge.keep()


def _parents(found: Scouted, encoder: Encoder) -> dict[tuple[str, str], Array]:
    """Levels of the parent by level of the child, for the levels that are used."""
    groups, out = found.learned.groups, {}
    for (child, parent), lies_in in found.parents.items():
        place, outer = groups[child].place[:-1], groups[parent].place
        used = np.flatnonzero(place >= 0)
        levels = np.zeros(used.size, np.int32)
        levels[place[used]] = outer[lies_in[used]]
        out[child, parent] = levels
    return out


def _labels(
    encoder: Encoder, keep: Array, alias: Array | None, first: Counts, counts: Counts
) -> StreamedDesign:
    learned, parsed = encoder.learned, encoder.learned.parsed
    intercept = parsed.terms.intercept
    spec = ds.DesignSpec(
        parsed=parsed,
        codings=encoder.fixed,
        random=encoder.random,
        states=learned.states,
        keep=keep,
        levels=_raw_levels(learned),
        offset=learned.offset,
        safe=learned.safe,
        alias=alias,
    )
    return StreamedDesign(
        formula=parsed.text,
        response=parsed.response,
        x_names=tuple(n for n, kept in zip(encoder.x_names, keep, strict=True) if kept),
        x_terms=(("(Intercept)",) if intercept else ()) + parsed.terms.labels,
        x_assign=encoder.x_assign[keep] - (0 if intercept else 1),
        aliased=tuple(n for n, kept in zip(encoder.x_names, keep, strict=True) if not kept),
        has_offset=bool(parsed.offset_nodes) or learned.offset is not None,
        has_weights=learned.weights is not None,
        terms=tuple(
            StreamedTerm(r.bar.group, r.names, r.bar.cov, r.levels) for r in encoder.random
        ),
        n=counts.complete,
        n_dropped=counts.rows - counts.complete,
        missing=first.missing,
        spec=spec,
    )


def _raw_levels(learned: Learned) -> dict[str, tuple[str, ...] | None]:
    """Levels of the raw columns of the fixed part, for reference grids."""
    out: dict[str, tuple[str, ...] | None] = {}
    for name in columns_of(learned.parsed.terms.nodes, dict.fromkeys(learned.columns)):
        levels = learned.leaves.get(deparse(Name(name)))
        is_factor = levels is not None and (
            levels.category
            or not pd.api.types.is_numeric_dtype(levels.keys.dtype)
            or pd.api.types.is_bool_dtype(levels.keys.dtype)
        )
        out[name] = (
            tuple(levels.labels()[levels.used]) if levels is not None and is_factor else None
        )
    return out

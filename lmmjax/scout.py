"""The first pass over a streamed table: levels, states of transforms, nesting, a sample of rows.

What is learned here is all that the coding of a batch needs (`Learned`). One round of the pass is
enough unless learning builds on learning (``poly(scale(x), 2)``, ``(1 | factor(x > mean(x)))``):
each step of depth costs one more round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lmmjax.errors import DataError, FormulaError
from lmmjax.evaluate import FACTOR_CALLS, Evaluator
from lmmjax.expr import Call, Name, Node, deparse, names_in
from lmmjax.formula import ParsedFormula, expand
from lmmjax.levels import Gathering, Levels, pair, unpair
from lmmjax.recode import (
    FactorCode,
    GroupCode,
    StreamEvaluator,
    base_of,
    factor_calls,
    factor_code,
    group_code,
    leaf_series,
    resolve,
)
from lmmjax.source import Source, to_series
from lmmjax.table import known_columns
from lmmjax.transforms import STATEFUL, SUMMARIES
from lmmjax.values import Spool
from lmmjax.variables import all_nodes, columns_of

__all__ = ["Learned", "Scouted", "scout"]

Array = np.ndarray

#: rows kept for the choice of shifts and scales
SAMPLE = 1 << 14


@dataclass(frozen=True, eq=False)
class Learned:
    """What codes a batch like the whole table. Picklable, and independent of the source.

    Attributes
    ----------
    parsed : ParsedFormula
    columns : tuple of str
        Columns that the model reads.
    weights, offset : Node or None
    safe : bool
    nodes : dict of Node
        Leaves, by R's text.
    leaves : dict of Levels
    crosses : dict of tuple of Levels
        Combinations of each grouping factor with several parts.
    recodings : dict of FactorCode
        By R's text of the factor, with all levels.
    states : dict
        Of the transforms.
    """

    parsed: ParsedFormula
    columns: tuple[str, ...]
    weights: Node | None
    offset: Node | None
    safe: bool
    nodes: dict[str, Node]
    leaves: dict[str, Levels] = field(default_factory=dict)
    crosses: dict[str, tuple[Levels, ...]] = field(default_factory=dict)
    recodings: dict[str, FactorCode] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def factors(self) -> dict[str, FactorCode]:
        """The factors, without unused levels."""
        return {t: c.restricted(self.leaves[c.leaf].used) for t, c in self.recodings.items()}

    @cached_property
    def groups(self) -> dict[str, GroupCode]:
        """The grouping factors, without unused levels."""
        made = {}
        for bar in self.parsed.bars:
            parts = [self.recodings[deparse(resolve(node))] for node in bar.factors]
            crosses = self.crosses.get(bar.group, ())
            made[bar.group] = group_code(bar.group, parts, self.leaves, crosses)
        return made

    def evaluator(self, batch: pa.RecordBatch) -> StreamEvaluator:
        """Return the evaluator of a batch."""
        columns = {name: to_series(batch.column(name)) for name in self.columns}
        coders = (self.leaves, self.nodes, self.factors, self.groups)
        return StreamEvaluator(columns, batch.num_rows, self.states, self.safe, *coders)

    def with_used(self, leaves: Mapping[str, Array], crosses: Mapping[str, Array]) -> Learned:
        """Return the same with other used levels."""
        kept = {k: replace(v, used=leaves[k]) for k, v in self.leaves.items()}
        combined = {k: (*v[:-1], replace(v[-1], used=crosses[k])) for k, v in self.crosses.items()}
        return replace(self, leaves=kept, crosses=combined)


@dataclass(frozen=True, eq=False)
class Scouted:
    """What the first pass found.

    Attributes
    ----------
    learned : Learned
    sample : list of RecordBatch
        Rows without missing values, spread evenly over the source.
    parents : dict
        (child, parent) grouping factors of which the first is nested in the second ->
        level of the parent by level of the child.
    rows : int
        Of the source.
    """

    learned: Learned
    sample: list[pa.RecordBatch]
    parents: dict[tuple[str, str], Array]
    rows: int


def scout(
    parsed: ParsedFormula,
    source: Source,
    weights: Node | None,
    offset: Node | None,
    safe: bool,
    rows: int,
) -> Scouted:
    """Read the source once (a few times where transforms build on transforms) and learn."""
    nodes = all_nodes(parsed, weights, offset)
    columns = _wanted(source, nodes)
    text = {n for n in columns if _is_factor_type(source.schema.field(n).type)}
    factors = _factor_nodes(parsed, text)
    leaves = {deparse(base_of(node)): base_of(node) for node in factors.values()}
    leaves |= _flags(parsed, source, columns)
    learned = Learned(parsed, tuple(columns), weights, offset, safe, leaves)
    stateful = {deparse(n): n for n in _stateful(nodes)}
    depths = {key: _leaf_depth(node) for key, node in leaves.items()}
    depths |= {key: _depth(node) for key, node in stateful.items()}
    last = max([1, *depths.values()])
    for depth in range(1, last + 1):
        now = {key for key, d in depths.items() if d == depth}
        work = _Round(learned, source, now & set(stateful), now & set(leaves), depth == last)
        try:
            for batch in source.batches(columns, rows):
                work.read(batch, stateful)
            learned = work.learn(stateful, factors)
        finally:
            work.close()
    return Scouted(learned, work.sample.batches, work.parents(), work.rows)


# What has to be learned -----------------------------------------------------------------------


def _wanted(source: Source, nodes: Iterable[Node]) -> list[str]:
    names = dict.fromkeys(n.id for node in nodes for n in names_in(node))
    return known_columns(names, source.names, "the source")


def _is_factor_type(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return True
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _factor_nodes(parsed: ParsedFormula, text: set[str]) -> dict[str, Node]:
    """Every factor of the formula by its text: text columns, calls, grouping variables."""
    found: dict[str, Node] = {}
    groups = [resolve(node) for bar in parsed.bars for node in bar.factors]
    random = [node for bar in parsed.bars for node in expand(bar.expr, parsed.text).nodes]
    for node in [*parsed.terms.nodes, *random, *groups]:
        columns_in = [Name(n.id) for n in names_in(node) if n.id in text]
        found |= {deparse(name): name for name in columns_in}
        found |= {deparse(call): call for call in factor_calls([node])}
    return found | {deparse(node): node for node in groups}


def _flags(parsed: ParsedFormula, source: Source, columns: list[str]) -> dict[str, Node]:
    """Boolean columns of the fixed part, whose levels reference grids want to know."""
    names = columns_of(parsed.terms.nodes, dict.fromkeys(columns))
    boolean = (n for n in names if pa.types.is_boolean(source.schema.field(n).type))
    return {deparse(Name(n)): Name(n) for n in boolean}


def _stateful(nodes: Iterable[Node]) -> Iterator[Call]:
    for node in nodes:
        if isinstance(node, Call):
            if node.fn in STATEFUL or node.fn in SUMMARIES:
                yield node
            yield from _stateful(node.args)


def _depth(node: Node) -> int:
    """How many rounds must be over before the expression can be evaluated."""
    if not isinstance(node, Call):
        return 0
    if node.fn in FACTOR_CALLS:
        return _leaf_depth(base_of(node))
    inner = max([0, *map(_depth, node.args)])
    return inner + (node.fn in STATEFUL or node.fn in SUMMARIES)


def _leaf_depth(node: Node) -> int:
    return 1 if isinstance(node, Name) else 1 + _depth(node)


# One round ------------------------------------------------------------------------------------


class _Round:
    """One reading of the source: gathers what is learnable now."""

    def __init__(
        self, learned: Learned, source: Source, states: set[str], leaves: set[str], last: bool
    ) -> None:
        self.learned, self.last, self.rows = learned, last, 0
        self.sample = _Sample()
        self.spools = {key: Spool() for key in states}
        self.gathering = {key: _gathering(key, learned.nodes[key], source) for key in leaves}
        bars = {
            bar.group: [deparse(base_of(f)) for f in bar.factors] for bar in learned.parsed.bars
        }
        self.groups = bars if last else {}
        self.crosses = {
            name: [Gathering(name) for _ in parts[1:]] for name, parts in self.groups.items()
        }
        self.nests = {(a, b): _Nest() for a in self.groups for b in self.groups if a != b}

    def read(self, batch: pa.RecordBatch, stateful: Mapping[str, Call]) -> None:
        """Take in one batch."""
        ev = self._evaluator(batch)
        complete = _complete(ev.columns, ev.n)
        codes = {}
        for key in self.gathering:
            codes[key] = self.gathering[key].codes(leaf_series(ev, self.learned.nodes[key]))
            self.gathering[key].mark(_rows(codes[key], complete))
        for key, spool in self.spools.items():
            spool.append(_argument(ev, stateful[key]))
        if self.last:
            self._read_groups(ev, codes, complete)
            self.sample.take(batch, complete)
        self.rows += batch.num_rows

    def close(self) -> None:
        """Give the temporary files back."""
        for spool in self.spools.values():
            spool.close()

    def _evaluator(self, batch: pa.RecordBatch) -> StreamEvaluator:
        """Evaluate with what is known; factors not known yet have the levels of the batch."""
        learned = self.learned
        columns = {name: to_series(batch.column(name)) for name in learned.columns}
        leaves, nodes, factors = learned.leaves, learned.nodes, learned.factors
        n = batch.num_rows
        return StreamEvaluator(columns, n, learned.states, learned.safe, leaves, nodes, factors, {})

    def _read_groups(
        self, ev: StreamEvaluator, codes: dict[str, Array], complete: Array | None
    ) -> None:
        ids = {}
        for name, parts in self.groups.items():
            part = [codes[k] if k in codes else ev.leaf_codes(k) for k in parts]
            found = _rows(part[0], complete)
            for other, cross in zip(part[1:], self.crosses[name], strict=True):
                key = pair(found, _rows(other, complete))
                found = np.full(key.size, -1, np.int32)
                present = key >= 0
                found[present] = cross.codes(pd.Series(key[present]))
                cross.mark(found)
            ids[name] = found
        for (child, parent), nest in self.nests.items():
            nest.note(ids[child], ids[parent])

    def learn(self, stateful: Mapping[str, Call], factors: Mapping[str, Node]) -> Learned:
        """Return what is known after this round."""
        old = self.learned
        states = dict(old.states)
        for key, spool in self.spools.items():
            states[key] = _fit(stateful[key], spool, old)
        frozen = {key: gathering.freeze() for key, gathering in self.gathering.items()}
        leaves = old.leaves | {key: levels for key, (levels, _) in frozen.items()}
        self.leaves = leaves
        self.ranks = {key: rank for key, (_, rank) in frozen.items()}
        recodings = {
            text: factor_code(node, leaves[deparse(base_of(node))], states, old.safe)
            for text, node in factors.items()
            if deparse(base_of(node)) in leaves
        }
        crosses = {name: self._freeze(name, leaves) for name in self.groups if self.crosses[name]}
        return replace(old, leaves=leaves, recodings=recodings, states=states, crosses=crosses)

    def _rank(self, key: str, leaves: Mapping[str, Levels]) -> Array:
        """Return the code of a leaf's number in this round."""
        if key in self.ranks:
            return self.ranks[key]
        return np.append(np.arange(len(leaves[key].keys), dtype=np.int32), np.int32(-1))

    def _freeze(self, name: str, leaves: Mapping[str, Levels]) -> tuple[Levels, ...]:
        """Order the combinations by the codes of their parts."""
        parts = self.groups[name]
        rank = self._rank(parts[0], leaves)
        out = []
        for part, cross in zip(parts[1:], self.crosses[name], strict=True):
            first, second = unpair(cross.keys().to_numpy(dtype=np.int64))
            cross.mark(np.empty(0, np.int32))
            keys = pair(rank[first], self._rank(part, leaves)[second])
            order = np.argsort(keys)
            rank = np.full(order.size + 1, -1, np.int32)
            rank[order] = np.arange(order.size, dtype=np.int32)
            out.append(Levels(pd.Index(keys[order]), False, False, cross.used[: cross.size][order]))
        self.ranks[f"({name})"] = rank
        return tuple(out)

    def parents(self) -> dict[tuple[str, str], Array]:
        """Return the nested pairs, in terms of combinations before levels are dropped."""
        return {
            pair_: self._ordered(pair_, nest.lies_in)
            for pair_, nest in self.nests.items()
            if nest.holds
        }

    def _ordered(self, names: tuple[str, str], lies_in: Array) -> Array:
        child, parent = (self._group_rank(name) for name in names)
        out = np.full(child.size - 1, -1, np.int32)
        numbers = np.flatnonzero(lies_in[: child.size - 1] >= 0)
        out[child[numbers]] = parent[lies_in[numbers]]
        return out

    def _group_rank(self, name: str) -> Array:
        if self.crosses[name]:
            return self.ranks[f"({name})"]
        return self._rank(self.groups[name][0], self.leaves)


def _gathering(key: str, node: Node, source: Source) -> Gathering:
    if not isinstance(node, Name) or node.id not in source.names:
        return Gathering(key)
    kind = source.schema.field(node.id).type
    if not pa.types.is_dictionary(kind):
        return Gathering(key)
    ordered = bool(kind.ordered) and not source.unordered
    return Gathering(key, True, ordered, node.id in source.sorted_categories)


def _complete(columns: Mapping[str, pd.Series], n: int) -> Array | None:
    """Return the mask of rows without a missing value in any column, None if all are complete."""
    missing = np.zeros(n, bool)
    for series in columns.values():
        missing |= series.isna().to_numpy()
    return ~missing if missing.any() else None


def _rows(codes: Array, complete: Array | None) -> Array:
    return codes if complete is None else codes[complete]


def _argument(ev: Evaluator, node: Call) -> Array:
    if not node.args:
        raise FormulaError(f"found {deparse(node)}; the first argument must be the variable.")
    x = np.asarray(ev.numeric(node.args[0]), float)
    if x.shape not in ((ev.n,), ()):
        raise FormulaError(f"found {deparse(node)}; the first argument must be one numeric column.")
    return np.broadcast_to(x, (ev.n,))


def _fit(node: Call, spool: Spool, learned: Learned) -> Any:
    """Learn the state of a transform from the spooled values of its argument."""
    if spool.size == 0:
        raise DataError(f"found no finite value in the argument of {deparse(node)}.")
    ev = Evaluator({}, 0, dict(learned.states), learn=False, safe=learned.safe)
    return ev.fit_state(node, spool)


class _Nest:
    """Whether each level of one factor lies in one level of another."""

    def __init__(self) -> None:
        self.holds = True
        self.lies_in = np.empty(0, np.int32)

    def note(self, child: Array, parent: Array) -> None:
        """Take in the codes of a batch."""
        if not self.holds or not child.size:
            return
        top = int(child.max()) + 1
        if top > self.lies_in.size:
            more = np.full(max(top, 2 * self.lies_in.size) - self.lies_in.size, -1, np.int32)
            self.lies_in = np.concatenate([self.lies_in, more])
        fresh = self.lies_in[child] < 0
        self.lies_in[child[fresh]] = parent[fresh]
        self.holds = bool(np.array_equal(self.lies_in[child], parent))


class _Sample:
    """Every k-th complete row, k doubled whenever too many are kept."""

    def __init__(self) -> None:
        self.step, self.seen = 1, 0
        self._kept: list[tuple[Array, pa.RecordBatch]] = []

    def take(self, batch: pa.RecordBatch, complete: Array | None) -> None:
        """Take in one batch."""
        rows = np.arange(batch.num_rows) if complete is None else np.flatnonzero(complete)
        if self.seen == 0:
            self.step = max(1, rows.size // SAMPLE)
        number = np.arange(self.seen, self.seen + rows.size)
        self.seen += rows.size
        mine = number % self.step == 0
        if mine.any():
            self._kept.append((number[mine], batch.take(pa.array(rows[mine]))))
        while sum(len(n) for n, _ in self._kept) > 2 * SAMPLE:
            self.step *= 2
            self._kept = [_thin(n, b, self.step) for n, b in self._kept]

    @property
    def batches(self) -> list[pa.RecordBatch]:
        """The rows kept, batch by batch."""
        return [b for _, b in self._kept if b.num_rows]


def _thin(number: Array, batch: pa.RecordBatch, step: int) -> tuple[Array, pa.RecordBatch]:
    mine = np.flatnonzero(number % step == 0)
    return number[mine], batch.take(pa.array(mine))

"""Variables of a formula evaluated on a table, and which rows are complete."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
import pandas as pd

from lmmjax.errors import DataError, DesignError
from lmmjax.evaluate import Evaluator, Factor, Logical, Matrix, is_missing
from lmmjax.expr import Call, Name, Node, deparse, names_in, parse_expr
from lmmjax.formula import Bar, ParsedFormula, expand
from lmmjax.residual.frame import evaluate_residual
from lmmjax.residual.language import ResidualSpec
from lmmjax.table import Table, check_index


@dataclass(frozen=True, eq=False)
class Variables:
    """Evaluated variables of a training table."""

    response: str
    rows: pd.Index
    y: np.ndarray
    values: dict[str, Any]
    group_names: tuple[str, ...]
    groups: tuple[Factor, ...]
    offset: np.ndarray | None
    weights: np.ndarray | None
    offset_source: Any
    columns: dict[str, pd.Series]
    raw_fixed: tuple[str, ...]
    states: dict[str, Any]
    missing: dict[str, int] = field(default_factory=dict)
    n_dropped: int = 0
    residual: dict[str, Any] = field(default_factory=dict)

    def take(self, keep: tuple[np.ndarray | None, dict[str, int]]) -> Variables:
        """Keep the complete rows and drop unused levels."""
        mask, missing = keep
        return replace(
            self,
            rows=self.rows if mask is None else self.rows[mask],
            y=take_rows(self.y, mask),
            values={name: take_rows(value, mask) for name, value in self.values.items()},
            groups=tuple(group.take(mask) for group in self.groups),
            offset=take_rows(self.offset, mask),
            weights=take_rows(self.weights, mask),
            columns=self.columns if mask is None else {k: c[mask] for k, c in self.columns.items()},
            missing=missing,
            residual={name: take_rows(value, mask) for name, value in self.residual.items()},
            n_dropped=0 if mask is None else int(mask.size - mask.sum()),
        )


def take_rows(value: Any, mask: np.ndarray | None) -> Any:
    """Some rows of an evaluated variable (all if None); a factor drops unused levels."""
    if isinstance(value, Factor):
        return value.take(mask)
    if value is None or mask is None:
        return value
    if isinstance(value, Logical | Matrix):
        return type(value)(value.values[mask])
    return value[mask]


def evaluate(
    parsed: ParsedFormula,
    table: Table,
    weights: Any,
    offset: Any,
    safe: bool,
    residual: ResidualSpec | None = None,
) -> Variables:
    """Evaluate all variables of a formula on a training table, learning their states."""
    for what, values in (("weights", weights), ("offset", offset)):
        check_index(values, table.rows, what)
    w_source = side_source(weights, "weights", table.names)
    o_source = side_source(offset, "offset", table.names)
    columns = table.read(all_nodes(parsed, w_source, o_source))
    beside = table.read(residual.nodes) if residual is not None else {}
    ev = Evaluator(columns | beside, len(table), {}, learn=True, safe=safe)
    raw = variables(parsed, ev, table.rows, w_source, o_source, residual)
    # a row that lacks its position is refused later (residual/frame.py), not dropped
    return replace(raw, columns=columns)


def all_nodes(parsed: ParsedFormula, w_source: Any, o_source: Any) -> list[Node]:
    """Every expression that a model evaluates."""
    bars = [(bar, expand(bar.expr, parsed.text)) for bar in parsed.bars]
    random = [node for bar, terms in bars for node in (*terms.nodes, *bar.factors)]
    nodes = [parsed.response_node, *parsed.terms.nodes, *parsed.offset_nodes, *random]
    nodes += [source for source in (w_source, o_source) if isinstance(source, Name | Call)]
    return nodes


def variables(
    parsed: ParsedFormula,
    ev: Evaluator,
    rows: pd.Index,
    w_source: Any,
    o_source: Any,
    residual: ResidualSpec | None = None,
) -> Variables:
    """Evaluate all variables of a formula on the columns of an evaluator."""
    values = {deparse(node): ev.variable(node) for node in parsed.terms.nodes}
    for bar in parsed.bars:
        nodes = expand(bar.expr, parsed.text).nodes
        values.update({deparse(n): ev.variable(n) for n in nodes if deparse(n) not in values})
    offsets = [numbers(ev, node, "offset") for node in parsed.offset_nodes]
    if o_source is not None:
        offsets.append(side_values(o_source, ev, "offset"))
    return Variables(
        response=parsed.response,
        rows=rows,
        y=_response(ev, parsed),
        values=values,
        group_names=tuple(bar.group for bar in parsed.bars),
        groups=_all_groups(parsed.bars, ev),
        offset=np.sum(offsets, axis=0) if offsets else None,
        weights=None if w_source is None else side_values(w_source, ev, "weights"),
        offset_source="array" if isinstance(o_source, np.ndarray) else o_source,
        columns=ev.columns,
        raw_fixed=tuple(columns_of(parsed.terms.nodes, ev.columns)),
        states=ev.states,
        residual=evaluate_residual(residual, ev),
    )


def columns_of(nodes: Iterable[Node], columns: Mapping[str, Any]) -> Iterator[str]:
    """Yield the columns that the expressions read, once each."""
    seen = dict.fromkeys(name.id for node in nodes for name in names_in(node))
    yield from (name for name in seen if name in columns)


def _all_groups(bars: tuple[Bar, ...], ev: Evaluator) -> tuple[Factor, ...]:
    """Code each distinct grouping factor once."""
    made: dict[str, Factor] = {}
    for bar in bars:
        if bar.group not in made:
            made[bar.group] = group_factor(bar, ev)
    return tuple(made[bar.group] for bar in bars)


def group_factor(bar: Bar, ev: Evaluator) -> Factor:
    """The grouping factor of a bar, crossed where it has several variables."""
    return ev.group(bar.factors, bar.group)


def _response(ev: Evaluator, parsed: ParsedFormula) -> np.ndarray:
    value = ev.variable(parsed.response_node)
    if isinstance(value, Factor):
        raise DataError(
            f"found text or a categorical as response {parsed.response}; expected numbers. Convert "
            "the column, or name another one on the left of ~."
        )
    if isinstance(value, Matrix):
        raise DataError(f"found several columns as response {parsed.response}; expected one.")
    return np.asarray(value.values if isinstance(value, Logical) else value, np.float64)


def numbers(ev: Evaluator, node: Node, what: str) -> np.ndarray:
    """One number a row of an expression."""
    value = np.asarray(ev.numeric(node), float)
    if value.shape not in ((), (ev.n,)):
        raise DataError(f"found several columns as {what}; expected one number a row.")
    return np.broadcast_to(value, (ev.n,))


def side_source(given: Any, what: str, names: list[str]) -> Any:
    """Turn ``weights=`` or ``offset=`` into an expression, an array or None."""
    if given is None:
        return None
    if isinstance(given, str):
        is_name = given in names or not any(c in given for c in "()*/^`")
        return Name(given) if is_name else parse_expr(given)
    array = np.asarray(given.to_numpy() if hasattr(given, "to_numpy") else given)
    if array.ndim != 1 or array.dtype.kind not in "biufO":
        raise DataError(
            f"found {type(given).__name__} as {what}; expected a column name or one number a row."
        )
    return pd.to_numeric(pd.Series(array)).to_numpy(np.float64, na_value=np.nan, copy=True)


def side_values(source: Any, ev: Evaluator, what: str) -> np.ndarray:
    """Values of ``weights=`` or ``offset=``, one a row."""
    if not isinstance(source, np.ndarray):
        return numbers(ev, source, what)
    if source.size != ev.n:
        raise DataError(
            f"found {source.size} values in {what} and {ev.n} rows in the table; give one per row."
        )
    return source


# Missing values -------------------------------------------------------------------------------


def complete_rows(raw: Variables, option: str) -> tuple[np.ndarray | None, dict[str, int]]:
    """Return the mask of complete rows (None if all are) and the counts by variable."""
    dropped, counts = incomplete_rows(raw)
    if option == "raise":
        refuse_missing(int(dropped.sum()), counts)
    if dropped.all():
        refuse_empty(dropped.size, counts)
    return (~dropped if counts else None), counts


def incomplete_rows(raw: Variables) -> tuple[np.ndarray, dict[str, int]]:
    """Return the mask of rows that lack a value, and the counts by variable."""
    dropped = np.zeros(len(raw.rows), bool)
    counts: dict[str, int] = {}
    for name, series in raw.columns.items():
        _count(counts, dropped, name, series.isna().to_numpy())
    # Values that only arise in evaluation: log of a negative number, or arrays given beside.
    before = dropped.copy()
    for name, value in evaluated(raw):
        _count(counts, dropped, name, is_missing(value) & ~before)
    return dropped, counts


def refuse_missing(rows: int, counts: Mapping[str, int]) -> None:
    """Raise DataError if any value is missing."""
    if counts:
        shown = ", ".join(f"{name} ({count})" for name, count in counts.items())
        raise DataError(
            f'found missing values in {rows} rows: {shown}; missing="raise" expects '
            'none. Fill or remove them, or use missing="drop".'
        )


def refuse_empty(rows: int, counts: Mapping[str, int]) -> NoReturn:
    """Raise DesignError: no row is complete."""
    shown = ", ".join(f"{name} ({count})" for name, count in counts.items())
    detail = f" (missing values: {shown})" if counts else ""
    raise DesignError(
        f"found no complete row in {rows} rows{detail}; expected at least one row in which no "
        "variable of the model is missing. Drop the variable that is never there, or fill its "
        "values."
    )


def evaluated(raw: Variables) -> Iterator[tuple[str, Any]]:
    """Everything that was evaluated, by name."""
    yield raw.response, raw.y
    yield from raw.values.items()
    yield from dict(zip(raw.group_names, raw.groups, strict=True)).items()
    if raw.offset is not None:
        yield "offset", raw.offset
    if raw.weights is not None:
        yield "weights", raw.weights


def _count(counts: dict[str, int], dropped: np.ndarray, name: str, rows: np.ndarray) -> None:
    number = int(np.count_nonzero(rows))
    if number:
        counts[name] = counts.get(name, 0) + number
        dropped |= rows

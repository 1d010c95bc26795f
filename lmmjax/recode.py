"""Factors of a streamed table: every batch is coded by the levels of the whole.

A factor of a formula is a *leaf* (a column, or an expression whose values become levels) and a
recoding of the leaf's levels (``factor(x, levels = c(...))``, ``relevel``). The leaf's levels are
gathered in a first pass (`lmmjax.levels`); the recoding is learned once, by applying the call to
a table that has each level of the leaf once. A batch then needs a lookup and no text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lmmjax.errors import DataError
from lmmjax.evaluate import FACTOR_CALLS, Evaluator, Factor, Logical, to_factor
from lmmjax.expr import Call, Name, Node, deparse
from lmmjax.levels import Levels, pair, unpair

__all__ = ["FactorCode", "GroupCode", "StreamEvaluator", "leaf_series", "resolve"]

Array = np.ndarray


def resolve(node: Node) -> Node:
    """Strip parentheses and I()."""
    while isinstance(node, Call) and node.fn in ("(", "I") and len(node.args) == 1:
        node = node.args[0]
    return node


def base_of(node: Node) -> Node:
    """Return the leaf of a factor: ``f`` of ``relevel(factor(f), ref = "a")``."""
    node = resolve(node)
    while isinstance(node, Call) and node.fn in FACTOR_CALLS and node.args:
        node = resolve(node.args[0])
    return node


def factor_calls(nodes: Iterable[Node]) -> Iterator[Call]:
    """Yield the calls that make factors, inner ones first."""
    for node in nodes:
        if isinstance(node, Call):
            yield from factor_calls(node.args)
            if node.fn in FACTOR_CALLS:
                yield node


def leaf_series(ev: Evaluator, node: Node) -> pd.Series:
    """Return the values that become levels."""
    if isinstance(node, Name) and node.id in ev.columns:
        return ev.columns[node.id]
    value = ev.variable(node)
    if isinstance(value, Logical):
        missing = np.isnan(value.values)
        return pd.Series(pd.arrays.BooleanArray(value.values == 1.0, missing))
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return pd.Series(value)
    to_factor(value)  # refuses a matrix
    raise DataError(f"found {deparse(node)} as a factor; name a column or use factor() of one.")


@dataclass(frozen=True, eq=False)
class FactorCode:
    """A recoding of a leaf's levels.

    Attributes
    ----------
    leaf : str
    place : (J + 1,) int32
        Level of each leaf level, -1 for none; the last is for missing.
    labels : (L,) array of str
    ordered : bool
    """

    leaf: str
    place: Array
    labels: Array
    ordered: bool

    def restricted(self, used: Array) -> FactorCode:
        """Drop the levels of which no used leaf level is coded."""
        kept = self.place[:-1][used]
        present = np.zeros(len(self.labels), bool)
        present[kept[kept >= 0]] = True
        renumber = np.where(present, np.cumsum(present) - 1, -1).astype(np.int32)
        place = np.append(renumber, np.int32(-1))[self.place]
        return FactorCode(self.leaf, place, self.labels[present], self.ordered)


@dataclass(frozen=True, eq=False)
class GroupCode:
    """A grouping factor with one or several parts.

    Attributes
    ----------
    parts : tuple of str
        Leaves, slowest first.
    crosses : tuple of Levels
        Combinations present: of the first two parts, of those and the third ...
    place : (J + 1,) int32
        Level of each combination (of each leaf level if there is one part), -1 for none.
    labels : (L,) array of str
    """

    parts: tuple[str, ...]
    crosses: tuple[Levels, ...]
    place: Array
    labels: Array


def group_code(
    name: str, factors: list[FactorCode], leaves: Mapping[str, Levels], crosses: tuple[Levels, ...]
) -> GroupCode:
    """Order and print the levels of a grouping factor; unused combinations are left out."""
    parts = tuple(f.leaf for f in factors)
    if not crosses:
        one = factors[0].restricted(leaves[parts[0]].used)
        return GroupCode(parts, (), one.place, one.labels)
    codes = _parts(crosses)
    ranks = [f.place[c] for f, c in zip(factors, codes, strict=True)]
    kept = np.flatnonzero(crosses[-1].used & np.all([r >= 0 for r in ranks], axis=0))
    order = kept[np.lexsort([r[kept] for r in reversed(ranks)])]
    place = np.full(len(codes[0]) + 1, -1, np.int32)
    place[order] = np.arange(order.size, dtype=np.int32)
    texts = [f.labels[r[order]] for f, r in zip(factors, ranks, strict=True)]
    labels = np.array([":".join(row) for row in zip(*texts, strict=True)], dtype=object)
    if len(set(labels)) < labels.size:
        raise DataError(
            f"found two combinations of {name} that print alike; levels contain ':', rename them."
        )
    return GroupCode(parts, crosses, place, labels)


def _parts(crosses: tuple[Levels, ...]) -> list[Array]:
    """Leaf codes of each part for each combination of the last cross."""
    first, last = unpair(crosses[-1].keys.to_numpy())
    if len(crosses) == 1:
        return [first, last]
    return [codes[first] for codes in _parts(crosses[:-1])] + [last]


class StreamEvaluator(Evaluator):
    """Evaluate a batch with the levels and states of the whole table.

    Parameters
    ----------
    columns, n, states, safe
        As for `Evaluator`.
    leaves : dict of Levels
        By R's text of the leaf.
    nodes : dict of Node
        The leaves' expressions.
    factors : dict of FactorCode
        By R's text of the factor.
    groups : dict of GroupCode
        By name of the grouping factor.
    """

    def __init__(
        self,
        columns: dict,
        n: int,
        states: dict,
        safe: bool,
        leaves: Mapping[str, Levels],
        nodes: Mapping[str, Node],
        factors: Mapping[str, FactorCode],
        groups: Mapping[str, GroupCode],
    ) -> None:
        super().__init__(columns, n, states, learn=False, safe=safe)
        self.leaves, self.nodes, self.factors, self.groups = leaves, nodes, factors, groups
        self._codes: dict[str, Array] = {}

    def leaf_codes(self, key: str) -> Array:
        """Return (n,) codes of a leaf, -1 for missing."""
        if key not in self._codes:
            series = leaf_series(self, self.nodes[key])
            self._codes[key] = self.leaves[key].codes(series)
        return self._codes[key]

    def column(self, name: str) -> Any:
        text = deparse(Name(name))
        return self._coded(text) if text in self.factors else super().column(name)

    def factor(self, node: Node) -> Factor:
        text = deparse(resolve(node))
        return self._coded(text) if text in self.factors else super().factor(node)

    def group_leaf_codes(self, group: GroupCode) -> Array:
        """Return the combination of each row, before the levels are ordered."""
        codes = self.leaf_codes(group.parts[0])
        for part, cross in zip(group.parts[1:], group.crosses, strict=True):
            key = pair(codes, self.leaf_codes(part))
            present = key >= 0
            codes = np.full(key.size, -1, np.int32)
            codes[present] = cross.codes(pd.Series(key[present]))
        return codes

    def group(self, nodes: tuple[Node, ...], name: str) -> Factor:
        if name not in self.groups:
            return super().group(nodes, name)
        code = self.groups[name]
        return Factor(code.place[self.group_leaf_codes(code)], code.labels)

    def _factor_call(self, node: Call) -> Factor:
        text = deparse(node)
        return self._coded(text) if text in self.factors else super()._factor_call(node)

    def _coded(self, text: str) -> Factor:
        code = self.factors[text]
        return Factor(code.place[self.leaf_codes(code.leaf)], code.labels, code.ordered)


class LevelsEvaluator(Evaluator):
    """Evaluate the calls that make factors on a table that has each level of a leaf once."""

    def __init__(self, leaf: str, levels: Levels, states: dict, safe: bool) -> None:
        super().__init__({}, len(levels.keys), states, learn=True, safe=safe)
        self.leaf, self.levels = leaf, levels

    def factor(self, node: Node) -> Factor:
        if deparse(resolve(node)) != self.leaf:
            return super().factor(node)
        codes = np.arange(len(self.levels.keys), dtype=np.int32)
        return Factor(codes, self.levels.labels(), self.levels.ordered)


def factor_code(node: Node, levels: Levels, states: dict, safe: bool) -> FactorCode:
    """Learn what a factor makes of the levels of its leaf."""
    leaf = deparse(base_of(node))
    made = LevelsEvaluator(leaf, levels, states, safe).factor(resolve(node))
    return FactorCode(leaf, np.append(made.codes, np.int32(-1)), made.levels, made.ordered)

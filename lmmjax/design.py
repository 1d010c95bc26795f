"""Parts and a table to arrays: the only room that sees a data frame.

`build_design` evaluates the variables of a formula, drops incomplete rows and codes the model
matrices X and z exactly as R and lme4 do: same columns, names, order. What was learned from the
data (levels, polynomials, centres) is kept in a `DesignSpec`, which codes new data alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pandas as pd

from lmmjax.errors import DataError, DesignError
from lmmjax.evaluate import (
    FACTOR_CALLS,
    Evaluator,
    Factor,
    Logical,
    Matrix,
    to_factor,
)
from lmmjax.expr import Call, Name, Node, deparse, names_in
from lmmjax.formula import Bar, ParsedFormula, Terms, expand, parse
from lmmjax.late import Made, Recipe, protected, release, sharing
from lmmjax.rank import Moments, clearly_independent, independent_columns
from lmmjax.residual.frame import Residuals, build
from lmmjax.residual.language import ResidualSpec
from lmmjax.table import Table
from lmmjax.terms import CONTRASTS, Coding, Encoded, centrable, encode
from lmmjax.texts import given, make_late
from lmmjax.variables import (
    Variables,
    complete_rows,
    evaluate,
    evaluated,
    group_factor,
    numbers,
    side_source,
    side_values,
)

__all__ = [
    "Design",
    "DesignSpec",
    "NewDesign",
    "NewTerm",
    "Term",
    "build_design",
    "check_identifiable",
]


#: the X and z of more rows than this are made only when somebody reads them
LARGE = 1 << 17


@dataclass(frozen=True, eq=False)
class Term:
    """One random-effects term.

    Attributes
    ----------
    group : str
        Grouping factor as lme4 names it: ``"Subject"``, ``"cask:batch"``.
    names : tuple of str, length S
        R's names of the columns: ``("(Intercept)", "Days")``.
    cov : str
        Covariance of the effects of a level: ``us diag hom cs homcs``.
    z : (n, S) float64, Fortran order
        Columns, not multiplied out over the levels.
    codes : (n,) int32
        Level of each row, 0 ... J-1.
    levels : (J,) array of str
        Levels present, in level order.
    """

    group: str
    names: tuple[str, ...]
    cov: str
    z: np.ndarray
    codes: np.ndarray
    levels: np.ndarray


make_late(Term, "z")
make_late(Term, "levels")


class NewTerm(NamedTuple):
    """A random-effects term on new data; codes are -1 for a level that was not in training."""

    z: np.ndarray
    codes: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class NewDesign:
    """The model matrices on new data.

    Attributes
    ----------
    X : (m, p) float64
        The columns of the training X; a row with a missing value is NaN.
    offset : (m,) float64
    terms : tuple of NewTerm
        As in training; empty if ``random=False``.
    rows : pandas.Index
        Row labels of the new data. No row is dropped.
    """

    X: np.ndarray
    offset: np.ndarray
    terms: tuple[NewTerm, ...]
    rows: pd.Index


@dataclass(frozen=True, eq=False)
class RandomSpec:
    """What a random-effects term has learned: its columns and levels."""

    bar: Bar
    terms: Terms
    codings: dict[str, Coding]
    names: tuple[str, ...]
    levels: np.ndarray


make_late(RandomSpec, "levels")


@dataclass(frozen=True, eq=False)
class DesignSpec:
    """All that training taught: repeats the same coding on new data. Picklable.

    Attributes
    ----------
    parsed : ParsedFormula
    codings : dict of Coding
        Of the fixed variables, by R's text.
    random : tuple of RandomSpec
    states : dict
        Learned state of the transforms, by R's text.
    keep : (P,) bool
        Columns of the full model matrix that are not aliased.
    levels : dict of str to tuple of str or None
        Raw columns of the fixed part: levels present in training, None if numeric.
    offset : Node, ``"array"`` or None
        Where the argument ``offset=`` came from.
    safe : bool
    alias : (p, P - p) float64 or None
        The aliased columns as combinations of those kept; None if all are kept.
    """

    parsed: ParsedFormula
    codings: dict[str, Coding]
    random: tuple[RandomSpec, ...]
    states: dict[str, Any]
    keep: np.ndarray
    levels: dict[str, tuple[str, ...] | None]
    offset: Node | str | None
    safe: bool
    alias: np.ndarray | None = None

    @property
    def term_variables(self) -> dict[str, tuple[str, ...]]:
        """Variables of each fixed term, by term label (the intercept has none)."""
        terms = self.parsed.terms
        start = {"(Intercept)": ()} if terms.intercept else {}
        return start | {
            label: tuple(terms.variables[v] for v in term)
            for label, term in zip(terms.labels, terms.terms, strict=True)
        }

    def fixed_columns(self, newdata: Any) -> np.ndarray:
        """All columns of the fixed part on new data, the aliased ones included: (m, P)."""
        table = Table(newdata, "newdata")
        columns = table.read(self.parsed.terms.nodes)
        ev = Evaluator(columns, len(table), self.states, learn=False, safe=self.safe)
        return _new_matrix(self.parsed.terms, self.codings, ev)

    def new(
        self, newdata: Any, *, random: bool = True, groups: bool = True, offset: Any = None
    ) -> NewDesign:
        """Code new data with the levels, centres and polynomials of training.

        Parameters
        ----------
        newdata : table
            As for `build_design`; the response is not needed.
        random : bool
            Whether to code the random-effects terms (their columns are needed then).
        groups : bool
            Whether their grouping factors are asked for; without, all levels count as new.
        offset : (m,) array, optional
            Needed if the model was fitted with an array as offset; stands in for the offset
            column otherwise.

        Returns
        -------
        NewDesign

        Raises
        ------
        DataError
            A column or the offset is lacking, a level of a fixed factor was not in training, or
            a value is infinite.

        Notes
        -----
        O(m (p + S)). Missing values give NaN rows, not fewer rows.
        """
        table = Table(newdata, "newdata")
        terms = self.random if random else ()
        source = self._offset_source(offset, table.names)
        nodes = [*self.parsed.terms.nodes, *self.parsed.offset_nodes]
        nodes += [source] if isinstance(source, Name | Call) else []
        nodes += [node for r in terms for node in r.terms.nodes]
        if groups:
            nodes += self._grouping_columns(terms, table.names)
        columns = table.read(nodes)
        evaluator = Evaluator(columns, len(table), self.states, learn=False, safe=self.safe)
        X = _new_matrix(self.parsed.terms, self.codings, evaluator)
        total = np.zeros(len(table))
        for node in self.parsed.offset_nodes:
            total = total + numbers(evaluator, node, "offset")
        if source is not None:
            total = total + side_values(source, evaluator, "offset")
        return NewDesign(
            X=X if self.keep.all() else X[:, self.keep],
            offset=total,
            terms=tuple(_new_term(r, evaluator, groups) for r in terms),
            rows=table.rows,
        )

    @staticmethod
    def _grouping_columns(terms: tuple[RandomSpec, ...], names: list[str]) -> list[Node]:
        """Expressions of the grouping factors; says what to do where their columns lack."""
        nodes = [node for r in terms for node in r.bar.factors]
        lacking = {x.id for node in nodes for x in names_in(node)} - set(names)
        if lacking:
            raise DataError(
                f"found no column {', '.join(sorted(lacking))} in newdata, which has the groups of "
                "the random effects; expected it for predictions with random effects. Use "
                "kind='population', or give new labels with new_levels='population'."
            )
        return nodes

    def _offset_source(self, given: Any, names: list[str]) -> Any:
        if given is not None:
            if self.offset is None:
                raise DataError(
                    "found offset= for new data, but the model was fitted without offset=; "
                    "leave it out."
                )
            return side_source(given, "offset", names)
        if isinstance(self.offset, str):
            raise DataError(
                "found no offset for new data; the model was fitted with an array as offset=, so "
                "give offset= with one value per row of newdata."
            )
        return self.offset


@dataclass(frozen=True, eq=False)
class Design:
    """Arrays of a linear mixed model, with their labels.

    Attributes
    ----------
    formula : str
        The text as given.
    response : str
        The left side as R prints it.
    y : (n,) float64
        Response; the offset is not subtracted.
    X : (n, p) float64, Fortran order
        Fixed-effects columns, of full column rank.
    x_names : tuple of str, length p
        R's names: ``MachineB``, ``recipeB:temperature.L``.
    x_terms : tuple of str
        Labels of the fixed terms, ``"(Intercept)"`` first if present.
    x_assign : (p,) int64
        Index into `x_terms` of each column.
    aliased : tuple of str
        Columns dropped because they depend on those before them.
    offset, weights : (n,) float64
        Sum of all offsets (zeros if none), weights (ones if none).
    has_offset, has_weights : bool
    terms : tuple of Term
        Random-effects terms in formula order.
    rows : pandas.Index
        Row labels (positions for tables without labels) of the rows used.
    n_dropped : int
        Incomplete rows left out.
    missing : dict of str to int
        Variable -> rows in which it is missing.
    spec : DesignSpec
    columns : dict of Series
        Raw columns of the fixed part in the rows used, not copied: for reference grids.
    residual : Residuals or None
        Arrays of the residual structure; None where the residuals are independent.
    held : tuple of Series
        Columns whose memory the arrays share: pandas does not write there while they are held.

    Notes
    -----
    X and the z of the terms of a large table are made when they are first read.
    """

    formula: str
    response: str
    y: np.ndarray
    X: np.ndarray
    x_names: tuple[str, ...]
    x_terms: tuple[str, ...]
    x_assign: np.ndarray
    aliased: tuple[str, ...]
    offset: np.ndarray
    weights: np.ndarray
    has_offset: bool
    has_weights: bool
    terms: tuple[Term, ...]
    rows: pd.Index
    n_dropped: int
    missing: dict[str, int]
    spec: DesignSpec = field(repr=False)
    columns: dict[str, pd.Series] = field(repr=False, default_factory=dict)
    residual: Residuals | None = field(default=None, repr=False)
    held: tuple[pd.Series, ...] = field(default=(), repr=False)

    @property
    def n(self) -> int:
        """Rows used."""
        return len(self.rows)

    @property
    def p(self) -> int:
        """Fixed effects."""
        return len(self.x_names)

    def release(self) -> None:
        """Forget X and the z of the terms, if they are large; whoever reads them makes them."""
        if self.n > LARGE:
            release(self, *self.terms)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": ()}


make_late(Design, "X")


def build_design(
    formula: str,
    data: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, str] | None = None,
    missing: str = "drop",
    safe: bool = False,
    residual: ResidualSpec | None = None,
) -> Design:
    """Build the arrays of a linear mixed model from a formula and a table.

    Parameters
    ----------
    formula : str
        R and lme4 syntax. Formulas are evaluated: besides R's functions they can call NumPy's as
        ``np.name(...)``. Give ``safe=True`` for formulas of unknown origin.
    data : table
        pandas, polars, pyarrow or another table that narwhals knows, or a dict of columns.
    weights : str or (n,) array, optional
        Precision weights, > 0; a column, an expression such as ``"1/v"``, or values by row.
    offset : str or (n,) array, optional
        Added to the offsets of the formula.
    contrasts : dict, optional
        ``{"f": "treatment" | "sum" | "helmert" | "poly"}`` for factors of the fixed part; default
        treatment, poly for ordered categoricals. As in lme4, random effects keep the default.
    missing : {"drop", "raise"}
        What to do with rows that lack a value of any variable used.
    safe : bool
        Allow only arithmetic and the fixed list of R functions.
    residual : ResidualSpec, optional
        Structure of the residuals; rows that lack one of its variables are refused.

    Returns
    -------
    Design

    Raises
    ------
    FormulaError
        Malformed formula or unknown function.
    DataError
        Unknown columns, wrong types, infinite values, missing values with ``missing="raise"``,
        weights that are not positive, a constant response.
    DesignError
        No rows left, a grouping factor with one level, bad contrasts.

    Notes
    -----
    Levels are those of a categorical or Enum column in order, sorted for text (by code point, as R
    in the C locale), and numerical for numbers; unused levels are dropped. Columns of X that depend
    on earlier ones are dropped as by R's ``lm``, judged after centring. As in R, transforms such as
    ``scale(x)`` learn from all rows that have x. O(n (p^2 + S)) plus sorting of levels.

    Examples
    --------
    >>> data = {"y": [1.0, 2.0, 4.0, 3.0], "x": [0, 1, 0, 1], "g": ["a", "a", "b", "b"]}
    >>> design = build_design("y ~ x + (1 | g)", data)
    >>> design.x_names, design.terms[0].names, list(design.terms[0].levels)
    (('(Intercept)', 'x'), ('(Intercept)',), ['a', 'b'])
    """
    design, values = design_and_residual(
        formula,
        data,
        residual=residual,
        weights=weights,
        offset=offset,
        contrasts=contrasts,
        missing=missing,
        safe=safe,
    )
    if residual is not None and residual.structured:
        found = build(residual, values, design.n, design.n_dropped, design.rows)
        design = replace(design, residual=found)
    check_terms(design)
    return design


def design_and_residual(
    formula: str,
    data: Any,
    *,
    residual: ResidualSpec | None,
    weights: Any,
    offset: Any,
    contrasts: Mapping[str, str] | None,
    missing: str,
    safe: bool = False,
) -> tuple[Design, dict[str, Any]]:
    """The design without its residual structure, and the values of the structure's variables.

    For tables of many data sets, where subjects and positions count within each; parameters as for
    :func:`build_design`, which checks the number of levels against the rows as well.
    """
    if missing not in ("drop", "raise"):
        raise DataError(f'found missing={missing!r}; expected "drop" or "raise".')
    parsed = parse(formula)
    raw = evaluate(parsed, Table(data), weights, offset, safe, residual)
    raw = raw.take(complete_rows(raw, missing))
    return _assemble(parsed, raw, {} if contrasts is None else contrasts, safe), raw.residual


# Coding ---------------------------------------------------------------------------------------


def _assemble(parsed: ParsedFormula, raw: Variables, contrasts: Any, safe: bool) -> Design:
    for name, value in evaluated(raw):
        _check_finite(value, name)
    n = len(raw.rows)
    fixed = _codings(parsed.terms, raw.values, _check_contrasts(contrasts, parsed, raw.values))
    columns = raw.columns.values()
    arrays = {name: protected(_array(value), columns) for name, value in raw.values.items()}
    response = protected(raw.y, columns)
    fixed_part, full = _made(parsed.terms, fixed, arrays, n)
    y = response if raw.offset is None else response - raw.offset
    if n > LARGE and parsed.terms.intercept:
        fixed_part.moments = _moments(fixed_part, y, len(full.names))
    keep = _full_rank(fixed_part, len(full.names))
    pairs = [
        _term(bar, group, raw.values, arrays, parsed.text)
        for bar, group in zip(parsed.bars, raw.groups, strict=True)
    ]
    offset = np.broadcast_to(0.0, n) if raw.offset is None else np.array(raw.offset)
    weights = np.broadcast_to(1.0, n) if raw.weights is None else np.array(raw.weights)
    _check_response(y, parsed.response, bool(np.any(offset)))
    if raw.weights is not None:
        _check_weights(weights, raw.rows)
    spec = DesignSpec(
        parsed=parsed,
        codings=fixed,
        random=tuple(spec for _, spec in pairs),
        states=raw.states,
        keep=keep,
        levels=_raw_levels(raw),
        offset=raw.offset_source,
        safe=safe,
        alias=None if keep.all() else _aliases(fixed_part(), keep),
    )
    intercept = parsed.terms.intercept
    return Design(
        formula=parsed.text,
        response=parsed.response,
        y=response,
        X=fixed_part.kept(keep),  # type: ignore[arg-type]
        x_names=tuple(name for name, kept in zip(full.names, keep, strict=True) if kept),
        x_terms=(("(Intercept)",) if intercept else ()) + parsed.terms.labels,
        x_assign=full.assign[keep] - (0 if intercept else 1),
        aliased=tuple(name for name, kept in zip(full.names, keep, strict=True) if not kept),
        offset=offset,
        weights=weights,
        has_offset=raw.offset is not None,
        has_weights=raw.weights is not None,
        terms=tuple(term for term, _ in pairs),
        rows=raw.rows,
        n_dropped=raw.n_dropped,
        missing=raw.missing,
        spec=spec,
        columns={name: raw.columns[name] for name in raw.raw_fixed},
        held=sharing(columns, [response, *arrays.values()]),
    )


def _made(
    terms: Terms, codings: dict[str, Coding], arrays: Mapping[str, np.ndarray], n: int
) -> tuple[Made, Encoded]:
    """A model matrix, made now unless it is large, and its labels."""
    recipe = Recipe(terms, codings, arrays, n)
    labels = recipe.encode(slice(0, 1) if n > LARGE else None)
    return Made(recipe, None if n > LARGE else labels.X), labels


def _aliases(X: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Coefficients of the dependent columns on the independent ones, (p, P - p)."""
    size = np.sqrt(np.mean(X**2, axis=0))
    size[size == 0] = 1.0
    unit = X / size
    found = np.linalg.lstsq(unit[:, keep], unit[:, ~keep], rcond=None)[0]
    return found * size[~keep] / size[keep][:, None]


def _term(
    bar: Bar, group: Factor, values: Mapping[str, Any], arrays: Mapping[str, Any], text: str
) -> tuple[Term, RandomSpec]:
    terms = expand(bar.expr, text)
    codings = _codings(terms, values, {})  # lme4 applies contrasts= to the fixed part only
    z, labels = _made(terms, codings, arrays, len(group.codes))
    levels = given(group, "levels")
    term = Term(bar.group, labels.names, bar.cov, z, group.codes, levels)  # type: ignore[arg-type]
    return term, RandomSpec(bar, terms, codings, labels.names, levels)


def _codings(
    terms: Terms, values: Mapping[str, Any], contrasts: Mapping[str, str]
) -> dict[str, Coding]:
    codings = {}
    for name, node in zip(terms.variables, terms.nodes, strict=True):
        kinds = [kind for key, kind in contrasts.items() if key in (name, _coded_column(node))]
        codings[name] = _coding(name, values[name], kinds[0] if kinds else None)
        if kinds and codings[name].levels is None:
            raise DesignError(
                f"found contrasts for {name}, which is numeric; use factor({name}) or leave it out."
            )
    return codings


def _coded_column(node: Node) -> str | None:
    """Return ``f`` of ``f``, ``factor(f)`` or ``relevel(f, ...)``."""
    if isinstance(node, Call) and node.fn in FACTOR_CALLS and node.args:
        node = node.args[0]
    return node.id if isinstance(node, Name) else None


def _check_contrasts(contrasts: Any, parsed: ParsedFormula, values: Iterable[str]) -> dict:
    """Normalise ``contr.sum`` to ``sum``; contrasts of a variable without fixed effect are idle."""
    if not isinstance(contrasts, Mapping):
        raise DesignError(f'found contrasts={contrasts!r}; expected a dict such as {{"f": "sum"}}.')
    factors = [node for bar in parsed.bars for node in bar.factors]
    known = {*values, *map(deparse, factors)}
    known |= {name.id for node in (*parsed.terms.nodes, *factors) for name in names_in(node)}
    kinds = {}
    for key, kind in contrasts.items():
        if key not in known:
            raise DesignError(
                f"found contrasts for {key!r}, which the formula does not use; expected one of "
                f"{', '.join(sorted(known)) or '(no factor)'}."
            )
        kinds[key] = kind.removeprefix("contr.") if isinstance(kind, str) else kind
        if not isinstance(kinds[key], str) or kinds[key] not in CONTRASTS:
            raise DesignError(
                f"found contrasts {kind!r} for {key}; expected one of {', '.join(CONTRASTS)}."
            )
    return kinds


def _coding(name: str, value: Any, contrast: str | None) -> Coding:
    if isinstance(value, Logical):
        value = to_factor(value)
    if isinstance(value, Factor):
        default = "poly" if value.ordered else "treatment"
        return Coding(name, value.levels, contrast or default)
    if isinstance(value, Matrix):
        return Coding(name, width=value.values.shape[1])
    return Coding(name)


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Logical):
        value = to_factor(value)
    if isinstance(value, Factor):
        return value.codes
    return value.values if isinstance(value, Matrix) else value


def _raw_levels(raw: Variables) -> dict[str, tuple[str, ...] | None]:
    """Levels of the raw columns of the fixed part, for reference grids."""
    n = len(raw.rows)
    ev = Evaluator(raw.columns, n, {}, learn=False, safe=True)
    levels: dict[str, tuple[str, ...] | None] = {}
    for name in raw.raw_fixed:
        value = ev.column(name)
        is_factor = isinstance(value, Factor | Logical)
        levels[name] = tuple(to_factor(value).take(None).levels) if is_factor else None
    return levels


def _moments(made: Made, y: np.ndarray, width: int) -> Moments | None:
    """Moments of the columns of X beside the intercept, and of y, if they prove full rank."""
    size = 1 << 14  # rows that stay in the processor's cache
    found = Moments.of(
        (
            np.column_stack([made.rows(slice(i, i + size))[:, 1:], y[i : i + size]])
            for i in range(0, len(y), size)
        ),
        shifted=True,
    )
    return found if found.independent(width - 1, intercept=True) else None


def _full_rank(made: Made, width: int) -> np.ndarray:
    """Return which columns of X are kept; a closer look only where dependence is possible."""
    terms, codings, arrays = made.recipe.terms, made.recipe.codings, made.recipe.values
    if made.moments is not None or clearly_independent(made(), terms.intercept):
        return np.ones(width, bool)
    centred = dict(arrays)
    for name in centrable(terms, codings):
        values = arrays[name] - arrays[name][0]
        centred[name] = values - values.mean(axis=0)
    # Centring each variable leaves the column space alone, but x1e8 no longer looks constant.
    judged = encode(terms, codings, centred, made.recipe.n).X
    return independent_columns(judged, terms.intercept)


# New data -------------------------------------------------------------------------------------


def _new_matrix(terms: Terms, codings: dict[str, Coding], ev: Evaluator) -> np.ndarray:
    arrays = {
        name: _new_array(codings[name], ev.variable(node))
        for name, node in zip(terms.variables, terms.nodes, strict=True)
    }
    return encode(terms, codings, arrays, ev.n).X


def _new_array(coding: Coding, value: Any) -> np.ndarray:
    if coding.levels is not None:
        return _match(to_factor(value), coding.levels, coding.name)
    if isinstance(value, Factor | Logical):
        raise DataError(
            f"found text, booleans or a categorical in {coding.name} of newdata; expected numbers, "
            "as in training."
        )
    _check_finite(value, coding.name)
    return _array(value)


def _match(factor: Factor, levels: np.ndarray, name: str) -> np.ndarray:
    """Translate codes to those of training."""
    used = factor.take(None)
    place = pd.Index(levels).get_indexer(pd.Index(used.levels)).astype(np.int32)
    if np.any(place < 0):
        raise DataError(
            f"found level {used.levels[place < 0][0]!r} of {name} in newdata, which was not in "
            f"training; expected one of {', '.join(levels)}. Leave these rows out, or fit "
            "the model with data that have the level."
        )
    return np.append(place, np.int32(-1))[used.codes]


def _new_term(spec: RandomSpec, ev: Evaluator, groups: bool = True) -> NewTerm:
    if not groups:
        z = _new_matrix(spec.terms, spec.codings, ev)
        return NewTerm(z, np.full(len(z), -1, np.int32), np.full(len(z), "", object))
    factor = group_factor(spec.bar, ev)
    place = pd.Index(spec.levels).get_indexer(pd.Index(factor.levels)).astype(np.int32)
    codes = np.append(place, np.int32(-1))[factor.codes]
    labels = np.append(factor.levels, np.array(["NA"], dtype=object))[factor.codes]
    return NewTerm(_new_matrix(spec.terms, spec.codings, ev), codes, labels)


# Checks ---------------------------------------------------------------------------------------


def _check_finite(value: Any, name: str) -> None:
    if isinstance(value, Factor):
        return
    values = value if isinstance(value, np.ndarray) else value.values
    number = int(np.count_nonzero(np.isinf(values)))
    if number:
        raise DataError(
            f"found {number} infinite values in {name}; expected finite numbers. Remove these "
            "rows, or mark them as missing."
        )


def _check_response(rest: np.ndarray, name: str, offset: bool) -> None:
    """Refuse a constant response, given less the offset."""
    if rest[0] == rest[-1] and np.all(rest == rest[0]):
        what = "response minus offset" if offset else "response"
        raise DataError(
            f"found a constant {what} ({name}: {rest[0]:g} in all {rest.size} rows); expected "
            "numbers that vary. Check the column."
        )


def _check_weights(weights: np.ndarray, rows: pd.Index) -> None:
    bad = np.flatnonzero(weights <= 0)
    if bad.size:
        raise DataError(
            f"found {bad.size} weights that are not positive (first: {weights[bad[0]]:g} in row "
            f"{rows[bad[0]]}); expected weights > 0 (varfixed(v) makes them 1/v). Remove them."
        )


def check_terms(design: Design) -> None:
    """Refuse a grouping factor of one level."""
    for term, spec in zip(design.terms, design.spec.random, strict=True):
        if len(given(term, "levels")) < 2:
            refuse_one_level(term, spec)


def refuse_one_level(term: Any, spec: RandomSpec) -> NoReturn:
    """Raise DesignError: a grouping factor needs two levels."""
    raise DesignError(
        f"found one level ({term.levels[0]}) of the grouping factor {term.group} among the "
        f"rows used; expected at least 2. Remove {spec.bar.text}."
    )


def check_identifiable(design: Design) -> None:
    """Refuse what a likelihood alone cannot identify; proper priors can.

    Raises
    ------
    DesignError
        A term with as many random effects as rows, or as many fixed effects as rows.
    """
    for term, spec in zip(design.terms, design.spec.random, strict=True):
        levels, columns = len(given(term, "levels")), len(term.names)
        if levels * columns >= design.n:
            raise DesignError(
                f"found {levels} levels x {columns} columns = {levels * columns} random effects in "
                f"{spec.bar.text} and {design.n} rows; expected fewer effects than rows. Their "
                "variance cannot be told from the residual's: drop columns or the term."
            )
    if design.p >= design.n:
        raise DesignError(
            f"found {design.p} fixed effects and {design.n} rows; expected fewer effects than "
            "rows. Drop terms or add data."
        )

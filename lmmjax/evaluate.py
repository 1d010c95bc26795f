"""Evaluate the variables of a formula on the columns of a data frame.

Values are float arrays (n,), `Matrix` (poly, splines), `Logical` or `Factor`; a missing value is
NaN or the code -1. What formulas can call is in `FUNCTIONS`, `OPERATORS`, `lmmjax.transforms` and,
unless ``safe``, NumPy's functions as ``np.name``. NumPy has functions that read files, hence
formulas of unknown origin belong in safe mode.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lmmjax.errors import DataError, FormulaError
from lmmjax.expr import Call, Name, Node, Number, Text, deparse
from lmmjax.texts import Texts, given, make_late
from lmmjax.transforms import STATEFUL, SUMMARIES
from lmmjax.values import Values

__all__ = ["FACTOR_CALLS", "Evaluator", "Factor", "Logical", "Matrix", "cross", "to_factor"]


@dataclass(frozen=True, eq=False)
class Factor:
    """A categorical variable: codes (n,) with -1 for missing, and the text of its levels."""

    codes: np.ndarray
    levels: np.ndarray
    ordered: bool = False

    def take(self, keep: np.ndarray | None) -> Factor:
        """Keep some rows (all if None), then drop unused levels."""
        codes = self.codes if keep is None else self.codes[keep]
        levels = given(self, "levels")
        used = np.zeros(len(levels) + 1, bool)
        used[codes] = True  # -1 is the one behind
        used = used[:-1]
        if used.all():
            return Factor(codes, levels, self.ordered)
        place = np.where(used, np.cumsum(used) - 1, -1).astype(np.int32)
        codes = np.append(place, np.int32(-1))[codes]
        return Factor(codes, levels[used], self.ordered)


@dataclass(frozen=True, eq=False)
class Logical:
    """True and false as 1.0 and 0.0, missing as NaN, (n,)."""

    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Matrix:
    """Several columns (n, k) from one call, such as poly(x, 2)."""

    values: np.ndarray


make_late(Factor, "levels")

Value = Any  # float | bool | str | list | ndarray | Factor | Logical | Matrix


# Factors --------------------------------------------------------------------------------------


def label(value: Any) -> str:
    """Print a level: ``1`` for 1.0 (15 digits as R), ``TRUE`` for True."""
    if isinstance(value, bool | np.bool_):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float | np.floating):
        value = float(value)
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.15g}"
    if isinstance(value, pd.Timestamp) and value == value.normalize():
        return str(value.date())
    return str(value)


def _labels(values: Iterable[Any]) -> np.ndarray:
    return np.array([label(v) for v in values], dtype=object)


def factor_from_series(series: pd.Series) -> Factor:
    """Code a column: categories in their order, otherwise sorted values."""
    dtype = series.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        codes = series.cat.codes.to_numpy().astype(np.int32)
        return Factor(codes, _labels(dtype.categories), bool(dtype.ordered))
    if isinstance(dtype, np.dtype) and dtype.kind in "iu":
        return _factor_from_integers(series.to_numpy())
    try:
        codes, uniques = pd.factorize(series, sort=True)
    except TypeError as err:
        raise DataError(
            f"found values of several types in column {series.name!r}; "
            "turn it into text or a categorical."
        ) from err
    return Factor(codes.astype(np.int32), _labels(uniques))


def _factor_from_integers(values: np.ndarray) -> Factor:
    """Code integers; where their range is small a lookup table is faster than hashing."""
    if values.size == 0:
        return Factor(np.empty(0, np.int32), np.empty(0, object))
    low, high = int(values.min()), int(values.max())
    if high - low > 4 * values.size + 1000:
        codes, uniques = pd.factorize(values, sort=True)
        return Factor(codes.astype(np.int32), Texts(uniques))  # type: ignore[arg-type]
    wide = values.dtype if high - low <= np.iinfo(values.dtype).max else np.dtype(np.int64)
    shifted = values.astype(wide, copy=False) - np.array(low, wide)
    used = np.zeros(high - low + 1, bool)
    used[shifted] = True
    codes = (np.cumsum(used, dtype=np.int32) - np.int32(1))[shifted]
    found = np.flatnonzero(used)
    if values.dtype == np.uint64:  # its levels may lie beyond int64
        found = found.astype(np.uint64)
    return Factor(codes, Texts(found + low))  # type: ignore[arg-type]


def to_factor(value: Value) -> Factor:
    """Turn an evaluated value into a factor; logicals keep both levels."""
    if isinstance(value, Factor):
        return value
    if isinstance(value, Logical):
        codes = np.where(np.isnan(value.values), -1, value.values).astype(np.int32)
        return Factor(codes, np.array(["FALSE", "TRUE"], dtype=object))
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return factor_from_series(pd.Series(value))
    raise DataError("found a matrix or a constant where a factor was expected; name one column.")


def cross(factors: list[Factor], name: str) -> Factor:
    """Combine factors: only combinations present, the first factor slowest, ``a:b`` as text."""
    result = factors[0]
    for other in factors[1:]:
        result = _cross_two(result, other)
    if len(factors) > 1 and len(set(result.levels)) < len(result.levels):
        raise DataError(
            f"found two combinations of {name} that print alike; levels contain ':', rename them."
        )
    return result


def _cross_two(a: Factor, b: Factor) -> Factor:
    pair = a.codes.astype(np.int64) * len(b.levels) + b.codes
    pair[(a.codes < 0) | (b.codes < 0)] = -1
    present = pair >= 0
    coded = _factor_from_codes(pair if present.all() else pair[present])
    codes = np.full(pair.size, -1, np.int32)
    codes[present] = coded[0]
    first, second = np.divmod(coded[1], max(len(b.levels), 1))
    text = [f"{x}:{y}" for x, y in zip(a.levels[first], b.levels[second], strict=True)]
    return Factor(codes, np.array(text, dtype=object))


def _factor_from_codes(pair: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, uniques = pd.factorize(pair, sort=True)
    return codes, uniques


# Columns --------------------------------------------------------------------------------------


def column_value(series: pd.Series, name: str) -> Value:
    """Read one column as float array, `Logical` or `Factor`."""
    dtype = series.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return factor_from_series(series)
    if pd.api.types.is_bool_dtype(dtype):
        return Logical(_floats(series))
    if pd.api.types.is_complex_dtype(dtype):
        raise DataError(f"found complex numbers in column {name!r}; expected real numbers.")
    if pd.api.types.is_numeric_dtype(dtype):
        return _floats(series)
    if isinstance(dtype, pd.StringDtype):
        return factor_from_series(series)
    return _object_value(series, name)


def _floats(series: pd.Series) -> np.ndarray:
    if isinstance(series.dtype, np.dtype):
        return series.to_numpy().astype(np.float64, copy=False)
    # a nullable float column without a missing value would lend its own memory, for writing
    lent = not isinstance(series.dtype, pd.ArrowDtype)
    return series.to_numpy(dtype=np.float64, na_value=np.nan, copy=lent)


def _object_value(series: pd.Series, name: str) -> Value:
    kind = pd.api.types.infer_dtype(series, skipna=True)
    if kind in ("string", "categorical"):
        return factor_from_series(series)
    if kind == "boolean":
        return Logical(series.astype("boolean").to_numpy(dtype=np.float64, na_value=np.nan))
    if kind in ("integer", "floating", "mixed-integer-float", "decimal", "empty"):
        return pd.to_numeric(series).to_numpy(dtype=np.float64, na_value=np.nan)
    raise DataError(
        f"found values of type {kind} in column {name!r}; expected numbers, text, "
        "booleans or a categorical. Convert the column first."
    )


def is_missing(value: Value) -> np.ndarray:
    """Return (n,) True where a value is missing."""
    if isinstance(value, Factor):
        return value.codes < 0
    values = value if isinstance(value, np.ndarray) else value.values
    missing = np.isnan(values)
    return missing if missing.ndim == 1 else missing.any(axis=1)


# Functions ------------------------------------------------------------------------------------


def _log(x: Any, base: Any = None) -> Any:
    return np.log(x) if base is None else np.log(x) / np.log(base)


def _round(x: Any, digits: Any = 0.0) -> Any:
    return np.round(x, int(digits))


def _identity(x: Any) -> Any:
    return x


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "log": _log,
    "round": _round,
    "as.numeric": _identity,
    "as.double": _identity,
    "as.integer": np.trunc,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "exp": np.exp,
    "expm1": np.expm1,
    "log1p": np.log1p,
    "log2": np.log2,
    "log10": np.log10,
    "floor": np.floor,
    "ceiling": np.ceil,
    "trunc": np.trunc,
    "sign": np.sign,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "pmin": np.minimum,
    "pmax": np.maximum,
}
OPERATORS: dict[str, Callable[..., Any]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.true_divide,
    "^": np.power,
    "%%": np.mod,
    "%/%": np.floor_divide,
}
_COMPARE: dict[str, Callable[..., Any]] = {
    "==": np.equal,
    "!=": np.not_equal,
    "<": np.less,
    ">": np.greater,
    "<=": np.less_equal,
    ">=": np.greater_equal,
}
CONSTANTS = {"pi": float(np.pi), "T": True, "F": False}
LITERALS = {"TRUE": True, "FALSE": False, "True": True, "False": False}


class Evaluator:
    """Evaluate expressions on one table; learn the state of transforms, or repeat it.

    Parameters
    ----------
    columns : mapping of str to pandas.Series
        The columns that the formula names.
    n : int
        Rows.
    states : dict
        State of each transform by its R text. Filled when `learn`, read otherwise.
    learn : bool
        True on the training data.
    safe : bool
        Refuse ``np.`` functions.
    """

    def __init__(self, columns: dict, n: int, states: dict, learn: bool, safe: bool) -> None:
        self.columns = columns
        self.n = n
        self.states = states
        self.learn = learn
        self.safe = safe
        self._cache: dict[str, Value] = {}

    def column(self, name: str) -> Value:
        """Return a raw column."""
        if name not in self._cache:
            self._cache[name] = column_value(self.columns[name], name)
        return self._cache[name]

    def value(self, node: Node) -> Value:
        """Evaluate an expression."""
        if isinstance(node, Number):
            return node.value
        if isinstance(node, Text):
            return node.value
        if isinstance(node, Name):
            return self._name(node)
        if node.fn in ("(", "I"):
            return self.value(self._only(node))
        if node.fn in _COMPARE:
            return self._compare(node)
        if node.fn in ("!", "&", "&&", "|", "||", "%in%"):
            return self._logic(node)
        if node.fn in OPERATORS:
            return self._arithmetic(node)
        return self._call(node)

    def variable(self, node: Node) -> Value:
        """Evaluate an expression that must have one value a row."""
        value = self.value(node)
        if isinstance(value, Factor | Logical | Matrix):
            return value
        if isinstance(value, np.ndarray) and value.shape[:1] == (self.n,) and value.ndim <= 2:
            return Matrix(value) if value.ndim == 2 else value
        raise FormulaError(
            f"found {deparse(node)}, which is not a column with one value for each of the "
            f"{self.n} rows; use a column of the data or a transform of one."
        )

    def factor(self, node: Node) -> Factor:
        """Evaluate an expression as a factor; whole numbers keep all their digits."""
        if isinstance(node, Name) and node.id in self.columns:
            series = self.columns[node.id]
            if pd.api.types.is_bool_dtype(series.dtype):
                return to_factor(self.column(node.id))
            return factor_from_series(series)
        return to_factor(self.variable(node))

    def group(self, nodes: tuple[Node, ...], name: str) -> Factor:
        """Evaluate a grouping factor, crossed where it has several variables."""
        return cross([self.factor(node) for node in nodes], name)

    def _name(self, node: Name) -> Value:
        if node.id in self.columns:
            return self.column(node.id)
        if node.id in LITERALS:
            return LITERALS[node.id]
        return CONSTANTS[node.id]

    def _only(self, node: Call) -> Node:
        if len(node.args) != 1:
            raise FormulaError(f"found {deparse(node)}; expected one argument.")
        return node.args[0]

    def numeric(self, node: Node) -> Any:
        """Evaluate an expression as number or array."""
        value = self.value(node)
        if isinstance(value, Logical | Matrix):
            return value.values
        if isinstance(value, Factor | str):
            raise DataError(
                f"found text or a categorical, {deparse(node)}, where numbers were expected; "
                "convert the column (a factor can stand only for itself, as a term of the formula)."
            )
        return value

    def _arithmetic(self, node: Call) -> Any:
        args = [self.numeric(arg) for arg in node.args]
        if len(args) == 1:
            return args[0] if node.fn == "+" else np.negative(args[0])
        with np.errstate(all="ignore"):  # NaN and inf are reported by the design, with counts
            return OPERATORS[node.fn](*args)

    def _compare(self, node: Call) -> Any:
        left, right = (self.value(arg) for arg in node.args)
        if isinstance(left, Factor | str) or isinstance(right, Factor | str):
            return self._compare_text(node, left, right)
        left, right = (self.numeric(arg) for arg in node.args)
        return _logical(_COMPARE[node.fn](left, right), np.isnan(left) | np.isnan(right))

    def _compare_text(self, node: Call, left: Value, right: Value) -> Logical:
        if isinstance(right, Factor):
            left, right = right, left
        if node.fn not in ("==", "!=") or not (isinstance(left, Factor) and isinstance(right, str)):
            raise FormulaError(
                f'found {deparse(node)}; text can be compared by == and != with a level: f == "a".'
            )
        return _logical(_COMPARE[node.fn](_text(left), right), left.codes < 0)

    def _logic(self, node: Call) -> Logical:
        if node.fn == "%in%":
            return self._member(node)
        args = [np.asarray(self.numeric(arg), float) for arg in node.args]
        missing = np.isnan(args[0]) if len(args) == 1 else np.isnan(args[0]) | np.isnan(args[1])
        if node.fn == "!":
            return _logical(args[0] == 0, missing)
        combine = np.logical_and if node.fn.startswith("&") else np.logical_or
        return _logical(combine(args[0] != 0, args[1] != 0), missing)

    def _member(self, node: Call) -> Logical:
        value, pool = self.value(node.args[0]), self.value(node.args[1])
        pool = pool if isinstance(pool, list) else [pool]
        if isinstance(value, Factor):
            return Logical(np.isin(_text(value), _labels(pool)).astype(float))
        return Logical(np.isin(self.numeric(node.args[0]), pool).astype(float))

    def _call(self, node: Call) -> Value:
        if node.fn == "c":
            return [self.value(arg) for arg in node.args]
        if node.fn in FACTOR_CALLS:
            return self._factor_call(node)
        if node.fn in STATEFUL:
            return self._stateful(node)
        if node.fn in SUMMARIES:
            return self._summary(node)
        if node.fn == "ifelse":
            return self._ifelse(node)
        function = self._function(node)
        args, keys = self._arguments(node, node.args)
        with np.errstate(all="ignore"):
            return _guard(node, lambda: function(*args, **keys))

    def _function(self, node: Call) -> Callable[..., Any]:
        if node.fn in FUNCTIONS:
            return FUNCTIONS[node.fn]
        if node.fn.startswith("np."):
            if self.safe:
                raise FormulaError(f"found {node.fn}() in a formula with safe=True; {_offer()}.")
            found = getattr(np, node.fn.removeprefix("np."), None)
            if callable(found) and "." not in node.fn[3:] and not node.fn[3:].startswith("_"):
                return found
        close = difflib.get_close_matches(node.fn, _known_functions(), n=1, cutoff=0.7)
        hint = f"did you mean {close[0]}()? " if close else ""
        raise FormulaError(f"found the unknown function {node.fn}(); {hint}{_offer()}.")

    def _arguments(self, node: Call, nodes: tuple[Node, ...]) -> tuple[list, dict]:
        args, keys = [], {}
        for key, arg in zip(node.keys[-len(nodes) :] if nodes else (), nodes, strict=True):
            value = self.value(arg)
            if isinstance(value, Factor | Logical | Matrix):
                value = self.numeric(arg)
            if key is None:
                args.append(value)
            else:
                keys[key.replace(".", "_")] = value
        return args, keys

    def _stateful(self, node: Call) -> Value:
        transform, text = STATEFUL[node.fn], deparse(node)
        if not node.args or node.keys[0] not in (None, "x"):
            raise FormulaError(f"found {text}; the first argument must be the variable.")
        x = np.asarray(self.numeric(node.args[0]), float)
        if x.shape != (self.n,):
            raise FormulaError(f"found {text}; the first argument must be one numeric column.")
        if self.learn and text not in self.states:
            self.states[text] = self.fit_state(node, Values(x))
        result = transform.apply(x, self.states[text])
        return Matrix(result) if result.ndim == 2 else result

    def _summary(self, node: Call) -> float:
        text = deparse(node)
        if self.learn and text not in self.states:
            x = np.asarray(self.numeric(self._only(node)), float)
            self.states[text] = self.fit_state(node, Values(x))
        return self.states[text]

    def fit_state(self, node: Call, values: Values) -> Any:
        """Learn what a transform or a summary keeps of the values of its argument."""
        if node.fn in SUMMARIES:
            self._only(node)
            return float(SUMMARIES[node.fn](values))
        args, keys = self._arguments(node, node.args[1:])
        return _guard(node, lambda: STATEFUL[node.fn].fit(values, *args, **keys))

    def _ifelse(self, node: Call) -> np.ndarray:
        if len(node.args) != 3:
            raise FormulaError(f"found {deparse(node)}; expected ifelse(test, yes, no).")
        test, yes, no = (self.numeric(arg) for arg in node.args)
        return np.where(np.isnan(test), np.nan, np.where(test != 0, yes, no))

    def _factor_call(self, node: Call) -> Factor:
        if not node.args:
            raise FormulaError(f"found {deparse(node)}; expected a column as its argument.")
        base = self.factor(node.args[0])
        if None in node.keys[1:]:
            raise FormulaError(f"found {deparse(node)}; name the arguments: levels = c(...).")
        keys = {str(k): self.value(a) for k, a in zip(node.keys[1:], node.args[1:], strict=True)}
        if node.fn == "relevel" and not self.learn:
            return base  # levels are matched by their text, and the reference may be absent
        if "labels" in keys and "levels" not in keys:
            keys["levels"] = self._levels_learned(node, base)
        return _guard(node, lambda: FACTOR_CALLS[node.fn](base, **keys))

    def _levels_learned(self, node: Call, base: Factor) -> list[str]:
        text, found = deparse(node), base.take(None).levels
        if self.learn:
            self.states.setdefault(text, list(found))
        unseen = sorted(set(found) - set(self.states[text]))
        if unseen:
            raise DataError(
                f"found level {unseen[0]!r} of {text}, which was not in the training data; "
                f"expected one of {', '.join(self.states[text])}."
            )
        return self.states[text]


def _logical(values: Any, missing: Any) -> Logical:
    return Logical(np.where(missing, np.nan, values).astype(float))


def _text(factor: Factor) -> np.ndarray:
    return np.append(factor.levels, "")[factor.codes]


def _guard(node: Call, call: Callable[[], Any]) -> Any:
    """Turn a wrong argument into a FormulaError that shows the call."""
    try:
        return call()
    except (TypeError, ValueError) as err:
        if isinstance(err, DataError | FormulaError):
            raise
        message = str(err).lstrip("_").rstrip(".")
        raise FormulaError(f"found {deparse(node)}, which cannot be evaluated: {message}.") from err


def _known_functions() -> list[str]:
    return [*FUNCTIONS, *STATEFUL, *SUMMARIES, *FACTOR_CALLS, "I", "ifelse", "c", "offset"]


def _offer() -> str:
    return "formulas know " + ", ".join(sorted(_known_functions(), key=str.lower))


# Calls that make or change factors ------------------------------------------------------------


def _make_factor(
    base: Factor, levels: Any = None, labels: Any = None, ordered: bool | None = None
) -> Factor:
    used = base.take(None)
    if levels is not None:
        used = _relabel(used, _labels(levels if isinstance(levels, list) else [levels]))
    if labels is not None:
        if not isinstance(labels, list) or len(labels) != len(used.levels):
            raise ValueError(f"labels = must give {len(used.levels)} labels")
        used = Factor(used.codes, _labels(labels))
    return Factor(used.codes, used.levels, base.ordered if ordered is None else bool(ordered))


def _relabel(factor: Factor, levels: np.ndarray) -> Factor:
    place = pd.Index(levels).get_indexer(pd.Index(factor.levels)).astype(np.int32)
    return Factor(np.append(place, np.int32(-1))[factor.codes], levels, factor.ordered)


def _ordered(base: Factor, levels: Any = None) -> Factor:
    return _make_factor(base, levels=levels, ordered=True)


def _relevel(base: Factor, ref: Any) -> Factor:
    first = label(ref)
    if first not in base.levels:
        raise ValueError(f"ref = {first!r} is not among the levels {', '.join(base.levels)}")
    rest = [level for level in base.levels if level != first]
    return _relabel(base, np.array([first, *rest], dtype=object))


FACTOR_CALLS: dict[str, Callable[..., Factor]] = {
    "factor": _make_factor,
    "as.factor": _make_factor,
    "ordered": _ordered,
    "relevel": _relevel,
}

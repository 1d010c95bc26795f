"""Streamed tables: every formula gives the model that it gives in memory, to rounding."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from reference_cases import case_contrasts, case_data, case_ids, load_case

import lmmjax as lmm
from lmmjax.errors import DataError, DesignError
from lmmjax.levels import Gathering, pair, unpair
from lmmjax.rank import ColumnJudge, independent_columns
from lmmjax.stream import build_streamed
from lmmjax.values import Spool, Values


def table(n: int = 400) -> pd.DataFrame:
    """Everything a formula may meet: text, categories, integers, booleans, missing values."""
    rng = np.random.default_rng(4)
    frame = pd.DataFrame(
        {
            "y": rng.normal(size=n) * 3 + 100,
            "x": rng.normal(size=n) * 2 + 5,
            "year": rng.integers(1990, 2020, n) * 1.0,
            "w": rng.uniform(0.5, 2, n),
            "f": rng.choice(list("uvw"), n),
            "o": pd.Categorical(rng.choice(["lo", "mid", "hi"], n), ["lo", "mid", "hi"], True),
            "flag": rng.random(n) > 0.5,
            "g": rng.choice([3, 10, 200, 17, 9], n),
            "h": rng.choice(["b", "a", "d", "c", "e", "zz"], n),
            "k": rng.integers(0, 40, n) * 7,
        }
    )
    frame["one"] = 1.0
    frame["class"] = frame["k"] // 70
    frame["gap"] = frame["x"].where(rng.random(n) > 0.1)
    frame["holes"] = frame["f"].where(rng.random(n) > 0.1)
    frame["wide"] = pd.Categorical(frame["f"], ["none", "w", "v", "u"])
    frame["few"] = frame["h"].where(frame["h"] != "zz", "zz")
    frame.loc[frame["few"] == "zz", "gap"] = np.nan  # the level zz has no complete row
    frame["late"] = np.where(frame["few"] == "zz", -1.0, frame["w"])  # log() of it is missing
    return frame


FORMULAS = [
    ("y ~ x", {}),
    ("y ~ 1 + (1 | g)", {}),
    ("y ~ x + (x | g)", {}),
    ("y ~ year + (year | k)", {}),
    ("y ~ f * x + (1 | g)", {}),
    ("y ~ o + f + (1 | h)", {}),
    ("y ~ o * f + (1 | h)", {"contrasts": {"o": "sum", "f": "helmert"}}),
    ("y ~ 0 + f + x + (0 + x | g)", {}),
    ("y ~ 0 + x + f + (x || g)", {}),
    ("y ~ 0 + one + f + (1 | g)", {}),
    ("y ~ flag + (flag | g)", {}),
    ("y ~ wide + (1 | wide:g)", {}),
    ("y ~ poly(x, 3) + (1 | g)", {}),
    ("y ~ scale(x) + center(year) + (scale(x) | g)", {}),
    ("y ~ poly(scale(x), 2) + I(x - mean(x)) + (1 | g)", {}),
    ("y ~ bs(x, df = 5) + ns(year, df = 3) + (1 | g)", {}),
    ("y ~ I(x > median(x)) + x:f + (1 | k)", {}),
    ("y ~ log(late) + few + (1 | g)", {}),
    ("y ~ gap + few + (1 | h)", {}),
    ("y ~ gap + holes + (gap | few)", {}),
    ("y ~ x + I(2 * x) + f + (1 | g)", {}),
    ("y ~ x + f:o + o:f + (1 | g)", {}),
    ("y ~ factor(g) + (1 | h)", {}),
    ("y ~ relevel(f, ref = 'v') * x + (1 | h)", {}),
    ("y ~ factor(f, levels = c('w', 'u')) + (1 | h)", {}),
    ("y ~ factor(g, labels = c('p', 'q', 'r', 's', 't')) + (1 | factor(k))", {}),
    ("y ~ (f == 'u') + ifelse(h %in% c('a', 'b'), x, 0) + (1 | g)", {}),
    ("y ~ x + (1 | class/k)", {}),
    ("y ~ x + (x | class/k) + (1 | h)", {}),
    ("y ~ x + (1 | g) + (1 | h)", {}),
    ("y ~ x + (1 | g:h:f)", {}),
    ("y ~ x + (f | g) + (0 + x | g)", {}),
    ("y ~ x + diag(1 + x | g) + cs(0 + f | h) + hom(0 + f | k)", {}),
    ("y ~ x + (1 | round(x)) + (1 | year %/% 10)", {}),
    ("y ~ x + (1 | I(x > mean(x)))", {}),
    ("log(y) ~ x + offset(w) + (1 | g)", {"weights": "w", "offset": "2 * x"}),
    ("y ~ gap + (1 | g)", {"weights": "1/w"}),
    ("y ~ I(year + 1e8) + I(1e-6 * x) + (I(year + 1e8) | g)", {}),
]


def arrow(frame: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(frame, preserve_index=False)


def same(streamed: tuple[Any, Any], model: lmm.Model, tolerance: float = 1e-10) -> None:
    """Compare labels, units and cross-products."""
    design, (plan, units, sums, rhs) = streamed
    expected = model.design
    names = "x_names x_terms aliased response n p n_dropped missing has_offset has_weights"
    for name in names.split():
        assert getattr(design, name) == getattr(expected, name), name
    assert design.spec.levels == expected.spec.levels
    assert (design.x_assign == expected.x_assign).all()
    for mine, term in zip(design.terms, expected.terms, strict=True):
        assert (mine.group, mine.names, mine.cov) == (term.group, term.names, term.cov)
        assert list(mine.levels) == list(term.levels)
    assert plan == model._plan
    want = model._units
    close(units.A, want.A, tolerance)
    close(units.beta0, want.beta0, 1e-8)
    assert units.logdet_A == pytest.approx(want.logdet_A, abs=tolerance)
    for got, needed in zip(units.B, want.B, strict=True):
        close(got, needed, tolerance)
    # The scale of y may differ by what weights do to a mean square
    ratio = units.scale / want.scale
    for got, needed in zip(leaves(sums), leaves(model._standard[2]), strict=True):
        close(got, needed, tolerance)
    powers = [1] * (len(leaves(rhs)) - 1) + [2]
    for got, needed, power in zip(leaves(rhs), leaves(model._standard[3]), powers, strict=True):
        close(got * ratio**power, needed, tolerance)
    if not design.has_weights:
        assert ratio == pytest.approx(1.0, abs=tolerance)


def leaves(tree: Any) -> list[np.ndarray]:
    import jax

    return [np.asarray(a) for a in jax.tree.leaves(tree)]


def close(got: Any, needed: Any, tolerance: float) -> None:
    got, needed = np.asarray(got), np.asarray(needed)
    assert got.shape == needed.shape
    size = max(1.0, float(np.max(np.abs(needed), initial=0.0)))
    assert np.max(np.abs(got - needed), initial=0.0) <= tolerance * size


@pytest.mark.parametrize(("formula", "options"), FORMULAS, ids=[f for f, _ in FORMULAS])
def test_equals_memory(formula: str, options: dict[str, Any]) -> None:
    frame = table()
    # A mean near 1e8 is known to 1e-8 only; both routes undo the mean that they subtracted
    tolerance = 1e-8 if "1e8" in formula else 1e-10
    streamed = build_streamed(formula, arrow(frame), rows=37, **options)
    same(streamed, lmm.Model(formula, frame, **options), tolerance)

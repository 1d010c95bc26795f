"""Streamed tables: every formula gives the model that it gives in memory, to rounding."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
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
from lmmjax.formula import parse
from lmmjax.levels import Gathering, pair, unpair
from lmmjax.rank import ColumnJudge, independent_columns
from lmmjax.scout import scout
from lmmjax.source import open_source
from lmmjax.spark import partial_sums, restore
from lmmjax.stream import Encoder, build_streamed, make_encoder
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
    if design.aliased:
        close(design.spec.alias, expected.spec.alias, 1e-9)
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


def test_crossed_factors_by_entry() -> None:
    rng = np.random.default_rng(5)
    n = 700
    frame = pd.DataFrame({"y": rng.normal(size=n), "x": rng.normal(size=n)})
    frame["a"], frame["b"] = rng.integers(0, 300, n), rng.integers(0, 40, n)
    model = lmm.Model("y ~ x + (1 | a) + (1 | b)", frame)
    assert model._plan.layout.sparse
    same(build_streamed("y ~ x + (1 | a) + (1 | b)", arrow(frame), rows=100), model)


# Sources --------------------------------------------------------------------------------------


def parquet(frame: pd.DataFrame, folder: Path, parts: int = 1) -> list[str]:
    """Write the table to several files, dictionaries included."""
    paths = []
    for i, rows in enumerate(np.array_split(np.arange(len(frame)), parts)):
        paths.append(str(folder / f"part{i}.parquet"))
        pq.write_table(arrow(frame.iloc[rows]), paths[-1], row_group_size=23)
    return paths


class Streams:
    """Some other library's table: all it has is an Arrow C stream."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.table.__arrow_c_stream__(requested_schema)


def sources(frame: pd.DataFrame, folder: Path) -> Iterator[tuple[str, Any]]:
    paths = parquet(frame, folder, 3)
    yield "path", str(folder / "one" / "part0.parquet")
    yield "list", paths
    yield "pattern", str(folder / "part*.parquet")
    yield "folder", folder / "one"
    yield "dataset", pads.dataset(paths)
    yield "table", arrow(frame)
    yield "lazy", pl.scan_parquet(paths).with_columns(h=pl.col("h").cast(pl.Categorical))
    yield "frame", pl.read_parquet(paths)
    yield "pandas", frame
    yield "stream", Streams(arrow(frame))


def test_sources(tmp_path: Path) -> None:
    frame = table()
    tmp_path.joinpath("one").mkdir()
    parquet(frame, tmp_path / "one")
    formula = "y ~ o + poly(gap, 2) + (x | h) + (1 | g)"
    model = lmm.Model(formula, frame)
    polars = lmm.Model(formula, pl.read_parquet(tmp_path / "one"))  # has its own order of levels
    for name, source in sources(frame, tmp_path):
        expected = polars if name in ("lazy", "frame") else model
        same(build_streamed(formula, source, rows=50), expected)


def test_duckdb_relation() -> None:
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    frame = table()
    relation = duckdb.from_arrow(arrow(frame)).filter("x > 4")
    formula = "y ~ f + poly(gap, 2) + (x | h) + (1 | g)"
    same(build_streamed(formula, relation), lmm.Model(formula, frame[frame["x"] > 4]))


def test_categories_in_batches_of_their_own(tmp_path: Path) -> None:
    # Each file has its own dictionary; the levels come in the order of all of them
    one = pd.DataFrame({"f": pd.Categorical(list("bab")), "y": [1.0, 2.0, 4.0]})
    two = pd.DataFrame({"f": pd.Categorical(list("cac")), "y": [3.0, 7.0, 5.0]})
    for name, frame in (("1", one), ("2", two)):
        pq.write_table(arrow(frame), tmp_path / f"{name}.parquet")
    both = pq.read_table([tmp_path / "1.parquet", tmp_path / "2.parquet"])
    same(build_streamed("y ~ f", str(tmp_path / "*.parquet")), lmm.Model("y ~ f", both))


def test_integers_with_nulls_keep_their_digits() -> None:
    big = 2**53
    g = pd.array([big + 1, big + 2, None, big + 3] * 10, dtype="Int64")
    frame = pd.DataFrame({"g": g, "y": np.arange(40.0) ** 1.5})
    design, _ = build_streamed("y ~ 1 + (1 | g)", arrow(frame), rows=7)
    assert list(design.terms[0].levels) == [str(big + 1), str(big + 2), str(big + 3)]
    assert design.n == 30
    assert design.missing == {"g": 10}


@pytest.mark.parametrize(
    ("dtype", "low", "step", "count"),
    [
        ("int8", -100, 1, 201),
        ("int8", -120, 3, 80),
        ("int16", -20_000, 100, 400),
        ("uint64", 2**63 - 100, 1, 200),
    ],
)
def test_narrow_and_huge_integers_are_told_apart(
    dtype: str, low: int, step: int, count: int
) -> None:
    values = [low + step * k for k in range(count)] * 2
    g = np.random.default_rng(2).permutation(np.array(values, dtype))
    data = arrow(pd.DataFrame({"g": g, "y": np.arange(2.0 * count) ** 1.5}))
    found = build_streamed("y ~ 1 + (1 | g)", data, rows=50)
    assert list(found[0].terms[0].levels) == [str(v) for v in values[:count]]
    same(found, lmm.Model("y ~ 1 + (1 | g)", data))


# The fitted model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sleepstudy_slope_reml", "sim_unbalanced_woff_ml"])
def test_fit_equals_memory(name: str, tmp_path: Path) -> None:
    case = load_case(name)
    frame = case_data(case).reset_index(drop=True)
    options = {"weights": case["weights"], "contrasts": case_contrasts(case) or None}
    pq.write_table(arrow(frame), tmp_path / "t.parquet", row_group_size=11)
    streamed = lmm.Model.from_table(case["formula"], tmp_path / "t.parquet", **options)
    fit = pickle.loads(pickle.dumps(streamed)).fit(method=case["method"])
    expected = lmm.Model(case["formula"], frame, **options).fit(method=case["method"])
    assert fit.loglik == pytest.approx(expected.loglik, abs=1e-9)
    close(fit.theta, expected.theta, 1e-9)
    for table_ in ("coef_table", "varcorr"):
        mine, theirs = getattr(fit, table_)(), getattr(expected, table_)()
        pd.testing.assert_frame_equal(mine, theirs, rtol=1e-8, atol=1e-10)
    for group in expected.model.groups:
        pd.testing.assert_frame_equal(fit.ranef(group), expected.ranef(group), atol=1e-9)
    new = frame.dropna()
    pd.testing.assert_series_equal(fit.predict(new), expected.predict(new), rtol=1e-9)
    assert "Observations" in repr(streamed)
    assert "Linear mixed model fit by" in str(fit)


@pytest.mark.slow
@pytest.mark.parametrize("name", case_ids())
def test_references_streamed(name: str) -> None:
    case = load_case(name)
    frame = case_data(case).reset_index(drop=True)
    options = {"weights": case["weights"], "contrasts": case_contrasts(case) or None}
    model = lmm.Model(case["formula"], frame, **options)
    same(
        build_streamed(case["formula"], arrow(frame), rows=max(97, len(frame) // 20), **options),
        model,
        1e-9,
    )


def test_rows_are_not_kept() -> None:
    fit = lmm.Model.from_table("y ~ x", arrow(table())).fit()
    for ask in (fit.fitted, fit.residuals, fit.predict, fit.simulate):
        with pytest.raises(DataError, match="keeps no rows"):
            ask()
    with pytest.raises(DataError, match="keeps no rows"):
        _ = fit.model.rows
    assert not hasattr(fit.model.design, "nonsense")


def test_criteria_of_streamed_tables(tmp_path: Path) -> None:
    formulas, frame = ("y ~ 1", "y ~ x"), table()
    fits = [lmm.Model.from_table(f, arrow(frame)).fit(method="ML") for f in formulas]
    kept = [lmm.Model(f, frame).fit(method="ML") for f in formulas]
    pd.testing.assert_frame_equal(lmm.aic_table(*fits), lmm.aic_table(*kept), rtol=1e-8)
    with pytest.raises(lmm.ComparisonError, match="keeps no rows"):
        lmm.lrt(*fits)
    with pytest.raises(lmm.ComparisonError, match="keeps no rows"):
        lmm.aic_table(fits[0], kept[1])
    others = {"rows": frame[:-9], "weights": frame}
    for what, rows in others.items():
        options = {"weights": "I(x^2 + 1)"} if what == "weights" else {}
        other = lmm.Model.from_table("y ~ x", arrow(rows), **options).fit(method="ML")
        with pytest.raises(lmm.ComparisonError, match=f"different .*{what}"):
            lmm.aic_table(fits[0], other)
    reml = [lmm.Model.from_table(f, arrow(frame)).fit() for f in formulas]
    with pytest.raises(lmm.ComparisonError, match="different fixed parts"):
        lmm.aic_table(*reml)
    frame[["x"]].to_csv(tmp_path / "x.csv")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        lmm.Model.from_table("y ~ x", tmp_path / "x.csv")


# Errors ---------------------------------------------------------------------------------------


BAD = [
    ("y ~ nope + (1 | g)", {}, DataError, "found no column nope in the source"),
    ("f ~ x", {}, DataError, "text or a categorical as response f"),
    ("one ~ x", {}, DataError, "constant response"),
    ("y ~ log(x - x) + (1 | g)", {}, DataError, "infinite values"),
    ("y ~ x + (1 | one)", {}, DesignError, "found one level"),
    ("y ~ gap", {"missing": "raise"}, DataError, r"gap \("),
    ("y ~ x", {"missing": "skip"}, DataError, 'expected "drop" or "raise"'),
    ("y ~ x", {"weights": "I(x - 100)"}, DataError, "not positive"),
    ("y ~ x", {"weights": np.ones(400)}, DataError, "array as weights"),
    ("y ~ scale(one)", {}, DataError, "constant column in scale"),
    ("y ~ I(2 * y)", {}, DesignError, "reproduce the response exactly"),
    ("y ~ none", {}, DesignError, "no complete row"),
]


@pytest.mark.parametrize(("formula", "options", "error", "match"), BAD, ids=[b[0] for b in BAD])
def test_errors(formula: str, options: dict, error: type, match: str) -> None:
    frame = table().assign(none=np.nan)
    with pytest.raises(error, match=match):
        build_streamed(formula, arrow(frame), rows=150, **options)


def test_sources_that_cannot_be_read_twice() -> None:
    reader = arrow(table()).to_reader()
    with pytest.raises(DataError, match="can be read once"):
        lmm.Model.from_table("y ~ x", reader)

    class Once(Streams):
        def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
            stream = self.table.__arrow_c_stream__(requested_schema)
            self.table = self.table.slice(0, self.table.num_rows - 9)
            return stream

    with pytest.raises(DataError, match="same table each time"):
        lmm.Model.from_table("y ~ x", Once(arrow(table())))
    with pytest.raises(DataError, match="found no file"):
        lmm.Model.from_table("y ~ x", "nowhere/*.parquet")
    with pytest.raises(DataError, match="found int as source"):
        lmm.Model.from_table("y ~ x", 3)


# Spark ----------------------------------------------------------------------------------------


SPARK_FORMULA = "y ~ f + poly(gap, 2) + (x | k) + (1 | g) + (1 | class)"


def encoder_of(formula: str, frame: pd.DataFrame) -> Encoder:
    source = open_source(arrow(frame))
    found = scout(parse(formula), source, None, None, False, 100)
    return make_encoder(found, {}, True)


def test_partial_sums_add() -> None:
    # What Spark does with the encoder: partitions apart, rows of sums added by key
    frame = table()
    encoder = pickle.loads(pickle.dumps(encoder_of(SPARK_FORMULA, frame)))
    columns = list(encoder.learned.columns)
    parts = [frame[columns].iloc[rows] for rows in np.array_split(np.arange(len(frame)), 5)]
    run = partial_sums(encoder)
    rows = [b for part in parts for b in run(iter(arrow(part).to_batches(max_chunksize=30)))]
    added = pa.Table.from_batches(rows).to_pandas().groupby(["part", "row", "block"]).sum()
    mine = restore(encoder, iter(arrow(added.reset_index()).to_batches()))
    whole = encoder.sum(iter(arrow(frame[columns]).to_batches()))
    assert mine.counts.rows == whole.counts.rows == len(frame)
    assert mine.counts.missing == whole.counts.missing == {"gap": int(frame["gap"].isna().sum())}
    assert mine.counts.complete == whole.counts.complete
    for key, used in whole.counts.leaves.items():
        assert (mine.counts.leaves[key] == used).all()
    for key, array in whole.totals.flat.items():
        close(mine.totals.flat[key], array, 1e-12)
    for got, needed in zip(mine.totals.levels, whole.totals.levels, strict=True):
        for a, b in zip(got, needed, strict=True):
            close(a, b, 1e-12)


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    sql = pytest.importorskip("pyspark.sql", reason="pyspark is not installed")
    builder = sql.SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    builder = builder.config("spark.sql.shuffle.partitions", "2")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Spark needs Java, and there is none on this machine")
    with pytest.MonkeyPatch.context() as patch:  # the workers' Python must have lmmjax too
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        session = builder.getOrCreate()
    yield session
    session.stop()


@pytest.mark.filterwarnings("ignore")
def test_spark(spark: Any) -> None:
    frame = table()[["y", "f", "gap", "x", "k", "g", "class"]]
    source = spark.createDataFrame(frame.astype({"f": object})).repartition(3)
    same(build_streamed(SPARK_FORMULA, source, rows=64), lmm.Model(SPARK_FORMULA, frame))


# Parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [-np.inf, 0.0])
def test_spool_equals_memory(low: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmmjax.values.CHUNK", 64)
    monkeypatch.setattr("lmmjax.values._FEW", 10)
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.normal(size=300), np.repeat([0.5, -0.0, 0.0, 1e300], 40), [np.nan]])
    spool = Spool()
    for part in np.array_split(x, 7):
        spool.append(part)
    memory, probs = Values(x), np.array([0.0, 0.01, 0.3, 0.5, 0.77, 1.0])
    np.testing.assert_allclose(
        spool.quantiles(probs, low), memory.quantiles(probs, low), rtol=1e-15
    )
    assert spool.size == memory.size == 460
    assert (spool.min(), spool.max()) == (memory.min(), memory.max())
    assert spool.mean() == pytest.approx(memory.mean(), rel=1e-14)
    assert spool.distinct(5) > 5
    spool.close()


def test_gathering_numbers_by_arrival() -> None:
    gathering = Gathering("g")
    parts = [[7, 3], [3, 10**12], [-5, 7, 10**12], [2**39, 3]]
    codes = [gathering.codes(pd.Series(p)) for p in parts]
    assert [c.tolist() for c in codes] == [[1, 0], [0, 2], [3, 1, 2], [4, 0]]
    gathering.mark(np.array([0, 3]))
    levels, rank = gathering.freeze()
    assert list(levels.keys) == [-5, 3, 7, 2**39, 10**12]
    assert levels.used.tolist() == [True, True, False, False, False]
    assert rank.tolist() == [1, 2, 4, 0, 3, -1]
    assert levels.codes(pd.Series([10**12, -5])).tolist() == [4, 0]
    a, b = unpair(pair(np.array([3, 2**30], np.int32), np.array([2**30, 0], np.int32)))
    assert (a.tolist(), b.tolist()) == ([3, 2**30], [2**30, 0])


@pytest.mark.parametrize("intercept", [True, False])
def test_judge_of_columns_equals_memory(intercept: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 3))
    columns = [np.ones(90), x[:, 0], 2 * x[:, 0] - 3, np.full(90, 4.0), x[:, 1], x.sum(axis=1)]
    X = np.column_stack([*columns, x[:, 2], x[:, 1] + 1e-6 * x[:, 2]])
    X = X if intercept else X[:, 1:]
    judge = ColumnJudge(intercept)
    for part in np.array_split(X, 8):
        judge.add(part)
    assert judge.keep().tolist() == independent_columns(X, intercept).tolist()

"""Parts and a table to arrays, against R's model.matrix and lme4's lFormula."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import polars as pl
import pytest
from reference_cases import REFERENCE

from lmmjax.datasets import load_dataset
from lmmjax.design import build_design, check_identifiable
from lmmjax.errors import DataError, DesignError, FormulaError
from lmmjax.rank import clearly_independent, independent_columns

R = json.loads((REFERENCE / "design.json").read_text(encoding="utf-8"))
NAMES = json.loads((REFERENCE / "formula_names.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def r_table():
    """Return the table of reference/design.R."""
    frame = pd.DataFrame(R["data"])
    frame["o"] = pd.Categorical(frame["o"], ["lo", "mid", "hi", "top", "max"], ordered=True)
    return frame


@pytest.fixture
def table():
    """Return 60 rows with numbers, text, booleans and six groups of ten."""
    rng = np.random.default_rng(1)
    n = 60
    return pd.DataFrame(
        {
            "y": rng.normal(size=n),
            "x": rng.normal(size=n),
            "z": rng.normal(size=n),
            "w": rng.uniform(1, 2, n),
            "g": np.repeat(list("abcdef"), 10),
            "h": np.tile([1.0, 2.0, 3.5], 20),
            "f": np.tile(["u", "v"], 30),
            "flag": rng.random(n) > 0.5,
        },
        index=[f"r{i}" for i in range(n)],
    )


def weighted(matrix):
    """Return k %*% M as reference/design.R does."""
    n = len(matrix)
    return np.arange(1, n + 1) / n @ matrix


# Against R ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", R["formulas"], ids=lambda case: case["formula"])
def test_equals_lme4(case, r_table):
    design = build_design(case["formula"], r_table)
    assert list(design.x_names) == case["names"]
    np.testing.assert_allclose(weighted(design.X), case["X"], atol=1e-9)
    np.testing.assert_allclose(weighted(design.y), case["y"], atol=1e-10)
    np.testing.assert_allclose(weighted(design.offset), case["offset"] or 0.0, atol=1e-10)
    # lme4 sorts terms by their number of levels; lmmjax keeps formula order.
    keys = zip(case["groups"], map(tuple, case["columns"]), strict=True)
    place = {key: i for i, key in enumerate(keys)}
    assert len(design.terms) == len(place)
    for term in design.terms:
        i = place[term.group, term.names]
        assert list(term.levels) == case["levels"][i]
        np.testing.assert_allclose(weighted(term.codes), case["codes"][i], atol=1e-10)
        np.testing.assert_allclose(weighted(term.z), case["z"][i], atol=1e-9)


@pytest.mark.parametrize("case", R["contrasts"], ids=lambda case: case["contrast"])
def test_contrasts_equal_r(case, r_table):
    # R: model.matrix(~ a*b + o, d, contrasts.arg = list(a = "contr.sum", o = "contr.sum"))
    kinds = {"a": case["contrast"], "o": case["contrast"].removeprefix("contr.")}
    design = build_design("y ~ a*b + o", r_table, contrasts=kinds)
    assert list(design.x_names) == case["names"]
    np.testing.assert_allclose(weighted(design.X), case["X"], atol=1e-10)


@pytest.mark.parametrize("case", NAMES, ids=lambda case: f"{case['data']}: {case['formula']}")
def test_names_of_the_reference_fits(case):
    path = REFERENCE / "data" / f"{case['data']}.parquet"
    frame = pd.read_parquet(path) if path.exists() else load_dataset(case["data"])
    design = build_design(case["formula"], frame, weights=case["weights"])
    assert list(design.x_names) == case["x_names"]
    assert design.n == case["nobs"]
    for group, columns in case["random"] or []:  # lme4's columns by factor, terms joined
        mine = [name for term in design.terms if term.group == group for name in term.names]
        assert mine == columns


def test_labels_of_terms(table):
    design = build_design("y ~ f*x + I(2*x) + (1 | g)", table)
    assert design.x_terms == ("(Intercept)", "f", "x", "I(2 * x)", "f:x")
    assert design.x_assign.tolist() == [0, 1, 2, 4]
    assert design.aliased == ("I(2 * x)",)
    assert design.spec.term_variables["f:x"] == ("f", "x")
    assert design.spec.levels == {"f": ("u", "v"), "x": None}
    cell_means = build_design("y ~ 0 + f + x", table)
    assert cell_means.x_terms == ("f", "x")
    assert cell_means.x_assign.tolist() == [0, 0, 1]


def test_single_columns_have_no_number(table):
    # R: colnames(model.matrix(~ poly(x, 1) + ns(x, df = 1) + poly(x, 2)))
    design = build_design("y ~ poly(x, 1) + ns(z, df=1) + poly(w, 2)", table)
    names = ("poly(x, 1)", "ns(z, df = 1)", "poly(w, 2)1", "poly(w, 2)2")
    assert design.x_names[1:] == names


def test_contrasts_leave_random_effects_alone(r_table):
    # R: lFormula(y ~ a + (a | g), d, contrasts = list(a = "contr.sum"))$reTrms$cnms
    design = build_design("y ~ a + (a | g)", r_table, contrasts={"a": "sum"})
    assert design.x_names == ("(Intercept)", "a1", "a2")
    assert design.terms[0].names == ("(Intercept)", "aq", "ar")


# New data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", R["formulas"], ids=lambda case: case["formula"])
def test_new_data_repeat_the_training_coding(case, r_table):
    design = build_design(case["formula"], r_table)
    rows = slice(7, 12)
    new = pickle.loads(pickle.dumps(design)).spec.new(r_table.iloc[rows])
    np.testing.assert_allclose(new.X, design.X[rows], atol=1e-11)
    np.testing.assert_allclose(new.offset, design.offset[rows])
    for mine, term in zip(new.terms, design.terms, strict=True):
        np.testing.assert_allclose(mine.z, term.z[rows], atol=1e-11)
        assert (mine.codes == term.codes[rows]).all()
        assert (mine.labels == term.levels[term.codes[rows]]).all()
    assert new.rows.equals(r_table.index[rows])


def test_splines_go_on_outside_the_boundary(table):
    # R: predict(ns(x, knots=4, Boundary.knots=c(1, 9)), ...) is linear outside, bs() cubic.
    x = np.linspace(1, 9, 60)
    spec = build_design("y ~ ns(x, df=3) + bs(x, df=4)", table.assign(x=x)).spec
    far = spec.new({"x": np.array([9.0, 10.0, 11.0, 12.0, 13.0])}).X
    np.testing.assert_allclose(np.diff(far[:, 1:4], 2, axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(np.diff(far[:, 4:], 4, axis=0), 0, atol=1e-9)


def test_summaries_remember_training(table):
    design = build_design("y ~ I(x - mean(x)) + I(z/sd(z))", table)
    new = design.spec.new({"x": [0.0], "z": [1.0]})
    expected = [1, -table.x.mean(), 1 / table.z.std()]
    np.testing.assert_allclose(new.X[0], expected)


def test_new_levels_of_groups(table):
    spec = build_design("y ~ x + (1 | h) + (x | g:f)", table).spec
    newdata = {"x": [0, 1, 2], "h": [1, 9, 3.5], "g": ["a", "b", None], "f": ["u", "q", "u"]}
    first, second = spec.new(newdata).terms
    assert first.codes.tolist() == [0, -1, 2]
    assert first.labels.tolist() == ["1", "9", "3.5"]
    assert second.codes.tolist() == [0, -1, -1]
    assert second.labels.tolist() == ["a:u", "b:q", "NA"]
    assert spec.new({"x": [0]}, random=False).terms == ()


def test_missing_values_stay_in_new_data(table):
    new = build_design("y ~ x + f", table).spec.new({"x": [np.nan, 1], "f": ["u", None]})
    np.testing.assert_array_equal(new.X, [[1, np.nan, 0], [1, 1, np.nan]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"f": "q"}, "level 'q' of f in newdata"),
        ({"x": np.inf}, "infinite values in x"),
        ({"x": "a"}, "in x of newdata; expected numbers"),
        ({"x": None}, "no column x in newdata"),
        ({"z": None}, "no column z in newdata"),
    ],
)
def test_new_data_errors(table, change, words):
    spec = build_design("y ~ x + f", table, offset="z").spec
    new = table[:3].assign(**change)
    new = new.drop(columns=[name for name, value in change.items() if value is None])
    with pytest.raises(DataError, match=words):
        spec.new(new)


def test_offset_of_new_data(table):
    by_name = build_design("y ~ x + offset(2*z)", table, offset="z").spec
    np.testing.assert_allclose(by_name.new(table[:3]).offset, 3 * table.z[:3])
    by_array = build_design("y ~ x", table, offset=np.arange(60)).spec
    assert by_array.new(table[:2], offset=[5, 6]).offset.tolist() == [5, 6]
    with pytest.raises(DataError, match="array as offset="):
        by_array.new(table[:2])
    with pytest.raises(DataError, match="found 1 values in offset and 2 rows"):
        by_array.new(table[:2], offset=[5])
    with pytest.raises(DataError, match="without offset="):
        build_design("y ~ x", table).spec.new(table[:2], offset=[5, 6])


# Tables ---------------------------------------------------------------------------------------


def same(a, b):
    assert a.x_names == b.x_names
    np.testing.assert_array_equal(a.X, b.X)
    for s, t in zip(a.terms, b.terms, strict=True):
        np.testing.assert_array_equal(s.codes, t.codes)
        assert s.levels.tolist() == t.levels.tolist()


@pytest.mark.parametrize("kind", ["polars", "lazy", "arrow", "dict", "pyarrow dtypes"])
def test_any_table(table, kind):
    formula = "y ~ x*f + flag + (x | g) + (1 | h)"
    plain = pl.from_pandas(table)
    other = {
        "polars": plain,
        "lazy": plain.lazy(),
        "arrow": plain.to_arrow(),
        "dict": {name: table[name].to_numpy() for name in table},
        "pyarrow dtypes": table.convert_dtypes(dtype_backend="pyarrow"),
    }[kind]
    design = build_design(formula, other)
    same(design, build_design(formula, table))
    expected = table.index if kind == "pyarrow dtypes" else pd.RangeIndex(60)
    assert design.rows.equals(expected)


def test_level_order(table):
    table["c"] = pd.Categorical(table.f, ["v", "none", "u"])
    assert build_design("y ~ c", table).x_names == ("(Intercept)", "cu")
    assert build_design("y ~ x + (1 | c)", table).terms[0].levels.tolist() == ["v", "u"]
    frame = pl.from_pandas(table.drop(columns="c"))
    frame = frame.with_columns(
        enum=pl.col("f").cast(pl.Enum(["v", "none", "u"])), text=pl.col("f").cast(pl.Categorical)
    )
    assert build_design("y ~ enum", frame).x_names == ("(Intercept)", "enumu")
    assert build_design("y ~ text", frame).x_names == ("(Intercept)", "textv")


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ([10, 9, 1], ["1", "9", "10"]),
        ([10.0, 9.0, 0.5], ["0.5", "9", "10"]),
        ([10**12, 5, -3], ["-3", "5", "1000000000000"]),
        ([True, False, True], ["FALSE", "TRUE"]),
        (["b", "a", "c"], ["a", "b", "c"]),
        (pd.to_datetime(["2020-01-02", "2020-01-01", "2020-01-02"]), ["2020-01-01", "2020-01-02"]),
    ],
)
def test_grouping_columns(table, values, levels):
    table["k"] = np.tile(np.asarray(values), 20)
    term = build_design("y ~ x + (1 | k)", table).terms[0]
    assert term.levels.tolist() == levels
    assert term.codes.dtype == np.int32
    assert all(isinstance(level, str) for level in term.levels)


def test_nullable_and_object_columns(table):
    table["i"] = pd.array([1, 2, None] * 20, dtype="Int64")
    table["b"] = pd.array([True, False, None, True] * 15, dtype="boolean")
    table["ob"] = pd.Series([1, 2.5] * 30, dtype=object, index=table.index)
    design = build_design("y ~ i + b + ob + (1 | i)", table)
    assert design.x_names == ("(Intercept)", "i", "bTRUE", "ob")
    assert design.terms[0].levels.tolist() == ["1", "2"]
    assert design.missing == {"i": 20, "b": 15}


def test_caller_is_left_alone(table):
    before = table.copy(deep=True)
    design = build_design("y ~ x + log(w) + (x | g)", table, weights="w", offset="z")
    y, weights = design.y.copy(), design.weights.copy()
    pd.testing.assert_frame_equal(table, before)
    table.loc[:, ["y", "w", "z"]] = 0.0
    np.testing.assert_array_equal(design.y, y)
    np.testing.assert_array_equal(design.weights, weights)


def test_group_of_huge_integers(table):
    table["id"] = np.repeat(np.array([2**60, 2**60 + 1, 2**60 + 2]), 20)
    levels = build_design("y ~ x + (1 | id)", table).terms[0].levels
    assert levels.tolist() == [str(2**60 + k) for k in range(3)]


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        ("int8", -100, 100),
        ("int8", -128, 127),
        ("int16", -20_000, 20_000),
        ("int32", -(2**31), -(2**31) + 300),
        ("uint8", 0, 255),
        ("uint64", 2**64 - 300, 2**64 - 1),
        ("uint64", 2**63 - 150, 2**63 + 150),
        ("Int8", -100, 100),
    ],
)
def test_groups_of_any_integers(dtype, low, high):
    wanted = [low + 1, high - 1, high, low, *range(low, min(low + 241, high), 7)] * 300
    values = np.array(wanted, dtype.lower())
    frame = pd.DataFrame({"id": pd.Series(values, dtype=dtype), "y": np.arange(len(values)) ** 0.5})
    term = build_design("y ~ 1 + (1 | id)", frame).terms[0]
    assert term.levels.tolist() == [str(v) for v in sorted(set(wanted))]
    assert term.levels[term.codes].tolist() == [str(v) for v in wanted]


def test_responses_are_float64(table):
    for text in ("np.greater(y, 0)", "np.rint(10 * y)", "np.int64(np.rint(10 * y))", "y > 0", "I8"):
        frame = table.assign(I8=np.arange(60).astype(np.int8))
        y = build_design(f"{text} ~ x + (1 | g)", frame).y
        assert y.dtype == np.float64, text
    np.testing.assert_array_equal(
        build_design("np.greater(y, 0) ~ x + (1 | g)", table).y, table.y > 0
    )


def test_ambiguous_combinations(table):
    table["a"] = np.where(table.f == "u", "p", "p:q")
    table["b"] = np.where(table.f == "u", "q:r", "r")
    with pytest.raises(DataError, match="print alike"):
        build_design("y ~ x + (1 | a:b)", table)


# Missing values, weights, offsets -------------------------------------------------------------


def test_missing_values_are_dropped_and_counted(table):
    table.loc["r3", "x"] = np.nan
    table.loc[["r3", "r4"], "g"] = None
    table.loc["r5", "w"] = np.nan
    offset = np.zeros(60)
    offset[6] = np.nan
    design = build_design("y ~ x + (1 | g)", table, weights="w", offset=offset)
    assert design.missing == {"x": 1, "g": 2, "w": 1, "offset": 1}
    assert design.n_dropped == 4
    assert design.rows.equals(table.index.drop(["r3", "r4", "r5", "r6"]))
    with pytest.raises(DataError, match=r"4 rows: x \(1\), g \(2\), w \(1\), offset \(1\)"):
        build_design("y ~ x + (1 | g)", table, weights="w", offset=offset, missing="raise")


def test_nan_made_by_a_transform_is_counted(table):
    design = build_design("y ~ log(x)", table)
    assert design.missing == {"log(x)": int((table.x < 0).sum())}


def test_levels_that_vanish_with_missing_rows(table):
    table.loc[table.g == "b", "x"] = np.nan
    design = build_design("y ~ x + g + (1 | g)", table)
    assert design.x_names == ("(Intercept)", "x", "gc", "gd", "ge", "gf")
    assert design.terms[0].levels.tolist() == list("acdef")


def test_weights_and_offsets(table):
    design = build_design("y ~ x + offset(z) + offset(2*x)", table, weights="1/w", offset="w")
    np.testing.assert_allclose(design.weights, 1 / table.w)
    np.testing.assert_allclose(design.offset, table.z + 2 * table.x + table.w)
    assert design.has_weights
    assert design.has_offset
    plain = build_design("y ~ x", table)
    assert not plain.has_weights
    assert not plain.has_offset
    assert plain.offset.tolist() == [0.0] * 60
    assert plain.weights.tolist() == [1.0] * 60


# Rank -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "aliased"),
    [
        ("y ~ x + I(2*x) + z", ("I(2 * x)",)),
        ("y ~ I(0*x + 3) + x", ("I(0 * x + 3)",)),
        ("y ~ f + I(f == 'u')", ('I(f == "u")TRUE',)),
        ("y ~ far", ()),
        ("y ~ far*f", ()),
        ("y ~ 0 + f + far", ()),
        ("y ~ far + I(2*far + 5)", ("I(2 * far + 5)",)),
        ("y ~ year + I(year^2)", ()),
        ("y ~ x + I(x + 1e-9*z)", ("I(x + 1e-09 * z)",)),
        ("y ~ I(1e-12*x) + I(1e12*z)", ()),
    ],
)
def test_rank(table, formula, aliased):
    table["far"] = table.x + 1e8
    table["year"] = 2000 + np.arange(60) % 12
    design = build_design(formula, table)
    assert design.aliased == aliased
    assert design.X.shape == (60, len(design.x_names))


def test_empty_cells(table):
    # R: names(which(is.na(coef(lm(y ~ f*g, d)))))
    design = build_design("y ~ f*g", table[(table.f != "u") | (table.g != "a")])
    assert design.aliased == ("fv:gf",)


def test_both_rank_checks_agree():
    rng = np.random.default_rng(0)
    for trial in range(200):
        n, p = 30, 6
        X = np.column_stack([np.ones(n), rng.normal(size=(n, p - 1))])
        if trial % 2:
            X[:, 4] = X[:, 1] - 2 * X[:, 2]
        keep = independent_columns(X, True)
        assert keep.tolist() == [True] * 4 + [trial % 2 == 0, True]
        assert clearly_independent(X, True) == keep.all()


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "change", "options", "error", "words"),
    [
        ("y ~ xx", {}, {}, DataError, "Did you mean x"),
        ("y ~ x + (1 | G)", {}, {}, DataError, "Did you mean g"),
        ("y ~ x", {}, {"weights": "q"}, DataError, "no column q"),
        ("f ~ x", {}, {}, DataError, "response f"),
        ("y ~ x", {"y": np.nan}, {}, DesignError, r"no complete row .*y \(60\)"),
        ("y ~ x", {"y": 3.0}, {}, DataError, "constant response"),
        ("y ~ x", {}, {"offset": "y"}, DataError, "response minus offset"),
        ("y ~ x", {"x": np.inf}, {}, DataError, "60 infinite values in x"),
        ("y ~ I(1/x)", {"x": 0.0}, {}, DataError, r"infinite values in I\(1/x\)"),
        ("y ~ x", {"w": 0.0}, {"weights": "w"}, DataError, "not positive"),
        ("y ~ x", {}, {"weights": np.ones(5)}, DataError, "5 values in weights and 60 rows"),
        ("y ~ x", {}, {"weights": np.ones((60, 2))}, DataError, "one number a row"),
        ("y ~ x + (1 | g)", {"g": "a"}, {}, DesignError, r"one level \(a\)"),
        ("y ~ x + f", {"f": "u"}, {}, DesignError, "one level"),
        ("y ~ d", {"d": pd.Timestamp("2020-01-01")}, {}, DataError, "datetime64"),
        ("y ~ d", {"d": [1, "a"] * 30}, {}, DataError, "mixed-integer"),
        ("y ~ d + x", {"d": [1j, 2j] * 30}, {}, DataError, "complex"),
        ("y ~ log(f)", {}, {}, DataError, "numbers were expected"),
        ("y ~ sqr(x)", {}, {}, FormulaError, r"did you mean sqrt\(\)"),
        ("cbind(y, x) ~ z", {}, {}, FormulaError, "unknown function cbind"),
        ("y ~ log(x, bass=2)", {}, {}, FormulaError, "bass"),
        ("y ~ poly(x, 100)", {}, {}, DataError, "lower degree"),
        ("y ~ bs(x, df=2)", {}, {}, FormulaError, "at least 3"),
        ("y ~ scale(x)", {"x": 1.0}, {}, DataError, "constant column in scale"),
        ("y ~ c(1, 2)", {}, {}, FormulaError, "one value for each"),
        ("y ~ f < 'v'", {}, {}, FormulaError, "compared by =="),
        ("y ~ relevel(f, ref='q')", {}, {}, FormulaError, "not among the levels"),
        ("y ~ x", {}, {"missing": "ignore"}, DataError, 'expected "drop" or "raise"'),
        ("y ~ f", {}, {"contrasts": {"f": "foo"}}, DesignError, "treatment, sum, helmert, poly"),
        ("y ~ f", {}, {"contrasts": {"q": "sum"}}, DesignError, "does not use"),
        ("y ~ x", {}, {"contrasts": {"x": "sum"}}, DesignError, "numeric"),
        ("y ~ f", {}, {"contrasts": "sum"}, DesignError, "expected a dict"),
    ],
)
def test_bad_input(table, formula, change, options, error, words):
    with pytest.raises(error, match=words):
        build_design(formula, table.assign(**change), **options)


def test_bad_tables(table):
    with pytest.raises(DataError, match="2 columns named 'x'"):
        build_design("y ~ x", pd.concat([table, table[["x"]]], axis=1))
    with pytest.raises(DataError, match="found NoneType as data"):
        build_design("y ~ x", None)
    with pytest.raises(DataError, match=r"unequal length in data \(y: 3, x: 2\)"):
        build_design("y ~ x", {"y": [1, 2, 3], "x": [1, 2]})
    with pytest.raises(DesignError, match="no complete row in 0 rows"):
        build_design("y ~ x", table[:0])


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        ("y ~ x + (1 | k)", "60 levels x 1 columns"),
        ("y ~ x + (poly(x, 9) | g)", "6 levels x 10 columns = 60"),
        ("y ~ poly(x, 59)", "60 fixed effects and 60 rows"),
    ],
)
def test_what_only_priors_identify(table, formula, words):
    design = build_design(formula, table.assign(k=range(60)))
    with pytest.raises(DesignError, match=words):
        check_identifiable(design)
    check_identifiable(build_design("y ~ x + (x | g)", table))


@pytest.mark.parametrize(
    "formula",
    ["y ~ np.log1p(w)", "y ~ np.load('a')", "y ~ __import__('os')", "y ~ x.__class__(1)"],
)
def test_safe_formulas(table, formula):
    with pytest.raises(FormulaError, match="formulas know"):
        build_design(formula, table, safe=True)


def test_numpy_functions(table):
    design = build_design("y ~ np.log1p(w)", table)
    np.testing.assert_allclose(design.X[:, 1], np.log1p(table.w))
    assert build_design("y ~ log1p(w) + poly(x, 2)", table, safe=True).p == 4


def test_import_is_light():
    code = (
        "import sys; from lmmjax.design import build_design; "
        "build_design('y ~ x', {'y': [1., 2., 4.], 'x': [1, 2, 5]}); "
        "print([m for m in ('formulaic', 'polars', 'scipy.interpolate') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_million_rows():
    rng = np.random.default_rng(0)
    n = 1_000_000
    frame = pd.DataFrame(rng.normal(size=(n, 4)), columns=["y", "x1", "x2", "x3"])
    frame["g"] = rng.integers(0, 100_000, n)
    design = build_design("y ~ x1 + x2 + x3 + (x1 | g)", frame)
    assert design.terms[0].z.shape == (n, 2)
    assert design.X.flags.f_contiguous

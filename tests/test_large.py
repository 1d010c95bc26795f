"""Large tables: products by blocks, rows made when read, fits in small programs."""

from __future__ import annotations

import gc
import pickle
import warnings
from collections.abc import Callable

import jax
import numpy as np
import pandas as pd
import polars as pl
import pytest

import lmmjax as lmm
from lmmjax import blocks, compiling, design, estimate, gram, threads
from lmmjax.evaluate import Factor
from lmmjax.late import moments_of, replaced
from lmmjax.texts import Texts, given

FORMULAS = [
    "y ~ x + v + (x | g)",
    "y ~ x + (v | g)",
    "y ~ x + f + (1 | g)",
    "y ~ x + I(x^2) + (0 + x | g)",
    "y ~ x * f + (x + v || g)",
    "y ~ poly(x, 2) + (poly(x, 2) | g)",
    "y ~ x + offset(o) + (x | g) + (1 | h)",
    "y ~ x + (x | g) + (v | small)",
    "y ~ log(v) + (0 + f | h)",
    "y ~ x + v",
    "y ~ x + (x | h/g)",
    "y ~ x + (f:x | h)",
    "y ~ x + f:x + (0 + f:v | h) + (v | g)",
]


@pytest.fixture
def table() -> pd.DataFrame:
    """700 rows; g in h, ``small`` crossed with both."""
    rng = np.random.default_rng(3)
    n, g = 700, rng.integers(0, 40, 700)
    return pd.DataFrame(
        {
            "y": rng.normal(size=n) + 50 + rng.normal(size=40)[g],
            "x": rng.normal(size=n) * 3 + 200,
            "v": rng.uniform(1, 2, n),
            "o": rng.normal(size=n) * 10,
            "f": rng.choice(["a", "b", "c"], n),
            "g": g,
            "h": g // 5,
            "small": rng.integers(0, 3, n),
        }
    )


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table of more than 64 rows counts as large."""
    monkeypatch.setattr(design, "LARGE", 64)
    monkeypatch.setattr(blocks, "LARGE", 64)


def in_data_units(model: lmm.Model) -> list[np.ndarray]:
    """Products of the chain and of X, the units taken off again."""
    plan, units, g, rhs = model._standard
    d, A = plan.layout.d, np.linalg.inv(units.A)
    out = [A.T @ g.core[d:, d:] @ A]
    out.append(units.scale * A.T @ rhs.core[d:] + out[0] @ units.beta0)
    for i, factor in enumerate(plan.factors[: plan.n_chain]):
        B = np.linalg.inv(_block([units.B[k] for k in factor.terms]))
        zx = np.einsum("st,tpj,pq->sqj", B.T, g.border[i][:, d:], A)
        zy = units.scale * np.einsum("st,tj->sj", B.T, rhs.border[i])
        out += [np.einsum("st,tuj,uv->svj", B.T, g.own[i], B), zx]
        out.append(zy + np.einsum("spj,p->sj", zx, units.beta0))
    return [*out, *(a for row in g.parent for a in row)]


def _block(blocks: list[np.ndarray]) -> np.ndarray:
    from scipy.linalg import block_diag

    return block_diag(*blocks)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("sort", [False, True])
def test_products_by_blocks_equal_those_of_the_whole(
    formula: str, sort: bool, table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table.sort_values("g", ignore_index=True) if sort else table
    whole = lmm.Model(formula, table)
    expected, start = in_data_units(whole), whole.theta0
    monkeypatch.setattr(design, "LARGE", 64)
    monkeypatch.setattr(blocks, "LARGE", 64)
    model = lmm.Model(formula, table)
    assert blocks.products(model.design, gram.plan(model.design)) is not None
    for found, wanted in zip(in_data_units(model), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-9 * np.abs(wanted).max())
    np.testing.assert_allclose(model.theta0, start, rtol=1e-7)
    np.testing.assert_allclose(model._units.A, whole._units.A, rtol=1e-9, atol=1e-12)
    for B, wanted in zip(model._units.B, whole._units.B, strict=True):
        np.testing.assert_allclose(B, wanted, rtol=1e-9, atol=1e-12)


COLUMNS = {
    "int8": lambda x: (x - 200).round().astype("int8"),
    "int64": lambda x: (10 * x).round().astype("int64"),
    "bool": lambda x: x > 200,
    "boolean": lambda x: (x > 200).astype("boolean"),
    "float32": lambda x: x.astype("float32"),
    "Float64": lambda x: x.astype("Float64"),
    "Int32": lambda x: (10 * x).round().astype("Int32"),
    "double[pyarrow]": lambda x: x.astype("double[pyarrow]"),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_any_type_by_blocks(
    kind: str, table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As response, fixed effect and slope; equal to the float64 columns of the whole."""
    logical = kind.startswith("bool")
    table["c"] = COLUMNS[kind](table["x"])
    table["d"] = COLUMNS[kind]((table["y"] - 50) * 3 + 200)
    formula = "d ~ c + v + (c | g)"
    plain = table.assign(c=table["c"].astype(float), d=table["d"].astype(float))
    expected = in_data_units(lmm.Model(formula, plain))
    monkeypatch.setattr(design, "LARGE", 64)
    monkeypatch.setattr(blocks, "LARGE", 64)
    model = lmm.Model(formula, table)
    assert model.design.x_names[1] == ("cTRUE" if logical else "c")
    assert blocks.products(model.design, gram.plan(model.design)) is not None
    for found, wanted in zip(in_data_units(model), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-9 * np.abs(wanted).max())


@pytest.mark.usefixtures("large")
def test_no_matrix_is_made_before_its_rows_are_read(table: pd.DataFrame) -> None:
    model = lmm.Model("y ~ x + f + (x | g)", table)
    assert model.theta0.shape == (3,)
    assert given(model.design, "X").array is None
    assert given(model.design.terms[0], "z").array is None
    assert model.design.X.shape == (700, 4)
    assert given(model.design, "X").array is model.design.X


@pytest.mark.parametrize("formula", FORMULAS)
def test_late_rows_have_the_same_bits_also_after_pickling(
    formula: str, table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.loc[[3, 90], "x"] = np.nan
    early = lmm.Model(formula, table).design
    monkeypatch.setattr(design, "LARGE", 64)
    late = lmm.Model(formula, table).design
    for found in (late, pickle.loads(pickle.dumps(late))):
        for name in ("X", "y", "offset", "weights"):
            np.testing.assert_array_equal(getattr(found, name), getattr(early, name))
        for t, wanted in zip(found.terms, early.terms, strict=True):
            np.testing.assert_array_equal(t.z, wanted.z)
            np.testing.assert_array_equal(t.codes, wanted.codes)
            assert list(t.levels) == list(wanted.levels)


KINDS = ["float64", "Float64", "float64[pyarrow]", "arrays", "series", "polars"]


def _written_to(kind: str, table: pd.DataFrame, names: str) -> tuple[object, Callable[[], None]]:
    """Data of a kind, and what writes to its columns afterwards."""
    if kind == "arrays":
        arrays = {name: table[name].to_numpy().copy() for name in table}

        def fill() -> None:
            for c in names:
                arrays[c].fill(1.0)

        return arrays, fill
    if kind == "series":
        series = {c: table[c].astype("Float64") if c in names else table[c] for c in table}

        def write_series() -> None:
            for c in names:
                series[c].iloc[2:90] = 1.0

        return series, write_series
    if kind == "polars":
        frame = pl.from_pandas(table)

        def write() -> None:
            for c in names:
                frame[3, c] = 1.0
                frame.get_column(c)[5] = 2.0

        return frame, write
    data = table.copy()
    for c in names:
        data[c] = pd.array(table[c].to_numpy().copy(), dtype=kind)

    def write_slices() -> None:
        for c in names:
            data.loc[10:400, c] = 1.0
            data.iloc[500:, data.columns.get_loc(c)] = 2.0
        data.loc[:, names[0]] = 3.0

    return data, write_slices


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("kind", KINDS)
def test_writing_to_the_data_afterwards_changes_nothing(
    kind: str, size: str, table: pd.DataFrame, request: pytest.FixtureRequest
) -> None:
    if size == "large":
        request.getfixturevalue("large")
    data, write = _written_to(kind, table, "yxv")
    model = lmm.Model("y ~ x + (v | g)", data)
    gc.collect()  # what nobody holds protects nothing
    write()
    np.testing.assert_array_equal(model.design.y, table["y"])
    np.testing.assert_array_equal(model.design.X[:, 1], table["x"])
    np.testing.assert_array_equal(model.design.terms[0].z[:, 1], table["v"])


@pytest.mark.parametrize("dtype", ["Int64", "boolean", "int64[pyarrow]", "Float32"])
def test_writing_to_other_columns_changes_nothing(dtype: str, table: pd.DataFrame) -> None:
    whole = table["small"].to_numpy() > 0 if dtype == "boolean" else table["small"].to_numpy()
    data = table.copy()
    data["k"] = pd.array(whole, dtype=dtype)
    model = lmm.Model("k ~ x + (1 | g)", data)
    gc.collect()
    data.loc[3:300, "k"] = data["k"].iloc[0]
    np.testing.assert_array_equal(model.design.y, whole)


@pytest.mark.usefixtures("large")
def test_columns_are_replaced_afterwards(table: pd.DataFrame) -> None:
    data = table.copy()
    model = lmm.Model("y ~ x + v + (x | g)", data)
    data["v"] = "text"
    np.testing.assert_array_equal(model.design.X[:, 2], table["v"])


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("response", ["np.greater(v, 1.5)", "v > 1.5", "np.int32(10 * v)", "small"])
def test_whole_responses_are_float64(response: str, table: pd.DataFrame) -> None:
    model = lmm.Model(f"{response} ~ x + (1 | g)", table)
    assert model.design.y.dtype == np.float64
    assert blocks.products(model.design, gram.plan(model.design)) is not None


@pytest.mark.usefixtures("large")
def test_columns_are_held_only_where_their_memory_is_used(table: pd.DataFrame) -> None:
    names = [c.name for c in lmm.Model("y ~ x + log(v) + (x | g)", table).design.held]
    assert sorted(names) == (["x", "y"] if int(pd.__version__.split(".")[0]) > 2 else [])
    table.loc[0, "x"] = np.nan
    assert lmm.Model("y ~ x + log(v) + (x | g)", table).design.held == ()


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.assign(y=1e6 * t.x + 1e-3 * t.v), "a nearly exact fit"),
        (lambda t: t.assign(x=t.x * 1e200), "no finite squares"),
    ],
)
def test_what_moments_cannot_tell_is_left_to_the_columns(
    change: object, why: str, table: pd.DataFrame
) -> None:
    model = lmm.Model("y ~ x + (1 | g)", change(table))  # type: ignore[operator]
    assert blocks.products(model.design, gram.plan(model.design)) is None, why
    assert np.all(np.isfinite(model._units.A))
    assert given(model.design, "X").array is None, "released after the products"


@pytest.mark.usefixtures("large")
def test_moments_do_not_outlive_their_columns(table: pd.DataFrame) -> None:
    import dataclasses

    d = lmm.Model("y ~ x + (1 | g)", table).design
    assert moments_of(d, "X") is not None
    assert moments_of(dataclasses.replace(d, y=d.y + 1), "X") is None


@pytest.mark.usefixtures("large")
def test_offsets_of_the_data_cost_no_digits(table: pd.DataFrame) -> None:
    near = lmm.Model("y ~ x + (x | g)", table)
    far = lmm.Model("y ~ x + (x | g)", table.assign(y=table.y + 2.0**27, x=table.x + 2.0**27))
    np.testing.assert_allclose(far._standard[2].own[0], near._standard[2].own[0], atol=2e-7)
    np.testing.assert_allclose(far._units.A[1, 1], near._units.A[1, 1], rtol=1e-8)
    slope_sd = [np.hypot(*m.theta0[1:]) for m in (far, near)]
    np.testing.assert_allclose(*slope_sd, rtol=1e-6)


@pytest.mark.usefixtures("large")
def test_replacing_makes_no_matrix(table: pd.DataFrame) -> None:
    d = lmm.Model("y ~ x + v + (x + v | g)", table).design
    same = replaced(d, spec=d.spec)
    assert given(same, "X") is given(d, "X")
    other = replaced(d, y=d.y + 1)
    assert moments_of(d, "X") is not None
    assert moments_of(same, "X") is not None
    assert moments_of(other, "X") is None
    keep = np.array([True, False, True])
    z = given(d.terms[0], "z").kept(keep)
    assert given(d, "X").array is None and z.array is None
    np.testing.assert_array_equal(other.X, d.X)
    np.testing.assert_array_equal(z(), d.terms[0].z[:, keep])
    np.testing.assert_array_equal(z.kept(np.array([False, True]))(), d.terms[0].z[:, 2:])
    early = replaced(d, y=d.y + 1)
    assert given(early, "X").array is given(d, "X").array


def test_random_terms_of_large_tables_are_tested_as_of_small_ones(
    table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    formula = "y ~ x + v + (x | g)"
    expected = lmm.Model(formula, table).fit().ranova()
    monkeypatch.setattr(design, "LARGE", 64)
    monkeypatch.setattr(blocks, "LARGE", 64)
    found = lmm.Model(formula, table).fit().ranova()
    pd.testing.assert_frame_equal(found, expected, rtol=1e-6)


@pytest.mark.usefixtures("large")
def test_a_pass_for_a_term_not_for_its_columns(
    table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lmm.Model("y ~ 1 + (f + log(v) + I(x^2) | h)", table)
    passes: list[slice] = []
    rows_of = blocks.rows_of
    monkeypatch.setattr(blocks, "rows_of", lambda *a: passes.append(a[-1]) or rows_of(*a))
    _ = model._standard
    blocks_of_z = [rows for rows in passes if rows.start == 0]
    assert len(blocks_of_z) == 3, "means of z; then X and z for the sums"


def test_products_are_made_with_one_blas_thread_where_the_core_is_large(
    table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[bool] = []
    standardise = gram.standardise

    def seen(*args: object) -> object:
        inside.append(len(threads._inside) > 0)
        return standardise(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(gram, "standardise", seen)
    many = table.assign(k=np.arange(700) % 80, m=np.arange(700) % 71)
    for formula in ("y ~ x + (1 | g)", "y ~ x + (1 | k) + (1 | m)"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lmm.SingularFitWarning)
            lmm.Model(formula, many).fit()
    assert inside == [False, True]


def test_texts_of_integer_levels_are_printed_when_read() -> None:
    table = pd.DataFrame({"y": [1.0, 2.0, 4.0, 3.0], "g": [7, -2, 7, 30]})
    term = lmm.Model("y ~ 1 + (1 | g)", table).design.terms[0]
    texts = given(term, "levels")
    assert isinstance(texts, Texts)
    assert len(texts) == 3
    assert list(term.levels) == ["-2", "7", "30"]
    assert term.levels is term.levels
    kept = Factor(np.array([2, 0, 2], np.int32), texts).take(None)  # type: ignore[arg-type]
    assert (list(kept.levels), list(kept.codes)) == (["-2", "30"], [1, 0, 1])


def test_a_fit_in_small_programs_is_the_same(
    table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lmm.Model("y ~ x + (v | g)", table)
    expected = model.fit()
    monkeypatch.setattr(estimate, "LARGE", 1)
    monkeypatch.setattr(compiling, "_done", set())
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    found = lmm.Model("y ~ x + (v | g)", table).fit()
    np.testing.assert_allclose(found.theta, expected.theta, rtol=1e-9)
    np.testing.assert_allclose(found.beta, expected.beta, rtol=1e-12)
    assert found.deviance == pytest.approx(expected.deviance, rel=1e-13)
    assert found.n_evals == expected.n_evals
    assert len(compiling._done) == 3
    assert len(compiled) <= 4, "begin, slopes, advance and finish, each once"
    del compiled[:]
    lmm.Model("y ~ v + (x | g)", table).fit()
    assert compiled == []

"""Batches: every item is the single fit, whatever the others are."""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from designs import design, factor_codes, layouts, problem

import lmmjax as lmm
from lmmjax import assemble, batch, cli, estimate, gram
from lmmjax import many as many_module
from lmmjax.batchfit import adjusted

LAYOUTS = layouts()


def check_equal(made: lmm.BatchFit, items: list[int]) -> None:
    """The items' estimates, tests and components are those of single fits."""
    table, components = made.coef_table(), made.varcorr()
    for i in items:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lmm.SingularFitWarning)
            fit = made[i]
        assert made.loglik.iloc[i] == pytest.approx(fit.loglik, abs=1e-8)
        assert made.arrays.sigma[i] == pytest.approx(fit.sigma, rel=1e-7)
        assert made.status["singular"].iloc[i] == fit.singular
        mine = table[table["item"] == made.items[i]].dropna().iloc[:, 2:]
        np.testing.assert_allclose(mine, fit.coef_table(), rtol=2e-5, atol=1e-12)
        mine = components[components["item"] == made.items[i]]
        size = fit.varcorr()["vcov"].abs().max()
        np.testing.assert_allclose(mine["vcov"], fit.varcorr()["vcov"], atol=1e-6 * size)
        assert list(mine["term1"].dropna()) == list(fit.varcorr()["term1"].dropna())


def responses(data: pd.DataFrame, group: str, m: int, seed: int = 0) -> np.ndarray:
    """Responses with group effects, on scales and offsets of many sizes."""
    rng = np.random.default_rng(seed)
    codes = data[group].cat.codes.to_numpy()
    b = rng.standard_normal((codes.max() + 1, m)) * rng.uniform(0.3, 2, m)
    Y = rng.standard_normal((len(data), m)) + b[codes]
    return Y * 10.0 ** rng.integers(-3, 4, m) + 1e3


# -- fit_many --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sleep() -> pd.DataFrame:
    return lmm.load_dataset("sleepstudy")


@pytest.fixture(scope="module")
def many(sleep: pd.DataFrame) -> lmm.BatchFit:
    return lmm.fit_many("~ Days + (1 | Subject)", sleep, responses(sleep, "Subject", 12))


def test_many_equals_single_fits(many: lmm.BatchFit) -> None:
    assert many.n_failed == 0
    check_equal(many, [0, 5, 11])
    assert "12 fits of ~ Days + (1 | Subject) by REML" in repr(many)


@pytest.mark.parametrize(
    ("name", "formula", "method"),
    [
        ("Penicillin", "~ 1 + (1 | plate) + (1 | sample)", "ML"),
        ("sleepstudy", "~ Days + (Days || Subject)", "REML"),
    ],
)
def test_many_with_crossed_factors_and_slopes(name: str, formula: str, method: str) -> None:
    data = lmm.load_dataset(name)
    Y = responses(data, formula.split("| ")[1].split(")")[0], 4)
    check_equal(lmm.fit_many(formula, data, Y, method=method), [0, 3])


def test_weights_offsets_and_huge_offsets(sleep: pd.DataFrame) -> None:
    Y = responses(sleep, "Subject", 4)
    Y[:, 1] += 1e9 * np.std(Y[:, 1])
    Y[:, 2] = 1e4 * np.std(Y[:, 2]) * sleep["Days"] + Y[:, 2]  # X explains all but 1e-8
    data = sleep.assign(w=np.random.default_rng(1).uniform(0.5, 2, len(sleep)), year=2000.0)
    made = lmm.fit_many("~ Days + (1 | Subject)", data, Y, weights="w", offset="year")
    assert made.n_failed == 0
    for i in (0, 1, 2):
        fit = made[i]
        assert made.loglik.iloc[i] == pytest.approx(fit.loglik, abs=1e-4 if i == 1 else 1e-8)


def test_a_bad_item_changes_no_other_bit(many: lmm.BatchFit, sleep: pd.DataFrame) -> None:
    Y = responses(sleep, "Subject", 12)
    Y[7, 3] = np.inf
    Y[:, 8] = 3 * sleep["Days"] + 1
    bad = lmm.fit_many("~ Days + (1 | Subject)", sleep, Y)
    assert bad.status["status"].iloc[3].startswith("failed: missing or infinite")
    assert bad.status["status"].iloc[8].startswith("failed: the fixed effects reproduce")
    assert bad.n_failed == 2
    others = np.delete(np.arange(12), [3, 8])
    for a, b in zip(jax.tree.leaves(many.arrays), jax.tree.leaves(bad.arrays), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[others], np.asarray(b)[others])
    assert bad.coef_table()["estimate"].isna().sum() == 4


def test_missing_values_by_pattern(sleep: pd.DataFrame) -> None:
    Y = responses(sleep, "Subject", 6)
    Y[3, 1] = Y[4, 1] = Y[3, 2] = Y[4, 2] = Y[100, 4] = np.nan
    Y[1:, 5] = np.nan
    made = lmm.fit_many("~ Days + (1 | Subject)", sleep, Y)
    assert list(made.status["n_obs"]) == [180, 178, 178, 180, 179, 1]
    assert made.status["status"].iloc[5].startswith("failed: too few rows")
    check_equal(made, [1, 4])
    with pytest.raises(lmm.DesignError, match="one level"):
        made[5]
    with pytest.raises(lmm.DataError, match="missing values in 4 responses"):
        lmm.fit_many("~ Days + (1 | Subject)", sleep, Y, missing="raise")


def test_patterns_in_batches_of_their_own_and_in_stacks(
    sleep: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One Gram for a pattern of many, stacks of others as the memory allows: the same numbers."""
    Y = responses(sleep, "Subject", 16)
    Y[2, :9] = np.nan
    Y[np.arange(9, 15), np.arange(9, 15)] = np.nan
    stacked, fit_items = [], batch.fit_items

    def told(*args: Any, **options: Any) -> batch.Batch:
        if "shared" in options:
            stacked.append((options["shared"], len(args[3].yy), options["size"]))
        return fit_items(*args, **options)

    monkeypatch.setattr(batch, "fit_items", told)
    made = lmm.fit_many("~ Days", sleep, Y)
    assert stacked == [(True, 9, None), (False, 6, 6)]
    monkeypatch.setattr(many_module, "at_a_time", lambda *a, least=1: 4)
    again = lmm.fit_many("~ Days", sleep, Y, chunk=16)
    assert stacked[2:] == [(True, 9, None), (False, 4, 4), (False, 2, 4)]
    for a, b in zip(jax.tree.leaves(made.arrays), jax.tree.leaves(again.arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    check_equal(made, [0, 8, 9, 14, 15])


def test_items_that_x_reproduces_are_not_tried_again(sleep: pd.DataFrame) -> None:
    Y = responses(sleep, "Subject", 12)
    Y[:, 3] = 0.0
    made = lmm.fit_many("~ Days + (1 | Subject)", sleep, Y)
    assert made.status["status"].iloc[3].startswith("failed: the fixed effects reproduce")
    assert made.n_retried == 0


def test_every_source_gives_the_same(
    many: lmm.BatchFit, sleep: pd.DataFrame, tmp_path: Path
) -> None:
    Y = responses(sleep, "Subject", 12)
    names = [f"gene{i}" for i in range(12)]
    frame = pd.DataFrame(Y, columns=names)
    mapped = np.memmap(tmp_path / "Y", dtype=float, mode="w+", shape=Y.shape)
    mapped[:] = Y
    annotated = SimpleNamespace(X=None, layers={"log": scipy.sparse.csr_array(Y)}, var_names=names)
    data = pd.concat([sleep.reset_index(drop=True), frame], axis=1)
    sources: dict[str, tuple[Any, dict[str, Any]]] = {
        "frame": (frame, {}),
        "names": (names, {}),
        "memory map": (mapped, {}),
        "sparse": (scipy.sparse.csc_array(Y), {}),
        "anndata": (annotated, {"layer": "log"}),
        "stream": (iter([Y]), {}),
    }
    for what, (source, options) in sources.items():
        made = lmm.fit_many("~ Days + (1 | Subject)", data, source, **options)
        np.testing.assert_allclose(made.loglik, many.loglik, rtol=1e-12, err_msg=what)
    with pytest.raises(lmm.LmmError, match="not kept"):
        made[0]


def test_chunks_and_an_interrupt(many: lmm.BatchFit, sleep: pd.DataFrame) -> None:
    Y = responses(sleep, "Subject", 12)
    chunked = lmm.fit_many("~ Days + (1 | Subject)", sleep, np.hstack([Y, Y]), chunk=12)
    np.testing.assert_array_equal(chunked.loglik, np.tile(many.loglik, 2))

    def stopped() -> Iterator[tuple[list[str], np.ndarray]]:
        yield [f"a{i}" for i in range(12)], Y
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after 12 items"):
        part = lmm.fit_many("~ Days + (1 | Subject)", sleep, stopped())
    np.testing.assert_array_equal(part.loglik, many.loglik)
    assert "interrupted" in repr(part)
    with pytest.raises(lmm.LmmError, match="unknown to a batch"):
        lmm.fit_many("~ Days + (1 | Subject)", sleep, Y, df="kenward-roger")
    with pytest.raises(lmm.DataError, match="one row of responses"):
        lmm.fit_many("~ Days + (1 | Subject)", sleep, Y[1:])


def test_responses_that_are_not_real_numbers(sleep: pd.DataFrame) -> None:
    Y = responses(sleep, "Subject", 2)
    mixed = np.where(Y > Y.min(), Y.astype(object), "a")
    cases: list[Any] = [Y + 1j, Y.astype(str), mixed, iter([1j * Y])]
    for bad in cases:
        with pytest.raises(lmm.DataError, match="real numbers"):
            lmm.fit_many("~ Days", sleep, bad)
    made = lmm.fit_many("~ Days", sleep, Y)
    again = lmm.fit_many("~ Days", sleep, Y.astype(object))
    np.testing.assert_array_equal(again.loglik, made.loglik)


def test_what_is_not_a_mesh(sleep: pd.DataFrame) -> None:
    mesh: Any = "all"
    with pytest.raises(lmm.LmmError, match="mesh is a str"):
        lmm.fit_many("~ Days", sleep, ["Reaction"], mesh=mesh)
    with pytest.raises(lmm.LmmError, match="mesh is a str"):
        lmm.fit_groups("Reaction ~ Days", sleep, by="Subject", mesh=mesh)


def test_row_labels_that_contradict_the_data(sleep: pd.DataFrame) -> None:
    data = sleep.set_axis(sleep.index + 7)
    Y = pd.DataFrame(responses(sleep, "Subject", 2), index=data.index)
    w = pd.Series(np.arange(1.0, 181.0), index=data.index)
    made = lmm.fit_many("~ Days", data, Y, weights=w)
    assert made.n_failed == 0
    calls: list[Any] = [
        lambda: lmm.fit_many("~ Days", data, Y[::-1]),
        lambda: lmm.fit_many("~ Days", data, Y, weights=w[::-1]),
        lambda: lmm.fit_groups("Reaction ~ Days", data, by="Subject", offset=w[::-1]),
        lambda: lmm.Model("Reaction ~ Days", data, weights=w[::-1]),
    ]
    for call in calls:
        with pytest.raises(lmm.DataError, match=r"Align them with \w+\.loc\[data\.index\]"):
            call()
    by_position = lmm.fit_many("~ Days", data, Y.reset_index(drop=True), weights=w.to_numpy())
    np.testing.assert_array_equal(by_position.loglik, made.loglik)


def test_linear_models_in_a_batch(sleep: pd.DataFrame) -> None:
    made = lmm.fit_many("~ Days", sleep, responses(sleep, "Subject", 3))
    check_equal(made, [0, 2])
    assert set(made.coef_table()["df"]) == {178.0}


def test_models_without_fixed_effects(sleep: pd.DataFrame) -> None:
    Y = responses(sleep, "Subject", 2) - 1e3
    made = lmm.fit_many("~ 0 + (1 | Subject)", sleep, Y)
    fit = made[1]
    assert made.loglik.iloc[1] == pytest.approx(fit.loglik, abs=1e-8)
    assert len(fit.bootstrap(20).replicates.columns) == 2
    data = pd.concat([sleep.assign(y=y, k=k) for k, y in enumerate(Y.T)])
    groups = lmm.fit_groups("y ~ 0 + (1 | Subject)", data, by="k")
    np.testing.assert_allclose(groups.loglik, made.loglik, atol=1e-8)


@pytest.mark.parametrize("seed", [0, 3_141_592_653])
def test_no_covariate_is_the_stand_in(seed: int) -> None:
    """Draws that anybody may make are covariates like others."""
    x = np.random.default_rng(seed).standard_normal(60)
    data = pd.DataFrame({"x": x, "g": np.arange(60) % 6})
    Y = np.random.default_rng(1).standard_normal((60, 2))
    Y[3, 1] = np.nan
    made = lmm.fit_many("~ x + (1 | g)", data, Y)
    assert made.n_failed == 0


def test_failed_items_are_tried_again(
    monkeypatch: pytest.MonkeyPatch, many: lmm.BatchFit, sleep: pd.DataFrame
) -> None:
    judge, calls = batch.judge, []

    def doubtful(*args: Any) -> np.ndarray:
        verdict = judge(*args)
        calls.append(len(verdict))
        if len(calls) == 1:
            verdict[[2, 4]] = batch.STUCK
        return verdict

    monkeypatch.setattr(batch, "judge", doubtful)
    made = lmm.fit_many("~ Days + (1 | Subject)", sleep, responses(sleep, "Subject", 12))
    assert calls == [12, 2]
    assert made.n_retried == 2 and made.n_failed == 0
    np.testing.assert_allclose(made.loglik, many.loglik, atol=1e-8)


# -- frames ----------------------------------------------------------------------------------------


def test_contrasts_adjustment_and_parquet(many: lmm.BatchFit, tmp_path: Path) -> None:
    table = many.coef_table(adjust="bh", term="Days")
    contrast = many.contrasts({"slope": {"Days": 1}}, adjust="bh")
    np.testing.assert_allclose(contrast.iloc[:, 2:], table.iloc[:, 2:], rtol=1e-12)
    twice = many.contrasts(np.array([[0, 2.0]]), rhs=2.0)
    np.testing.assert_allclose(twice["estimate"], 2 * table["estimate"])
    np.testing.assert_allclose(twice["df"], table["df"], rtol=1e-12)
    back = lmm.BatchFit.from_parquet(many.to_parquet(tmp_path / "batch.parquet"))
    pd.testing.assert_frame_equal(back.coef_table(), many.coef_table(), check_exact=True)
    np.testing.assert_array_equal(back.varcorr()["vcov"], many.varcorr()["vcov"])
    dates = pd.DatetimeIndex(list(pd.date_range("2024-01-01", periods=12)))
    pairs = pd.MultiIndex.from_arrays([np.arange(12, dtype=np.int16), dates], names=["k", "day"])
    for items in (many.items, pairs, pd.Index(list("abcdefghijkl"), name="gene"), pairs.levels[1]):
        labelled = dataclasses.replace(many, items=items)
        again = lmm.BatchFit.from_parquet(labelled.to_parquet(tmp_path / "labels.parquet"))
        pd.testing.assert_index_equal(again.items, items, exact=True)
    assert back.components().columns.tolist() == ["sd_(Intercept)|Subject", "sigma"]
    again = pickle.loads(pickle.dumps(many))
    pd.testing.assert_frame_equal(again.coef_table(), many.coef_table())
    assert again[3].loglik == pytest.approx(many.loglik.iloc[3], abs=1e-8)
    with pytest.raises(lmm.DataError, match="expected some of"):
        many.coef_table(term="Hours")


def test_adjusted_p_values() -> None:
    p = np.array([[0.01], [0.02], [np.nan], [0.03], [0.5]])
    # by hand: Holm steps 4, 3, 2, 1; Benjamini-Hochberg 4/1, 4/2, 4/3, 4/4
    np.testing.assert_allclose(adjusted(p, "holm")[:, 0], [0.04, 0.06, np.nan, 0.06, 0.5])
    np.testing.assert_allclose(adjusted(p, "bh")[:, 0], [0.04, 0.04, np.nan, 0.04, 0.5])


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_bad_item_in_ten_thousand_changes_no_bit_of_another(
    sleep: pd.DataFrame, value: float
) -> None:
    """A missing value leaves its item the other rows; an infinite one fails it."""
    Y = responses(sleep, "Subject", 10_000)
    clean = lmm.fit_many("~ Days + (Days | Subject)", sleep, Y)
    Y[17, 5_003] = value
    made = lmm.fit_many("~ Days + (Days | Subject)", sleep, Y)
    others = np.delete(np.arange(10_000), 5_003)
    for name in ("beta", "vcov", "sigma", "loglik", "hessian", "status", "n_evals"):
        a, b = getattr(made.arrays, name), getattr(clean.arrays, name)
        np.testing.assert_array_equal(a[others], b[others], err_msg=name)
    np.testing.assert_array_equal(made.arrays.covs[0][others], clean.arrays.covs[0][others])
    if np.isnan(value):
        check_equal(made, [5_003])
    else:
        assert made.arrays.status[5_003] == batch.NOT_FINITE


def test_prints_say_what_is_left_out(many: lmm.BatchFit, sleep: pd.DataFrame) -> None:
    assert "... and 18 more rows" in repr(many)
    few = lmm.fit_many("~ Days", sleep, responses(sleep, "Subject", 3))
    assert "..." not in repr(few)
    assert few[0].model.formula == "y ~ Days"


# -- fit_groups -----------------------------------------------------------------------------------


def stack_of(name: str) -> tuple[assemble.Stack, list[Any]]:
    """Three designs of one layout and different sizes, each and one below the other."""
    designs = []
    for seed, n in enumerate((120, 95, 110)):
        terms = [(g, codes[:n], S, cov) for g, codes, S, cov in LAYOUTS[name]]
        terms = [(g, np.unique(c, return_inverse=True)[1], S, cov) for g, c, S, cov in terms]
        designs.append(design(terms, n, 2, seed))
    join: Any = np.concatenate
    terms_of = zip(*(d.terms for d in designs), strict=True)
    stack = assemble.Stack(
        item=np.repeat(np.arange(3), [d.n for d in designs]),
        X=join([d.X for d in designs]),
        y=join([d.y - d.offset for d in designs]),
        w=join([d.weights for d in designs]),
        terms=tuple(
            SimpleNamespace(
                group=ts[0].group,
                names=ts[0].names,
                cov=ts[0].cov,
                z=join([t.z for t in ts]),
                codes=join([t.codes for t in ts]),
            )
            for ts in terms_of
        ),
        m=3,
    )
    return stack, designs


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_products_of_many_data_sets_are_those_of_each(name: str) -> None:
    stack, designs = stack_of(name)
    plan, levels = assemble.plan(stack)
    sizes = tuple(int(v.number.max()) + 1 for v in levels)
    grams, rhs, units = assemble.products(stack, plan, levels, sizes)
    d_all = assemble.padded(plan, sizes).d
    for i, d in enumerate(designs):
        J = [int(v.number[i]) for v in levels]
        factors = [dataclasses.replace(f, J=j) for f, j in zip(plan.factors, J, strict=True)]
        own = gram.Plan(assemble.padded(plan, tuple(J)), tuple(factors))
        standardised = gram.standardise(d)
        g, r = gram.crossproducts(d, own, standardised)
        mine, right = jax.tree.map(lambda a: a[i], (grams, rhs))  # noqa: B023
        at, columns = 0, []  # where the item's own core columns stand among the padded ones
        for f, j, size in list(zip(factors, J, sizes, strict=True))[plan.n_chain :]:
            columns += list(range(at, at + f.S * j))
            at += f.S * size
        columns += list(range(d_all, d_all + 2))
        close = {"rtol": 1e-9, "atol": 1e-9}
        np.testing.assert_allclose(mine.core[np.ix_(columns, columns)], g.core, **close)
        np.testing.assert_allclose(right.core[columns], r.core, **close)
        assert np.sum(np.abs(mine.core)) == pytest.approx(np.sum(np.abs(g.core)))
        for k, j in enumerate(J[: plan.n_chain]):
            np.testing.assert_allclose(mine.own[k][..., :j], g.own[k], **close)
            np.testing.assert_allclose(mine.border[k][:, columns, :j], g.border[k], **close)
            np.testing.assert_allclose(right.border[k][:, :j], r.border[k], **close)
            assert not np.any(mine.own[k][..., j:]) and not np.any(mine.border[k][..., j:])
            for a, b in zip((*mine.up[k], *mine.parent[k]), (*g.up[k], *g.parent[k]), strict=True):
                np.testing.assert_allclose(a[..., :j], b, **close)
        np.testing.assert_allclose(
            [mine.n, mine.logdet_R, right.yy], [g.n, g.logdet_R, r.yy], rtol=1e-9
        )
        np.testing.assert_allclose(units.beta0[i], standardised.units.beta0, rtol=1e-9)


@pytest.fixture(scope="module")
def ragged() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    parts = []
    for k in range(12):
        n = int(rng.integers(30, 60))
        g = factor_codes(rng, n, 6) if k != 4 else np.zeros(n, int)
        x, f = rng.normal(2000, 5, n), rng.choice(list("ab" if k in (3, 7) else "abc"), n)
        y = rng.normal(0, 1, 6)[g] + 0.3 * (x - 2000) + rng.normal(0, 1, n)
        parts.append(pd.DataFrame({"y": y, "x": x, "g": g, "f": f, "k": f"set{k:02d}"}))
    return pd.concat(parts).sample(frac=1, random_state=3)


def test_groups_equal_single_fits(ragged: pd.DataFrame) -> None:
    made = lmm.fit_groups("y ~ x + f + (1 | g)", ragged, by="k")
    assert list(made.items) == sorted(ragged["k"].unique())
    assert made.status["status"].iloc[4].startswith("failed: too few")
    assert made.n_failed == 1
    with pytest.raises(lmm.DesignError, match="one level"):
        made[4]
    check_equal(made, [0, 3])
    table = made.coef_table().set_index(["item", "term"])["estimate"]
    assert np.isnan(table["set03", "fc"]) and np.isfinite(table["set00", "fc"])
    alone = ragged[ragged["k"] == "set03"]
    fit = lmm.Model("y ~ x + f + (1 | g)", alone).fit()
    np.testing.assert_allclose(table["set03"].dropna(), fit.beta, rtol=1e-6)
    assert made.loglik["set03"] == pytest.approx(fit.loglik, abs=1e-8)


def test_a_formula_that_reads_by_is_told(ragged: pd.DataFrame) -> None:
    plain = lmm.fit_groups("y ~ x", ragged, by="k")
    assert plain.notes == ()
    made = lmm.fit_groups("y ~ x * k", ragged, by="k")
    (note,) = made.notes
    assert "by='k'" in note and ": k, x:k;" in note and "leave it out" in note
    assert note in str(made)
    np.testing.assert_allclose(made.loglik, plain.loglik, rtol=1e-9)
    with pytest.raises(lmm.FormulaError, match="one level in each data set"):
        lmm.fit_groups("y ~ x + (1 | k)", ragged, by="k")


def test_groups_say_what_is_wrong(ragged: pd.DataFrame) -> None:
    with pytest.raises(lmm.DataError, match="no column"):
        lmm.fit_groups("y ~ x + (1 | g)", ragged, by="nothing")
    for chunk in (-1, 2.5, 0):
        with pytest.raises(lmm.DataError, match="positive whole number of data sets"):
            lmm.fit_groups("y ~ x + (1 | g)", ragged, by="k", chunk=chunk)  # type: ignore[arg-type]
    with pytest.raises(lmm.DataError, match="no data set with enough rows"):
        lmm.fit_groups("y ~ x + (1 | g)", ragged.groupby("k").head(2), by="k")


# -- programs, command line -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lanes", "shared"),
    [("slope", 4, True), ("slope", 4, False), ("crossed", 1, True)],
)
def test_the_batch_program_lowers_for_cuda(name: str, lanes: int, shared: bool) -> None:
    plan, _, g, rhs = problem(design(LAYOUTS[name], 120, 2))
    layout = plan.layout
    many_of: Any = lambda tree: jax.tree.map(lambda a: np.stack([a] * 8), tree)  # noqa: E731
    theta = np.tile(estimate.start(layout), (8, 1))
    with lmm.float64():
        program = jax.jit(lambda g, r, t: batch.program(layout, "REML", lanes, shared, g, r, t))
        arrays = (g if shared else many_of(g), many_of(rhs), theta)
        exported = jax.export.export(program, platforms=["cuda"])(*arrays)
    assert "cuda" in exported.platforms
    assert "callback" not in str(exported.mlir_module())


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cake.csv"
    formula = "angle ~ temperature + (1 | replicate)"
    code = cli.main(["batch", "cake", formula, "--by", "recipe", "--json", "--out", str(out)])
    record = json.loads(capsys.readouterr().out)
    assert code == 0
    assert record["n_items"] == 3 and record["n_failed"] == 0
    assert {row["item"] for row in record["fixed"]} == {"A", "B", "C"}
    assert len(pd.read_csv(out)) == len(record["fixed"])
    assert cli.main(["batch", "cake", formula, "--by", "recipe", "--out", "x.txt"]) == 2
    assert "expected a name that ends in" in capsys.readouterr().err

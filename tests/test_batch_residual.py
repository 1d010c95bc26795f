"""Batches and the bootstrap of models with residual parameters: every item is the single fit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

import lmmjax as lmm
from lmmjax import batch, bootstrap, cli, gram
from lmmjax.residual import program, ragged, setup
from lmmjax.residual.responses import StructuredResponses

CRITERION = jax.jit(program.criterion, static_argnums=(0, 1))

# -- the part of a source that involves y ----------------------------------------------------------


@pytest.fixture(scope="module")
def visits() -> pd.DataFrame:
    """20 subjects of up to 4 visits in two schools that they change, with weights and an offset."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(20):
        t = np.sort(rng.choice(4, 4 if i % 3 else 3, replace=False)) if i != 5 else np.array([2])
        e = rng.standard_normal() + 0.6 * rng.standard_normal(len(t))
        rows.append(pd.DataFrame({"id": i, "t": t, "s": rng.integers(0, 3, len(t)), "e": e}))
    data = pd.concat(rows, ignore_index=True)
    n = len(data)
    extra = {"f": np.where(data["id"] % 2, "a", "b"), "w": rng.uniform(0.5, 2, n)}
    y = (
        5.0
        + 0.4 * data["t"]
        + np.array([-2, 0, 3.0])[data["s"]]
        + data["e"] * np.where(extra["f"] == "a", 1.0, 1.7)
    )
    return data.assign(**extra, y=y, o=rng.standard_normal(n), r=data.groupby("id").cumcount())


SOURCES = {
    "whitened rows": ("y ~ t + (1 | s)", "car1(t | id) * varident(f)", setup.Rows, ""),
    "unequal gaps": ("y ~ t + (1 | id)", "ar1(t | id)", setup.Rows, ""),
    "equal steps": ("y ~ t + (1 | id)", "ar1(r | id)", setup.Basis, "chain"),
    "equal steps, crossed": ("y ~ t + (1 | s)", "ar1(r | id)", setup.Basis, "chain"),
    "subject totals": ("y ~ t", "cs(1 | id)", setup.Basis, "mean"),
    "strata": ("y ~ t + (t || id)", "varident(f)", setup.Basis, "strata"),
    "patterns": ("y ~ t + f", "un(t | id)", setup.Patterns, ""),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("weights", [None, "w"])
def test_parts_of_many_responses_are_those_of_each(
    name: str, weights: str | None, visits: pd.DataFrame
) -> None:
    formula, residual, kind, basis = SOURCES[name]
    model = lmm.Model(formula, visits, residual=residual, weights=weights, offset="o")
    plan, units, source = model._prepared
    assert isinstance(source, kind) and getattr(source, "kind", "") == basis
    responses = StructuredResponses(model.design, plan, gram.standardise(model.design), source)
    y = model.design.y
    Y = np.column_stack(
        [y, 2 * y - model.design.offset + 1e6, np.where(np.arange(len(y)) == 3, np.nan, y)]
    )
    made = responses(Y)
    for parts in (responses.on_units(Y[:, :1]), made.rhs):
        for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(source.response), strict=True):
            np.testing.assert_allclose(a[0], b, atol=1e-9 * np.max(np.abs(b)))
    for a in jax.tree.leaves(made.rhs):
        np.testing.assert_allclose(a[1], a[0], atol=1e-7 * np.max(np.abs(a[0])))
    np.testing.assert_allclose(made.scale[:2], units.scale * np.array([1, 2]), rtol=1e-8)
    assert np.isnan(made.scale[2]) and not made.exact[2]
    phi = source.start()
    with lmm.float64():
        again = source.with_response(jax.tree.map(lambda a: a[0], made.rhs))
        for a, b in zip(
            jax.tree.leaves(again.gram(phi)), jax.tree.leaves(source.gram(phi)), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-8)


# -- the bootstrap ---------------------------------------------------------------------------------


def same_fit(fit: lmm.Fit, boot: bootstrap.Bootstrap, i: int) -> None:
    """Replicate ``i`` has the numbers of a single fit."""
    assert boot.deviance[i] == pytest.approx(fit.deviance, abs=1e-8)
    own = pd.concat([fit.beta, fit.residual_params(), pd.Series({"sigma": fit.sigma})])
    np.testing.assert_allclose(boot.replicates.loc[i, own.index], own, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(boot.std_errors.loc[i], fit.std_errors, rtol=1e-6)


@pytest.fixture(scope="module")
def mixed(visits: pd.DataFrame) -> lmm.Fit:
    return lmm.Model("y ~ t + (1 | s)", visits, residual="ar1(r | id)").fit("ML")


def test_each_replicate_is_the_single_fit(mixed: lmm.Fit, visits: pd.DataFrame) -> None:
    boot = mixed.bootstrap(64, seed=1)
    assert boot.n_failed == 0
    assert list(boot.replicates) == ["(Intercept)", "t", "sd_(Intercept)|s", "sigma", "phi"]
    Y = mixed.simulate(64, seed=int(np.random.default_rng(1).integers(2**63))).to_numpy()
    model = lmm.Model("y ~ t + (1 | s)", visits.assign(y=Y[:, 3]), residual="ar1(r | id)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmm.SingularFitWarning)
        same_fit(model.fit("ML"), boot, 3)
    np.testing.assert_array_equal(boot.replicates, mixed.bootstrap(64, seed=1).replicates)
    interval = mixed.confint("bootstrap", n=64, seed=1, parm=["phi", "sigma"])
    np.testing.assert_array_equal(interval, boot.confint(parm=["phi", "sigma"]))
    for kind in ("percentile", "studentized"):
        table = boot.confint(kind=kind).loc[["(Intercept)", "t", "sigma", "phi"]]
        assert np.all(table["low"] < table["estimate"]) and np.all(table["low"] < table["high"])
        assert table.loc["phi", "high"] < 1


def test_patterns_and_a_replicate_that_is_not_finite(
    visits: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unstructured covariance: refits, intervals, a bad replicate left out."""
    design = {"data": visits[visits["t"] < 3], "residual": "un(t | id)"}
    fit = lmm.Model("y ~ t + f", **design).fit()
    clean = fit.bootstrap(256, seed=2)
    parts = StructuredResponses.parts

    def damaged(self: StructuredResponses, Y: np.ndarray) -> Any:
        return parts(self, np.where(np.arange(Y.shape[1]) == 7, np.nan, Y))

    monkeypatch.setattr(StructuredResponses, "parts", damaged)
    boot = fit.bootstrap(256, seed=2)
    assert list(np.flatnonzero(boot.status == batch.NOT_FINITE)) == [7]
    others = np.delete(np.arange(256), 7)
    np.testing.assert_array_equal(boot.replicates.loc[others], clean.replicates.loc[others])
    Y = fit.simulate(256, seed=int(np.random.default_rng(2).integers(2**63))).to_numpy()
    design["data"] = design["data"].assign(y=Y[:, 4])
    same_fit(lmm.Model("y ~ t + f", **design).fit(), boot, 4)
    width = (boot.confint()["high"] - boot.confint()["low"]) / boot.replicates.std()
    assert np.all((width > 3) & (width < 5))
    assert list(boot.estimates.index[4:]) == fit.model.phi_names


def test_the_bootstrap_of_a_likelihood_ratio(mixed: lmm.Fit, visits: pd.DataFrame) -> None:
    """Independent residuals against AR(1): statistics are those of single fits."""
    small = lmm.Model("y ~ t + (1 | s)", visits).fit("ML")
    test = lmm.lrt(small, mixed, method="bootstrap", n=40, seed=3)
    assert test.n_failed == 0 and test.df == 1
    key = int(np.random.SeedSequence((3, 0)).generate_state(1)[0])
    y = small.simulate(40, seed=key).to_numpy()[:, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmm.SingularFitWarning)
        one, two = (
            lmm.Model("y ~ t + (1 | s)", visits.assign(y=y), residual=r).fit("ML")
            for r in (None, "ar1(r | id)")
        )
    null = bootstrap.null_statistics(small, mixed, n=40, seed=3)
    assert null.statistics[0] == pytest.approx(one.deviance - two.deviance, abs=1e-7)


# -- many responses, many data sets ----------------------------------------------------------------


def check_items(made: lmm.BatchFit, items: list[int]) -> None:
    table, params = made.coef_table(), made.residual_params()
    for i in items:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lmm.SingularFitWarning)
            fit = made[i]
        assert made.loglik.iloc[i] == pytest.approx(fit.loglik, abs=1e-8)
        assert made.arrays.sigma[i] == pytest.approx(fit.sigma, rel=1e-6)
        mine = table[table["item"] == made.items[i]].dropna().iloc[:, 2:]
        np.testing.assert_allclose(mine, fit.coef_table(), rtol=2e-5, atol=1e-10)
        own = params[params["item"] == made.items[i]].dropna().set_index("parameter")["estimate"]
        assert list(own.index) == list(fit.residual_params().index)
        np.testing.assert_allclose(own, fit.residual_params(), rtol=1e-5, atol=1e-7)


def test_many_responses(visits: pd.DataFrame, mixed: lmm.Fit) -> None:
    Y = mixed.simulate(64, seed=9).to_numpy() * 10.0 ** np.arange(-2, 2).repeat(16) + 1e3
    Y[4, 5] = np.nan
    made = lmm.fit_many("~ t + (1 | s)", visits, Y, residual="ar1(r | id)", method="ML")
    assert made.n_failed == 1
    assert made.status["status"].iloc[5].startswith("failed: missing")
    check_items(made, [0, 33])
    assert made[0].model.formula == "y ~ t + (1 | s)"
    assert "64 fits of ~ t + (1 | s), residual ar1(r | id) by ML" in repr(made)
    assert list(made.components()) == ["sd_(Intercept)|s", "sigma", "phi"]
    with pytest.raises(lmm.DataError, match="missing values in response y"):
        made[5]


@pytest.fixture(scope="module")
def sets() -> pd.DataFrame:
    """Six ragged data sets; subjects and visits have the same names in each."""
    rng = np.random.default_rng(1)
    parts = []
    for k in range(6):
        for g in range(int(rng.integers(8, 14))):
            t = np.sort(rng.choice(5, int(rng.integers(2, 6)), replace=False))
            e = rng.standard_normal() + rng.standard_normal(len(t))
            block = {"id": g, "t": t, "s": rng.integers(0, 3, len(t)), "y": 0.3 * t + e}
            parts.append(pd.DataFrame(block | {"f": "ab"[g % 2], "k": f"set{k}"}))
    data = pd.concat(parts, ignore_index=True).sample(frac=1, random_state=1)
    twice = (data["k"] == "set4") & (data["id"] == 0)
    return data.assign(t=data["t"].mask(twice, 1))


def test_groups_equal_single_fits(
    sets: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One data set has two rows of a subject at one position: it fails and says so."""
    options: dict[str, Any] = {"by": "k", "residual": "car1(t | id) * varident(f)"}
    made = lmm.fit_groups("y ~ t + (1 | s)", sets, **options)
    assert list(np.flatnonzero(made.arrays.status == batch.UNFIT)) == [4]
    assert made.n_failed == 1
    assert "set4: found two rows of id 0 at the same position" in made.notes[0]
    check_items(made, [0])
    assert list(made.components())[-2:] == ["phi", "sd_ratio[b]"]
    alone = lmm.Model("y ~ t + (1 | s)", sets[sets["k"] == "set0"], residual=options["residual"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmm.SingularFitWarning)
        assert made.loglik["set0"] == pytest.approx(alone.fit().loglik, abs=1e-8)
    back = lmm.BatchFit.from_parquet(made.to_parquet(tmp_path / "made.parquet"))
    pd.testing.assert_frame_equal(back.residual_params(), made.residual_params())
    sets.to_csv(tmp_path / "sets.csv", index=False)
    given = ["--by", "k", "--residual", options["residual"], "--json"]
    assert cli.main(["batch", str(tmp_path / "sets.csv"), "y ~ t + (1 | s)", *given]) == 1
    record = json.loads(capsys.readouterr().out)["residual"]
    assert record[0]["parameter"] == "phi"
    assert record[0]["estimate"] == pytest.approx(made.residual_params()["estimate"][0], rel=1e-6)


@pytest.mark.parametrize(
    ("formula", "residual"),
    [
        ("y ~ t + (1 | id)", "ar1(t | id) * varexp(t)"),
        ("y ~ t + (1 | s) + (1 | f)", "spexp(t | id)"),
        ("y ~ t + f", "cs(t | id)"),
        ("y ~ 0 + (1 | id)", "varpower(I(t + 1))"),
    ],
)
def test_padding_leaves_the_products_alone(formula: str, residual: str, sets: pd.DataFrame) -> None:
    """Padded, in common units: the criterion of two data sets at any φ."""
    made = []
    for k in ("set0", "set1"):
        model = lmm.Model(formula, sets[sets["k"] == k], residual=residual)
        plan, standardised = model._plan, gram.standardise(model.design)
        made.append(ragged.make_source(model.design, plan, standardised))
    common = ragged.Common.of([rows.structure for rows in made])
    sizes = ragged.common_sizes(made)
    if isinstance(sizes, ragged.Sizes):
        sizes = sizes._replace(slots=tuple(m + 1 for m in sizes.slots))
    for rows in (common.apply(r) for r in made):
        out = ragged.pad(rows, sizes)
        phi = 0.3 + rows.structure.start()
        theta = np.linspace(0.5, 0.9, rows.layout.n_theta)
        with lmm.float64():
            before, after = (
                CRITERION(r.layout, "REML", np.append(theta, phi), r) for r in (rows, out)
            )
        assert float(after) == pytest.approx(float(before), abs=1e-9)


def test_structured_batches_lower_for_cuda(visits: pd.DataFrame) -> None:
    model = lmm.Model("y ~ t", visits, residual="car1(t | id)")
    layout, source = model._plan.layout, model._prepared[2]
    parts = jax.tree.map(lambda a: np.stack([a] * 8), source.response)
    start = np.tile(source.start(), (8, 1))
    with lmm.float64():
        compiled = jax.jit(lambda s, r, t: batch.program(layout, "REML", 4, True, s, r, t))
        exported = jax.export.export(compiled, platforms=["cuda"])(source, parts, start)
    assert "callback" not in str(exported.mlir_module())

"""Tests side by side, quantile data, pictures, and small things that users stumble over."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import lmmjax as lmm
from lmmjax.display import TextTable
from lmmjax.errors import DataError, LmmError

SLEEP = "Reaction ~ Days + (Days | Subject)"


@functools.cache
def sleep(method: str = "REML", formula: str = SLEEP, residual: str | None = None) -> lmm.Fit:
    return lmm.Model(formula, lmm.load_dataset("sleepstudy"), residual=residual).fit(method=method)


# -- one coefficient by every method --------------------------------------------------------------


def test_every_method_is_what_its_own_function_says() -> None:
    fit = sleep()
    table = fit.tests("Days", n=200, seed=4)
    columns = ["estimate", "std_error", "df", "statistic", "p_value", "ci_low", "ci_high", "note"]
    assert list(table.columns) == columns
    for method in ("wald", "residual", "containment", "satterthwaite"):
        own = fit.coef_table(method).loc["Days"]
        np.testing.assert_allclose(table.loc[method, columns[:-1]].astype(float), own)
    for information in ("expected", "observed"):
        own = fit.coef_table("kenward-roger", information=information).loc["Days"]
        row = table.loc[f"kenward-roger ({information})", columns[:-1]]
        np.testing.assert_allclose(row.astype(float), own)
    own = fit.coef_table(vcov="robust").loc["Days"]
    np.testing.assert_allclose(table.loc["robust CR2", columns[:-1]].astype(float), own)
    small = lmm.Model("Reaction ~ 1 + (Days | Subject)", lmm.load_dataset("sleepstudy"))
    ratio = lmm.lrt(small.fit(method="ML"), sleep("ML"))
    assert table.loc["lrt", "statistic"] == pytest.approx(ratio.statistic, rel=1e-7)
    assert table.loc["lrt", "p_value"] == pytest.approx(ratio.p_value, rel=1e-6)
    # the refit without the column is the profile at 0
    zeta = table.loc["profile", "statistic"]
    assert zeta**2 == pytest.approx(ratio.statistic, rel=1e-6)
    interval = fit.confint("profile", parm="Days").iloc[0]
    assert table.loc["profile", "ci_low"] == pytest.approx(interval["low"])
    boot = fit.bootstrap(200, seed=4)
    assert table.loc["bootstrap", "std_error"] == pytest.approx(boot.replicates["Days"].std())
    assert 0 < table.loc["bootstrap", "p_value"] <= 2 / 201
    pd.testing.assert_frame_equal(table, fit.tests("Days", n=200, seed=4))


def test_what_is_not_to_be_had_is_a_row_with_its_reason() -> None:
    table = sleep("ML").tests("Days", n=200)
    for information in ("expected", "observed"):
        row = table.loc[f"kenward-roger ({information})"]
        assert row["note"].startswith("not available") and "REML" in row["note"]
        assert row.drop("note").isna().all()
    linear = sleep(formula="Reaction ~ Days").tests("Days", n=50)
    assert "n - p" in linear.loc["satterthwaite", "note"]
    assert linear.loc["lrt", "p_value"] == pytest.approx(linear.loc["profile", "p_value"])
    with pytest.raises(LmmError, match="not a fixed effect"):
        sleep().tests("days")
    with pytest.raises(LmmError, match="20 or more"):
        sleep().tests("Days", n=3)


# -- quantiles ------------------------------------------------------------------------------------


def test_quantiles_of_residuals() -> None:
    fit = sleep()
    frame = fit.qq()
    assert frame["residual"].is_monotonic_increasing
    np.testing.assert_allclose(frame["residual"], fit.residuals("pearson").loc[frame.index])
    want = stats.norm.ppf((np.arange(1, 181) - 0.5) / 180)  # R: qnorm(ppoints(180))
    np.testing.assert_allclose(frame["theoretical"], want)


def test_blups_are_standardised_by_the_sd_that_they_have() -> None:
    """Over data of the fitted model their standardised values have variance 1, whatever n_j."""
    rng = np.random.default_rng(0)
    size = np.repeat([2, 4, 12], 30)
    data = pd.DataFrame({"g": np.repeat(np.arange(90), size).astype(str)})
    data["y"] = rng.normal(size=90)[np.repeat(np.arange(90), size)] + rng.normal(size=len(data))
    fit = lmm.Model("y ~ 1 + (1 | g)", data).fit()
    frame = fit.qq("g").set_index("level")
    ratio = fit.varcorr()["vcov"][0] / fit.sigma**2
    n = data["g"].value_counts().loc[frame.index].to_numpy()
    sd = np.sqrt(fit.varcorr()["vcov"][0] * n * ratio / (1 + n * ratio))
    np.testing.assert_allclose(frame["standardised"] * sd, frame["blup"], rtol=1e-8)
    spread = frame["standardised"].groupby(n).std()
    np.testing.assert_allclose(spread, 1, atol=0.45)
    shrunk = frame["blup"].groupby(n).std()
    assert shrunk.iloc[0] < shrunk.iloc[-1]


def test_quantiles_of_a_variance_of_zero() -> None:
    with pytest.warns(lmm.SingularFitWarning):
        fit = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff2")).fit()
    frame = fit.qq("Batch")
    assert frame["standardised"].isna().all() and frame["theoretical"].is_monotonic_increasing
    fit.plot_qq("Batch")
    with pytest.raises(DataError, match="grouping factor"):
        fit.qq("batch")


# -- pictures -------------------------------------------------------------------------------------


def test_pictures_are_drawn() -> None:
    import matplotlib.pyplot as plt

    fit = sleep()
    four = fit.plot_diagnostics()
    assert [ax.get_ylabel() for ax in four] == [
        "Pearson residual",
        "residual",
        "√|Pearson residual|",
        "standardised residual",
    ]
    assert len(fit.plot_qq("Subject")) == 2
    influence = fit.influence().plot("Subject")
    largest = fit.influence().groups()["cooks_d"].idxmax()
    assert influence[0].get_yticklabels()[-1].get_text() == largest
    dyestuff = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff")).fit()
    zeta = dyestuff.plot_profile("sigma", points=5)
    assert zeta[0].get_title() == "sigma"
    ax = plt.figure().add_subplot()
    assert fit.plot_residuals(ax=ax) is ax
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


# -- frictions ------------------------------------------------------------------------------------


def test_population_predictions_ask_for_no_group() -> None:
    fit, new = sleep(), pd.DataFrame({"Days": [0.0, 9.0]})
    found = fit.predict(new, kind="population", interval="prediction")
    any_group = new.assign(Subject="nobody")
    pd.testing.assert_frame_equal(
        found, fit.predict(any_group, kind="population", interval="prediction")
    )
    D, z = fit._term_covs()[0], np.array([1.0, 9.0])
    V = fit.vcov().to_numpy() + D
    assert found["std_error"].iloc[1] == pytest.approx(np.sqrt(z @ V @ z + fit.sigma**2))
    with pytest.raises(DataError, match=r"no column Subject in newdata.*kind='population'"):
        fit.predict(new)


def test_missing_terms_are_nan_with_and_without_correlations() -> None:
    one = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff")).fit()
    for frame in (one.varcorr(), sleep().varcorr(), one.variance_tests()):
        assert all(isinstance(x, str) or np.isnan(x) for x in [*frame["term1"], *frame["term2"]])


def test_a_marginal_model_tells_how_it_converged() -> None:
    data = lmm.load_dataset("Orthodont")
    fit = lmm.Model("distance ~ age", data, residual="cs(1 | Subject)").fit()
    assert repr(fit).splitlines()[-1].startswith("Optimiser: newton, converged")


def test_wide_tables_go_on_below() -> None:
    table = TextTable(["", "one", "two", "three"], [["a", "1" * 10, "2" * 10, "3" * 10]])
    assert table.text(80).count("\n") == 1
    narrow = table.text(28).splitlines()
    assert max(map(len, narrow)) <= 28
    assert [line.split()[0] for line in narrow] == ["one", "a", "three", "a"]
    assert all(cell * 10 in table.text(5) for cell in "123")


def test_nested_fits_in_a_comparison_hint_at_the_test() -> None:
    data = lmm.load_dataset("sleepstudy")
    fits = [lmm.Model(f, data).fit(method="ML") for f in ("Reaction ~ 1 + (Days | Subject)", SLEEP)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = lmm.compare(*fits).explain()
    assert "lrt" in text and "aic_table" in text
    assert "aic_table" not in lmm.compare(sleep(), sleep("ML")).explain()

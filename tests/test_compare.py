"""Comparisons: identities, invalid pairs, BLUPs against posteriors, reports and pictures."""

import pickle
import sys

import numpy as np
import pandas as pd
import pytest

import lmmjax as lmm
from lmmjax.agreement import concordance, interval_overlap

FORMULA = "Reaction ~ Days + (Days | Subject)"


@pytest.fixture(scope="module")
def model() -> lmm.Model:
    return lmm.Model(FORMULA, lmm.load_dataset("sleepstudy"))


@pytest.fixture(scope="module")
def ml(model) -> lmm.Fit:
    return model.fit(method="ML")


@pytest.fixture(scope="module")
def reml(model) -> lmm.Fit:
    return model.fit(method="REML")


@pytest.fixture(scope="module")
def posterior(model) -> lmm.Posterior:
    return model.sample(seed=1, draws=1000, warmup=500, chains=2)


@pytest.fixture(scope="module")
def comparison(ml, reml, posterior) -> lmm.Comparison:
    return lmm.compare(ml, reml, posterior)


# -- frames ---------------------------------------------------------------------------------------
def test_fixed_effects_are_those_of_the_results(comparison, ml, posterior):
    frame = comparison.fixed_effects()
    assert list(frame.columns) == ["term", "method", "estimate", "std_error", "low", "high"]
    wide = frame.pivot(index="term", columns="method", values="estimate")
    np.testing.assert_array_equal(wide["ML"].loc[ml.beta.index], ml.beta)
    np.testing.assert_allclose(wide["NUTS (marginal)"].loc[ml.beta.index], posterior.beta)
    assert list(frame["method"][:3]) == list(comparison.labels) == ["ML", "REML", "NUTS (marginal)"]


def test_variance_components_are_on_the_scale_of_sd_and_correlation(comparison, reml):
    frame = comparison.variance_components()
    columns = ["group", "term1", "term2", "method", "estimate", "std_error", "low", "high"]
    assert list(frame.columns) == columns
    mine = frame[frame["method"] == "REML"]
    np.testing.assert_array_equal(mine["estimate"], reml.varcorr()["sdcor"])
    bayes = frame[frame["method"] == "NUTS (marginal)"]
    assert np.all((bayes["low"] < bayes["estimate"]) & (bayes["estimate"] < bayes["high"]))


def test_random_effects_hold_blups_and_posteriors(comparison, reml, posterior):
    frame = comparison.random_effects("Subject").query("term == 'Days'").set_index("level")
    blups, means = (frame[frame["method"] == m] for m in ("REML", "NUTS (marginal)"))
    np.testing.assert_array_equal(blups["estimate"], reml.ranef("Subject")["Days"])
    np.testing.assert_array_equal(blups["sd"], reml.ranef_se("Subject")["Days"])
    np.testing.assert_array_equal(means["estimate"], posterior.ranef("Subject")["Days"])
    gap = (blups["estimate"] - means["estimate"]) / means["sd"]
    np.testing.assert_allclose(blups["std_diff"], gap)
    np.testing.assert_allclose(blups["sd_ratio"], means["sd"] / blups["sd"])
    assert np.all(means["std_diff"] == 0)


def test_ranks_order_the_levels(comparison):
    frame = comparison.random_effects()
    for _, block in frame.groupby(["term", "method"]):
        assert sorted(block["rank"]) == list(range(1, 19))
        assert block.loc[block["rank"] == 1, "estimate"].item() == block["estimate"].max()


def test_shrinkage_is_what_the_level_tells_about_itself(comparison, reml):
    # Var(b | y) = (1 - shrinkage) Var(b); a random intercept has n_j tau² / (n_j tau² + sigma²)
    model = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff"))
    fit = model.fit()
    tau2, sigma2 = fit.varcorr()["vcov"]
    frame = lmm.compare(fit).random_effects("Batch")
    np.testing.assert_allclose(frame["shrinkage"], 5 * tau2 / (5 * tau2 + sigma2), rtol=1e-10)


def test_blups_lie_close_to_posterior_means_and_are_too_sure(comparison):
    # found elsewhere on these data: gap 0.03 posterior SDs, posterior SD 1.2 times conditional SD
    frame = comparison.random_effects("Subject")
    reml = frame[frame["method"] == "REML"]
    assert np.abs(reml["std_diff"]).mean() < 0.1
    assert 1.05 < reml["sd_ratio"].mean() < 1.4


def test_coefficients_without_pooling_are_regressions_by_group(comparison):
    frame = comparison.coefficients("Subject")
    data = lmm.load_dataset("sleepstudy")
    for level in ("308", "335"):
        rows = data[data["Subject"].astype(str) == level]
        slope, intercept = np.polyfit(rows["Days"], rows["Reaction"], 1)
        mine = frame[frame["level"] == level].set_index("term")
        np.testing.assert_allclose(mine["none"], [intercept, slope], rtol=1e-8)


def test_coefficients_of_crossed_groups_hold_the_others_fixed():
    model = lmm.Model("diameter ~ 1 + (1 | plate) + (1 | sample)", lmm.load_dataset("Penicillin"))
    fit = model.fit()
    frame = lmm.compare(fit).coefficients("sample")
    b_plate = fit.ranef("plate")["(Intercept)"].mean()
    data = lmm.load_dataset("Penicillin")
    own = data.groupby("sample", observed=True)["diameter"].mean() - b_plate
    np.testing.assert_allclose(frame["none"], own, rtol=1e-10)


# -- agreement ------------------------------------------------------------------------------------
def test_a_fit_agrees_with_itself(reml):
    frame = lmm.compare(reml, reml).agreement()
    assert set(frame["method1"]) == {"REML [1]"}
    random = frame[frame["kind"] == "random effects"]
    assert len(random) == 2
    np.testing.assert_allclose(random[["correlation", "ccc", "overlap"]], 1.0)
    fixed = frame[frame["kind"] != "variance components"]
    assert np.all(fixed[["max_std_diff", "mean_std_diff"]] == 0)
    np.testing.assert_array_equal(fixed["overlap"], 1.0)


def test_every_pair_is_there(comparison):
    frame = comparison.agreement()
    assert len(frame) == 3 * (1 + 1 + 2)
    assert not frame.duplicated(["kind", "what", "method1", "method2"]).any()
    assert (frame.loc[frame["kind"] == "random effects", "ccc"] > 0.98).all()
    known = frame["overlap"].dropna()
    assert ((known > 0) & (known <= 1)).all()


def test_concordance_is_below_correlation_when_scales_differ():
    x = np.array([1.0, 2.0, 4.0])
    rho, ccc = concordance(x, 2 * x)
    assert rho == pytest.approx(1)
    # Lin (1989): 2 cov / (var x + var y + (difference of means)²)
    assert ccc == pytest.approx(4 * x.var() / (5 * x.var() + x.mean() ** 2))
    assert np.isnan(concordance(x, np.ones(3))).all()


def test_intervals_overlap_from_0_to_1():
    a = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 2.0]])
    b = np.array([[0.0, 1.0], [2.0, 3.0], [np.nan, np.nan], [0.0, 1.0]])
    np.testing.assert_array_equal(interval_overlap(a, b), [1.0, 0.0, np.nan, 0.5])


# -- what may be compared -------------------------------------------------------------------------
def test_different_rows_are_refused(model, reml):
    fewer = lmm.Model(FORMULA, lmm.load_dataset("sleepstudy").iloc[:-5]).fit()
    with pytest.raises(lmm.ComparisonError, match=r"different rows: REML used 180, REML used 175"):
        lmm.compare(reml, fewer)


def test_different_responses_are_refused(reml):
    other = lmm.Model("log(Reaction) ~ Days + (1 | Subject)", lmm.load_dataset("sleepstudy")).fit()
    with pytest.raises(lmm.ComparisonError, match=r"Reaction and log\(Reaction\)"):
        lmm.compare(reml, other)


def test_nothing_and_nonsense_are_refused(reml):
    with pytest.raises(lmm.ComparisonError, match="nothing to compare"):
        lmm.compare()
    with pytest.raises(lmm.ComparisonError, match="found a int"):
        lmm.compare(reml, 3)
    with pytest.raises(lmm.LmmError, match="level"):
        lmm.compare(reml, level=95)


def test_models_without_a_common_term_are_refused():
    data = lmm.load_dataset("sleepstudy")
    one = lmm.Model("Reaction ~ 0 + Days", data).fit()
    two = lmm.Model("Reaction ~ 1", data).fit()
    with pytest.raises(lmm.ComparisonError, match="no term in common"):
        lmm.compare(one, two)


def test_what_a_smaller_model_lacks_is_told(reml):
    small = lmm.Model("Reaction ~ 1 + (1 | Subject)", lmm.load_dataset("sleepstudy")).fit()
    both = lmm.compare(reml, small)
    assert "REML [2] has no Days, Days | Subject" in both.explain()
    assert "REML [2]: Reaction ~ 1 + (1 | Subject)" in repr(both)
    assert len(both.fixed_effects()) == 3
    assert len(both.random_effects("Subject")) == 3 * 18


def test_a_linear_model_beside_a_mixed_one(reml):
    linear = lmm.Model("Reaction ~ Days", lmm.load_dataset("sleepstudy")).fit()
    both = lmm.compare(linear, reml)
    assert set(both.random_effects("Subject")["method"]) == {"REML [2]"}
    assert "Comparison of REML [1] and REML [2]" in repr(both)
    assert len(both.agreement()) == 2


def test_unknown_groups_and_methods_are_refused(comparison):
    with pytest.raises(lmm.ComparisonError, match=r"'Item' is not a grouping factor"):
        comparison.random_effects("Item")
    with pytest.raises(lmm.ComparisonError, match=r"'MAP' is not compared"):
        comparison.coefficients("Subject", method="MAP")


# -- people ---------------------------------------------------------------------------------------
def test_print_of_ml_and_reml(ml, reml):
    text = repr(lmm.compare(ml, reml))
    for part in (
        "Comparison of ML and REML\nFormula: Reaction ~ Days + (Days | Subject)",
        "(Intercept)     251.41 (6.63)     251.41 (6.82)",
        "             [237.47, 265.34]  [237.01, 265.80]",
        "SD (Intercept) | Subject           23.8    24.7",
        "first 6 of 18 levels",
        "ML's SD (Intercept) | Subject is 3.9 % below REML's",
    ):
        assert part in text


def test_explanation_names_what_blups_ignore(comparison):
    words = comparison.explain()
    assert "posterior SDs from the means of NUTS (marginal)" in words
    assert "takes the variance components and the fixed effects as known" in words


def test_singular_fits_are_explained():
    with pytest.warns(lmm.SingularFitWarning):
        fit = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff2")).fit()
    comparison = lmm.compare(fit, fit)
    assert "REML [1] is singular (the variance of (Intercept) | Batch is 0)" in comparison.explain()
    assert np.isnan(comparison.random_effects("Batch")["shrinkage"]).all()


def test_run_times_and_diagnostics(comparison):
    assert (comparison.timing() > 0).all()
    frame = comparison.diagnostics()
    assert list(frame.index) == list(comparison.labels)
    assert frame.loc["REML", "converged"]


def test_pickle(comparison):
    again = pickle.loads(pickle.dumps(comparison))
    pd.testing.assert_frame_equal(again.agreement(), comparison.agreement())


def test_html_is_escaped():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"y": rng.normal(size=24), "g": np.repeat(["<b>", "&", "c", "d"], 6)})
    frame["y"] += np.repeat([0, 2, 4, 6], 6)
    fit = lmm.Model("y ~ 1 + (1 | g)", frame).fit()
    page = lmm.compare(fit)._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


def test_report_needs_no_other_file(comparison, tmp_path):
    path = comparison.to_html(tmp_path / "new" / "report.html")
    page = path.read_text(encoding="utf-8")
    assert page.count('<img alt="') == 4
    assert "http:" not in page and "https:" not in page and "<script" not in page
    assert "NUTS (marginal)" in page
    plain = comparison.to_html(tmp_path / "plain.html", plots=False)
    assert "<img" not in plain.read_text(encoding="utf-8")


# -- pictures -------------------------------------------------------------------------------------
@pytest.fixture
def plt():
    plt = pytest.importorskip("matplotlib.pyplot")
    yield plt
    plt.close("all")


def test_pictures_have_a_panel_each(comparison, plt):
    assert [ax.get_title() for ax in comparison.plot_fixed()] == ["(Intercept)", "Days"]
    assert len(comparison.plot_variance()) == 4
    axes = comparison.plot_caterpillar("Subject")
    assert len(axes) == 2
    assert len(axes[0].get_yticks()) == 18
    ax = comparison.plot_shrinkage("Subject")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("(Intercept)", "Days")


def test_many_levels_are_thinned(plt):
    from lmmjax.plots import caterpillar

    n = 500
    frame = pd.DataFrame(
        {"level": [f"g{i}" for i in range(n)], "term": "(Intercept)", "method": "REML"}
    ).assign(estimate=np.arange(n), low=np.arange(n) - 1.0, high=np.arange(n) + 1.0)
    (ax,) = caterpillar(frame, "g")
    assert len(ax.get_yticks()) == 60
    assert "60 of 500 levels" in ax.get_xlabel()


def test_shrinkage_of_one_term(plt):
    fit = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff")).fit()
    ax = lmm.compare(fit).plot_shrinkage()
    assert ax.get_ylabel() == "(Intercept) by Batch"


def test_without_matplotlib_the_extra_is_named(reml, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(lmm.LmmError, match=r"lmmjax\[plots\]"):
        lmm.compare(reml).plot_fixed()

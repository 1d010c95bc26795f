"""Likelihood-ratio tests and information criteria: references of R, identities, refusals."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from reference_cases import REFERENCE

import lmmjax as lmm
from lmmjax import cli
from lmmjax.inference import cone as cones
from lmmjax.inference import exact, nesting

#: formulas that some references imply but do not list: the model without its random term
WITHOUT = {
    "vc_dyestuff": "Yield ~ 1",
    "vc_ergostool": "effort ~ Type",
    "vc_pastes_batch_only": "strength ~ 1",
    "vc_sim_schools": "score ~ hours",
}


def reference(name: str) -> dict[str, Any]:
    return json.loads((REFERENCE / "tests" / f"{name}.json").read_text(encoding="utf-8"))


@functools.cache
def table(name: str) -> Any:
    return lmm.load_dataset(name)


@functools.cache
def fit(formula: str, data: str, method: str = "REML") -> lmm.Fit:
    return lmm.Model(formula, table(data)).fit(method=method)


def fits_of(ref: dict[str, Any]) -> list[lmm.Fit]:
    return [fit(m["formula"], ref["data"], m["method"]) for m in ref["models"]]


# -- references -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "lrt_sleepstudy_days",
        pytest.param("lrt_cake_interaction", marks=pytest.mark.slow),
        pytest.param("lrt_sim_weights_group_by_month", marks=pytest.mark.slow),
    ],
)
def test_chi_squared_equals_anova_of_lme4(name: str) -> None:
    ref = reference(name)
    small, big = fits_of(ref)
    result, expected = lmm.lrt(small, big), ref["expected"]
    assert result.statistic == pytest.approx(expected["chisq"], abs=1e-6)
    assert result.df == expected["df"]
    assert result.p_value == pytest.approx(expected["p"], rel=1e-5)
    np.testing.assert_allclose(result.table["loglik"], expected["logLik"], atol=1e-7)
    assert list(result.table["n_params"]) == expected["npar"]
    assert result.mc_se == 0


@pytest.mark.parametrize(
    "name",
    [
        "vc_dyestuff",
        "vc_pastes_batch_only",
        pytest.param("vc_ergostool", marks=pytest.mark.slow),
        pytest.param("vc_sim_schools", marks=pytest.mark.slow),
    ],
)
def test_one_variance_equals_rlrsim(name: str) -> None:
    ref, expected = reference(name), reference(name)["expected"]
    (big,) = fits_of(ref)
    small = fit(WITHOUT[name], ref["data"])
    result = lmm.lrt(small, big, method="mixture")
    assert result.statistic == pytest.approx(expected["lrt"], abs=1e-6)
    assert result.p_value == pytest.approx(expected["p_mixture_50_50"], rel=1e-6)
    assert result.weights == {0: 0.5, 1: 0.5}
    drawn = lmm.lrt(small, big, method="exact")
    other = expected["exactRLRT"]["mc_se"] or 1e-5
    assert abs(drawn.p_value - expected["exactRLRT"]["p"]) < 3 * np.hypot(drawn.mc_se, other)


def test_statistic_of_zero_has_p_one_by_every_method() -> None:
    with pytest.warns(lmm.SingularFitWarning):
        big = fit("Yield ~ 1 + (1 | Batch)", "Dyestuff2")
    small = fit("Yield ~ 1", "Dyestuff2")
    expected = reference("vc_dyestuff2_zero")["expected"]
    for method in ("chi2", "mixture", "exact", "bootstrap"):
        result = lmm.lrt(small, big, method=method, n=200)
        assert result.statistic == expected["lrt"] == 0
        assert result.p_value == expected["p_naive"] == expected["p_mixture_50_50"] == 1


SLOPES = ["", " + (1 | Subject)", " + (Days || Subject)", " + (Days | Subject)"]


def slopes(method: str = "REML") -> list[lmm.Fit]:
    return [fit("Reaction ~ Days" + x, "sleepstudy", method) for x in SLOPES]


def test_correlated_slope_has_the_mixture_of_stram_and_lee() -> None:
    expected = reference("vc_sleepstudy_slope_corr")["expected"]
    _, intercept, _, slope = slopes()
    result = lmm.lrt(intercept, slope, method="mixture")
    assert result.statistic == pytest.approx(expected["lrt"], abs=1e-6)
    assert result.p_value == pytest.approx(expected["p_mixture_50_50"], rel=1e-6)
    assert result.weights == {1: 0.5, 2: 0.5}
    chi2 = lmm.lrt(intercept, slope)
    assert chi2.p_value == pytest.approx(expected["p_naive"], rel=1e-6)
    assert chi2.df == 2


def test_independent_slope_and_the_approximation_of_greven() -> None:
    expected = reference("vc_sleepstudy_slope_uncorr")["expected"]
    _, intercept, slope, _ = slopes()
    result = lmm.lrt(intercept, slope, method="mixture")
    assert result.statistic == pytest.approx(expected["lrt"], abs=1e-6)
    assert result.p_value == pytest.approx(expected["p_mixture_50_50"], rel=1e-6)
    approximate = lmm.lrt(intercept, slope, method="exact", n=5000)
    assert "approximate" in approximate.note
    assert approximate.p_value == pytest.approx(1 / 5001)


def test_exact_ratio_with_a_fixed_effect_under_test() -> None:
    ref = reference("vc_exactLRT_sleepstudy")
    (big,) = fits_of(ref)
    small = fit("Reaction ~ 1", "sleepstudy", "ML")
    result = lmm.lrt(small, big, method="exact", n=20_000)
    assert result.statistic == pytest.approx(ref["expected"]["lrt"], abs=1e-6)
    assert result.p_value == pytest.approx(1 / 20_001)


def test_bootstrap_of_a_fixed_effect() -> None:
    ref = reference("pb_ergostool_type")
    big, small = fits_of(ref)
    result = lmm.lrt(small, big, method="bootstrap", n=200, seed=1)
    assert result.statistic == pytest.approx(ref["expected"]["LRT"], abs=1e-6)
    assert result.p_value == pytest.approx(1 / 201)
    assert result.mc_se > 0


@pytest.mark.parametrize("name", ["ic_pastes_reml", "ic_sleepstudy"])
def test_information_criteria(name: str) -> None:
    ref = reference(name)
    got = lmm.aic_table(*fits_of(ref))
    for ours, theirs in (("loglik", "logLik"), ("aic", "AIC"), ("bic", "BIC")):
        np.testing.assert_allclose(got[ours], ref["expected"][theirs], atol=1e-6)
    assert list(got["n_params"]) == ref["expected"]["npar"]
    assert list(got.columns) == "n_params loglik aic aicc bic delta weight".split()
    assert got["weight"].sum() == pytest.approx(1)
    assert got["delta"].min() == 0


def test_table_of_random_terms_equals_ranova() -> None:
    expected = reference("ranova_sleepstudy")["expected"]
    got = slopes()[3].ranova()
    assert list(got.index) == expected["term"]
    assert list(got["n_params"]) == expected["npar"]
    np.testing.assert_allclose(got["loglik"], expected["logLik"], atol=1e-6)
    assert got["statistic"].iloc[1] == pytest.approx(expected["LRT"][1], abs=1e-6)
    assert got["p_value"].iloc[1] == pytest.approx(expected["p"][1], rel=1e-5)
    both = slopes()[2].ranova("mixture")
    assert list(both.index) == ["<none>", "(1 | Subject)", "(0 + Days | Subject)"]
    same = lmm.lrt(slopes()[1], slopes()[2], method="mixture")
    assert both["p_value"].iloc[2] == pytest.approx(same.p_value, rel=1e-6)
    assert list(both["note"]) == ["", "", ""]


def test_table_of_random_terms_keeps_the_rows_that_can_be_tested() -> None:
    """Without g the model is singular (h has no variance): the mixture is refused there alone."""
    rng = np.random.default_rng(0)
    g, h, x = np.repeat(np.arange(10), 10), np.tile(np.arange(10), 10), rng.normal(size=100)
    y = x + rng.normal(size=10)[g] + rng.normal(size=100)
    data = pd.DataFrame({"y": y, "x": x, "g": g.astype(str), "h": h.astype(str)})
    with pytest.warns(lmm.SingularFitWarning):
        big = lmm.Model("y ~ x + (1 | g) + (1 | h)", data).fit()
    got = big.ranova("mixture")
    assert list(got.index) == ["<none>", "(1 | g)", "(1 | h)"]
    assert np.isnan(got.loc["(1 | g)", "p_value"])
    assert "smaller model is singular" in got.loc["(1 | g)", "note"]
    chi2 = big.ranova()
    assert got.loc["(1 | g)", "statistic"] == chi2.loc["(1 | g)", "statistic"] > 10
    assert got.loc["(1 | h)", ["statistic", "p_value", "note"]].tolist() == [0.0, 1.0, ""]
    assert np.isfinite(chi2["p_value"].iloc[1:]).all()
    with pytest.raises(lmm.ComparisonError, match="found 2 parameters under test"):
        slopes()[3].ranova("exact")  # its only row is refused


# -- the distributions themselves -----------------------------------------------------------------


def test_weights_of_two_variances_are_not_binomial() -> None:
    linear, _, independent, _ = slopes()
    cone = cones.cone_of(nesting.pair(linear, independent))
    tail = cones.chi_bar(cone, 3.0, 50_000, 0)
    weights = tail.weights
    # two half-lines at the angle α in the metric of the information: α / 2π to both
    r = cone.cov[0, 1] / np.sqrt(cone.cov[0, 0] * cone.cov[1, 1])
    both = np.arccos(-r) / (2 * np.pi)
    assert weights[2] == pytest.approx(both, abs=0.006)
    assert weights[1] == pytest.approx(0.5, abs=0.009)
    assert weights[0] == pytest.approx(0.5 - both, abs=0.009)
    from scipy import stats

    truth = both * stats.chi2.sf(3.0, 2) + 0.5 * stats.chi2.sf(3.0, 1)
    assert abs(tail.p_value - truth) < 4 * tail.mc_se
    assert both == pytest.approx(0.131, abs=0.002)


def test_projection_on_positive_semidefinite_matrices_is_optimal() -> None:
    rng = np.random.default_rng(3)
    root = rng.standard_normal((4, 4))
    cone = cones.Cone(0, (2, 1), root @ root.T + 0.3 * np.eye(4))
    u = rng.standard_normal((50, 4)) @ np.linalg.cholesky(cone.cov).T
    x = cones.project(cone, u)
    W = np.array([[x[:, 0], x[:, 1]], [x[:, 1], x[:, 2]]]).transpose(2, 0, 1)
    assert np.linalg.eigvalsh(W).min() > -1e-9
    assert x[:, 3].min() >= 0
    # the residual lies in the polar cone and is orthogonal to the projection (Moreau)
    dual = (u - x) @ np.linalg.inv(cone.cov)
    np.testing.assert_allclose(np.sum(dual * x, axis=1), 0, atol=1e-6)
    polar = np.array([[dual[:, 0], dual[:, 1] / 2], [dual[:, 1] / 2, dual[:, 2]]])
    assert np.linalg.eigvalsh(polar.transpose(2, 0, 1)).max() < 1e-6
    assert dual[:, 3].max() < 1e-6


def test_exact_draws_are_those_of_refits() -> None:
    small, big = fit("Yield ~ 1", "Dyestuff"), fit("Yield ~ 1 + (1 | Batch)", "Dyestuff")
    from lmmjax.bootstrap import null_statistics

    drawn = exact.simulate(exact.spectrum(nesting.pair(small, big)), 20_000, 1)
    refitted = null_statistics(small, big, 500, 2).statistics
    for t in (1e-4, 0.5, 2.0):
        share = np.mean(drawn > t)
        assert abs(np.mean(refitted > t) - share) < 4 * np.sqrt(share * (1 - share) / 500)


def test_correlation_alone_is_interior() -> None:
    *_, independent, correlated = slopes()
    assert lmm.lrt(independent, correlated, method="mixture").weights == {1: 1.0}


# -- refusals -------------------------------------------------------------------------------------


def refused(small: lmm.Fit, big: lmm.Fit, words: str, **options: Any) -> None:
    with pytest.raises(lmm.ComparisonError, match=words):
        lmm.lrt(small, big, **options)


def test_reml_with_different_fixed_parts_and_its_remedy() -> None:
    small = fit("Reaction ~ 1 + (Days | Subject)", "sleepstudy")
    big = slopes()[3]
    refused(small, big, "refit='ml'")
    mended = lmm.lrt(small, big, refit="ml")
    expected = reference("lrt_sleepstudy_days")["expected"]
    assert mended.statistic == pytest.approx(expected["chisq"], abs=1e-6)
    with pytest.raises(lmm.ComparisonError, match="different fixed parts"):
        lmm.aic_table(small, big)


def test_nesting_is_judged_on_spans() -> None:
    data = table("sleepstudy").assign(half=lambda d: d["Days"] / 2 + 3)
    recoded = lmm.Model("Reaction ~ half + (1 | Subject)", data).fit()
    result = lmm.lrt(recoded, slopes()[3], method="mixture")
    assert result.statistic == pytest.approx(lmm.lrt(slopes()[1], slopes()[3]).statistic, abs=1e-6)
    refused(slopes()[3], slopes()[1], "not nested")
    refused(slopes()[1], slopes()[1], "same model")
    only_slope = fit("Reaction ~ Days + (0 + Days | Subject)", "sleepstudy")
    refused(slopes()[1], only_slope, "not nested")
    a, b = fit("strength ~ 1 + (1 | sample)", "Pastes"), fit("strength ~ 1 + (1 | batch)", "Pastes")
    refused(b, a, "not nested")


def test_correlated_effects_are_not_nested_in_independent_ones() -> None:
    *_, independent, correlated = slopes()
    refused(correlated, independent, "covariance structure")


def test_other_rows_responses_and_criteria() -> None:
    data = table("sleepstudy")
    fewer = lmm.Model("Reaction ~ Days", data.iloc[1:]).fit()
    refused(fewer, slopes()[1], "different rows")
    logged = lmm.Model("log(Reaction) ~ Days", data).fit()
    refused(logged, slopes()[1], "different responses")
    refused(slopes("ML")[0], slopes()[1], "ML and one by REML")
    with pytest.raises(lmm.ComparisonError, match="ML and by REML"):
        lmm.aic_table(slopes("ML")[0], slopes()[1])


def test_mixture_is_refused_where_a_nuisance_variance_is_zero() -> None:
    data = table("Dyestuff2").assign(other=lambda d: d.index % 3)
    with pytest.warns(lmm.SingularFitWarning):
        small = lmm.Model("Yield ~ 1 + (1 | Batch)", data).fit()
        big = lmm.Model("Yield ~ 1 + (1 | Batch) + (1 | other)", data).fit()
    refused(small, big, "method='bootstrap'", method="mixture")


def test_exact_needs_one_variance() -> None:
    refused(slopes()[0], slopes()[3], "found 3 parameters", method="exact")


def test_unknown_options() -> None:
    small, big = slopes()[:2]
    for options in ({"method": "wald"}, {"refit": "reml"}, {"n": 0}):
        with pytest.raises(lmm.LmmError, match="expected"):
            lmm.lrt(small, big, **options)


# -- surface --------------------------------------------------------------------------------------


def test_print_tells_the_distribution_and_its_error() -> None:
    result = lmm.lrt(slopes()[0], slopes()[2], method="mixture", n=2000)
    assert "chi2(2)" in repr(result)
    assert "Monte Carlo SE" in repr(result)
    assert "<pre>" in result._repr_html_()
    with pytest.raises(AttributeError):
        result.p_value = 0.0  # type: ignore[misc]


def test_command_line(capsys: Any, monkeypatch: Any) -> None:
    call = ["test", "Dyestuff", "Yield ~ 1", "Yield ~ 1 + (1 | Batch)", "--method", "mixture"]
    assert cli.main([*call, "--reml", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    expected = reference("vc_dyestuff")["expected"]
    assert got["p_value"] == pytest.approx(expected["p_mixture_50_50"], rel=1e-6)
    assert got["criterion"] == "REML"
    assert [m["n_params"] for m in got["models"]] == [2, 3]
    assert cli.main(call) == 0
    assert "mixture 0.5 chi2(0)" in capsys.readouterr().out
    assert cli.main([*call[:2], call[3], call[2]]) == 2
    assert "not nested" in capsys.readouterr().err
    fixed = ["test", "sleepstudy", "Reaction ~ 1", "Reaction ~ Days", "--reml"]
    assert cli.main(fixed) == 2
    assert "Leave out --reml" in capsys.readouterr().err


def test_residual_structure_is_tested_by_chi_squared() -> None:
    data = table("sleepstudy")
    small = lmm.Model("Reaction ~ Days", data).fit()
    big = lmm.Model("Reaction ~ Days", data, residual="ar1(Days | Subject)").fit()
    result = lmm.lrt(small, big)
    assert result.df == 1
    assert result.statistic == pytest.approx(2 * (big.loglik - small.loglik))
    assert list(result.table.index) == ["Reaction ~ Days", "Reaction ~ Days, ar1(Days | Subject)"]
    assert "conservative" not in result.note  # no correlation is an inner point of ar1
    decay = lmm.Model("Reaction ~ Days", data, residual="car1(Days | Subject)").fit()
    assert "conservative: the null has car1 at an end" in lmm.lrt(small, decay).note
    refused(small, big, "no variance among them", method="exact")
    # φ of ar1 is interior: the mixture is chi-squared; the decay of car1 is a half-line
    assert lmm.lrt(small, big, method="mixture").p_value == pytest.approx(result.p_value)
    half = lmm.lrt(small, decay, method="mixture")
    assert half.weights == {0: 0.5, 1: 0.5}
    assert half.p_value == pytest.approx(0.5 * lmm.lrt(small, decay).p_value)
    arma = lmm.Model("Reaction ~ Days", data, residual="arma(Days | Subject)").fit()
    assert "without meaning" in lmm.lrt(small, arma).note
    refused(small, arma, "without meaning|no meaning", method="mixture")
    refused(big, slopes()[1], "residual structures")

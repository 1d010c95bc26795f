"""Intervals: profile likelihood against root-found references, Wald and bootstrap."""

from __future__ import annotations

import functools
import json
import warnings

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from reference_cases import REFERENCE, case_contrasts, case_data, case_ids, load_case, numbers
from residual_cases import data, load, residual_text
from scipy import stats

import lmmjax as lmm
from lmmjax import boundary, covariance
from lmmjax.inference import profile as profiles
from lmmjax.inference.profile import Profiler
from lmmjax.precision import in_float64

#: interior, at zero, correlation of one, no correlation; chosen to share compiled programs
QUICK = (
    "dyestuff_ml",
    "dyestuff_reml",
    "dyestuff2_singular_reml",
    "rail_reml",
    "sleepstudy_ri_ml",
    "sleepstudy_ri_reml",
    "sleepstudy_slope_reml",
    "sim_corr1_singular_reml",
)

PROFILED = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in case_ids()
    if "ci_profile_95_exact" in load_case(name)["expected"]
]


@functools.cache
def fit(name: str) -> lmm.Fit:
    case = load_case(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmm.SingularFitWarning)
        model = lmm.Model(
            case["formula"],
            case_data(case),
            weights=case["weights"],
            contrasts=case_contrasts(case) or None,
        )
        return model.fit(method=case["method"])


@functools.cache
def profile(name: str, criterion: str | None = None):
    return fit(name).confint("profile", criterion=criterion)


@pytest.mark.parametrize("name", PROFILED)
def test_profile_equals_reference(name: str) -> None:
    expected = load_case(name)["expected"]["ci_profile_95_exact"]
    # lme4 numbers further terms on a factor, and orders the terms by their levels
    names = [n.removesuffix(".1") for n in expected["names"]]
    found = profile(name, "ML")
    assert sorted(found.index) == sorted(names)
    got = found.loc[names]
    low, high = numbers(expected["lower"]), numbers(expected["upper"])
    assert np.max(np.abs(got["low"] - low) / (high - low)) < 1e-6
    assert np.max(np.abs(got["high"] - high) / (high - low)) < 1e-6
    variances = len(got) - len(fit(name).beta)  # estimates of β are the fit's own
    np.testing.assert_allclose(
        got["estimate"][:variances], expected["estimate_ML"][:variances], rtol=1e-5, atol=1e-5
    )


def test_boundaries_are_limits() -> None:
    assert profile("dyestuff2_singular_reml", "ML").loc["sd_(Intercept)|Batch", "low"] == 0
    assert profile("sim_corr1_singular_reml", "ML").loc["cor_x.(Intercept)|g", "high"] == 1


@in_float64
def dense_reml(fit: lmm.Fit, sd: float, sigma: float) -> float:
    """-2 restricted log-likelihood of a random intercept by dense matrices."""
    design = fit.model.design
    Z = np.eye(len(design.terms[0].levels))[design.terms[0].codes]
    V = sd**2 * Z @ Z.T + sigma**2 * np.eye(fit.n_obs)
    Vi = np.linalg.inv(V)
    XVX = design.X.T @ Vi @ design.X
    r = design.y - design.X @ np.linalg.solve(XVX, design.X.T @ Vi @ design.y)
    nu = fit.n_obs - design.p
    logdets = np.linalg.slogdet(V)[1] + np.linalg.slogdet(XVX)[1]
    return float(nu * np.log(2 * np.pi) + logdets + r @ Vi @ r)


def test_profile_of_the_reml_criterion() -> None:
    from scipy.optimize import minimize_scalar

    one, got = fit("dyestuff_reml"), profile("dyestuff_reml")
    assert got.attrs["criterion"] == {"variance parameters": "REML", "fixed effects": "ML"}
    assert "REML integrates" in got.attrs["note"]
    top = one.deviance + stats.chi2.ppf(0.95, 1)
    for value in got.loc["sd_(Intercept)|Batch", ["low", "high"]]:
        best = minimize_scalar(
            lambda s, v=value: dense_reml(one, v, s), bounds=(20, 100), method="bounded"
        )
        assert best.fun == pytest.approx(top, abs=1e-5)
    for value in got.loc["sigma", ["low", "high"]]:
        best = minimize_scalar(
            lambda s, v=value: dense_reml(one, s, v), bounds=(0, 300), method="bounded"
        )
        assert best.fun == pytest.approx(top, abs=1e-5)
    ml = profile("dyestuff_ml")
    assert got.loc["(Intercept)", "low"] == pytest.approx(ml.loc["(Intercept)", "low"], rel=1e-8)


@in_float64
def test_profile_at_the_estimates_is_the_optimum() -> None:
    one = fit("sleepstudy_slope_reml")
    profiler = Profiler(one)
    for name in ("sd_(Intercept)|Subject", "sd_Days|Subject", "cor_Days.(Intercept)|Subject"):
        parameter = profiler.component(name)
        value, _ = profiler.deviance(parameter, parameter.estimate, parameter.start())
        assert value == pytest.approx(one.deviance, abs=1e-7)
    assert jnp.zeros(1).dtype == jnp.float64


def test_profiles_with_an_old_hessian_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = profile("dyestuff_reml")
    monkeypatch.setattr(profiles, "LARGE", -1)
    lagged = fit("dyestuff_reml").confint("profile")
    pd.testing.assert_frame_equal(lagged, exact, rtol=1e-7)


def test_linear_model_has_an_exact_profile() -> None:
    one = lmm.Model("Yield ~ 1", lmm.load_dataset("Dyestuff")).fit(method="ML")
    got = one.confint("profile")
    n, q = one.n_obs, stats.chi2.ppf(0.95, 1)
    half = one.sigma * np.sqrt(np.expm1(q / n))  # n log(1 + d² / σ̂²) = q
    assert got.loc["(Intercept)", "high"] == pytest.approx(float(one.beta.iloc[0]) + half, rel=1e-8)
    for s in got.loc["sigma", ["low", "high"]]:
        ratio = one.sigma**2 / s**2
        assert n * (ratio - 1 - np.log(ratio)) == pytest.approx(q, rel=1e-6)


def test_wald_on_unbounded_scales() -> None:
    one = fit("sleepstudy_slope_reml")
    got = one.confint()
    assert list(got.columns) == ["estimate", "low", "high"]
    assert list(got.index) == list(profile("sleepstudy_slope_reml", "ML").index)
    sd = got.loc["sd_Days|Subject"]
    assert sd["estimate"] ** 2 == pytest.approx(sd["low"] * sd["high"])
    z = np.arctanh(got.loc["cor_Days.(Intercept)|Subject"])
    assert z["estimate"] == pytest.approx((z["low"] + z["high"]) / 2)
    # the same information as the Wald tests of variances: d log sd = d var / (2 var)
    tests = one.variance_tests()
    row = tests[(tests["term1"] == "Days") & tests["term2"].isna()].iloc[0]
    half = np.log(sd["high"] / sd["low"]) / 2
    assert half == pytest.approx(stats.norm.ppf(0.975) * row["std_error"] / (2 * row["estimate"]))
    table = one.coef_table()
    np.testing.assert_allclose(
        got.loc["Days", ["low", "high"]], table.loc["Days", ["ci_low", "ci_high"]]
    )


def test_wald_of_a_singular_fit_is_unknown() -> None:
    got = fit("dyestuff2_singular_reml").confint()
    assert np.isnan(got.loc["sd_(Intercept)|Batch", "low"])
    assert np.isfinite(got.loc["sigma"]).all()


def test_wald_takes_what_coef_table_takes() -> None:
    one = fit("sleepstudy_slope_reml")
    for options in (
        {"df": "kenward-roger", "information": "observed"},
        {"df": "kenward-roger", "information": "expected"},
        {"df": "kenward-roger", "second_order": False},
        {"df": "wald"},
    ):
        got = one.confint("wald", level=0.9, **options).loc[list(one.beta.index)]
        want = one.coef_table(level=0.9, **options)
        np.testing.assert_array_equal(got["low"], want["ci_low"])
        np.testing.assert_array_equal(got["high"], want["ci_high"])


def test_sds_on_the_boundary_are_zero_everywhere() -> None:
    one = fit("dyestuff2_singular_reml")
    assert one.singular
    assert one.theta.tolist() == [0.0]
    assert one.varcorr().loc[0, ["vcov", "sdcor"]].tolist() == [0.0, 0.0]
    assert one.confint().loc["sd_(Intercept)|Batch", "estimate"] == 0.0
    assert one.variance_tests().loc[0, "estimate"] == 0.0
    assert one.icc()["adjusted"] == 0.0
    assert one.r2().tolist() == [0.0, 0.0]
    assert np.all(one.ranef() == 0.0) and np.all(one.ranef_se() == 0.0)
    with lmm.float64():
        at_zero = float(one.model.deviance(one.theta, one.method))
    assert one.deviance == pytest.approx(at_zero, abs=1e-9)


@pytest.mark.parametrize("random", ["(x | g)", "(x || g)", "cs(1 + x | g)"])
def test_one_sd_on_the_boundary_leaves_the_others(random: str) -> None:
    rng, x = np.random.default_rng(2), np.arange(-3.0, 4.0)
    basis = np.stack([np.ones(7), x])
    within = rng.normal(size=(20, 7))
    within -= within @ basis.T @ np.linalg.inv(basis @ basis.T) @ basis  # groups without slopes
    data = pd.DataFrame({"g": np.repeat(np.arange(20), 7).astype(str), "x": np.tile(x, 20)})
    data["y"] = (within + 2 * rng.normal(size=(20, 1))).ravel()
    with pytest.warns(lmm.SingularFitWarning, match="the variance of x | g is 0"):
        one = lmm.Model(f"y ~ x + {random}", data).fit()
    table = one.varcorr()
    sd = table[table["term2"].isna()].set_index("term1")["sdcor"]
    assert sd["x"] == 0.0 and sd["(Intercept)"] > 1
    assert np.all(one.ranef()["x"] == 0.0) and np.all(one.ranef()["(Intercept)"] != 0.0)
    assert np.all(table.loc[table["term2"].notna(), "vcov"] == 0.0)
    with lmm.float64():
        assert one.deviance == pytest.approx(float(one.model.deviance(one.theta)), abs=1e-6)


@pytest.mark.parametrize("kind", list(covariance.STRUCTURES))
def test_rows_of_a_factor_are_made_zero(kind: str) -> None:
    one = covariance.STRUCTURES[kind](3)
    theta = one.start() + np.linspace(0.1, 0.4, one.n_theta)
    lam = one.factor(theta)
    own = np.ones(3, bool) if kind.startswith("hom") else np.array([True, False, False])
    got = one.factor(boundary.rectify(one, theta, own))
    keep = np.outer(~own, ~own)
    np.testing.assert_allclose(got @ got.T, np.where(keep, lam @ lam.T, 0.0), atol=1e-14)
    if kind in ("cs", "homcs"):  # the correlation is no SD
        assert boundary.rectify(one, theta, own)[-1] == theta[-1]


def test_bootstrap_intervals() -> None:
    one = fit("dyestuff_reml")
    got = one.confint("bootstrap", n=400, seed=3)
    assert list(got.index) == ["sd_(Intercept)|Batch", "sigma", "(Intercept)"]
    assert (got["low"] <= got["estimate"]).all()
    assert (got["estimate"] <= got["high"]).all()
    again = one.bootstrap(400, 3).confint(parm="sigma")
    np.testing.assert_array_equal(got.loc["sigma"], again.loc["sigma"])


def test_choice_of_parameters_and_levels() -> None:
    one = fit("dyestuff_reml")
    assert list(one.confint(parm="beta_").index) == ["(Intercept)"]
    assert list(one.confint(parm="theta_").index) == ["sd_(Intercept)|Batch", "sigma"]
    wide = one.confint("profile", level=0.99, parm="sigma")
    narrow = one.confint("profile", parm="sigma")
    assert wide["high"].item() > narrow["high"].item()
    assert wide["low"].item() < narrow["low"].item()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "likelihood"},
        {"parm": "nothing"},
        {"criterion": "ML"},
        {"method": "profile", "criterion": "AIC"},
        {"level": 95},
        {"method": "bootstrap", "kind": "bca", "n": 20},
        {"method": "wald", "kind": "studentized"},
        {"method": "wald", "kind": "nonsense"},
        {"method": "profile", "df": "wald"},
        {"method": "profile", "information": "observed"},
        {"method": "bootstrap", "second_order": False},
        {"method": "bootstrap", "df": "residual"},
    ],
)
def test_bad_options(options: dict) -> None:
    with pytest.raises(lmm.LmmError, match="expected"):
        fit("dyestuff_reml").confint(**options)


# -- conditional AIC ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::lmmjax.SingularFitWarning")
@pytest.mark.parametrize(
    "name",
    [
        "dyestuff_reml",
        "dyestuff2_singular_reml",
        pytest.param("pastes_nested_reml", marks=pytest.mark.slow),
        pytest.param("sleepstudy_slope_reml", marks=pytest.mark.slow),
    ],
)
def test_conditional_df_are_those_of_refits(name: str) -> None:
    one, case = fit(name), load_case(name)
    n, h = one.n_obs, 1e-3 * one.sigma
    y, formula = one.model.design.y[:, None], "~" + case["formula"].split("~")[1]
    both = np.concatenate([y + h * np.eye(n), y - h * np.eye(n)], axis=1)
    refits = lmm.fit_many(formula, case_data(case), responses=both)
    fitted = np.column_stack([refits[i].fitted() for i in range(2 * n)])
    trace = np.sum(np.diag(fitted[:, :n] - fitted[:, n:])) / (2 * h)
    got = one.caic()
    assert got["df"] == pytest.approx(1 + trace, abs=1e-5)
    assert got["caic"] == pytest.approx(-2 * got["loglik"] + 2 * got["df"])


@pytest.mark.parametrize(
    ("name", "df"), [("sleepstudy_slope_reml", 31.2535), ("pastes_nested_reml", 30.1318)]
)
def test_conditional_loglik_equals_caic4(name: str, df: float) -> None:
    ref = json.loads((REFERENCE / "tests" / f"caic_{name}.json").read_text())
    got = fit(name).caic()
    assert got["loglik"] == pytest.approx(ref["expected"]["loglikelihood"], abs=1e-6)
    # cAIC4 halves a term of the correction, see the docstring; ours are those of refits
    assert got["df"] == pytest.approx(df, abs=1e-4)
    assert 0.02 < ref["expected"]["df"] - got["df"] < 0.06


def test_wald_beside_a_residual_structure_equals_nlme() -> None:
    case = load("sim_ar1_lme_ar1_reml")
    model = lmm.Model(case["formula"], data(case), residual=residual_text(case))
    got = model.fit().confint()
    # intervals() of nlme 3.1-162, whose Hessian is numerical: good to 1e-3
    expected = {
        "sd_(Intercept)|id": (1.6482621251607685, 2.925115901371273),
        "sigma": (1.865181032029032, 2.411154564737717),
        "phi": (0.4771989835667212, 0.6931807137593827),
    }
    assert list(got.index) == [*expected, *model.design.x_names]
    for name, limits in expected.items():
        np.testing.assert_allclose(got.loc[name, ["low", "high"]], limits, rtol=2e-3)


def test_zeta_crosses_the_normal_quantile_at_the_limits() -> None:
    one = fit("dyestuff_ml")
    got = one.profile("sigma", level=0.95, points=5)
    assert list(got.columns) == ["parameter", "value", "zeta"]
    z = stats.norm.ppf(0.975)
    np.testing.assert_allclose(got["zeta"].iloc[[0, -1]], [-z, z], atol=1e-6)
    assert got["zeta"].is_monotonic_increasing
    limits = profile("dyestuff_ml").loc["sigma", ["low", "high"]]
    np.testing.assert_allclose(got["value"].iloc[[0, -1]], limits, rtol=1e-6)

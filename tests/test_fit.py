"""Fits: what a user can ask of them, that they do not depend on units or starts, and bad input."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import warnings
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from reference_cases import case_data, load_case

import lmmjax as lmm
from lmmjax import derivatives, optimize
from lmmjax.covariance import covariance


@pytest.fixture(scope="module")
def sleep() -> pd.DataFrame:
    return lmm.load_dataset("sleepstudy")


@pytest.fixture(scope="module")
def model(sleep: pd.DataFrame) -> lmm.Model:
    return lmm.Model("Reaction ~ Days + (Days | Subject)", sleep)


@pytest.fixture(scope="module")
def fit(model: lmm.Model) -> lmm.Fit:
    return model.fit()


# -- the model -----------------------------------------------------------------------------------


def test_model_says_what_it_is(model: lmm.Model) -> None:
    assert model.n_obs == 180
    assert model.n_dropped == 0
    assert model.groups == {"Subject": 18}
    names = ["Subject.(Intercept)", "Subject.Days.(Intercept)", "Subject.Days"]
    assert model.theta_names == names
    assert model.theta0.shape == (3,)


def test_deviance_at_the_optimum_is_that_of_the_fit(model: lmm.Model, fit: lmm.Fit) -> None:
    with lmm.float64():
        assert float(model.deviance(fit.theta)) == pytest.approx(fit.deviance, abs=1e-9)
        assert float(model.deviance(fit.theta, method="ML")) == pytest.approx(1751.986, abs=0.1)


def test_deviance_takes_all_transformations(model: lmm.Model, fit: lmm.Fit) -> None:
    with lmm.float64():
        theta = jnp.asarray(fit.theta)
        slope = jax.grad(model.deviance)(theta)
        np.testing.assert_allclose(slope, 0.0, atol=1e-6)
        H = jax.hessian(model.deviance)(theta)
        assert np.all(np.linalg.eigvalsh(H) > 0)
        many = jnp.stack([theta, 1.1 * theta, 0.9 * theta])
        values = jax.jit(jax.vmap(model.deviance))(many)
        _, scanned = jax.lax.scan(lambda c, t: (c, model.deviance(t)), 0.0, many)
        np.testing.assert_allclose(values, scanned, rtol=1e-13)
        assert values.dtype == jnp.float64
        assert float(values[0]) < float(values[1:].min())


def test_deviance_refuses_single_precision(model: lmm.Model, sleep: pd.DataFrame) -> None:
    with pytest.raises(lmm.PrecisionError, match=r"with lmmjax\.float64"):
        model.deviance(model.theta0)
    with pytest.raises(lmm.PrecisionError):
        jax.jit(model.deviance)(model.theta0)
    low = lmm.Model("Reaction ~ Days + (Days | Subject)", sleep, dtype="float32")
    value = low.deviance(low.theta0)
    assert value.dtype == jnp.float32
    with lmm.float64():
        assert float(value) == pytest.approx(float(model.deviance(model.theta0)), rel=1e-5)


def test_deviance_names_a_wrong_theta(model: lmm.Model) -> None:
    with lmm.float64(), pytest.raises(lmm.DataError, match=r"expected \(3,\)"):
        model.deviance(np.ones(2))


# -- the optimum -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "digits"), [("lbfgs", 1e-6), ("adam", 1e-4), (optax.sgd(1e-3, 0.9), 1e-3)]
)
def test_every_optimizer_finds_the_optimum(
    model: lmm.Model, fit: lmm.Fit, optimizer: Any, digits: float
) -> None:
    other = model.fit(optimizer=optimizer)
    assert other.converged, other.message
    assert other.loglik == pytest.approx(fit.loglik, abs=1e-6)
    np.testing.assert_allclose(other.theta, fit.theta, rtol=digits, atol=digits)


def test_result_does_not_depend_on_the_start(model: lmm.Model, fit: lmm.Fit) -> None:
    for start in ([3.0, -1.0, 0.01], [0.05, 0.0, 2.0], [10.0, 5.0, 5.0]):
        other = model.fit(start=start)
        np.testing.assert_allclose(other.theta, fit.theta, atol=1e-8)
    with pytest.raises(lmm.DataError, match="variance of 0"):
        model.fit(start=[0.0, 0.0, 1.0])


def test_results_do_not_depend_on_the_rows_or_on_the_model_before(
    sleep: pd.DataFrame, fit: lmm.Fit
) -> None:
    shuffled = sleep.sample(frac=1.0, random_state=3)
    other = lmm.Model("Reaction ~ Days + (Days | Subject)", shuffled).fit()
    np.testing.assert_allclose(other.theta, fit.theta, rtol=1e-9)
    np.testing.assert_allclose(other.ranef(), fit.ranef(), atol=1e-7)
    assert list(other.fitted().index) == list(shuffled.index)


def _many_levels(S: int) -> tuple[str, pd.DataFrame]:
    """1,200 levels of few sizes (S = 1), or seen at the same four times (S = 2)."""
    rng = np.random.default_rng(5)
    data = pd.DataFrame({"g": np.repeat(np.arange(1200), 4), "t": np.tile([0.0, 1, 2, 3], 1200)})
    effects = rng.normal(size=(1200, 2))[data["g"]] * [1.0, 0.5 * (S == 2)]
    data["y"] = 1 + 0.3 * data["t"] + effects[:, 0] + effects[:, 1] * data["t"]
    data["y"] += rng.normal(size=len(data))
    if S == 2:
        return "y ~ t + (t | g)", data
    return "y ~ t + (1 | g)", data[rng.uniform(size=len(data)) < 0.9]


@pytest.mark.parametrize("S", [1, 2])
def test_collapsed_levels_change_nothing(S: int, monkeypatch: pytest.MonkeyPatch) -> None:
    formula, data = _many_levels(S)
    small = lmm.Model(formula, data)
    fit = small.fit()
    assert small._padded[0].chain[0][2] < 50
    monkeypatch.setattr("lmmjax.model.MANY_LEVELS", 10**9)
    whole = lmm.Model(formula, data)
    other = whole.fit()
    assert whole._padded[0].chain[0][2] >= 1200
    assert fit.loglik == pytest.approx(other.loglik, abs=1e-8)
    np.testing.assert_allclose(fit.theta, other.theta, rtol=1e-6)
    np.testing.assert_allclose(fit.coef_table(), other.coef_table(), rtol=1e-6)
    np.testing.assert_allclose(fit.ranef(), other.ranef(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("shift", "scale"), [(2000.0, 1.0), (1e8, 1.0), (0.0, 1e-6), (0.0, 1e6)])
def test_units_of_a_covariate_do_not_matter(
    sleep: pd.DataFrame, fit: lmm.Fit, shift: float, scale: float
) -> None:
    moved = sleep.assign(Days=sleep["Days"] * scale + shift)
    other = lmm.Model("Reaction ~ Days + (Days | Subject)", moved).fit()
    assert other.converged and not other.singular
    assert other.sigma == pytest.approx(fit.sigma, rel=1e-9)
    assert other.beta["Days"] * scale == pytest.approx(fit.beta["Days"], rel=1e-9)
    assert other.std_errors[1] * scale == pytest.approx(fit.std_errors[1], rel=1e-9)
    slope_sd = other.varcorr()["sdcor"][1] * scale
    assert slope_sd == pytest.approx(fit.varcorr()["sdcor"][1], rel=1e-8)
    expected = fit.loglik - np.log(scale)
    assert other.loglik == pytest.approx(expected, abs=1e-7)
    np.testing.assert_allclose(other.fitted(), fit.fitted(), rtol=1e-6)
    df = other.coef_table()["df"]["Days"]
    assert df == pytest.approx(fit.coef_table()["df"]["Days"], rel=1e-6)


@pytest.mark.parametrize("leading", [1.0, 1e6, 1e12])
@pytest.mark.parametrize("replicates", [21, 201, 2001])
def test_nist_anova(leading: float, replicates: int) -> None:
    """NIST StRD SmLs01 to SmLs09: nine levels, values that differ in the last digits only.

    Generated from the published definition (Simon and Lesage 1989). Balanced one-way REML has a
    closed form, evaluated here in exact arithmetic on the numbers as stored.
    """
    level = [0.4, *([0.3, 0.5] * 4)]
    pattern = [0.0, *([-0.1, 0.1] * (replicates // 2))]
    y = np.array([[leading + a + e for e in pattern] for a in level])
    exact = [[Fraction(v) for v in row] for row in y]
    means = [sum(row) / replicates for row in exact]
    grand = sum(means) / 9
    between = replicates * sum((m - grand) ** 2 for m in means) / 8
    within = sum((v - m) ** 2 for row, m in zip(exact, means, strict=True) for v in row)
    within /= 9 * (replicates - 1)
    data = {"y": y.ravel(), "g": np.repeat(np.arange(9), replicates)}
    fit = lmm.Model("y ~ 1 + (1 | g)", data).fit()
    variance = fit.varcorr()["vcov"]
    assert variance[0] == pytest.approx(float((between - within) / replicates), rel=1e-9)
    assert variance[1] == pytest.approx(float(within), rel=1e-10)
    assert fit.beta.iloc[0] == pytest.approx(float(grand), rel=1e-15)


def test_saddle_at_zero_is_left() -> None:
    model = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff"))
    layout = model._plan.layout
    with lmm.float64():

        def f(theta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            return derivatives.value_gradient_hessian(layout, "REML", theta, *model._arrays())

        assert float(f(jnp.zeros(1))[1][0]) == 0.0
        best = jax.jit(lambda t: optimize.newton(f, t))(jnp.zeros(1))
    assert int(best.status) == optimize.CONVERGED
    assert abs(float(best.theta[0])) == pytest.approx(model.fit().theta[0], rel=1e-8)


def test_singular_fits_say_which_component() -> None:
    with pytest.warns(lmm.SingularFitWarning, match="variance of .Intercept. | Batch is 0"):
        fit = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff2")).fit()
    assert fit.singular and fit.converged
    assert fit.theta == pytest.approx([0.0], abs=1e-8)
    assert fit.coef_table()["df"].item() == pytest.approx(29.0)
    assert "variance of (Intercept) | Batch is 0" in fit.summary()


def test_correlation_on_the_boundary_is_named() -> None:
    case = load_case("sim_corr1_singular_reml")
    with pytest.warns(lmm.SingularFitWarning, match="correlation of .Intercept. and x | g is 1"):
        fit = lmm.Model(case["formula"], case_data(case)).fit()
    assert fit.converged
    assert fit.varcorr()["sdcor"][2] == pytest.approx(1.0, abs=1e-6)


def test_a_fit_that_stopped_early_says_so(model: lmm.Model) -> None:
    with pytest.warns(lmm.ConvergenceWarning, match="did not converge"):
        fit = model.fit(optimizer=optax.sgd(1e-9), start=[0.5, 0.1, 0.5])
    assert not fit.converged
    assert "NOT CONVERGED" in fit.summary()
    assert "optimizer='newton'" in fit.message


@pytest.mark.parametrize("cov", ["diag", "hom", "cs", "homcs"])
def test_structures_are_nested_in_the_unstructured(cov: str) -> None:
    data = lmm.load_dataset("Machines")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmm.SingularFitWarning)
        full = lmm.Model("score ~ Machine + (0 + Machine | Worker)", data).fit(method="ML")
        less = lmm.Model(f"score ~ Machine + {cov}(0 + Machine | Worker)", data).fit(method="ML")
    assert less.converged
    assert less.loglik < full.loglik
    assert less.n_params < full.n_params
    cov_matrix = np.asarray(less._term_covs()[0])
    sd = np.sqrt(np.diag(cov_matrix))
    corr = cov_matrix / np.outer(sd, sd)
    off = corr[np.tril_indices(3, -1)]
    if cov in ("hom", "homcs"):
        np.testing.assert_allclose(sd, sd[0], rtol=1e-10)
    np.testing.assert_allclose(off, 0.0 if cov in ("diag", "hom") else off[0], atol=1e-10)


@pytest.mark.parametrize("cov", ["us", "diag", "hom", "cs", "homcs"])
@pytest.mark.parametrize("S", [1, 2, 4])
def test_pivots_are_the_diagonal_of_the_triangular_factor(cov: str, S: int) -> None:
    structure = covariance(cov, S)
    theta = np.random.default_rng(S).uniform(0.2, 1.2, structure.n_theta)
    lower = np.linalg.qr(structure.factor(theta).T, mode="r")
    size = np.abs(np.diag(lower))
    np.testing.assert_allclose(np.broadcast_to(structure.pivots(theta), S), size, rtol=1e-12)
    theta[0] = 0.0
    assert np.min(structure.pivots(theta)) == 0.0


@pytest.mark.parametrize("angle", [0.0, np.pi / 2])
def test_a_correlation_at_its_bound_is_a_pivot_of_zero(angle: float) -> None:
    assert abs(np.min(covariance("cs", 3).pivots(np.array([1.0, 1.0, 1.0, angle])))) < 1e-15


def test_homogeneous_compound_symmetry_is_the_nested_random_intercept() -> None:
    data = lmm.load_dataset("Machines")
    nested = lmm.Model("score ~ Machine + (1 | Worker) + (1 | Worker:Machine)", data).fit()
    homcs = lmm.Model("score ~ Machine + homcs(0 + Machine | Worker)", data).fit()
    assert homcs.loglik == pytest.approx(nested.loglik, abs=1e-9)
    assert homcs.sigma == pytest.approx(nested.sigma, rel=1e-8)


# -- questions to a fit ---------------------------------------------------------------------------


def test_coefficient_tables(fit: lmm.Fit) -> None:
    table = fit.coef_table()
    columns = ["estimate", "std_error", "df", "statistic", "p_value", "ci_low", "ci_high"]
    assert list(table.columns) == columns
    assert list(table.index) == ["(Intercept)", "Days"]
    assert fit.coef_table(df="residual")["df"].tolist() == [178.0, 178.0]
    wald = fit.coef_table(df="wald", level=0.9)
    half = 1.6448536269514722 * wald["std_error"]
    np.testing.assert_allclose(wald["ci_high"] - wald["estimate"], half)
    with pytest.raises(lmm.LmmError, match="expected one of"):
        fit.coef_table(df="kenward")
    with pytest.raises(lmm.LmmError, match="probability"):
        fit.coef_table(level=95)


def test_default_df_follows_fit(model: lmm.Model) -> None:
    assert model.fit(df="wald").coef_table()["df"].tolist() == [np.inf, np.inf]


def test_information_criteria(fit: lmm.Fit) -> None:
    k, n = 6, 180
    assert fit.n_params == k
    assert fit.deviance == pytest.approx(-2 * fit.loglik)
    assert fit.aic == pytest.approx(fit.deviance + 2 * k)
    assert fit.bic == pytest.approx(fit.deviance + k * np.log(n))
    assert fit.aicc == pytest.approx(fit.aic + 2 * k * (k + 1) / (n - k - 1))


def test_varcorr_is_lme4s_frame(fit: lmm.Fit) -> None:
    frame = fit.varcorr()
    assert list(frame.columns) == ["group", "term1", "term2", "vcov", "sdcor"]
    assert frame["group"].tolist() == ["Subject", "Subject", "Subject", "Residual"]
    assert frame["sdcor"].tolist() == pytest.approx([24.7405, 5.9221, 0.0656, 25.5918], abs=1e-4)
    assert frame["term2"].isna().tolist() == [True, True, False, True]


def test_several_terms_on_one_factor_are_joined(sleep: pd.DataFrame) -> None:
    fit = lmm.Model("Reaction ~ Days + (Days || Subject)", sleep).fit()
    assert list(fit.ranef("Subject").columns) == ["(Intercept)", "Days"]
    assert fit.ranef_cov("Subject").shape == (18, 2, 2)
    np.testing.assert_allclose(
        fit.ranef_se().to_numpy() ** 2, np.einsum("jss->js", fit.ranef_cov()), rtol=1e-12
    )
    with pytest.raises(lmm.DataError, match="expected one of"):
        fit.ranef("Days")


def test_residuals(fit: lmm.Fit, sleep: pd.DataFrame) -> None:
    response = fit.residuals()
    np.testing.assert_allclose(response, sleep["Reaction"] - fit.fitted())
    np.testing.assert_allclose(fit.residuals(kind="pearson"), response / fit.sigma)
    with pytest.raises(lmm.DataError, match="normalized"):
        fit.residuals(kind="deviance")


def test_predict_new_levels_and_intervals(fit: lmm.Fit) -> None:
    new = pd.DataFrame({"Days": [0, 5, 5], "Subject": ["308", "308", "999"]}, index=list("abc"))
    with pytest.raises(lmm.DataError, match=r"999.*new_levels='population'"):
        fit.predict(new)
    point = fit.predict(new, new_levels="population")
    assert list(point.index) == ["a", "b", "c"]
    population = fit.predict(new, kind="population")
    assert point["c"] == pytest.approx(population["c"])
    frame = fit.predict(new, interval="confidence", new_levels="population")
    assert list(frame.columns) == ["estimate", "std_error", "low", "high"]
    wide = fit.predict(new, interval="prediction", new_levels="population")
    np.testing.assert_allclose(
        wide["std_error"] ** 2, frame["std_error"] ** 2 + fit.sigma**2, rtol=1e-10
    )
    # a new level carries the whole variance of its effects
    D = fit.varcorr()["vcov"].to_numpy()
    fixed = np.array([1.0, 5.0]) @ fit.vcov().to_numpy() @ np.array([1.0, 5.0])
    whole = fixed + D[0] + 25 * D[1] + 10 * D[2]
    assert frame["std_error"]["c"] ** 2 == pytest.approx(whole, rel=1e-8)


def test_prediction_of_training_rows_is_fitted(fit: lmm.Fit, sleep: pd.DataFrame) -> None:
    np.testing.assert_allclose(fit.predict(), fit.fitted())
    np.testing.assert_allclose(fit.predict(sleep), fit.fitted(), rtol=1e-10)


def test_linear_model_is_lm() -> None:
    data = lmm.load_dataset("houses")
    fit = lmm.Model("price ~ sqft", data).fit()
    X = np.column_stack([np.ones(len(data)), data["sqft"]])
    beta, rss = np.linalg.lstsq(X, data["price"], rcond=None)[:2]
    np.testing.assert_allclose(fit.beta, beta, rtol=1e-9)
    assert fit.sigma == pytest.approx(np.sqrt(rss[0] / 78), rel=1e-10)
    assert fit.df == "residual"
    assert fit.coef_table()["df"].tolist() == [78.0, 78.0]
    ml = lmm.Model("price ~ sqft", data).fit(method="ML")
    assert ml.sigma == pytest.approx(np.sqrt(rss[0] / 80), rel=1e-10)
    interval = fit.predict(data.iloc[:2], interval="prediction")
    h = X[:2] @ np.linalg.inv(X.T @ X) @ X[:2].T
    np.testing.assert_allclose(
        interval["std_error"], fit.sigma * np.sqrt(1 + np.diag(h)), rtol=1e-9
    )
    assert fit.varcorr()["group"].tolist() == ["Residual"]


def test_marginal_covariance(fit: lmm.Fit) -> None:
    V = fit.marginal_cov("308")
    Z = np.column_stack([np.ones(10), np.arange(10)])
    D = fit._term_covs()[0]
    np.testing.assert_allclose(V.cov, Z @ D @ Z.T + fit.sigma**2 * np.eye(10), rtol=1e-12)
    np.testing.assert_allclose(np.diag(V.corr), 1.0)
    crossed = lmm.Model(
        "diameter ~ 1 + (1 | plate) + (1 | sample)", lmm.load_dataset("Penicillin")
    ).fit()
    with pytest.raises(lmm.DesignError, match="crossed"):
        crossed.marginal_cov("a", group="plate")


def test_simulation_is_reproducible_and_right(fit: lmm.Fit, model: lmm.Model) -> None:
    a, b = fit.simulate(n=400, seed=1), fit.simulate(n=400, seed=1)
    pd.testing.assert_frame_equal(a, b)
    assert a.shape == (180, 400)
    V = fit.marginal_cov("308").cov.to_numpy()
    sample = np.cov(a.iloc[:10])
    # each entry has SE of about sqrt((V_ij² + V_ii V_jj) / 400)
    se = np.sqrt((V**2 + np.outer(np.diag(V), np.diag(V))) / 400)
    assert np.max(np.abs(sample - V) / se) < 5
    own = model.simulate(beta=[250.0, 10.0], theta=fit.theta, sigma=1.0, seed=2)
    assert own.shape == (180, 1)
    with pytest.raises(lmm.DataError, match="beta has shape"):
        model.simulate(beta=[1.0], sigma=1.0)


def test_pickling(fit: lmm.Fit, model: lmm.Model) -> None:
    again = pickle.loads(pickle.dumps(fit))
    pd.testing.assert_frame_equal(again.coef_table(), fit.coef_table())
    pd.testing.assert_frame_equal(again.ranef(), fit.ranef())
    new = pd.DataFrame({"Days": [3], "Subject": ["309"]})
    np.testing.assert_allclose(again.predict(new), fit.predict(new))
    assert pickle.loads(pickle.dumps(model)).fit().loglik == fit.loglik


def test_fit_is_immutable(fit: lmm.Fit) -> None:
    with pytest.raises(AttributeError):
        fit.sigma = 1.0  # type: ignore[misc]
    fit.ranef_cov()[:] = 0
    assert np.all(fit.ranef_se() > 0)
    with pytest.raises(ValueError, match="read-only"):
        fit.theta[0] = 9.0


# -- precision, threads, configuration ------------------------------------------------------------


def test_callers_precision_and_configuration_stay(sleep: pd.DataFrame, fit: lmm.Fit) -> None:
    before = {k: getattr(jax.config, k) for k in ("jax_enable_x64", "jax_platforms")}
    with jax.enable_x64(True):
        high = lmm.Model("Reaction ~ Days + (Days | Subject)", sleep).fit()
    assert high.loglik == fit.loglik
    assert jnp.ones(1).dtype == jnp.float32
    assert before == {k: getattr(jax.config, k) for k in before}


def test_callers_strict_promotion_is_not_ours(sleep: pd.DataFrame, fit: lmm.Fit) -> None:
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        strict = lmm.Model("Reaction ~ Days + (Days | Subject)", sleep).fit()
        assert strict.loglik == fit.loglik
        pd.testing.assert_frame_equal(strict.coef_table(), fit.coef_table())


def test_random_effects_that_reproduce_the_response_are_named() -> None:
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"g": np.repeat(np.arange(10.0), 4), "x": rng.normal(size=40)})
    data["y"] = 2 * data["x"] + data["g"]
    with pytest.warns(lmm.ConvergenceWarning, match="the residual variance goes to 0"):
        assert not lmm.Model("y ~ x + (1 | g)", data).fit().converged


def test_threads_agree(sleep: pd.DataFrame, fit: lmm.Fit) -> None:
    found: list[float] = []

    def work() -> None:
        found.append(lmm.Model("Reaction ~ Days + (Days | Subject)", sleep).fit().loglik)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [fit.loglik, fit.loglik]


def test_single_precision_model_fits(sleep: pd.DataFrame, fit: lmm.Fit) -> None:
    low = lmm.Model("Reaction ~ Days + (Days | Subject)", sleep, dtype="float32").fit()
    assert low.converged
    assert low.loglik == pytest.approx(fit.loglik, abs=1e-2)
    np.testing.assert_allclose(low.theta, fit.theta, atol=1e-2)


def test_import_is_light_and_changes_nothing(tmp_path: Any) -> None:
    code = (
        "import sys, jax; before = dict(jax.config.values); import lmmjax; lmmjax.Model; "
        "heavy = {'arviz', 'matplotlib', 'numpyro', 'formulaic'} & set(sys.modules); "
        "assert not heavy, heavy; assert before == dict(jax.config.values)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_cached_on_disk_unless_asked(tmp_path: Any) -> None:
    code = (
        "import lmmjax as lmm, os; d = lmm.load_dataset('Dyestuff');"
        "lmm.Model('Yield ~ 1 + (1 | Batch)', d).fit()"
    )
    env = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": ""}
    for extra, expected in (({}, False), ({"LMMJAX_CACHE": str(tmp_path / "c")}, True)):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**env, **extra}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert any((tmp_path / "c").rglob("*")) == expected
        assert not (tmp_path / "cache").exists()


def test_a_cache_of_the_users_own_is_respected(tmp_path: Any) -> None:
    code = (
        "import jax, lmmjax as lmm; print(lmm.enable_cache()); c = jax.config;"
        "print(c.jax_compilation_cache_dir, c.jax_persistent_cache_min_compile_time_secs)"
    )
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7",
        "LMMJAX_CACHE": str(tmp_path / "c"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    own = str(tmp_path / "own")
    assert done.stdout.split() == [own, own, "7.0"]
    assert not (tmp_path / "c").exists()


def test_a_cache_shared_or_damaged_changes_no_result(tmp_path: Any) -> None:
    """Two processes fill a fresh cache at once; a third finds its entries cut short."""
    code = (
        "import lmmjax as lmm; d = lmm.load_dataset('Dyestuff');"
        "print(lmm.Model('Yield ~ 1 + (1 | Batch)', d).fit().loglik)"
    )
    cache = tmp_path / "c"
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env["LMMJAX_CACHE"] = str(cache)

    def started() -> Any:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-c", code], env=env, text=True, **pipes)

    def loglik(process: Any) -> tuple[float, str]:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return float(out), err

    dyestuff = lmm.load_dataset("Dyestuff")
    expected = lmm.Model("Yield ~ 1 + (1 | Batch)", dyestuff).fit().loglik
    for found, _ in [loglik(p) for p in [started(), started()]]:
        assert found == pytest.approx(expected, abs=1e-10)
    entries = [path for path in cache.rglob("*-cache") if path.stat().st_size > 1000]
    assert entries
    for path in entries:
        path.write_bytes(path.read_bytes()[:500])
    found, err = loglik(started())
    assert found == pytest.approx(expected, abs=1e-10)
    assert "cache" in err, "JAX tells that an entry cannot be read"


def test_batches_keep_programs_where_asked(tmp_path: Any) -> None:
    code = "import lmmjax, jax; lmmjax.fit_groups; print(jax.config.jax_compilation_cache_dir)"
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env | {"LMMJAX_CACHE": str(tmp_path / "c")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path / "c")


# -- bad input ------------------------------------------------------------------------------------


def test_too_many_effects_are_refused_by_fit_not_by_the_model(sleep: pd.DataFrame) -> None:
    each = sleep.assign(row=np.arange(180))
    model = lmm.Model("Reaction ~ Days + (1 | row)", each)
    with pytest.raises(lmm.DesignError, match="180 levels x 1 columns"):
        model.fit()


def test_response_that_is_fitted_exactly(sleep: pd.DataFrame) -> None:
    copied = sleep.assign(twice=2 * sleep["Reaction"])
    with pytest.raises(lmm.DesignError, match="exactly"):
        lmm.Model("Reaction ~ twice + (1 | Subject)", copied).fit()


@pytest.mark.parametrize("bad", ["nelder-mead", 3, None])
def test_unknown_optimizers(model: lmm.Model, bad: Any) -> None:
    with pytest.raises(lmm.LmmError, match="optax"):
        model.fit(optimizer=bad)


def test_unknown_method(model: lmm.Model) -> None:
    with pytest.raises(lmm.LmmError, match="expected 'REML' or 'ML'"):
        model.fit(method="MLE")


def test_residual_structures(sleep: pd.DataFrame) -> None:
    data = sleep.assign(v=1.0 + sleep["Days"], w=1 / (1.0 + sleep["Days"]))
    a = lmm.Model("Reaction ~ Days + (1 | Subject)", data, residual="varfixed(v)").fit()
    b = lmm.Model("Reaction ~ Days + (1 | Subject)", data, weights="w").fit()
    assert a.loglik == pytest.approx(b.loglik, abs=1e-9)
    c = lmm.Model("Reaction ~ Days + (1 | Subject)", data, residual="varfixed(1/w)").fit()
    assert c.loglik == pytest.approx(b.loglik, abs=1e-9)
    with pytest.raises(lmm.DesignError, match="both weights= and residual="):
        lmm.Model("Reaction ~ Days + (1 | Subject)", data, residual="varfixed(v)", weights="w")
    with pytest.raises(lmm.FormulaError, match="expected one of cs"):
        lmm.Model("Reaction ~ Days + (1 | Subject)", data, residual="arx(1 | Subject)")

"""Inference against references of R and SAS, and by identities."""

from __future__ import annotations

import functools
import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from designs import design as make_design
from designs import layouts, problem, random_theta
from reference_cases import REFERENCE, case_contrasts, case_data, case_ids, load_case, numbers
from scipy import stats

import lmmjax as lmm
from lmmjax import gram as grams
from lmmjax import likelihood as lk
from lmmjax.errors import EstimabilityWarning, LmmError
from lmmjax.inference import (
    adjust,
    anova,
    components,
    hypothesis,
    information,
    linear,
    robust,
    variances,
    words,
)
from lmmjax.inference import kenward_roger as kr
from lmmjax.inference.information import Tables
from lmmjax.residual.covariance import relative_sd


@functools.cache
def case_fit(name: str) -> lmm.Fit:
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
def tables_of(name: str) -> pd.DataFrame:
    """The data of a reference test: those of a case on the same table, or bundled."""
    for case_id in case_ids():
        case = load_case(case_id)
        if case["data"] == name:
            return case_data(case)
    return lmm.load_dataset(name)


@functools.cache
def formula_fit(formula: str, data: str, method: str = "REML") -> lmm.Fit:
    return lmm.Model(formula, tables_of(data)).fit(method=method)


@functools.cache
def sleepstudy_ar1() -> lmm.Fit:
    data = lmm.load_dataset("sleepstudy")
    return lmm.Model("Reaction ~ Days + (1 | Subject)", data, residual="ar1(Days | Subject)").fit()


def reference(name: str, folder: str = "tests") -> dict[str, Any]:
    return json.loads((REFERENCE / folder / f"{name}.json").read_text(encoding="utf-8"))


def same(got: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(
        np.asarray(got, float), numbers(expected), rtol=tolerance, atol=1e-12
    )


# -- R: Satterthwaite and Kenward-Roger of whole fits ---------------------------------------------

#: pbkrtest ignores the weights in V: see reference/README.md
NOT_PBKRTEST = {"sim_unbalanced_weights_reml"}
QUICK = ["sleepstudy_slope_reml", "ratpup_reml", "assay_crossed_reml"]
QUICK += ["dyestuff2_singular_reml", "sim_corr1_singular_reml", "machines_factor_slope_reml"]


def check_tests(name: str, key: str, df: str, tolerance: float) -> None:
    expected, fit = load_case(name)["expected"].get(key, {}), case_fit(name)
    if "coef" not in expected:
        pytest.skip(f"R gives no {key} for this fit")
    table = fit.coef_table(df=df)
    known = np.isfinite(numbers(expected["coef"]["df"]))
    same(table["df"][known], numbers(expected["coef"]["df"])[known], tolerance)
    same(table["statistic"], expected["coef"]["t"], 1e-5)
    for kind, roman in ((1, "I"), (2, "II"), (3, "III")):
        got, want = fit.anova(type=kind, df=df), expected[f"anova_type{roman}"]
        assert list(got.index) == want["term"]
        same(got["num_df"], want["NumDF"], 0)
        same(got["den_df"], want["DenDF"], tolerance)
        same(got["statistic"], want["F"], 1e-5)
        same(got["sum_sq"], want["SumSq"], 1e-5)
        same(got["mean_sq"], want["MeanSq"], 1e-5)
        np.testing.assert_allclose(got["p_value"], numbers(want["p"]), rtol=2e-3, atol=1e-14)


@pytest.mark.parametrize("name", QUICK)
def test_satterthwaite_equals_lmertest(name: str) -> None:
    check_tests(name, "satterthwaite", "satterthwaite", 1e-4)


@pytest.mark.parametrize("name", QUICK)
def test_kenward_roger_equals_pbkrtest(name: str) -> None:
    check_tests(name, "kenward_roger", "kenward-roger", 1e-5)
    expected = load_case(name)["expected"]["kenward_roger"]
    table = case_fit(name).coef_table(df="kenward-roger")
    same(table["std_error"], expected["coef"]["se"], 1e-5)
    V = case_fit(name).vcov("kenward-roger").to_numpy()
    worst = np.max(np.abs(V - numbers(expected["vcovAdj"])))
    assert worst <= 1e-5 * np.max(np.abs(V))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(case_ids(engine="lme4")) - set(QUICK)))
def test_every_case_equals_r(name: str) -> None:
    if load_case(name)["trust"]["grade"] == "boundary" or name.startswith(
        ("insteval", "machines_o")
    ):
        pytest.skip("degrees of freedom are not uniquely defined there, or not given")
    check_tests(name, "satterthwaite", "satterthwaite", 1e-4)
    if name not in NOT_PBKRTEST and "coef" in load_case(name)["expected"].get("kenward_roger", {}):
        check_tests(name, "kenward_roger", "kenward-roger", 1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "kr_ratpup_treatment",
        "kr_sleepstudy_days",
        pytest.param("kr_cake_interaction", marks=pytest.mark.slow),
        pytest.param("kr_sim_psych", marks=pytest.mark.slow),
        pytest.param("kr_machines_machine", marks=pytest.mark.slow),
    ],
)
def test_f_of_nested_models_equals_pbkrtest(name: str) -> None:
    case = reference(name)
    big, small = (m["formula"] for m in case["models"])
    fit = formula_fit(big, case["data"])
    kept = set(lmm.Model(small, tables_of(case["data"])).design.x_names)
    L = np.eye(len(fit.beta))[[n not in kept for n in fit.beta.index]]
    got, want = fit.test(L, df="kenward-roger").iloc[0], case["expected"]["KR"]
    same(
        got[["statistic", "den_df", "scaling"]],
        [want[k] for k in ("F_stat", "ddf", "F_scaling")],
        1e-5,
    )
    assert got["p_value"] == pytest.approx(want["p"], rel=1e-4)
    got, want = fit.test(L).iloc[0], case["expected"]["SAT"]
    same(got[["statistic", "den_df"]], [want["F"], want["ddf"]], 1e-4)


def test_contest_equals_lmertest() -> None:
    case = reference("contest_sim_weights_slopes")
    fit = formula_fit(case["models"][0]["formula"], case["data"])
    assert list(fit.beta.index) == case["expected"]["coef_names"]
    for df, key in (("satterthwaite", "satterthwaite"), ("kenward-roger", "kenward_roger")):
        got, want = fit.test(case["expected"]["L"], df=df).iloc[0], case["expected"][key]
        same(got["statistic"], want["F value"][0], 1e-5)
        same(got["den_df"], want["DenDF"][0], 1e-5)


def test_linear_models_have_exact_tests() -> None:
    fit = formula_fit("price ~ sqft", "houses")
    want = reference("lm_houses_anova")["expected"]
    for df in ("satterthwaite", "kenward-roger", "residual", "containment"):
        row = fit.anova(df=df).loc["sqft"]
        same(row[["statistic", "num_df", "den_df"]], [want["F"], want["df1"], want["df2"]], 1e-9)
    rss = float(np.sum(fit.residuals() ** 2))
    total = float(np.sum((fit.model.design.y - fit.model.design.y.mean()) ** 2))
    assert fit.anova(type=1).loc["sqft", "sum_sq"] == pytest.approx(total - rss, rel=1e-9)


@pytest.mark.parametrize("method", ["ML", "REML"])
def test_linear_models_are_exact_by_ml_too(method: str) -> None:
    """Tests of lm and of summary(gls(..., method = "ML")) take RSS/(n - p)."""
    rng, n, p = np.random.default_rng(8), 12, 4
    data = pd.DataFrame({"x": rng.normal(size=n), "f": list("abc") * 4, "w": rng.uniform(1, 3, n)})
    data["y"] = data["x"] + rng.normal(size=n)
    fit = lmm.Model("y ~ x + f", data, weights="w").fit(method=method)
    root = np.sqrt(data["w"].to_numpy())
    X, y = fit.model.design.X * root[:, None], data["y"].to_numpy() * root
    rss, small = (float(np.linalg.lstsq(x, y, rcond=None)[1][0]) for x in (X, X[:, :2]))
    M, s2 = np.linalg.inv(X.T @ X), rss / (n - p)
    se = np.sqrt(s2 * np.diag(M))
    assert fit.sigma**2 == pytest.approx(rss / (n if method == "ML" else n - p))
    np.testing.assert_allclose(fit.vcov(), s2 * M, rtol=1e-9)
    np.testing.assert_allclose(fit.std_errors, se, rtol=1e-9)
    t = M @ X.T @ y / se
    for df, nu in (("satterthwaite", n - p), (None, n - p), ("wald", np.inf)):
        table = fit.coef_table(df)
        np.testing.assert_allclose(table["statistic"], t, rtol=1e-8)
        np.testing.assert_allclose(table["p_value"], 2 * stats.t.sf(abs(t), nu), rtol=1e-7)
    F, row = (small - rss) / 2 / s2, fit.anova().loc["f"]
    want = [small - rss, F, stats.f.sf(F, 2, n - p)]
    np.testing.assert_allclose(row[["sum_sq", "statistic", "p_value"]], want, rtol=1e-7)
    wald = fit.confint("wald", parm="beta_")
    np.testing.assert_allclose(wald["low"], fit.coef_table()["ci_low"], rtol=1e-9)
    x = fit.model.design.X[:3]
    own = np.einsum("ia,ab,ib->i", x, M, x)
    new = fit.predict(data.iloc[:3], interval="prediction")
    np.testing.assert_allclose(new["std_error"], np.sqrt(s2 * (1 + own)), rtol=1e-8)
    mean = fit.predict(data.iloc[:3], "population", interval="confidence")
    np.testing.assert_allclose(mean["std_error"], np.sqrt(s2 * own), rtol=1e-8)


def test_linear_models_of_batches_and_of_the_bootstrap_have_the_same_errors() -> None:
    rng = np.random.default_rng(9)
    data = pd.DataFrame({"x": rng.normal(size=14)})
    Y = data["x"].to_numpy()[:, None] + rng.normal(size=(14, 2))
    model = lmm.Model("y ~ x", data.assign(y=Y[:, 0]))
    fit, many = model.fit(method="ML"), lmm.fit_many("~ x", data, responses=Y, method="ML")
    columns = ["estimate", "std_error", "df", "p_value", "ci_low"]
    for df in ("residual", "satterthwaite"):
        table = many.coef_table(df).iloc[:2]
        np.testing.assert_allclose(table[columns], fit.coef_table()[columns], rtol=1e-8)
    np.testing.assert_allclose(many.vcov(many.items[0]), fit.vcov(), rtol=1e-8)
    boot = fit.bootstrap(100, 1)
    by_hand = model.fit(method="REML").bootstrap(100, 1)
    got, want = (b.std_errors.mean() / b.fit.std_errors for b in (boot, by_hand))
    np.testing.assert_allclose(got, want, rtol=0.1)  # 7 % without n / (n - p), and so the interval


# -- SAS: the observed information ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["pastry_dough", "sleepstudy_uncorr"])
def test_observed_information_equals_sas_and_expected_pbkrtest(name: str) -> None:
    case = reference(name, "sas")
    data = pd.DataFrame(case["table"]) if "table" in case else lmm.load_dataset(case["data"])
    fit = lmm.Model(case["formula"], data).fit()
    want = case["kenward_roger_observed"]
    order = want["names"]
    got = fit.coef_table(df="kenward-roger", information="observed").loc[order]
    same(got["estimate"], want["estimate"], 1e-8)
    same(got["std_error"], want["se"], 1e-5)
    same(got["df"], want["df"], 1e-4)
    same(fit.coef_table().loc[order, "df"], case["satterthwaite"]["df"], 1e-4)
    expected, of = fit.coef_table(df="kenward-roger").loc[order], case["kenward_roger_expected"]
    same(expected["std_error"], of["se"], 1e-5)
    same(expected["df"], of["df"], 1e-5)
    assert np.max(np.abs(expected["df"] / got["df"] - 1)) > 1e-3  # the two informations differ


# -- nlme: containment ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", reference("containment"), ids=lambda c: c["id"])
def test_containment_equals_nlme(case: dict[str, Any]) -> None:
    from lmmjax.inference.containment import containment

    data = tables_of(case["data"])
    design = lmm.Model(case["formula"], data).design
    got = containment(design)
    assert list(design.x_names) == case["names"]
    assert got.columns.tolist() == case["DF"]
    assert got.terms.tolist() == case["denDF"]


def test_containment_goes_with_structured_residuals() -> None:
    """nlme: the strata are those of the grouping factors, whatever the residuals."""
    data = lmm.load_dataset("Orthodont")
    mixed = lmm.Model("distance ~ age * Sex + (1 | Subject)", data, residual="varident(Sex)").fit()
    assert mixed.coef_table(df="containment")["df"].tolist() == [79, 79, 25, 79]


def test_containment_of_a_hypothesis_is_the_least() -> None:
    fit = case_fit("ratpup_reml")
    table = fit.coef_table(df="containment")["df"]
    L = np.eye(len(table))[[1, 2]]
    assert fit.test(L, df="containment")["den_df"].item() == table.iloc[[1, 2]].min()
    crossed = case_fit("assay_crossed_reml")
    with pytest.raises(LmmError, match="nested"):
        crossed.coef_table(df="containment")


# -- the tables behind it, by two other routes ----------------------------------------------------


def dense_tables(d: Any, S: np.ndarray, lams: list[np.ndarray], E: list[np.ndarray]) -> Tables:
    """The tables from n x n matrices; ``E`` are directions of one term each, in formula order."""
    V, G = np.diag(1 / d.weights), []
    for t, lam, tangent in zip(d.terms, lams, E, strict=True):
        alike = t.codes[:, None] == t.codes
        V = V + alike * (t.z @ lam @ lam.T @ t.z.T)
        G += [alike * (t.z @ e @ t.z.T) for e in tangent]
    Vi = np.linalg.inv(V)
    H = [Vi @ g @ Vi for g in G]
    S2 = np.array([[S.T @ a @ g @ Vi @ S for g in G] for a in H])
    return Tables(
        S.T @ Vi @ S,
        np.array([np.trace(Vi @ g) for g in G]),
        np.array([[np.trace(a @ g) for g in G] for a in H]),
        np.array([S.T @ h @ S for h in H]),
        0.5 * (S2 + np.swapaxes(S2, 0, 1)),
    )


@pytest.mark.parametrize(
    ("name", "route"),
    [
        ("two terms on one factor", "tables"),
        ("crossed slopes", "tables"),
        ("compound symmetry", "tables"),
        ("nested three deep, slopes", "tables"),
        pytest.param("crossed slopes", "autodiff", marks=pytest.mark.slow),
    ],
)
def test_tables_equal_dense_ones(name: str, route: str) -> None:
    d = make_design(layouts(60)[name], 60, 2)
    plan, _, gram, rhs = problem(d)
    theta = random_theta(d)
    theta[0] = 0.0  # singular: the tables are rational in Σ, so this is no special case
    lams = [np.asarray(a, float) for a in lk.factors(plan.layout, theta)]
    directions = linear.directions(plan.layout, lams)
    with lmm.float64():
        if route == "tables":
            got = information.tables(
                plan.layout, jnp.asarray(theta), gram, rhs, directions.sigmas, directions.first
            )
        else:
            by = jax.jit(information.by_autodiff, static_argnums=0)
            got = by(plan.layout, gram, rhs, directions.sigmas, directions.first)
    standard = grams.standardise(d)
    for t, z in zip(d.terms, standard.Z, strict=True):
        t.z = z
    structures = plan.layout.structures
    E = [linear.tangent(s, lam @ lam.T).first for s, lam in zip(structures, lams, strict=True)]
    want = dense_tables(d, np.column_stack([standard.X, standard.y]), lams, E)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-8, atol=1e-8 * np.max(np.abs(b)))


def test_observed_information_is_half_the_hessian_with_nonlinear_structures_too() -> None:
    """Hessian of the criterion in (σ², SDs, correlation) by automatic differentiation."""
    fit = lmm.Model(
        "Reaction ~ Days + cs(1 + Days | Subject)", lmm.load_dataset("sleepstudy")
    ).fit()
    _, d, sigma2 = fit._variance_tables
    assert d.nonlinear
    layout, _, gram, rhs = (fit.model._plan.layout, *fit.model._standard[1:])
    sigma = d.sigmas[0]
    sd = np.sqrt(np.diag(sigma))
    start = np.array([1.0, *sd, sigma[0, 1] / sd.prod()])

    def half_deviance(w: jax.Array) -> jax.Array:
        corr = jnp.array([[1.0, 0.0], [0.0, 1.0]]) + w[3] * jnp.array([[0.0, 1.0], [1.0, 0.0]])
        cov = w[1:3, None] * corr * w[1:3] / w[0]
        red = lk.reduce_factors(layout, [jnp.linalg.cholesky(cov)], gram, rhs)
        return 0.5 * lk.deviance(red, "REML", w[0] * sigma2)

    with lmm.float64():
        gradient = jax.jit(jax.grad(half_deviance))
        steps = 1e-5 * np.eye(4)
        hessian = [(gradient(start + h) - gradient(start - h)) / 2e-5 for h in steps]
    want = np.linalg.inv(np.asarray(hessian))
    np.testing.assert_allclose(components.parameter_covariance(fit), want, rtol=1e-5, atol=1e-8)
    adjusted = [fit.vcov("kenward-roger", second_order=x).to_numpy() for x in (True, False)]
    assert np.max(np.abs(adjusted[0] / adjusted[1] - 1)) > 1e-6


@pytest.mark.parametrize(
    "term",
    [
        "(Days | Subject)",
        pytest.param("cs(1 + Days | Subject)", marks=pytest.mark.slow),
        "ar1",
    ],
)
def test_face_of_an_interior_fit_is_the_observed_information(term: str) -> None:
    """W from the Hessian in θ of the profiled criterion, and from that in (V, ω, φ)."""
    fit = (
        sleepstudy_ar1()
        if term == "ar1"
        else formula_fit(f"Reaction ~ Days + {term}", "sleepstudy")
    )
    e, nu = fit._variance_tables[0], fit.n_obs - len(fit.beta)
    got = kr.on_the_face(e, variances._slopes(fit), fit._hessian_s, nu)
    want = variances.covariance(fit, "observed")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.max(np.abs(want)))


def test_observed_information_of_a_singular_fit_is_that_of_the_active_face() -> None:
    """A variance at 0 drops out, as in SAS: the tests are those of the model without it."""
    fit = case_fit("dyestuff2_singular_reml")
    row = fit.coef_table(df="kenward-roger", information="observed").iloc[0]
    without = formula_fit("Yield ~ 1", "Dyestuff2").coef_table().iloc[0]
    pd.testing.assert_series_equal(row, without, rtol=1e-7)
    assert row["df"] == pytest.approx(29)
    assert fit.coef_table(df="kenward-roger")["df"].item() == pytest.approx(5)
    # a correlation of 1: of one row, the df are Satterthwaite's, whose face is the same
    one = case_fit("sim_corr1_singular_reml")
    got = one.coef_table(df="kenward-roger", information="observed")["df"]
    np.testing.assert_allclose(got, one.coef_table()["df"], rtol=1e-6)


def test_second_order_is_nothing_where_v_is_linear() -> None:
    fit = case_fit("sleepstudy_slope_reml")
    with_it, without = (fit.vcov("kenward-roger", second_order=x) for x in (True, False))
    pd.testing.assert_frame_equal(with_it, without)


def test_kenward_roger_does_not_depend_on_units() -> None:
    data = lmm.load_dataset("sleepstudy")
    moved = data.assign(Days=1e3 * data["Days"] + 2e6, Reaction=data["Reaction"] * 1e-3)
    fit = lmm.Model("Reaction ~ Days + (Days | Subject)", moved).fit()
    a = fit.coef_table(df="kenward-roger").loc["Days"]
    b = case_fit("sleepstudy_slope_reml").coef_table(df="kenward-roger").loc["Days"]
    assert a["df"] == pytest.approx(b["df"], rel=1e-8)
    assert a["std_error"] * 1e6 == pytest.approx(b["std_error"], rel=1e-8)


def test_kenward_roger_is_refused_for_ml_and_says_what_to_do() -> None:
    model = case_fit("sleepstudy_slope_reml").model
    with pytest.raises(LmmError, match=r"ML fit.*method='REML'"):
        model.fit(method="ML", df="kenward-roger")
    fit = model.fit(method="ML")
    for ask in (
        lambda: fit.vcov("kenward-roger"),
        lambda: fit.anova(df="kenward-roger"),
        lambda: fit.emtrends("Days", df="kenward-roger"),
    ):
        with pytest.raises(LmmError, match="derived for REML"):
            ask()


def test_the_df_of_the_fit_is_the_default() -> None:
    fit = case_fit("sleepstudy_slope_reml").model.fit(df="kenward-roger")
    pd.testing.assert_frame_equal(fit.coef_table(), fit.coef_table(df="kenward-roger"))
    pd.testing.assert_frame_equal(fit.anova(), fit.anova(df="kenward-roger"))
    as_sas = fit.model.fit(df="kenward-roger", information="observed").coef_table()
    pd.testing.assert_frame_equal(as_sas, fit.coef_table(information="observed"))
    with pytest.raises(LmmError, match="expected one of"):
        fit.coef_table(df="kenwardroger")
    with pytest.raises(LmmError, match="'observed'"):
        fit.coef_table(information="fisher")


# -- hypotheses -----------------------------------------------------------------------------------


def test_words_mean_what_matrices_mean() -> None:
    fit = case_fit("machines_factor_slope_reml")
    L = [[0, 1, -1], [0, 1, 0]]
    said = fit.test("MachineB - MachineC = 0, MachineB = 8")
    pd.testing.assert_frame_equal(
        said.reset_index(drop=True), fit.test(L, [0, 8]).reset_index(drop=True)
    )
    assert list(said.columns) == ["num_df", "den_df", "statistic", "p_value", "scaling"]
    rows = fit.test(["MachineB = 8", "MachineC = 0"], joint=False)
    assert list(rows.index) == ["MachineB = 8", "MachineC = 0"]
    assert list(rows.columns) == list(fit.coef_table().columns)
    single = fit.test("MachineB = 8")
    assert rows["statistic"].iloc[0] ** 2 == pytest.approx(single["statistic"].item())
    assert rows["p_value"].iloc[0] == pytest.approx(single["p_value"].item())


def test_labelled_rows_are_read_by_their_labels() -> None:
    fit = case_fit("machines_factor_slope_reml")
    want = fit.test([[0.0, 0, -1]], joint=False)
    row = {"MachineC": -1.0, "(Intercept)": 0.0}
    frame = pd.DataFrame([row], index=["mine"])
    for L in (row, pd.Series(row), [row], [pd.Series(row)], frame):
        got = fit.test(L, joint=False)
        np.testing.assert_allclose(got, want, rtol=1e-12)
    assert list(fit.test(frame, joint=False).index) == ["mine"]
    assert list(fit.test(row, joint=False).index) == ["-MachineC = 0"]
    both = fit.test([{"MachineB": 1}, {"MachineC": 1}], [8, 0])
    pd.testing.assert_frame_equal(both, fit.test([[0, 1, 0], [0, 0, 1]], [8, 0]))
    # no text among the labels: by position, as arrays
    plain = pd.DataFrame([[0.0, 0.0, -1.0]])
    np.testing.assert_allclose(fit.test(plain, joint=False), want, rtol=1e-12)
    np.testing.assert_allclose(fit.test(plain.iloc[0], joint=False), want, rtol=1e-12)


@pytest.mark.parametrize(
    ("L", "message"),
    [
        ({"MachineD": 1, "MachineB": 1}, r"labels MachineD; expected .*MachineB, MachineC"),
        (pd.DataFrame({"Machine": [1.0]}), r"labels Machine; expected .*MachineB"),
        (pd.Series({0: 1.0, "MachineB": 1.0}), r"labels 0; expected"),
        ({0: 1.0}, r"labels 0; expected"),
        (pd.Series([1.0, 1.0], ["MachineB", "MachineB"]), "MachineB twice"),
        (pd.DataFrame([[1.0, 1.0]], columns=["MachineB", "MachineB"]), "MachineB twice"),
        ({"MachineB": "one"}, "expected a number"),
    ],
)
def test_labels_that_no_coefficient_has_are_refused(L: Any, message: str) -> None:
    with pytest.raises(LmmError, match=message):
        case_fit("machines_factor_slope_reml").test(L)


def test_labels_of_aliased_coefficients_are_judged() -> None:
    data = pd.DataFrame({"a": np.arange(12.0), "g": list("uvwxyz") * 2})
    data["twice"], data["y"] = 2 * data["a"], np.sin(data["a"]) + data["a"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = lmm.Model("y ~ a + twice + (1 | g)", data).fit()
    assert fit.model.design.aliased == ("twice",)
    along = fit.test({"twice": 2, "a": 1}, joint=False)  # what the column that was kept estimates
    np.testing.assert_allclose(along["estimate"], fit.beta["a"])
    with pytest.raises(LmmError, match="not estimable"):
        fit.test({"twice": 1})


@pytest.mark.parametrize(
    ("text", "row", "rhs"),
    [
        ("Days = 10", [0, 1, 0], 10),
        ("10 = Days", [0, -1, 0], -10),
        ("2 * (Days - I(Days^2)) + 1 = 3", [0, 2, -2], 2),
        ("(Intercept) / 4", [0.25, 0, 0], 0),
        ("-Days*3 = -1.5e1", [0, -3, 0], -15),
    ],
)
def test_grammar_of_hypotheses(text: str, row: list[float], rhs: float) -> None:
    h = words.parse(text, ["(Intercept)", "Days", "I(Days^2)"], [])
    np.testing.assert_allclose(h.L, [row])
    assert h.rhs.item() == rhs
    assert h.names == [text]


@pytest.mark.parametrize(
    "text", ["Dais = 1", "Days * Days = 1", "Days =", "(Days = 1", "Days Days", "1/Days"]
)
def test_malformed_hypotheses_are_refused(text: str) -> None:
    with pytest.raises(LmmError):
        words.parse(text, ["(Intercept)", "Days"], [])


def test_dependent_rows_count_once_and_must_agree() -> None:
    fit = case_fit("machines_factor_slope_reml")
    L = np.array([[0, 1, 0], [0, 0, 1], [0, 1, -1]])
    twice, once = fit.test(L), fit.test(L[:2])
    assert twice["num_df"].item() == 2
    assert twice["statistic"].item() == pytest.approx(once["statistic"].item())
    with pytest.raises(LmmError, match="depend"):
        fit.test(L, [0, 0, 1])
    with pytest.raises(LmmError, match="expected 3 columns"):
        fit.test(np.eye(2))


@pytest.mark.parametrize("spelling", ["KR", "kr", "kenward_roger", "Kenward-Roger"])
def test_other_spellings_of_a_df_method_are_told_the_right_one(spelling: str) -> None:
    with pytest.raises(LmmError, match="Write df='kenward-roger'"):
        case_fit("machines_factor_slope_reml").coef_table(df=spelling)
    with pytest.raises(LmmError, match=r"'wald'\.$"):
        case_fit("machines_factor_slope_reml").coef_table(df="bayes")


def test_wald_and_residual_limits() -> None:
    fit = case_fit("machines_factor_slope_reml")
    L = np.eye(3)[1:]
    wald, residual = fit.test(L, df="wald"), fit.test(L, df="residual")
    assert np.isinf(wald["den_df"].item())
    assert residual["den_df"].item() == fit.n_obs - 3
    assert wald["statistic"].item() == residual["statistic"].item()
    assert wald["p_value"].item() < residual["p_value"].item()


# -- types, coding, empty cells -------------------------------------------------------------------


def coded(contrast: str, data: pd.DataFrame, formula: str) -> lmm.Fit:
    return lmm.Model(formula, data, contrasts={"A": contrast, "B": contrast}).fit()


@pytest.fixture(scope="module")
def two_way() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    n = 90
    frame = pd.DataFrame({"A": rng.choice(list("abc"), n), "B": rng.choice(list("uv"), n)})
    frame["x"] = rng.normal(size=n)
    frame["g"] = np.arange(n) % 9
    frame["y"] = rng.normal(size=n) + (frame["A"] == "b") + rng.normal(size=9)[frame["g"]]
    return frame.astype({"g": str})


FORMULA = "y ~ A * B + A:x + x + (1 | g)"


@pytest.mark.parametrize("kind", [2, 3])
def test_types_two_and_three_do_not_depend_on_the_coding(two_way: pd.DataFrame, kind: int) -> None:
    df = "wald" if kind == 2 else None  # type II is that of lmerTest in the coding in use
    a, b = (coded(c, two_way, FORMULA).anova(kind, df=df) for c in ("treatment", "helmert"))
    pd.testing.assert_frame_equal(a, b, rtol=1e-7)


@pytest.mark.filterwarnings("ignore::lmmjax.EstimabilityWarning")
def test_type_three_df_are_those_of_lmertest_for_every_coding() -> None:
    ref = json.loads((REFERENCE / "tests" / "type_three_codings.json").read_text())
    data = pd.DataFrame(ref["columns"])  # one cell of A and B is empty
    for expected in ref["expected"]:
        names = [v for v in "AB" if v in expected["formula"]]
        tables = []
        for c in ("treatment", "sum", "helmert", "poly"):
            model = lmm.Model(expected["formula"], data, contrasts=dict.fromkeys(names, c))
            tables.append(model.fit().anova(3))
        for column in ("num_df", "den_df", "statistic", "p_value"):
            own = tables[0][column]
            assert list(own.index) == list(np.atleast_1d(expected["term"]))
            np.testing.assert_allclose(own, np.atleast_1d(expected[column]), rtol=1e-5)
        for other in tables[1:]:
            pd.testing.assert_frame_equal(tables[0], other, rtol=1e-8, atol=1e-10)


def test_type_three_is_that_of_sum_coding(two_way: pd.DataFrame) -> None:
    fit = coded("sum", two_way, FORMULA)
    table = fit.anova(3)
    for term in fit.model.design.x_terms[1:]:
        own = fit.model.design.x_assign == fit.model.design.x_terms.index(term)
        direct = fit.test(np.eye(len(own))[own], df="wald")
        assert table.loc[term, "statistic"] == pytest.approx(direct["statistic"].item(), rel=1e-8)


def test_type_one_adds_up_in_a_linear_model(two_way: pd.DataFrame) -> None:
    formulas = ["y ~ 1", "y ~ A", "y ~ A + B", "y ~ A + B + A:B"]
    w = np.linspace(1, 2, len(two_way))
    rss = []
    for f in formulas:
        model = lmm.Model(f, two_way, weights=w).fit(method="ML")
        rss.append(float(np.sum(w * model.residuals() ** 2)))
    got = lmm.Model(formulas[-1], two_way, weights=w).fit().anova(1)
    np.testing.assert_allclose(got["sum_sq"], -np.diff(rss), rtol=1e-8)


def test_empty_cells_are_reported_and_the_coding_still_does_not_matter(
    two_way: pd.DataFrame,
) -> None:
    holes = two_way[~((two_way["A"] == "c") & (two_way["B"] == "v"))]
    tables = []
    for c in ("treatment", "sum"):
        fit = coded(c, holes, "y ~ A * B + (1 | g)")
        assert fit.model.design.aliased
        with pytest.warns(EstimabilityWarning, match="empty cells"):
            tables.append(fit.anova(3))
    pd.testing.assert_frame_equal(*tables, rtol=1e-7)
    assert tables[0]["num_df"].tolist() == [2, 1, 1]
    fit = coded("treatment", holes, "y ~ A * B + (1 | g)")
    with pytest.warns(EstimabilityWarning, match="not estimable"):
        means = fit.emmeans(["A", "B"])
    missing = means["emmean"].isna()
    assert means.loc[missing, ["A", "B"]].to_numpy().tolist() == [["c", "v"]]
    with pytest.warns(EstimabilityWarning):
        assert fit.contrasts("A", by="B")["p_value"].isna().sum() == 2
    full = np.zeros((1, 6))
    full[0, -1] = 1.0
    with pytest.raises(LmmError, match="not estimable"):
        fit.test(full)
    with pytest.raises(LmmError, match="aliased"):
        fit.test(f"{fit.model.design.aliased[0]} = 0")
    with pytest.raises(LmmError, match="expected 1, 2 or 3"):
        fit.anova(4)


def test_satterthwaite_f_of_equal_and_small_df() -> None:
    assert hypothesis.joint_satterthwaite(np.array([7.0, 7.0])) == 7.0
    assert hypothesis.joint_satterthwaite(np.array([1.5, 9.0])) == 2.0
    E = 4 / 2 + 10 / 8
    assert hypothesis.joint_satterthwaite(np.array([4.0, 10.0])) == pytest.approx(2 * E / (E - 2))


# -- marginal means -------------------------------------------------------------------------------

DF = {"satterthwaite": "satterthwaite", "kenward-roger": "kenward-roger", "asymptotic": "wald"}
STATS = {"emmean", "age.trend", "SE", "df", "t.ratio", "z.ratio", "p.value"}


@pytest.mark.parametrize(
    "name",
    [
        "emm_cake_temperature_by_recipe",
        "emm_ergostool_type",
        "emm_machines_factor_slope",
        "emtrends_orthodont",
        pytest.param("emm_alfalfa_date", marks=pytest.mark.slow),
        pytest.param("emm_machines", marks=pytest.mark.slow),
    ],
)
def test_marginal_means_equal_emmeans(name: str) -> None:
    case = reference(name)
    fit = formula_fit(case["models"][0]["formula"], case["data"])
    trend = "age" if case["type"] == "emtrends" else None
    for key, df in DF.items():
        want = case["expected"][key]
        means, value = want["emmeans"], "age.trend" if trend else "emmean"
        factors = [k for k in means if k not in STATS and not k.endswith(("CL", "LCL", "UCL"))]
        by = factors[1:] or None
        if trend:
            got = fit.emtrends(trend, by=factors, df=df)
        else:
            got = fit.emmeans(factors[0], by=by, df=df)
        assert list(got.columns) == [*factors, value, "std_error", "df", "ci_low", "ci_high"]
        assert [list(got[f]) for f in factors] == [means[f] for f in factors]
        same(got[value], means[value], 1e-5)
        same(got["std_error"], means["SE"], 1e-5)
        same(got["df"], means["df"], 1e-5)
        same(got["ci_low"], means.get("lower.CL", means.get("asymp.LCL")), 1e-5)
        for adjustment, pairs in (("none", "pairs_unadjusted"), ("tukey", "pairs_tukey")):
            if df == "wald" and adjustment == "tukey":
                continue
            options = {"adjust": adjustment, "trend": trend, "level": 0.95}
            c = fit.contrasts(factors[0], by=by, df=df, **options)
            same(c["estimate"], want[pairs]["estimate"], 1e-5)
            same(c["std_error"], want[pairs]["SE"], 1e-5)
            low, high = ("asymp.LCL", "asymp.UCL") if df == "wald" else ("lower.CL", "upper.CL")
            room = 1e-5 * c["std_error"].max()
            np.testing.assert_allclose(c["ci_low"], numbers(want[pairs][low]), atol=room, rtol=1e-5)
            np.testing.assert_allclose(
                c["ci_high"], numbers(want[pairs][high]), atol=room, rtol=1e-5
            )
            np.testing.assert_allclose(c["p_value"], numbers(want[pairs]["p.value"]), atol=1e-6)


def test_contrast_families(two_way: pd.DataFrame) -> None:
    fit = coded("treatment", two_way, FORMULA)
    columns = ["contrast", "estimate", "std_error", "df", "statistic", "p_value"]
    pairs = fit.contrasts("A")
    assert list(pairs.columns) == columns
    assert list(pairs["contrast"]) == ["a - b", "a - c", "b - c"]
    control = fit.contrasts("A", method="trt.vs.ctrl", adjust="none")
    assert list(control["contrast"]) == ["b - a", "c - a"]
    np.testing.assert_allclose(control["estimate"], -pairs["estimate"][:2])
    poly = fit.contrasts("A", method="poly")
    assert list(poly["contrast"]) == ["linear", "quadratic"]
    custom = fit.contrasts("A", method={"half": [1, -0.5, -0.5]}, by="B")
    assert list(custom.columns) == [*columns[:1], "B", *columns[1:]]
    assert list(custom["B"]) == ["u", "v"]
    with pytest.raises(LmmError, match="pairwise"):
        fit.contrasts("A", method="poly", adjust="tukey")
    with pytest.raises(LmmError, match="one weight"):
        fit.contrasts("A", method={"bad": [1, -1]})


def test_a_combination_is_judged_not_its_cells(two_way: pd.DataFrame) -> None:
    """emmeans judges the final linear function: slopes and differences may be estimable where the
    cells that they are made of are not."""
    holes = two_way[~((two_way["A"] == "c") & (two_way["B"] == "v"))]
    fit = coded("treatment", holes, "y ~ A * B + x + (1 | g)")
    assert fit.model.design.aliased == ("Ac:Bv",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slopes = fit.emtrends("x", by="A")
        same = fit.contrasts("A", trend="x", adjust="none")
        rows = fit.contrasts("A", method={"c - a at u": [-1, 0, 1]}, at={"B": "u"})
        seen = fit.contrasts("B", method="pairwise", by="A", at={"A": ["a", "b"]})
    np.testing.assert_allclose(slopes["x.trend"], fit.beta["x"])
    np.testing.assert_allclose(slopes["std_error"], fit.coef_table().loc["x", "std_error"])
    assert same["estimate"].tolist() == [0.0] * 3 and same["std_error"].tolist() == [0.0] * 3
    assert same[["df", "statistic", "p_value"]].isna().all(axis=None)  # nothing to test
    np.testing.assert_allclose(rows["estimate"], fit.beta["Ac"])
    assert len(seen) == 2 and seen["p_value"].notna().all()
    with pytest.warns(EstimabilityWarning, match="1 of 3") as told:
        means = fit.emmeans("A")["emmean"]
    assert means.isna().tolist() == [False, False, True]
    assert told[0].filename == __file__
    with pytest.warns(EstimabilityWarning, match="2 of 3") as told:
        assert fit.contrasts("A")["estimate"].isna().tolist() == [False, True, True]
    assert told[0].filename == __file__


def test_differences_within_a_connected_part_of_a_design_are_estimable() -> None:
    rng = np.random.default_rng(11)
    data = pd.DataFrame({"A": list("aabbaabbcc") * 3, "B": list("uvuvuvuvww") * 3})
    data["year"] = 1e8 + rng.normal(size=30)  # rounding of its sums is no gap
    data["g"], data["y"] = [f"g{i % 5}" for i in range(30)], rng.normal(size=30)
    data["y"] += 3 * rng.normal(size=5)[np.arange(30) % 5]
    for kind in ("treatment", "sum", "helmert"):
        fit = coded(kind, data, "y ~ A + B + year + (1 | g)")
        assert len(fit.model.design.aliased) == 1
        with pytest.warns(EstimabilityWarning, match="2 of 3"):
            got = fit.contrasts("A", adjust="none")
        assert got["estimate"].notna().tolist() == [True, False, False]
        if kind == "treatment":
            want = fit.test("Ab", joint=False)
        columns = ["std_error", "df", "p_value"]
        np.testing.assert_allclose(got.iloc[0]["estimate"], -want["estimate"].item(), rtol=1e-6)
        np.testing.assert_allclose(
            got.iloc[0][columns].astype(float), want[columns].iloc[0], rtol=1e-5
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            within = fit.contrasts("A", method={"b - a": [-1, 1, 0]})
            trend = fit.emtrends("year", by="A")["year.trend"]
        np.testing.assert_allclose(within["estimate"], want["estimate"], rtol=1e-6)
        np.testing.assert_allclose(trend, fit.beta["year"], rtol=1e-5)


def test_values_given_for_the_grid() -> None:
    fit = formula_fit("distance ~ age * Sex + (age | Subject)", "Orthodont")
    curve = lmm.Model("Reaction ~ Days + I(Days^2) + (1 | Subject)", tables_of("sleepstudy")).fit()
    slopes = curve.emtrends("Days", by="Days", at={"Days": [0, 9]})
    assert slopes["Days"].tolist() == ["0", "9"]
    b = curve.beta
    np.testing.assert_allclose(
        slopes["Days.trend"], b["Days"] + 2 * b["I(Days^2)"] * np.array([0, 9]), rtol=1e-8
    )
    assert fit.emmeans("Sex", at={"Sex": "Male"})["Sex"].tolist() == ["Male"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(lmm.errors.DataError, match=r"levels Z, Q of Sex; expected .*Male"):
            fit.emmeans("Sex", at={"Sex": ["Z", "Male", "Q"]})
        with pytest.raises(lmm.errors.DataError, match="'ten' for the covariate age"):
            fit.emmeans("Sex", at={"age": "ten"})


def test_robust_marginal_means(two_way: pd.DataFrame) -> None:
    """Means, contrasts and slopes are rows of L that coef_table and test judge alike."""
    fit = lmm.Model("y ~ A + x + (1 | g)", two_way).fit()
    mean = two_way["x"].mean()
    L = np.array([[1, 0, 0, mean], [1, 1, 0, mean], [1, 0, 1, mean]])
    same = ["std_error", "df", "ci_low", "ci_high"]
    for options in ({}, {"correction": "CR0", "df": "wald"}, {"group": two_way["g"]}):
        options = {"vcov": "robust", **options}
        want = fit.test(L, joint=False, **options)
        np.testing.assert_allclose(fit.emmeans("A", **options)[same], want[same], rtol=1e-9)
        slope = fit.emtrends("x", **options)
        table = fit.coef_table(**options).loc[["x"]]
        np.testing.assert_allclose(slope[same], table[same], rtol=1e-6)
        pairs = fit.contrasts("A", adjust="none", level=0.95, **options)
        same_p = [*same, "p_value"]
        rows = fit.test(L[[0, 0, 1]] - L[[1, 2, 2]], joint=False, **options)
        np.testing.assert_allclose(pairs[same_p], rows[same_p], rtol=1e-8)
    assert (fit.emmeans("A", vcov="robust")["df"] < 9).all()
    with pytest.raises(LmmError, match="Bell and McCaffrey"):
        fit.emmeans("A", vcov="robust", df="satterthwaite")


def test_weights_of_marginal_means(two_way: pd.DataFrame) -> None:
    fit = coded("sum", two_way, "y ~ A + B + x + (1 | g)")
    design = fit.model.design
    equal, observed = (fit.emmeans("A", weights=w)["emmean"] for w in ("equal", "proportional"))
    share = (two_way["B"] == "u").mean()
    cells = fit.emmeans(["A", "B"]).pivot(index="A", columns="B", values="emmean")
    np.testing.assert_allclose(equal, cells.mean(axis=1))
    np.testing.assert_allclose(observed, share * cells["u"] + (1 - share) * cells["v"])
    at_zero = fit.emmeans("A", at={"x": 0.0})["emmean"]
    slope = fit.beta["x"]
    np.testing.assert_allclose(equal - at_zero, slope * two_way["x"].mean(), atol=1e-12)
    assert fit.emtrends("x")["x.trend"].item() == pytest.approx(slope)
    assert design.spec.fixed_columns(two_way).shape == design.X.shape
    with pytest.raises(lmm.errors.DataError, match="not a factor"):
        fit.emmeans("x2")
    with pytest.raises(lmm.errors.DataError, match="not a covariate"):
        fit.emtrends("A")


def test_adjusted_p_values() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.03])
    none = np.zeros(4)
    ask = lambda how: adjust.adjusted(p, how, none, none, 4)  # noqa: E731
    np.testing.assert_allclose(ask("bonferroni"), [0.03, np.nan, 0.12, 0.09])
    np.testing.assert_allclose(ask("holm"), [0.03, np.nan, 0.06, 0.06])
    np.testing.assert_allclose(ask("bh"), [0.03, np.nan, 0.04, 0.04])
    np.testing.assert_allclose(ask("none"), p)
    assert adjust.check("fdr") == "bh"
    with pytest.raises(LmmError, match="holm"):
        adjust.check("sidak")


# -- variances ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("r2_sim_nested3", marks=pytest.mark.slow),
        "r2_sim_weights",
        "r2_sleepstudy_ri",
        "r2_sleepstudy_slope",
    ],
)
def test_r2_and_icc_equal_performance(name: str) -> None:
    case = reference(name)
    model, want = case["models"][0], case["expected"]
    fit = formula_fit(model["formula"], case["data"], model["method"])
    same(fit.r2()[["marginal", "conditional"]], [want["R2_marginal"], want["R2_conditional"]], 1e-5)
    same(
        fit.icc()[["adjusted", "unadjusted"]], [want["ICC_adjusted"], want["ICC_unadjusted"]], 1e-5
    )
    shares = fit.variance_partition()
    assert shares["proportion"].sum() == pytest.approx(1.0)
    assert shares.loc["Fixed", "variance"] == pytest.approx(want["var_fixed"], rel=1e-5)


def test_variance_tests_of_a_balanced_one_way_layout() -> None:
    """Dyestuff: the mean squares are independent χ², so the observed information is known."""
    fit = case_fit("dyestuff_reml")
    table = fit.variance_tests()
    assert list(table.columns) == [
        *("group", "term1", "term2", "estimate", "std_error", "statistic", "p_value", "caveat")
    ]
    within, between = fit.sigma**2, fit.sigma**2 + 5 * table["estimate"][0]
    var_within, var_between = 2 * within**2 / 24, 2 * between**2 / 5
    assert table["std_error"][1] == pytest.approx(np.sqrt(var_within), rel=1e-6)
    assert table["std_error"][0] == pytest.approx(np.sqrt(var_within + var_between) / 5, rel=1e-6)
    assert table["p_value"][0] == pytest.approx(0.5 * (1 - _erf(table["statistic"][0])), rel=1e-6)


def _erf(z: float) -> float:
    import math

    return math.erf(z / math.sqrt(2))


def test_variance_tests_and_shares_at_the_boundary() -> None:
    fit = case_fit("dyestuff2_singular_reml")
    row = fit.variance_tests().iloc[0]
    assert np.isnan(row["p_value"]) and "boundary" in row["caveat"]
    assert fit.icc()["adjusted"] == pytest.approx(0.0, abs=1e-8)
    assert fit.r2()["conditional"] == pytest.approx(0.0, abs=1e-8)
    assert fit.coef_table()["df"].item() == pytest.approx(29.0, rel=1e-6)


def test_variance_tests_carry_units() -> None:
    data = lmm.load_dataset("sleepstudy")
    fit = lmm.Model("Reaction ~ Days + (Days | Subject)", data.assign(Days=data["Days"] / 7)).fit()
    a, b = fit.variance_tests(), case_fit("sleepstudy_slope_reml").variance_tests()
    np.testing.assert_allclose(a["statistic"], b["statistic"], rtol=1e-6)
    np.testing.assert_allclose(a["std_error"] / b["std_error"], [1, 49, 7, 1], rtol=1e-6)
    assert list(a["term2"].isna()) == [True, True, False, True]


# -- sandwich -------------------------------------------------------------------------------------


def dense_parts(fit: lmm.Fit) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """X, V, residuals and codes of the outermost group, n x n."""
    d = fit.model.design
    V = np.diag(fit.sigma**2 / d.weights)
    for t, cov in zip(d.terms, fit._term_covs(), strict=True):
        V = V + (t.codes[:, None] == t.codes) * (t.z @ cov @ t.z.T)
    return d.X, V, d.y - d.X @ fit._beta, min(d.terms, key=lambda t: len(t.levels)).codes


def test_sandwich_equals_dense_algebra() -> None:
    fit = case_fit("ratpup_reml")
    X, V, e, codes = dense_parts(fit)
    W = np.linalg.inv(V)
    M = np.linalg.inv(X.T @ W @ X)
    m = codes.max() + 1
    U = np.array([X[codes == g].T @ (W @ np.where(codes == g, e, 0))[codes == g] for g in range(m)])
    cr0 = M @ U.T @ U @ M
    np.testing.assert_allclose(fit.vcov("robust", correction="CR0"), cr0, rtol=1e-8)
    np.testing.assert_allclose(fit.vcov("robust", correction="CR1"), cr0 * m / (m - 1), rtol=1e-8)


def test_cr2_is_unbiased_under_the_model_and_its_df_are_satterthwaite() -> None:
    fit = case_fit("ratpup_reml")
    X, V, _, codes = dense_parts(fit)
    s = fit._sandwich(None, "CR2")
    p, m = X.shape[1], codes.max() + 1
    hat = X @ s.M @ X.T
    H = np.zeros((m, len(X), p))
    for g in range(m):
        own = np.flatnonzero(codes == g)
        Vg = V[np.ix_(own, own)]
        D = np.linalg.cholesky(Vg).T
        value, vector = np.linalg.eigh(D @ (Vg - hat[np.ix_(own, own)]) @ D.T)
        A = D.T @ (vector / np.sqrt(value)) @ vector.T @ D
        H[g, own] = A @ np.linalg.solve(Vg, X[own]) @ s.M
    expected = np.einsum("gia,ij,gjb->ab", H, V - hat, H, optimize=True)
    np.testing.assert_allclose(expected, s.M, rtol=1e-7, atol=1e-10)
    P = np.einsum("gi,ij,hj->gh", H[:, :, 2], V - hat, H[:, :, 2], optimize=True)
    want = np.trace(P) ** 2 / np.sum(P**2)
    table = fit.coef_table(vcov="robust")
    assert table["df"].iloc[2] == pytest.approx(want, rel=1e-7)
    assert np.isinf(fit.coef_table("wald", vcov="robust")["df"]).all()


def dense_sandwich(fit: lmm.Fit, codes: np.ndarray, correction: str) -> robust.Sandwich:
    """Group by group with V_i, n_i x n_i."""
    d, p, m = fit.model.design, fit.model.design.p, codes.max() + 1
    M = fit.sigma**2 * fit._unscaled_vcov
    variance = (fit.sigma * relative_sd(d.residual, fit.phi, d.weights)) ** 2
    e = d.y - d.offset - d.X @ fit._beta
    scores, K, D = np.zeros((m, p)), np.zeros((m, p, p)), np.zeros((m, p, p))
    for i in range(m):
        own = np.flatnonzero(codes == i)
        X, V = d.X[own], np.diag(variance[own])
        for t, cov in zip(d.terms, fit._term_covs(), strict=True):
            V += (t.codes[own, None] == t.codes[own]) * (t.z[own] @ cov @ t.z[own].T)
        AWX = np.linalg.solve(V, X)
        if correction == "CR2":
            AWX = robust._corrector(V[None], X[None], M)[0] @ AWX
        scores[i], K[i], D[i] = AWX.T @ e[own], X.T @ AWX, AWX.T @ V @ AWX
    factor = m / (m - 1) if correction == "CR1" else 1.0
    return robust.Sandwich(factor * M @ scores.T @ scores @ M, M, K, D)


@functools.cache
def large_groups() -> pd.DataFrame:
    """8 groups of 120 rows; classes nested in them, days that cross the classes within a group."""
    rng = np.random.default_rng(5)
    g, n = np.repeat(np.arange(8), 120), 960
    x, w, (c, day) = rng.normal(size=n), rng.choice(2, n), rng.integers(0, [[5], [3]], (2, n))
    b = rng.normal(size=(8, 2))
    y = x + b[g, 0] + b[g, 1] * x + rng.normal(size=n)
    y += rng.normal(size=(8, 5))[g, c] + rng.normal(size=(8, 3))[g, day]
    words = {k: [f"{i}.{j}" for i, j in zip(g, v, strict=True)] for k, v in (("c", c), ("d", day))}
    return pd.DataFrame({"y": y, "x": x, "arm": g % 2, "g": g.astype(str), "w": 1.0 + w, **words})


@pytest.mark.parametrize(
    ("formula", "options"),
    [
        ("y ~ x + arm + (x | g)", {}),
        ("y ~ x + arm + (1 | g) + (1 | c)", {"weights": "w"}),
        ("y ~ x + arm", {}),
        pytest.param("y ~ x + (1 | g) + (x | c) + (1 | d)", {}, marks=pytest.mark.slow),
        pytest.param("y ~ x + (x | g)", {"residual": "varident(arm)"}, marks=pytest.mark.slow),
    ],
)
def test_sandwich_of_large_groups_equals_dense_algebra(
    formula: str, options: dict[str, str]
) -> None:
    """The rotated rows stand for all, whatever the correction: nested, crossed, weighted."""
    data = large_groups()
    fit = lmm.Model(formula, data, **options).fit()
    codes = data["g"].astype(int).to_numpy()
    L = np.eye(len(fit.beta))
    for correction in ("CR0", "CR1", "CR2"):
        got, want = robust.sandwich(fit, codes, correction), dense_sandwich(fit, codes, correction)
        for a, b in ((got.vcov, want.vcov), (got.K, want.K), (got.D, want.D)):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9 * np.max(np.abs(b)))
        np.testing.assert_allclose(got.degrees(L), want.degrees(L), rtol=1e-8)
        np.testing.assert_allclose(got.joint(L[1:]), want.joint(L[1:]), rtol=1e-8)


def test_sandwich_refuses_dense_matrices_that_are_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Different variances leave CR2 nothing to reduce; CR1 needs none of it."""
    monkeypatch.setattr(robust, "MOST", 100)
    data = large_groups()
    w = data["w"] + np.arange(len(data)) / 1000
    fit = lmm.Model("y ~ x + arm + (x | g)", data, weights=w.to_numpy()).fit()
    with pytest.raises(LmmError, match=r"dense matrix of 120 rows; expected at most 100.*'CR1'"):
        fit.vcov("robust")
    assert np.isfinite(fit.vcov("robust", correction="CR1").to_numpy()).all()
    monkeypatch.setattr(robust, "MOST", 5)
    with pytest.raises(LmmError, match="with correlated residuals"):
        sleepstudy_ar1().vcov("robust", correction="CR0")


def test_cr2_of_single_rows_is_hc2() -> None:
    fit = formula_fit("price ~ sqft", "houses")
    X, e = fit.model.design.X, fit.residuals().to_numpy()
    M = np.linalg.inv(X.T @ X)
    h = np.einsum("ia,ab,ib->i", X, M, X)
    np.testing.assert_allclose(fit.vcov("robust"), M @ (X.T * (e**2 / (1 - h))) @ X @ M, rtol=1e-8)


def test_sandwich_refuses_dependent_groups() -> None:
    fit = case_fit("assay_crossed_reml")
    with pytest.raises(lmm.errors.DesignError, match="spread over"):
        fit.vcov("robust", group=np.arange(fit.n_obs) % 4)
    with pytest.raises(LmmError, match="CR2"):
        fit.vcov("robust", correction="HC3")
    with pytest.raises(lmm.errors.DataError, match="not a grouping factor"):
        fit.vcov("robust", group="nothing")
    with pytest.raises(LmmError, match="expected 'model'"):
        fit.vcov("sandwich")


# -- cost -----------------------------------------------------------------------------------------


def test_nothing_is_compiled_twice_for_one_shape() -> None:
    data = lmm.load_dataset("sleepstudy")
    model = case_fit("sleepstudy_slope_reml").model
    model.fit().coef_table(df="kenward-roger")
    before = information.tables._cache_size()
    other = lmm.Model(
        "Reaction ~ Days + (Days | Subject)", data.assign(Reaction=data["Reaction"] ** 0.5)
    )
    other.fit().coef_table(df="kenward-roger", information="observed")
    assert information.tables._cache_size() == before


def test_f_distribution_of_one_row_is_unscaled() -> None:
    a = case_fit("ratpup_reml")._kenward_roger("expected", True)
    df, scaling = kr.f_distribution(a, np.eye(len(a.vcov))[2:3])
    assert scaling == pytest.approx(1.0, abs=1e-9)
    assert df > 2


def test_containment_of_terms_is_used_by_anova() -> None:
    fit = case_fit("ratpup_reml")
    table = fit.anova(df="containment")
    own = fit._containment.terms[1:]
    np.testing.assert_allclose(table["den_df"], own)
    assert anova.contains(fit.model.design, "sex:Treatment", "sex")


def test_tables_lower_for_cuda() -> None:
    for name in ("crossed", "nested"):
        d = make_design(layouts(60)[name], 60, 2)
        plan, _, gram, rhs = problem(d)
        theta = random_theta(d)
        lams = [np.asarray(a, float) for a in lk.factors(plan.layout, theta)]
        where = linear.directions(plan.layout, lams)
        with lmm.float64():
            lowered = jax.jit(information.tables.__wrapped__, static_argnums=0).trace(
                plan.layout, theta, gram, rhs, where.sigmas, where.first
            )
            assert "stablehlo" in lowered.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.slow
def test_type_one_error_of_a_group_level_effect() -> None:
    """Six groups of unequal size: Wald rejects too often, the small-sample methods do not."""
    rng = np.random.default_rng(11)
    n_rep = 600
    g = np.repeat(np.arange(6), [3, 4, 5, 6, 7, 8])
    x = np.array([0.0, 0, 0, 1, 1, 1])[g]
    methods = ("wald", "satterthwaite", "kenward-roger")
    rejected = dict.fromkeys(methods, 0)
    for _ in range(n_rep):
        y = rng.normal(size=6)[g] + rng.normal(size=len(g))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lmm.SingularFitWarning)
            frame = pd.DataFrame({"y": y, "x": x, "g": g.astype(str)})
            fit = lmm.Model("y ~ x + (1 | g)", frame).fit()
        for m in methods:
            rejected[m] += fit.coef_table(df=m)["p_value"]["x"] < 0.05
    error = np.sqrt(0.05 * 0.95 / n_rep)
    rate = {m: r / n_rep for m, r in rejected.items()}
    assert rate["wald"] > 0.05 + 4 * error
    assert abs(rate["kenward-roger"] - 0.05) < 3 * error
    assert rate["satterthwaite"] < rate["wald"] - 3 * error


def test_sandwich_refuses_too_few_groups_and_vanishing_scores() -> None:
    data = lmm.load_dataset("Orthodont")
    fit = lmm.Model("distance ~ age * Sex", data).fit()
    for call in (fit.coef_table, fit.anova):
        with pytest.raises(LmmError, match="scores of all 2 groups vanish"):
            call(vcov="robust", group="Sex")
    with pytest.raises(lmm.errors.DataError, match=r"column of the fixed part .*age"):
        fit.vcov("robust", group="sex")
    alone = (data["Subject"] == "M01").to_numpy().astype(float)
    one = lmm.Model("distance ~ 0 + alone + rest", data.assign(alone=alone, rest=1 - alone)).fit()
    with pytest.raises(LmmError, match="vanish"):
        one.coef_table(vcov="robust", group=data["Subject"].to_numpy())
    two = lmm.Model("distance ~ Sex + alone", data.assign(alone=alone)).fit()
    with pytest.raises(LmmError, match="vanish"):
        L = np.array([[1.0, 0.0, 1.0]])
        two.test(L, vcov="robust", group=data["Subject"].to_numpy())


def test_a_covariate_at_one_value_has_a_mean() -> None:
    fit = lmm.Model("Reaction ~ Days + (1 | Subject)", lmm.load_dataset("sleepstudy")).fit()
    one, two = (fit.emmeans("Days", at={"Days": at}) for at in ([1], [1, 2]))
    assert one["Days"].tolist() == ["1"]
    assert one["emmean"][0] == pytest.approx(two["emmean"][0], rel=1e-12)
    assert fit.emmeans("Days", at={"Days": 1})["emmean"][0] == one["emmean"][0]
    for nothing in ({}, []):
        with pytest.raises(LmmError, match="expected weights of coefficients"):
            fit.test(nothing)
    with pytest.raises(LmmError, match="type='2' is unknown"):
        fit.anova("2")

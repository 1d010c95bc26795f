"""The two-stage formulation: per-subject regressions, stage 2, and the one-step model."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import residual_cases as cases

import lmmjax as lmm

CLASSIC = {"(Intercept)": "~ 1", "month": "~ 0 + group"}


@pytest.fixture(scope="module")
def weights() -> pd.DataFrame:
    return lmm.load_dataset("weights")


@pytest.fixture(scope="module")
def classic(weights: pd.DataFrame) -> lmm.TwoStage:
    return lmm.two_stage("weight ~ month", by="patient", level2=CLASSIC, data=weights)


def test_stages_equal_regressions_of_r(weights: pd.DataFrame) -> None:
    expected = cases.load("two_stage_sim_weights")["expected"]
    two = lmm.two_stage("weight ~ month", by="patient", level2="~ group", data=weights)
    first = two.stage1()
    assert list(first.index) == expected["stage1"]["patient"]
    np.testing.assert_allclose(first["(Intercept)"], expected["stage1"]["intercept"], rtol=1e-10)
    np.testing.assert_allclose(first["month"], expected["stage1"]["slope"], atol=1e-10)
    second = two.stage2().loc["month"]
    given = expected["stage2"]
    assert list(second.index) == given["names"]
    for column, key in [("estimate", "beta"), ("std_error", "se"), ("statistic", "t")]:
        np.testing.assert_allclose(second[column], given[key], rtol=1e-8)
    np.testing.assert_allclose(second["p_value"], given["p"], rtol=1e-6)


def test_standard_errors_of_stage_1(weights: pd.DataFrame, classic: lmm.TwoStage) -> None:
    one = weights[weights["patient"] == "P007"]
    fit = lmm.Model("weight ~ month", one).fit()
    np.testing.assert_allclose(classic.stage1().loc["P007"], fit.beta, rtol=1e-8)
    np.testing.assert_allclose(classic.stage1_se().loc["P007"], fit.std_errors, rtol=1e-8)


@pytest.mark.parametrize(
    ("formula", "level2"),
    [
        ("weight ~ month", CLASSIC),
        ("weight ~ month", "~ group"),
        ("weight ~ month + I(month^2)", "~ group"),
        ("weight ~ month", {"(Intercept)": "~ 0 + group"}),
        ("weight ~ poly(month, 2)", "~ group"),
        ("weight ~ 0 + month", "~ 0 + group"),
    ],
)
def test_x_of_the_one_step_model_is_z_k(
    weights: pd.DataFrame, formula: str, level2: object
) -> None:
    two = lmm.two_stage(formula, by="patient", level2=level2, data=weights)  # type: ignore[arg-type]
    model = two.model()
    codes, Z = two._codes[0], two._design1.X
    K = np.zeros((100, Z.shape[1], model.design.p))
    for j, (k, _, a) in enumerate(two._columns_of(model.design)):
        K[:, k, j] = a
    got = np.einsum("nk,nkp->np", Z, K[codes])
    np.testing.assert_allclose(got, model.design.X, rtol=0, atol=1e-12 * np.abs(got).max())


def test_matrices_of_a_subject(classic: lmm.TwoStage) -> None:
    Z, K, X, V = classic.matrices("P001")
    assert list(K.columns) == list(classic.model().design.x_names)
    np.testing.assert_array_equal(K.loc["(Intercept)"], [1, 0, 0, 0])
    assert K.loc["month"].sum() == 1
    rows = (classic._codes[0] == 0).nonzero()[0]
    np.testing.assert_allclose(X, classic.model().design.X[rows], atol=1e-12)
    np.testing.assert_allclose(Z @ K, X, atol=1e-12)
    fit = classic._fit
    D = fit.sigma**2 * fit.model._factors(fit.theta)[0] @ fit.model._factors(fit.theta)[0].T
    expected = Z.to_numpy() @ D @ Z.to_numpy().T + fit.sigma**2 * np.eye(len(Z))
    np.testing.assert_allclose(V, expected, rtol=1e-9)


def test_side_by_side(classic: lmm.TwoStage) -> None:
    """Balanced data with one common slope design: the slopes' estimates nearly agree."""
    table = classic.compare()
    assert list(table.columns) == ["two_step", "two_step_se", "one_step", "one_step_se"]
    assert table.index.names == ["coefficient", "term"]
    slopes = table.loc["month"]
    assert list(slopes.index) == ["groupControl", "groupLow", "groupHigh"]
    assert np.all(np.abs(slopes["two_step"] - slopes["one_step"]) < slopes["one_step_se"])
    np.testing.assert_allclose(
        table["one_step"].loc["(Intercept)"], classic._fit.beta["(Intercept)"]
    )


def test_precision_weights(weights: pd.DataFrame) -> None:
    """Unequal numbers of visits: weighted by 1/(Z'Z)⁻¹, by hand."""
    cut = weights[(weights["month"] < 9) | (weights["patient"].astype(str) < "P050")]
    two = lmm.two_stage("weight ~ month", by="patient", level2="~ 1", data=cut)
    slopes = two.stage1()["month"].to_numpy()
    months = [g["month"].to_numpy() for _, g in cut.groupby("patient", observed=True)]
    w = np.array([np.sum((m - m.mean()) ** 2) for m in months])
    got = two.stage2("precision").loc[("month", "(Intercept)"), "estimate"]
    assert got == pytest.approx(np.sum(w * slopes) / np.sum(w), rel=1e-9)


def test_few_rows_warn_and_stay_in_the_one_step_model(weights: pd.DataFrame) -> None:
    cut = weights[(weights["patient"] != "P003") | (weights["month"] == 0)]
    two = lmm.two_stage("weight ~ month", by="patient", level2="~ group", data=cut)
    with pytest.warns(lmm.DataWarning, match=r"1 of 100 subjects .*P003"):
        first = two.stage1()
    assert first.loc["P003"].isna().all()
    assert first.drop(index="P003").notna().all().all()
    assert two.stage2()["df"].iloc[0] == 96
    assert two.model().groups == {"patient": 100}


def test_subjects_without_residual_df_are_named(weights: pd.DataFrame) -> None:
    cut = weights[(weights["patient"] != "P003") | (weights["month"] <= weights["month"].min())]
    two = pd.concat([cut, weights[weights["patient"] == "P003"].iloc[1:2]])
    stated = lmm.two_stage("weight ~ month", by="patient", data=two)
    with pytest.warns(lmm.DataWarning, match=r"1 of 100 subjects have 2 rows .*P003"):
        se = stated.stage1_se()
    assert se.loc["P003"].isna().all()


def test_missing_values_and_other_tables(weights: pd.DataFrame) -> None:
    gaps = weights.assign(weight=weights["weight"].where(weights.index != 5))
    two = lmm.two_stage("weight ~ month", by="patient", level2="~ group", data=gaps)
    whole = lmm.two_stage("weight ~ month", by="patient", level2="~ group", data=gaps.dropna())
    pd.testing.assert_frame_equal(two.stage1(), whole.stage1())


def test_what_is_refused(weights: pd.DataFrame) -> None:
    with pytest.raises(lmm.FormulaError, match="found random effects"):
        lmm.two_stage("weight ~ month + (1 | patient)", by="patient", data=weights)
    with pytest.raises(lmm.FormulaError, match="expected the terms of stage 1"):
        lmm.two_stage("weight ~ month", by="patient", level2={"day": "~ 1"}, data=weights)
    coded = lmm.two_stage("weight ~ 0 + month", by="patient", level2="~ group", data=weights)
    with pytest.raises(lmm.DesignError, match="R's coding of its factors differs"):
        coded.model()  # without an intercept R codes the first factor by all of its indicators
    varying = lmm.two_stage("weight ~ 1", by="patient", level2="~ month", data=weights)
    with pytest.raises(lmm.DataError, match="constant within a subject"):
        varying.stage2()
    with pytest.raises(lmm.DataError, match="is no level of patient"):
        lmm.two_stage("weight ~ month", by="patient", data=weights).matrices("nobody")


def test_it_prints(classic: lmm.TwoStage) -> None:
    assert "month: ~ 0 + group" in repr(classic)
    assert "One step: weight ~ 1 + month:group + (1 + month | patient)" in repr(classic)

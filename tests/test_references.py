"""Every reference fit of lme4 and lm: the optimum, its inference, its predictions."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from reference_cases import case_contrasts, case_data, case_ids, load_case, numbers

import lmmjax as lmm

#: the likelihood does not identify this model's components: compare the criterion alone
UNIDENTIFIED = {"machines_overfit_singular_ml"}


def close(got: Any, expected: Any, tolerance: float, what: str) -> None:
    """Compare relative to the largest entry of the block."""
    got, expected = np.asarray(got, float), np.asarray(expected, float)
    size = max(float(np.max(np.abs(expected), initial=0.0)), 1e-12)
    worst = float(np.max(np.abs(got - expected), initial=0.0)) / size
    assert worst <= tolerance, f"{what}: off by {worst:.2g} of the largest"


def fit(case: dict[str, Any]) -> lmm.Fit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmm.SingularFitWarning)
        model = lmm.Model(
            case["formula"],
            case_data(case),
            weights=case["weights"],
            contrasts=case_contrasts(case) or None,
        )
        return model.fit(method=case["method"])


@pytest.mark.parametrize("name", case_ids())
def test_fit_equals_reference(name: str) -> None:
    case = load_case(name)
    expected, result = case["expected"], fit(case)
    n = expected["nobs"]
    assert result.converged, result.message
    assert result.n_obs == n
    assert result.loglik == pytest.approx(expected["logLik"], abs=1e-6 if n < 5000 else 1e-4)
    assert result.n_params == expected["npar"]
    if "AIC" in expected:
        assert result.aic == pytest.approx(expected["AIC"], abs=1e-3 if n >= 5000 else 1e-5)
        assert result.bic == pytest.approx(expected["BIC"], abs=1e-3 if n >= 5000 else 1e-5)
    assert list(result.beta.index) == expected["fixef"]["names"]
    check_fixed(result, expected)
    if case["engine"] == "lme4":
        assert result.singular == expected["singular"]
        if name not in UNIDENTIFIED:
            check_components(result, expected)
            check_effects(result, expected)
            check_predictions(result, expected)


def check_fixed(result: lmm.Fit, expected: dict[str, Any]) -> None:
    table = result.coef_table()
    close(result.beta, expected["fixef"]["beta"], 1e-6, "beta")
    close(table["std_error"], expected["fixef"]["se"], 1e-6, "standard errors")
    close(result.vcov(), expected["fixef"]["vcov"], 1e-6, "vcov")
    close(result.sigma, expected["sigma"], 1e-5, "sigma")
    if "satterthwaite" in expected:
        reference = expected["satterthwaite"]["coef"]
        df = numbers(reference["df"])
        known = np.isfinite(df)
        np.testing.assert_allclose(table["df"].to_numpy()[known], df[known], rtol=1e-4)
        p = numbers(reference["p"])
        np.testing.assert_allclose(table["p_value"].to_numpy()[known], p[known], rtol=2e-3)
        check_anova(result, expected["satterthwaite"])
    if "ci_95" in expected:
        close(table[["ci_low", "ci_high"]], expected["ci_95"], 1e-9, "intervals of lm")


def check_anova(result: lmm.Fit, reference: dict[str, Any]) -> None:
    """F tests of the three types with Satterthwaite's degrees of freedom."""
    if result.singular:
        return  # degrees of freedom are not uniquely defined on the boundary
    for kind, roman in ((1, "I"), (2, "II"), (3, "III")):
        table, given = result.anova(type=kind), reference[f"anova_type{roman}"]
        assert list(table.index) == given["term"]
        for column, key, rtol in (("statistic", "F", 1e-5), ("den_df", "DenDF", 1e-4)):
            np.testing.assert_allclose(table[column], numbers(given[key]), rtol=rtol)
        np.testing.assert_allclose(table["sum_sq"], numbers(given["SumSq"]), rtol=1e-5)


def check_components(result: lmm.Fit, expected: dict[str, Any]) -> None:
    frame = result.varcorr()
    largest = max([expected["sigma"], *(max(v["sd"]) for v in expected["varcorr"])])
    for block in expected["varcorr"]:
        mine = frame[(frame["group"] == block["group"]) & frame["term1"].isin(block["terms"])]
        variances = mine[mine["term2"].isna()].set_index("term1")["sdcor"]
        sd = variances.loc[block["terms"]].to_numpy()
        assert np.max(np.abs(sd - block["sd"])) <= 1e-5 * largest
        if np.min(block["sd"]) > 1e-4 * largest:
            for i, a in enumerate(block["terms"]):
                for j, b in enumerate(block["terms"][:i]):
                    row = mine[(mine["term1"] == b) & (mine["term2"] == a)]
                    assert row["sdcor"].item() == pytest.approx(block["corr"][i][j], abs=1e-4)
    assert frame["group"].iloc[-1] == "Residual"


def check_effects(result: lmm.Fit, expected: dict[str, Any]) -> None:
    for block in expected["ranef"]:
        frame, se = result.ranef(block["group"]), result.ranef_se(block["group"])
        if "b" not in block:
            first = block["levels_first"]
            close(frame.loc[first], block["b_first"], 1e-6, "first BLUPs")
            assert float((frame**2).to_numpy().sum()) == pytest.approx(
                np.sum(block["sumsq"]), rel=1e-5
            )
            continue
        assert list(frame.index) == block["levels"]
        assert list(frame.columns) == block["terms"]
        assert list(se.columns) == block["terms"]
        scale = np.max(np.abs(numbers(np.ravel(block["b"]))))
        if scale > 1e-6 * expected["sigma"]:
            close(frame, block["b"], 1e-6, "BLUPs")
        if "condVar" in block:
            cov = result.ranef_cov(block["group"])[: len(block["condVar"])]
            close(cov, block["condVar"], 1e-6, "conditional covariances")
            variances = np.einsum("jss->js", np.asarray(block["condVar"], float))
            close(se.iloc[: len(cov)], np.sqrt(np.maximum(variances, 0)), 1e-5, "conditional SDs")


def check_predictions(result: lmm.Fit, expected: dict[str, Any]) -> None:
    fitted, residuals = result.fitted(), result.residuals()
    m = len(expected["fitted"]["first"])
    close(fitted.iloc[:m], expected["fitted"]["first"], 1e-6, "fitted values")
    assert float(fitted @ fitted) == pytest.approx(expected["fitted"]["sumsq"], rel=1e-6)
    assert float(residuals @ residuals) == pytest.approx(expected["residuals"]["sumsq"], rel=1e-5)
    if "predict" not in expected:
        return
    given = expected["predict"]
    new = _typed(pd.DataFrame(given["newdata"]), result)
    population = result.predict(new, kind="population", interval="confidence")
    close(population["estimate"], given["population"], 1e-6, "population predictions")
    if "population_se" in given:
        close(population["std_error"], given["population_se"], 1e-6, "their standard errors")
    conditional = result.predict(new, new_levels="population")
    close(conditional, given["conditional_allow_new_levels"], 1e-6, "conditional predictions")


def _typed(new: pd.DataFrame, result: lmm.Fit) -> pd.DataFrame:
    """New data as R had them: labels are text, whatever they look like."""
    for term in result.model.design.terms:
        for name in term.group.split(":"):
            if name in new:
                new[name] = new[name].astype(str)
    return new

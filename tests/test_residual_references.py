"""Fits with structured residuals against nlme (gls, lme) and SAS PROC MIXED."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import residual_cases as cases
from residual_cases import close

import lmmjax as lmm

#: one case per route through the sources; the others run with the slow tests
FAST = {
    "ovary_gls_ar1_reml",
    "bodyweight_lme_car1_varident_ml",
    "orthodont_gls_un_ml",
    "machines_lme_varident_ml",
    "sim_ar1_lme_ar1_reml",
}


def _marked(name: str) -> Any:
    return name if name in FAST else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [_marked(name) for name in cases.names()])
def test_fit_equals_nlme(name: str) -> None:
    case = cases.load(name)
    expected, fit = case["expected"], cases.fit(case)
    assert fit.converged, fit.message
    assert fit.n_obs == expected["nobs"]
    assert fit.n_params == expected["npar"]
    if name in cases.LOGLIK_ONLY:
        assert fit.loglik >= expected["logLik"] - 1e-4
        return
    assert fit.loglik == pytest.approx(expected["logLik"], abs=1e-6)
    assert list(fit.beta.index) == expected["fixef"]["names"]
    close(fit.beta, expected["fixef"]["beta"], 1e-5, "beta")
    close(fit.coef_table()["std_error"], expected["fixef"]["se"], 1e-5, "standard errors")
    close(fit.vcov(), expected["fixef"]["vcov"], 1e-5, "vcov")
    close(fit.sigma, expected["sigma"], 1e-5, "sigma")
    check_parameters(fit, expected)
    check_intervals(fit, expected)
    check_rows(fit, expected)
    check_effects(fit, expected)
    if "marginal_cov" in expected:
        given = expected["marginal_cov"]
        # the group is not named for gls: any of the same number of rows is like it (AR(1))
        example = given.get("group") or expected["residual_corr"]["example_group"]
        cov = fit.marginal_cov(example).cov
        if len(cov) != len(given["V"]):
            cov = fit.marginal_cov(cases.data(case)[case["residual"]["group"]].iloc[0]).cov
        close(cov, given["V"], 1e-5, "marginal V")


def check_parameters(fit: lmm.Fit, expected: dict[str, Any]) -> None:
    """Residual parameters by nlme's names; its first ratio is the reference, 1."""
    got = fit.residual_params()
    if "residual_corr" in expected:
        correlations = [x for x in got.index if not x.startswith(("sd_ratio", "delta"))]
        close(got[correlations], expected["residual_corr"]["coef"], 1e-5, "correlations")
    if "residual_var" in expected:
        given = expected["residual_var"]
        if given["class"] == "varIdent":
            labels = [f"sd_ratio[{x}]" for x in given["coef_names"][1:]]
            labels = labels if labels[0] in got else [x for x in got.index if "sd_ratio" in x]
            close(got[labels], given["coef"][1:], 1e-5, "ratios")
        elif given["class"] != "varFixed":
            close(got["delta"], given["coef"][0], 1e-5, "delta")


def check_intervals(fit: lmm.Fit, expected: dict[str, Any]) -> None:
    """nlme's ``intervals`` of gls fits by REML, made with a numerical Hessian: about 3 digits.

    For ML, and with random effects, nlme's differ by up to 1 %; the exact Hessian is held against
    finite differences in test_residual.py.
    """
    if fit.model.is_mixed or fit.method == "ML":
        return
    given, table = expected.get("intervals_nlme", {}), fit.residual_intervals()
    variances = [x for x in table.index if x.startswith(("sd_", "delta"))]
    for part in given:
        names = variances if part == "varStruct" else table.index.difference(variances, sort=False)
        got = table.loc[names, ["low", "high"]]
        close(got, np.transpose([given[part]["lower"], given[part]["upper"]]), 2e-3, part)


def check_rows(fit: lmm.Fit, expected: dict[str, Any]) -> None:
    first = expected["fitted"]["first"]
    close(fit.fitted().iloc[: len(first)], first, 1e-5, "fitted values")
    given = expected["residuals"]
    close(fit.residuals().iloc[: len(given["first"])], given["first"], 1e-5, "residuals")
    for kind in ("pearson", "normalized"):
        if (values := given.get(f"{kind}_first")) is None:
            continue
        got = fit.residuals(kind).to_numpy()[: len(values)]
        if kind == "normalized" and str(fit.model.residual).startswith("cs("):
            # nlme takes another root of compound symmetry: the sum of squares of a subject is free
            # of that choice (subjects have 4 consecutive rows)
            got, values = ((np.array(x) ** 2).reshape(-1, 4).sum(axis=1) for x in (got, values))
        close(got, values, 1e-5, kind)


def check_effects(fit: lmm.Fit, expected: dict[str, Any]) -> None:
    for block in expected.get("varcorr", []):
        covs = {t.group: c for t, c in zip(fit.model.design.terms, fit._term_covs(), strict=True)}
        if block["group"] in covs and len(covs) == len(fit.model.design.terms):
            close(np.sqrt(np.diag(covs[block["group"]])), block["sd"], 1e-5, "SDs")
    for block in expected.get("ranef", []):
        if "b" in block and block["group"] in fit.model.groups:
            frame = fit.ranef(block["group"]).loc[block["levels"], block["terms"]]
            close(frame, block["b"], 1e-5, "BLUPs")


@pytest.mark.parametrize(
    ("residual", "expected"),
    [("un(age | Subject)", 419.477), ("cs(1 | Subject)", 428.639), ("ar1(1 | Subject)", 440.681)],
)
def test_potthoff_roy(residual: str, expected: float) -> None:
    """Figures printed in SAS's documentation of PROC MIXED (growth data, ML)."""
    model = lmm.Model("distance ~ Sex * age", lmm.load_dataset("Orthodont"), residual=residual)
    assert model.fit(method="ML").deviance == pytest.approx(expected, abs=6e-4)


def test_fev_by_sas() -> None:
    given = cases.load("fev_structures")
    for case in given["cases"]:
        model = lmm.Model(given["formula"], cases.fev(), residual=case["residual"])
        assert model.fit(method="ML").deviance == pytest.approx(case["ml"], abs=1e-5)
        assert model.fit(method="REML").deviance == pytest.approx(case["reml"], abs=1e-5)

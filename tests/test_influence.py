"""Influence: against dense algebra, against models of the reduced data, against R."""

from __future__ import annotations

import functools
import json
import pickle
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from designs import design as make_design
from designs import layouts, problem, random_theta
from reference_cases import REFERENCE

import lmmjax as lmm
from lmmjax import likelihood as lk
from lmmjax.errors import DataError
from lmmjax.inference import deletion
from lmmjax.precision import float64
from lmmjax.residual.covariance import block

SLEEP = "Reaction ~ Days + (Days | Subject)"


@functools.cache
def fit_of(formula: str, data: str, residual: str | None = None, weighted: bool = False) -> lmm.Fit:
    frame = lmm.load_dataset(data)
    weights = np.random.default_rng(3).uniform(0.5, 2, len(frame)) if weighted else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmm.SingularFitWarning)
        return lmm.Model(formula, frame, residual=residual, weights=weights).fit()


def reference(name: str) -> dict[str, Any]:
    return json.loads((REFERENCE / "tests" / f"{name}.json").read_text(encoding="utf-8"))


def dense(fit: lmm.Fit) -> tuple[np.ndarray, np.ndarray]:
    """R and V relative to σ², n x n."""
    d = fit.model.design
    R = block(d.residual, fit.phi, d.weights, np.arange(d.n))
    V = R.copy()
    for t, cov in zip(d.terms, fit._term_covs(), strict=True):
        same = t.codes[:, None] == t.codes
        V += np.where(same, t.z @ (cov / fit.sigma**2) @ t.z.T, 0)
    return R, V


def without(fit: lmm.Fit, V: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """β̂, (X'V⁻¹X)⁻¹ and σ̂ from the other rows, the same V."""
    d = fit.model.design
    keep = np.setdiff1d(np.arange(d.n), rows)
    X, y, W = d.X[keep], (d.y - d.offset)[keep], np.linalg.inv(V[np.ix_(keep, keep)])
    M = np.linalg.inv(X.T @ W @ X)
    beta = M @ X.T @ W @ y
    r = y - X @ beta
    return beta, M, float(np.sqrt(r @ W @ r / (len(keep) - d.p)))


FITS = {
    "slope": (SLEEP, "sleepstudy", None, True),
    "linear": ("Reaction ~ Days", "sleepstudy", None, True),
    "nested": ("strength ~ 1 + (1 | batch/cask)", "Pastes", None, False),
    "crossed": ("diameter ~ 1 + (1 | plate) + (1 | sample)", "Penicillin", None, False),
    "factor": ("score ~ Machine + (Machine | Worker)", "Machines", None, False),
    "ar1": ("Reaction ~ Days + (1 | Subject)", "sleepstudy", "ar1(Days | Subject)", False),
    "marginal": ("distance ~ Sex * age", "Orthodont", "un(age | Subject)", False),
}


@pytest.mark.parametrize("name", FITS)
def test_rows_equal_dense_algebra(name: str) -> None:
    fit = fit_of(*FITS[name])
    R, V = dense(fit)
    X, n = fit.model.design.X, fit.n_obs
    W = np.linalg.inv(V)
    beta_of_y = np.linalg.solve(X.T @ W @ X, X.T @ W)
    smoother = (V - R) @ W
    hat = X @ beta_of_y + smoother @ (np.eye(n) - X @ beta_of_y)
    rows = fit.influence().rows()
    np.testing.assert_allclose(rows["leverage"], np.diag(hat), atol=1e-11)
    np.testing.assert_allclose(rows["leverage_fixed"], np.diag(X @ beta_of_y), atol=1e-12)
    shift = fit.influence().dfbeta("rows").to_numpy()
    for i in (0, n // 2, n - 1):
        beta, M, sigma = without(fit, V, np.array([i]))
        gap = fit._beta - beta
        np.testing.assert_allclose(shift[i], gap, rtol=1e-8, atol=1e-9)
        cooks = gap @ np.linalg.solve(fit.vcov().to_numpy(), gap) / len(beta)
        assert rows["cooks_d"].iloc[i] == pytest.approx(cooks, rel=1e-8)
        assert rows["sigma"].iloc[i] == pytest.approx(sigma, rel=1e-10)
        ratio = np.linalg.det(M) / np.linalg.det(fit._unscaled_vcov)
        assert rows["covratio"].iloc[i] == pytest.approx(ratio, rel=1e-9)


@pytest.mark.parametrize("name", FITS)
def test_groups_equal_dense_algebra(name: str) -> None:
    """Own factors, and labels that cut across them."""
    fit = fit_of(*FITS[name])
    _, V = dense(fit)
    d, full = fit.model.design, fit.vcov().to_numpy()
    labels = {t.group: t.levels[t.codes] for t in d.terms} | {"cut": np.arange(d.n) % 5}
    for group, label in labels.items():
        made = fit.influence().groups(label if group == "cut" else group)
        shift = fit.influence().dfbeta(label)
        for level in made.index[[0, -1]]:
            beta, M, sigma = without(fit, V, np.flatnonzero(label.astype(str) == level))
            gap, V_D = fit._beta - beta, fit.sigma**2 * M
            mine = made.loc[level]
            np.testing.assert_allclose(shift.loc[level], gap, rtol=1e-8, atol=1e-9)
            assert mine["cooks_d"] == pytest.approx(gap @ np.linalg.solve(full, gap) / d.p)
            assert mine["mdffits"] == pytest.approx(gap @ np.linalg.solve(V_D, gap) / d.p)
            trace = np.trace(np.linalg.solve(full, V_D))
            assert mine["covtrace"] == pytest.approx(abs(trace - d.p), rel=1e-6, abs=1e-9)
            assert mine["covratio"] == pytest.approx(np.linalg.det(V_D) / np.linalg.det(full))
            assert mine["sigma"] == pytest.approx(sigma)


@pytest.mark.parametrize("name", ["slope", "nested", "crossed"])
def test_downdating_equals_models_of_the_reduced_data_at_the_same_theta(name: str) -> None:
    formula, data, *_ = FITS[name]
    fit = fit_of(formula, data)
    frame, term = lmm.load_dataset(data), fit.model.design.terms[-1]
    level = term.levels[2]
    small = lmm.Model(formula, frame[term.levels[term.codes] != level])
    theta = small._theta_standard(fit.theta)
    with float64():
        red = lk.reduce(small._plan.layout, jnp.asarray(theta), *small._on_device)
        beta = small._units.beta0 + small._units.scale * small._units.A @ np.asarray(lk.fixef(red))
    mine = fit.influence().beta(term.group).loc[level]
    np.testing.assert_allclose(mine, beta, rtol=1e-9)


@pytest.mark.parametrize("method", ["REML", pytest.param("ML", marks=pytest.mark.slow)])
def test_refits_equal_refits(method: str) -> None:
    frame = lmm.load_dataset("sleepstudy")
    fit = lmm.Model(SLEEP, frame).fit(method=method)
    made = fit.influence(refit=True)
    table = made.groups("Subject")
    assert set(table["status"]) == {"converged"}
    for level in ("308", "349"):
        one = lmm.Model(SLEEP, frame[frame["Subject"] != level]).fit(method=method)
        np.testing.assert_allclose(made.beta().loc[level], one.beta, rtol=1e-7)
        assert table.loc[level, "sigma"] == pytest.approx(one.sigma, rel=1e-6)
        names = ["sd_(Intercept)|Subject", "cor_Days.(Intercept)|Subject", "sd_Days|Subject"]
        own = one.confint(method="wald").loc[names, "estimate"]
        np.testing.assert_allclose(table.loc[level, names].astype(float), own, rtol=1e-4)
        gap, full = fit._beta - one._beta, fit.vcov().to_numpy()
        cooks = gap @ np.linalg.solve(full, gap) / 2
        assert table.loc[level, "cooks_d"] == pytest.approx(cooks, rel=1e-5)


@pytest.mark.slow
def test_crossed_refits_equal_refits() -> None:
    fit = fit_of(*FITS["crossed"])
    table, frame = fit.influence(refit=True).groups("sample"), lmm.load_dataset("Penicillin")
    one = lmm.Model(fit.model.formula, frame[frame["sample"] != "C"]).fit()
    assert table.loc["C", "sigma"] == pytest.approx(one.sigma, rel=1e-6)
    sd = one.varcorr()["sdcor"].to_numpy()[:2]
    np.testing.assert_allclose(
        table.loc["C", ["sd_(Intercept)|plate", "sd_(Intercept)|sample"]].astype(float),
        sd,
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    "formula",
    [
        pytest.param("Reaction ~ Days + (1 | Subject)", marks=pytest.mark.slow, id="rows"),
        pytest.param("Reaction ~ Days", id="patterns"),
    ],
)
def test_refits_with_a_residual_structure_equal_models_of_the_reduced_data(formula: str) -> None:
    residual = "ar1(Days | Subject)"
    fit, frame = fit_of(formula, "sleepstudy", residual), lmm.load_dataset("sleepstudy")
    made = fit.influence(refit=True)
    table, beta = made.groups("Subject"), made.beta("Subject")
    assert set(table["status"]) == {"converged"}
    level = "335"
    one = lmm.Model(formula, frame[frame["Subject"] != level], residual=residual).fit()
    np.testing.assert_allclose(beta.loc[level], one.beta, rtol=1e-7)
    assert table.loc[level, "sigma"] == pytest.approx(one.sigma, rel=1e-5)
    assert table.loc[level, "phi"] == pytest.approx(one.residual_params()["phi"], rel=1e-5)
    gap, full = fit._beta - one._beta, fit.vcov().to_numpy()
    cooks = gap @ np.linalg.solve(full, gap) / 2
    assert table.loc[level, "cooks_d"] == pytest.approx(cooks, rel=1e-5)


@pytest.mark.slow
def test_structured_refits_within_subjects_and_what_they_cannot_estimate() -> None:
    frame = lmm.load_dataset("sleepstudy")
    frame = frame[frame["Subject"].isin(["308", "309", "310", "330", "331", "332", "333"])]
    frame = frame.assign(last=(frame["Days"] == 9).astype(float))
    residual = "ar1(Days | Subject)"
    fit = lmm.Model("Reaction ~ Days + last", frame, residual=residual).fit()
    made = fit.influence(refit=True)
    table = made.groups(frame["Days"].to_numpy())
    assert "not estimable" in table.loc["9", "status"]
    assert table.loc["9"].drop(["n_rows", "status"]).isna().all()
    assert set(table.drop("9")["status"]) == {"converged"}
    one = lmm.Model("Reaction ~ Days + last", frame[frame["Days"] != 4], residual=residual).fit()
    assert table.loc["4", "phi"] == pytest.approx(one.residual_params()["phi"], rel=1e-5)
    assert table.loc["4", "sigma"] == pytest.approx(one.sigma, rel=1e-5)


# -- R ------------------------------------------------------------------------------------------


def test_linear_models_equal_r() -> None:
    ref = reference("influence_lm")
    fit = lmm.Model(ref["formula"].replace("Acid.Conc.", "acid"), _stackloss(ref)).fit()
    rows = fit.influence().rows()
    for column, field in {
        "leverage": "hatvalues",
        "leverage_fixed": "hatvalues",
        "cooks_d": "cooks_distance",
        "cooks_d_conditional": "cooks_distance",
        "std_residual": "rstandard",
        "student_residual": "rstudent",
        "covratio": None,
        "sigma": "sigma",
    }.items():
        if field:
            np.testing.assert_allclose(rows[column], ref[field], rtol=1e-9, err_msg=column)
    np.testing.assert_allclose(fit.influence().dfbetas("rows"), ref["dfbetas"], rtol=1e-8)
    # R's covratio takes the σ without the row
    change = (rows["sigma"] / fit.sigma) ** (2 * len(fit.beta))
    np.testing.assert_allclose(rows["covratio"] * change, ref["covratio"], rtol=1e-9)


def _stackloss(ref: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(ref["columns"]).rename(columns={"Acid.Conc.": "acid"})


@pytest.mark.parametrize("name", ["influence_sleepstudy", "influence_penicillin"])
def test_leverage_and_conditional_distance_equal_lme4(name: str) -> None:
    ref = reference(name)
    rows = fit_of(ref["formula"], ref["data"]).influence().rows()
    np.testing.assert_allclose(rows["leverage"], ref["hatvalues"], rtol=2e-6)
    np.testing.assert_allclose(rows["cooks_d_conditional"], ref["cooks_distance"], rtol=2e-5)


def test_refits_equal_lme4() -> None:
    ref = reference("influence_sleepstudy")
    made = fit_of(ref["formula"], ref["data"]).influence(refit=True)
    table = made.groups("Subject").loc[ref["levels"]]
    np.testing.assert_allclose(
        made.beta("Subject").loc[ref["levels"]], [r["fixef"] for r in ref["refits"]], rtol=1e-7
    )
    np.testing.assert_allclose(table["sigma"], [r["sigma"] for r in ref["refits"]], rtol=1e-5)
    sd = table[["sd_(Intercept)|Subject", "sd_Days|Subject"]]
    np.testing.assert_allclose(sd, [r["sd"] for r in ref["refits"]], rtol=1e-4)


# -- edges --------------------------------------------------------------------------------------


def test_a_coefficient_of_one_group_alone_is_nan_without_it() -> None:
    frame = lmm.load_dataset("Dyestuff").assign(last=lambda d: (d["Batch"] == "F").astype(float))
    fit = lmm.Model("Yield ~ last + (1 | Batch)", frame).fit()
    table = fit.influence().groups("Batch")
    assert np.isnan(table.loc["F", "cooks_d"]) and table.drop("F")["cooks_d"].notna().all()
    refits = fit.influence(refit=True).groups("Batch")
    assert "not estimable" in refits.loc["F", "status"]
    assert set(refits.drop("F")["status"]) <= {"converged", "singular"}


def test_singular_fits_have_the_influence_of_their_linear_model() -> None:
    data = lmm.load_dataset("Dyestuff2")
    with pytest.warns(lmm.SingularFitWarning):
        mixed = lmm.Model("Yield ~ 1 + (1 | Batch)", data).fit()
    plain = lmm.Model("Yield ~ 1", data).fit().influence().rows()
    pd.testing.assert_frame_equal(mixed.influence().rows(), plain, rtol=1e-6)


def test_what_cannot_be_had_is_refused() -> None:
    import pyarrow as pa

    fit = fit_of(*FITS["slope"])
    with pytest.raises(DataError, match="neither a grouping factor"):
        fit.influence().groups("nobody")
    with pytest.raises(DataError, match="a label for each"):
        fit.influence().groups(np.arange(3))
    table = pa.Table.from_pandas(lmm.load_dataset("Dyestuff"))
    streamed = lmm.Model.from_table("Yield ~ 1 + (1 | Batch)", table).fit()
    with pytest.raises(DataError, match="keeps no rows"):
        streamed.influence().rows()


def test_it_prints_and_pickles() -> None:
    made = fit_of(*FITS["slope"]).influence()
    text = repr(made)
    assert "by Cook's distance" in text and "at the θ of the fit" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "<table>" in made._repr_html_()
    again = pickle.loads(pickle.dumps(made))
    pd.testing.assert_frame_equal(again.groups(), made.groups())


@pytest.mark.parametrize("name", ["nested three deep, slopes", "nested and crossed"])
def test_rows_of_the_factorisation_lower_for_cuda_and_equal_dense_ones(name: str) -> None:
    d = make_design(layouts()[name], 120, 3)
    plan, _, gram, _ = problem(d)
    layout, theta = plan.layout, jnp.asarray(random_theta(d))
    with float64():
        factor = lk.factorise(layout, lk.factors(layout, jnp.asarray(theta)), gram)
        codes = tuple(np.zeros(8, np.int32) for _ in layout.chain)
        z = tuple(np.ones((8, S)) for _, S, _ in layout.chain)
        rows = lk.Rows(z, codes, np.ones((8, layout.d + layout.p)))
        made = jax.export.export(deletion._rows_of_l, platforms=["cuda"])(layout, factor, rows)
    assert made.platforms == ("cuda",)

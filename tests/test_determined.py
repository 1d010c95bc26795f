"""Boundaries and flat directions: what is known keeps its error, what is not has none."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pandas as pd
import pytest

import lmmjax as lmm


@functools.cache
def pairs() -> pd.DataFrame:
    """30 groups of two rows, one of each level of h, whose means are 0."""
    rng = np.random.default_rng(0)
    g, h = np.repeat(np.arange(30), 2), np.tile([0, 1], 30)
    y = rng.normal(size=30)[g] + rng.normal(size=60)
    y -= np.where(h == 0, y[h == 0].mean(), y[h == 1].mean())
    return pd.DataFrame({"y": y, "g": g.astype(str), "h": h.astype(str)})


def test_wald_of_a_singular_fit_is_that_of_the_active_face() -> None:
    with pytest.warns(lmm.SingularFitWarning):
        singular = lmm.Model("y ~ 1 + (1 | g) + (1 | h)", pairs()).fit()
    got = singular.confint("wald")
    face = lmm.Model("y ~ 1 + (1 | g)", pairs()).fit().confint("wald")
    inner = ["sd_(Intercept)|g", "sigma"]
    np.testing.assert_allclose(got.loc[inner], face.loc[inner], rtol=1e-6)
    assert np.isnan(got.loc["sd_(Intercept)|h", ["low", "high"]]).all()


def test_wald_of_a_correlation_of_one_is_unknown_and_that_of_its_sds_is_not() -> None:
    rng = np.random.default_rng(2)
    g, x = np.repeat(np.arange(20), 4), np.tile(np.arange(4.0), 20)
    b = rng.normal(size=20)[g]
    d = pd.DataFrame({"y": b * (1 + x) + rng.normal(size=80), "x": x, "g": g.astype(str)})
    with pytest.warns(lmm.SingularFitWarning, match="correlation"):
        got = lmm.Model("y ~ x + (x | g)", d).fit().confint("wald")
    assert np.isnan(got.loc["cor_x.(Intercept)|g", "low"])
    assert np.isfinite(got.drop("cor_x.(Intercept)|g").to_numpy()).all()


def test_shared_covariance_has_infinite_errors() -> None:
    data = lmm.load_dataset("Orthodont")
    model = lmm.Model("distance ~ age + (1 | Subject)", data, residual="cs(1 | Subject)")
    with pytest.warns(lmm.ResidualWarning, match="only the sum") as told:
        fit = model.fit()
    assert len(told) == 1
    assert fit.residual_intervals().loc["rho", "std_error"] == np.inf
    table = fit.variance_tests()
    assert np.isinf(table["std_error"]).all()
    assert table[["statistic", "p_value"]].isna().all(axis=None)
    intervals = fit.confint("wald")
    np.testing.assert_array_equal(
        intervals.loc[["sd_(Intercept)|Subject", "sigma"], ["low", "high"]], [[0, np.inf]] * 2
    )
    assert intervals.loc["rho", "high"] == 1


def test_positions_that_never_meet_are_named() -> None:
    rng = np.random.default_rng(5)
    rows = [(i, t) for i in range(40) for t in range(3) if t != 2 * (i % 2)]
    d = pd.DataFrame(rows, columns=["id", "t"])
    d["y"] = rng.normal(size=40)[d["id"]] + rng.normal(size=len(d))
    d["id"] = d["id"].astype(str)
    with pytest.warns(
        lmm.ResidualWarning, match=r"rho\[0,2\] of un.*both of the positions 0 and 2"
    ):
        fit = lmm.Model("y ~ 1", d, residual="un(t | id)").fit()
    assert fit.converged
    table = fit.variance_tests().set_index("term1")
    assert np.isinf(table["std_error"]).sum() == 1
    assert np.isinf(table.loc["rho[0,2]", "std_error"])
    assert np.isnan(table.loc["rho[0,2]", "p_value"])


def test_one_subject_does_not_tell_its_correlation() -> None:
    y = np.random.default_rng(2).normal(size=12)
    model = lmm.Model("y ~ 1", pd.DataFrame({"y": y, "id": "a"}), residual="cs(1 | id)")
    with pytest.warns(lmm.ResidualWarning, match="do not determine rho"):
        fit = model.fit()
    assert np.isinf(fit.residual_intervals().loc["rho", "std_error"])


@pytest.mark.parametrize(
    ("random", "residual", "warned"),
    [
        ("(0 + Sex | Subject)", "cs(1 | Subject)", True),
        ("(0 + age | Subject)", "cs(1 | Subject)", False),
        ("(age | Subject)", "cs(1 | Subject)", True),
        ("(0 + age | Subject)", "symm(age | Subject)", False),
        ("(0 + age | Subject)", "un(age | Subject)", True),
    ],
)
def test_redundancy_is_judged_on_spans(random: str, residual: str, warned: bool) -> None:
    from lmmjax.residual.checks import warn_redundant

    data = lmm.load_dataset("Orthodont")
    design = lmm.Model(f"distance ~ age + {random}", data, residual=residual).design
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert warn_redundant(design) == warned == (len(told) == 1)
    if random == "(age | Subject)":
        assert "a part of ((Intercept), age | Subject)" in str(told[0].message)


def test_residual_subjects_are_groups_of_influence() -> None:
    data = lmm.load_dataset("Orthodont")
    fit = lmm.Model("distance ~ age", data, residual="cs(1 | Subject)").fit()
    of = fit.influence()
    labels = data["Subject"].astype(str).to_numpy()
    want, got = of.groups(labels), of.groups("Subject")
    pd.testing.assert_frame_equal(got.loc[want.index], want, check_names=False)
    pd.testing.assert_frame_equal(of.groups(), got)
    table = fit.coef_table("containment")
    assert "as residual" in table.attrs["note"]
    np.testing.assert_array_equal(table["df"], fit.coef_table("residual")["df"])


@pytest.mark.parametrize("residual", [None, "varident(arm)"])
def test_joint_covariance_is_the_inverse_of_henderson(residual: str | None) -> None:
    rng = np.random.default_rng(4)
    d = pd.DataFrame({"g": rng.integers(0, 8, 60), "h": rng.integers(0, 5, 60)}).astype(str)
    d["x"], d["arm"] = rng.normal(size=60) + 3, np.where(np.arange(60) % 2, "a", "b")
    effects = rng.normal(size=(13, 2))
    d["y"] = effects[d["g"].astype(int), 0] + effects[8 + d["h"].astype(int), 1] + d["x"]
    d["y"] += effects[d["g"].astype(int), 1] * d["x"] + 0.3 * rng.normal(size=60)
    fit = lmm.Model("y ~ x + (x | g) + (1 | h)", d, residual=residual).fit()
    design = fit.model.design
    Z, G = [], []
    for term, cov in zip(design.terms, fit._term_covs(), strict=True):
        levels = range(len(term.levels))
        Z.append(np.concatenate([term.z * (term.codes == j)[:, None] for j in levels], 1))
        G += [cov] * len(term.levels)
    XZ = np.hstack([design.X, *Z])
    sd = (fit.residuals() / fit.residuals("pearson")).to_numpy()
    C = (XZ / sd[:, None] ** 2).T @ XZ
    at = 2
    for cov in G:
        C[at : at + len(cov), at : at + len(cov)] += np.linalg.inv(cov)
        at += len(cov)
    inverse, got = np.linalg.inv(C), fit.joint_cov("g")
    for j in range(8):
        mine = [0, 1, 2 + 2 * j, 3 + 2 * j]
        np.testing.assert_allclose(got[j], inverse[np.ix_(mine, mine)], rtol=1e-6, atol=1e-9)
    se = fit.ranef_se("h", prediction_error=True)
    np.testing.assert_allclose(se.iloc[:, 0] ** 2, np.diag(inverse)[18:], rtol=1e-6)
    assert np.all(se > fit.ranef_se("h"))


def test_negative_correlations_of_other_structures_are_not_judged() -> None:
    rng = np.random.default_rng(6)
    e = rng.normal(size=(25, 5))
    d = pd.DataFrame({"y": (e[:, 1:] - 0.8 * e[:, :-1]).ravel(), "t": np.tile(range(4), 25)})
    d["id"] = np.repeat(np.arange(25), 4).astype(str)
    fit = lmm.Model("y ~ 1", d, residual="ar1(t | id)").fit()
    assert "not judged: ar1(t | id) has negative" in str(fit.hierarchical_counterpart())


def test_an_unbounded_criterion_asks_for_fewer_parameters() -> None:
    y = np.random.default_rng(1).normal(size=15)
    d = pd.DataFrame({"y": y, "id": np.repeat(list("abc"), 5), "t": np.tile(range(5), 3)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = lmm.Model("y ~ 1", d, residual="un(t | id)").fit()
    assert not fit.converged
    assert "fewer parameters" in fit.message

"""The hierarchical and the marginal reading: residuals, log-likelihoods; dense algebra."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_residual import correlation, deviations

import lmmjax as lmm
from lmmjax import pointwise
from lmmjax.marginal import independent_groups, marginal_sd, whiten
from lmmjax.residual.covariance import relative_sd
from lmmjax.residual.subjects import subjects


def data() -> pd.DataFrame:
    """10 subjects of 2 to 5 of 5 visits in 3 clinics, in no order; schools cross the subjects."""
    rng = np.random.default_rng(3)
    rows = [
        (f"s{i:02d}", int(v), f"c{i // 4}", f"k{rng.integers(3)}")
        for i in range(10)
        for v in np.sort(rng.choice(5, size=5 - i % 4, replace=False))
    ]
    d = pd.DataFrame(rows, columns=["id", "visit", "clinic", "school"])
    d["arm"] = np.where(d["id"].str[1:].astype(int) % 2, "A", "B")
    d["t"] = d["visit"] + rng.uniform(0, 0.5, len(d))
    d["u"], d["w"], d["o"] = rng.uniform(0.5, 3, (3, len(d)))
    d["x"] = rng.normal(size=len(d)) * 5 + 100
    d["y"] = 0.1 * d["x"] + rng.normal(size=len(d)) * d["u"] + 50
    return d.sample(frac=1, random_state=1).reset_index(drop=True)


class Case:
    """A model at given parameters, with Σ and V dense."""

    def __init__(self, random: str, residual: str | None = None) -> None:
        self.frame, self.residual = data(), residual
        d = self.frame
        self.model = lmm.Model(f"y ~ x{random}", d, residual=residual, weights="w", offset="o")
        self.design = design = self.model.design
        rng = np.random.default_rng(7)
        self.beta, self.sigma = np.array([40.0, 0.2]), 1.3
        self.covs = [c @ c.T for c in (rng.normal(size=(len(t.names),) * 2) for t in design.terms)]
        self.phi, C, S = np.zeros(0), np.eye(design.n), np.ones(design.n)
        if residual is not None:
            s = design.residual.structure
            self.phi = s.start() + 0.3 * rng.normal(size=s.n_phi)
            with lmm.float64():
                p = pd.Series(np.asarray(s.natural(jnp.asarray(self.phi))), index=s.names)
            S = deviations(residual, p, d)
            if s.family is not None:
                same = d["id"].to_numpy()[:, None] == d["id"].to_numpy()
                C = np.where(same, correlation(residual, p, d), 0.0)
        S = self.sigma * S / np.sqrt(d["w"].to_numpy())
        self.Sigma = C * np.outer(S, S)
        self.V = self.Sigma.copy()
        for t, cov in zip(design.terms, self.covs, strict=True):
            same = t.codes[:, None] == t.codes
            self.V += np.where(same, t.z @ cov @ t.z.T, 0.0)
        self.r = design.y - design.offset - design.X @ self.beta

    def by_group(self) -> pointwise.ByGroup:
        roots = [np.linalg.cholesky(c)[None] for c in self.covs]
        with lmm.float64():
            return pointwise.group_loglik(
                self.design, self.beta[None], np.array([self.sigma]), roots, self.phi[None]
            )

    def by_row(self) -> np.ndarray:
        with lmm.float64():
            sigma = np.array([self.sigma])
            return pointwise.row_loglik(self.design, self.r[None], sigma, self.phi[None])[0]


STRUCTURES = [
    "ar1(visit | id) * varident(arm)",
    "car1(t | id) * varpower(u)",
    "cs(1 | id)",
    "un(visit | id)",
    "toep(visit | id)",
    "varident(arm)",
]

CASES = [
    (" + (t | id)", None),
    (" + (1 | clinic) + (1 | clinic:arm) + (1 | clinic:school)", None),
    ("", "ar1(visit | id)"),
    (" + (t | id)", "cs(1 | id)"),
    (" + (1 | clinic/id)", "toep(visit | id)"),
    (" + (1 | clinic) + (1 | id:arm)", "varident(arm)"),
    (" + (1 | clinic) + (1 | clinic:school)", "un(visit | id)"),
]


@pytest.mark.parametrize(("random", "residual"), CASES)
def test_marginal_reading_is_the_dense_normal(random: str, residual: str | None) -> None:
    case = Case(random, residual)
    found, design = case.by_group(), case.design
    expected = stats.multivariate_normal.logpdf(case.r, np.zeros(design.n), case.V)
    assert found.values.sum() == pytest.approx(expected, rel=1e-10)
    frame = data()
    codes = frame[found.group].to_numpy()
    for level, value in zip(found.levels, found.values[0], strict=True):
        at = np.flatnonzero(codes == level)
        one = stats.multivariate_normal.logpdf(
            case.r[at], np.zeros(len(at)), case.V[np.ix_(at, at)]
        )
        assert value == pytest.approx(one, rel=1e-9)
    white = whiten(design, case.covs, case.sigma, case.phi, case.r)
    np.testing.assert_allclose(white, np.linalg.solve(np.linalg.cholesky(case.V), case.r))
    sd = relative_sd(design.residual, case.phi, design.weights)
    np.testing.assert_allclose(
        marginal_sd(design, case.covs, case.sigma, sd), np.sqrt(np.diag(case.V))
    )


@pytest.mark.parametrize("residual", [None, *STRUCTURES])
def test_a_row_given_the_others_of_its_subject(residual: str | None) -> None:
    """From the joint normal distribution: mean and variance of one entry given all others."""
    case = Case("", residual)
    expected = np.empty(case.design.n)
    for i in range(case.design.n):
        others = np.flatnonzero(np.arange(case.design.n) != i)
        w = np.linalg.solve(case.Sigma[np.ix_(others, others)], case.Sigma[others, i])
        var = case.Sigma[i, i] - w @ case.Sigma[others, i]
        expected[i] = stats.norm.logpdf(case.r[i], w @ case.r[others], np.sqrt(var))
    np.testing.assert_allclose(case.by_row(), expected, rtol=1e-9)


@pytest.mark.parametrize("residual", STRUCTURES)
def test_errors_of_subjects_are_the_dense_normal(residual: str) -> None:
    case = Case("", residual)
    with lmm.float64():
        s = jax.tree.map(jnp.asarray, subjects(case.design))
        phi, sigma = jnp.asarray(case.phi), jnp.asarray(case.sigma)
        found = s.logpdf(phi, sigma, jnp.asarray(case.r))
        root = np.asarray(jax.vmap(lambda e: s.colour(phi, sigma, e))(jnp.eye(case.design.n))).T
    expected = stats.multivariate_normal.logpdf(case.r, np.zeros(case.design.n), case.Sigma)
    assert float(found) == pytest.approx(expected, rel=1e-11)
    np.testing.assert_allclose(root @ root.T, case.Sigma, rtol=1e-10, atol=1e-12)


def test_what_crossed_factors_connect_is_one_group() -> None:
    case = Case(" + (1 | id) + (1 | school)")
    assert len(np.unique(independent_groups(case.design))) == 1
    white = whiten(case.design, case.covs, case.sigma, case.phi, case.r)
    np.testing.assert_allclose(white, np.linalg.solve(np.linalg.cholesky(case.V), case.r))
    with pytest.raises(lmm.DesignError, match=r"crossed.*kind='conditional'"):
        case.by_group()
    with pytest.raises(lmm.DesignError, match=r"no grouping factor.*kind='conditional'"):
        Case("").by_group()
    assert len(np.unique(independent_groups(Case("").design))) == case.design.n


def test_too_many_connected_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(" + (1 | id) + (1 | school)")
    monkeypatch.setattr("lmmjax.marginal.MOST_ROWS", 10)
    with pytest.raises(lmm.DesignError, match=r"at most 10.*level='conditional'"):
        whiten(case.design, case.covs, case.sigma, case.phi, case.r)


# Fits ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ar1() -> lmm.Fit:
    frame = lmm.load_dataset("sleepstudy").sample(frac=1, random_state=2)
    formula = "Reaction ~ Days + (1 | Subject)"
    return lmm.Model(formula, frame, residual="ar1(Days | Subject)").fit(method="ML")


@pytest.fixture(scope="module")
def independent() -> lmm.Fit:
    formula = "Reaction ~ Days + (Days | Subject)"
    return lmm.Model(formula, lmm.load_dataset("sleepstudy")).fit(method="ML")


@pytest.mark.parametrize("name", ["ar1", "independent"])
def test_marginal_log_likelihoods_add_up_to_that_of_ml(name: str, request: Any) -> None:
    fit = request.getfixturevalue(name)
    by = fit.log_likelihood("marginal")
    assert by.index.name == "Subject" and len(by) == 18
    assert by.sum() == pytest.approx(fit.loglik, rel=1e-9)
    V = fit.marginal_cov("335").cov
    r = fit.residuals(level="marginal").loc[V.index]
    assert by["335"] == pytest.approx(stats.multivariate_normal.logpdf(r, np.zeros(10), V))


@pytest.mark.parametrize("name", ["ar1", "independent"])
def test_residuals_of_both_readings(name: str, request: Any) -> None:
    fit = request.getfixturevalue(name)
    rows = fit.marginal_cov("335").cov.index
    V, raw = fit.marginal_cov("335").cov.to_numpy(), fit.residuals(level="marginal")
    frame = lmm.load_dataset("sleepstudy")
    expected = frame["Reaction"] - fit.predict(frame, kind="population")
    pd.testing.assert_series_equal(raw, expected.loc[raw.index], check_names=False)
    np.testing.assert_allclose(fit.fitted("marginal") + raw, fit.model.design.y)
    pearson = fit.residuals("pearson", level="marginal")
    np.testing.assert_allclose(pearson[rows], raw[rows] / np.sqrt(np.diag(V)))
    white = fit.residuals("normalized", level="marginal")
    np.testing.assert_allclose(np.linalg.cholesky(V) @ white[rows], raw[rows])


def test_conditional_log_likelihood_of_independent_rows(independent: lmm.Fit) -> None:
    found = independent.log_likelihood()
    expected = stats.norm.logpdf(independent.residuals(), 0, independent.sigma)
    np.testing.assert_allclose(found, expected)
    assert found.index.equals(independent.model.rows)


def test_unknown_choices_are_refused(independent: lmm.Fit) -> None:
    with pytest.raises(lmm.DataError, match="expected one of 'conditional', 'marginal'"):
        independent.residuals(level="population")
    with pytest.raises(lmm.DataError, match="expected one of 'conditional', 'marginal'"):
        independent.log_likelihood("partial")
    with pytest.raises(lmm.DataError, match="level='both' is unknown"):
        independent.fitted("both")


def test_programs_lower_for_cuda() -> None:
    case = Case(" + (1 | clinic/id)", "un(visit | id)")
    with lmm.float64():
        s = jax.tree.map(jnp.asarray, subjects(case.design))
        draws = jax.tree.map(jnp.asarray, (case.phi[None], np.array([1.3]), case.r[None]))
        exported = jax.export.export(pointwise._row_loglik, platforms=["cuda"])(s, draws, 4)
        assert exported.platforms == ("cuda",)
        blocks = jax.tree.map(
            jnp.asarray, pointwise.gather(case.design, case.design.terms[0].codes)
        )
        covs = [jnp.asarray(c[None]) for c in case.covs]
        more = (covs, draws[1], draws[0], draws[2])
        structure = case.design.residual.structure
        jax.export.export(pointwise._dense_loglik, platforms=["cuda"])(structure, blocks, more, 4)

"""The parametric bootstrap, and the row-free draws and collapsed levels that it stands on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from designs import design, layouts, problem, random_theta
from scipy import stats

import lmmjax as lmm
from lmmjax import batch, bootstrap, collapse, derivatives, estimate, gram, rowfree
from lmmjax import likelihood as lk

LAYOUTS = layouts()
REFERENCE = Path(__file__).parent / "reference" / "tests" / "bootmer_sleepstudy_ci.json"
PATTERNS = {
    "intercept": [(1, "us")],
    "slope": [(2, "us")],
    "two terms": [(1, "us"), (1, "diag")],
}


def _value(layout: gram.Layout, method: str, *arrays: Any) -> tuple[Any]:
    return (estimate.criterion(layout, method, *arrays),)


VALUE = jax.jit(_value, static_argnums=(0, 1))
ALL = jax.jit(derivatives.value_gradient_hessian, static_argnums=(0, 1))
QUESTIONS = {"intercept": VALUE, "two terms": VALUE, "slope": ALL, "crossed": VALUE}


# -- collapsing -----------------------------------------------------------------------------------


def balanced(columns: list[tuple[int, str]], crossed: bool = False) -> Any:
    """40 levels in two visit patterns, the same covariates in each: only y differs in a pattern."""
    codes = np.concatenate([np.repeat(np.arange(25), 6), np.repeat(np.arange(25, 40), 4)])
    n = len(codes)
    terms = [("a", codes.astype(np.int32), S, cov) for S, cov in columns]
    if crossed:
        terms.append(("c", (np.arange(n) % 2).astype(np.int32), 1, "us"))
    d = design(terms, n, 2)
    visit = np.concatenate([np.tile(np.arange(6.0), 25), np.tile(np.arange(4.0), 15)])
    d.X[:, 1] = visit
    d.weights = np.ones(n)
    for t in d.terms:
        t.z[:, 1:] = visit[:, None]
    return d


@pytest.mark.parametrize("name", QUESTIONS)
def test_collapsed_levels_leave_the_likelihood_alone(name: str) -> None:
    d = balanced(PATTERNS.get(name, [(1, "us")]), crossed=name == "crossed")
    plan, _, g, rhs = problem(d)
    small = collapse.collapse(plan.layout, g)
    assert small is not None
    assert small.layout.chain[0][2] <= 10 < plan.layout.chain[0][2] == 40
    assert np.sum(small.gram.times[0]) == 40
    with lmm.float64():
        theta = jnp.asarray(random_theta(d))
        before = QUESTIONS[name](plan.layout, "REML", theta, g, rhs)
        after = QUESTIONS[name](small.layout, "REML", theta, small.gram, small.rhs(rhs))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-10)


def test_levels_that_differ_are_not_collapsed() -> None:
    d = design(LAYOUTS["slope"], 120, 2)
    plan, _, g, _ = problem(d)
    assert collapse.collapse(plan.layout, g) is None


@pytest.mark.parametrize(("distinct", "differ"), [(0.001, False), (0.69, False), (0.71, True)])
def test_a_sample_of_many_levels_decides_as_all_of_them(distinct: float, differ: bool) -> None:
    J = 2 * collapse.MANY
    values = np.random.default_rng(3).permutation(np.arange(J) % round(distinct * J)).astype(float)
    own = np.stack([values, np.ones(J), np.ones(J), values]).reshape(2, 2, J)
    assert collapse._differ(own) == differ
    assert collapse._differ(own[..., : J // 4]) == (len(set(values[: J // 4])) > 0.7 * J // 4)
    own[1, 1] = np.arange(J)
    assert collapse._differ(own)


# -- drawing without rows --------------------------------------------------------------------------


def dense_columns(d: Any, plan: gram.Plan) -> tuple[np.ndarray, np.ndarray]:
    """[Z X] in standardised units, n x (q + p), and blockdiag(I ⊗ Λ Λ') for a random θ."""
    standardised = gram.standardise(d)
    lams = lk.factors(plan.layout, random_theta(d))
    blocks, D, at = [], np.zeros((plan.layout.q,) * 2), 0
    for f in plan.factors:
        block = np.zeros((d.n, f.J, f.S))
        z = np.concatenate([standardised.Z[k] for k in f.terms], axis=1)
        block[np.arange(d.n), d.terms[f.terms[0]].codes] = z
        blocks.append(block.reshape(d.n, -1))
        lam = lk.factor_lambda(f.terms, [np.asarray(x) for x in lams])
        size = f.S * f.J
        D[at : at + size, at : at + size] = np.kron(np.eye(f.J), lam @ lam.T)
        at += size
    return np.hstack([*blocks, standardised.X]), D


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_row_free_draws_have_the_moments_of_rows(name: str) -> None:
    d = design(LAYOUTS[name], 120, 2)
    plan, _, g, _ = problem(d)
    M, D = dense_columns(d, plan)
    C, q = M.T @ (d.weights[:, None] * M), plan.layout.q
    root = rowfree.root(plan.layout, g)
    assert root.df == 120 - np.linalg.matrix_rank(M * np.sqrt(d.weights)[:, None], tol=1e-6)
    beta, sigma, m = np.array([0.3, -0.5]), 1.3, 4000
    lams = [np.asarray(x) for x in lk.factors(plan.layout, random_theta(d))]
    rng = np.random.default_rng(0)
    drawn = rowfree.simulate(plan.layout, root, beta, lams, sigma, rng, m)
    parts = [np.swapaxes(b, 1, 2).reshape(m, -1) for b in drawn.border]
    v = np.hstack([*parts, drawn.core])
    mean = C[:, q:] @ beta
    cov = sigma**2 * (C + C[:, :q] @ D @ C[:q])
    sd = np.sqrt(np.diag(cov))
    assert np.max(np.abs(v.mean(axis=0) - mean) / sd) < 5 / np.sqrt(m)
    assert np.max(np.abs(np.cov(v.T) - cov) / np.outer(sd, sd)) < 7 / np.sqrt(m)
    square = beta @ C[q:, q:] @ beta + sigma**2 * (np.trace(D @ C[:q, :q]) + d.n)
    assert abs(drawn.yy.mean() - square) < 5 * drawn.yy.std() / np.sqrt(m)


# -- the bootstrap -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fit() -> lmm.Fit:
    return lmm.Model("Reaction ~ Days + (1 | Subject)", lmm.load_dataset("sleepstudy")).fit()


def test_agrees_with_bootmer_within_monte_carlo_error(fit: lmm.Fit) -> None:
    reference = json.loads(REFERENCE.read_text())["expected"]
    boot = fit.bootstrap(4000, seed=3)
    assert boot.n_failed == 0
    names = ["(Intercept)", "Days", "sd_(Intercept)|Subject", "sigma"]
    assert list(boot.replicates.columns) == names
    np.testing.assert_allclose(boot.estimates, reference["t0"], rtol=1e-6)
    se = np.array(reference["boot_se"])
    # an SD from 1,000 replicates has relative error 2.2 %; a 2.5 % quantile, se x 0.085
    np.testing.assert_allclose(boot.replicates.std(), se, rtol=4 * 0.025)
    interval = boot.confint()
    assert np.all(np.abs(interval["low"] - reference["lower"]) < 4 * 0.095 * se)
    assert np.all(np.abs(interval["high"] - reference["upper"]) < 4 * 0.095 * se)


def test_each_replicate_is_the_single_fit(fit: lmm.Fit) -> None:
    """Refits of simulated rows, one by one, agree with the batch in moments."""
    boot = fit.bootstrap(4000, seed=0)
    data = lmm.load_dataset("sleepstudy")
    simulated = fit.simulate(60, seed=5)
    rows = []
    for column in simulated:
        refit = lmm.Model(fit.model.formula, data.assign(Reaction=simulated[column])).fit()
        rows.append([*refit.beta, refit.varcorr()["sdcor"].iloc[0], refit.sigma])
    z = (np.mean(rows, axis=0) - boot.replicates.mean()) / (boot.replicates.std() / np.sqrt(60))
    assert np.max(np.abs(z)) < 4


def test_is_reproducible_and_studentises(fit: lmm.Fit) -> None:
    one, two = fit.bootstrap(1000, seed=8), fit.bootstrap(1000, seed=8)
    np.testing.assert_array_equal(one.replicates, two.replicates)
    assert not np.array_equal(one.replicates, fit.bootstrap(1000, seed=9).replicates)
    interval = one.confint(kind="studentized")
    table = fit.coef_table()
    # both are t-like intervals of the same pivot
    half = (table["ci_high"] - table["ci_low"]) / 2
    assert np.all(np.abs(interval["low"][:2] - table["ci_low"]) < 0.25 * half)
    assert np.all(np.abs(interval["high"][:2] - table["ci_high"]) < 0.25 * half)
    assert interval.loc["sigma", "low"] < fit.sigma < interval.loc["sigma", "high"]
    got = interval.loc["sd_(Intercept)|Subject"]  # skew: longer to the right
    assert got["high"] - got["estimate"] > got["estimate"] - got["low"] > 0
    assert list(one.confint(parm="sigma").index) == ["sigma"]
    assert "0 failed" in repr(one)


def test_failures_are_counted_and_left_out(fit: lmm.Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = rowfree.simulate

    def damaged(*args: Any) -> gram.Rhs:
        rhs = draw(*args)
        rhs.yy[[3, 5]] = np.nan
        return rhs

    clean = fit.bootstrap(1000, seed=8)
    monkeypatch.setattr(rowfree, "simulate", damaged)
    boot = fit.bootstrap(1000, seed=8)
    assert boot.n_failed == 2
    assert list(np.flatnonzero(boot.status)) == [3, 5]
    assert batch.WORDS[boot.status[3]].startswith("failed")
    others = np.delete(np.arange(1000), [3, 5])
    np.testing.assert_array_equal(
        boot.replicates.to_numpy()[others], clean.replicates.to_numpy()[others]
    )
    assert boot.replicates.iloc[[3, 5]].isna().all(axis=None)
    assert np.isfinite(boot.confint()).all(axis=None)


def test_refuses_what_it_cannot_do(fit: lmm.Fit) -> None:
    with pytest.raises(lmm.DataError, match="expected an integer"):
        fit.bootstrap(0)
    for seed in ("a", -1):
        with pytest.raises(lmm.DataError, match="not a seed"):
            fit.bootstrap(10, seed=seed)
    boot = fit.bootstrap(1000, seed=8)
    with pytest.raises(lmm.LmmError, match="percentile"):
        boot.confint(kind="bca")
    with pytest.raises(lmm.DataError, match="expected some of"):
        boot.confint(parm="nothing")


def test_one_level_class_keeps_its_codes() -> None:
    """Levels outside any class are copied as they are."""
    d = balanced([(1, "us")])
    codes = d.terms[0].codes.copy()
    codes[codes == 39] = 38  # one level of 8 rows
    d.terms[0].codes = codes
    d.terms[0].levels = d.terms[0].levels[:39]
    plan, _, g, rhs = problem(d)
    small = collapse.collapse(plan.layout, g)
    assert small is not None
    np.testing.assert_allclose(small.rhs(rhs).border[0][..., 0], rhs.border[0][..., 38])


def test_null_statistics_of_a_likelihood_ratio(fit: lmm.Fit) -> None:
    """Of a fixed effect under ML: χ²(1) but for small samples; the same seed, the same numbers."""
    data = lmm.load_dataset("sleepstudy").assign(Reaction=fit.simulate(1, seed=1)["sim_1"])
    noise = np.random.default_rng(0).standard_normal(len(data))
    small = lmm.Model("Reaction ~ Days + (1 | Subject)", data).fit("ML")
    big = lmm.Model("Reaction ~ Days + noise + (1 | Subject)", data.assign(noise=noise)).fit("ML")
    null = bootstrap.null_statistics(small, big, n=512, seed=3)
    assert null.n_failed == 0
    assert np.min(null.statistics) > -1e-7
    assert abs(np.mean(null.statistics) - 1.0) < 4 * np.sqrt(2 / 512)
    assert abs(np.mean(null.statistics > 3.84) - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 512)
    np.testing.assert_array_equal(
        bootstrap.null_statistics(small, big, n=256, seed=3).statistics, null.statistics[:256]
    )
    with pytest.raises(lmm.DataError, match="same rows and method"):
        bootstrap.null_statistics(fit, big)


def test_studentised_intervals_of_a_linear_model() -> None:
    """The exact interval of σ is that of χ²; 400 replicates of a closed form."""
    data = lmm.load_dataset("sleepstudy")
    fit = lmm.Model("Reaction ~ Days", data).fit()
    made = fit.bootstrap(400).confint(kind="studentized").loc["sigma"]
    exact = fit.sigma * np.sqrt(178 / stats.chi2.ppf([0.975, 0.025], 178))
    np.testing.assert_allclose(made[["low", "high"]].to_numpy(float), exact, rtol=0.03)


def test_a_singular_fit_has_the_studentised_scales_of_its_active_face() -> None:
    """One component at 0: the others keep their standard errors, those of the Wald intervals."""
    data = lmm.load_dataset("sleepstudy")
    z = np.random.default_rng(3).normal(size=180)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmm.SingularFitWarning)
        fit = lmm.Model("Reaction ~ Days + (z || Subject)", data.assign(z=z)).fit()
    assert fit.singular
    boot = fit.bootstrap(40, seed=2)
    se = boot._scales[1]
    assert np.isfinite(se[0]).tolist() == [True, False, True]
    from lmmjax.inference.intervals import _unbounded

    np.testing.assert_allclose(se[0], _unbounded(fit)[1], rtol=1e-9)
    table = boot.confint(kind="studentized")
    inner = table.loc[["sd_(Intercept)|Subject", "sigma"]]
    assert np.all(inner["low"] < inner["estimate"]) and np.all(inner["estimate"] < inner["high"])


def test_transformed_components_lower_for_cuda(fit: lmm.Fit) -> None:
    layout, g, rhs, theta, _, _, structure = fit.bootstrap(1000, seed=8)._pieces
    with lmm.float64():
        exported = jax.export.export(bootstrap._transformed, platforms=["cuda"])(
            layout, fit.method, structure, g, rhs, jnp.asarray(theta)
        )
    assert "callback" not in str(exported.mlir_module())

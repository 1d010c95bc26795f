"""The Bayesian half: densities against dense algebra, forms against each other, results."""

import math
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from numpyro.infer.util import log_density
from scipy import optimize, stats
from scipy.linalg import block_diag

import lmmjax as lmm
from lmmjax.bayes.priors import resolve
from lmmjax.errors import (
    ConvergenceWarning,
    DataError,
    DesignError,
    LmmError,
    PrecisionError,
    PriorError,
)

SLEEP = "Reaction ~ Days + (Days | Subject)"


def sample(model, **options):
    """Draws without the verdict on them, for tests that are not about convergence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.sample(**options)


@pytest.fixture(scope="module")
def sleep():
    return lmm.Model(SLEEP, lmm.load_dataset("sleepstudy"))


@pytest.fixture(scope="module")
def posterior(sleep):
    return sample(sleep, seed=1)


# -------------------------------------------------------------------------------------------------
# The density, against dense algebra
# -------------------------------------------------------------------------------------------------


def small_data():
    """Unbalanced rows with weights and an offset; b lies within a, c crosses both."""
    rng = np.random.default_rng(3)
    n = 40
    a = rng.integers(0, 4, n)
    return pd.DataFrame(
        {
            "y": 100 + 5 * rng.normal(size=n),
            "x": 20 + rng.normal(size=n),
            "a": a.astype(str),
            "b": rng.integers(0, 3, n).astype(str),
            "c": rng.integers(0, 5, n).astype(str),
            "w": rng.uniform(0.5, 3, n),
            "o": rng.normal(size=n),
        }
    )


PROPER = {
    "(Intercept)": dist.Normal(90.0, 30.0),
    "x": dist.Normal(0.2, 0.7),
    "sigma": dist.HalfNormal(4.0),
}


def small_model(random, **options):
    return lmm.Model(f"y ~ x + {random}", small_data(), weights="w", offset="o", **options)


NESTED = "(x | a) + (1 | a:b)"
CROSSED = "(x | a) + (1 | c)"


def covariance_values(model, rng):
    """Random values of the covariance sites, and D of each term."""
    values, D = {"sigma": np.asarray(3.1)}, []
    names = {g: 0 for g in model.groups}
    sds = {g: [] for g in model.groups}
    for term in model.design.terms:
        S = len(term.names)
        sd = rng.uniform(0.5, 2.0, S)
        C = np.eye(S)
        if S > 1:
            C[0, 1] = C[1, 0] = -0.4
            values[f"chol_{term.group}_{names[term.group]}"] = np.linalg.cholesky(C)
        names[term.group] += 1
        sds[term.group].append(sd)
        D.append(np.outer(sd, sd) * C)
    values |= {f"sd_{g}": np.concatenate(v) for g, v in sds.items()}
    return values, D


def dense_z(model):
    """Z of each term, columns of a level side by side."""
    out = []
    for term in model.design.terms:
        n, S = term.z.shape
        Z = np.zeros((n, len(term.levels), S))
        Z[np.arange(n), term.codes] = term.z
        out.append(Z.reshape(n, -1))
    return out


def log_prior(model, priors, values):
    """Log prior of the covariance sites by NumPyro, site by site."""
    entries = resolve(model.design, priors).entries
    total = entries["sigma"].log_prob(values["sigma"])
    at = {g: 0 for g in model.groups}
    number = {g: 0 for g in model.groups}
    for term in model.design.terms:
        for name in term.names:
            key = f"sd_{name}|{term.group}"
            total += entries[key].log_prob(values[f"sd_{term.group}"][at[term.group]])
            at[term.group] += 1
        if len(term.names) > 1:
            L = values[f"chol_{term.group}_{number[term.group]}"]
            total += dist.LKJCholesky(len(L), entries[f"cor_{term.group}"]).log_prob(L)
        number[term.group] += 1
    return float(total)


def dense(model, D, sigma):
    """y - offset, X, Z, prior covariance of b, covariance of ε."""
    design = model.design
    G = block_diag(
        *[np.kron(np.eye(len(t.levels)), d) for t, d in zip(design.terms, D, strict=True)]
    )
    return (
        design.y - design.offset,
        design.X,
        np.hstack(dense_z(model)),
        G,
        sigma**2 / design.weights,
    )


@pytest.mark.parametrize("random", [NESTED, CROSSED, "(x || a) + (1 | c)"])
def test_marginal_density_is_that_of_the_dense_normal(random):
    model = small_model(random)
    values, D = covariance_values(model, np.random.default_rng(0))
    y, X, Z, G, R = dense(model, D, 3.1)
    mean, sd = np.array([90.0, 0.2]), np.array([30.0, 0.7])
    V = X @ np.diag(sd**2) @ X.T + Z @ G @ Z.T + np.diag(R)
    with lmm.float64():
        expected = stats.multivariate_normal.logpdf(y, X @ mean, V)
        expected += log_prior(model, PROPER, values)
        found, _ = log_density(model.numpyro_model(priors=PROPER), (), {}, values)
    assert float(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("random", [NESTED, CROSSED])
@pytest.mark.parametrize("form", ["centered", "noncentered"])
def test_hierarchical_over_conditional_density_is_the_marginal_density(random, form):
    # log p(θ, β, b, y) - log p(β, b | θ, y) does not depend on (β, b): it is log p(θ, y)
    model = small_model(random)
    rng = np.random.default_rng(1)
    values, D = covariance_values(model, rng)
    y, X, Z, G, R = dense(model, D, 3.1)
    mean, sd = np.array([90.0, 0.2]), np.array([30.0, 0.7])
    W = np.hstack([X, Z])
    Q = W.T @ (W / R[:, None]) + block_diag(np.diag(sd**-2.0), np.linalg.inv(G))
    h = W.T @ (y / R) + np.concatenate([mean / sd**2, np.zeros(len(G))])
    centre = np.linalg.solve(Q, h)
    noise = rng.normal(size=len(Q))
    effects = centre + np.linalg.solve(np.linalg.cholesky(Q).T, noise)
    conditional = stats.norm.logpdf(noise).sum() + 0.5 * np.linalg.slogdet(Q)[1]
    extra, jacobian = effect_values(model, effects[2:], D, form)
    with lmm.float64():
        hierarchical = values | extra | {"beta": effects[:2]}
        joint, _ = log_density(model.numpyro_model(form, PROPER), (), {}, hierarchical)
        marginal, _ = log_density(model.numpyro_model(priors=PROPER), (), {}, values)
    assert float(joint) - jacobian - conditional == pytest.approx(float(marginal), abs=1e-8)


def effect_values(model, b, D, form):
    """Sites of the effects (terms of a group joined), and log|∂b/∂site|."""
    by_group, factors, at = {}, {}, 0
    for term, d in zip(model.design.terms, D, strict=True):
        J, S = len(term.levels), len(term.names)
        by_group.setdefault(term.group, []).append(b[at : at + J * S].reshape(J, S))
        factors.setdefault(term.group, []).append(np.linalg.cholesky(d))
        at += J * S
    out, jacobian = {}, 0.0
    for group, parts in by_group.items():
        effects, L = np.hstack(parts), block_diag(*factors[group])
        if form == "centered":
            out[f"ranef_{group}"] = effects
        else:
            out[f"u_{group}"] = np.linalg.solve(L, effects.T).T
            jacobian += len(effects) * np.linalg.slogdet(L)[1]
    return out, jacobian


def test_a_prior_that_is_not_normal_leaves_beta_in_the_marginal_form():
    model = small_model(CROSSED)
    priors = PROPER | {"x": dist.StudentT(4.0, 0.0, 1.0)}
    values, D = covariance_values(model, np.random.default_rng(2))
    beta = np.array([95.0, 0.003])
    y, X, Z, G, R = dense(model, D, 3.1)
    with lmm.float64():
        expected = stats.multivariate_normal.logpdf(y, X @ beta, Z @ G @ Z.T + np.diag(R))
        expected += stats.norm.logpdf(95, 90, 30) + stats.t.logpdf(0.003, 4)
        expected += log_prior(model, priors, values)
        sites = values | {"beta": beta}
        found, trace = log_density(model.numpyro_model(priors=priors), (), {}, sites)
    assert "beta" in trace
    assert float(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("formula", "data", "start"),
    [
        ("Yield ~ 1 + (1 | Batch)", "Dyestuff", [40.0, 50.0]),
        (SLEEP, "sleepstudy", [25.0, 6.0, 25.0, 0.0]),
    ],
)
def test_under_the_reml_prior_the_mode_is_the_reml_fit(formula, data, start):
    # coordinates (SD, correlation, σ), no Jacobian: the density itself
    model = lmm.Model(formula, lmm.load_dataset(data))
    group = next(iter(model.groups))
    with lmm.float64():
        density = model.numpyro_model(priors="reml")

        def minus(t):
            S = len(model.design.terms[0].names)
            values = {f"sd_{group}": t[:S], "sigma": t[S]}
            if S == 2:
                L = jnp.array([[1.0, 0.0], [t[3], jnp.sqrt(1 - t[3] ** 2)]])
                values[f"chol_{group}_0"] = L
            return -log_density(density, (), {}, values)[0]

        gradient = jax.jit(jax.grad(minus))
        best = optimize.minimize(jax.jit(minus), start, jac=gradient, options={"gtol": 1e-8})
        loglik_gap = float(minus(jnp.asarray(best.x))) + model.fit().loglik
    fit = model.fit().varcorr()["sdcor"].to_numpy()
    order = [0] if len(start) == 2 else [0, 1, 3, 2]
    expected = fit if len(start) == 2 else fit[order]
    np.testing.assert_allclose(best.x, expected, rtol=1e-4, atol=1e-5)
    # normalised LKJ(1) on one correlation is 1/2; all else is the restricted likelihood itself
    assert loglik_gap == pytest.approx(math.log(2) if len(start) == 4 else 0.0, abs=1e-6)


# -------------------------------------------------------------------------------------------------
# Priors
# -------------------------------------------------------------------------------------------------


def test_default_priors_fit_the_units_and_are_told_in_words(sleep):
    data = sleep.design
    text = resolve(sleep.design).describe()
    assert "sd_Days|Subject" in text and "half-t(3, 48.89)" in text and "LKJ(1)" in text
    entries = resolve(sleep.design).entries
    assert float(entries["(Intercept)"].loc) == pytest.approx(data.y.mean())
    sd_y, sd_x = data.y.std(ddof=1), data.X[:, 1].std(ddof=1)
    wide = math.hypot(2.5 * sd_y, 2.5 * sd_y / sd_x * data.X[:, 1].mean())
    assert float(entries["(Intercept)"].scale) == pytest.approx(wide)


def test_priors_scale_with_the_response():
    frame = lmm.load_dataset("sleepstudy")
    one = resolve(lmm.Model(SLEEP, frame).design).entries
    frame = frame.assign(Reaction=1000 * frame["Reaction"])
    many = resolve(lmm.Model(SLEEP, frame).design).entries
    for key in ("(Intercept)", "Days"):
        assert float(many[key].scale) == pytest.approx(1000 * float(one[key].scale))
    assert float(many["sigma"].base_dist.scale) == pytest.approx(
        1000 * float(one["sigma"].base_dist.scale)
    )


def test_cell_means_have_the_prior_of_an_intercept():
    model = lmm.Model("score ~ 0 + Machine + (1 | Worker)", lmm.load_dataset("Machines"))
    entries = resolve(model.design).entries
    assert float(entries["MachineB"].loc) == pytest.approx(model.design.y.mean())


@pytest.mark.parametrize(
    ("priors", "message"),
    [
        ("jeffreys", "jeffreys.*expected one of 'default', 'reml', 'flat'"),
        ({"Dayz": dist.Normal(0.0, 1.0)}, "Dayz.*Did you mean 'Days'"),
        ({"sigma": dist.Normal(0.0, 1.0)}, "sigma.*positive"),
        ({"sd_Days|Subject": dist.Uniform(-1.0, 1.0)}, "positive"),
        ({"Days": 3.0}, "scalar NumPyro distribution"),
        ({"Days": dist.Normal(jnp.zeros(2), 1.0)}, "scalar NumPyro distribution"),
        ({"Days": dist.Poisson(3.0)}, "discrete"),
        ({"cor_Subject": -1.0}, "positive number"),
        ({"cor_Subject": dist.Normal(0.0, 1.0)}, "LKJ"),
    ],
)
def test_bad_priors_are_refused(sleep, priors, message):
    with pytest.raises(PriorError, match=message):
        resolve(sleep.design, priors)


def test_given_priors_replace_the_defaults(sleep):
    given = {"Days": dist.Normal(0.0, 1.0), "cor_Subject": dist.LKJ(2, 2.0), "base": "default"}
    priors = resolve(sleep.design, given)
    assert "normal(0, 1)  (given)" in priors.describe()
    assert priors.entries["cor_Subject"] == 2.0
    assert resolve(sleep.design, priors).describe() == priors.describe()


def test_a_covariate_named_as_a_variance_parameter_is_refused():
    data = lmm.load_dataset("sleepstudy").rename(columns={"Days": "sigma"})
    with pytest.raises(PriorError, match="Rename the column"):
        resolve(lmm.Model("Reaction ~ sigma + (1 | Subject)", data).design)


def two_levels():
    rng = np.random.default_rng(0)
    return pd.DataFrame({"y": rng.normal(size=20), "g": ["a", "b"] * 10})


def test_flat_priors_need_three_levels_beside_an_intercept():
    with pytest.raises(PriorError, match=r"2 levels, of which 1 is absorbed.*at least 3"):
        resolve(lmm.Model("y ~ 1 + (1 | g)", two_levels()).design, "reml")
    three = two_levels().assign(g=["a", "b", "c", "d"] * 5)
    resolve(lmm.Model("y ~ 1 + (1 | g)", three).design, "flat")
    # a covariate of the groups takes up another direction
    three["x"] = three["g"].map({"a": 0.0, "b": 1.0, "c": 2.0, "d": 5.0})
    resolve(lmm.Model("y ~ x + (1 | g)", three).design, "reml")
    with pytest.raises(PriorError, match="3 levels, of which 2 are absorbed"):
        resolve(lmm.Model("y ~ x + (1 | g)", three[three["g"] != "d"]).design, "reml")


def test_a_proper_prior_on_the_sd_lifts_the_refusal():
    priors = {"base": "reml", "sd_(Intercept)|g": dist.HalfNormal(1.0)}
    resolve(lmm.Model("y ~ 1 + (1 | g)", two_levels()).design, priors)


def test_as_many_effects_as_rows_need_a_proper_prior():
    data = two_levels().assign(g=np.arange(20).astype(str))
    model = lmm.Model("y ~ 1 + (1 | g)", data)
    with pytest.raises(PriorError, match="20 effects for 20 rows"):
        resolve(model.design, "reml")
    resolve(model.design, "default")


# -------------------------------------------------------------------------------------------------
# Draws
# -------------------------------------------------------------------------------------------------


def assert_same_posterior(a, b, names):
    """Means agree within four Monte Carlo standard errors, from effective sample sizes."""
    for name in names:
        x, y = (p.values[name].reshape(p.chains, p.draws, -1) for p in (a, b))
        z = np.abs(x.mean((0, 1)) - y.mean((0, 1))) / np.hypot(mcse(x), mcse(y))
        assert np.max(z) < 4.5, (name, z)


def mcse(x):
    from lmmjax.bayes.posterior import _ess

    return x.std((0, 1)) / np.sqrt(_ess(x, "bulk"))


NAMES = ["beta", "sd_Subject", "cor_Subject", "sigma", "ranef_Subject"]


@pytest.mark.slow
def test_noncentered_draws_agree_with_marginal_ones(sleep, posterior):
    assert_same_posterior(posterior, sample(sleep, form="noncentered", draws=500, seed=2), NAMES)


@pytest.mark.slow
def test_centered_draws_agree_with_marginal_ones(sleep, posterior):
    assert_same_posterior(posterior, sample(sleep, form="centered", seed=3), NAMES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("formula", "data"),
    [
        ("diameter ~ 1 + (1 | plate) + (1 | sample)", "Penicillin"),
        ("score ~ Machine + (1 | Worker/Machine)", "Machines"),
        ("score ~ Machine + cs(0 + Machine | Worker)", "Machines"),
        ("score ~ Machine + homcs(0 + Machine | Worker)", "Machines"),
        ("score ~ Machine + hom(0 + Machine | Worker)", "Machines"),
    ],
)
def test_forms_agree_on_other_designs(formula, data):
    model = lmm.Model(formula, lmm.load_dataset(data))
    marginal = sample(model, seed=1)
    rows = sample(model, form="noncentered", seed=2)
    assert_same_posterior(marginal, rows, list(marginal.values))


def test_the_same_seed_gives_the_same_draws_and_precision_is_left_alone(sleep, posterior):
    before = jax.config.jax_enable_x64
    again = sample(sleep, seed=1)
    assert jax.config.jax_enable_x64 == before
    for name, values in posterior.values.items():
        np.testing.assert_array_equal(values, again.values[name])
    other = sample(sleep, seed=2)
    assert not np.array_equal(other.values["sigma"], posterior.values["sigma"])


def test_correlated_effects_are_drawn_with_their_correlation(posterior):
    # given all draws, b of a new subject has the covariance D; those of the data shrink from it
    table = posterior.varcorr()
    assert table["term2"].iloc[2] == "Days"
    corr = table["sdcor"].iloc[2]
    assert corr == pytest.approx(posterior.values["cor_Subject"].mean())
    b = posterior._flat("ranef_Subject")[:, 0]
    # within a subject the two effects are traded against each other
    assert np.corrcoef(b.T)[0, 1] < -0.3


def test_given_priors_take_effect(sleep):
    # the families of the default priors would need no new program; Gaussian ones do
    priors = {"Days": dist.Normal(0.0, 1e-3)}
    tight = sample(sleep, priors=priors, seed=1)
    assert tight.beta["Days"] == pytest.approx(0.0, abs=0.01)
    assert tight.varcorr()["sdcor"].iloc[1] > 8
    assert "(given)" in repr(tight)


# -------------------------------------------------------------------------------------------------
# The result
# -------------------------------------------------------------------------------------------------


def test_tables_have_the_shape_of_a_fits(sleep, posterior):
    fit = sleep.fit()
    table = posterior.coef_table(level=0.9)
    assert list(table.columns) == ["estimate", "std_error", "ci_low", "ci_high", "ess", "rhat"]
    assert list(table.index) == list(fit.coef_table().index)
    np.testing.assert_allclose(table["estimate"], fit.beta, rtol=0.02)
    mine, theirs = posterior.varcorr(), fit.varcorr()
    keys = ["group", "term1", "term2"]
    pd.testing.assert_frame_equal(mine[keys], theirs[keys])
    assert list(mine.columns[3:]) == ["vcov", "sdcor", "sd", "low", "high", "ess", "rhat"]
    blup = fit.ranef()
    assert posterior.ranef().index.equals(blup.index)
    assert posterior.ranef().columns.equals(blup.columns)
    gap = (posterior.ranef() - blup) / posterior.ranef_se()
    assert np.abs(gap.to_numpy()).max() < 0.2
    ratio = (posterior.ranef_se() / fit.ranef_se()).to_numpy()
    assert 1.1 < ratio.mean() < 1.4
    low, high = posterior.ranef_interval("Subject", 0.5)
    assert (low < high).all(axis=None)


def test_diagnostics_of_a_good_run(posterior):
    checks = posterior.diagnostics()
    assert checks["rhat_max"] < 1.01 and checks["divergences"] == 0
    assert checks["ess_bulk_min"] > 1000
    assert posterior.problems == [] and posterior.converged


def test_what_is_wrong_is_warned_of_and_printed(sleep, monkeypatch):
    monkeypatch.setattr("lmmjax.bayes.posterior.ESS_PER_CHAIN", 10**6)
    with pytest.warns(ConvergenceWarning, match=r"effective sample size.*use more draws"):
        few = sleep.sample(seed=1)
    assert "NOT TO BE TRUSTED" in repr(few)
    assert not few.converged


def test_each_check_fires(posterior):
    values = {k: v.copy() for k, v in posterior.values.items()}
    values["sigma"][0] += 3.0
    stats = {k: v.copy() for k, v in posterior.stats.items()}
    stats["diverging"][1, :7] = True
    stats["energy"] = np.cumsum(stats["energy"] - stats["energy"].mean(), axis=1)
    words = "; ".join(replace(posterior, values=values, stats=stats).problems)
    for part in ("R-hat up to", "effective sample size", "7 divergent", "E-BFMI"):
        assert part in words


@pytest.mark.slow
def test_a_short_run_warns(sleep):
    with pytest.warns(ConvergenceWarning, match="effective sample size"):
        sleep.sample(draws=20, warmup=5, chains=2, seed=0)


@pytest.mark.slow
def test_divergences_of_bad_geometry_are_told():
    # the centred form of a variance near zero is the funnel
    model = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff2"))
    with pytest.warns(ConvergenceWarning):
        bad = model.sample(form="centered", target_accept=0.6, seed=0)
    assert bad.problems


def test_data_is_a_tree_that_arviz_understands(posterior):
    import arviz_stats

    tree = posterior.data
    expected = {"posterior", "sample_stats", "log_likelihood", "observed_data"}
    assert expected <= set(tree.children)
    draws = tree["posterior"].dataset
    assert draws["beta"].dims == ("chain", "draw", "coef")
    assert list(draws["coef"].values) == ["(Intercept)", "Days"]
    assert draws["cor_Subject"].dims == ("chain", "draw", "Subject_pair")
    assert list(draws["Subject_pair"].values) == ["Days.(Intercept)"]
    assert draws["ranef_Subject"].dims == ("chain", "draw", "Subject", "Subject_term")
    assert list(tree["log_likelihood"].data_vars) == ["y"]
    summary = arviz_stats.summary(tree, var_names=["beta", "sd_Subject", "cor_Subject", "sigma"])
    assert "beta[Days]" in summary.index
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loo = arviz_stats.loo(tree)
    assert loo.elpd == pytest.approx(-861, abs=3)


def test_arviz_labels_each_effect_by_its_level_and_term(posterior):
    import arviz as az

    table = az.summary(posterior.data, round_to="none")
    draws = posterior.values["ranef_Subject"].reshape(-1, 18, 2)
    levels = list(posterior.model.design.terms[0].levels)
    for level, term in (("308", "Days"), ("309", "(Intercept)"), ("372", "Days")):
        expected = draws[:, levels.index(level), ["(Intercept)", "Days"].index(term)].mean()
        found = float(table.loc[f"ranef_Subject[{level}, {term}]", "mean"])
        assert found == pytest.approx(expected, rel=1e-6)


def test_plots_of_arviz_work_on_the_tree(posterior):
    plots = pytest.importorskip("arviz_plots")
    plots.plot_forest(posterior.data, var_names=["beta"], backend="none")


def test_log_likelihoods(sleep, posterior):
    rows = posterior.log_likelihood()
    assert rows.shape == (4, 1000, 180)
    groups = posterior.log_likelihood("marginal")
    assert groups.dims == ("chain", "draw", "Subject")
    # one draw and one subject by dense algebra
    design, draw = sleep.design, (2, 17)
    mine = design.terms[0].codes == 4
    sd, rho = posterior.values["sd_Subject"][draw], posterior.values["cor_Subject"][draw][0]
    D = np.outer(sd, sd) * np.array([[1, rho], [rho, 1]])
    Z = design.terms[0].z[mine]
    V = Z @ D @ Z.T + posterior.values["sigma"][draw] ** 2 * np.eye(mine.sum())
    mean = design.X[mine] @ posterior.values["beta"][draw]
    expected = stats.multivariate_normal.logpdf(design.y[mine], mean, V)
    assert float(groups[draw][4]) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(LmmError, match="conditional"):
        posterior.log_likelihood("partial")


def test_marginal_log_likelihood_of_nested_groups():
    from lmmjax.pointwise import group_loglik

    model = small_model(NESTED)
    _, D = covariance_values(model, np.random.default_rng(4))
    beta = np.array([95.0, 0.003])
    factors = [np.linalg.cholesky(d)[None] for d in D]
    with lmm.float64():
        none = np.zeros((1, 0))
        name, _, found = group_loglik(model.design, beta[None], np.array([3.1]), factors, none)
    y, X, Z, G, R = dense(model, D, 3.1)
    V = Z @ G @ Z.T + np.diag(R)
    assert name == "a"
    outer = next(t for t in model.design.terms if t.group == "a")
    for j in range(len(outer.levels)):
        at = np.flatnonzero(outer.codes == j)
        expected = stats.multivariate_normal.logpdf(y[at], X[at] @ beta, V[np.ix_(at, at)])
        assert found[0, j] == pytest.approx(expected, rel=1e-9)
    with pytest.raises(DesignError, match="crossed"):
        group_loglik(small_model(CROSSED).design, beta[None], np.array([3.1]), factors, none)


def test_predictions(sleep, posterior):
    fit = sleep.fit()
    np.testing.assert_allclose(posterior.predict(), fit.predict(), rtol=0.03)
    mine, theirs = posterior.predict(interval="prediction"), fit.predict(interval="prediction")
    assert list(mine.columns) == list(theirs.columns)
    assert mine.index.equals(theirs.index)
    assert 0.95 < (mine["std_error"] / theirs["std_error"]).mean() < 1.15
    new = pd.DataFrame({"Days": [0, 5, 5], "Subject": ["308", "308", "new"]})
    with pytest.raises(DataError, match="new"):
        posterior.predict(new)
    table = posterior.predict(new, interval="confidence", new_levels="population")
    population = posterior.predict(new, kind="population")
    assert table["estimate"].iloc[2] == pytest.approx(population.iloc[2])
    assert table["std_error"].iloc[2] > 2 * table["std_error"].iloc[1]
    wide = posterior.predict(new, kind="population", interval="prediction")
    narrow = posterior.predict(new, kind="population", interval="confidence")
    assert (wide["std_error"] > 2 * narrow["std_error"]).all()
    assert posterior.predict(new, interval="prediction", new_levels="population").equals(
        posterior.predict(new, interval="prediction", new_levels="population")
    )


def test_predictive_draws(sleep, posterior):
    tree = posterior.posterior_predictive(n=400, seed=3)
    y = tree["posterior_predictive"]["y"]
    assert y.dims == ("chain", "draw", "obs") and y.shape == (4, 100, 180)
    assert float(y.std(("chain", "draw")).mean()) == pytest.approx(28, rel=0.1)
    assert "posterior_predictive" not in posterior.data.children
    prior = posterior.prior_predictive(n=50)
    assert prior["prior"]["beta"].shape == (1, 50, 2)
    assert prior["prior_predictive"]["y"].shape == (1, 50, 180)


def test_a_posterior_pickles_and_prints(posterior):
    again = pickle.loads(pickle.dumps(posterior))
    np.testing.assert_array_equal(again.values["beta"], posterior.values["beta"])
    assert repr(again) == repr(posterior)
    text = repr(posterior)
    for part in ("NUTS (marginal)", "Reaction ~ Days", "half-t(3, 48.89)", "4 chains", "R-hat"):
        assert part in text
    assert posterior._repr_html_().startswith("<div")


def test_unknown_options_are_refused(sleep, posterior):
    with pytest.raises(LmmError, match=r"laplace.*expected 'nuts'"):
        sleep.sample("laplace")
    with pytest.raises(LmmError, match="form='hybrid'"):
        sleep.sample(form="hybrid")
    with pytest.raises(LmmError, match="draws=0"):
        sleep.sample(draws=0)
    with pytest.raises(LmmError, match="target_accept"):
        sleep.sample(target_accept=1.0)
    with pytest.raises(DataError, match="Subject"):
        posterior.ranef("subject")


# -------------------------------------------------------------------------------------------------
# Precision, imports
# -------------------------------------------------------------------------------------------------


def test_the_numpyro_model_needs_float64_unless_float32_was_asked_for(sleep):
    with pytest.raises(PrecisionError, match="numpyro_model"):
        sleep.numpyro_model()
    with lmm.float64():
        model = sleep.numpyro_model()
    with pytest.raises(PrecisionError):
        model()
    single = lmm.Model(SLEEP, lmm.load_dataset("sleepstudy"), dtype="float32")
    values = {"sd_Subject": jnp.array([25.0, 6.0]), "chol_Subject_0": jnp.eye(2), "sigma": 25.0}
    lp, _ = log_density(single.numpyro_model(), (), {}, values)
    assert lp.dtype == jnp.float32 and jnp.isfinite(lp)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["marginal", "noncentered", "centered"])
def test_the_numpyro_model_runs_under_numpyros_own_sampler(sleep, form):
    from numpyro.infer import MCMC, NUTS

    with lmm.float64(), jax.numpy_dtype_promotion("standard"):
        kernel = NUTS(sleep.numpyro_model(form))
        mcmc = MCMC(kernel, num_warmup=300, num_samples=300, progress_bar=False)
        mcmc.run(jax.random.key(0))
        sigma = float(mcmc.get_samples()["sigma"].mean())
    assert sigma == pytest.approx(25.9, abs=1.0)


def test_numpyro_and_arviz_load_on_first_use():
    code = (
        "import sys, lmmjax; lmmjax.Model; "
        "assert not {'numpyro', 'arviz', 'arviz_base', 'arviz_stats'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_linear_models_and_models_without_fixed_effects_are_sampled():
    data = lmm.load_dataset("sleepstudy")
    linear = sample(lmm.Model("Reaction ~ Days", data), seed=1)
    assert linear.converged and linear.beta["Days"] == pytest.approx(10.4, abs=0.5)
    assert list(linear.varcorr()["group"]) == ["Residual"]
    with pytest.raises(DesignError, match="no grouping factor"):
        linear.log_likelihood("marginal")
    bare = sample(lmm.Model("Reaction ~ 0 + (1 | Subject)", data), seed=1)
    assert bare.coef_table().empty and bare.converged
    assert "beta" not in bare.data["posterior"]


@pytest.mark.slow
def test_a_column_of_years_does_not_slow_the_sampler():
    data = lmm.load_dataset("sleepstudy").assign(year=lambda d: d["Days"] + 2000)
    model = lmm.Model("Reaction ~ year + (1 | Subject)", data)
    priors = {"year": dist.StudentT(5.0, 0.0, 50.0)}
    for form in ("marginal", "noncentered"):
        draws = sample(model, form=form, priors=priors, draws=500, seed=1)
        assert draws.stats["n_steps"].mean() < 40
        assert draws.beta["year"] == pytest.approx(10.47, abs=0.3)

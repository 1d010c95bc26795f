"""The posterior with structured residuals: densities by dense algebra, forms against each other."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from numpyro.infer.util import log_density
from scipy import stats
from scipy.linalg import block_diag
from test_bayes import assert_same_posterior, dense_z, effect_values, sample
from test_two_readings import Case

import lmmjax as lmm
from lmmjax.bayes import draws as exact
from lmmjax.bayes import residual as rp
from lmmjax.bayes.numpyro_model import arrays, describe, prior_sites
from lmmjax.bayes.priors import resolve
from lmmjax.errors import DataError, PriorError
from lmmjax.pointwise import batch_size

STRUCTURES = [
    "ar1(visit | id) * varident(arm)",
    "car1(t | id) * varpower(u)",
    "cs(1 | id) * varexp(u)",
    "un(visit | id)",
    "toeph(visit | id)",
    "arma(visit | id)",
    "adh(visit | id)",
    "spexp(t, u | id, nugget=True)",
    "sppow(t, u | id)",
]


def sites(case: Case) -> dict[str, Any]:
    """Values of all covariance sites of a case at its φ, D and σ."""
    s, out = case.design.residual.structure, {"sigma": case.sigma}
    first = 0
    if rp.has_matrix(s):
        out["chol_residual"] = np.linalg.cholesky(s.family.table(jnp.asarray(case.phi[: s.n_corr])))
        first = s.n_corr
    found = rp.parameters(s)
    if found:
        pairs = zip(found, case.phi[first:], strict=True)
        out["residual"] = np.array([float(p.chart(x)) for p, x in pairs])
    for term, cov in zip(case.design.terms, case.covs, strict=True):
        sd = np.sqrt(np.diag(cov))
        out[f"sd_{term.group}"] = sd
        if len(sd) > 1:
            out[f"chol_{term.group}_0"] = np.linalg.cholesky(cov / np.outer(sd, sd))
    return out


def log_prior(case: Case, values: dict[str, Any]) -> float:
    """Log prior of the covariance sites, σ aside, key by key."""
    entries, s = resolve(case.design).entries, case.design.residual.structure
    total = 0.0
    if rp.has_matrix(s):
        total += dist.LKJCholesky(len(values["chol_residual"]), 1.0).log_prob(
            values["chol_residual"]
        )
    for k, p in enumerate(rp.parameters(s)):
        total += entries[p.key].log_prob(values["residual"][k])
    for term in case.design.terms:
        for name, sd in zip(term.names, values[f"sd_{term.group}"], strict=True):
            total += entries[f"sd_{name}|{term.group}"].log_prob(sd)
        if len(term.names) > 1:
            L = values[f"chol_{term.group}_0"]
            total += dist.LKJCholesky(len(L), 1.0).log_prob(L)
    return float(total)


def log_prior_sigma(case: Case) -> float:
    """With varpower and varexp the default prior is that of a row of average log SD."""
    entries, s = resolve(case.design).entries, case.design.residual.structure
    size = 1.0
    if "delta" in s.names:
        u = case.frame["u"].to_numpy()
        x = np.log(u) if "varpower" in case.residual else u
        with lmm.float64():
            delta = float(s.natural(jnp.asarray(case.phi))[s.names.index("delta")])
        size = np.exp(delta * x.mean())
    return float(entries["sigma"].log_prob(case.sigma * size) + np.log(size))


@pytest.mark.parametrize("residual", STRUCTURES)
def test_marginal_density_is_that_of_the_dense_normal(residual: str) -> None:
    case = Case(" + (1 | clinic)", residual)
    entries = resolve(case.design).entries
    m = np.array([float(entries[k].loc) for k in case.design.x_names])
    sd = np.array([float(entries[k].scale) for k in case.design.x_names])
    X = case.design.X
    with lmm.float64():
        values = sites(case)
        expected = log_prior(case, values) + log_prior_sigma(case)
        found, trace = log_density(case.model.numpyro_model(), (), {}, values)
        s = case.design.residual.structure
        reported = [float(trace[name]["value"]) for name in s.names]
        np.testing.assert_allclose(reported, s.natural(jnp.asarray(case.phi)), rtol=1e-10)
    y, V = case.design.y - case.design.offset, case.V + X @ np.diag(sd**2) @ X.T
    expected += stats.multivariate_normal.logpdf(y, X @ m, V)
    assert float(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("form", "random", "residual"),
    [
        ("noncentered", " + (t | id)", "ar1(visit | id) * varident(arm)"),
        ("centered", " + (t | id)", "car1(t | id) * varpower(u)"),
        pytest.param(
            "centered", " + (1 | clinic) + (1 | school)", "cs(1 | id)", marks=pytest.mark.slow
        ),
        ("noncentered", " + (1 | clinic)", "un(visit | id)"),
    ],
)
def test_hierarchical_over_conditional_density_is_the_marginal_density(
    form: str, random: str, residual: str
) -> None:
    # log p(θ, β, b, y) - log p(β, b | θ, y) does not depend on (β, b): it is log p(θ, y)
    case = Case(random, residual)
    rng, X = np.random.default_rng(1), case.design.X
    y = case.design.y - case.design.offset
    entries = resolve(case.design).entries
    m = np.array([float(entries[k].loc) for k in case.design.x_names])
    sd = np.array([float(entries[k].scale) for k in case.design.x_names])
    blocks = zip(case.design.terms, case.covs, strict=True)
    G = block_diag(*[np.kron(np.eye(len(t.levels)), d) for t, d in blocks])
    W = np.hstack([X, *dense_z(case.model)])
    K = np.linalg.inv(case.Sigma)
    Q = W.T @ K @ W + block_diag(np.diag(sd**-2.0), np.linalg.inv(G))
    centre = np.linalg.solve(Q, W.T @ K @ y + np.append(m / sd**2, np.zeros(len(G))))
    noise = rng.normal(size=len(Q))
    effects = centre + np.linalg.solve(np.linalg.cholesky(Q).T, noise)
    conditional = stats.norm.logpdf(noise).sum() + 0.5 * np.linalg.slogdet(Q)[1]
    extra, jacobian = effect_values(case.model, effects[2:], case.covs, form)
    with lmm.float64():
        values = sites(case)
        joint, _ = log_density(
            case.model.numpyro_model(form), (), {}, values | extra | {"beta": effects[:2]}
        )
        marginal, _ = log_density(case.model.numpyro_model(), (), {}, values)
    assert float(joint) - jacobian - conditional == pytest.approx(float(marginal), abs=1e-8)


def test_the_gradient_lowers_for_cuda() -> None:
    case = Case(" + (1 | clinic)", "un(visit | id)")
    with lmm.float64():
        values = {k: jnp.asarray(v) for k, v in sites(case).items()}
        for form in ("marginal", "noncentered"):
            model = case.model.numpyro_model(form)
            extra = {"beta": jnp.zeros(2), "u_clinic": jnp.zeros((3, 1))}
            at = values | (extra if form == "noncentered" else {})
            gradient = jax.jit(jax.grad(lambda v, model=model: log_density(model, (), {}, v)[0]))
            assert jax.export.export(gradient, platforms=["cuda"])(at).platforms == ("cuda",)


# Priors ----------------------------------------------------------------------------------------


def model(residual: str, formula: str = "Reaction ~ Days", **options: Any) -> lmm.Model:
    return lmm.Model(formula, lmm.load_dataset("sleepstudy"), residual=residual, **options)


def test_priors_are_told_in_words_and_given_by_the_reported_name() -> None:
    design = model("ar1(Days | Subject) * varpower(I(Days + 1))").design
    text = resolve(design, {"phi": dist.Beta(8.0, 2.0)}).describe()
    for part in ("phi", "Beta(8, 2)  (given)", "delta", "row of average log SD"):
        assert part in text
    assert (
        resolve(model("car1(Days | Subject)").design).describe().count("exp(-1/r), r LogNormal")
        == 1
    )
    assert "cor_residual" in resolve(model("un(Days | Subject)").design).describe()
    partial = resolve(model("arma(Days | Subject, p=2)").design).entries
    assert {"partial_phi1", "partial_phi2", "theta1"} <= set(partial)
    again = pickle.loads(pickle.dumps(resolve(model("car1(Days | Subject)").design)))
    assert again.describe() == resolve(model("car1(Days | Subject)").design).describe()


@pytest.mark.parametrize(
    ("residual", "priors", "message"),
    [
        ("ar1(Days | Subject)", {"phi": dist.Normal(0.0, 1.0)}, r"phi.*within \(-1, 1\)"),
        ("ar1(Days | Subject)", {"rho": dist.Uniform(0.0, 1.0)}, "rho"),
        ("cs(1 | Subject)", {"rho": dist.Uniform(-1.0, 1.0)}, r"within \(-0.1111, 1\)"),
        ("un(Days | Subject)", {"cor_residual": dist.Normal(0.0, 1.0)}, "LKJ"),
        ("spexp(Days | Subject)", "reml", r"range.*may make the posterior improper"),
        ("varpower(I(Days + 1))", "reml", r"delta.*may make the posterior improper"),
        ("un(Days | Subject)", "reml", r"18 subjects for 9 fixed effects; expected at least 19"),
    ],
)
def test_bad_priors_are_refused(residual: str, priors: Any, message: str) -> None:
    formula = "Reaction ~ poly(Days, 8)" if residual.startswith("un") else "Reaction ~ Days"
    with pytest.raises(PriorError, match=message):
        resolve(model(residual, formula).design, priors)


def test_flat_ratios_need_reference_rows_that_the_effects_leave_free() -> None:
    data = lmm.load_dataset("Orthodont")
    one = lmm.Model("distance ~ age + (1 | Subject)", data, residual="varident(age)")
    with pytest.raises(PriorError, match="27 rows of the first level or position for 29 effects"):
        resolve(one.design, "reml")
    proper = {name: dist.LogNormal(0.0, 1.0) for name in one.phi_names}
    resolve(one.design, {"base": "reml", **proper})
    resolve(lmm.Model("distance ~ age", data, residual="varident(age)").design, "reml")
    sexes = lmm.Model("distance ~ age + (1 | Subject)", data, residual="varident(Sex)")
    resolve(sexes.design, "reml")


def test_names_that_clash_are_refused() -> None:
    data = lmm.load_dataset("sleepstudy").assign(phi=lambda d: d["Subject"])
    clash = lmm.Model("Reaction ~ Days + (1 | phi)", data, residual="ar1(Days | Subject)")
    with pytest.raises(DataError, match="'phi' has the name of a dimension or a variable"):
        clash.sample()
    clash = lmm.Model("Reaction ~ phi", data, residual="ar1(Days | Subject)")
    assert "phi309" in resolve(clash.design).entries
    data["residual"] = data["Subject"]
    clash = lmm.Model("Reaction ~ Days + (Days | residual)", data, residual="un(Days | Subject)")
    with pytest.raises(PriorError, match="grouping factor 'residual'"):
        resolve(clash.design)


# Draws -----------------------------------------------------------------------------------------

RESIDUAL = "ar1(Days | Subject) * varident(half)"


def sleep() -> lmm.Model:
    data = lmm.load_dataset("sleepstudy").assign(half=lambda d: np.where(d["Days"] < 5, "a", "b"))
    data = data.drop(index=[7, 23, 24]).sample(frac=1, random_state=3)
    return lmm.Model("Reaction ~ Days + (1 | Subject)", data, residual=RESIDUAL)


@pytest.fixture(scope="module")
def posterior() -> Any:
    return sample(sleep(), draws=500, warmup=500, chains=2, seed=1)


def at_draw(posterior: Any, i: int) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """Design, Σ, V and β at one draw of the first chain."""
    design, v = posterior.model.design, {k: x[0, i] for k, x in posterior.values.items()}
    days = design.X[:, 1]
    codes = design.terms[0].codes
    S = v["sigma"] * np.where(days < 5, 1.0, v["sd_ratio[b]"])
    same = codes[:, None] == codes
    C = v["phi"] ** np.abs(days[:, None] - days)
    Sigma = np.where(same, C * np.outer(S, S), 0.0)
    return design, Sigma, Sigma + same * v["sd_Subject"][0] ** 2, v["beta"]


def test_the_result_has_the_residual_parameters(posterior: Any) -> None:
    assert posterior.diagnostics()["divergences"] == 0
    names = ["phi", "sd_ratio[b]"]
    assert list(posterior.residual_params().index) == posterior.model.phi_names == names
    table = posterior.residual_intervals()
    assert list(table.columns) == ["estimate", "std_error", "low", "high", "ess", "rhat"]
    np.testing.assert_allclose(table["estimate"], posterior.residual_params())
    assert posterior.ranef().shape == posterior.ranef_se().shape == (18, 1)
    assert list(posterior.varcorr()["group"]) == ["Subject", "Residual"]
    text = repr(posterior)
    for part in ("Residual parameters", "sd_ratio[b]", "Uniform(-1, 1)", "LogNormal(0, 1)"):
        assert part in text
    again = pickle.loads(pickle.dumps(posterior))
    assert repr(again) == text


def test_effects_are_drawn_exactly_given_the_rest(posterior: Any) -> None:
    """Mean and covariance of (β, b) given θ, σ, φ, from draws at one position of the sampler."""
    model, n = posterior.model, posterior.chains * posterior.draws
    design, Sigma, _, _ = at_draw(posterior, 3)
    with lmm.float64(), jax.numpy_dtype_promotion("standard"):
        priors = resolve(model.design)
        spec = describe(model, "marginal", priors)
        data = jax.tree.map(jnp.asarray, arrays(model, spec))
        v = {k: x[0, 3] for k, x in posterior.values.items()}
        charts = [p.chart.inv for p in rp.parameters(spec.residual)]
        values = [v["phi"], v["sd_ratio[b]"]]
        z = {
            "residual": jnp.stack([c(x) for c, x in zip(charts, values, strict=True)]),
            "sigma": jnp.log(v["sigma"] / data.scale),
            "sd_0": jnp.log(v["sd_Subject"] / data.sd_size[0]),
        }
        z = {k: jnp.broadcast_to(jnp.asarray(x)[None], (n, *jnp.shape(x))) for k, x in z.items()}
        keys = jax.random.split(jax.random.key(5), n)
        batch = batch_size(spec.layout.q * (spec.layout.p + spec.layout.d + 4))
        out = exact.complete(
            spec.anonymous(), data, prior_sites(model, spec, priors), z, keys, batch
        )
        out = {k: np.asarray(x) for k, x in out.items()}
    np.testing.assert_allclose(out["sigma"], v["sigma"])
    np.testing.assert_allclose(out["phi"], v["phi"])
    W = np.hstack([design.X, *dense_z(model)])
    K = np.linalg.inv(Sigma)
    sd = np.array([float(priors.entries[k].scale) for k in design.x_names])
    m = np.array([float(priors.entries[k].loc) for k in design.x_names])
    D = np.full(18, v["sd_Subject"][0] ** 2)
    Q = W.T @ K @ W + np.diag(np.append(sd**-2.0, 1 / D))
    mean = np.linalg.solve(Q, W.T @ K @ design.y + np.append(m / sd**2, np.zeros(18)))
    cov = np.linalg.inv(Q)
    drawn = np.hstack([out["beta"], out["ranef_0"][:, :, 0]])
    z_mean = (drawn.mean(0) - mean) / np.sqrt(np.diag(cov) / n)
    assert np.abs(z_mean).max() < 4.5
    se = np.sqrt((cov**2 + np.outer(np.diag(cov), np.diag(cov))) / n)
    assert np.abs((np.cov(drawn.T) - cov) / se).max() < 5


def test_log_likelihoods_by_draw(posterior: Any) -> None:
    design, Sigma, V, beta = at_draw(posterior, 17)
    by = posterior.log_likelihood("marginal")
    assert by.dims == ("chain", "draw", "Subject")
    mine = np.flatnonzero(design.terms[0].codes == 4)
    r = design.y[mine] - design.X[mine] @ beta
    expected = stats.multivariate_normal.logpdf(r, np.zeros(len(mine)), V[np.ix_(mine, mine)])
    assert float(by[0, 17, 4]) == pytest.approx(expected, rel=1e-9)
    b = posterior.values["ranef_Subject"][0, 17, 4, 0]
    K, e = np.linalg.inv(Sigma[np.ix_(mine, mine)]), r - b
    expected = stats.norm.logpdf(K @ e / np.diag(K), 0, 1 / np.sqrt(np.diag(K)))
    rows = posterior.log_likelihood()
    np.testing.assert_allclose(rows.values[0, 17, mine], expected, rtol=1e-9)
    np.testing.assert_array_equal(posterior.data["log_likelihood"]["y"], rows)


def test_comparisons_list_the_residual_parameters(posterior: Any) -> None:
    table = lmm.compare(posterior, posterior).variance_components()
    assert list(table["term1"].dropna().unique()) == ["(Intercept)", "phi", "sd_ratio[b]"]
    mine = table[table["term1"] == "phi"].iloc[0]
    expected = posterior.residual_intervals().loc["phi"]
    assert mine["estimate"] == expected["estimate"] and mine["low"] == expected["low"]
    assert "sd_ratio[b]" in repr(lmm.compare(posterior, posterior))


def test_arviz_sees_the_residual_parameters(posterior: Any) -> None:
    import arviz_stats

    table = arviz_stats.summary(posterior.data, var_names=["phi", "sd_ratio[b]", "sigma"])
    assert list(table.index) == ["phi", "sd_ratio[b]", "sigma"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert np.isfinite(arviz_stats.loo(posterior.data).elpd)


def test_predictions_by_draw(posterior: Any) -> None:
    """One draw as the whole posterior: the numbers of the joint normal distribution."""
    from dataclasses import replace

    one = replace(
        posterior,
        chains=1,
        draws=2,
        values={k: np.repeat(x[:1, 5:6], 2, axis=1) for k, x in posterior.values.items()},
        phi=np.repeat(posterior.phi[:1, 5:6], 2, axis=1),
    )
    design, Sigma, _, beta = at_draw(posterior, 5)
    v = {k: x[0, 5] for k, x in posterior.values.items()}
    new = pd.DataFrame({"Days": [10, 11], "Subject": ["308", "371"], "half": ["b", "b"]})
    got = one.predict(new, kind="next")
    for i, subject in enumerate(new["Subject"]):
        level = list(design.terms[0].levels).index(subject)
        rows = np.flatnonzero(design.terms[0].codes == level)
        b = v["ranef_Subject"][level, 0]
        e = design.y[rows] - design.X[rows] @ beta - b
        s = np.where(design.X[rows, 1] < 5, 1.0, v["sd_ratio[b]"])
        c = v["phi"] ** (new["Days"][i] - design.X[rows, 1]) * s * v["sd_ratio[b]"]
        shift = v["sigma"] ** 2 * c @ np.linalg.solve(Sigma[np.ix_(rows, rows)], e)
        assert got[i] == pytest.approx(beta @ [1, new["Days"][i]] + b + shift, rel=1e-9)
    plain = one.predict(new)
    assert not np.allclose(plain, got)
    every = posterior.predict(new, interval="prediction")
    expected = posterior.values["sigma"] * posterior.values["sd_ratio[b]"]
    spread = np.sqrt(
        np.mean(expected**2) + posterior.predict(new, interval="confidence")["std_error"] ** 2
    )
    np.testing.assert_allclose(every["std_error"], spread, rtol=0.15)


def test_predictive_draws_have_the_correlation(posterior: Any) -> None:
    tree = posterior.posterior_predictive(n=400, seed=3)
    y = tree["posterior_predictive"]["y"].values.reshape(400, -1)
    design = posterior.model.design
    codes, days = design.terms[0].codes, design.X[:, 1]
    order = np.lexsort((days, codes))
    pairs = (np.diff(codes[order]) == 0) & (np.diff(days[order]) == 1)
    keep = np.linspace(0, 499, 200).round().astype(int)
    flat = [c * 500 + d for c in range(2) for d in keep]
    e = (y - posterior._expected(np.array(flat)))[:, order]
    lag = np.mean([np.corrcoef(row[:-1][pairs], row[1:][pairs])[0, 1] for row in e])
    assert lag == pytest.approx(posterior.residual_params()["phi"], abs=0.07)
    prior = posterior.prior_predictive(n=20)
    assert prior["prior"]["phi"].shape == (1, 20)
    assert np.all(np.isfinite(prior["prior_predictive"]["y"]))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["noncentered", "centered"])
def test_forms_agree(form: str) -> None:
    two = [sample(sleep(), form=f, seed=s) for f, s in (("marginal", 1), (form, 2))]
    assert_same_posterior(*two, list(two[0].values))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("formula", "data", "residual"),
    [
        ("distance ~ Sex * age", "Orthodont", "un(age | Subject)"),
        ("weight ~ Time * Diet", "BodyWeight", "car1(Time | Rat) * varident(Diet)"),
        ("weight ~ Time * Diet + (1 | Rat)", "BodyWeight", "spexp(Time | Rat, nugget=True)"),
    ],
)
def test_other_structures_are_sampled(formula: str, data: str, residual: str) -> None:
    model = lmm.Model(formula, lmm.load_dataset(data), residual=residual)
    draws = sample(model, seed=1)
    assert draws.diagnostics()["rhat_max"] < 1.02
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmm.SingularFitWarning)
        fit = model.fit()
    gap = (draws.beta - fit.beta) / draws.coef_table()["std_error"]
    assert np.abs(gap).max() < 0.5


@pytest.mark.slow
def test_draws_lie_around_the_fit(posterior: Any) -> None:
    fit, table = posterior.model.fit(), posterior.residual_intervals()
    gap = (table["estimate"] - fit.residual_params()) / table["std_error"]
    assert np.abs(gap).max() < 0.75
    gap = (posterior.beta - fit.beta) / posterior.coef_table()["std_error"]
    assert np.abs(gap).max() < 0.3

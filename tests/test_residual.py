"""Structured residuals by another route: dense V from the reported parameters."""

from __future__ import annotations

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import lmmjax as lmm
from lmmjax.residual.language import parse_residual
from lmmjax.residual.source import Basis, Patterns, Rows
from lmmjax.residual.structures import autocorrelations, integer_power


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """12 subjects of 2 to 5 of 5 visits, in 4 clinics, moving between 3 schools, shuffled."""
    rng = np.random.default_rng(3)
    rows = []
    for i in range(12):
        visits = np.sort(rng.choice(5, size=5 - i % 4, replace=False))
        for v in visits:
            rows.append((f"s{i:02d}", int(v), f"c{i // 3}", f"k{rng.integers(3)}"))
    data = pd.DataFrame(rows, columns=["id", "visit", "clinic", "school"])
    data["arm"] = np.where(data["id"].str[1:].astype(int) % 2, "A", "B")
    data["t"] = data["visit"] + rng.uniform(0, 0.5, len(data))
    data["u"] = rng.uniform(1, 3, len(data))
    data["x"] = rng.normal(size=len(data)) * 5 + 100
    data["w"] = rng.uniform(0.5, 2, len(data))
    data["y"] = 0.1 * data["x"] + rng.normal(size=len(data)) * data["u"] + 50
    return data.sample(frac=1, random_state=1).reset_index(drop=True)


# The formulas of the documentation, from reported parameters -----------------------------------


def correlation(text: str, p: pd.Series, d: pd.DataFrame) -> np.ndarray:
    """C from its definition, n x n, before rows of different subjects are set to 0."""
    name = text.split("(")[0]
    order = d.groupby("id").cumcount().to_numpy()
    v = order if "1 | id" in text else d["visit"].to_numpy()
    lag = np.abs(v[:, None] - v)
    n = len(d)
    if name.startswith("cs"):
        C = np.full((n, n), p["rho"])
    elif name in ("ar1", "ar1h"):
        C = p["phi"] ** lag
    elif name == "car1":
        C = p["phi"] ** np.abs(d["t"].to_numpy()[:, None] - d["t"].to_numpy())
    elif name == "arma":
        phi, theta = p["phi1"], p["theta1"]
        first = (1 + phi * theta) * (phi + theta) / (1 + 2 * phi * theta + theta**2)
        C = np.where(lag == 0, 1.0, first * phi ** np.maximum(lag - 1, 0))
    elif name.startswith("toep"):
        C = np.array([1.0, *(p[f"rho{k}"] for k in range(1, 5))])[lag]
    elif name.startswith("ad"):
        steps = np.array([p[f"rho[{k},{k + 1}]"] for k in range(4)])
        C = np.array([[np.prod(steps[min(a, b) : max(a, b)]) for b in v] for a in v])
    elif name in ("un", "symm"):
        C = np.array(
            [[1.0 if a == b else p[f"rho[{min(a, b)},{max(a, b)}]"] for b in v] for a in v]
        )
    else:
        xy = d[["t", "u"]].to_numpy() if "u" in text else d[["t"]].to_numpy()
        dist = np.sqrt(((xy[:, None] - xy) ** 2).sum(-1))
        C = {
            "spexp": lambda: np.exp(-dist / p["range"]),
            "spgau": lambda: np.exp(-((dist / p["range"]) ** 2)),
            "sppow": lambda: p["rho"] ** dist,
        }[name]()
        C = C * (1 - p.get("nugget", 0.0))
    np.fill_diagonal(C, 1.0)
    return C


def deviations(text: str, p: pd.Series, d: pd.DataFrame) -> np.ndarray:
    """S from its definition."""
    s = np.ones(len(d))
    if re.match(r"(un|csh|ar1h|toeph|adh)\(", text):
        order = d.groupby("id").cumcount() + 1 if "1 | id" in text else d["visit"]
        ratios = {int(k[9:-1]): r for k, r in p.items() if re.fullmatch(r"sd_ratio\[\d\]", k)}
        s = s * order.map(lambda v: ratios.get(v, 1.0)).to_numpy()
    if "varident" in text:
        s = s * np.where(d["arm"] == "B", p["sd_ratio[B]"], 1.0)
    if "varpower" in text:
        s = s * d["u"].to_numpy() ** p["delta"]
    if "varexp" in text:
        s = s * np.exp(p["delta"] * d["u"].to_numpy())
    return s


def dense_deviance(
    d: pd.DataFrame, R: np.ndarray, Z: np.ndarray, theta: np.ndarray, method: str
) -> float:
    X, y = np.column_stack([np.ones(len(d)), d["x"]]), d["y"].to_numpy()
    V = R + theta[0] ** 2 * Z @ Z.T
    Vi = np.linalg.inv(V)
    xvx = X.T @ Vi @ X
    r = y - X @ np.linalg.solve(xvx, X.T @ Vi @ y)
    nu = len(d) - (2 if method == "REML" else 0)
    extra = np.linalg.slogdet(xvx)[1] if method == "REML" else 0.0
    s2 = r @ Vi @ r / nu
    return np.linalg.slogdet(V)[1] + extra + nu * (np.log(2 * np.pi * s2) + 1)


def check_against_dense(
    d: pd.DataFrame, residual: str, group: str | None, weights: str | None = None
) -> Any:
    formula = "y ~ x" + (f" + (1 | {group})" if group else "")
    model = lmm.Model(formula, d, residual=residual, weights=weights)
    structure = model.design.residual.structure
    rng = np.random.default_rng(5)
    phi = structure.start() + 0.3 * rng.normal(size=structure.n_phi)
    theta = np.array([0.7] if group else [])
    with lmm.float64():
        p = pd.Series(np.asarray(structure.natural(jnp.asarray(phi))), index=structure.names)
        got = [float(model.deviance(np.append(theta, phi), m)) for m in ("ML", "REML")]
    C = np.eye(len(d))
    if structure.family is not None:
        same = d["id"].to_numpy()[:, None] == d["id"].to_numpy()
        C = np.where(same, correlation(residual, p, d), 0.0)
    S = deviations(residual, p, d)
    W = np.ones(len(d)) if weights is None else 1 / np.sqrt(d[weights].to_numpy())
    Z = pd.get_dummies(d[group]).to_numpy(float) if group else np.zeros((len(d), 1))
    R = C * np.outer(S * W, S * W)
    expected = [dense_deviance(d, R, Z, np.append(theta, 0.0), m) for m in ("ML", "REML")]
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    return model


STRUCTURES = [
    "cs(1 | id)",
    "csh(visit | id)",
    "ar1(visit | id)",
    "ar1(1 | id)",
    "ar1h(visit | id)",
    "car1(t | id)",
    "arma(visit | id)",
    "toep(visit | id)",
    "toeph(visit | id)",
    "ad(visit | id)",
    "adh(visit | id)",
    "symm(visit | id)",
    "un(visit | id)",
    "spexp(t | id)",
    "spexp(t, u | id, nugget=True)",
    "spgau(t, u | id)",
    "sppow(t, u | id)",
    "varident(arm)",
    "varpower(u)",
    "varexp(u)",
    "ar1(visit | id) * varident(arm)",
    "car1(t | id) * varpower(u)",
]


@pytest.mark.parametrize("residual", STRUCTURES)
def test_criterion_equals_dense(frame: pd.DataFrame, residual: str) -> None:
    check_against_dense(frame, residual, None)


@pytest.mark.parametrize("residual", ["ar1(visit | id)", "toep(visit | id)"])
def test_nested_subjects_stay_in_the_chain(frame: pd.DataFrame, residual: str) -> None:
    model = check_against_dense(frame, residual, "clinic")
    assert [f.group for f in model._plan.factors][: model._plan.n_chain] == ["clinic"]


@pytest.mark.parametrize("residual", ["ar1(visit | id)", "cs(1 | id)", "un(visit | id)"])
def test_subjects_that_cross_schools_couple_them(frame: pd.DataFrame, residual: str) -> None:
    """The levels of school share subjects: no longer block-diagonal, so it goes to the core."""
    model = check_against_dense(frame, residual, "school")
    assert model._plan.n_chain == 0
    S, J = 1, 3
    with lmm.float64():
        gram, _ = model._source().gram(jnp.asarray(model.design.residual.structure.start()))
    block = np.asarray(gram.core)[: S * J, : S * J]
    assert np.max(np.abs(block - np.diag(np.diag(block)))) > 0.1


def test_independent_strata_keep_the_chain(frame: pd.DataFrame) -> None:
    model = check_against_dense(frame, "varident(arm)", "school")
    assert model._plan.n_chain == 1
    assert isinstance(model._prepared[2], Basis)


def test_known_weights_multiply_structures(frame: pd.DataFrame) -> None:
    check_against_dense(frame, "ar1(visit | id)", "clinic", weights="w")
    given = lmm.Model("y ~ x", frame, residual="cs(1 | id) * varfixed(1/w)")
    other = lmm.Model("y ~ x", frame, residual="cs(1 | id)", weights="w")
    with lmm.float64():
        at = given.theta0
        assert float(given.deviance(at)) == pytest.approx(float(other.deviance(at)), abs=1e-9)


def test_the_cheapest_source_is_chosen(frame: pd.DataFrame) -> None:
    def source(residual: str, formula: str = "y ~ x", data: pd.DataFrame = frame) -> Any:
        return lmm.Model(formula, data, residual=residual)._prepared[2]

    assert isinstance(source("cs(1 | id)"), Basis)
    assert isinstance(source("ar1(1 | id)"), Basis)
    assert isinstance(source("ar1(visit | id)"), Rows)
    many = pd.concat([frame.assign(id=frame["id"] + k) for k in "abcd"], ignore_index=True)
    assert isinstance(source("un(visit | id)", data=many), Patterns)
    assert isinstance(source("un(visit | id)", "y ~ x + (1 | clinic)", many), Rows)


def test_patterns_equal_dense(frame: pd.DataFrame) -> None:
    many = pd.concat([frame.assign(id=frame["id"] + k) for k in "abc"], ignore_index=True)
    many["y"] += np.random.default_rng(1).normal(size=len(many))
    model = check_against_dense(many, "un(visit | id)", None)
    assert isinstance(model._prepared[2], Patterns)


# Pieces -----------------------------------------------------------------------------------------


def test_powers_have_exact_derivatives_at_zero() -> None:
    with lmm.float64():
        lags = jnp.arange(8)
        for base in (-0.7, 0.0, 0.9):
            got = integer_power(jnp.asarray(base), lags, 7)
            np.testing.assert_allclose(got, base ** np.arange(8.0), rtol=1e-14)
        slope = jax.jacfwd(lambda b: integer_power(b, lags, 7))(jnp.asarray(0.0))
        np.testing.assert_array_equal(slope, [0, 1, 0, 0, 0, 0, 0, 0])


def test_partial_autocorrelations_give_positive_definite_sequences() -> None:
    with lmm.float64():
        partial = jnp.asarray(np.random.default_rng(2).uniform(-0.99, 0.99, 6))
        rho, coef = autocorrelations(partial)
    table = np.asarray(rho)[np.abs(np.arange(7)[:, None] - np.arange(7))]
    assert np.linalg.eigvalsh(table)[0] > 0
    np.testing.assert_allclose(np.linalg.solve(table[:6, :6], rho[1:]), coef, rtol=1e-8)


# The language -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("UN(visit | id)", "un"),
        ("CS(1 | id)", "cs"),
        ("AR(1)(day | id)", "ar1"),
        ("ARH(1)(day | id)", "ar1h"),
        ("TOEP(day | id)", "toep"),
        ("ANTE(1)(day | id)", "adh"),
        ("ARMA(1,1)(day | id)", "arma"),
        ("SP(POW)(x, y | id)", "sppow"),
    ],
)
def test_names_of_sas(text: str, name: str) -> None:
    assert parse_residual(text).correlation.name == name


@pytest.mark.parametrize(
    ("text", "message", "at"),
    [
        ("foo(1 | id)", "found the structure foo; expected one of cs", 0),
        ("varident(a) * foo(1 | id)", "found the structure foo", 14),
        ("ar1(day)", "found no subject", 0),
        ("ar1(1 | id) * cs(1 | id)", "found a second correlation, cs", 14),
        ("car1(1 | id)", "expected real times", 5),
        ("ar1(2 | id)", "expected 1 or a variable", 4),
        ("cs(1 | id, nugget=True)", "the option nugget=", 18),
        ("arma(1 | id, p=-1)", "whole number", 15),
        ("ar1(x, y | id)", "found 2 positions", 0),
        ("varident(a | id)", "found a bar in varident", 11),
        ("day", "expected a structure", 0),
    ],
)
def test_errors_point_at_the_place(text: str, message: str, at: int) -> None:
    with pytest.raises(lmm.FormulaError, match=re.escape(message)) as caught:
        parse_residual(text)
    assert str(caught.value).splitlines()[-1] == " " * (4 + at) + "^"


def test_an_empty_structure_is_refused(frame: pd.DataFrame) -> None:
    with pytest.raises(lmm.FormulaError, match="found an empty residual="):
        lmm.Model("y ~ 1", frame, residual=" ")


def test_data_that_do_not_fit_are_refused(frame: pd.DataFrame) -> None:
    def model(residual: str, data: pd.DataFrame = frame) -> lmm.Model:
        return lmm.Model("y ~ x", data, residual=residual)

    twice = pd.concat([frame, frame.iloc[:1]], ignore_index=True)
    with pytest.raises(lmm.DesignError, match=r"two rows of id s.. at the same position"):
        model("ar1(visit | id)", twice)
    with pytest.raises(lmm.DataError, match="expects whole-numbered positions"):
        model("ar1(t | id)")
    missing = frame.assign(visit=frame["visit"].where(frame.index != 3).astype(float))
    with pytest.raises(lmm.DataError, match=r"without a value of visit .*row 3"):
        model("un(visit | id)", missing)
    with pytest.raises(lmm.DesignError, match="found one row per row"):
        model("cs(1 | row)", frame.assign(row=np.arange(len(frame)).astype(str)))
    with pytest.raises(lmm.DataError, match="in varpower, whose SD would be 0"):
        model("varpower(z)", frame.assign(z=0.0))
    with pytest.raises(lmm.DesignError, match="found one level of one"):
        model("varident(one)", frame.assign(one="a"))
    with pytest.raises(lmm.DesignError, match="positions apart"):
        model("toep(v2 | id)", frame.assign(v2=frame["visit"].map({0: 0, 1: 1, 2: 4, 3: 9, 4: 16})))


def test_a_closed_gap_is_warned_of(frame: pd.DataFrame) -> None:
    gap = frame.assign(y=frame["y"].where(frame.index != 3))
    with pytest.warns(lmm.ResidualWarning, match="count as neighbours"):
        lmm.Model("y ~ x", gap, residual="ar1(1 | id)")
    lmm.Model("y ~ x", gap, residual="ar1(visit | id)")


# Fits -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sleep_fit() -> lmm.Fit:
    sleep = lmm.load_dataset("sleepstudy")
    return lmm.Model(
        "Reaction ~ Days + (1 | Subject)",
        sleep[sleep["Days"] < 8],
        residual="ar1(Days | Subject)",
    ).fit()


def test_next_visit_is_the_conditional_expectation(sleep_fit: lmm.Fit) -> None:
    """E(y_new | y) and its variance from the joint normal distribution of all rows."""
    new = pd.DataFrame({"Days": [8, 9, 8], "Subject": ["308", "308", "371"]})
    got = sleep_fit.predict(new, kind="next", interval="prediction")
    d = sleep_fit.model.design
    days = np.concatenate([d.X[:, 1], new["Days"]])
    who = np.concatenate([d.terms[0].levels[d.terms[0].codes], new["Subject"]])
    phi = sleep_fit.residual_params()["phi"]
    sd = sleep_fit.varcorr()["sdcor"].iloc[0]
    same = who[:, None] == who
    lag = np.abs(days[:, None] - days)
    V = np.where(same, sd**2 + sleep_fit.sigma**2 * phi**lag, 0.0)
    X = np.column_stack([np.ones(len(days)), days])
    n = d.n
    W = np.linalg.solve(V[:n, :n], V[:n, n:])
    beta = sleep_fit.beta.to_numpy()
    np.testing.assert_allclose(
        got["estimate"], X[n:] @ beta + W.T @ (d.y - X[:n] @ beta), rtol=1e-9
    )
    gap = X[n:] - W.T @ X[:n]
    var = np.diag(V[n:, n:] - W.T @ V[:n, n:]) + np.diag(gap @ sleep_fit.vcov().to_numpy() @ gap.T)
    np.testing.assert_allclose(got["std_error"], np.sqrt(var), rtol=1e-8)


def test_next_visit_of_an_unknown_subject_is_refused() -> None:
    data = lmm.load_dataset("Orthodont")
    fit = lmm.Model("distance ~ age", data, residual="ar1(1 | Subject)").fit()
    new = pd.DataFrame({"age": [16, 16], "Subject": ["M01", "M1"]})
    with pytest.raises(lmm.DataError, match=r"levels of Subject .* M1; expected known"):
        fit.predict(new, kind="next")
    got = fit.predict(new, kind="next", new_levels="population")
    plain = fit.predict(new, kind="population")
    assert got[1] == plain[1]
    assert got[0] != plain[0]


def test_population_intervals_need_no_residual_subject() -> None:
    data = lmm.load_dataset("Orthodont")
    new = pd.DataFrame({"age": [8, 14], "Subject": ["M01", "M01"]})
    for residual in ("cs(1 | Subject)", "csh(age | Subject)"):
        fit = lmm.Model("distance ~ 1", data, residual=residual).fit()
        for interval in ("confidence", "prediction"):
            got = fit.predict(new[["age"]], kind="population", interval=interval)
            want = fit.predict(new, kind="population", interval=interval)
            np.testing.assert_array_equal(got, want)
    # in the last structure the variance depends on the position
    assert want["std_error"][0] != want["std_error"][1]
    with pytest.raises(lmm.DataError, match="age"):
        fit.predict(new[["Subject"]], kind="population", interval="prediction")


def test_prediction_interval_has_the_variance_of_the_row() -> None:
    fit = lmm.Model(
        "weight ~ Time", lmm.load_dataset("BodyWeight"), residual="varident(Diet)"
    ).fit()
    new = pd.DataFrame({"Time": [10, 10], "Diet": ["1", "2"]})
    table = fit.predict(new, kind="population", interval="prediction")
    known = fit.predict(new, kind="population", interval="confidence")["std_error"]
    ratio = fit.residual_params()["sd_ratio[2]"]
    expected = np.sqrt(known**2 + (fit.sigma * np.array([1.0, ratio])) ** 2)
    np.testing.assert_allclose(table["std_error"], expected, rtol=1e-10)
    with pytest.raises(lmm.DataError, match="expected newdata and a model with a residual"):
        fit.predict(kind="next")


def test_prediction_interval_of_a_training_row_has_its_weight() -> None:
    data = lmm.load_dataset("Dyestuff")
    w = np.linspace(0.5, 2, len(data))
    fit = lmm.Model("Yield ~ 1 + (1 | Batch)", data, weights=w).fit()
    known, full = (fit.predict(interval=i)["std_error"] for i in ("confidence", "prediction"))
    np.testing.assert_allclose(full**2 - known**2, fit.sigma**2 / w, rtol=1e-10)


def test_normalised_residuals_are_white(sleep_fit: lmm.Fit) -> None:
    values = sleep_fit.residuals("normalized")
    rows = np.flatnonzero(sleep_fit.model.design.terms[0].codes == 3)
    phi = sleep_fit.residual_params()["phi"]
    L = np.linalg.cholesky(phi ** np.abs(np.arange(8)[:, None] - np.arange(8)))
    raw = sleep_fit.residuals().to_numpy()[rows] / sleep_fit.sigma
    np.testing.assert_allclose(L @ values.to_numpy()[rows], raw, rtol=1e-10)


def test_simulated_rows_have_the_marginal_covariance(sleep_fit: lmm.Fit) -> None:
    V = sleep_fit.marginal_cov("308").cov.to_numpy()
    draws = sleep_fit.simulate(n=4000, seed=1).to_numpy()[:8]
    error = np.cov(draws) - V
    se = np.sqrt((V**2 + np.outer(np.diag(V), np.diag(V))) / 4000)
    assert np.max(np.abs(error) / se) < 4.5


def test_redundant_structures_warn() -> None:
    sleep = lmm.load_dataset("sleepstudy")
    model = lmm.Model("Reaction ~ Days + (1 | Subject)", sleep, residual="cs(1 | Subject)")
    with pytest.warns(lmm.ResidualWarning, match="only the sum of the two is identified"):
        fit = model.fit()
    alone = lmm.Model("Reaction ~ Days", sleep, residual="cs(1 | Subject)").fit()
    assert fit.loglik == pytest.approx(alone.loglik, abs=1e-6)
    assert alone.hierarchical_counterpart() is None


def test_negative_correlation_has_no_hierarchical_counterpart() -> None:
    rng = np.random.default_rng(1)
    e = rng.normal(size=(30, 4))
    data = pd.DataFrame({"y": (e - 0.9 * e.mean(axis=1, keepdims=True)).ravel()})
    data["id"] = np.repeat(np.arange(30), 4).astype(str)
    fit = lmm.Model("y ~ 1", data, residual="cs(1 | id)").fit()
    assert -1 / 3 < fit.residual_params()["rho"] < 0
    assert "a valid marginal model" in str(fit.hierarchical_counterpart())
    mixed = lmm.Model("y ~ 1 + (1 | id)", data)
    with pytest.warns(lmm.SingularFitWarning):
        assert mixed.fit().loglik < fit.loglik - 1


def test_standard_errors_are_those_of_finite_differences(sleep_fit: lmm.Fit) -> None:
    """Twice the inverse Hessian of the criterion in (θ, φ), by second differences of its value."""
    model, h = sleep_fit.model, 1e-3
    at = np.append(sleep_fit.theta, sleep_fit.phi)
    with lmm.float64():
        f = jax.jit(model.deviance)
        H = np.empty((2, 2))
        for i, e in enumerate(np.eye(2) * h):
            for j, g in enumerate(np.eye(2) * h):
                corners = [f(at + a * e + b * g) * a * b for a in (1, -1) for b in (1, -1)]
                H[i, j] = float(sum(corners)) / (4 * h**2)
    phi = sleep_fit.residual_params()["phi"]
    expected = np.sqrt(2 * np.linalg.inv(H)[1, 1]) * (1 - phi**2)
    assert sleep_fit.residual_intervals().loc["phi", "std_error"] == pytest.approx(
        expected, rel=1e-4
    )


def test_wald_intervals_are_symmetric_in_their_chart(sleep_fit: lmm.Fit) -> None:
    table = sleep_fit.residual_intervals()
    z = np.arctanh(table.loc["phi", ["low", "estimate", "high"]].to_numpy(float))
    assert z[1] - z[0] == pytest.approx(z[2] - z[1])
    assert "Residual structure: ar1(Days | Subject)" in sleep_fit.summary()


@pytest.mark.parametrize(
    ("formula", "residual"),
    [
        ("Reaction ~ Days + (1 | Subject)", "ar1(Days | Subject) * varpower(I(Days + 1))"),
        ("Reaction ~ Days", "cs(1 | Subject)"),
    ],
)
def test_numpyro_marginal_form_is_the_likelihood(formula: str, residual: str) -> None:
    """Under flat priors the density of the reported parameters is the restricted likelihood."""
    import numpyro.distributions as dist
    from numpyro.infer.util import log_density

    from lmmjax.bayes.residual import parameters

    model = lmm.Model(formula, lmm.load_dataset("sleepstudy"), residual=residual)
    s = model.design.residual.structure
    phi = s.start() + 0.1
    with lmm.float64():
        charts = [p.chart for p in parameters(s)]
        sites = {"sigma": 30.0, "residual": [float(c(x)) for c, x in zip(charts, phi, strict=True)]}
    priors = {"base": "flat"} | ({"delta": dist.Uniform(-5.0, 5.0)} if "delta" in s.names else {})
    theta = []
    if model.is_mixed:
        sites["sd_Subject"] = np.array([25.0])
        theta = [25.0 / 30.0]
    with lmm.float64():
        site = {k: jnp.asarray(v) for k, v in sites.items()}
        joint, trace = log_density(model.numpyro_model(priors=priors), (), {}, site)
        widths = [10.0 if p.key == "delta" else p.high - p.low for p in parameters(s)]
        uniform = -np.sum(np.log(widths))
        phi = jnp.asarray(phi)
        model_theta = jnp.concatenate([jnp.asarray(theta), phi])
        gram, rhs = model._source().gram(phi)
        profiled = float(model.deviance(model_theta))
        red_sigma = _restricted(model, profiled, gram, rhs, theta, phi, 30.0)
        assert float(joint) - uniform == pytest.approx(red_sigma, rel=1e-10)
        reported = np.asarray(s.natural(phi))
        np.testing.assert_allclose([trace[n]["value"] for n in s.names], reported)


def _restricted(
    model: lmm.Model, profiled: float, gram: Any, rhs: Any, theta: Any, phi: Any, sigma: float
) -> float:
    """log restricted likelihood at a given σ from the profiled one: r² is all that is needed."""
    from lmmjax import likelihood as lk

    s, units = model.design.residual.structure, model._units
    inner = sigma / float(s.variances.reference(phi[s.n_corr :]))
    scaled = np.asarray(theta) * sigma / inner
    lams = [np.linalg.inv(B) * t for B, t in zip(units.B, scaled, strict=True)]
    r2 = float(lk.reduce_factors(model._plan.layout, lams, gram, rhs).r2) * units.scale**2
    nu = model.n_obs - model.design.p
    return -0.5 * (profiled - nu * np.log(r2 / nu) - nu + nu * np.log(inner**2) + r2 / inner**2)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from lmmjax.cli import main

    call = ["fit", "Orthodont", "distance ~ Sex * age", "--residual", "cs(1 | Subject)", "--json"]
    assert main(call) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["residual"]["rho"] == pytest.approx(0.6318388, abs=1e-6)
    assert got["loglik"] == pytest.approx(-216.878624600, abs=1e-6)

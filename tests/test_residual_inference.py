"""Inference with structured residuals: dense algebra from SAS's definitions, then SAS itself."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import residual_cases as cases
from scipy import optimize, stats

import lmmjax as lmm
from lmmjax.gram import standardise
from lmmjax.inference import cone, exact, information, nesting, profile, variances
from lmmjax.inference import kenward_roger as kr
from lmmjax.residual import expansion, parameters
from lmmjax.residual.checks import contains
from lmmjax.residual.covariance import block
from lmmjax.residual.setup import whitened_rows
from lmmjax.residual.source import Basis, Patterns, Rows


@functools.cache
def visits() -> pd.DataFrame:
    """18 subjects with two to all of 3 visits, in 3 schools between which they move."""
    rng = np.random.default_rng(8)
    rows = [(i, v) for i in range(18) for v in range(3) if not (i % 6 == 4 and v == i % 3)]
    d = pd.DataFrame(rows, columns=["subject", "visit"])
    d["id"] = d["subject"].map("s{:02d}".format)
    d["arm"] = np.where(d["subject"] % 2 == 0, "a", "b")
    d["school"] = [f"k{k}" for k in rng.integers(0, 3, len(d))]
    d["x"], d["u"] = rng.normal(size=len(d)), rng.uniform(1, 3, len(d))
    d["w"] = rng.uniform(0.5, 2, len(d))
    noise = rng.normal(size=len(d)) * (1 + 0.3 * d["visit"])
    shared = (
        rng.normal(size=18)[d["subject"]] + 0.5 * rng.normal(size=3)[d["school"].str[1].astype(int)]
    )
    d["y"] = 1 + 0.5 * d["x"] + d["visit"] + shared + noise
    return d.sample(frac=1, random_state=2).reset_index(drop=True)


# -- the definitions of SAS, in its own parameters (complex numbers pass through) -----------------


def _lag(d: pd.DataFrame) -> np.ndarray:
    v = d["visit"].to_numpy()
    return np.abs(v[:, None] - v)


def _by(values: np.ndarray, codes: Any) -> np.ndarray:
    sd = np.sqrt(values)[np.asarray(codes, int)]
    return np.outer(sd, sd)


def _un(w: np.ndarray, d: pd.DataFrame) -> np.ndarray:
    table = np.diag(w[:3])
    table[np.triu_indices(3, 1)] = w[3:]
    table.T[np.triu_indices(3, 1)] = w[3:]
    v = d["visit"].to_numpy()
    return table[v[:, None], v]


def _ad(w: np.ndarray, d: pd.DataFrame) -> np.ndarray:
    table = np.array([[1, w[3], w[3] * w[4]], [w[3], 1, w[4]], [w[3] * w[4], w[4], 1]])
    v = d["visit"].to_numpy()
    return _by(w[:3], v) * table[v[:, None], v]


def _nugget(w: np.ndarray, d: pd.DataFrame) -> np.ndarray:
    x = d["u"].to_numpy()
    return w[0] * np.exp(-np.abs(x[:, None] - x) / w[1]) + w[2] * np.eye(len(d))


SAS: dict[str, Callable[[np.ndarray, pd.DataFrame], np.ndarray]] = {
    "cs(1 | id)": lambda w, d: np.where(np.eye(len(d)), w[0], w[1]),
    "csh(visit | id)": lambda w, d: _by(w[:3], d["visit"]) * np.where(np.eye(len(d)), 1, w[3]),
    "ar1(visit | id)": lambda w, d: w[0] * w[1] ** _lag(d),
    "ar1h(visit | id)": lambda w, d: _by(w[:3], d["visit"]) * w[3] ** _lag(d),
    "toep(visit | id)": lambda w, d: w[:3][_lag(d)],
    "adh(visit | id)": _ad,
    "un(visit | id)": _un,
    "spexp(u | id, nugget=True)": _nugget,
    "varident(arm)": lambda w, d: _by(w, d["arm"] == "b") * np.eye(len(d)),
    "varpower(u)": lambda w, d: np.diag(w[0] * d["u"].to_numpy() ** (2 * w[1])),
    "ar1(visit | id) * varident(arm)": lambda w, d: _by(w[:2], d["arm"] == "b") * w[2] ** _lag(d),
}


class Dense:
    """Everything from n x n matrices: V(ψ, ω), its derivatives, Kenward and Roger's formulas."""

    def __init__(self, fit: lmm.Fit, residual: str, d: pd.DataFrame, weights: str | None) -> None:
        design = fit.model.design
        r, self.X, self.y = design.residual, design.X, design.y
        same = d["id"].to_numpy()[:, None] == d["id"].to_numpy()
        w = np.ones(len(d)) if weights is None else d[weights].to_numpy()
        self.mask = (same if r.correlated else np.eye(len(d))) / np.sqrt(np.outer(w, w))
        self.define, self.d = SAS[residual], d
        sigma2 = (fit.sigma / fit._residual_sd) ** 2
        with lmm.float64():
            psi = parameters.covariance_parameters(
                parameters.chart(r), sigma2, jnp.asarray(fit.phi)
            )
            self.psi = np.asarray(psi)
        self.Z = [np.asarray(pd.get_dummies(t.codes), float) for t in design.terms]
        self.omega = [float(c[0, 0]) for c in fit._term_covs()]
        R = fit.sigma**2 * block(r, fit.phi, w, np.arange(len(d)))
        np.testing.assert_allclose(self.R(self.psi), R, rtol=1e-9, atol=1e-12)
        self.V = R + sum(o * Z @ Z.T for o, Z in zip(self.omega, self.Z, strict=True))

    def R(self, psi: np.ndarray) -> np.ndarray:
        return self.define(psi, self.d) * self.mask

    def slope(self, psi: np.ndarray, k: int) -> np.ndarray:
        """By the complex step: exact."""
        return self.R(psi + 1e-30j * np.eye(len(psi))[k]).imag / 1e-30

    def derivatives(self) -> tuple[np.ndarray, np.ndarray]:
        m, n = len(self.psi), len(self.y)
        first = [self.slope(self.psi, k) for k in range(m)] + [Z @ Z.T for Z in self.Z]
        second = np.zeros((len(first), len(first), n, n))
        for k in range(m):
            h = 1e-4 * max(abs(self.psi[k]), 0.1) * np.eye(m)[k]
            up, down = self.psi + h, self.psi - h
            for j in range(m):
                second[k, j] = (self.slope(up, j) - self.slope(down, j)) / (2 * h[k])
        return np.array(first), second

    def kenward_roger(self, information: str, second_order: bool) -> kr.Adjustment:
        G, G2 = self.derivatives()
        Vi, X = np.linalg.inv(self.V), self.X
        Phi = np.linalg.inv(X.T @ Vi @ X)
        P = Vi - Vi @ X @ Phi @ X.T @ Vi
        Py = P @ self.y
        info = 0.5 * np.einsum("ab,ibc,cd,jda->ij", P, G, P, G, optimize=True)
        if information == "observed":
            quad = np.einsum("a,iab,bc,jcd,d->ij", Py, G, P, G, Py, optimize=True)
            bent = np.einsum("ab,ijba->ij", P, G2) - np.einsum("a,ijab,b->ij", Py, G2, Py)
            info = -info + quad + 0.5 * bent
        W = np.linalg.inv(info)
        VX = Vi @ X
        Pi = -np.einsum("ap,iab,bq->ipq", VX, G, VX, optimize=True)
        Q = np.einsum("ap,iab,bc,jcd,dq->ijpq", VX, G, Vi, G, VX, optimize=True)
        R = np.einsum("ap,ijab,bq->ijpq", VX, G2, VX, optimize=True) * second_order
        inner = Q - np.einsum("ipq,qr,jrs->ijps", Pi, Phi, Pi) - 0.25 * R
        adjusted = Phi + 2 * Phi @ np.einsum("ij,ijpq->pq", W, inner) @ Phi
        return kr.Adjustment(Phi, adjusted, Phi @ Pi @ Phi, W)


SLOW = pytest.mark.slow
MODELS: list[Any] = [
    ("un(visit | id)", "", None, Patterns),
    ("ar1(visit | id) * varident(arm)", " + (1 | id)", None, Rows),
    *(
        pytest.param(*case, marks=SLOW)
        for case in (
            ("varident(arm)", " + (1 | id) + (1 | school)", None, Basis),
            ("spexp(u | id, nugget=True)", "", None, Rows),
            ("ar1h(visit | id)", "", None, Patterns),
            ("csh(visit | id)", "", "w", Patterns),
            ("adh(visit | id)", " + (1 | school)", None, Rows),
            ("varpower(u)", " + (1 | id)", None, Rows),
            ("cs(1 | id)", "", None, Rows),
            ("toep(visit | id)", "", None, Patterns),
            ("ar1(visit | id)", " + (1 | id)", "w", Rows),
        )
    ),
]


@functools.cache
def fitted(residual: str, random: str, weights: str | None = None, method: str = "REML") -> lmm.Fit:
    model = lmm.Model(
        f"y ~ x + factor(visit){random}", visits(), residual=residual, weights=weights
    )
    return model.fit(method=method)


@pytest.mark.parametrize(("residual", "random", "weights", "kind"), MODELS)
def test_kenward_roger_equals_dense_algebra(
    residual: str, random: str, weights: str | None, kind: type
) -> None:
    fit = fitted(residual, random, weights)
    assert fit.converged and not fit.singular
    assert isinstance(fit._residual_source, kind)
    dense = Dense(fit, residual, visits(), weights)
    L = np.eye(4)[2:]
    for kind_of in kr.INFORMATION:
        for second_order in (True, False):
            want = dense.kenward_roger(kind_of, second_order)
            got = fit.vcov("kenward-roger", information=kind_of, second_order=second_order)
            np.testing.assert_allclose(got, want.adjusted, rtol=2e-6, atol=1e-7)
        df, scaling = kr.f_distribution(want, L)
        test = fit.test(L, df="kenward-roger", information=kind_of).iloc[0]
        np.testing.assert_allclose([test["den_df"], test["scaling"]], [df, scaling], rtol=2e-6)


@pytest.mark.parametrize(
    ("residual", "random"),
    [
        ("varident(arm)", " + (1 | school)"),
        pytest.param("ar1h(visit | id)", "", marks=SLOW),
    ],
)
def test_all_sources_have_one_expansion(residual: str, random: str) -> None:
    model = lmm.Model(f"y ~ x{random}", visits(), residual=residual)
    source, phi = model._prepared[2], model.design.residual.structure.start()
    rows = whitened_rows(model.design, model._plan, standardise(model.design))
    assert not isinstance(source, Rows)
    W = np.eye(len(phi))
    with lmm.float64():
        for of in (expansion.expand, lambda s, phi: expansion.curved(s, phi, W)):
            a, b = (jax.tree.leaves(of(s, jnp.asarray(phi))) for s in (source, rows))
            for x, y in zip(a, b, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "residual",
    ["un(visit | id)", *(pytest.param(f"{x} | id)", marks=SLOW) for x in ("cs(1", "toep(visit"))],
)
def test_linear_structures_have_no_second_order(residual: str) -> None:
    """What is skipped for them is 0 indeed."""
    fit = fitted(residual, "")
    own = parameters.chart(fit.model.design.residual)
    assert own.is_linear
    W = np.diag(1.0 + np.arange(1 + len(fit.phi)))
    Q = fit._variance_tables[0].S1[0, :4, :4]
    assert np.max(np.abs(variances._residual(fit, own, W))) < 1e-10 * np.max(np.abs(Q))


# -- SAS ------------------------------------------------------------------------------------------


@functools.cache
def given() -> dict[str, Any]:
    path = cases.FOLDER.parent / "sas" / "fev_inference.json"
    return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def fev_fit(residual: str, weights: str | None = None) -> lmm.Fit:
    return lmm.Model(given()["formula"], cases.fev(), residual=residual, weights=weights).fit()


def by_sas(key: str, quick: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(c, id=c["residual"], marks=[] if c["residual"].startswith(quick) else SLOW)
        for c in given()[key]
    ]


@pytest.mark.parametrize("case", by_sas("kenward_roger", ("un(",)))
def test_kenward_roger_equals_sas(case: dict[str, Any]) -> None:
    """To the digits of SAS, which stops early: 4 of the df, 3 more of the standard errors."""
    fit, row = fev_fit(case["residual"]), given()["coefficient"]
    got = fit.coef_table("kenward-roger", information="observed").loc[row]
    assert got["df"] == pytest.approx(case["df"], rel=5e-4)
    assert got["std_error"] == pytest.approx(case["se"], rel=1.5e-4)
    linear = fit.coef_table("kenward-roger", information="observed", second_order=False).loc[row]
    assert linear["std_error"] == pytest.approx(case["se_first_order"], rel=1.5e-4)
    # the second-order term itself, of which SAS's early stop takes the same part from both
    change = case["se"] / case["se_first_order"] - 1
    assert got["std_error"] / linear["std_error"] - 1 == pytest.approx(change, rel=1e-2, abs=1e-8)


def test_second_order_of_mmrm_is_that_of_its_own_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """R_ij is all that differs from SAS: with ψ = (log SD, ρ/√(1-ρ²)) it is mmrm's."""
    want, row = given()["mmrm"], given()["coefficient"]

    def of_mmrm(k: Any, phi: Any, W: Any) -> Any:
        def psi(eta: Any) -> Any:
            rho = k.structure.family.natural(eta[1:])[0]
            return jnp.stack([0.5 * jnp.log(eta[0]), rho / jnp.sqrt(1 - rho**2)])

        eta = jnp.concatenate([jnp.ones(1), phi])
        return -jnp.linalg.solve(jax.jacfwd(psi)(eta), expansion.weighted_second(psi, eta, W))

    fit = lmm.Model(given()["formula"], cases.fev(), residual=want["residual"]).fit()
    options = {"df": "kenward-roger", "information": "observed"}
    linear = fit.coef_table(**options, second_order=False).loc[row]
    assert linear["df"] == pytest.approx(want["df"], rel=1e-5)
    assert linear["std_error"] == pytest.approx(want["se_linear"], rel=1e-6)
    monkeypatch.setattr(parameters, "bend", of_mmrm)
    got = fit.coef_table(**options).loc[row, "std_error"]
    assert got == pytest.approx(want["se"], rel=1e-6)
    monkeypatch.undo()
    ours = fev_fit(want["residual"]).coef_table(**options).loc[row, "std_error"]
    # the term itself is -0.00208 of the standard error in mmrm's parameters, -0.00201 in SAS's
    assert got / linear["std_error"] - 1 == pytest.approx(-0.002080, abs=2e-6)
    assert ours / linear["std_error"] - 1 == pytest.approx(-0.002006, abs=2e-6)


@pytest.mark.parametrize("case", by_sas("empirical", ()))
def test_sandwich_equals_sas(case: dict[str, Any]) -> None:
    """Empirical standard errors of PROC MIXED are CR0 by subject."""
    V = fev_fit(case["residual"]).vcov("robust", correction="CR0").to_numpy()
    a, b = case["intercept"], case["arm"]
    np.testing.assert_allclose(V, [[a, -a], [-a, b]], rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", given()["empirical"], ids=lambda c: c["residual"])
def test_sandwich_with_weights_equals_sas(case: dict[str, Any]) -> None:
    V = fev_fit(case["residual"], "WEIGHT").vcov("robust", correction="CR0").to_numpy()
    a, b = case["weighted_intercept"], case["weighted_arm"]
    np.testing.assert_allclose(V, [[a, -a], [-a, b]], rtol=2e-4)


# -- sandwich -------------------------------------------------------------------------------------


def brute_force(fit: lmm.Fit, codes: np.ndarray, L: np.ndarray, cr2: bool) -> tuple[Any, ...]:
    """V_R, Ω and Zhang's η from matrices groups x groups."""
    d = fit.model.design
    V = fit.sigma**2 * block(d.residual, fit.phi, d.weights, np.arange(d.n))
    for t, cov in zip(d.terms, fit._term_covs(), strict=True):
        V = V + (t.codes[:, None] == t.codes) * (t.z @ cov @ t.z.T)
    X, e, W = d.X, d.y - d.X @ fit._beta, np.linalg.inv(V)
    M = np.linalg.inv(X.T @ W @ X)
    hat, groups = X @ M @ X.T, np.unique(codes)
    H = np.zeros((len(groups), len(X), d.p))
    for g in groups:
        own = np.flatnonzero(codes == g)
        Vg = V[np.ix_(own, own)]
        D = np.linalg.cholesky(Vg).T
        value, vector = np.linalg.eigh(D @ (Vg - hat[np.ix_(own, own)]) @ D.T)
        A = D.T @ (vector / np.sqrt(value)) @ vector.T @ D if cr2 else np.eye(len(own))
        H[g, own] = A @ np.linalg.solve(Vg, X[own]) @ M
    scores = np.einsum("gia,i->ga", H, e)
    P = np.einsum("gia,sa,ij,hjb,tb->stgh", H, L, V - hat, H, L, optimize=True)
    omega = np.einsum("stgg->st", P)
    root = np.linalg.inv(np.linalg.cholesky(omega))
    P = np.einsum("as,bt,stgh->abgh", root, root, P)
    q = len(L)
    spread = sum(
        np.sum(P[s, s] * P[t, t]) + np.sum(P[s, t] * P[s, t].T) for s in range(q) for t in range(q)
    )
    return scores.T @ scores, omega, q * (q + 1) / spread


@pytest.mark.parametrize(
    ("residual", "random", "correction"),
    [
        ("un(visit | id)", "", "CR2"),
        ("un(visit | id)", "", "CR0"),
        pytest.param("ar1(visit | id) * varident(arm)", " + (1 | id)", "CR2", marks=SLOW),
    ],
)
def test_robust_tests_equal_brute_force(residual: str, random: str, correction: str) -> None:
    fit, L = fitted(residual, random), np.eye(4)[1:]
    codes = np.unique(visits()["id"], return_inverse=True)[1]
    V, omega, eta = brute_force(fit, codes, L, correction == "CR2")
    got = fit.vcov("robust", correction=correction).to_numpy()
    np.testing.assert_allclose(got, V, rtol=1e-8)
    if correction == "CR2":  # unbiased under the model
        np.testing.assert_allclose(omega, fit.vcov().to_numpy()[1:, 1:], rtol=1e-7, atol=1e-10)
    test = fit.test(L, vcov="robust", correction=correction).iloc[0]
    assert test["den_df"] == pytest.approx(eta - 2, rel=1e-8)
    assert test["scaling"] == pytest.approx((eta - 2) / eta, rel=1e-8)
    wald = fit._beta[1:] @ np.linalg.solve(V[1:, 1:], fit._beta[1:])
    assert test["statistic"] == pytest.approx((eta - 2) / (3 * eta) * wald, rel=1e-8)
    one = fit.test(L[:1], vcov="robust", correction=correction).iloc[0]
    table = fit.coef_table(vcov="robust", correction=correction)
    assert one["den_df"] == pytest.approx(table["df"].iloc[1], rel=1e-8)
    assert fit.anova(vcov="robust", df="wald").loc["x", "den_df"] == np.inf


def test_robust_groups_hold_whole_subjects() -> None:
    fit = fitted("un(visit | id)", "")
    with pytest.raises(lmm.errors.DesignError, match="id are spread"):
        fit.vcov("robust", group=visits()["school"])
    few = np.asarray(visits()["subject"]) % 3
    with pytest.raises(lmm.LmmError, match="3 groups"):
        fit.test(np.eye(4)[1:], vcov="robust", group=few)


# -- Wald tests -----------------------------------------------------------------------------------


def test_residual_parameters_have_wald_tests() -> None:
    fit = fitted("un(visit | id)", "")
    table = fit.variance_tests().set_index("term1")
    se = fit.residual_intervals()["std_error"]
    np.testing.assert_allclose(table.loc[se.index, "std_error"], se, rtol=1e-10)
    rho = fit.residual_params()["rho[0,1]"]
    z = np.arctanh(rho) * (1 - rho**2) / se["rho[0,1]"]
    assert table.loc["rho[0,1]", "statistic"] == pytest.approx(z, rel=1e-10)
    ratio = fit.residual_params()["sd_ratio[2]"]
    z = np.log(ratio) * ratio / se["sd_ratio[2]"]
    assert table.loc["sd_ratio[2]", "statistic"] == pytest.approx(z, rel=1e-10)


@pytest.mark.slow
def test_variance_of_the_reference_row_has_the_error_of_sigma() -> None:
    """Both scales are one statement, whatever row σ refers to."""
    for residual in ("un(visit | id)", "varpower(u)"):
        fit = fitted(residual, "" if "id" in residual else " + (1 | id)")
        row = fit.variance_tests().query("group == 'Residual'").iloc[0]
        low, high = np.log(fit.confint(parm="sigma")[["low", "high"]].iloc[0])
        on_log = (high - low) / (2 * stats.norm.ppf(0.975))
        assert row["std_error"] == pytest.approx(2 * fit.sigma**2 * on_log, rel=1e-6)


@pytest.mark.slow
def test_cs_is_tested_on_its_range_and_a_range_is_not() -> None:
    rows = fitted("cs(1 | id)", "").variance_tests().set_index("term1")
    assert "logit" in rows.loc["rho", "caveat"] and 1 < rows.loc["rho", "statistic"] < 20


# -- profiles -------------------------------------------------------------------------------------


def dense_reml(fit: lmm.Fit, V: np.ndarray) -> float:
    X, y = fit.model.design.X, fit.model.design.y
    if np.linalg.eigvalsh(V)[0] <= 0:
        return 1e6
    Vi = np.linalg.inv(V)
    A = X.T @ Vi @ X
    r = y - X @ np.linalg.solve(A, X.T @ Vi @ y)
    logs = np.linalg.slogdet(V)[1] + np.linalg.slogdet(A)[1]
    return logs + r @ Vi @ r + (len(y) - X.shape[1]) * np.log(2 * np.pi)


def excess(fit: lmm.Fit, V: Callable[[np.ndarray], np.ndarray], start: Any) -> float:
    """What the best V(free) leaves above the optimum, by a general minimiser."""
    best = optimize.minimize(lambda w: dense_reml(fit, V(w)), start, method="BFGS")
    best = optimize.minimize(
        lambda w: dense_reml(fit, V(w)), best.x, method="Nelder-Mead", tol=1e-7
    )
    return float(best.fun) - fit.deviance


@pytest.mark.slow
def test_profile_limits_equal_brute_force() -> None:
    residual = "ar1(visit | id) * varident(arm)"
    fit, d = fitted(residual, " + (1 | id)"), visits()
    same = d["id"].to_numpy()[:, None] == d["id"].to_numpy()
    wanted = ["sd_(Intercept)|id", "sigma", "phi", "sd_ratio[b]"]
    got, q = fit.confint("profile", parm=wanted), stats.chi2.ppf(0.95, 1)

    def V(a: float, b: float, phi: float, sd: float) -> np.ndarray:
        return (SAS[residual](np.array([a**2, (a * b) ** 2, phi]), d) + sd**2) * same

    a, b, phi, sd = (float(got.loc[n, "estimate"]) for n in ("sigma", *wanted[3:1:-1], wanted[0]))
    for end in got.loc["phi"].iloc[1:]:
        assert excess(fit, lambda w, e=end: V(w[0], w[1], e, w[2]), [a, b, sd]) == pytest.approx(
            q, abs=1e-4
        )
    high = got.loc["sigma", "high"]
    assert excess(fit, lambda w: V(high, w[0], np.tanh(w[1]), w[2]), [b, phi, sd]) == pytest.approx(
        q, abs=1e-4
    )
    low = got.loc["sd_ratio[b]", "low"]
    assert excess(fit, lambda w: V(w[0], low, np.tanh(w[1]), w[2]), [a, phi, sd]) == pytest.approx(
        q, abs=1e-4
    )
    assert got.loc[wanted[0], "low"] == 0  # the correlation alone is within the quantile
    assert excess(fit, lambda w: V(w[0], w[1], np.tanh(w[2]), 0.0), [a, b, phi]) < q


@pytest.mark.slow
def test_profile_of_entangled_parameters() -> None:
    """A correlation of un depends on several free parameters; all are equal up to relabelling."""
    fit, d = fitted("un(visit | id)", ""), visits()
    got, q = fit.confint("profile", parm="theta_"), stats.chi2.ppf(0.95, 1)
    same = d["id"].to_numpy()[:, None] == d["id"].to_numpy()

    def V(w: np.ndarray, r: float) -> np.ndarray:
        v = np.exp(w[:3])
        s = np.sqrt(v)
        psi = [*v, s[0] * s[1] * w[3], r * s[0] * s[2], s[1] * s[2] * w[4]]
        return _un(np.array(psi), d) * same

    start = [*np.log(Dense(fit, "un(visit | id)", d, None).psi[:3]), 0.6, 0.6]
    for end in got.loc["rho[0,2]"].iloc[1:]:
        assert excess(fit, lambda w, e=end: V(w, e), start) == pytest.approx(q, abs=1e-3)
    other = d.assign(visit=d["visit"].map({0: 2, 1: 0, 2: 1}))
    moved = lmm.Model("y ~ x + factor(visit)", other, residual="un(visit | id)").fit()
    turned = moved.confint("profile", parm="rho[1,2]").iloc[0]
    np.testing.assert_allclose(turned, got.loc["rho[0,2]"], rtol=1e-5)
    curve = fit.profile("rho[0,2]", points=5, level=0.9)
    assert curve["zeta"].is_monotonic_increasing
    z = stats.norm.ppf(0.95)
    np.testing.assert_allclose(curve["zeta"].iloc[[0, -1]], [-z, z], atol=1e-5)


@pytest.mark.slow
def test_profiles_end_at_the_ends_of_ranges() -> None:
    fit = fitted("spexp(u | id, nugget=True)", "")
    got = fit.confint("profile", parm=["range", "nugget"])
    assert got.loc["range", "high"] == np.inf  # positions are noise: cs fits as well
    cs = fitted("cs(1 | id)", "")
    assert cs.deviance < fit.deviance + stats.chi2.ppf(0.95, 1)
    rho = cs.confint("profile", parm="rho").iloc[0]
    for end in rho[["low", "high"]]:
        V = lambda w, e=end: np.exp(w[0]) * cs_correlation(e)  # noqa: E731
        assert excess(cs, V, [np.log(cs.sigma**2)]) == pytest.approx(
            stats.chi2.ppf(0.95, 1), abs=1e-4
        )


def cs_correlation(rho: float) -> np.ndarray:
    d = visits()
    same = d["id"].to_numpy()[:, None] == d["id"].to_numpy()
    return np.where(same, rho, 0.0) + (1 - rho) * np.eye(len(d))


@pytest.mark.slow
def test_profile_of_fixed_effects_is_that_of_ml() -> None:
    fit = fitted("ar1(visit | id)", "", method="ML")
    low, high = fit.confint("profile", parm="x")[["low", "high"]].iloc[0]
    d = visits()
    for end in (low, high):
        held = lmm.Model(
            "y ~ factor(visit)", d.assign(y=d["y"] - end * d["x"]), residual="ar1(visit | id)"
        ).fit(method="ML")
        assert held.deviance - fit.deviance == pytest.approx(stats.chi2.ppf(0.95, 1), abs=1e-6)


# -- what else is asked of such models ------------------------------------------------------------


def orthodont(residual: str | None) -> lmm.Fit:
    return lmm.Model("distance ~ Sex * age", lmm.load_dataset("Orthodont"), residual=residual).fit()


@pytest.mark.slow
def test_nested_structures_are_compared_as_by_nlme() -> None:
    want = cases.load("resid_orthodont_gls_structures")["expected"]["table"]
    texts = [None, "cs(1 | Subject)", "symm(age | Subject)", "un(age | Subject)"]
    fits = [orthodont(text) for text in texts]
    for k in range(1, 4):
        got = lmm.lrt(fits[k - 1], fits[k])
        assert got.df == want["df"][k] - want["df"][k - 1]
        assert got.statistic == pytest.approx(want["LR"][k], rel=1e-5)
        assert got.p_value == pytest.approx(want["p"][k], rel=1e-4)
    with pytest.raises(lmm.errors.ComparisonError, match="contains"):
        lmm.lrt(orthodont("ar1(1 | Subject)"), orthodont("csh(age | Subject)"))
    table = lmm.aic_table(*fits)
    np.testing.assert_allclose(table["aic"], want["AIC"], atol=1e-4)


@pytest.mark.parametrize(
    ("small", "big", "yes"),
    [
        ("ar1(visit | id)", "toep(visit | id)", True),
        ("ar1(visit | id)", "adh(visit | id)", True),
        ("ar1(visit | id)", "arma(visit | id, p=1, q=1)", True),
        ("ar1(visit | id)", "arma(visit | id, p=0, q=1)", False),
        ("ar1h(visit | id)", "un(visit | id)", True),
        ("un(visit | id)", "ar1h(visit | id)", False),
        ("un(visit | id)", "symm(visit | id)", False),
        ("cs(1 | id) * varident(arm)", "un(visit | id)", False),
        ("cs(1 | id)", "cs(1 | id) * varident(arm)", True),
        ("cs(1 | id)", "cs(1 | school)", False),
        ("ar1(1 | id)", "toep(visit | id)", False),
        ("spexp(u | id)", "spexp(u | id, nugget=True)", True),
        ("varident(arm)", "ar1(visit | id) * varident(arm)", True),
    ],
)
def test_which_structures_contain_which(small: str, big: str, yes: bool) -> None:
    a, b = (lmm.Model("y ~ x", visits(), residual=text).design.residual for text in (small, big))
    assert contains(b, a) == yes


def test_shares_of_the_variance() -> None:
    fit = fitted("ar1(visit | id) * varident(arm)", " + (1 | id)")
    random = fit.varcorr()["vcov"].iloc[0]
    ratio = fit.residual_params()["sd_ratio[b]"]
    residual = fit.sigma**2 * np.mean(np.where(visits()["arm"] == "b", ratio**2, 1.0))
    assert fit.icc()["adjusted"] == pytest.approx(random / (random + residual), rel=1e-12)
    assert fit.variance_partition().loc["Residual", "variance"] == pytest.approx(residual)
    marginal = fitted("un(visit | id)", "")
    with pytest.raises(lmm.LmmError, match="no random effects"):
        marginal.icc()
    assert marginal.r2()["marginal"] == marginal.r2()["conditional"]


def test_means_take_kenward_roger() -> None:
    fit = fitted("un(visit | id)", "")
    V = fit.vcov("kenward-roger").to_numpy()
    got = fit.contrasts("visit", adjust="none", df="kenward-roger")
    l = np.array([0, 0, 1, -1.0])  # noqa: E741
    assert got["std_error"].iloc[-1] == pytest.approx(np.sqrt(l @ V @ l), rel=1e-10)
    assert got["df"].iloc[-1] == pytest.approx(fit.test(l, df="kenward-roger")["den_df"].item())
    assert fit.emtrends("x", df="kenward-roger")["df"].item() == pytest.approx(
        fit.coef_table("kenward-roger").loc["x", "df"]
    )


# -- compiled code --------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["spexp(u | id, nugget=True)", "ar1h(visit | id)"])
def test_expansions_lower_for_cuda(residual: str) -> None:
    model = lmm.Model("y ~ x + (1 | school)", visits(), residual=residual)
    source, phi = model._prepared[2], model.design.residual.structure.start()
    layout, own = model._plan.layout, parameters.chart(model.design.residual)
    sigmas, E = [np.eye(1)], [np.ones((1, 1, 1))]

    def tables(phi: Any) -> Any:
        return information.by_autodiff(
            layout, *source.gram(phi), sigmas, E, expansion.expand(source, phi)
        )

    W = np.eye(len(phi))
    with lmm.float64():
        for f in (
            tables,
            lambda phi: expansion.curved(source, phi, W),
            lambda phi: parameters.bend(own, phi, np.eye(1 + len(phi))),
        ):
            exported = jax.export.export(jax.jit(f), platforms=["cuda"])(jnp.asarray(phi))
            assert "cuda" in exported.platforms


def test_profiles_lower_for_cuda() -> None:
    fit = fitted("un(visit | id)", "")
    profiler = profile.Profiler(fit)
    parameter = profiler.component("rho[0,2]")
    with lmm.float64():
        held = jax.tree.map(lambda a: jnp.asarray(a, float), parameter.hold(0.5))
        arguments = jnp.asarray(parameter.start()), held, fit.model._prepared[2]
        exported = jax.export.export(profile.minimise, platforms=["cuda"])(
            profiler.layout, *arguments
        )
    assert "cuda" in exported.platforms


# -- conditional AIC ------------------------------------------------------------------------------


@pytest.mark.slow
def test_conditional_df_with_residual_parameters_are_those_of_refits() -> None:
    d, residual = visits(), "ar1(visit | id) * varident(arm)"
    fit = lmm.Model("y ~ x + (1 | school)", d, residual=residual).fit()
    n, h = fit.n_obs, 1e-3 * fit.sigma
    y = d["y"].to_numpy()[:, None]
    both = np.concatenate([y + h * np.eye(n), y - h * np.eye(n)], axis=1)
    refits = lmm.fit_many("~ x + (1 | school)", d, responses=both, residual=residual)
    fitted = np.column_stack([refits[i].fitted() for i in range(2 * n)])
    trace = np.sum(np.diag(fitted[:, :n] - fitted[:, n:])) / (2 * h)
    got = fit.caic()
    assert got["df"] == pytest.approx(1 + len(fit.phi) + trace, abs=2e-6)
    e = (d["y"] - fit.fitted()).to_numpy()
    R = fit.sigma**2 * block(fit.model.design.residual, fit.phi, np.ones(n), np.arange(n))
    given = stats.multivariate_normal(np.zeros(n), R).logpdf(e)
    assert got["loglik"] == pytest.approx(given, abs=1e-8)


def test_conditional_aic_of_a_marginal_model_is_its_aic() -> None:
    # the trace is p exactly: what φ̂ moves of Xβ̂ is orthogonal to the residuals
    fit = lmm.Model("y ~ x + arm", visits(), residual="un(visit | id)").fit(method="ML")
    got = fit.caic()
    assert got["df"] == pytest.approx(fit.n_params, abs=1e-8)
    assert got["caic"] == pytest.approx(fit.aic, abs=1e-7)


def test_residual_parameters_at_the_end_of_their_range_do_not_count() -> None:
    d = visits().sort_values(["id", "u"])
    rng, at = np.random.default_rng(3), d["u"].to_numpy()
    same = d["id"].to_numpy()[:, None] == d["id"].to_numpy()
    C = np.where(same, np.exp(-np.abs(at[:, None] - at) / 2), 0.0)
    d["y"] = np.linalg.cholesky(C) @ rng.normal(size=len(d))
    fit = lmm.Model("y ~ x", d, residual="spexp(u | id, nugget=True)").fit(method="ML")
    assert fit.residual_params()["nugget"] < 1e-6
    assert fit.caic()["df"] == pytest.approx(2 + 1 + 1, abs=1e-4)


# -- likelihood ratios beside residual structures -------------------------------------------------


def _projected(fit: lmm.Fit) -> tuple[np.ndarray, list[np.ndarray]]:
    """P and the derivatives of σ²R in (σ², φ) of a fit without random effects, dense."""
    r, n, h = fit.model.design.residual, fit.n_obs, 1e-5

    def R(phi: np.ndarray) -> np.ndarray:
        return fit.sigma**2 * block(r, phi, np.ones(n), np.arange(n))

    steps = h * np.eye(len(fit.phi))
    slopes = [(R(fit.phi + e) - R(fit.phi - e)) / (2 * h) for e in steps]
    V, X = R(fit.phi), fit.model.design.X
    inverse = np.linalg.inv(V)
    half = inverse @ X
    return inverse - half @ np.linalg.solve(X.T @ half, half.T), [V, *slopes]


@pytest.mark.filterwarnings("ignore::lmmjax.SingularFitWarning")
def test_the_cone_has_the_information_of_residual_parameters() -> None:
    d, residual = visits(), "ar1(visit | id) * varident(arm)"
    small = lmm.Model("y ~ x", d, residual=residual).fit()
    big = lmm.Model("y ~ x + (x || school)", d, residual=residual).fit()
    terms = big.model.design.terms
    P, slopes = _projected(small)
    G = [(t.codes[:, None] == t.codes) * np.outer(t.z[:, 0], t.z[:, 0]) for t in terms]
    G += slopes
    information = np.array([[0.5 * np.sum((P @ a) * (P @ b).T) for b in G] for a in G])
    dense = np.linalg.inv(information)[:2, :2]
    got = cone.cone_of(nesting.pair(small, big))
    assert got.blocks == (1, 1)
    correlation = got.cov[0, 1] / np.sqrt(got.cov[0, 0] * got.cov[1, 1])
    assert correlation == pytest.approx(dense[0, 1] / np.sqrt(dense[0, 0] * dense[1, 1]), abs=1e-8)

    # the spectral representation, of rows whitened by R(φ̂) of the first model
    one = lmm.Model("y ~ x + (1 | school)", d, residual=residual).fit()
    Z = np.eye(3)[terms[0].codes]
    mu = small.sigma**2 * np.linalg.eigvalsh(Z.T @ P @ Z)[1:]
    np.testing.assert_allclose(exact.spectrum(nesting.pair(small, one)).mu, mu, rtol=1e-9)
    drawn, half = (lmm.lrt(small, one, method=m, n=2000) for m in ("exact", "mixture"))
    assert "approximate" in drawn.note and drawn.mc_se > 0
    assert half.weights == {0: 0.5, 1: 0.5}


def test_a_nugget_under_test_is_a_half_line() -> None:
    d = visits()
    small, big = (
        lmm.Model("y ~ x", d, residual=f"spexp(u | id{more})").fit()
        for more in ("", ", nugget=True")
    )
    plain, half = (lmm.lrt(small, big, method=m) for m in ("chi2", "mixture"))
    assert "the nugget at an end" in plain.note
    assert half.weights == {0: 0.5, 1: 0.5}
    assert half.p_value == pytest.approx(0.5 * plain.p_value)
    independent = lmm.Model("y ~ x", d).fit()
    for other, words in ((big, "no meaning"), (small, "not multiples of the smallest")):
        with pytest.raises(lmm.ComparisonError, match=words):
            lmm.lrt(independent, other, method="mixture")

"""Type I error of the tests over 2,000 data sets each: nominal where theory says so."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import lmmjax as lmm
from lmmjax.inference import cone as cones
from lmmjax.inference import exact, nesting

pytestmark = pytest.mark.slow

N = 2000


def band(p: float, sides: float = 3.5) -> float:
    """Monte Carlo error of a share ``p`` of N."""
    return sides * float(np.sqrt(p * (1 - p) / N))


def frame(J: int, n: int) -> pd.DataFrame:
    """J groups of n rows; arms of groups, and a covariate within groups."""
    g = np.repeat(np.arange(J), n)
    arm, x = (g % 2).astype(float), np.tile(np.arange(n, dtype=float), J)
    return pd.DataFrame({"g": g.astype(str), "arm": arm, "x": x})


def responses(data: pd.DataFrame, sd: float, seed: int, slope: float = 0.0) -> np.ndarray:
    """Responses with random intercepts, and slopes, and no fixed effects: (rows, N)."""
    rng = np.random.default_rng(seed)
    codes = data["g"].astype(int).to_numpy()
    J = codes.max() + 1
    y = rng.normal(size=(len(data), N)) + sd * rng.normal(size=(J, N))[codes]
    x = data["x"].to_numpy() - data["x"].mean()
    return y + slope * rng.normal(size=(J, N))[codes] * x[:, None]


@functools.cache
def between() -> lmm.BatchFit:
    """Six groups in two arms: the effect of the arm has 4 degrees of freedom."""
    data = frame(6, 4)
    return lmm.fit_many("~ arm + (1 | g)", data, responses(data, 1.5, 1))


def rejections(p: pd.Series | np.ndarray) -> float:
    return float(np.mean(np.asarray(p) < 0.05))


def test_satterthwaite_is_nominal_in_a_balanced_design_and_wald_is_not() -> None:
    table = {df: between().coef_table(df) for df in ("satterthwaite", "wald", "residual")}
    p = {df: t[t["term"] == "arm"]["p_value"] for df, t in table.items()}
    assert rejections(p["satterthwaite"]) == pytest.approx(0.05, abs=band(0.05))
    assert rejections(p["wald"]) > 0.09
    assert rejections(p["residual"]) > 0.07


def test_kenward_roger_is_nominal_for_a_slope() -> None:
    data = frame(8, 5)
    batch = lmm.fit_many("~ x + (x | g)", data, responses(data, 1.0, 2, slope=0.7))
    p = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmm.SingularFitWarning)
        for i in range(N):
            p.append(batch[i].coef_table("kenward-roger").loc["x", "p_value"])
    assert rejections(np.array(p)) == pytest.approx(0.05, abs=band(0.05))


def test_ratios_at_the_boundary() -> None:
    """The naive test is conservative by half, the mixture less so, the exact test is nominal."""
    data = frame(20, 5)
    y = responses(data, 0.0, 3)
    big, small = (lmm.fit_many(f, data, y) for f in ("~ x + (1 | g)", "~ x"))
    statistic = 2 * (big.status["loglik"] - small.status["loglik"]).to_numpy()
    statistic = np.maximum(statistic, 0.0)
    null = exact.simulate(exact.spectrum(nesting.pair(small[0], big[0])), 200_000, seed=4)
    for quantile in (3.8415, 2.7055):  # of χ²(1) at 0.95 and at 0.90: the mixture's 0.95
        want = float(np.mean(null >= quantile))
        found = float(np.mean(statistic >= quantile))
        assert found == pytest.approx(want, abs=band(want))
    assert 0.010 < np.mean(statistic >= 3.8415) < 0.032
    assert 0.025 < np.mean(statistic >= 2.7055) < 0.05 + band(0.05)
    assert rejections(_tail(null, statistic)) == pytest.approx(0.05, abs=band(0.05))


def _tail(null: np.ndarray, statistic: np.ndarray) -> np.ndarray:
    ordered = np.sort(null)
    return 1 - np.searchsorted(ordered, statistic - 1e-9) / len(ordered)


def test_cr2_is_nominal_for_dependent_rows_and_the_linear_model_is_not() -> None:
    data = frame(20, 4)
    batch = lmm.fit_many("~ arm", data, responses(data, 1.0, 5))
    labels, p, plain = data["g"].to_numpy(), [], []
    for i in range(N):
        fit = batch[i]
        p.append(fit.coef_table(vcov="robust", group=labels).loc["arm", "p_value"])
        plain.append(fit.coef_table().loc["arm", "p_value"])
    assert rejections(np.array(p)) == pytest.approx(0.05, abs=band(0.05))
    assert rejections(np.array(plain)) > 0.15


def test_wald_tests_of_a_variance_do_not_exceed_their_level() -> None:
    data = frame(20, 5)
    batch = lmm.fit_many("~ 1 + (1 | g)", data, responses(data, 0.0, 6))
    p = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmm.SingularFitWarning)
        for i in range(N):
            p.append(batch[i].variance_tests()["p_value"][0])
    p = np.array(p)
    assert 0.4 < np.mean(np.isnan(p)) < 0.75  # on the boundary
    assert np.mean(p < 0.05) < 0.05 + band(0.05)


def test_mixture_of_two_variances_is_nominal() -> None:
    """``(x || g)`` against the linear model, weights by simulation; χ² with 2 df is conservative.

    The mixture is a limit in the number of groups, so a rate below 5 % is allowed for.
    """
    data = frame(40, 6)
    data["x"] -= data["x"].mean()
    y = responses(data, 0.0, 7)
    big, small = (lmm.fit_many(f, data, y) for f in ("~ x + (x || g)", "~ x"))
    statistic = 2 * (big.status["loglik"] - small.status["loglik"]).to_numpy()
    statistic = np.maximum(statistic, 0.0)
    tested = next(i for i in range(N) if statistic[i] > 2 and not big[i].singular)
    cone = cones.cone_of(nesting.pair(small[tested], big[tested]))
    p = np.array([cones.chi_bar(cone, s, 2000, 8).p_value for s in statistic])
    naive = stats.chi2.sf(statistic, 2)
    assert rejections(naive) < 0.05 - band(0.05)
    assert 0.03 < rejections(p) < 0.05 + band(0.05)


def test_parametric_bootstrap_of_the_ratio_is_nominal() -> None:
    """An effect of the arm in six groups, where χ² of the ML ratio rejects too often."""
    data, few, inner = frame(6, 4), 400, 199
    y = responses(data, 1.5, 9)[:, :few]
    big, small = (
        lmm.fit_many(f, data, y, method="ML") for f in ("~ arm + (1 | g)", "~ 1 + (1 | g)")
    )
    p, chi2 = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmm.SingularFitWarning)
        for i in range(few):
            pair = small[i], big[i]
            p.append(lmm.lrt(*pair, method="bootstrap", n=inner, seed=i).p_value)
            chi2.append(lmm.lrt(*pair).p_value)
    error = 3.5 * np.sqrt(0.05 * 0.95 / few)
    assert np.mean(np.array(p) <= 0.05 + 1e-9) == pytest.approx(0.05, abs=error)
    assert rejections(chi2) > 0.05 + error


@functools.cache
def three_arms() -> tuple[pd.DataFrame, lmm.BatchFit]:
    """Nine groups in three arms: F with 2 and 6 degrees of freedom."""
    data = frame(9, 4)
    data["arm"] = pd.Categorical(np.array(["a", "b", "c"])[data["g"].astype(int) % 3])
    return data, lmm.fit_many("~ arm + (1 | g)", data, responses(data, 1.5, 10))


def each(ask: Callable[[lmm.Fit], float], batch: lmm.BatchFit) -> np.ndarray:
    """One number of every fit of a batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmm.SingularFitWarning)
        return np.array([ask(batch[i]) for i in range(N)])


def test_f_of_several_rows_is_nominal() -> None:
    _, batch = three_arms()
    rates = {
        df: rejections(each(lambda f, d=df: f.anova(df=d).loc["arm", "p_value"], batch))
        for df in ("satterthwaite", "kenward-roger")
    }
    L = np.eye(3)[1:]
    rates["wald"] = rejections(each(lambda f: f.test(L, df="wald")["p_value"].item(), batch))
    assert rates["satterthwaite"] == pytest.approx(0.05, abs=band(0.05))
    assert rates["kenward-roger"] == pytest.approx(0.05, abs=band(0.05))
    assert rates["wald"] > 0.09


def test_robust_f_of_several_rows_does_not_exceed_its_level() -> None:
    """HTZ of two rows in 30 groups, a linear model on dependent rows; its plain F rejects often."""
    data = frame(30, 4)
    data["arm"] = pd.Categorical(np.array(["a", "b", "c"])[data["g"].astype(int) % 3])
    batch = lmm.fit_many("~ arm", data, responses(data, 1.0, 11))
    labels, L = data["g"].to_numpy(), np.eye(3)[1:]
    ask = lambda f: f.test(L, vcov="robust", group=labels)["p_value"].item()  # noqa: E731
    robust, plain = (
        rejections(each(ask, batch)),
        rejections(each(lambda f: f.test(L)["p_value"].item(), batch)),
    )
    assert 0.03 < robust < 0.05 + band(0.05)
    assert plain > 0.15


def test_tukey_keeps_the_familywise_error() -> None:
    """Any of the three pairs: nominal with Tukey, three chances without."""
    _, batch = three_arms()
    rates = {
        how: rejections(each(lambda f, h=how: f.contrasts("arm", adjust=h)["p_value"].min(), batch))
        for how in ("tukey", "none")
    }
    assert rates["tukey"] == pytest.approx(0.05, abs=band(0.05))
    assert rates["none"] > 0.09

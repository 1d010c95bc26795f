"""Single-step adjustment: against multcomp, Tukey's range, closed forms; notes of averages."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from reference_cases import REFERENCE
from scipy import stats

import lmmjax as lmm
from lmmjax.errors import LmmError
from lmmjax.inference import simultaneous


@pytest.fixture(scope="module")
def glht() -> dict[str, Any]:
    return json.loads((REFERENCE / "tests" / "mvt_glht.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def fits(glht: dict[str, Any]) -> dict[str, lmm.Fit]:
    warp = pd.DataFrame(glht["warpbreaks"])
    warp["tension"] = pd.Categorical(warp["tension"], ["L", "M", "H"])
    unbalanced = pd.DataFrame(glht["unbalanced"])
    return {
        "warpbreaks": lmm.Model("breaks ~ tension + wool", warp).fit(),
        "unbalanced": lmm.Model("y ~ dose + x", unbalanced).fit(),
    }


@pytest.mark.parametrize("data", ["warpbreaks", "unbalanced"])
def test_equal_to_multcomp(data: str, glht: dict[str, Any], fits: dict[str, lmm.Fit]) -> None:
    specs = {"warpbreaks": "tension", "unbalanced": "dose"}[data]
    dunnett = fits[data].contrasts(specs, method="control", adjust="dunnett")
    want = glht[f"{data}_dunnett"]
    assert list(dunnett["contrast"]) == want["labels"]
    np.testing.assert_allclose(dunnett["statistic"], want["statistic"], rtol=1e-9)
    room = 4 * (dunnett.attrs["mc_se"] + want["error"]) + 1e-6
    np.testing.assert_allclose(dunnett["p_value"], want["p_value"], atol=room)
    pairs = fits[data].contrasts(specs, method="pairwise", adjust="mvt")
    want = glht[f"{data}_tukey"]
    by_size = dict(zip(np.round(np.abs(want["statistic"]), 9), want["p_value"], strict=True))
    p = [by_size[t] for t in np.round(np.abs(pairs["statistic"]), 9)]
    room = 4 * (pairs.attrs["mc_se"] + want["error"]) + 1e-6
    assert room < 2e-4
    np.testing.assert_allclose(pairs["p_value"], p, atol=room)


@pytest.mark.parametrize("means", [3, 6])
def test_all_pairs_of_independent_means_are_tukeys_range(means: int) -> None:
    pairs = np.array([np.eye(means)[i] - np.eye(means)[j] for i in range(means) for j in range(i)])
    q = np.linspace(2.0, 6.0, len(pairs))
    df = np.full(len(pairs), 12.0)
    found = simultaneous.adjust(q / np.sqrt(2), df, pairs @ pairs.T)
    want = stats.studentized_range.sf(q, means, 12)
    np.testing.assert_allclose(found.p, want, atol=4 * found.mc_se + 1e-6, rtol=1e-4)


def test_independent_contrasts_have_the_product_and_one_contrast_its_own_p() -> None:
    t = np.array([1.0, 2.0, 3.0, 4.0])
    found = simultaneous.adjust(t, np.full(4, np.inf), np.eye(4))
    want = 1 - (1 - 2 * stats.norm.sf(t)) ** 4
    np.testing.assert_allclose(found.p, want, atol=4 * found.mc_se)
    assert 0 < found.mc_se < 2e-4
    one = simultaneous.adjust(np.array([-2.5]), np.array([7.3]), np.array([[4.0]]))
    assert one.p[0] == pytest.approx(2 * stats.t.sf(2.5, 7.3))
    assert one.mc_se == 0


def test_dunnetts_points() -> None:
    """5 % points of 3 treatments: qmvt(0.95, "both.tails", df, corr = (1 + I)/2), mvtnorm 1.1-3."""
    cov = 0.5 + 0.5 * np.eye(3)
    for df, point in ((10, 2.759072), (20, 2.540343), (60, 2.409901)):
        found = simultaneous.adjust(np.full(3, point), np.full(3, float(df)), cov)
        assert found.p[0] == pytest.approx(0.05, abs=4 * found.mc_se + 2e-5)


def test_the_seed_decides_and_families_are_checked(fits: dict[str, lmm.Fit]) -> None:
    fit = fits["unbalanced"]
    one, two, other = (
        fit.contrasts("dose", adjust="mvt", seed=seed)["p_value"] for seed in (1, 1, 2)
    )
    assert one.equals(two) and not one.equals(other)
    with pytest.raises(LmmError, match="with a control"):
        fit.contrasts("dose", adjust="dunnett")
    with pytest.raises(LmmError, match="all pairwise"):
        fit.contrasts("dose", method="control", adjust="tukey")


def test_averages_over_interactions_are_noted() -> None:
    data = lmm.load_dataset("Machines")
    data["run"] = np.arange(len(data)) % 2
    crossed = lmm.Model("score ~ Machine * factor(run) + (1 | Worker)", data).fit()
    plain = lmm.Model("score ~ Machine + factor(run) + (1 | Worker)", data).fit()
    assert "averaged over run, which interacts" in crossed.emmeans("Machine").attrs["note"]
    assert "note" in crossed.contrasts("Machine").attrs
    assert "note" not in crossed.emmeans("Machine", by="run").attrs
    assert "note" not in plain.emmeans("Machine").attrs


def test_the_covariate_of_a_trend_is_not_averaged_over() -> None:
    fit = lmm.Model("distance ~ Sex * age + (1 | Subject)", lmm.load_dataset("Orthodont")).fit()
    assert "note" not in fit.contrasts("Sex", trend="age").attrs
    assert "note" not in fit.emtrends("age", by="Sex").attrs
    assert "averaged over Sex, which interacts with age" in fit.emtrends("age").attrs["note"]
    assert "averaged over age, which interacts" in fit.contrasts("Sex").attrs["note"]


# -- simultaneous intervals -----------------------------------------------------------------------


def half_widths(table: pd.DataFrame) -> np.ndarray:
    middle = (table["ci_low"] + table["ci_high"]) / 2
    np.testing.assert_allclose(middle, table["estimate"], rtol=1e-9)
    return ((table["ci_high"] - table["ci_low"]) / (2 * table["std_error"])).to_numpy()


def test_intervals_of_each_adjustment(fits: dict[str, lmm.Fit]) -> None:
    fit = fits["unbalanced"]
    nu = float(fit.n_obs - len(fit.beta))
    k = fit.model.design.columns["dose"].nunique()
    pairs = k * (k - 1) // 2
    wanted = {
        "none": stats.t.ppf(0.95, nu),
        "tukey": stats.studentized_range.ppf(0.9, k, nu) / np.sqrt(2),
        "bonferroni": stats.t.ppf(1 - 0.05 / pairs, nu),
        "holm": stats.t.ppf(1 - 0.05 / pairs, nu),
        "bh": stats.t.ppf(1 - 0.05 / pairs, nu),
    }
    for adjust, c in wanted.items():
        table = fit.contrasts("dose", adjust=adjust, level=0.9)
        assert list(table.columns[-3:]) == ["p_value", "ci_low", "ci_high"]
        np.testing.assert_allclose(half_widths(table), c, rtol=1e-6)
        assert ("by Bonferroni" in table.attrs.get("note", "")) == (adjust in ("holm", "bh"))
    assert "ci_low" not in fit.contrasts("dose").columns
    with pytest.raises(LmmError, match="not a probability"):
        fit.contrasts("dose", level=95)


def test_equal_quantiles(fits: dict[str, lmm.Fit]) -> None:
    """qmvt(0.95, "both.tails", df = 50, corr = cov2cor(vcov(glht(f, mcp(tension = "Dunnett")))),
    algorithm = GenzBretz(maxpts = 5e5, abseps = 1e-6)) of mvtnorm 1.1-3 with multcomp 1.4-22."""
    table = fits["warpbreaks"].contrasts("tension", "control", "dunnett", level=0.95)
    np.testing.assert_allclose(half_widths(table), 2.276174, rtol=1e-6)
    cov = 0.5 + 0.5 * np.eye(3)
    for df, point in ((10, 2.759072), (20, 2.540343), (60, 2.409901)):  # as test_dunnetts_points
        found = simultaneous.quantile(np.array([df]), cov, 0.95)
        assert found[0] == pytest.approx(point, rel=3e-4)


@pytest.mark.parametrize("data", ["warpbreaks", "unbalanced"])
def test_an_interval_leaves_0_out_where_the_adjusted_p_is_small(
    data: str, fits: dict[str, lmm.Fit]
) -> None:
    specs = {"warpbreaks": "tension", "unbalanced": "dose"}[data]
    p = fits[data].contrasts(specs, adjust="mvt")["p_value"].sort_values().to_numpy()
    for alpha in (p[:-1] + p[1:]) / 2:
        if 1e-4 < alpha < 0.99:
            table = fits[data].contrasts(specs, adjust="mvt", level=1 - alpha)
            excludes = (table["ci_low"] > 0) | (table["ci_high"] < 0)
            assert (excludes == (table["p_value"] < alpha)).all()


def test_quantiles_are_the_inverse_of_the_adjusted_p() -> None:
    rng = np.random.default_rng(5)
    root = rng.normal(size=(5, 4))
    df = np.array([7.0, 7.0, 12.5, np.inf, 3.0])
    for level in (0.5, 0.9, 0.999):
        c = simultaneous.quantile(df, root @ root.T, level, seed=3)
        found = simultaneous.adjust(c, df, root @ root.T, seed=3)
        np.testing.assert_allclose(found.p, 1 - level, rtol=1e-6)
    one = simultaneous.quantile(np.array([9.0]), np.array([[4.0]]), 0.95)
    assert one[0] == pytest.approx(stats.t.ppf(0.975, 9))
    assert c[0] == c[1]


def test_intervals_go_by_family() -> None:
    data = lmm.load_dataset("Machines")
    data["run"] = np.arange(len(data)) % 2
    fit = lmm.Model("score ~ Machine * factor(run) + (1 | Worker)", data).fit()
    together = fit.contrasts("Machine", by="run", level=0.95)
    for run in ("0", "1"):
        alone = fit.contrasts("Machine", at={"run": int(run)}, level=0.95)
        part = together[together["run"] == run]
        limits = ["ci_low", "ci_high"]
        np.testing.assert_allclose(part[limits], alone[limits], rtol=1e-8)
        c = stats.studentized_range.ppf(0.95, 3, part["df"].iloc[0]) / np.sqrt(2)
        np.testing.assert_allclose(half_widths(part), c, rtol=1e-6)

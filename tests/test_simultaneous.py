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

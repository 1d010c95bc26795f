"""Simulation studies: measures, reproducibility, going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmjax as lmm
from lmmjax import cli, study
from lmmjax.study import COLUMNS, FitMethod, Scenario

GROUPS = pd.DataFrame({"g": pd.Categorical(np.repeat(list("abcdef"), 4)), "x": np.tile([0, 1], 12)})


def linear(n_rep: int = 700, seed: int = 0) -> lmm.Study:
    """A study that compiles one small program."""
    scenarios = [
        Scenario("one", "~ x", GROUPS, {"x": 0.0, "sigma": 2.0}),
        Scenario("two", "~ x", GROUPS, {"(Intercept)": 1.0, "x": 1.0}),
    ]
    return lmm.Study(scenarios, [FitMethod("LM"), FitMethod("LM, z", df="wald")], n_rep, seed)


def test_measures_by_hand() -> None:
    x = np.array([1.0, 2.0, 4.0, np.nan])
    se = np.array([1.0, 1.0, 2.0, np.nan])
    numbers = dict(
        zip(COLUMNS, (x, se, x - 2, x + 2, np.array([0.01, 0.2, 0.03, np.nan])), strict=True)
    )
    got = study.measures(numbers, 2.0, 0.05)
    sd = np.sqrt(7 / 3)
    assert got["bias"] == pytest.approx((1 / 3, sd / np.sqrt(3)))
    assert got["emp_se"] == pytest.approx((sd, sd / 2))
    squares = np.array([1.0, 0.0, 4.0])
    rmse = np.sqrt(5 / 3)
    error = np.sqrt(np.sum((squares - 5 / 3) ** 2) / 6) / (2 * rmse)
    assert got["rmse"] == pytest.approx((rmse, error))
    assert got["mod_se"] == pytest.approx((np.sqrt(2), np.sqrt(3 / (4 * 3 * 2))))
    ratio = np.sqrt(2) / sd
    expected = 100 * ratio * np.sqrt(3 / (4 * 3 * 4) + 1 / 4)
    assert got["rel_error_mod_se"] == pytest.approx((100 * (ratio - 1), expected))
    assert got["coverage"] == pytest.approx((1.0, 0.0))
    assert got["width"] == pytest.approx((4.0, 0.0))
    assert got["rejection"] == pytest.approx((2 / 3, np.sqrt(2 / 27)))


def test_known_answers_within_monte_carlo_error() -> None:
    table = linear(2000).performance().set_index(["scenario", "method", "parameter", "measure"])

    def off(*key: str, value: float) -> float:
        row = table.loc[key]
        return abs(row["value"] - value) / row["mcse"]

    assert off("one", "LM", "x", "bias", value=0.0) < 4
    assert off("one", "LM", "x", "emp_se", value=2 * 2 / np.sqrt(24)) < 4
    assert off("one", "LM", "x", "coverage", value=0.95) < 4
    assert off("one", "LM", "x", "rejection", value=0.05) < 4
    assert off("one", "LM", "var_Residual", "bias", value=0.0) < 4
    assert off("two", "LM", "(Intercept)", "bias", value=0.0) < 4
    assert (table["n_failed"] == 0).all()


def test_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    whole = linear().run().estimates
    run = linear().run(tmp_path)
    pd.testing.assert_frame_equal(run.estimates, whole)
    files = sorted(tmp_path.glob("*.parquet"))
    assert len(files) == 8
    files[1].unlink()
    files[6].unlink()
    pd.testing.assert_frame_equal(linear().run(tmp_path).estimates, whole)
    more = linear(900).run(tmp_path).estimates
    first = more[more["replicate"] < 700].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        first.sort_values(["scenario", "method", "replicate", "parameter"], ignore_index=True),
        whole.sort_values(["scenario", "method", "replicate", "parameter"], ignore_index=True),
    )
    with pytest.raises(lmm.DataError, match="another seed"):
        linear(seed=1).run(tmp_path)


def test_finished_blocks_are_read_not_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = linear().run(tmp_path).estimates

    def refuse(*args: Any) -> None:
        raise AssertionError("a finished block was fitted again")

    monkeypatch.setattr(FitMethod, "__call__", refuse)
    pd.testing.assert_frame_equal(linear().run(tmp_path).estimates, whole)


def test_mistakes_are_told() -> None:
    wrong = Scenario("wrong", "~ x + (1 | g)", GROUPS, {"sd_x|g": 1.0})
    with pytest.raises(lmm.DataError, match=r"names \['sd_x\|g'\]"):
        wrong.responses(np.random.default_rng(0), 2)
    with pytest.raises(lmm.DataError, match="all different"):
        lmm.Study([wrong], [FitMethod("a"), FitMethod("a")], 10)
    with pytest.raises(lmm.DataError, match="at least 2"):
        lmm.Study([wrong], [FitMethod("a")], 1)


def test_scenarios_draw_from_their_model() -> None:
    truth = {"sd_(Intercept)|g": 2.0, "sd_x|g": 1.0, "cor_x.(Intercept)|g": -0.5, "sigma": 0.5}
    scenario = Scenario("slopes", "~ x + (x | g)", GROUPS, truth)
    Y = scenario.responses(np.random.default_rng(0), 20000)
    D = np.array([[4.0, -1.0], [-1.0, 1.0]])
    Z = np.column_stack([np.ones(4), GROUPS["x"][:4]])
    expected = Z @ D @ Z.T + 0.25 * np.eye(4)
    np.testing.assert_allclose(np.cov(Y[:4]), expected, atol=0.25)
    assert abs(np.cov(Y[0], Y[4])[0, 1]) < 0.15


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["study", "clustering", "--reps", "200", "--out", str(tmp_path), "--json"]
    assert cli.main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    rejected = {
        row["method"]: row["value"]
        for row in record["performance"]
        if row["parameter"] == "between" and row["measure"] == "rejection"
    }
    assert rejected["LM"] > 0.15 > 2 * rejected["LMM, Satterthwaite"] - 0.05


@pytest.mark.slow
def test_bundled_studies_show_their_claims() -> None:
    def value(table: pd.DataFrame, *key: str) -> tuple[float, float]:
        row = table.set_index(["method", "parameter", "measure"]).loc[key]
        return float(row["value"]), float(row["mcse"])

    bias = lmm.studies.ml_bias(n_rep=10000).performance()
    ml, error = value(bias, "ML", "var_(Intercept)|g", "relative_bias")
    reml, _ = value(bias, "REML", "var_(Intercept)|g", "relative_bias")
    assert ml < -0.2 + 4 * error and abs(reml) < 0.02
    tests = lmm.studies.boundary(n_rep=4000).performance()
    naive, error = value(tests, "naive", "lrt", "rejection")
    mixture, _ = value(tests, "mixture", "lrt", "rejection")
    assert naive < 0.05 - 4 * error
    assert naive < mixture < 0.05 + 4 * error

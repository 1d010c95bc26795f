"""Simulation studies: measures, reproducibility, going on after a stop."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmjax as lmm
from lmmjax import cli, study
from lmmjax.stamp import stamp
from lmmjax.study import COLUMNS, FitMethod, LRTMethod, Scenario

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
    assert got["bias"] == pytest.approx((1 / 3, sd / np.sqrt(3), 3))
    assert got["emp_se"] == pytest.approx((sd, sd / 2, 3))
    squares = np.array([1.0, 0.0, 4.0])
    rmse = np.sqrt(5 / 3)
    error = np.sqrt(np.sum((squares - 5 / 3) ** 2) / 6) / (2 * rmse)
    assert got["rmse"] == pytest.approx((rmse, error, 3))
    assert got["mod_se"] == pytest.approx((np.sqrt(2), np.sqrt(3 / (4 * 3 * 2)), 3))
    ratio = np.sqrt(2) / sd
    expected = 100 * ratio * np.sqrt(3 / (4 * 3 * 4) + 1 / 4)
    assert got["rel_error_mod_se"] == pytest.approx((100 * (ratio - 1), expected, 3))
    assert got["coverage"] == pytest.approx((1.0, 0.0, 3))
    assert got["width"] == pytest.approx((4.0, 0.0, 3))
    assert got["rejection"] == pytest.approx((2 / 3, np.sqrt(2 / 27), 3))


def test_failures_are_counted_measure_by_measure() -> None:
    x = np.array([1.0, 2.0, 4.0, 5.0])
    numbers = {c: x.copy() for c in COLUMNS}
    numbers |= {"ci_low": x - 2, "ci_high": x + 2, "p_value": np.full(4, 0.01)}
    whole = study.measures({c: v[:3] for c, v in numbers.items()}, 2.0, 0.05)
    for c in ("std_error", "ci_low", "ci_high"):
        numbers[c][3] = np.inf
    got = study.measures(numbers, 2.0, 0.05)
    for name in ("mod_se", "coverage", "width"):
        assert got[name] == pytest.approx(whole[name])
    assert got["bias"][2] == got["rejection"][2] == 4


def test_a_cell_of_failures_has_a_row() -> None:
    def fails(scenario: Scenario, Y: np.ndarray) -> pd.DataFrame:
        return Mean()(scenario, np.full_like(Y, np.nan))

    fails.name = "fails"  # type: ignore[attr-defined]
    table = own(method=fails).performance()
    assert table[["measure", "n", "n_failed"]].to_numpy().tolist() == [["bias", 0, 10]]
    assert table["value"].isna().all()


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


def shifted(mean: float) -> Any:
    """Same source, another enclosed value."""
    return lambda rng, n: mean + rng.standard_normal((24, n))


SCALE = 1.0


def scaled(rng: np.random.Generator, n: int) -> np.ndarray:
    return SCALE * rng.standard_normal((24, n))


class Mean:
    """A method of the user's own, with a state."""

    name = "mean"

    def __init__(self, trim: float = 0.0) -> None:
        self.trim = trim

    def __call__(self, scenario: Scenario, Y: np.ndarray) -> pd.DataFrame:
        keep = np.sort(Y, axis=0)[int(self.trim * len(Y)) :]
        frame = {"replicate": np.arange(Y.shape[1]), "parameter": "m", "estimate": keep.mean(0)}
        return pd.DataFrame(frame).reindex(columns=["replicate", "parameter", *COLUMNS])


class Nothing:
    name = "nothing"

    def __call__(self, scenario: Scenario, Y: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame({"replicate": [0]})


def own(draw: Any = None, method: Any = None, data: Any = GROUPS) -> lmm.Study:
    scenario = Scenario("own", "~ 1", data, {"m": 0.0}, draw or shifted(0.0))
    return lmm.Study([scenario], [method or Mean()], 10)


def test_a_folder_knows_draws_methods_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = own().run(tmp_path / "a").estimates
    pd.testing.assert_frame_equal(own().run(tmp_path / "a").estimates, first)  # other objects
    with pytest.raises(lmm.DataError, match="another draw of scenario 'own'"):
        own(shifted(5.0)).run(tmp_path / "a")
    with pytest.raises(lmm.DataError, match="another method 'mean'"):
        own(method=Mean(0.1)).run(tmp_path / "a")
    own(scaled).run(tmp_path / "b")
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    with pytest.raises(lmm.DataError, match="another draw"):
        own(scaled).run(tmp_path / "b")
    changed = [GROUPS[["x", "g"]], GROUPS.rename(columns={"x": "z"}), GROUPS[::-1]]
    changed += [GROUPS.assign(g=GROUPS["g"].cat.reorder_categories(list("bacdef")))]
    for data in changed:
        with pytest.raises(lmm.DataError, match="another data of scenario 'own'"):
            own(data=data).run(tmp_path / "a")


def test_lambdas_of_one_line_differ() -> None:
    # fmt: off
    two = [lambda rng, n: 1 + rng.random((24, n)), lambda rng, n: 1 - rng.random((24, n))]
    # fmt: on
    assert stamp(two[0], "draw") != stamp(two[1], "draw")


def test_another_process_knows_methods_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_ones_own.py").write_text(
        "import numpy as np\nfrom lmmjax.stamp import stamp\n"
        "class Mine:\n"
        "    name = 'mine'\n"
        "    def __init__(self, f, a): self.f, self.a = f, a\n"
        "    def __call__(self, scenario, Y): return self.f(Y, self.a)\n"
        "def made(scale): return lambda Y, a: scale * np.mean(Y) + a\n"
        "TEXT = stamp(Mine(made(2.0), {1, 'b', 'c'}), 'method')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(Path(study.__file__).parent.parent)
    here = importlib.import_module("of_ones_own").TEXT
    call = [sys.executable, "-c", "import of_ones_own; print(of_ones_own.TEXT)"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2])}
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == here


def test_functions_without_source_ask_for_a_key(tmp_path: Path) -> None:
    space: dict[str, Any] = {}
    exec("def draw(rng, n): return rng.standard_normal((24, n))", space)
    with pytest.raises(lmm.DataError, match="attribute key"):
        own(space["draw"]).run(tmp_path)
    space["draw"].key = "1"
    own(space["draw"]).run(tmp_path)
    space["draw"].key = "2"
    with pytest.raises(lmm.DataError, match="another draw"):
        own(space["draw"]).run(tmp_path)


def test_mistakes_are_told() -> None:
    wrong = Scenario("wrong", "~ x + (1 | g)", GROUPS, {"sd_x|g": 1.0})
    with pytest.raises(lmm.DataError, match=r"names \['sd_x\|g'\]"):
        wrong.responses(np.random.default_rng(0), 2)
    with pytest.raises(lmm.DataError, match="all different"):
        lmm.Study([wrong], [FitMethod("a"), FitMethod("a")], 10)
    with pytest.raises(lmm.DataError, match="at least 2"):
        lmm.Study([wrong], [FitMethod("a")], 1)
    with pytest.raises(lmm.DataError, match="no name"):
        lmm.Study([wrong], [lambda scenario, Y: None], 10)
    with pytest.raises(lmm.DataError, match="expected a data frame with"):
        own(method=Nothing()).run()
    for seed in (-1, "a", 1.5):
        with pytest.raises(lmm.DataError, match="not a seed"):
            lmm.Study([wrong], [FitMethod("a")], 10, seed)  # type: ignore[arg-type]


def test_the_study_of_the_readme() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code = readme.split("## A study of your own")[1].split("```python\n")[1].split("```")[0]
    space: dict[str, Any] = {}
    exec(code, space)
    table = space["table"].set_index(["method", "parameter", "measure"])
    bias = table.loc[[("REML", "x", "bias"), ("slope of means", "x", "bias")], "value"]
    assert bias.iloc[0] == pytest.approx(bias.iloc[1], abs=1e-6)  # balanced: the same estimate


def test_invalid_likelihood_ratio_tests_are_refused() -> None:
    scenario = Scenario("one", "~ x + (1 | g)", GROUPS, {})
    Y = scenario.responses(np.random.default_rng(0), 2)
    with pytest.raises(lmm.ComparisonError, match="not comparable"):
        LRTMethod("a", "~ 1 + (1 | g)", "~ x + (1 | g)")(scenario, Y)
    LRTMethod("a", "~ 1", "~ x", method="ml")._check_fixed(GROUPS)
    with pytest.raises(lmm.LmmError, match="reference='nonsense' is unknown"):
        LRTMethod("a", "~ 1", "~ x", "nonsense")
    with pytest.raises(lmm.LmmError, match="method='RELM' is unknown"):
        LRTMethod("a", "~ 1", "~ x", method="relm")


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

"""The benchmark page's rules, without measuring anything."""

import json
import math

import pytest

from benchmarks import page, peers, problems
from benchmarks.adapters import harness


def result(objective: float, warm: float) -> dict:
    call = {"first": 1.0, "warm": warm, "runs": 3, "objective": objective}
    return {"frame": call, "peak_mb": 200.0, "loaded_mb": 100.0}


def test_a_fast_wrong_optimum_is_a_loss():
    found = {
        "lmmjax": result(100.0, 1.0),
        "quick": result(100.001, 0.1),
        "slow": result(100.0, 3.0),
    }
    best = page.best_objective(found)
    assert page._best_peer(found, "frame", best) == ("slow", 3.0)
    assert "**wrong optimum**" in page._row("quick", found["quick"], best)[7]
    assert "wrong" not in page._row("slow", found["slow"], best)[7]


def test_the_table_tells_why_there_is_no_figure():
    row = page._row("peer", {"wrong": "over 240 s"}, math.nan)
    assert row[:2] == ["peer", "over 240 s"]


@pytest.mark.parametrize(
    "value, text",
    [(0.00030632, "0.306 ms"), (0.0123, "12.3 ms"), (1.2245, "1.22 s"), (52.0, "52.0 s")],
)
def test_durations_have_three_digits(value, text):
    assert page.seconds(value) == text


def test_formulas_are_lme4s():
    found = {p.name: p.formula for p in problems.PROBLEMS}
    assert found["sleepstudy"] == "Reaction ~ Days + (Days | Subject)"
    assert found["insteval"] == "y ~ service + (1 | s) + (1 | d) + (1 | dept)"


def test_synthetic_data_have_every_level_and_a_fixed_seed():
    make = problems.ratings(5000, 300, 200, seed=2)
    data = make()
    assert (data["user"].nunique(), data["item"].nunique(), len(data)) == (300, 200, 5000)
    assert data.equals(make())
    grouped = problems.slopes(1000, 100, 5, seed=1)()
    assert list(grouped) == ["y", "x1", "x2", "x3", "x4", "g"] and grouped["g"].nunique() == 100


def test_a_library_that_is_missing_has_no_command(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    assert peers.LIBRARIES[1].command is None and peers.LIBRARIES[1].version == ""


def test_the_harness_repeats_and_reports(capsys, tmp_path, monkeypatch):
    problem = tmp_path / "problem.json"
    problem.write_text(json.dumps({"name": "none"}))
    monkeypatch.setattr("sys.argv", ["adapter", str(problem), "3"])
    harness.main(lambda p: harness.timings(p, lambda: 7.0, lambda: lambda: 7.0))
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert told["frame"]["objective"] == told["built"]["objective"] == 7.0
    assert 3 <= told["frame"]["runs"] <= 500 and told["peak_mb"] > 1


def test_what_a_library_lacks_is_told(capsys, tmp_path, monkeypatch):
    problem = tmp_path / "problem.json"
    problem.write_text(json.dumps({"terms": [1, 2]}))
    monkeypatch.setattr("sys.argv", ["adapter", str(problem), "3"])
    harness.main(harness.one_factor)
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert told == {"cannot": "one grouping factor only"}

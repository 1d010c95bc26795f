"""The command line: output, JSON, exit status, bad input."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import lmmjax as lmm
from lmmjax import cli

SLOPE = "Reaction ~ Days + (Days | Subject)"
DYESTUFF = ["Dyestuff", "Yield ~ 1 + (1 | Batch)"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a call in this process."""
    try:
        status = cli.main(arguments)
    except SystemExit as stop:  # argparse refuses by itself
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def record(capsys, *arguments: str) -> dict:
    status, out, _ = run(capsys, *arguments, "--json")
    assert status == 0
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# -- fit ------------------------------------------------------------------------------------------
def test_fit_prints_the_summary(capsys):
    status, out, err = run(capsys, "fit", *DYESTUFF)
    assert (status, err) == (0, "")
    assert out.startswith("Linear mixed model fit by REML\nFormula: Yield ~ 1 + (1 | Batch)")


def test_fit_json_has_every_key_in_full_precision(capsys):
    got = record(capsys, "fit", "sleepstudy", SLOPE)
    fit = lmm.Model(SLOPE, lmm.load_dataset("sleepstudy")).fit()
    scalars = "n_obs converged singular message loglik deviance aic bic sigma method".split()
    assert {name: got[name] for name in scalars} == {n: getattr(fit, n) for n in scalars}
    assert got["n_dropped"] == 0
    assert list(got["fixed"][0])[:6] == "name estimate std_error df statistic p_value".split()
    assert [row["estimate"] for row in got["fixed"]] == list(fit.beta)
    np.testing.assert_array_equal(got["vcov"], fit.vcov())
    (term,) = got["varcorr"]
    assert (term["group"], term["terms"]) == ("Subject", ["(Intercept)", "Days"])
    np.testing.assert_array_equal(term["sd"], fit.varcorr()["sdcor"][:2])
    rho = fit.varcorr()["sdcor"][2]
    np.testing.assert_array_equal(term["corr"], [[1, rho], [rho, 1]])
    assert got["residual"] == {}
    cell = got["ranef"]["Subject"]["308"]["Days"]
    assert cell == {
        "estimate": fit.ranef().loc["308", "Days"],
        "sd": fit.ranef_se().loc["308", "Days"],
    }
    assert set(got["timing"]) == {"import_s", "compile_s", "fit_s"}
    assert all(seconds >= 0 for seconds in got["timing"].values())


def test_information_of_kenward_roger(capsys):
    kr = ("--df", "kenward-roger", "--information")
    formula = "Reaction ~ Days + (Days || Subject)"
    fit = lmm.Model(formula, lmm.load_dataset("sleepstudy")).fit()
    for information in ("expected", "observed"):
        got = record(capsys, "fit", "sleepstudy", formula, *kr, information)
        want = fit.coef_table("kenward-roger", information=information)
        assert got["information"] == information
        assert [row["df"] for row in got["fixed"]] == pytest.approx(list(want["df"]), rel=1e-6)
    status, _, err = run(capsys, "fit", "sleepstudy", formula, *kr, "fisher")
    assert status == 2 and "expected 'expected'" in err


def test_method_df_weights_and_offset(capsys, tmp_path):
    data = lmm.load_dataset("sleepstudy").assign(w=lambda d: 1.0 + d["Days"], o=lambda d: d["Days"])
    path = tmp_path / "s.parquet"
    data.to_parquet(path)
    options = "--method ml --df wald --weights w --offset o".split()
    got = record(capsys, "fit", str(path), "Reaction ~ Days + (1 | Subject)", *options)
    fit = lmm.Model("Reaction ~ Days + (1 | Subject)", data, weights="w", offset="o").fit("ML")
    assert got["loglik"] == pytest.approx(fit.loglik, rel=1e-12)
    assert got["method"] == "ML"
    assert got["fixed"][0]["df"] is None  # infinite


def testknown_variances(capsys, tmp_path):
    path = tmp_path / "s.csv"
    data = lmm.load_dataset("sleepstudy").assign(v=lambda d: 1.0 / (1 + d["Days"]))
    data.to_csv(path, index=False)
    formula = "Reaction ~ Days + (1 | Subject)"
    got = record(capsys, "fit", str(path), formula, "--residual", "varfixed(v)")
    fit = lmm.Model(formula, data, residual="varfixed(v)").fit()
    assert got["loglik"] == pytest.approx(fit.loglik, rel=1e-12)


@pytest.fixture
def odd_orders(tmp_path) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    frame = pd.DataFrame({"dose": np.tile([10, 2, 1], 12), "g": np.repeat(list("abcd"), 9)})
    frame["text"] = np.tile(["z", "b", "a"], 12)
    frame["cat"] = pd.Categorical(frame["text"], categories=["z", "a", "b"])
    frame["y"] = rng.normal(size=36) + np.repeat([0, 3, 1, 5], 9)
    return frame


def names_of(capsys, path, formula, *options) -> list[str]:
    return [row["name"] for row in record(capsys, "fit", str(path), formula, *options)["fixed"]]


def test_level_orders(capsys, tmp_path, odd_orders):
    odd_orders.to_csv(tmp_path / "d.csv", index=False)
    odd_orders.to_parquet(tmp_path / "d.parquet")
    csv, parquet = tmp_path / "d.csv", tmp_path / "d.parquet"
    random = " + (1 | g)"
    assert names_of(capsys, csv, "y ~ text" + random) == ["(Intercept)", "textb", "textz"]
    assert names_of(capsys, csv, "y ~ dose" + random) == ["(Intercept)", "dose"]
    got = names_of(capsys, csv, "y ~ dose" + random, "--factors", "dose,g")
    assert got == ["(Intercept)", "dose2", "dose10"]
    assert names_of(capsys, parquet, "y ~ cat" + random) == ["(Intercept)", "cata", "catb"]
    got = names_of(capsys, parquet, "y ~ cat" + random, "--factors", "cat")
    assert got == ["(Intercept)", "cata", "catb"]


def test_a_linear_model_as_json(capsys):
    got = record(capsys, "fit", "sleepstudy", "Reaction ~ Days")
    assert got["varcorr"] == [] and got["ranef"] == {}
    assert got["fixed"][1]["df"] == 178


def test_a_singular_fit_is_done_but_told(capsys):
    status, out, err = run(capsys, "fit", "Dyestuff2", "Yield ~ 1 + (1 | Batch)")
    assert status == 0
    assert "SINGULAR FIT" in out
    assert err.startswith("lmmjax: SingularFitWarning: ") and err.count("\n") == 1


def test_no_convergence_is_status_1(capsys, monkeypatch):
    import dataclasses

    real = lmm.Model.fit
    stopped = {"converged": False}
    monkeypatch.setattr(
        lmm.Model, "fit", lambda *a, **k: dataclasses.replace(real(*a, **k), **stopped)
    )
    status, out, _ = run(capsys, "fit", *DYESTUFF)
    assert status == 1
    assert "NOT CONVERGED" in out
    status, out, _ = run(capsys, "fit", *DYESTUFF, "--json")
    assert status == 1
    assert json.loads(out)["converged"] is False


# -- bad input ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "nowhere.csv", "y ~ x"], "found no file 'nowhere.csv'"),
        (["fit", "sleepstud", SLOPE], "Did you mean 'sleepstudy'?"),
        (["fit", "sleepstudy", "Reaction ~ Dys + (1 | Subject)"], "Did you mean Days"),
        (["fit", "sleepstudy", "Reaction ~ (Days"], "never closed"),
        (["fit", "sleepstudy", SLOPE, "--df", "magic"], "df='magic' is unknown"),
        (["fit", "sleepstudy", SLOPE, "--weights", "nope"], "nope"),
        (["fit", "sleepstudy", SLOPE, "--factors", "nope"], "--factors names 'nope'"),
        (["fit", "sleepstudy", SLOPE, "--residual", "magic(1 | Subject)"], "magic"),
        (["compare", "sleepstudy", SLOPE, "--methods", "ml,magic"], "names 'magic'"),
        (["compare", "sleepstudy", SLOPE, "--methods", "ml", "--report", "."], "names a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fit", "sleepstudy"],
        ["fit", "sleepstudy", SLOPE, "--method", "magic"],
        ["fit", "sleepstudy", SLOPE, "--nope"],
        ["fit", "sleepstudy", SLOPE, "--factors", "a,,b"],
        ["nonsense"],
    ],
)
def test_bad_options_are_status_2(capsys, arguments):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert "error:" in err
    assert err.count("\n") == 1


def test_unreadable_files_are_told(capsys, tmp_path):
    (tmp_path / "a.parquet").write_text("not parquet")
    (tmp_path / "b.csv").write_text("")
    (tmp_path / "c.xyz").write_text("a,b\n1,2\n")
    for name, words in [
        ("a.parquet", "cannot be read as parquet"),
        ("b.csv", "cannot be read as csv"),
        ("c.xyz", "unknown type"),
        ("d.csv", "'b.csv'"),
    ]:
        status, _, err = run(capsys, "fit", str(tmp_path / name), "y ~ x")
        assert (status, err.count("\n")) == (2, 1)
        assert words in err


# -- compare --------------------------------------------------------------------------------------
def test_compare_json(capsys, tmp_path):
    report = tmp_path / "out" / "report.html"
    got = record(capsys, "compare", *DYESTUFF, "--methods", "ml,reml", "--report", str(report))
    assert [m["method"] for m in got["methods"]] == ["ML", "REML"]
    for one in got["methods"]:
        assert {"method", "fixed", "varcorr", "sigma", "seconds", "diagnostics"} <= set(one)
    # sigma of lmer(Yield ~ 1 + (1 | Batch), Dyestuff), lme4 1.1-31
    assert got["methods"][1]["sigma"] == pytest.approx(49.5101, abs=1e-4)
    cell = got["random_effects"]["Batch"]["A"]["(Intercept)"]["REML"]
    assert {"estimate", "sd", "low", "high", "rank", "shrinkage"} <= set(cell)
    assert report.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_compare_with_a_posterior(capsys):
    sizes = "--draws 200 --warmup 200 --chains 2 --seed 3".split()
    _, out, _ = run(capsys, "compare", *DYESTUFF, "--methods", "reml,nuts", *sizes, "--json")
    got = json.loads(out)
    assert [m["method"] for m in got["methods"]] == ["REML", "NUTS (marginal)"]
    assert got["methods"][1]["seconds"] > 0
    assert got["methods"][1]["diagnostics"]


def test_compare_prints(capsys):
    status, out, _ = run(capsys, "compare", *DYESTUFF, "--methods", "ml,reml")
    assert status == 0
    assert out.startswith("Comparison of ML and REML")


# -- the process ----------------------------------------------------------------------------------
def test_as_a_process(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    python_path = ":".join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-m", "lmmjax", "fit", *DYESTUFF, "--json"],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": python_path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n_obs"] == 30
    assert any((tmp_path / "lmmjax").iterdir())  # compiled programs are kept


def test_an_unwritable_cache_does_no_harm(capsys, monkeypatch, tmp_path):
    monkeypatch.undo()
    import jax

    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LMMJAX_CACHE", str(blocked / "cache"))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with cli._warnings_to_stderr():
            cli.use_cache()
            cli.use_cache()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert capsys.readouterr().err.count("cannot be written") == 1


@pytest.mark.parametrize("rows, light", [(180, True), (cli.FEW_ROWS, False)])
def test_a_small_fit_spares_the_compiler_its_optimisation(rows, light, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=2")
    cli._compile_lightly(SimpleNamespace(n_obs=rows))
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[-1] == "--xla_backend_optimization_level=2"
    assert (len(flags) == 3) == light

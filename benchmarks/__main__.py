"""Measure lmmjax and write docs/benchmarks.md: ``python -m benchmarks [--runs 5]``.

Each figure is a median over runs. Cold times are whole processes; compile times are first calls
less a warm one, in a fresh process each; warm times repeat the call in one process. The criterion
is recorded beside the time: a fast wrong optimum counts as a loss.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

CASES = {
    "sleepstudy": ("Reaction ~ Days + (Days | Subject)", "sleepstudy", "REML"),
    "Dyestuff": ("Yield ~ 1 + (1 | Batch)", "Dyestuff", "REML"),
    "Penicillin": ("diameter ~ 1 + (1 | plate) + (1 | sample)", "Penicillin", "REML"),
    "MathAchieve slope": ("MathAch ~ SES + (SES | School)", "MathAchieve", "REML"),
    "InstEval": ("y ~ service + (1 | s) + (1 | d) + (1 | dept)", "InstEval", "ML"),
}
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def median_seconds(call: Callable[[], Any], runs: int) -> float:
    """Median wall time of ``call`` over ``runs``."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def one_case(name: str, runs: int) -> dict[str, Any]:
    """First and warm times of one case in this process."""
    import lmmjax as lmm

    formula, data_name, method = CASES[name]
    data = lmm.load_dataset(data_name)
    build = median_seconds(lambda: lmm.Model(formula, data)._arrays(), 3)
    model = lmm.Model(formula, data)
    model._arrays()
    first = median_seconds(lambda: model.fit(method=method), 1)
    warm = median_seconds(lambda: model.fit(method=method), runs)
    fit = model.fit(method=method)
    tests = median_seconds(fit.coef_table, 1)
    return {
        "build": build,
        "compile": first - warm,
        "warm": warm,
        "tests": tests,
        "criterion": fit.deviance,
        "evaluations": fit.n_evals,
    }


def in_fresh_process(name: str, runs: int) -> dict[str, Any]:
    """Run :func:`one_case` in a process of its own, without a compilation cache."""
    env = {k: v for k, v in os.environ.items() if k not in ("LMMJAX_CACHE",)}
    command = [sys.executable, "-m", "benchmarks", "--case", name, "--runs", str(runs)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def cold(runs: int, cache: bool) -> float:
    """Median time of ``lmmjax fit sleepstudy`` as a whole process."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "LMMJAX_CACHE": folder}
        command = [sys.executable, "-m", "lmmjax", "fit", "sleepstudy", CASES["sleepstudy"][0]]

        def process() -> None:
            where = folder if cache else tempfile.mkdtemp(dir=folder)
            env["LMMJAX_CACHE"] = where
            subprocess.run(command, env=env, capture_output=True, check=True)

        if cache:
            process()
        return median_seconds(process, runs)


def report(rows: dict[str, dict[str, Any]], colds: dict[str, float]) -> str:
    """The page in Markdown."""
    packages = ", ".join(f"{p} {version(p)}" for p in ("lmmjax", "jax", "numpy"))
    lines = [
        "# Benchmarks",
        "",
        f"Made by `make bench` on {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {packages}. Medians; the machine was shared, so "
        "believe the ratios more than the seconds.",
        "",
        "| whole process | seconds |",
        "|---|---|",
        *(f"| {name} | {seconds:.2f} |" for name, seconds in colds.items()),
        "",
        "| case | build (ms) | compile (s) | warm fit (ms) | first Satterthwaite table (s) | "
        "evaluations | criterion |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        lines.append(
            f"| {name} | {1e3 * r['build']:.1f} | {r['compile']:.2f} | {1e3 * r['warm']:.2f} | "
            f"{r['tests']:.2f} | {r['evaluations']} | {r['criterion']:.6f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Run everything, or one case for the parent process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--case", choices=list(CASES))
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(one_case(args.case, args.runs)))
        return
    colds = {
        "`lmmjax fit sleepstudy`, empty cache": cold(args.runs, cache=False),
        "`lmmjax fit sleepstudy`, warm cache": cold(args.runs, cache=True),
    }
    rows = {name: in_fresh_process(name, args.runs) for name in CASES}
    PAGE.write_text(report(rows, colds))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()

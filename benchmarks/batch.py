"""Measure batches: ``python -m benchmarks.batch [--peer PYTHON] [--only NAME] [--large]``.

Every figure is a median of warm runs. ``--peer`` names a Python with ``lme-python`` installed; it
runs beside lmmjax, in turn, so that a busy machine slows both. The criterion of the two is
compared: a fast wrong optimum counts as a loss. Prints Markdown rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.measure import median_seconds

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks-batch.md"
HEAD = """# Benchmarks of batches

Made by `python -m benchmarks.batch` on {cores} cores. Medians of warm runs; the machine was shared,
so believe ratios and CPU seconds more than wall seconds.
"""

#: one process of the peer: prepared refit of every response, no degrees of freedom
PEER = """
import json, sys, time
import numpy as np, pandas as pd, lme_python
given = np.load(sys.argv[1])
data = pd.DataFrame({"y": given["Y"][:, 0], "x": given["x"], "g": given["g"].astype(str)})
prepared = lme_python.prepare_lmer("y ~ " + sys.argv[2], data)
Y = [np.ascontiguousarray(y) for y in given["Y"].T[: int(sys.argv[3])]]
prepared.fit(Y[0].tolist())
wall, cpu = time.perf_counter(), time.process_time()
fits = [prepared.fit(y.tolist()) for y in Y]
print(json.dumps({
    "wall": (time.perf_counter() - wall) / len(Y),
    "cpu": (time.process_time() - cpu) / len(Y),
    "criterion": [f.reml_criterion for f in fits[:50]],
}))
"""


def one_design(slopes: bool, m: int, n: int = 5000, J: int = 100, seed: int = 0) -> dict[str, Any]:
    """Rows in 100 groups of unequal size, one covariate, m responses."""
    rng = np.random.default_rng(seed)
    g = np.sort(rng.integers(0, J, n))
    x = rng.standard_normal(n)
    Y = rng.standard_normal((n, m)) + 0.6 * rng.standard_normal((J, m))[g] + 0.5 * x[:, None]
    if slopes:
        Y += 0.3 * x[:, None] * rng.standard_normal((J, m))[g]
    return {"x": x, "g": g, "Y": Y}


def responses(slopes: bool, peer: str | None, runs: int) -> str:
    """2,000 responses on one design, from Y to a frame with Satterthwaite's df, warm."""
    import lmmjax as lmm

    given = one_design(slopes, 2000)
    data = pd.DataFrame({"x": given["x"], "g": given["g"]})
    right = "x + (x | g)" if slopes else "x + (1 | g)"

    def ours() -> Any:
        made = lmm.fit_many(f"~ {right}", data, given["Y"])
        return made, made.coef_table()

    made, _ = ours()
    walls, cpus, theirs = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "given.npz"
        np.savez(file, **given)
        for _ in range(runs):
            wall, cpu = time.perf_counter(), time.process_time()
            ours()
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
            if peer:
                command = [peer, "-c", PEER, str(file), right, "200"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                theirs.append(json.loads(done.stdout))
    shown = right.replace("|", "\\|")
    name = f"2,000 responses, n = 5,000, {shown}"
    row = f"| {name} | {np.median(walls):.3f} s wall, {np.median(cpus):.3f} s CPU |"
    if not theirs:
        return row + " |"
    wall = 2000 * np.median([t["wall"] for t in theirs])
    cpu = 2000 * np.median([t["cpu"] for t in theirs])
    gap = np.array(theirs[0]["criterion"]) + 2 * made.loglik.to_numpy()[:50]
    ratio = f"x{wall / np.median(walls):.1f} wall, x{cpu / np.median(cpus):.1f} CPU"
    return (
        f"{row} lme-python {wall:.3f} s wall, {cpu:.3f} s CPU: {ratio}; its criterion less ours "
        f"{gap.min():.1e} to {gap.max():.1e} |"
    )


def groups(runs: int) -> str:
    """1,000 data sets of about 200 rows against a loop of single warm fits."""
    import lmmjax as lmm

    rng = np.random.default_rng(0)
    sizes = rng.integers(150, 250, 1000)
    k = np.repeat(np.arange(1000), sizes)
    g = rng.integers(0, 10, len(k))
    x = rng.standard_normal(len(k))
    y = rng.standard_normal((1000, 10))[k, g] + 0.5 * x + rng.standard_normal(len(k))
    data = pd.DataFrame({"y": y, "x": x, "g": g, "k": k})
    formula = "y ~ x + (1 | g)"
    made = lmm.fit_groups(formula, data, by="k")
    batch = median_seconds(lambda: lmm.fit_groups(formula, data, by="k").coef_table(), runs)
    some = [piece for _, piece in data[data["k"] < 40].groupby("k")]
    loop: Callable[[], Any] = lambda: [lmm.Model(formula, d).fit().coef_table() for d in some]  # noqa: E731
    singles = loop()
    single = 25 * median_seconds(loop, runs)
    gap = max(abs(made[i].loglik - made.loglik.iloc[i]) for i in range(5))
    return (
        f"| 1,000 data sets of about 200 rows | {batch:.3f} s | loop of single fits {single:.2f} s "
        f"(from {len(singles)}): x{single / batch:.0f}; log-likelihoods within {gap:.0e} |"
    )


def memory(runs: int) -> str:
    """20,000 responses from a stream of blocks: peak memory against 4,000."""
    import lmmjax as lmm

    given = one_design(False, 1000)
    data = pd.DataFrame({"x": given["x"], "g": given["g"]})

    def stream(blocks: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(1)
        for _ in range(blocks):
            yield given["Y"] + 0.1 * rng.standard_normal(given["Y"].shape)

    peak = []
    for blocks in (4, 20):
        began = time.perf_counter()
        lmm.fit_many("~ x + (1 | g)", data, stream(blocks)).coef_table()
        seconds = time.perf_counter() - began
        peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return (
        f"| 20,000 responses, streamed | {seconds:.2f} s | peak {peak[0]:.0f} MB at 4,000, "
        f"{peak[1]:.0f} MB at 20,000 |"
    )


def simulation(runs: int) -> str:
    """The bundled bias study and the bootstrap of sleepstudy."""
    import lmmjax as lmm

    run = lambda: lmm.studies.ml_bias(n_rep=10000).performance()  # noqa: E731
    run()
    study = median_seconds(run, runs)
    rows = [f"| studies.ml_bias(n_rep=10000) | {study:.2f} s | |"]
    for right in ("(1 | Subject)", "(Days | Subject)"):
        fit = lmm.Model(f"Reaction ~ Days + {right}", lmm.load_dataset("sleepstudy")).fit()
        fit.bootstrap(1000)
        seconds = median_seconds(lambda: fit.bootstrap(1000), runs)  # noqa: B023
        shown = right.replace("|", "\\|")
        rows.append(f"| bootstrap(1000) of sleepstudy, {shown} | {seconds:.4f} s | |")
    return "\n".join(rows)


def single_cell(runs: int, genes: int = 1000) -> str:
    """500,000 rows x 259 groups: cross-products and fits told apart, in blocks of genes."""
    import lmmjax as lmm
    from lmmjax import many

    rng = np.random.default_rng(0)
    n, J, block = 500_000, 259, 50
    g, x = np.sort(rng.integers(0, J, n)), rng.integers(0, 2, n).astype(float)
    data = pd.DataFrame({"x": x, "g": g})
    spent = {"products": 0.0}
    products = many.Responses.__call__

    def timed(self: Any, Y: np.ndarray) -> Any:
        began = time.perf_counter()
        made = products(self, Y)
        spent["products"] += time.perf_counter() - began
        return made

    made_up = {"seconds": 0.0}

    def stream() -> Iterator[np.ndarray]:
        for _ in range(genes // block):
            began = time.perf_counter()
            Y = rng.standard_normal((n, block)) + 0.3 * rng.standard_normal((J, block))[g]
            made_up["seconds"] += time.perf_counter() - began
            yield Y

    lmm.fit_many("~ x + (1 | g)", data, rng.standard_normal((n, block)))
    many.Responses.__call__ = timed  # type: ignore[method-assign]
    began = time.perf_counter()
    made = lmm.fit_many("~ x + (1 | g)", data, stream())
    total = time.perf_counter() - began - made_up["seconds"]
    many.Responses.__call__ = products  # type: ignore[method-assign]
    estimate = 11596 * total / len(made) / 60
    return (
        f"| 500,000 rows x 259 groups x {len(made)} responses | {total:.1f} s | products "
        f"{spent['products']:.1f} s, the rest {total - spent['products']:.1f} s; 11,596 genes "
        f"would take {estimate:.1f} minutes |"
    )


def main() -> None:
    """Print the rows of the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch")
    parser.add_argument("--peer", help="a Python with lme-python installed")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", help="one of the rows")
    args = parser.parse_args()
    rows: dict[str, Callable[[], str]] = {
        "intercept": lambda: responses(False, args.peer, args.runs),
        "slopes": lambda: responses(True, args.peer, args.runs),
        "memory": lambda: memory(args.runs),
        "groups": lambda: groups(args.runs),
        "simulation": lambda: simulation(args.runs),
        "single-cell": lambda: single_cell(args.runs),
    }
    lines = ["| case | lmmjax | against |", "|---|---|---|"]
    for name, row in rows.items():
        if args.only in (None, name):
            lines += row().splitlines()
            print(lines[-1], flush=True)
    if args.only is None:
        PAGE.write_text("\n".join([HEAD.format(cores=os.cpu_count()), *lines, ""]))


if __name__ == "__main__":
    main()

"""Measure batches: ``python -m benchmarks.batch [--only NAME]``.

Every figure is a median of warm runs. The libraries that refit one design with another response and
are installed (``python -m benchmarks.peers setup``; lme4 where R has it) run beside lmmjax, in
turn, so that a busy machine slows all. Criteria are compared: a fast wrong optimum counts as a
loss. Prints Markdown rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.measure import median_seconds
from benchmarks.page import hardware
from benchmarks.peers import LIBRARIES, Library

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks-batch.md"
HEAD = """# Benchmarks of batches

Made by `python -m benchmarks.batch` on {cores} cores. Medians of warm runs; the machine was shared,
so believe ratios and CPU seconds more than wall seconds. Peers run in turn with lmmjax, each on a
subset of the responses, scaled up; lmmjax's time includes Satterthwaite's degrees of freedom and
the table, theirs the refits alone. R is {r}.

{hardware}
"""

#: how each library refits, without degrees of freedom: what is made once, and a fit of one ``y``
REFITS = {
    "lme-python": """
import lme_python
prepared = lme_python.prepare_lmer("y ~ " + right, data.assign(g=data["g"].astype(str)))
fit = lambda y: prepared.fit(y.tolist()).reml_criterion
""",
    "glmm": """
import glmm
columns = {"x": data["x"].to_numpy(), "g": data["g"].astype(str).to_numpy()}
fit = lambda y: -2 * glmm.fit({**columns, "y": y}, "y ~ " + right, reml=True,
                              satterthwaite=False).loglik
""",
    "mixedlm-rs": """
import mixedlm_rs
slopes = "x" if "(x |" in right else None
model = mixedlm_rs.mixedlm("y ~ x", data, groups="g", re_formula="~" + (slopes or "1"))
fit = lambda y: -2 * model.with_endog(y).fit(reml=True).llf
""",
    "mixedlm": """
import mixedlm
fit = lambda y: mixedlm.lmer("y ~ " + right, data.assign(y=y)).REMLcrit()
""",
}

#: one process of a peer: every response once, after one to warm up
PEER = """
import json, sys, time, warnings
import numpy as np, pandas as pd
warnings.simplefilter("ignore")
given, right = np.load(sys.argv[1]), sys.argv[2]
data = pd.DataFrame({"y": given["Y"][:, 0], "x": given["x"], "g": given["g"]})
%s
Y = [np.ascontiguousarray(y) for y in given["Y"].T[: int(sys.argv[3])]]
fit(Y[0])
wall, cpu = time.perf_counter(), time.process_time()
criterion = [fit(y) for y in Y]
print(json.dumps({
    "wall": (time.perf_counter() - wall) / len(Y),
    "cpu": (time.process_time() - cpu) / len(Y),
    "criterion": criterion,
}))
"""

#: the same in R, from the model matrices on; refit() of lme4 1.1-31 ends 1.8 above lmer()'s REML
LME4 = """
suppressMessages(library(lme4)); options(warn = -1)
args <- commandArgs(TRUE); data <- read.csv(args[1]); data$g <- factor(data$g)
Y <- data[grep("^Y", names(data))]; data$y <- Y[[1]]
parts <- lFormula(as.formula(paste("y ~", args[2])), data)
fit <- function(y) {
  parts$fr$y <- y
  optimizeLmer(do.call(mkLmerDevfun, parts), calc.derivs = FALSE)$fval
}
fit(Y[[1]])
began <- proc.time()
criterion <- sapply(Y, fit)
spent <- (proc.time() - began) / length(Y)
cat(sprintf('{"wall": %.8f, "cpu": %.8f, "criterion": [%s]}', spent[["elapsed"]],
            spent[["user.self"]] + spent[["sys.self"]],
            paste(sprintf("%.10f", criterion), collapse = ",")))
"""

#: responses that a peer refits, of 2,000
SOME, SOME_LME4 = 100, 20


def refits(library: Library, folder: Path, right: str) -> dict[str, Any]:
    """Seconds a refit and the criteria, from a process of its own."""
    if library.name == "lme4":
        command = ["Rscript", "-e", LME4, str(folder / "given.csv"), right]
    else:
        python = str(library.folder / "bin/python")
        script = PEER % REFITS[library.name]
        command = [python, "-c", script, str(folder / "given.npz"), right, str(SOME)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def one_design(slopes: bool, m: int, n: int = 5000, J: int = 100, seed: int = 0) -> dict[str, Any]:
    """Rows in 100 groups of unequal size, one covariate, m responses."""
    rng = np.random.default_rng(seed)
    g = np.sort(rng.integers(0, J, n))
    x = rng.standard_normal(n)
    Y = rng.standard_normal((n, m)) + 0.6 * rng.standard_normal((J, m))[g] + 0.5 * x[:, None]
    if slopes:
        Y += 0.3 * x[:, None] * rng.standard_normal((J, m))[g]
    return {"x": x, "g": g, "Y": Y}


def responses(slopes: bool, runs: int) -> str:
    """2,000 responses on one design, from Y to a frame with Satterthwaite's df, warm."""
    import lmmjax as lmm

    given = one_design(slopes, 2000)
    data = pd.DataFrame({"x": given["x"], "g": given["g"]})
    right = "x + (x | g)" if slopes else "x + (1 | g)"

    def ours() -> Any:
        made = lmm.fit_many(f"~ {right}", data, given["Y"])
        return made, made.coef_table()

    made, _ = ours()
    walls, cpus = [], []
    peers = [p for p in LIBRARIES if (p.name in REFITS or p.name == "lme4") and p.version]
    theirs: dict[str, list[dict[str, Any]]] = {p.name: [] for p in peers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "given.npz", **given)
        some = {f"Y{k}": given["Y"][:, k] for k in range(SOME_LME4)}
        data.assign(**some).to_csv(folder / "given.csv", index=False)
        for _ in range(runs):
            wall, cpu = time.perf_counter(), time.process_time()
            ours()
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
            for peer in peers:
                theirs[peer.name].append(refits(peer, folder, right))
    shown = right.replace("|", "\\|")
    wall, cpu = float(np.median(walls)), float(np.median(cpus))
    first = f"| 2,000 responses, n = 5,000, {shown} | {wall:.3f} s wall, {cpu:.3f} s CPU |"
    best = -2 * made.loglik.to_numpy()
    rows = [_against(p, theirs[p.name], wall, cpu, best) for p in peers]
    return "\n".join([f"{first} {row} |" for row in rows or [""]])


def _against(
    peer: Library, found: list[dict[str, Any]], wall: float, cpu: float, best: np.ndarray
) -> str:
    """A peer's time for all 2,000 responses, and how far its optima are from ours."""
    name = f"{peer.name} {peer.version}"
    if "error" in found[0]:
        return f"{name}: {found[0]['error']}"
    their_wall, their_cpu = (2000 * np.median([t[k] for t in found]) for k in ("wall", "cpu"))
    criterion = np.array(found[0]["criterion"])
    gap = criterion - best[: len(criterion)]
    return (
        f"{name} {their_wall:.2f} s wall, {their_cpu:.2f} s CPU (from {len(criterion)}): "
        f"x{their_wall / wall:.0f} wall, x{their_cpu / cpu:.0f} CPU; its criterion less ours "
        f"{gap.min():.1e} to {gap.max():.1e}"
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
    data = lmm.load_dataset("sleepstudy")
    for right, residual in BOOTSTRAPS:
        fit = lmm.Model(f"Reaction ~ Days{right}", data, residual=residual).fit()
        fit.bootstrap(1000)
        seconds = median_seconds(lambda: fit.bootstrap(1000), runs)  # noqa: B023
        shown = f"{right or ' + no random effects'}"[3:] + (f", {residual}" if residual else "")
        shown = shown.replace("|", "\\|")
        rows.append(f"| bootstrap(1000) of sleepstudy, {shown} | {seconds:.4f} s |")
        rows[-1] += f" {bootmer(data, right, seconds)} |" if residual is None else " |"
    return "\n".join(rows)


#: random effects and residual structure of the models that are resampled
BOOTSTRAPS = (
    (" + (1 | Subject)", None),
    (" + (Days | Subject)", None),
    (" + (1 | Subject)", "ar1(Days | Subject)"),
    ("", "csh(Days | Subject)"),
)

#: bootMer of the same model, 50 simulations
BOOTMER = """
suppressMessages(library(lme4)); options(warn = -1)
args <- commandArgs(TRUE); data <- read.csv(args[1]); data$Subject <- factor(data$Subject)
fit <- lmer(as.formula(args[2]), data)
values <- function(f) c(fixef(f), sigma(f), as.data.frame(VarCorr(f))$sdcor)
began <- proc.time()[["elapsed"]]
boot <- bootMer(fit, values, nsim = 50, seed = 1)
cat((proc.time()[["elapsed"]] - began) / 50)
"""


def r_version() -> str:
    """The version of R, or that there is none."""
    call = ["Rscript", "-e", "cat(as.character(getRversion()))"]
    if shutil.which("Rscript") is None:
        return "not installed"
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout


def bootmer(data: pd.DataFrame, right: str, ours: float) -> str:
    """Seconds that lme4 would take for 1,000 simulations; empty where R lacks it."""
    lme4 = next(p for p in LIBRARIES if p.name == "lme4")
    if not lme4.version:
        return ""
    with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        data.to_csv(file.name, index=False)
        command = ["Rscript", "-e", BOOTMER, file.name, f"Reaction ~ Days{right}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = 1000 * float(done.stdout.strip().splitlines()[-1])
    return f"lme4 {lme4.version} bootMer {seconds:.1f} s (from 50): x{seconds / ours:.0f}"


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
        f"would take {estimate:.1f} minutes (FLASH-MM's authors report under 2 hours for theirs) |"
    )


def main() -> None:
    """Print the rows of the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", help="one of the rows")
    args = parser.parse_args()
    rows: dict[str, Callable[[], str]] = {
        "intercept": lambda: responses(False, args.runs),
        "slopes": lambda: responses(True, args.runs),
        "memory": lambda: memory(args.runs),
        "groups": lambda: groups(args.runs),
        "simulation": lambda: simulation(args.runs),
        "single-cell": lambda: single_cell(args.runs),
    }
    lines = ["| case | lmmjax | against |", "|---|---|---|"]
    for name, row in rows.items():
        if args.only in (None, name):
            lines += (made := row().splitlines())
            print("\n".join(made), flush=True)
    if args.only is None:
        PAGE.write_text(
            "\n".join(
                [HEAD.format(cores=os.cpu_count(), r=r_version(), hardware=hardware()), *lines, ""]
            )
        )


if __name__ == "__main__":
    main()

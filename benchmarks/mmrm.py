"""Unstructured MMRM: 1,000 subjects x 10 visits with missing visits, warm and cold.

    python -m benchmarks.mmrm [subjects] [visits]
    MMRM_GLS=1 python -m benchmarks.mmrm          # beside nlme::gls of Rscript: many minutes

Published times for a trial of this size: mmrm 3.4 s, glmmTMB 18.7 s, gls 164 s.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import pandas as pd

import lmmjax as lmm


def trial(subjects: int = 1000, visits: int = 10, seed: int = 0) -> pd.DataFrame:
    """A two-arm trial: 14 % of the visits missing, a covariate, correlated visits."""
    rng = np.random.default_rng(seed)
    subject = np.repeat(np.arange(subjects), visits)
    visit = np.tile(np.arange(visits), subjects)
    treated = rng.integers(2, size=subjects)[subject]
    baseline = rng.normal(size=subjects)[subject]
    mix = rng.normal(size=(visits, visits)) * 0.3 + np.eye(visits)
    noise = (rng.normal(size=(subjects, visits)) @ mix.T).ravel()
    data = pd.DataFrame(
        {
            "y": 10 + baseline + 0.3 * visit * treated + noise,
            "id": subject.astype(str),
            "visit": pd.Categorical.from_codes(visit, [f"V{k:02d}" for k in range(visits)]),
            "arm": np.where(treated, "drug", "placebo"),
            "baseline": baseline,
        }
    )
    return data[rng.uniform(size=len(data)) < 0.86].reset_index(drop=True)


def lmmjax_times(data: pd.DataFrame, repeats: int = 5) -> dict[str, float]:
    """Seconds: from table to fit, cold (with compilation) and warm; peak memory in MB."""
    out, cpu = [], []
    for _ in range(repeats + 1):
        began, used = time.perf_counter(), time.process_time()
        model = lmm.Model("y ~ arm * visit + baseline", data, residual="un(visit | id)")
        fit = model.fit()
        out.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    return {
        "rows": len(data),
        "-2 log restricted likelihood": fit.deviance,
        "evaluations": fit.n_evals,
        "cold s": out[0],
        "warm s": min(out[1:]),
        "warm CPU-s": min(cpu[1:]),
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


GLS = """
library(nlme)
d <- read.csv("{path}", stringsAsFactors = TRUE)
t <- system.time(f <- gls(y ~ arm * visit + baseline, d,
  correlation = corSymm(form = ~ as.integer(visit) | id), weights = varIdent(form = ~ 1 | visit)))
cat(-2 * as.numeric(logLik(f)), t[["elapsed"]])
"""


def gls_times(data: pd.DataFrame) -> dict[str, float]:
    """The same fit by nlme::gls."""
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        data.to_csv(file.name, index=False)
        run = subprocess.run(
            ["Rscript", "-e", GLS.format(path=file.name)],
            capture_output=True,
            text=True,
            check=True,
        )
    deviance, seconds = map(float, run.stdout.split())
    return {"-2 log restricted likelihood": deviance, "s": seconds}


def main() -> None:
    """Print the table."""
    data = trial(*map(int, sys.argv[1:3]))
    print(_line("lmmjax", lmmjax_times(data)))
    if os.environ.get("MMRM_GLS") and shutil.which("Rscript"):
        print(_line("nlme::gls", gls_times(data)))


def _line(name: str, figures: dict[str, float]) -> str:
    return f"{name}: " + ", ".join(f"{what} {value:.8g}" for what, value in figures.items())


if __name__ == "__main__":
    main()

"""Kenward-Roger for ``y ~ x + (x | g) + (1 | h)``: ``python -m benchmarks.kenward_roger``.

n/10 levels of g, 50 of h (crossed). Each size in a process of its own. "warm" is the time from a
fitted model to its table with Kenward-Roger degrees of freedom, compiled beforehand for this shape;
"first" is the same with compilation. For comparison pbkrtest 0.5.2 took 2.8 s at n = 500 and 74 s
at n = 2,000 on the same design.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

SIZES = (500, 2_000, 10_000, 1_000_000)
FORMULA = "y ~ x + (x | g) + (1 | h)"


def measure(n: int) -> dict[str, float]:
    """Times (s) and peak memory (MiB) at one size."""
    import numpy as np
    import pandas as pd

    import lmmjax as lmm

    rng = np.random.default_rng(1)
    g, h, x = np.arange(n) % (n // 10), rng.integers(0, 50, n), rng.normal(size=n)
    b = rng.normal(size=(n // 10, 2)) * [1.0, 0.5]
    y = 1 + 0.3 * x + b[g, 0] + b[g, 1] * x + rng.normal(size=50)[h] + rng.normal(size=n)
    frame = pd.DataFrame({"y": y, "x": x, "g": pd.Categorical(g), "h": pd.Categorical(h)})
    started = time.perf_counter()
    model = lmm.Model(FORMULA, frame)
    model._arrays()
    built = time.perf_counter()
    fit = model.fit()
    fitted = time.perf_counter()
    table = fit.coef_table(df="kenward-roger")
    first = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    again = model.fit()
    mark = time.perf_counter()
    again.coef_table(df="kenward-roger")
    warm = time.perf_counter() - mark
    return {
        "n": n,
        "build": built - started,
        "fit": fitted - built,
        "first": first - fitted,
        "warm": warm,
        "peak_MiB": before,
        "df_x": float(table.loc["x", "df"]),
    }


def main() -> None:
    """Print one line a size."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]))))
        return
    for n in SIZES:
        command = [sys.executable, "-m", "benchmarks.kenward_roger", str(n)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(done.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()

"""What all adapters share: read the problem, repeat a call, print the timings as JSON.

An adapter is one function ``adapter(problem) -> timings`` in a file of its own, run as

    python glmm.py PROBLEM.json RUNS

by the Python of the library's environment. Only the standard library, NumPy and pandas are used
here, since nothing else is in all the environments. ``frame`` goes from a data frame to a result
whose objective (-2 log-likelihood) has been read; ``built`` refits what the library can prepare
beforehand (a model object, columns already converted); None where it cannot.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

Problem = dict[str, Any]
Fit = Callable[[], float]

#: seconds to spend on the repeats of a call: short ones are repeated more often, long ones less
BUDGET = 20.0
ENOUGH = 1.0
#: a first call longer than this (s) is the figure: nothing is repeated, nothing else is measured
SLOW = 30.0


class CannotError(Exception):
    """The library does not offer what the problem needs; the message says what."""


def read(problem: Problem) -> Any:
    """The problem's data frame."""
    import pandas as pd

    return pd.read_parquet(problem["parquet"])


def correlated_slopes(problem: Problem) -> bool:
    """Whether a term has more than an intercept."""
    return any(term["columns"] for term in problem["terms"])


def one_factor(problem: Problem) -> tuple[str, str]:
    """Group and ``re_formula`` of a model with one term, for statsmodels' way of saying it."""
    if len(problem["terms"]) != 1:
        raise CannotError("one grouping factor only")
    term = problem["terms"][0]
    return term["group"], "~" + " + ".join(["1", *term["columns"]])


def repeat(call: Fit, runs: int) -> dict[str, Any]:
    """First call, then the median of the warm ones, with the objective of the last.

    Wall times; beside them the median of the processor's time, which other work on the machine
    disturbs less. ``runs=0`` asks for the first call alone: the process is what is timed.
    """
    start = time.perf_counter()
    objective = call()
    first = time.perf_counter() - start
    if runs == 0:
        return {"first": first, "runs": 0, "objective": float(objective)}
    if first > SLOW:
        return {"first": first, "warm": first, "runs": 1, "objective": float(objective)}
    times: list[float] = []
    cpu: list[float] = []
    while not times or (len(times) < _wanted(times[0], runs) and sum(times) + times[-1] < BUDGET):
        start, used = time.perf_counter(), time.process_time()
        objective = call()
        times.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    warm, busy = statistics.median(times), statistics.median(cpu)
    return {
        "first": first,
        "warm": warm,
        "cpu": busy,
        "runs": len(times),
        "objective": float(objective),
    }


def _wanted(seconds: float, runs: int) -> int:
    return max(runs, min(500, int(ENOUGH / max(seconds, 1e-9))))


def timings(problem: Problem, frame: Fit, prepare: Callable[[], Fit] | None) -> dict[str, Any]:
    """Both figures of a library on a problem; the memory is that after the calls on frames."""
    before = peak_megabytes()
    out: dict[str, Any] = {"frame": repeat(frame, problem["runs"])}
    out |= {"peak_mb": peak_megabytes(), "loaded_mb": before}
    if prepare is not None and problem["runs"] and out["frame"]["first"] <= SLOW:
        out["built"] = repeat(prepare(), problem["runs"])
    return out


def peak_megabytes() -> float:
    """Peak resident memory of this process, its imports included (MB)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def main(adapter: Callable[[Problem], Any]) -> None:
    """Run the adapter on the problem named on the command line."""
    warnings.simplefilter("ignore")
    problem = {**json.loads(Path(sys.argv[1]).read_text()), "runs": int(sys.argv[2])}
    try:
        result = adapter(problem)
    except CannotError as reason:
        result = {"cannot": str(reason)}
    print("\n" + json.dumps(result))

"""Run a library on a problem in a process of its own: one core, one thread, a time limit.

Results are kept under ``.bench/results`` as JSON, so that the page can be made again, or one
library measured again, without the rest.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers import LIBRARIES, Library
from benchmarks.problems import FOLDER, Problem

#: seconds for a library to read a problem and do all its calls on it
LIMIT = 240.0
ROOT = Path(__file__).parent.parent
THREADS = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "POLARS_MAX_THREADS",
)

Result = dict[str, Any]


def median_seconds(call: Callable[[], Any], runs: int) -> float:
    """Median wall time of ``call`` over ``runs``, in this process."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def environment() -> dict[str, str]:
    """One thread everywhere, no compilation cache, this checkout's lmmjax."""
    kept = {k: v for k, v in os.environ.items() if "CACHE" not in k and k != "PYTHONPATH"}
    return {
        **kept,
        **dict.fromkeys(THREADS, "1"),
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    }


def pinned(command: list[str], limit: float, core: int, **env: str) -> tuple[str, str]:
    """Run on one core; returns standard output and what went wrong, if anything."""
    process = subprocess.Popen(
        command,
        env={**environment(), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "", f"over {limit:.0f} s"
    if process.returncode:
        last = err.strip().splitlines()[-1] if err.strip() else "no message"
        return "", f"failed with status {process.returncode}: {last[:160]}"
    return out, ""


def measure(library: Library, problem: Problem, runs: int, core: int, limit: float) -> Result:
    """Timings of one library on one problem, or why there are none."""
    command = library.command
    if command is None:
        return {"cannot": "not installed"}
    description = problem.write()
    if library.name == "lme4":
        description = description.with_suffix(".dcf")
    own = {"PYTHONPATH": str(ROOT)} if library.name == "lmmjax" else {}
    out, wrong = pinned([*command, str(description), str(runs)], limit, core, **own)
    return {"wrong": wrong} if wrong else json.loads(out.strip().splitlines()[-1])


def kept(library: Library, problem: Problem) -> Path:
    """Where a result is kept."""
    return FOLDER / "results" / f"{problem.name}-{library.name}.json"


def results(problem: Problem) -> dict[str, Result]:
    """What has been measured of a problem, by library."""
    found = {}
    for library in LIBRARIES:
        path = kept(library, problem)
        if path.exists():
            found[library.name] = json.loads(path.read_text())
    return found


def record(library: Library, problem: Problem, runs: int, core: int, limit: float) -> Result:
    """Measure and keep."""
    result = measure(library, problem, runs, core, limit)
    path = kept(library, problem)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return result


# -------------------------------------------------------------------------------------------------
# Whole processes
# -------------------------------------------------------------------------------------------------


def _seconds(command: list[str], core: int, **env: str) -> float:
    start = time.perf_counter()
    _, wrong = pinned(command, LIMIT, core, **env)
    if wrong:
        raise RuntimeError(f"{' '.join(command)}: {wrong}")
    return time.perf_counter() - start


def cold_lmmjax(formula: str, runs: int, core: int) -> dict[str, float]:
    """Median time of ``lmmjax fit sleepstudy`` as a process, cache empty and filled."""
    command = [sys.executable, "-m", "lmmjax", "fit", "sleepstudy", formula]
    times: dict[str, list[float]] = {"first ever": [], "with cache": []}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            for key in times:
                env = {"LMMJAX_CACHE": folder, "PYTHONPATH": str(ROOT)}
                times[key].append(_seconds(command, core, **env))
    return {key: statistics.median(t) for key, t in times.items()}


def cold_peer(library: Library, problem: Problem, runs: int, core: int) -> float | None:
    """Median time of a process that imports the library, reads the table and fits once."""
    command = library.command
    if command is None:
        return None
    suffix = ".dcf" if library.name == "lme4" else ".json"
    description = str(problem.write().with_suffix(suffix))
    return statistics.median(_seconds([*command, description, "0"], core) for _ in range(runs))

"""BLAS threads or one, alone and beside a busy process: ``python -m benchmarks.threads``.

Each configuration is a process of its own: BLAS threads as OpenBLAS chooses them, or one, set by
threadpoolctl; alone, or beside a process that keeps one core busy. Two measures: lmmjax's fit of
InstEval, whose own limit of one thread is taken out for the first configuration, and the linear
algebra that dominates it, Cholesky factor and inverse of the 1,142-square dense core by LAPACK.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CASES = ("core", "fit")
BUSY = "while True: pass"


def _core() -> Callable[[], Any]:
    """Cholesky factor and inverse of a dense positive definite matrix of InstEval's size."""
    import numpy as np
    from scipy.linalg import lapack

    rng = np.random.default_rng(0)
    root = rng.normal(size=(1142, 1142))
    matrix = np.asfortranarray(root @ root.T + 1142 * np.eye(1142))

    def work() -> Any:
        factor, info = lapack.dpotrf(matrix, lower=1)
        if info:
            raise ArithmeticError("the test matrix is not positive definite")
        return lapack.dpotri(factor, lower=1)

    return work


def _fit() -> Callable[[], Any]:
    import lmmjax as lmm

    formula = "y ~ service + (1 | s) + (1 | d) + (1 | dept)"
    model = lmm.Model(formula, lmm.load_dataset("InstEval"))
    return lambda: model.fit(method="ML").deviance


class _NoLimit:
    """In place of lmmjax's limit: leaves the threads as they are."""

    def limit(self, **_: Any) -> _NoLimit:
        return self

    def restore_original_limits(self) -> None:
        pass


def child(case: str, single: bool, runs: int) -> float:
    """Median time of a warm call in this process."""
    from threadpoolctl import threadpool_limits

    from lmmjax import threads

    if not single:
        threads._controller = _NoLimit  # type: ignore[assignment]
    work = {"core": _core, "fit": _fit}[case]()
    times = []
    with threadpool_limits(limits=1 if single else None):
        work()
        for _ in range(runs):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextmanager
def _busy(wanted: bool) -> Iterator[None]:
    """A process that occupies one core for the length of the block."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(runs: int = 5) -> list[dict[str, Any]]:
    """All configurations."""
    env = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    rows = []
    for case in CASES:
        for busy in (False, True):
            row: dict[str, Any] = {"case": case, "busy": busy}
            for single in (False, True):
                command = [sys.executable, "-m", "benchmarks.threads", "--child", case]
                command += ["--runs", str(runs), *(["--single"] if single else [])]
                with _busy(busy):
                    done = subprocess.run(command, env=env, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(done.stderr)
                row["single" if single else "default"] = json.loads(done.stdout)
            rows.append(row)
    return rows


def section(rows: list[dict[str, Any]] | None) -> list[str]:
    """The part of the page, empty where nothing was measured."""
    if not rows:
        return []
    from benchmarks.page import seconds, table

    what = {"core": "Cholesky and inverse, 1,142 square, LAPACK", "fit": "InstEval, warm fit, ML"}
    cells = [
        [
            what[r["case"]],
            "one busy process" if r["busy"] else "nothing else",
            seconds(r["default"]),
            seconds(r["single"]),
            f"{r['default'] / r['single']:.2f}",
        ]
        for r in rows
    ]
    head = ["work", "beside it", "BLAS threads by default", "one BLAS thread", "ratio"]
    return [
        "## BLAS threads",
        "",
        f"On all {os.cpu_count()} cores, not pinned.",
        "",
        *table(head, cells),
    ]


def main() -> None:
    """Print the table, or measure one configuration for the parent process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--child", choices=CASES)
    parser.add_argument("--single", action="store_true")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.single, options.runs)))
    else:
        print("\n".join(section(measure(options.runs))))


if __name__ == "__main__":
    main()

"""Measure lmmjax and its peers and write docs/benchmarks.md: ``python -m benchmarks [--runs 5]``.

Everything by default; ``--only``, ``--libraries`` and ``--sections`` measure a part again and make
the page from that and from what was kept of the rest (``--sections`` alone measures nothing).
``python -m benchmarks.peers setup`` makes the peers' environments.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

from benchmarks import iterative, measure, page, threads
from benchmarks.peers import LIBRARIES, Library
from benchmarks.problems import FOLDER, GROWTH, PROBLEMS, Problem, every

#: further scripts of this folder, whose output is quoted as it is: heading, arguments
SCRIPTS = {
    "large": ("Larger than memory", ("--rows", "20000000")),
    "kenward_roger": ("Kenward-Roger", ()),
    "profile": ("Profile likelihood", ()),
    "mmrm": ("Unstructured MMRM, 1,000 subjects x 10 visits", ()),
}
SECTIONS = ("problems", "growth", "cold", "threads", "iterative", *SCRIPTS)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    add = parser.add_argument
    add("--runs", type=int, default=5, help="calls a median is of")
    add("--limit", type=float, default=measure.LIMIT, help="seconds per library and problem")
    add("--core", type=int, default=(os.cpu_count() or 1) - 1, help="core to pin to")
    add("--only", nargs="*", metavar="PROBLEM", choices=list(every()), help="problems to measure")
    add("--libraries", nargs="*", metavar="NAME", help="libraries to measure (default all)")
    add("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    return parser.parse_args()


def _compare(problems: list[Problem], libraries: list[Library], options: Any) -> None:
    for problem in problems:
        for library in libraries:
            result = measure.record(library, problem, options.runs, options.core, options.limit)
            told = page.seconds(page.figure(result, "frame")) or result.get("wrong") or "cannot"
            print(f"{problem.name:14s} {library.name:12s} {told}", file=sys.stderr, flush=True)


def _cold(libraries: list[Library], options: Any) -> dict[str, float | None]:
    sleepstudy = every()["sleepstudy"]
    times: dict[str, float | None] = {}
    for name, value in measure.cold_lmmjax(sleepstudy.formula, options.runs, options.core).items():
        times[f"`lmmjax fit sleepstudy ...`, {name}"] = value
    for library in libraries:
        if library.name not in ("lmmjax", "gpboost"):
            times[library.name] = measure.cold_peer(library, sleepstudy, options.runs, options.core)
    return times


def _iterative(core: int) -> Any:
    """The prototype in a process of its own, pinned as all the others."""
    command = [sys.executable, "-m", "benchmarks.iterative", "--json"]
    out, wrong = measure.pinned(command, 1800.0, core, PYTHONPATH=str(measure.ROOT))
    if wrong:
        raise RuntimeError(f"benchmarks.iterative: {wrong}")
    return json.loads(out.strip().splitlines()[-1])


def _script(name: str) -> list[str] | None:
    """The output of a further script as a section; None where this checkout has no such script."""
    heading, arguments = SCRIPTS[name]
    if importlib.util.find_spec(f"benchmarks.{name}") is None:
        return None
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = done.stdout.strip()
    if done.returncode:
        told = f"failed with status {done.returncode}: {done.stderr.strip().splitlines()[-1][:160]}"
    said = " ".join(command[2:])
    return [f"## {heading}", "", f"`python -m {said}`", "", "```", told, "```", ""]


def _kept(name: str, make: Any, wanted: bool) -> Any:
    """Measure anew where wanted, else what was kept of an earlier run."""
    path = FOLDER / "results" / f"{name}.json"
    if wanted:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text()) if path.exists() else None


def main() -> None:
    """Measure what is asked for, then write the page."""
    options = _options()
    libraries = [lib for lib in LIBRARIES if not options.libraries or lib.name in options.libraries]
    chosen = lambda ps: [p for p in ps if options.only is None or p.name in options.only]  # noqa: E731
    if "problems" in options.sections:
        _compare(chosen(PROBLEMS), libraries, options)
    if "growth" in options.sections:
        _compare(chosen([p for _, *pair in GROWTH for p in pair]), libraries, options)
    wanted = options.sections
    cold = _kept("cold", lambda: _cold(libraries, options), "cold" in wanted) or {}
    beside = _kept("threads", lambda: threads.measure(options.runs), "threads" in wanted)
    stochastic = _kept("iterative", lambda: _iterative(options.core), "iterative" in wanted)
    more = [threads.section(beside), iterative.section(stochastic)]
    more += [_kept(name, lambda n=name: _script(n), name in wanted) for name in SCRIPTS]
    page.PAGE.write_text(page.page(cold, [section for section in more if section]))
    print(f"wrote {page.PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()

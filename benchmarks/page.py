"""The page: what was measured, as Markdown tables."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Result, results
from benchmarks.peers import LIBRARIES
from benchmarks.problems import GROWTH, PROBLEMS, Problem

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
#: a criterion further than this above the best one found is a wrong optimum (relative)
WRONG = 1e-6

#: what is aimed at: ratios of the best peer's time to ours, and absolute bounds
TARGETS = {
    "sleepstudy": "built 2",
    "mathachieve": "built 2",
    "insteval": "built 2.5, frame 1.3",
    "million": "frame 3, memory 600 MB",
    "crossed": "frame within 60 s",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table with an empty line after it."""
    line = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    return [line(head), "|" + "---|" * len(head), *map(line, rows), ""]


def seconds(value: float | None) -> str:
    """A duration with three digits and a unit."""
    if value is None or math.isnan(value):
        return ""
    unit, factor = ("s", 1.0) if value >= 1 else ("ms", 1e3)
    digits = max(0, 2 - math.floor(math.log10(value * factor)))
    return f"{value * factor:.{digits}f} {unit}"


def figure(result: Result, call: str, key: str = "warm") -> float | None:
    """One figure of a result, None where there is none."""
    return result.get(call, {}).get(key)


def best_objective(found: dict[str, Result]) -> float:
    """The lowest criterion that any library found."""
    return min((r["frame"]["objective"] for r in found.values() if "frame" in r), default=math.nan)


def excess(result: Result, best: float) -> float:
    """How far above the best criterion, relative; the worse of the two calls."""
    calls = [result[c]["objective"] for c in ("frame", "built") if c in result]
    return max((value - best) / abs(best) for value in calls)


# -------------------------------------------------------------------------------------------------
# Sections
# -------------------------------------------------------------------------------------------------


def hardware() -> str:
    """Processor, memory, system, Python, and what lmmjax stands on."""
    from importlib.metadata import version

    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    ours = ", ".join(f"{name} {version(name)}" for name in ("jax", "numpy", "scipy"))
    return (
        f"Machine: {model[1] if model else platform.processor()}, {os.cpu_count()} cores, "
        f"{memory:.0f} GB; {platform.system()} {platform.release()}; Python "
        f"{platform.python_version()}; lmmjax on {ours}."
    )


def machine() -> list[str]:
    """Where, with what, and how."""
    versions = ", ".join(f"{lib.name} {lib.version or '(not installed)'}" for lib in LIBRARIES)
    return [
        "# Benchmarks",
        "",
        "Made by `make bench`. Every library runs in an environment of its own, in a process of "
        "its own, pinned to one core, with one thread for BLAS, OpenMP and Rayon. Medians of warm "
        "calls. A library that has not finished all its calls on a problem within a limit is said "
        "to be over it; a first call longer than 30 s is not repeated.",
        "",
        f"{hardware()} Versions: {versions}. Load average when "
        f"this page was written: {os.getloadavg()[1]:.1f} (above 1.5 the machine was shared: trust "
        "processor times and ratios of neighbouring rows). All figures are of a CPU: no "
        "accelerator was at hand; that every compiled function lowers for CUDA is tested.",
        "",
        "*From frame* goes from formula and data frame to a result whose criterion has been read. "
        "*Built* refits what the library can prepare beforehand: a model object (lmmjax, "
        "mixedlm-rs, statsmodels, lme-python), model matrices (lme4), plain columns (glmm). "
        "*First* is the first call of a process, compilation included. Peers that offer a pass "
        "for degrees of freedom or standard errors of variances, to be left out, run without it. "
        "*(CPU)* is the processor's time of the same calls, which other work disturbs less. "
        "*Criterion* is -2 log-likelihood (REML or ML); a "
        f"relative excess over the best above {WRONG:.0e} is a wrong optimum and counts as a loss. "
        "*Memory* is the peak of the process, in brackets what imports and data had taken before.",
        "",
        *_pointers(),
    ]


def _pointers() -> list[str]:
    """Other pages of figures, where they have been made."""
    pages = {"benchmarks-batch.md": "batches", "accuracy.md": "digits"}
    there = [f"[{text}]({name})" for name, text in pages.items() if (PAGE.parent / name).exists()]
    return [f"Elsewhere: {', '.join(there)}.", ""] if there else []


def summary(problems: Sequence[Problem]) -> list[str]:
    """Best peer's time over ours."""
    rows = []
    for problem in problems:
        found = results(problem)
        best = best_objective(found)
        cells = [problem.title]
        for call in ("built", "frame"):
            ours, (peer, time) = (
                figure(found.get("lmmjax", {}), call),
                _best_peer(found, call, best),
            )
            ratio = "" if ours is None or time is None else f"{time / ours:.2f}"
            cells += [seconds(ours), f"{seconds(time)} ({peer})" if peer else "none", ratio]
        memory = found.get("lmmjax", {}).get("peak_mb", math.nan)
        rows.append([*cells, f"{memory:.0f}", TARGETS.get(problem.name, "")])
    head = ["problem", "built", "best peer", "ratio", "from frame", "best peer", "ratio"]
    head += ["memory (MB)", "target"]
    return [
        "## Best peer's time over lmmjax's",
        "",
        "A peer without a built form is compared by its time from the frame.",
        "",
        *table(head, rows),
    ]


def _best_peer(found: dict[str, Result], call: str, best: float) -> tuple[str, float | None]:
    times = {}
    for name, result in found.items():
        time = figure(result, call) or figure(result, "frame")
        if name != "lmmjax" and time is not None and excess(result, best) <= WRONG:
            times[name] = time
    if not times:
        return "", None
    name = min(times, key=lambda n: times[n])
    return name, times[name]


def by_problem(problem: Problem) -> list[str]:
    """All libraries on one problem."""
    found = results(problem)
    best = best_objective(found)
    head = ["library", "built", "(CPU)", "from frame", "(CPU)", "first", "criterion", "excess"]
    head.append("memory (MB)")
    rows = [_row(name, result, best) for name, result in found.items()]
    return [f"### {problem.title}", "", f"`{problem.formula}`", "", *table(head, rows)]


def _row(name: str, result: Result, best: float) -> list[str]:
    if "frame" not in result:
        return [name, result.get("wrong") or result["cannot"], *[""] * 7]
    above = excess(result, best)
    return [
        name,
        seconds(figure(result, "built")),
        seconds(figure(result, "built", "cpu")),
        seconds(figure(result, "frame")),
        seconds(figure(result, "frame", "cpu")),
        seconds(figure(result, "frame", "first")),
        f"{result['frame']['objective']:.6f}",
        f"{above:.0e}" + (" **wrong optimum**" if above > WRONG else ""),
        f"{result['peak_mb']:.0f} ({result['loaded_mb']:.0f})",
    ]


def own(problems: Sequence[Problem]) -> list[str]:
    """What only lmmjax's adapter measures."""
    rows = []
    for problem in problems:
        r = results(problem).get("lmmjax", {})
        if "build" in r:
            compile_s = figure(r, "frame", "first") - figure(r, "frame")  # type: ignore[operator]
            numbers = [seconds(r["build"]), seconds(compile_s), seconds(figure(r, "built"))]
            numbers.append(seconds(r.get("read")))
            rows.append([problem.title, *numbers, str(r["evaluations"]), seconds(r.get("tests"))])
    head = [
        "problem",
        "build",
        "compile",
        "warm fit",
        "and β, σ, θ read",
        "evaluations",
        "first Satterthwaite table",
    ]
    return [
        "## Inside lmmjax",
        "",
        "*Compile* is the first call less a warm one, without a compilation cache.",
        "",
        *table(head, rows),
    ]


def growth() -> list[str]:
    """Exponents: how the time grows where rows, or groups with their rows, grow tenfold."""
    rows = []
    for what, small, large in GROWTH:
        pair = results(small), results(large)
        for name in pair[0]:
            for call in ("frame", "built"):
                a, b = (figure(found.get(name, {}), call) for found in pair)
                if a is not None and b is not None:
                    sizes = f"{small.title} → {large.title}"
                    exponent = f"{math.log10(b / a):.2f}"
                    rows.append([what, sizes, name, call, seconds(a), seconds(b), exponent])
    head = ["grows", "sizes", "library", "call", "small", "large", "exponent"]
    return [
        "## Growth",
        "",
        "Time as a power of the size, from ten times the size.",
        "",
        *table(head, rows),
    ]


def cold(times: dict[str, float | None]) -> list[str]:
    """Whole processes."""
    rows = [[name, seconds(value)] for name, value in times.items() if value is not None]
    text = "Import, read sleepstudy, fit the slope model once, print; the whole process."
    return ["## Cold process", "", text, "", *table(["process", "time"], rows)]


def page(cold_times: dict[str, float | None], more: Iterable[list[str]]) -> str:
    """Everything; ``more`` are sections of other scripts."""
    parts: list[Any] = [machine(), summary(PROBLEMS), ["## By problem", ""]]
    parts += [by_problem(problem) for problem in PROBLEMS]
    parts += [own(PROBLEMS), cold(cold_times), growth(), *more]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"

"""Data larger than memory against DuckDB's own GROUP BY: ``python -m benchmarks.large [--rows N]``.

Makes a Parquet file of 8 columns with ``rows / 20`` groups in a temporary folder, then measures in
a process each: ours (``Model.from_table`` of a slope model, and its fit), DuckDB's GROUP BY of the
11 sums by group that the model needs (and the 10 that it needs in total), and of all 21 sums by
group. Prints seconds, CPU seconds, peak memory, and the ratios of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FORMULA = "y ~ x + a + b + c + (x | g)"
BY_GROUP = (
    "count(*), sum(x), sum(x*x), sum(a), sum(b), sum(c), sum(x*a), sum(x*b), sum(x*c), "
    "sum(y), sum(x*y)"
)
IN_TOTAL = (
    "sum(a*a), sum(a*b), sum(a*c), sum(b*b), sum(b*c), sum(c*c), "
    "sum(a*y), sum(b*y), sum(c*y), sum(y*y)"
)


def make(path: Path, rows: int, groups: int, ordered: bool) -> None:
    """Write the table with DuckDB; rows in random order, or group by group."""
    import duckdb

    group = f"(range // {rows // groups})" if ordered else f"(hash(range) % {groups})"
    duckdb.sql(
        f"""COPY (SELECT {group}::INTEGER AS g, x, a, b, c, year, k,
                 10 + x + 0.5*a - b + 0.1*c + (g % 7) / 3.0 + (g % 5) / 10.0 * x + 2*random() AS y
              FROM (SELECT range, {group}::INTEGER AS g, round(random() * 10, 2) AS x,
                      random() AS a, random() AS b, (range % 10)::DOUBLE AS c,
                      (1990 + range % 30)::SMALLINT AS year, (range % 12)::TINYINT AS k
                    FROM range({rows})))
            TO '{path}' (FORMAT parquet)"""
    )


def ours(path: str) -> dict[str, float]:
    """Seconds of the two passes, and of the fit."""
    from lmmjax import Model

    start, cpu = time.perf_counter(), time.process_time()
    model = Model.from_table(FORMULA, path)
    built, cpu = time.perf_counter(), time.process_time() - cpu
    peak = peak_megabytes()
    fit = model.fit()
    done = time.perf_counter()
    return {
        "seconds": built - start,
        "cpu_sums": cpu,
        "peak_sums": peak,
        "fit": done - built,
        "deviance": fit.deviance,
        "evaluations": fit.n_evals,
    }


def database(path: str, query: str) -> dict[str, float]:
    """Seconds of DuckDB for a query, its result materialised as Arrow."""
    import duckdb

    start = time.perf_counter()
    rows = 0
    for one in query.split(";"):
        rows += duckdb.sql(one.format(path=path)).to_arrow_table().num_rows
    return {"seconds": time.perf_counter() - start, "rows": rows}


QUERIES = {
    "DuckDB, 11 sums by group and 10 in total": (
        f"SELECT g, {BY_GROUP} FROM '{{path}}' GROUP BY g;SELECT {IN_TOTAL} FROM '{{path}}'"
    ),
    "DuckDB, 21 sums by group": f"SELECT g, {BY_GROUP}, {IN_TOTAL} FROM '{{path}}' GROUP BY g",
}


def peak_megabytes() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(name: str, path: str) -> None:
    """Measure one contender and print JSON."""
    result = ours(path) if name == "lmmjax" else database(path, QUERIES[name])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result |= {"cpu": usage.ru_utime + usage.ru_stime, "peak": peak_megabytes()}
    print(json.dumps(result))


def measure(name: str, path: Path) -> dict[str, float]:
    """Run one contender in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.large", "--child", name, "--path", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Make the data, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--groups", type=int, default=0)
    parser.add_argument("--sorted", action="store_true", help="rows group by group")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--child")
    parser.add_argument("--path")
    args = parser.parse_args()
    if args.child:
        child(args.child, args.path)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.parquet"
        groups = args.groups or args.rows // 20
        make(path, args.rows, groups, args.sorted)
        order = "group by group" if args.sorted else "in random order"
        size = path.stat().st_size / 1e6
        print(f"{args.rows} rows {order}, {groups} groups, {size:.0f} MB: {FORMULA}")
        report({name: best(name, path, args.runs) for name in ["lmmjax", *QUERIES]})


def best(name: str, path: Path, runs: int) -> dict[str, float]:
    """The quickest of several runs: other work on the machine only adds."""
    return min((measure(name, path) for _ in range(runs)), key=lambda r: r["seconds"])


def report(results: dict[str, dict[str, float]]) -> None:
    """Print the table and the ratios."""
    for name, r in results.items():
        print(f"{name:42} {r['seconds']:7.2f} s {r['cpu']:7.1f} CPU-s {r['peak']:7.0f} MB peak")
    mine = results["lmmjax"]
    print(
        f"of ours, sums alone {mine['peak_sums']:.0f} MB; fit {mine['fit']:.2f} s with compilation"
    )
    for name in QUERIES:
        print(f"ours / {name}: {mine['seconds'] / results[name]['seconds']:.2f}")


if __name__ == "__main__":
    main()

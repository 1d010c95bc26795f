"""The problems: formula, data and method, the same for every library.

Bundled data sets, and synthetic ones made from a fixed seed. Each is written once, under
``.bench/data``, as Parquet (and CSV for R), with a JSON description that the adapters read; delete
that folder to have them made anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent.parent / ".bench"


@dataclass(frozen=True)
class Problem:
    """One model on one data set; ``terms`` repeats the bars for libraries without formulas."""

    name: str
    title: str
    fixed: str
    terms: tuple[tuple[str, tuple[str, ...]], ...]  # group, columns beside the intercept
    method: str
    data: Callable[[], Any]
    tests: bool = False  # time lmmjax's first table with Satterthwaite's df as well

    @property
    def formula(self) -> str:
        """The formula in lme4's syntax."""
        bars = [f"({' + '.join(columns) or '1'} | {group})" for group, columns in self.terms]
        return " + ".join([self.fixed, *bars])

    def write(self) -> Path:
        """Write the data, where not yet there, and the description; return the latter's path."""
        folder = FOLDER / "data"
        folder.mkdir(parents=True, exist_ok=True)
        parquet, csv = folder / f"{self.name}.parquet", folder / f"{self.name}.csv"
        description = folder / f"{self.name}.json"
        if not (description.exists() and parquet.exists() and csv.exists()):
            data = self.data()
            data.to_parquet(parquet)
            data.to_csv(csv, index=False)
            description.write_text(json.dumps(self._describe(data, parquet, csv), indent=1))
            _write_dcf(description)
        return description

    def _describe(self, data: Any, parquet: Path, csv: Path) -> dict[str, Any]:
        right = [name.strip() for name in self.fixed.split("~")[1].split("+")]
        return {
            "name": self.name,
            "formula": self.formula,
            "fixed": self.fixed,
            "terms": [{"group": g, "columns": list(c)} for g, c in self.terms],
            "covariates": [name for name in right if name != "1"],
            "categories": [c for c in data if data[c].dtype == "category"],
            "method": self.method,
            "parquet": str(parquet),
            "csv": str(csv),
            "tests": self.tests,
        }


def _write_dcf(description: Path) -> None:
    """The same description as R reads it without packages."""
    fields = json.loads(description.read_text())
    fields["groups"] = ",".join(term["group"] for term in fields["terms"])
    fields["categories"] = ",".join(fields["categories"])
    keys = ("formula", "groups", "categories", "method", "csv")
    description.with_suffix(".dcf").write_text("".join(f"{k}: {fields[k]}\n" for k in keys))


def bundled(name: str) -> Callable[[], Any]:
    """A data set that comes with lmmjax."""

    def load() -> Any:
        import lmmjax as lmm

        return lmm.load_dataset(name)

    return load


def slopes(n: int, J: int, p: int, seed: int) -> Callable[[], Any]:
    """Correlated intercept and slope by group; groups of random size, rows shuffled."""

    def make() -> Any:
        import pandas as pd

        rng = np.random.default_rng(seed)
        codes = np.concatenate([np.arange(J), rng.integers(0, J, n - J)])
        rng.shuffle(codes)
        X = rng.normal(size=(n, p - 1))
        b = rng.normal(size=(J, 2)) @ np.array([[0.8, 0.15], [0.0, 0.4]])
        y = 1.0 + X @ np.linspace(0.5, -0.5, p - 1) + b[codes, 0] + b[codes, 1] * X[:, 0]
        columns = {f"x{j + 1}": X[:, j] for j in range(p - 1)}
        return pd.DataFrame({"y": y + rng.normal(size=n), **columns, "g": codes})

    return make


def ratings(n: int, users: int, items: int, seed: int) -> Callable[[], Any]:
    """Crossed intercepts with the popularity of a film-rating service.

    Activity of users is lognormal, popularity of items falls off exponentially with rank (both
    about as in MovieLens 1M); every user and item occurs.
    """

    def make() -> Any:
        import pandas as pd

        rng = np.random.default_rng(seed)
        activity = rng.lognormal(sigma=1.1, size=users)
        popularity = np.exp(-5.5 * np.arange(items) / items)
        u = rng.choice(users, size=n, p=activity / activity.sum())
        i = rng.choice(items, size=n, p=popularity / popularity.sum())
        u[:users], i[users : users + items] = np.arange(users), np.arange(items)
        effect = rng.normal(scale=0.45, size=users)[u] + rng.normal(scale=0.6, size=items)[i]
        y = 3.5 + effect + rng.normal(scale=0.9, size=n)
        return pd.DataFrame({"y": y, "user": u, "item": i})

    return make


X5 = "y ~ x1 + x2 + x3 + x4"
SLOPE = (("g", ("x1",)),)

PROBLEMS = (
    Problem(
        "sleepstudy",
        "sleepstudy, slope by subject, REML",
        "Reaction ~ Days",
        (("Subject", ("Days",)),),
        "REML",
        bundled("sleepstudy"),
        tests=True,
    ),
    Problem(
        "mathachieve",
        "MathAchieve, slope by school, REML",
        "MathAch ~ SES",
        (("School", ("SES",)),),
        "REML",
        bundled("MathAchieve"),
        tests=True,
    ),
    Problem(
        "penicillin",
        "Penicillin, plates x samples, REML",
        "diameter ~ 1",
        (("plate", ()), ("sample", ())),
        "REML",
        bundled("Penicillin"),
        tests=True,
    ),
    Problem(
        "insteval",
        "InstEval, three crossed intercepts, ML",
        "y ~ service",
        (("s", ()), ("d", ()), ("dept", ())),
        "ML",
        bundled("InstEval"),
    ),
    Problem(
        "million",
        "1,000,000 rows, 100,000 groups, slope, p = 5, REML",
        X5,
        SLOPE,
        "REML",
        slopes(1_000_000, 100_000, 5, seed=1),
    ),
    Problem(
        "crossed",
        "1,000,000 rows, 6,040 x 3,706 crossed intercepts, ML",
        "y ~ 1",
        (("user", ()), ("item", ())),
        "ML",
        ratings(1_000_000, 6_040, 3_706, seed=2),
    ),
)

#: pairs of problems ten times apart in one respect: (what grows, small, large)
GROWTH = tuple(
    (
        what,
        Problem(
            f"{what}-small", f"{n:,} rows, {J:,} groups", X5, SLOPE, "REML", slopes(n, J, 5, 3)
        ),
        Problem(
            f"{what}-large",
            f"{10 * n:,} rows, {J * by:,} groups",
            X5,
            SLOPE,
            "REML",
            slopes(10 * n, J * by, 5, 3),
        ),
    )
    for what, n, J, by in (("rows", 200_000, 5_000, 1), ("groups", 200_000, 20_000, 10))
)


def every() -> dict[str, Problem]:
    """All problems by name, the growth pairs included."""
    pairs = [problem for _, small, large in GROWTH for problem in (small, large)]
    return {problem.name: problem for problem in (*PROBLEMS, *pairs)}

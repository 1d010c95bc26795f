r"""Simulation studies: scenarios x methods x replicates on top of the batch engine.

A scenario is a design with a truth; it draws blocks of responses. A method is a callable that turns
a block of responses into estimates, standard errors, intervals and p-values. Blocks are numbered
and each has a random stream of its own, made from (seed, scenario, block), so a study that was
stopped goes on with the same numbers, and more replicates or scenarios never change those that are
there.

Performance measures and their Monte Carlo standard errors: Morris, White and Crowther (2019), Using
simulation studies to evaluate statistical methods, Statistics in Medicine 38, table 6.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax.batchfit import BatchFit
from lmmjax.errors import DataError
from lmmjax.many import _bar, fit_many

if TYPE_CHECKING:
    import pandas as pd

#: replicates drawn at a time
BLOCK = 500

#: columns of what a method returns, besides ``replicate`` and ``parameter``
COLUMNS = ("estimate", "std_error", "ci_low", "ci_high", "p_value")


@dataclass(frozen=True, eq=False)
class Scenario:
    """A data-generating mechanism on a fixed design.

    Parameters
    ----------
    name : str
    formula : str
        ``"~ x + (1 | g)"``: the model that generates the responses.
    data : DataFrame
        Covariates and groups.
    truth : dict
        Values under the names of the results: fixed effects, ``sd_(Intercept)|g``,
        ``cor_x.(Intercept)|g``, ``sigma``; what is left out is 0 (``sigma``: 1). Variances may be
        asked for in the results as ``var_(Intercept)|g`` and ``var_Residual``.
    draw : callable, optional
        ``draw(rng, n) -> (rows, n)`` responses, in place of the formula (then ``truth`` only states
        what estimates are compared with).
    """

    name: str
    formula: str
    data: Any
    truth: dict[str, float]
    draw: Callable[[np.random.Generator, int], np.ndarray] | None = None

    def responses(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Draw ``n`` responses, (rows, n)."""
        if self.draw is not None:
            return np.asarray(self.draw(rng, n), float)
        X, terms, beta, sigma = self._parts
        Y = (X @ beta)[:, None] + sigma * rng.standard_normal((len(X), n))
        for z, codes, root in terms:
            J, S = int(codes.max()) + 1, z.shape[1]
            b = rng.standard_normal((J, n, S)) @ root.T
            for s in range(S):
                Y += z[:, s, None] * b[codes, :, s]
        return Y

    @cached_property
    def _parts(self) -> tuple[np.ndarray, list[Any], np.ndarray, float]:
        """X, per term (z, codes, Cholesky factor of the covariance of b), β and σ."""
        from lmmjax.many import _Shared

        design = _Shared.build(self.formula, self.data, None, None, None, None, "raise").design
        known = {"sigma", *design.x_names}
        terms = []
        for t in design.terms:
            sd_names = [f"sd_{name}|{t.group}" for name in t.names]
            corr = np.eye(len(t.names))
            for j, b in enumerate(t.names):
                for i, a in list(enumerate(t.names))[j + 1 :]:
                    name = f"cor_{a}.{b}|{t.group}"
                    corr[i, j] = corr[j, i] = self.truth.get(name, 0.0)
                    known.add(name)
            sd = np.array([self.truth.get(name, 0.0) for name in sd_names])
            known |= set(sd_names)
            terms.append((t.z, t.codes, sd[:, None] * np.linalg.cholesky(corr)))
        unknown = sorted(set(self.truth) - known)
        if unknown:
            raise DataError(
                f"the truth of scenario {self.name!r} names {unknown}; expected some of "
                f"{sorted(known)}."
            )
        beta = np.array([self.truth.get(name, 0.0) for name in design.x_names])
        return design.X, terms, beta, float(self.truth.get("sigma", 1.0))

    def value(self, parameter: str) -> float:
        """True value of a parameter of the results; NaN where it has none."""
        if parameter == "var_Residual":
            return float(self.truth.get("sigma", 1.0)) ** 2
        if parameter.startswith("var_"):
            return float(self.truth.get("sd_" + parameter[4:], 0.0)) ** 2
        if parameter in self.truth or self.draw is not None:
            return float(self.truth.get(parameter, np.nan))
        return 0.0 if parameter in self._known else np.nan

    @cached_property
    def _known(self) -> set[str]:
        """Names of the fixed effects, which are 0 where the truth does not say otherwise."""
        from lmmjax.many import _Shared

        built = _Shared.build(self.formula, self.data, None, None, None, None, "raise")
        return set(built.design.x_names)


@dataclass(frozen=True)
class FitMethod:
    """Fit a formula by ML or REML; tests and intervals of fixed effects, variances as estimates.

    Parameters
    ----------
    name : str
    formula : str, optional
        That of the scenario by default.
    method : {"REML", "ML"}
    df : str, optional
        As ``fit_many``.
    level : float
    """

    name: str
    formula: str | None = None
    method: str = "REML"
    df: str | None = None
    level: float = 0.95

    def __call__(self, scenario: Scenario, Y: np.ndarray) -> pd.DataFrame:
        """Long frame: ``replicate parameter`` and COLUMNS; NaN where a fit failed."""
        import pandas as pd

        made = fit_many(
            self.formula or scenario.formula, scenario.data, Y, method=self.method, df=self.df
        )
        fixed = made.coef_table(level=self.level)
        fixed = fixed.rename(columns={"item": "replicate", "term": "parameter"})
        fixed["parameter"] = fixed["parameter"].astype(str)
        return pd.concat([fixed[["replicate", "parameter", *COLUMNS]], _variances(made)])


def _variances(made: BatchFit) -> pd.DataFrame:
    """Variances of random effects and residuals as a long frame."""
    import pandas as pd

    parts = made.components().filter(regex="^(sd_|sigma$)") ** 2
    names = ["var_Residual" if c == "sigma" else f"var_{c[3:]}" for c in parts.columns]
    m, k = parts.shape
    return pd.DataFrame(
        {
            "replicate": np.repeat(made.items, k),
            "parameter": names * m,
            "estimate": parts.to_numpy().ravel(),
        }
    ).reindex(columns=["replicate", "parameter", *COLUMNS])


@dataclass(frozen=True)
class LRTMethod:
    """Likelihood-ratio test of one variance (or any two nested formulas) with a stated reference.

    Parameters
    ----------
    name, small, big : str
        ``small`` and ``big`` are formulas.
    reference : {"chi2", "mixture"}
        χ²(df); or ½χ²(df - 1) + ½χ²(df), right for one variance beside an interior null.
    df : int
    method : {"REML", "ML"}
    """

    name: str
    small: str
    big: str
    reference: str = "chi2"
    df: int = 1
    method: str = "REML"

    def __call__(self, scenario: Scenario, Y: np.ndarray) -> pd.DataFrame:
        """Long frame with the parameter ``lrt``: the statistic as estimate, and its p-value."""
        import pandas as pd
        from scipy import stats

        small = fit_many(self.small, scenario.data, Y, method=self.method)
        big = fit_many(self.big, scenario.data, Y, method=self.method)
        statistic = 2 * (big.loglik - small.loglik).to_numpy()
        statistic = np.where(np.abs(statistic) < 1e-8, 0.0, statistic)
        p = stats.chi2.sf(statistic, self.df)
        if self.reference == "mixture":
            lower = stats.chi2.sf(statistic, self.df - 1) if self.df > 1 else statistic <= 0
            p = 0.5 * lower + 0.5 * p
        p = np.where(statistic <= 0, 1.0, np.where(np.isfinite(statistic), p, np.nan))
        frame = {"replicate": small.items, "parameter": "lrt", "estimate": statistic, "p_value": p}
        return pd.DataFrame(frame).reindex(columns=["replicate", "parameter", *COLUMNS])


@dataclass(frozen=True, eq=False)
class Study:
    """Scenarios x methods x replicates.

    Parameters
    ----------
    scenarios : sequence of Scenario
    methods : sequence
        Callables ``(scenario, Y) -> DataFrame`` with a ``name``, such as :class:`FitMethod`.
    n_rep : int
        Replicates per scenario; all methods see the same ones.
    seed : int

    Examples
    --------
    >>> from lmmjax import studies
    >>> study = studies.ml_bias(n_rep=100, seed=1)
    >>> table = study.performance()
    >>> sorted(table["method"].unique())
    ['ML', 'REML']
    """

    scenarios: Sequence[Scenario]
    methods: Sequence[Any]
    n_rep: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_rep < 2:
            raise DataError(f"n_rep={self.n_rep}; expected at least 2 replicates.")
        for what, parts in (("scenarios", self.scenarios), ("methods", self.methods)):
            names = [part.name for part in parts]
            if len(set(names)) < len(names) or not names:
                raise DataError(f"found {what} named {names}; expected one or more, all different.")

    def run(
        self, path: str | os.PathLike[str] | None = None, progress: bool = False
    ) -> StudyResult:
        """Run what is not there yet.

        Parameters
        ----------
        path : path, optional
            Folder for finished blocks, one Parquet file each; a run that was stopped goes on from
            there with the same numbers.
        progress : bool

        Returns
        -------
        StudyResult

        Raises
        ------
        DataError
            If the folder holds another study.
        """
        import pandas as pd

        folder = None if path is None else self._folder(Path(path))
        parts = []
        bar = _bar(progress, self.n_rep * len(self.scenarios) * len(self.methods))
        with bar:
            for scenario, block, Y in self._blocks(folder):
                for method in self.methods:
                    frame = self._cell(folder, scenario, method, block, Y)
                    parts.append(frame)
                    bar.update(min(BLOCK, self.n_rep - block * BLOCK))
        return StudyResult(self, pd.concat(parts, ignore_index=True))

    def _blocks(self, folder: Path | None) -> Iterator[tuple[Scenario, int, Any]]:
        """Scenario, block and a function that draws its responses when they are wanted."""
        for scenario in self.scenarios:
            for block in range(-(-self.n_rep // BLOCK)):
                yield scenario, block, _Lazy(scenario, self.seed, block)

    def _cell(
        self, folder: Path | None, scenario: Scenario, method: Any, block: int, Y: _Lazy
    ) -> pd.DataFrame:
        import pandas as pd

        n = min(BLOCK, self.n_rep - block * BLOCK)
        file = None if folder is None else folder / _file(scenario.name, method.name, block)
        if file is not None and file.exists():
            frame = pd.read_parquet(file)
        else:
            frame = method(scenario, Y())
            frame = frame.assign(replicate=frame["replicate"].astype(int))
            if file is not None:
                partial = file.with_suffix(".partial")
                frame.to_parquet(partial)
                os.replace(partial, file)  # a file is there whole or not at all
        frame = frame[frame["replicate"] < n]
        return frame.assign(
            replicate=frame["replicate"] + block * BLOCK, scenario=scenario.name, method=method.name
        )

    def _folder(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        stamp: dict[str, Any] = {
            "seed": self.seed,
            "block": BLOCK,
            "scenarios": {s.name: [s.formula, s.truth, _digest(s.data)] for s in self.scenarios},
            "methods": {m.name: repr(m) for m in self.methods},
        }
        file = folder / "study.json"
        if file.exists():
            there = json.loads(file.read_text())
            for key in ("seed", "block"):
                _same(there[key], stamp[key], key, folder)
            for kind in ("scenarios", "methods"):
                for name in set(there[kind]) & set(stamp[kind]):
                    new = json.loads(json.dumps(stamp[kind][name]))
                    _same(there[kind][name], new, f"{kind[:-1]} {name!r}", folder)
                stamp[kind] = {**there[kind], **stamp[kind]}
        file.write_text(json.dumps(stamp, indent=1))
        return folder

    def performance(self) -> pd.DataFrame:
        """Run in memory, once, and summarise; see :meth:`StudyResult.performance`."""
        return self._result.performance()

    @cached_property
    def _result(self) -> StudyResult:
        return self.run()


class _Lazy:
    """Responses of a block, drawn when a method first asks for them."""

    def __init__(self, scenario: Scenario, seed: int, block: int) -> None:
        self.scenario, self.seed, self.block = scenario, seed, block
        self.Y: np.ndarray | None = None

    def __call__(self) -> np.ndarray:
        if self.Y is None:
            key = (self.seed, zlib.crc32(self.scenario.name.encode()), self.block)
            self.Y = self.scenario.responses(np.random.default_rng(key), BLOCK)
        return self.Y


def _file(scenario: str, method: str, block: int) -> str:
    names = (scenario, method)
    safe = ["".join(c if c.isalnum() else "-" for c in name)[:40] for name in names]
    key = zlib.crc32("|".join(names).encode())
    return f"{safe[0]}_{safe[1]}_{key:08x}_{block:05d}.parquet"


def _digest(data: Any) -> int:
    import pandas as pd

    return int(pd.util.hash_pandas_object(pd.DataFrame(data)).to_numpy().sum())


def _same(there: Any, here: Any, what: str, folder: Path) -> None:
    if there != here:
        raise DataError(
            f"{str(folder)!r} holds a study with another {what} ({there!r}, not {here!r}); "
            "expected the same study. Use another folder."
        )


@dataclass(frozen=True, eq=False)
class StudyResult:
    """Estimates of every replicate, and their summary.

    Attributes
    ----------
    study : Study
    estimates : DataFrame
        Columns ``replicate parameter estimate std_error ci_low ci_high p_value scenario method``.
    """

    study: Study
    estimates: pd.DataFrame = field(repr=False)

    def performance(self, alpha: float = 0.05) -> pd.DataFrame:
        """Performance measures with their Monte Carlo standard errors.

        Parameters
        ----------
        alpha : float
            Level of ``rejection`` (type I error where the null is true, power otherwise).

        Returns
        -------
        DataFrame
            Columns ``scenario method parameter measure value mcse n n_failed``; measures ``bias
            relative_bias emp_se mod_se rel_error_mod_se rmse coverage width rejection``, those that
            a method gives the numbers for.
        """
        import pandas as pd

        truths = {s.name: s for s in self.study.scenarios}
        keys = ["scenario", "method", "parameter"]
        rows = []
        for (scenario, method, parameter), cell in self.estimates.groupby(keys, sort=False):
            numbers = {c: cell[c].to_numpy(float) for c in COLUMNS}
            used = np.isfinite(numbers["estimate"])
            head = (scenario, method, parameter)
            tail = (int(used.sum()), int(np.sum(~used)))
            found = measures(numbers, truths[scenario].value(parameter), alpha)
            rows += [(*head, name, *pair, *tail) for name, pair in found.items()]
        return pd.DataFrame(rows, columns=[*keys, "measure", "value", "mcse", "n", "n_failed"])

    def plot(self, measure: str = "bias", ax: Any = None) -> Any:
        """Draw a measure by parameter and method, with bars of 1.96 Monte Carlo standard errors."""
        import matplotlib.pyplot as plt

        table = self.performance()
        table = table[table["measure"] == measure]
        if table.empty:
            raise DataError(f"found no measure {measure!r}; see .performance()['measure'].")
        ax = plt.subplots(layout="constrained")[1] if ax is None else ax
        for method, cell in table.groupby("method", sort=False):
            labels = cell["scenario"] + ": " + cell["parameter"]
            ax.errorbar(cell["value"], labels, xerr=1.96 * cell["mcse"], fmt="o", label=method)
        ax.set_xlabel(measure.replace("_", " "))
        ax.legend()
        return ax

    def __repr__(self) -> str:
        table = self.performance()
        head = f"{self.study.n_rep} replicates, seed {self.study.seed}"
        return f"{head}\n{table.to_string(index=False, float_format=lambda x: f'{x:.4g}')}"


def measures(
    numbers: dict[str, np.ndarray], truth: float, alpha: float
) -> dict[str, tuple[float, float]]:
    """Measures of one parameter under one method: (value, Monte Carlo standard error) by name.

    Parameters
    ----------
    numbers : dict
        Arrays of COLUMNS; NaN where missing. Failed replicates (estimate NaN) are left out.
    truth : float
        NaN where there is none.

    References
    ----------
    Morris, White and Crowther (2019), Statistics in Medicine 38, table 6; the error of the root
    mean squared error by the delta method.
    """
    used = np.isfinite(numbers["estimate"])
    x, se, low, high, p = (numbers[c][used] for c in COLUMNS)
    n = len(x)
    out: dict[str, tuple[float, float]] = {}
    if n < 2:
        return out
    if np.isfinite(truth):
        sd = float(np.std(x, ddof=1))
        squares = (x - truth) ** 2
        mse = float(squares.mean())
        rmse = float(np.sqrt(mse))
        out["bias"] = float(x.mean() - truth), sd / np.sqrt(n)
        if truth != 0:
            out["relative_bias"] = out["bias"][0] / truth, out["bias"][1] / abs(truth)
        out["emp_se"] = sd, sd / np.sqrt(2 * (n - 1))
        out["rmse"] = rmse, float(np.std(squares, ddof=1)) / np.sqrt(n) / (2 * max(rmse, 1e-300))
        if np.isfinite(se).all():
            out |= _model_se(se, sd, n)
        if np.isfinite(low).all() and np.isfinite(high).all():
            out["coverage"] = _proportion((low <= truth) & (truth <= high))
            width = high - low
            out["width"] = float(width.mean()), float(np.std(width, ddof=1) / np.sqrt(n))
    if np.isfinite(p).all():
        out["rejection"] = _proportion(p <= alpha)
    return out


def _model_se(se: np.ndarray, sd: float, n: int) -> dict[str, tuple[float, float]]:
    """Average model standard error, and its relative error in per cent."""
    squares = se**2
    mod, spread = float(np.sqrt(squares.mean())), float(np.var(squares, ddof=1))
    ratio = mod / sd
    error = np.sqrt(spread / (4 * n * mod**4) + 1 / (2 * (n - 1)))
    return {
        "mod_se": (mod, float(np.sqrt(spread / (4 * n * mod**2)))),
        "rel_error_mod_se": (100 * (ratio - 1), float(100 * ratio * error)),
    }


def _proportion(hits: np.ndarray) -> tuple[float, float]:
    share = float(np.mean(hits))
    return share, float(np.sqrt(share * (1 - share) / len(hits)))

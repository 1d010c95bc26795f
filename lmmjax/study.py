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
from lmmjax.errors import ComparisonError, DataError, LmmError
from lmmjax.many import _bar, fit_many
from lmmjax.stamp import stamp, table_digest
from lmmjax.tables import check_seed

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
        what estimates are compared with). A study kept in a folder goes on only with the same
        ``draw``: judged on its source and the values it uses, or on its attribute ``key`` (any
        text), where it has one.
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
        ``small`` and ``big`` are formulas; under REML with fixed parts of the same columns.
    reference : {"chi2", "mixture"}
        χ²(df); or ½χ²(df - 1) + ½χ²(df), right for one variance beside an interior null.
    df : int
    method : {"REML", "ML"}

    Raises
    ------
    LmmError
        An unknown reference or method, or ``df`` below 1.
    ComparisonError
        When called: REML with different fixed parts.
    """

    name: str
    small: str
    big: str
    reference: str = "chi2"
    df: int = 1
    method: str = "REML"

    def __post_init__(self) -> None:
        for what, found, known in (
            ("reference", self.reference, ("chi2", "mixture")),
            ("method", str(self.method).upper(), ("REML", "ML")),
        ):
            if found not in known:
                raise LmmError(f"{what}={found!r} is unknown; expected {' or '.join(known)}.")
        if self.df < 1:
            raise LmmError(f"df={self.df}; expected 1 or more.")

    def _check_fixed(self, data: Any) -> None:
        """Refuse REML fits of different fixed parts: their criteria are of different data."""
        from lmmjax.many import _Shared

        if self.method.upper() == "ML":
            return
        formulas = (self.small, self.big)
        built = [_Shared.build(f, data, None, None, None, None, "raise").design for f in formulas]
        if not np.array_equal(built[0].X, built[1].X):
            raise ComparisonError(
                f"found fixed parts {built[0].x_names} and {built[1].x_names} under REML in method "
                f"{self.name!r}, whose criteria are not comparable; expected the same columns of "
                'X. Use method="ML".'
            )

    def __call__(self, scenario: Scenario, Y: np.ndarray) -> pd.DataFrame:
        """Long frame with the parameter ``lrt``: the statistic as estimate, and its p-value."""
        import pandas as pd
        from scipy import stats

        self._check_fixed(scenario.data)
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
        Callables ``(scenario, Y) -> DataFrame`` with a ``name``, such as :class:`FitMethod`; the
        frame has ``replicate parameter estimate`` and any of the other COLUMNS. A study kept in a
        folder goes on only with the same methods: judged on their source and the values they use,
        or on an attribute ``key`` (any text), where they have one.
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
        check_seed(self.seed)
        if self.n_rep < 2:
            raise DataError(f"n_rep={self.n_rep}; expected at least 2 replicates.")
        for what, parts in (("scenarios", self.scenarios), ("methods", self.methods)):
            unnamed = [part for part in parts if not isinstance(getattr(part, "name", None), str)]
            if unnamed:
                raise DataError(
                    f"found {unnamed[0]!r} among the {what}, which has no name; expected a text as "
                    "its attribute name. Set it, as in `method.name = 'mean'`."
                )
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
            If the folder holds another study, or a ``draw`` or method of the user's own cannot be
            recognised (no source: give it a ``key``).
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
            frame = _checked(method(scenario, Y()), method)
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
        here: dict[str, Any] = {
            "seed": self.seed,
            "block": BLOCK,
            "scenarios": {s.name: _scenario_stamp(s) for s in self.scenarios},
            "methods": {m.name: _method_stamp(m) for m in self.methods},
        }
        file = folder / "study.json"
        if file.exists():
            there = json.loads(file.read_text())
            for key in ("seed", "block"):
                _same(there[key], here[key], key, folder)
            for kind in ("scenarios", "methods"):
                for name in set(there[kind]) & set(here[kind]):
                    new = here[kind][name]
                    _same(there[kind][name], new, f"{kind[:-1]} {name!r}", folder)
                here[kind] = {**there[kind], **here[kind]}
        file.write_text(json.dumps(here, indent=1))
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


def _checked(frame: Any, method: Any) -> pd.DataFrame:
    """What a method returned, with all of COLUMNS."""
    wanted = ["replicate", "parameter", "estimate"]
    found = list(getattr(frame, "columns", []))
    if not set(wanted) <= set(found):
        raise DataError(
            f"method {method.name!r} returned {type(frame).__name__} with columns {found}; "
            f"expected a data frame with {wanted} and any of {list(COLUMNS[1:])}."
        )
    frame = frame.reindex(columns=[*wanted[:2], *COLUMNS])
    return frame.assign(replicate=frame["replicate"].astype(int))


def _scenario_stamp(scenario: Scenario) -> dict[str, Any]:
    """What decides the responses of a scenario, as JSON."""
    made: dict[str, Any] = {
        "formula": scenario.formula,
        "truth": {name: float(value) for name, value in scenario.truth.items()},
        "data": table_digest(scenario.data),
    }
    if scenario.draw is not None:
        made["draw"] = stamp(scenario.draw, f"draw of scenario {scenario.name!r}")
    if type(scenario) is not Scenario:
        made["class"] = stamp(type(scenario), f"scenario {scenario.name!r}")
    return made


def _method_stamp(method: Any) -> str:
    if type(method) in (FitMethod, LRTMethod):
        return repr(method)
    return stamp(method, f"method {method.name!r}")


def _same(there: Any, here: Any, what: str, folder: Path) -> None:
    if isinstance(there, dict) and isinstance(here, dict):
        for part in sorted({*there, *here}):
            _same(there.get(part), here.get(part), f"{part} of {what}", folder)
    elif there != here:
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
            a method gives the numbers for. Replicates without the numbers of a measure (no finite
            estimate, standard error, interval or p-value) are left out of it and are its
            ``n_failed``. A cell with fewer than two estimates has one row, ``measure`` "bias" and
            ``value`` NaN.
        """
        import pandas as pd

        truths = {s.name: s for s in self.study.scenarios}
        keys = ["scenario", "method", "parameter"]
        rows = []
        for (scenario, method, parameter), cell in self.estimates.groupby(keys, sort=False):
            numbers = {c: cell[c].to_numpy(float) for c in COLUMNS}
            found = measures(numbers, truths[scenario].value(parameter), alpha)
            n_used = int(np.isfinite(numbers["estimate"]).sum())
            found = found or {"bias": (np.nan, np.nan, n_used)}
            rows += [
                (scenario, method, parameter, name, value, mcse, n, len(cell) - n)
                for name, (value, mcse, n) in found.items()
            ]
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
) -> dict[str, tuple[float, float, int]]:
    """Measures of one parameter under one method: (value, Monte Carlo standard error, n) by name.

    Parameters
    ----------
    numbers : dict
        Arrays of COLUMNS; NaN where missing. A measure uses the n replicates that have a finite
        estimate and the numbers it is made of; with fewer than 2 it is left out.
    truth : float
        NaN where there is none.

    References
    ----------
    Morris, White and Crowther (2019), Statistics in Medicine 38, table 6; the error of the root
    mean squared error by the delta method.
    """
    used = np.isfinite(numbers["estimate"])
    x, se, low, high, p = (numbers[c][used] for c in COLUMNS)
    out: dict[str, tuple[float, float, int]] = {}
    if len(x) < 2:
        return out
    if np.isfinite(truth):
        out |= _of_estimates(x, truth)
        known = np.isfinite(se)
        if known.sum() >= 2:
            out |= _model_se(se[known], float(np.std(x, ddof=1)))
        known = np.isfinite(low) & np.isfinite(high)
        if known.sum() >= 2:
            low, high = low[known], high[known]
            out["coverage"] = _proportion((low <= truth) & (truth <= high))
            out["width"] = _mean(high - low)
    known = np.isfinite(p)
    if known.sum() >= 2:
        out["rejection"] = _proportion(p[known] <= alpha)
    return out


def _of_estimates(x: np.ndarray, truth: float) -> dict[str, tuple[float, float, int]]:
    """Bias, spread and root mean squared error."""
    n, sd = len(x), float(np.std(x, ddof=1))
    squares = (x - truth) ** 2
    rmse = float(np.sqrt(squares.mean()))
    bias, error, _ = _mean(x - truth)
    out = {"bias": (bias, error, n)}
    if truth != 0:
        out["relative_bias"] = bias / truth, error / abs(truth), n
    out["emp_se"] = sd, sd / np.sqrt(2 * (n - 1)), n
    out["rmse"] = rmse, _mean(squares)[1] / (2 * max(rmse, 1e-300)), n
    return out


def _mean(values: np.ndarray) -> tuple[float, float, int]:
    n = len(values)
    return float(values.mean()), float(np.std(values, ddof=1) / np.sqrt(n)), n


def _model_se(se: np.ndarray, sd: float) -> dict[str, tuple[float, float, int]]:
    """Average model standard error, and its relative error in per cent."""
    n, squares = len(se), se**2
    mod, spread = float(np.sqrt(squares.mean())), float(np.var(squares, ddof=1))
    ratio = mod / sd
    error = np.sqrt(spread / (4 * n * mod**4) + 1 / (2 * (n - 1)))
    return {
        "mod_se": (mod, float(np.sqrt(spread / (4 * n * mod**2))), n),
        "rel_error_mod_se": (100 * (ratio - 1), float(100 * ratio * error), n),
    }


def _proportion(hits: np.ndarray) -> tuple[float, float, int]:
    share = float(np.mean(hits))
    return share, float(np.sqrt(share * (1 - share) / len(hits))), len(hits)

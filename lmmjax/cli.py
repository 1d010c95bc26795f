"""The command line: fits and comparisons for people, or as JSON for programs.

Standard output carries the result and nothing else; warnings and notes go to standard error. Exit
status 0: done; 1: a fit or a sampler did not converge; 2: bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmjax import cli_batch, cli_lrt
from lmmjax.errors import ConvergenceWarning, DataError, LmmError

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit
    from lmmjax.model import Model

DONE, NOT_CONVERGED, BAD_INPUT = 0, 1, 2

FREQUENTIST = {"ml": "ML", "reml": "REML"}
BAYESIAN = ("nuts",)


#: a fit of fewer rows takes less time than the compiler's optimisation of it
FEW_ROWS = 100_000

#: the compiler without optimisation; flags of the user's come after these and win
LIGHT = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def program() -> int:
    """Be the process ``lmmjax``: :func:`main`, with what may be set for a process of our own."""
    return main(own_process=True)


def main(argv: Sequence[str] | None = None, own_process: bool = False) -> int:
    """Run the command line and return the exit status.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments after the program's name; those of the process by default.
    own_process : bool
        Whether the process serves this command alone, so that the compiler's flags may be set.
    """
    options = _parser().parse_args(argv, argparse.Namespace(own_process=own_process))
    began = time.perf_counter()
    try:
        with _warnings_to_stderr() as heard:
            _load()
            options.import_s = time.perf_counter() - began
            return options.run(options, heard)
    except (LmmError, OSError) as error:
        _tell(f"error: {_one_line(error)}")
        return BAD_INPUT


def _one_line(error: Exception) -> str:
    """A message without line breaks, and without the caret that points into a formula."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line.strip("^~"))


def _tell(message: str) -> None:
    """One line on standard error."""
    print(f"lmmjax: {message}", file=sys.stderr)


# -------------------------------------------------------------------------------------------------
# Arguments
# -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line on standard error, like all others."""

    def error(self, message: str) -> Any:
        _tell(f"error: {message}; see {self.prog} --help")
        raise SystemExit(BAD_INPUT)


def _parser() -> argparse.ArgumentParser:
    from lmmjax import __version__

    parser = _Parser(prog="lmmjax", description="Linear mixed models by ML, REML and Bayes.")
    parser.add_argument("--version", action="version", version=f"lmmjax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _fit_parser(commands)
    _compare_parser(commands)
    cli_lrt.add_parser(commands, _command)
    cli_batch.add_parsers(commands, _command, _names)
    return parser


def _fit_parser(commands: Any) -> None:
    parser = _command(commands, "fit", "fit one model", _fit)
    parser.add_argument("--method", type=str.lower, choices=list(FREQUENTIST), default="reml")
    parser.add_argument("--df", help="satterthwaite, kenward-roger, residual, containment or wald")
    parser.add_argument(
        "--information",
        default="expected",
        help="of kenward-roger: expected (as pbkrtest; default) or observed (as SAS)",
    )


def _compare_parser(commands: Any) -> None:
    parser = _command(commands, "compare", "fit one model by several methods", _compare)
    add = parser.add_argument
    add("--methods", type=_names, default=["ml", "reml", "nuts"], help="default: ml,reml,nuts")
    add("--seed", type=int, default=0, help="of the sampler")
    add("--draws", type=int, default=1000, help="per chain, after the warm-up")
    add("--warmup", type=int, default=1000)
    add("--chains", type=int, default=4)
    add("--report", metavar="FILE", help="write an HTML report")


def _command(commands: Any, name: str, summary: str, run: Any) -> argparse.ArgumentParser:
    """A subcommand with the arguments that all share."""
    parser = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
    add = parser.add_argument
    add("data", metavar="DATA", help="CSV or Parquet file, or the name of a bundled data set")
    add("formula", metavar="FORMULA", help='for example "Reaction ~ Days + (Days | Subject)"')
    add("--residual", metavar="R", help='residual structure, for example "varfixed(v)"')
    add("--weights", metavar="COL", help="column of precision weights, Var(e) = sigma^2 / w")
    add("--offset", metavar="COL", help="column of a known part of the mean")
    add("--factors", type=_names, default=[], metavar="A,B", help="columns to read as categorical")
    add("--json", action="store_true", help="one JSON object in full precision on stdout")
    parser.set_defaults(run=run)
    return parser


def _names(text: str) -> list[str]:
    """Split "a,b"."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; expected names such as a,b")
    return names


# -------------------------------------------------------------------------------------------------
# Surroundings
# -------------------------------------------------------------------------------------------------


@contextmanager
def _warnings_to_stderr() -> Iterator[list[type[Warning]]]:
    """Print each warning once as one line; yields the list of categories heard."""
    heard: list[type[Warning]] = []

    def show(message: Any, category: type[Warning], *_: Any) -> None:
        heard.append(category)
        _tell(f"{category.__name__}: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield heard


def _load() -> None:
    """Import what every command needs, and turn on the cache of compiled programs."""
    import lmmjax.datasets
    import lmmjax.fit
    import lmmjax.model  # noqa: F401

    use_cache()


def _compile_lightly(model: Model) -> None:
    """Spare the compiler its optimisation where the one fit of the process is a small one."""
    if model.n_obs < FEW_ROWS:
        os.environ["XLA_FLAGS"] = " ".join([LIGHT, os.environ.get("XLA_FLAGS", "")]).strip()


def use_cache() -> None:
    """Keep compiled programs on disk; a cache of the user's is left alone."""
    from lmmjax.precision import enable_cache

    enable_cache()


def read_table(source: str) -> pd.DataFrame:
    """Read a CSV or Parquet file, or a bundled data set.

    Parameters
    ----------
    source : str
        A path that ends in ``.csv``, ``.csv.gz``, ``.parquet`` or ``.pq``, or a data set's name.

    Raises
    ------
    DataError
        If there is no such file or data set, or the file cannot be read.
    """
    path = Path(source)
    kind = "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]).lower()
    if kind not in (".csv", ".csv.gz", ".parquet", ".pq"):
        if path.exists():
            raise DataError(
                f"found a file {source!r} of unknown type; expected a name that ends in .csv, "
                ".csv.gz, .parquet or .pq, or the name of a bundled data set."
            )
        from lmmjax.datasets import load_dataset

        return load_dataset(source)
    if not path.is_file():
        raise DataError(f"found no file {source!r}; expected a CSV or Parquet file. {_near(path)}")
    return _read_file(path, kind)


def _read_file(path: Path, kind: str) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_csv(path) if kind.startswith(".csv") else pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise DataError(f"{str(path)!r} cannot be read as {kind[1:]}: {error}") from error


def _near(path: Path) -> str:
    """A hint at files of similar name in the same folder."""
    if not path.parent.is_dir():
        return f"There is no folder {str(path.parent)!r} either."
    close = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=2)
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else "Check the path."


def _model(options: argparse.Namespace) -> Model:
    """The model that the options state."""
    from lmmjax.model import Model

    data = read_table(options.data)
    return Model(
        options.formula,
        _with_factors(data, options.factors),
        residual=options.residual,
        weights=options.weights,
        offset=options.offset,
    )


def _with_factors(data: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Make columns categorical with sorted levels; those that are so already keep their order."""
    missing = [name for name in names if name not in data]
    if missing:
        raise DataError(
            f"--factors names {', '.join(map(repr, missing))}; expected columns of the data: "
            f"{', '.join(map(str, data.columns))}."
        )
    return data.astype({name: "category" for name in names if data[name].dtype != "category"})


# -------------------------------------------------------------------------------------------------
# Commands
# -------------------------------------------------------------------------------------------------


def _fit(options: argparse.Namespace, heard: list[type[Warning]]) -> int:
    model = _model(options)
    if options.own_process:
        _compile_lightly(model)
    _, products_s = _timed(lambda: model._prepared)
    fit, first_s = _timed(lambda: _the_fit(model, options))
    if options.json:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first call has said it
            _, warm_s = _timed(lambda: _the_fit(model, options))
        timing = {
            "import_s": options.import_s,
            "compile_s": max(first_s - warm_s, 0.0),
            "fit_s": products_s + warm_s,
        }
        print(to_json({**fit_record(fit), "timing": timing}))
    else:
        print(fit.summary())
    return DONE if fit.converged else NOT_CONVERGED


def _the_fit(model: Model, options: argparse.Namespace) -> Fit:
    if options.information != "expected" and options.df != "kenward-roger":
        raise LmmError(
            f"found --information {options.information} with --df {options.df or 'satterthwaite'}; "
            "expected it with --df kenward-roger, whose information it names."
        )
    return model.fit(FREQUENTIST[options.method], df=options.df, information=options.information)


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return function(), time.perf_counter() - began


def _compare(options: argparse.Namespace, heard: list[type[Warning]]) -> int:
    from lmmjax.comparison import compare

    _check_methods(options.methods)
    if options.report:
        _check_writable(Path(options.report))
    model = _model(options)
    comparison = compare(*(_result(model, m, options) for m in options.methods))
    print(to_json(comparison_record(comparison)) if options.json else comparison)
    if options.report:
        _tell(f"report written to {comparison.to_html(options.report)}")
    return NOT_CONVERGED if ConvergenceWarning in heard else DONE


def _result(model: Model, method: str, options: argparse.Namespace) -> Any:
    if method in FREQUENTIST:
        return model.fit(FREQUENTIST[method])
    sizes = {"draws": options.draws, "warmup": options.warmup, "chains": options.chains}
    return model.sample(method, seed=options.seed, **(sizes if method == "nuts" else {}))


def _check_methods(methods: list[str]) -> None:
    known = (*FREQUENTIST, *BAYESIAN)
    for method in methods:
        if method not in known:
            raise LmmError(f"--methods names {method!r}; expected some of {', '.join(known)}.")


def _check_writable(path: Path) -> None:
    """Refuse a report that could not be written before minutes are spent on it."""
    if path.is_dir():
        raise DataError(f"--report names a folder, {str(path)!r}; expected a file such as out.html")
    path.parent.mkdir(parents=True, exist_ok=True)


# -------------------------------------------------------------------------------------------------
# JSON
# -------------------------------------------------------------------------------------------------


def to_json(record: Any) -> str:
    """Strict JSON: numbers in full precision, NaN and infinities as null.

    Examples
    --------
    >>> to_json({"a": [1, float("nan")]})
    '{"a": [1, null]}'
    """
    return json.dumps(_plain(record), allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """NumPy and pandas values as Python's own."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value


def fit_record(fit: Fit) -> dict[str, Any]:
    """Everything about a fit as nested dicts and lists."""
    scalars = (
        "method n_obs n_dropped converged singular message loglik deviance aic bic sigma".split()
    )
    head = {name: getattr(fit.model if name == "n_dropped" else fit, name) for name in scalars}
    return head | {
        "formula": fit.model.formula,
        "groups": fit.model.groups,
        "df_method": fit.df,
        "information": fit.information,
        "n_params": fit.n_params,
        "n_evals": fit.n_evals,
        "fixed": _fixed_record(fit.coef_table()),
        "aliased": list(fit.model.design.aliased),
        "vcov": fit.vcov().to_numpy(),
        "theta": dict(zip(fit.model.theta_names, fit.theta, strict=True)),
        "varcorr": varcorr_record(fit),
        "residual": dict(fit.residual_params()),
        "ranef": {group: _ranef_record(fit, group) for group in fit.model.groups},
    }


def _fixed_record(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{"name": name, **row} for name, row in table.to_dict("index").items()]


def varcorr_record(result: Any) -> list[dict[str, Any]]:
    """SDs and correlation matrix of each random-effects term, in formula order."""
    table = result.varcorr()
    out = []
    for term in result.model.design.terms:
        mine = table[(table["group"] == term.group) & table["term1"].isin(term.names)]
        cells = {(r.term1, _text(r.term2)): r.sdcor for r in mine.itertuples()}
        sd = [cells[name, ""] for name in term.names]
        corr = [[_cell(cells, a, b) for b in term.names] for a in term.names]
        out.append({"group": term.group, "terms": list(term.names), "sd": sd, "corr": corr})
    return out


def _text(name: Any) -> str:
    """A name, or "" where it is missing."""
    return name if isinstance(name, str) else ""


def _cell(cells: dict[tuple[str, str], float], a: str, b: str) -> float:
    """A correlation of two columns of one term; 0 where the structure has none."""
    return 1.0 if a == b else cells.get((a, b), cells.get((b, a), 0.0))


def _ranef_record(result: Any, group: str) -> dict[str, Any]:
    """``{level: {term: {estimate, sd}}}``."""
    values, sds = result.ranef(group), result.ranef_se(group)
    pairs = zip(values.index, values.to_numpy(), sds.to_numpy(), strict=True)
    return {
        str(level): {
            term: {"estimate": value, "sd": sd}
            for term, value, sd in zip(values.columns, row, row_sd, strict=True)
        }
        for level, row, row_sd in pairs
    }


def comparison_record(comparison: Any) -> dict[str, Any]:
    """Methods, random effects, agreement and explanation as nested dicts and lists."""
    methods = [
        {
            "method": label,
            "fixed": _fixed_record(result.coef_table(level=comparison.level)),
            "varcorr": varcorr_record(result),
            "sigma": float(result.sigma),
            "seconds": float(result.seconds),
            "diagnostics": {k: v for k, v in diagnostics.items() if k != "seconds"},
        }
        for (label, result), diagnostics in zip(
            zip(comparison.labels, comparison.results, strict=True),
            comparison.diagnostics_records(),
            strict=True,
        )
    ]
    agreement = comparison.agreement()
    return {
        "formula": comparison.results[0].model.formula,
        "n_obs": comparison.results[0].model.n_obs,
        "methods": methods,
        "random_effects": {g: _random_record(comparison, g) for g in comparison.groups},
        "agreement": agreement.to_dict("records"),
        "explanation": comparison.explain().splitlines(),
    }


def _random_record(comparison: Any, group: str) -> dict[str, Any]:
    """``{level: {term: {method: {estimate, sd, low, high, ...}}}}``."""
    out: dict[str, Any] = {}
    for row in comparison.random_effects(group).to_dict("records"):
        level, term, method = (row.pop(name) for name in ("level", "term", "method"))
        out.setdefault(str(level), {}).setdefault(term, {})[method] = row
    return out


if __name__ == "__main__":
    sys.exit(main())

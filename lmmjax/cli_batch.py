"""``lmmjax batch`` and ``lmmjax study``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmjax.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.batchfit import BatchFit

STUDIES = ("ml_bias", "clustering", "boundary")


def add_parsers(
    commands: Any, command: Callable[..., argparse.ArgumentParser], names: Callable[[str], Any]
) -> None:
    """Add both subcommands to the command line."""
    parser = command(commands, "batch", "fit one formula to many responses or data sets", _batch)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--responses", type=names, metavar="A,B", help="columns, a response each")
    which.add_argument("--by", type=names, metavar="COL", help="columns that tell data sets apart")
    add = parser.add_argument
    add("--method", type=str.lower, choices=["reml", "ml"], default="reml")
    add("--df", help="satterthwaite, residual or wald")
    add("--adjust", choices=["none", "holm", "bh"], default="none", help="p-values over the items")
    add("--out", metavar="FILE", help="write all coefficients to a .parquet or .csv file")
    study = commands.add_parser(
        "study", help="run a bundled simulation study", description="Run a simulation study."
    )
    add = study.add_argument
    add("name", metavar="NAME", choices=STUDIES, help=", ".join(STUDIES))
    add("--reps", type=int, default=1000, help="replicates; default 1000")
    add("--seed", type=int, default=0)
    add("--out", metavar="DIR", help="keep finished blocks there; a stopped run goes on")
    add("--json", action="store_true", help="one JSON object in full precision on stdout")
    study.set_defaults(run=_study)


def _batch(options: argparse.Namespace, heard: Any) -> int:
    from lmmjax.cli import DONE, NOT_CONVERGED, to_json

    out = None if options.out is None else _out(options.out)
    made = _fit(options)
    table = made.coef_table(adjust=options.adjust)
    if out is not None:
        _write(table, made, out)
    if options.json:
        print(to_json(batch_record(made, table)))
    else:
        print(made)
    return DONE if made.n_failed == 0 else NOT_CONVERGED


def _fit(options: argparse.Namespace) -> BatchFit:
    from lmmjax.cli import _with_factors, read_table
    from lmmjax.groups import fit_groups
    from lmmjax.many import fit_many

    data = _with_factors(read_table(options.data), options.factors)
    shared = {
        "method": options.method,
        "df": options.df,
        "residual": options.residual,
        "weights": options.weights,
        "offset": options.offset,
        "progress": sys.stderr.isatty(),
    }
    if options.by:
        return fit_groups(options.formula, data, by=options.by, **shared)
    return fit_many(options.formula, data, options.responses, **shared)


def _out(path: str) -> Path:
    """Refuse a file that could not be written before the work is done."""
    file = Path(path)
    if file.suffix.lower() not in (".parquet", ".csv"):
        raise DataError(f"--out names {path!r}; expected a name that ends in .parquet or .csv.")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _write(table: pd.DataFrame, made: BatchFit, file: Path) -> None:
    """All coefficients with the status of their item."""
    status = made.status.loc[:, ["status", "loglik", "sigma"]].astype({"status": str})
    repeats = len(table) // len(status)
    for name in status:
        table[name] = status[name].repeat(repeats).to_numpy()
    if file.suffix.lower() == ".csv":
        table.to_csv(file, index=False)
    else:
        table.astype({"item": str, "term": str}).to_parquet(file, index=False)


def batch_record(made: BatchFit, table: pd.DataFrame) -> dict[str, Any]:
    """A batch as nested dicts and lists."""
    return {
        "formula": made.formula,
        "method": made.method,
        "df_method": made.df,
        "n_items": len(made),
        "n_failed": made.n_failed,
        "n_singular": made.n_singular,
        "n_retried": made.n_retried,
        "seconds": made.seconds,
        "fixed": table.astype({"term": str}).to_dict("records"),
        "varcorr": made.varcorr().to_dict("records"),
        "residual": made.residual_params().astype({"parameter": str}).to_dict("records"),
        "status": made.status.reset_index().astype({"status": str}).to_dict("records"),
    }


def _study(options: argparse.Namespace, heard: Any) -> int:
    from lmmjax.cli import DONE, to_json
    from lmmjax.studies import BUNDLED

    study = BUNDLED[options.name](n_rep=options.reps, seed=options.seed)
    result = study.run(options.out, progress=sys.stderr.isatty())
    if options.json:
        performance = result.performance().to_dict("records")
        head = {"study": options.name, "n_rep": options.reps, "seed": options.seed}
        print(to_json({**head, "performance": performance}))
    else:
        print(result)
    return DONE

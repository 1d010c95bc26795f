"""``lmmjax test``: likelihood-ratio test of two nested models."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmmjax.inference.lrt import LikelihoodRatio


def add_parser(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command line."""
    parser = command(commands, "test", "test a model against a larger one", _test)
    add = parser.add_argument
    add("big", metavar="FORMULA_BIG", help="the larger model; FORMULA is the smaller one")
    methods = ["chi2", "mixture", "bootstrap", "exact"]
    add("--method", choices=methods, default="chi2", help="null distribution; default chi2")
    add("--reml", action="store_true", help="restricted likelihoods, for equal fixed parts")
    add("--draws", type=int, metavar="N", help="draws of a simulated null distribution")
    add("--seed", type=int, default=0)


def _test(options: argparse.Namespace, heard: Any) -> int:
    from lmmjax.cli import DONE, NOT_CONVERGED, _model, _tell, to_json
    from lmmjax.errors import ComparisonError
    from lmmjax.inference.lrt import lrt
    from lmmjax.inference.nesting import same_span

    criterion = "REML" if options.reml else "ML"
    small = _model(options).fit(criterion)
    options.formula = options.big
    big = _model(options).fit(criterion)
    for fit in (small, big):
        if not fit.converged:
            _tell(f"{fit.model.formula}: {fit.message}")
            return NOT_CONVERGED
    X = [getattr(fit.model.design, "X", None) for fit in (small, big)]
    if options.reml and X[0] is not None and X[1] is not None and not same_span(X[0], X[1]):
        raise ComparisonError(
            "found restricted likelihoods of different fixed parts, which are likelihoods of "
            "different data; expected equal fixed parts. Leave out --reml."
        )
    result = lrt(small, big, options.method, n=options.draws, seed=options.seed)
    print(to_json(lrt_record(result, criterion)) if options.json else result)
    return DONE


def lrt_record(result: LikelihoodRatio, criterion: str) -> dict[str, Any]:
    """The test as nested dicts and lists."""
    names = ("method", "statistic", "df", "p_value", "mc_se", "note", "weights", "n_failed")
    models = result.table[["n_params", "loglik", "deviance", "aic", "bic"]]
    return {name: getattr(result, name) for name in names} | {
        "criterion": criterion,
        "models": [{"formula": f, **row} for f, row in models.to_dict("index").items()],
    }

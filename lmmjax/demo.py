"""The sleep study by ML, REML and NUTS, compared: ``python -m lmmjax.demo``."""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmmjax.comparison import Comparison

FORMULA = "Reaction ~ Days + (Days | Subject)"


def main(argv: Sequence[str] | None = None) -> int:
    """Fit, sample, compare, print, and write a report.

    Parameters
    ----------
    argv : sequence of str, optional
        ``--report FILE`` (default ``out/sleepstudy.html``), ``--draws N`` per chain.
    """
    options = _parser().parse_args(argv)
    began = time.perf_counter()
    import lmmjax as lmm
    from lmmjax.cli import use_cache
    from lmmjax.report import comparison_page

    use_cache()
    print(lmm.describe_dataset("sleepstudy").summary)
    model = lmm.Model(FORMULA, lmm.load_dataset("sleepstudy"))
    _step(began, "maximum likelihood and REML")
    ml, reml = model.fit(method="ML"), model.fit(method="REML")
    _step(began, "NUTS, random effects integrated out")
    posterior = model.sample(seed=0, draws=options.draws, warmup=options.draws)
    comparison = lmm.compare(ml, reml, posterior)
    _step(began, "comparison")
    print()
    print(comparison_page(comparison, levels=18).text())
    print()
    _write(comparison, options.report)
    _step(began, "done")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lmmjax.demo", description=__doc__)
    parser.add_argument("--report", type=Path, default=Path("out/sleepstudy.html"), metavar="FILE")
    parser.add_argument("--draws", type=int, default=500, help="per chain, and of the warm-up")
    return parser


def _step(began: float, what: str) -> None:
    print(f"[{time.perf_counter() - began:5.1f} s] {what}", flush=True)


def _write(comparison: Comparison, path: Path) -> None:
    """Write the report, without pictures where Matplotlib is not installed."""
    plots = importlib.util.find_spec("matplotlib") is not None
    written = comparison.to_html(path, plots=plots)
    words = "" if plots else " (without pictures: they need pip install 'lmmjax[plots]')"
    print(f"Report: {written}{words}")


if __name__ == "__main__":
    raise SystemExit(main())

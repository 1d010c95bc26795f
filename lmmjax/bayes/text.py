"""A posterior for people: what was sampled, under which priors, what came out, what to distrust."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmmjax.display import Page, TextTable, coef_table_text, data_lines, numbers, percent

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.bayes.posterior import Posterior

#: coefficients and components above this number are cut in the list of priors
MOST_PRIORS = 20


def page(posterior: Posterior, level: float = 0.95) -> Page:
    """Formula, sampler, warnings, tables and priors."""
    kind = "Linear mixed model" if posterior.model.is_mixed else "Linear model"
    lines = [*data_lines(posterior.model), _sampler_line(posterior), *_warning_lines(posterior)]
    blocks: list[str | TextTable] = ["\n".join(lines)]
    caption = (
        f"Standard deviations and correlations (posterior mean, SD, {percent(level)} interval)"
    )
    blocks.append(_varcorr_table(posterior.varcorr(level=level), level, caption))
    if posterior.model.is_structured:
        blocks.append(_residual_table(posterior, level))
    if posterior.model.design.p:
        caption = "Fixed effects (estimate: posterior mean; std. error: posterior SD)"
        blocks.append(coef_table_text(posterior.coef_table(level=level), level, caption))
    blocks.append(_priors_text(posterior))
    blocks.append(_checks_line(posterior))
    return Page(f"{kind}, posterior by {posterior.method}", blocks)


def _sampler_line(posterior: Posterior) -> str:
    return (
        f"Draws: {posterior.chains} chains of {posterior.draws} after {posterior.warmup} of "
        f"warm-up; seed {posterior.seed}"
    )


def _warning_lines(posterior: Posterior) -> list[str]:
    """What nobody should overlook, before any number."""
    found = posterior.problems
    return [f"NOT TO BE TRUSTED YET: {'; '.join(found)}"] if found else []


def _varcorr_table(frame: pd.DataFrame, level: float, caption: str) -> TextTable:
    names = [_name(a, b) for a, b in zip(frame["term1"], frame["term2"], strict=True)]
    first = frame["group"].where(frame["group"] != frame["group"].shift(), "")
    cells = _draw_cells(frame, ("sdcor", "sd", "low", "high"))
    rows = list(zip(first, names, *cells, strict=True))
    header = ["Group", "Name", *_draw_header(level)]
    return TextTable(header, rows, n_labels=2, caption=caption)


def _residual_table(posterior: Posterior, level: float) -> TextTable:
    frame = posterior.residual_intervals(level)
    cells = _draw_cells(frame, ("estimate", "std_error", "low", "high"))
    rows = list(zip(frame.index, *cells, strict=True))
    caption = f"Residual parameters (posterior mean, SD, {percent(level)} interval)"
    return TextTable(["", *_draw_header(level)], rows, n_labels=1, caption=caption)


def _draw_header(level: float) -> list[str]:
    half = 50 * (1 - level)
    return ["Mean", "SD", f"{half:.3g} %", f"{100 - half:.5g} %", "ESS", "R-hat"]


def _draw_cells(frame: pd.DataFrame, columns: tuple[str, ...]) -> list[list[str]]:
    cells = [numbers(frame[c], like=frame[columns[1]]) for c in columns]
    return [*cells, [f"{v:.0f}" for v in frame["ess"]], [f"{v:.3f}" for v in frame["rhat"]]]


def _name(term1: object, term2: object) -> str:
    if not isinstance(term1, str):
        return ""
    return f"cor {term1}, {term2}" if isinstance(term2, str) else term1


def _priors_text(posterior: Posterior) -> str:
    lines = posterior.priors.describe().split("\n")
    if len(lines) > MOST_PRIORS:
        left = len(lines) - MOST_PRIORS
        lines = [*lines[:MOST_PRIORS], f"... and {left} more: see .priors.describe()"]
    listed = "\n".join(f"  {line}" for line in lines)
    return f"Priors ({posterior.priors.base}), in the units of the data:\n{listed}"


def _checks_line(posterior: Posterior) -> str:
    c = posterior.diagnostics()
    return (
        f"Checks: R-hat at most {c['rhat_max']:.3f}; effective sample size at least "
        f"{c['ess_bulk_min']:.0f} (bulk), {c['ess_tail_min']:.0f} (tail); divergences "
        f"{c['divergences']}; E-BFMI at least {c['ebfmi_min']:.2f}"
    )

"""Results for people: the same sections as plain text and as HTML.

A result is first turned into a :class:`Page` of strings; two small writers then lay it out. Nothing
here computes a statistic.
"""

from __future__ import annotations

import html
import math
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit
    from lmmjax.inference.influence import Influence
    from lmmjax.model import Model

#: how the prints name a method of degrees of freedom
DF_WORDS = {
    "satterthwaite": "Satterthwaite's degrees of freedom",
    "kenward-roger": "Kenward-Roger degrees of freedom",
    "residual": "residual degrees of freedom",
    "containment": "containment degrees of freedom",
    "wald": "normal approximation",
}


#: columns of a page where there is no terminal
WIDTH = 120


@dataclass(frozen=True)
class TextTable:
    """A table of finished strings.

    Attributes
    ----------
    header : sequence of str
    rows : sequence of sequences of str
    n_labels : int
        Leading columns that are labels, set flush left; numbers are set flush right.
    caption : str
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    n_labels: int = 1
    caption: str = ""

    def text(self, width: int | None = None) -> str:
        """Lay out in columns for a fixed-width font.

        Columns that do not fit into ``width`` characters (by default those of the terminal, 120
        where there is none) continue below, the labels repeated: none is hidden.
        """
        width = shutil.get_terminal_size((WIDTH, 24)).columns if width is None else width
        lines = [self.header, *self.rows]
        widths = [max(len(line[j]) for line in lines) for j in range(len(self.header))]
        blocks = ["\n".join(self._lines(columns, widths)) for columns in self._split(widths, width)]
        return "\n".join([self.caption, *blocks] if self.caption else blocks)

    def _split(self, widths: Sequence[int], width: int) -> list[list[int]]:
        """Columns of each block: the labels, then as many as fit, one at least."""
        k = min(self.n_labels, len(widths))
        blocks, room = [list(range(k))], width - sum(w + 2 for w in widths[:k]) + 2
        left = room
        for j in range(k, len(widths)):
            left -= widths[j] + 2
            if left < 0 and len(blocks[-1]) > k:
                blocks.append(list(range(k)))
                left = room - widths[j] - 2
            blocks[-1].append(j)
        return blocks

    def _lines(self, columns: list[int], widths: Sequence[int]) -> list[str]:
        some = [widths[j] for j in columns]
        return [
            "  ".join(self._cells([line[j] for j in columns], some)).rstrip()
            for line in (self.header, *self.rows)
        ]

    def _cells(self, line: Sequence[str], widths: Sequence[int]) -> list[str]:
        return [
            cell.ljust(w) if j < self.n_labels else cell.rjust(w)
            for j, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]

    def html(self) -> str:
        """Write as an HTML table; every cell is escaped."""
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        head = "".join(f"<th>{html.escape(c)}</th>" for c in self.header)
        body = "".join(f"<tr>{self._html_row(row)}</tr>" for row in self.rows)
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _html_row(self, row: Sequence[str]) -> str:
        tags = ["th" if j < self.n_labels else "td" for j in range(len(row))]
        return "".join(f"<{t}>{html.escape(c)}</{t}>" for t, c in zip(tags, row, strict=True))


@dataclass(frozen=True)
class Page:
    """A title, then blocks: text (several lines) or tables."""

    title: str
    blocks: Sequence[str | TextTable]

    def text(self) -> str:
        """Lay out for a terminal, blocks parted by an empty line."""
        blocks = [b.text() if isinstance(b, TextTable) else _wrapped(b) for b in self.blocks]
        return "\n\n".join(["\n".join([self.title, *blocks[:1]]), *blocks[1:]])

    def html(self) -> str:
        """Write as an HTML fragment with its own style."""
        blocks = [b.html() if isinstance(b, TextTable) else paragraph(b) for b in self.blocks]
        title = f"<p class='title'>{html.escape(self.title)}</p>"
        return f"<div class='lmmjax'>{STYLE}{title}{''.join(blocks)}</div>"


#: every rule is bound to our own class, so that a notebook's tables keep their look
STYLE = """<style>
.lmmjax {font-size: 0.92em; line-height: 1.4; max-width: 70em}
.lmmjax p {margin: 0.4em 0; white-space: pre-line}
.lmmjax p.title {font-weight: 600; font-size: 1.1em}
.lmmjax table {border-collapse: collapse; margin: 0.8em 0; border: none;
  font-variant-numeric: tabular-nums}
.lmmjax caption {text-align: left; font-weight: 600; padding-bottom: 0.25em; caption-side: top}
.lmmjax th, .lmmjax td {padding: 0.15em 0.7em; border: none; text-align: right;
  white-space: nowrap}
.lmmjax thead th {border-bottom: 1px solid #8888; font-weight: 600}
.lmmjax tbody th {text-align: left; font-weight: 400}
.lmmjax thead th:first-child {text-align: left}
</style>"""


def _wrapped(text: str) -> str:
    """Break long lines between words, the rest of a line indented."""
    lines = text.split("\n")
    return "\n".join(
        textwrap.fill(
            line, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for line in lines
    )


def paragraph(text: str) -> str:
    """One HTML paragraph that keeps line breaks; the text is escaped."""
    return f"<p>{html.escape(text)}</p>"


def preformatted(text: str) -> str:
    """Fixed-width text as HTML; the text is escaped."""
    return f"<pre>{html.escape(text)}</pre>"


# -------------------------------------------------------------------------------------------------
# Numbers
# -------------------------------------------------------------------------------------------------


def numbers(values: Iterable[float], digits: int = 4, like: Any = None) -> list[str]:
    """Format a column with one number of decimals, the smallest value to ``digits`` digits.

    Missing values are blank; what would print as 0 but is not is written on its own scale.
    ``like`` (array) decides the decimals in place of the values: standard errors, say.

    Examples
    --------
    >>> numbers([251.405, 10.4673, float("nan")])
    ['251.41', '10.47', '']
    >>> numbers([12345678.0, 1e-9, 0.0])
    ['12345678.0', '1e-09', '0.0']
    >>> numbers([251.4051, 10.4673], like=[6.8246, 1.5458])
    ['251.405', '10.467']
    """
    x = np.asarray(list(values), float)
    sizes = _useful(x)
    decimals = _decimals(sizes if like is None else _useful(like), sizes, digits)
    return [_number(v, decimals) for v in x]


def _useful(values: Any) -> np.ndarray:
    x = np.abs(np.asarray(values, float))
    return x[np.isfinite(x) & (x != 0)]


def _decimals(shown: np.ndarray, sizes: np.ndarray, digits: int) -> int:
    """Decimals that give the smallest of ``shown`` its digits, if the largest stays readable."""
    if shown.size == 0 or sizes.size == 0:
        return 1
    smallest, largest = (math.floor(math.log10(s)) for s in (shown.min(), sizes.max()))
    wanted = max(digits - 1 - smallest, 0)
    return min(wanted, max(8 - max(largest, 0), 1), digits + 2)


def _number(value: float, decimals: int) -> str:
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if abs(value) >= 1e12 or (value != 0 and abs(value) < 0.5 * 10**-decimals):
        return f"{value:.3g}"
    return f"{value:.{decimals}f}"


def p_values(values: Iterable[float]) -> list[str]:
    """Format p-values to 3 digits, the tiny ones as a bound."""
    return ["" if math.isnan(p) else "< 1e-16" if p < 1e-16 else f"{p:.3g}" for p in values]


def percent(level: float) -> str:
    """Write 0.95 as "95 %"."""
    return f"{100 * level:.6g} %"


def plural(n: int, noun: str) -> str:
    """Count things: "1 row", "2 rows"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


# -------------------------------------------------------------------------------------------------
# What fits and models share
# -------------------------------------------------------------------------------------------------


def data_lines(model: Model) -> list[str]:
    """Formula, rows, groups, and all that was dropped or added, one line each."""
    design = model.design
    lines = [f"Formula: {model.formula}", _size_line(model)]
    if design.has_weights:
        known = design.residual is None and model.residual
        lines.append(f"Weights: {known or 'precision weights, Var(ε) = σ²/w'}")
    if design.residual is not None:
        lines.append(f"Residual structure: {model.residual}")
    if design.has_offset:
        lines.append("Offset: yes")
    if model.n_dropped:
        lines.append(_dropped_line(model))
    if design.aliased:
        lines.append(f"dropped for rank deficiency: {', '.join(design.aliased)}")
    return lines


def _size_line(model: Model) -> str:
    groups = ", ".join(f"{group} {n}" for group, n in model.groups.items())
    return f"Observations: {model.n_obs}" + (f"; groups: {groups}" if groups else "")


def _dropped_line(model: Model) -> str:
    where = ", ".join(f"{name}: {count}" for name, count in model.design.missing.items() if count)
    line = f"{plural(model.n_dropped, 'row')} with missing values dropped"
    return f"{line} ({where})" if where else line


def varcorr_table(frame: pd.DataFrame, caption: str = "Random effects") -> TextTable:
    """lme4's table of variance components from ``varcorr()``."""
    single = frame[frame["term2"].isna()]
    variances, sds = numbers(single["vcov"]), numbers(single["sdcor"])
    corr = _correlations(frame)
    wide = max((len(c) for c in corr.values()), default=0)
    rows, seen = [], None
    for (_, row), variance, sd in zip(single.iterrows(), variances, sds, strict=True):
        name = row["term1"] if isinstance(row["term1"], str) else ""
        cells = corr.get((row["group"], name), []) if name else []
        label = row["group"] if row["group"] != seen else ""
        rows.append([label, name, variance, sd, *cells, *[""] * (wide - len(cells))])
        seen = row["group"]
    header = ["Group", "Name", "Variance", "SD", *(["Corr"] + [""] * wide)[:wide]]
    return TextTable(header, rows, n_labels=2, caption=caption)


def _correlations(frame: pd.DataFrame) -> dict[tuple[str, str], list[str]]:
    """Per (group, term): its correlations with the terms before it."""
    out: dict[tuple[str, str], list[str]] = {}
    for row in frame[frame["term2"].notna()].itertuples():
        text = "NaN" if math.isnan(row.sdcor) else f"{row.sdcor:.3f}"
        out.setdefault((row.group, row.term2), []).append(text)
    return out


def coef_table_text(frame: pd.DataFrame, level: float, caption: str) -> TextTable:
    """The table of coefficients of a frequentist fit, or of a posterior."""
    half = 50 * (1 - level)
    titles = _TITLES | {"ci_low": f"{half:.3g} %", "ci_high": f"{100 - half:.5g} %"}
    shown = [c for c in titles if c in frame]
    cells = [_coef_column(frame, c) for c in shown]
    rows = list(zip(map(str, frame.index), *cells, strict=True))
    return TextTable(["", *(titles[c] for c in shown)], rows, caption=caption)


def _coef_column(frame: pd.DataFrame, column: str) -> list[str]:
    if column == "p_value":
        return p_values(frame[column])
    if column in _FIXED_DECIMALS:
        return [_number(v, _FIXED_DECIMALS[column]) for v in frame[column]]
    return numbers(frame[column], like=frame["std_error"])


_TITLES = {
    "estimate": "Estimate",
    "std_error": "Std. error",
    "df": "df",
    "statistic": "t value",
    "p_value": "Pr(>|t|)",
    "ess": "ESS",
    "rhat": "R-hat",
}
_FIXED_DECIMALS = {"df": 1, "statistic": 3, "ess": 0, "rhat": 3}


# -------------------------------------------------------------------------------------------------
# Model and fit
# -------------------------------------------------------------------------------------------------


def model_page(model: Model) -> Page:
    """A model before it is fitted."""
    kind = "Linear mixed model" if model.is_mixed else "Linear model"
    lines = data_lines(model)
    lines.append(f"Fixed effects: {', '.join(model.design.x_names) or 'none'}")
    for term in model.design.terms:
        cov = "" if term.cov == "us" else f"; covariance {term.cov}"
        lines.append(f"Random effects: {', '.join(term.names)} | {term.group}{cov}")
    return Page(f"{kind}, not fitted", ["\n".join(lines)])


def fit_page(fit: Fit, level: float = 0.95) -> Page:
    """A fit as lme4's summary shows it."""
    kind = "Linear mixed model" if fit.model.is_mixed else "Linear model"
    if fit.model.is_structured and not fit.model.is_mixed:
        kind = "Marginal linear model"
    words = {"REML": "REML", "ML": "maximum likelihood"}[fit.method]
    blocks: list[str | TextTable] = ["\n".join([*data_lines(fit.model), *_warning_lines(fit)])]
    blocks.append(_criteria_line(fit))
    if fit.model.is_mixed:
        blocks.append(varcorr_table(fit.varcorr()))
    else:
        blocks.append(_sigma_line(fit))
    if fit.model.is_structured:
        params = fit.residual_params()
        cells = [
            [str(name), value] for name, value in zip(params.index, numbers(params), strict=True)
        ]
        row = _reference_row(fit.model)
        caption = f"Residual structure (residual SD: at {row})" if row else "Residual structure"
        blocks.append(TextTable(["", "Estimate"], cells, caption=caption))
    if len(fit.model.design.x_names):
        caption = f"Fixed effects ({DF_WORDS.get(fit.df, fit.df)})"
        blocks.append(coef_table_text(fit.coef_table(level=level), level, caption))
    if fit.converged and len(fit.theta) + len(fit.phi):
        blocks.append(f"Optimiser: {fit.optimizer}, {fit.message.split(';')[0]}")
    return Page(f"{kind} fit by {words}", blocks)


def _criteria_line(fit: Fit) -> str:
    criterion = "REML criterion" if fit.method == "REML" else "deviance"
    pairs = [
        ("AIC", fit.aic),
        ("BIC", fit.bic),
        ("logLik", fit.loglik),
        (criterion, fit.deviance),
    ]
    return "   ".join(f"{name} {_number(value, 3)}" for name, value in pairs)


def _sigma_line(fit: Fit) -> str:
    df = fit.n_obs - len(fit.model.design.x_names)
    row = _reference_row(fit.model)
    where = f" at {row}" if row else ""
    value = numbers([fit.sigma])[0]
    return f"Residual standard deviation{where}: {value} ({df} degrees of freedom)"


def _reference_row(model: Model) -> str:
    """Which rows σ is the SD of, in words; empty for equal variances."""
    if not model.is_structured:
        return ""
    from lmmjax.expr import deparse
    from lmmjax.residual.language import parse_residual

    spec = parse_residual(model.residual)
    words = {"ident": "the first level of {}", "power": "|{}| = 1", "exp": "{} = 0"}
    found = [words[v.kind].format(deparse(v.node)) for v in spec.estimated]
    if spec.correlation is not None and spec.correlation.heterogeneous:
        found.insert(0, "the first position")
    return ", ".join(found)


def _warning_lines(fit: Fit) -> list[str]:
    """What nobody should overlook, before any number."""
    lines = []
    if not fit.converged:
        lines.append(f"NOT CONVERGED: {fit.message}")
    if fit.singular:
        lines.append(f"SINGULAR FIT: {boundary(fit)}")
    return lines


def boundary(fit: Fit) -> str:
    """Which variance components of a singular fit are on the boundary, in words."""
    from lmmjax.fitting import boundary as phrases

    return "; ".join(phrases(fit.model, fit._theta_s))


def influence_page(influence: Influence, shown: int = 5) -> Page:
    """The rows and groups with the largest Cook's distances."""
    fit = influence.fit
    how = "by refits" if influence.refit else "at the θ of the fit"
    lines = [f"Formula: {fit.model.formula}", f"Groups are left out {how}, rows at its θ."]
    blocks: list[str | TextTable] = ["\n".join(lines)]
    frames = {f"{g}, by Cook's distance": influence.groups(g) for g in fit.model.groups}
    rows = influence.rows()[["residual", "std_residual", "leverage", "leverage_fixed", "cooks_d"]]
    for caption, frame in {**frames, "Rows, by Cook's distance": rows}.items():
        top = frame.sort_values("cooks_d", ascending=False, kind="stable").head(shown)
        numeric = {c: numbers for c in top if top[c].dtype.kind == "f"}
        words = f"{caption} ({len(top)} of {len(frame)})"
        blocks.append(as_table(top, numeric, words))
    blocks.append("More: .rows(), .groups(group), .dfbetas(group), .plot(group)")
    return Page("Influence", blocks)


def model_text(model: Model) -> str:
    """A model in words."""
    return model_page(model).text()


def fit_text(fit: Fit) -> str:
    """A fit in words and tables, as lme4's summary shows it."""
    return fit_page(fit).text()


def fit_html(fit: Fit) -> str:
    """A fit as an HTML fragment; formula, labels and levels are escaped."""
    return fit_page(fit).html()


def as_table(frame: pd.DataFrame, formats: dict[str, Any], caption: str = "") -> TextTable:
    """A frame with a plain index as a table; ``formats`` maps columns to column formatters."""
    columns = [[str(label) for label in frame.index]]
    columns += [
        formats[c](frame[c]) if c in formats else list(map(str, frame[c])) for c in frame.columns
    ]
    header = [frame.index.name or "", *map(str, frame.columns)]
    return TextTable(header, list(zip(*columns, strict=True)), caption=caption)

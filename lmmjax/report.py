"""A comparison for people: the page that ``print`` shows, and the report that is written."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmjax.comparison import COMPONENT, component_label, is_posterior
from lmmjax.display import Page, TextTable, data_lines, numbers, percent, preformatted

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.comparison import Comparison

#: levels of a group that ``print`` shows
SHOWN_LEVELS = 6


def comparison_page(comparison: Comparison, levels: int = SHOWN_LEVELS) -> Page:
    """Side-by-side tables and explanation; ``levels`` random effects of each group are shown."""
    blocks: list[str | TextTable] = [
        "\n".join(_head_lines(comparison)),
        _fixed_table(comparison),
        _variance_table(comparison),
        *(_random_table(comparison, group, levels) for group in comparison.groups),
    ]
    if len(comparison.labels) > 1:
        blocks.append(_agreement_table(comparison))
    blocks.append(_run_table(comparison))
    words = comparison.explain()
    return Page(
        f"Comparison of {_listed(comparison.labels)}", [*blocks, *([words] if words else [])]
    )


def _listed(labels: tuple[str, ...]) -> str:
    *first, last = labels
    return f"{', '.join(first)} and {last}" if first else last


def _head_lines(comparison: Comparison) -> list[str]:
    """Formula and data, once where all results share them."""
    models = [r.model for r in comparison.results]
    if all(m is models[0] or data_lines(m) == data_lines(models[0]) for m in models):
        return data_lines(models[0])
    formulas = [f"{m}: {r.formula}" for m, r in zip(comparison.labels, models, strict=True)]
    return [*formulas, *data_lines(models[0])[1:]]


# -------------------------------------------------------------------------------------------------
# Tables
# -------------------------------------------------------------------------------------------------


def _fixed_table(comparison: Comparison) -> TextTable:
    frame = comparison.fixed_effects().rename(columns={"std_error": "sd", "term": "label"})
    what = f"estimate (SE or posterior SD) and {percent(comparison.level)} interval"
    return _side_by_side(frame, comparison.labels, f"Fixed effects: {what}")


def _variance_table(comparison: Comparison) -> TextTable:
    frame = comparison.variance_components().rename(columns={"std_error": "sd"})
    labels = [component_label(*row) for row in frame[COMPONENT].itertuples(index=False)]
    caption = "Variance components: SDs and correlations"
    return _side_by_side(frame.assign(label=labels), comparison.labels, caption)


def _side_by_side(frame: pd.DataFrame, methods: tuple[str, ...], caption: str) -> TextTable:
    """Methods in columns, two lines a quantity: estimate (sd), and interval where there is one."""
    rows = []
    for label, mine in frame.groupby("label", sort=False):
        mine = mine.set_index("method").reindex(methods)
        point, interval = _cells(mine)
        rows.append([str(label), *point])
        if any(interval):
            rows.append(["", *interval])
    return TextTable(["", *methods], rows, caption=caption)


def _cells(mine: pd.DataFrame) -> tuple[list[str], list[str]]:
    like = mine["sd"] if mine["sd"].notna().any() else mine["estimate"]
    estimate = numbers(mine["estimate"], 3, like=like)
    sd = numbers(mine["sd"], 3, like=like)
    low, high = (numbers(mine[c], 3, like=like) for c in ("low", "high"))
    point = [f"{a} ({b})" if b else a for a, b in zip(estimate, sd, strict=True)]
    return point, [f"[{a}, {b}]" if a else "" for a, b in zip(low, high, strict=True)]


def _random_table(comparison: Comparison, group: str, levels: int) -> TextTable:
    """BLUP (conditional SD) beside posterior mean (SD) for the first levels."""
    frame = comparison.random_effects(group)
    every = list(dict.fromkeys(frame["level"]))
    several = frame["term"].nunique() > 1
    frame = frame[frame["level"].isin(every[:levels])]
    rows = []
    for term, block in frame.groupby("term", sort=False):
        like = block["sd"]
        cells = [
            f"{a} ({b})"
            for a, b in zip(
                numbers(block["estimate"], 3, like=like), numbers(block["sd"], 3), strict=True
            )
        ]
        wide = block.assign(cell=cells).pivot(index="level", columns="method", values="cell")
        wide = wide.reindex(index=every[:levels], columns=list(comparison.labels))
        wide = wide.astype(object).where(wide.notna(), "")
        rows += [
            [str(level), *([str(term)] if several else []), *row] for level, row in _items(wide)
        ]
    shown = "" if len(every) <= levels else f", first {levels} of {len(every)} levels"
    caption = f"Random effects of {group}: BLUP (conditional SD), posterior mean (SD){shown}"
    header = [group, *(["Term"] if several else []), *comparison.labels]
    return TextTable(header, rows, n_labels=2 if several else 1, caption=caption)


def _items(wide: pd.DataFrame) -> Iterator[tuple[Any, list[str]]]:
    return zip(wide.index, wide.to_numpy().tolist(), strict=True)


def _agreement_table(comparison: Comparison) -> TextTable:
    frame = comparison.agreement()
    rows = []
    for row in frame.itertuples():
        label = row.kind if row.what == "all" else row.what
        values = (row.mean_std_diff, row.max_std_diff, row.ccc, row.overlap)
        rows.append([label, f"{row.method1}, {row.method2}", *map(_thousandths, values)])
    header = ["", "Methods", "Mean diff.", "Max diff.", "Concordance", "Overlap"]
    caption = "Agreement: differences in pooled SDs, concordance over levels, overlap of intervals"
    return TextTable(header, rows, n_labels=2, caption=caption)


def _thousandths(value: float) -> str:
    """Three decimals; blank where unknown."""
    return "" if value != value else f"{value:.3f}"


def _run_table(comparison: Comparison) -> TextTable:
    rows = [
        [label, f"{result.seconds:7.2f}", _checks(result)]
        for label, result in zip(comparison.labels, comparison.results, strict=True)
    ]
    return TextTable(["", "Seconds", "Checks"], rows, 3, caption="Run time and convergence")


def _checks(result: Any) -> str:
    if not is_posterior(result):
        return result.message
    checks = dict(result.diagnostics()).items()
    return ", ".join(f"{_CHECKS.get(name, name)} {_short(value)}" for name, value in checks)


#: how the prints name a posterior's diagnostics
_CHECKS = {
    "rhat_max": "largest R-hat",
    "ess_bulk_min": "least bulk ESS",
    "ess_tail_min": "least tail ESS",
    "ebfmi_min": "least E-BFMI",
}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# -------------------------------------------------------------------------------------------------
# The report
# -------------------------------------------------------------------------------------------------

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{font-family: system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff}}
h1 {{font-size: 1.5em}} h2 {{font-size: 1.15em; margin-top: 2em}}
figure {{margin: 1em 0}} figure img {{max-width: 100%}} figcaption {{font-size: 0.9em; color: #555}}
div.wide {{overflow-x: auto}}
</style></head><body>
<h1>{title}</h1>
{body}
<footer><p>Made by lmmjax {version}.</p></footer>
</body></html>
"""


def write_report(comparison: Comparison, path: str | os.PathLike[str], *, plots: bool) -> Path:
    """Write the report; see :meth:`lmmjax.comparison.Comparison.to_html`."""
    from lmmjax import __version__

    page = comparison_page(comparison, levels=50)
    sections = [f"<div class='wide'>{page.html()}</div>"]
    if plots:
        sections += [f"<h2>Pictures</h2>{_figures(comparison)}"]
    sections.append("<h2>The results one by one</h2>")
    for label, result in zip(comparison.labels, comparison.results, strict=True):
        sections.append(f"<h3>{html.escape(label)}</h3><div class='wide'>{_alone(result)}</div>")
    title = html.escape(page.title)
    text = _PAGE.format(title=title, body="\n".join(sections), version=__version__)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _alone(result: Any) -> str:
    own = getattr(result, "_repr_html_", None)
    return own() if own else preformatted(repr(result))


def _figures(comparison: Comparison) -> str:
    """Every picture of a comparison, inline."""
    from lmmjax.plots import pyplot

    plt = pyplot()
    parts = []
    for caption, draw in _drawings(comparison):
        axes = draw()
        figure = (axes if not hasattr(axes, "flat") else axes.flat[0]).figure
        parts.append(_inline(figure, caption))
        plt.close(figure)
    return "\n".join(parts)


def _drawings(comparison: Comparison) -> Iterator[tuple[str, Any]]:
    level = percent(comparison.level)
    yield f"Fixed effects with {level} intervals.", comparison.plot_fixed
    yield (
        f"Variance components, with {level} intervals where there are any.",
        comparison.plot_variance,
    )
    for group in comparison.groups:
        yield (
            f"Random effects of {group} with {level} intervals: given the estimates for BLUPs.",
            lambda group=group: comparison.plot_caterpillar(group),
        )
        yield (
            f"Shrinkage: from each {group}'s own least-squares estimate to the mixed model's.",
            lambda group=group: comparison.plot_shrinkage(group),
        )


def _inline(figure: Any, caption: str) -> str:
    """A figure as SVG in a data URI: sharp, and without a link to anywhere."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )

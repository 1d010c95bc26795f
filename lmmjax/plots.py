"""Pictures of a comparison: frames in, Matplotlib Axes out. Matplotlib is imported when drawing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax.errors import LmmError

if TYPE_CHECKING:
    import pandas as pd

#: Okabe and Ito's palette, told apart by colour-blind readers and on grey paper by the markers
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P")
GREY = "#777777"


def pyplot() -> Any:
    """Import ``matplotlib.pyplot``, or say how to get it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise LmmError(
            "plots need Matplotlib, which is not installed; expected the optional dependencies "
            "lmmjax[plots]. Run: pip install 'lmmjax[plots]'"
        ) from error
    return plt


def _tidy(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)


def _panels(n: int, columns: int, width: float, height: float) -> np.ndarray:
    """A grid of n Axes (flat array); unused places are removed."""
    plt = pyplot()
    columns = min(n, columns)
    rows = math.ceil(n / columns)
    size = (width * columns, height * rows)
    _, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in grid.flat[n:]:
        ax.remove()
    return grid.ravel()[:n]


def _style(i: int, size: float = 5.0) -> dict[str, Any]:
    """Colour and marker of the i-th method."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": size,
    }


def _points(ax: Any, mine: pd.DataFrame, at: np.ndarray, style: dict[str, Any], label: str) -> None:
    """Estimates with horizontal intervals where they are known."""
    x = mine["estimate"].to_numpy(float)
    low, high = mine["low"].to_numpy(float), mine["high"].to_numpy(float)
    ax.hlines(at, low, high, color=style["color"], linewidth=1.4, alpha=0.85)
    ax.plot(x, at, linestyle="none", label=label, **style)


def forest(frame: pd.DataFrame) -> np.ndarray:
    """Estimates by method with intervals, one panel a quantity.

    Parameters
    ----------
    frame : DataFrame
        Columns ``label method estimate low high``; missing limits draw a point alone.

    Returns
    -------
    ndarray of Axes, one per label
    """
    methods = list(dict.fromkeys(frame["method"]))
    labels = list(dict.fromkeys(frame["label"]))
    columns = 2 if len(labels) == 4 else 3
    axes = _panels(len(labels), columns, 3.6, 0.9 + 0.32 * len(methods))
    for k, (ax, label) in enumerate(zip(axes, labels, strict=True)):
        for i, method in enumerate(methods):
            mine = frame[(frame["label"] == label) & (frame["method"] == method)]
            _points(ax, mine, np.full(len(mine), -i), _style(i), method)
        ax.set_title(label, fontsize=10)
        ax.set_yticks([-i for i in range(len(methods))], methods if k % columns == 0 else [])
        ax.set_ylim(-len(methods) + 0.4, 0.6)
        ax.margins(x=0.08)
        ax.locator_params(axis="x", nbins=5)
        _tidy(ax)
        ax.tick_params(left=False)
    return axes


def caterpillar(frame: pd.DataFrame, group: str, max_levels: int = 60) -> np.ndarray:
    """Random effects of each level by method, sorted, with intervals; one panel a term.

    Parameters
    ----------
    frame : DataFrame
        Columns ``level term method estimate low high``.
    group : str
        Name of the grouping factor, for the axis.
    max_levels : int
        Of more levels, as many are shown that are evenly spaced in rank; the title says so.

    Returns
    -------
    ndarray of Axes, one per term
    """
    terms = list(dict.fromkeys(frame["term"]))
    shown = min(frame["level"].nunique(), max_levels)
    axes = _panels(len(terms), 3, 4.2, 1.4 + 0.2 * shown)
    for ax, term in zip(axes, terms, strict=True):
        _caterpillar(ax, frame[frame["term"] == term], max_levels)
        _tidy(ax)
        ax.set_title(str(term), fontsize=10)
    axes[0].set_ylabel(group)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return axes


def _caterpillar(ax: Any, block: pd.DataFrame, max_levels: int) -> None:
    methods = list(dict.fromkeys(block["method"]))
    order = block[block["method"] == methods[0]].sort_values("estimate")["level"].to_numpy()
    if len(order) > max_levels:
        total = len(order)
        order = order[np.linspace(0, total - 1, max_levels).round().astype(int)]
        ax.set_xlabel(f"{max_levels} of {total} levels, evenly spaced in rank", fontsize=9)
    at = {level: i for i, level in enumerate(order)}
    step = 0.6 / max(len(methods), 2)
    ax.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
    for i, method in enumerate(methods):
        mine = block[(block["method"] == method) & block["level"].isin(at)]
        offset = ((len(methods) - 1) / 2 - i) * step
        y = mine["level"].map(at).to_numpy(float) + offset
        _points(ax, mine, y, _style(i, 3.5), method)
    ax.set_yticks(range(len(order)), [str(level) for level in order], fontsize=8)
    ax.set_ylim(-0.7, len(order) - 0.3)


def shrinkage(frame: pd.DataFrame, group: str, ax: Any = None) -> Any:
    """Partial pooling: from each level's own estimate to the mixed model's.

    Two terms or more: arrows in the plane of the first two coefficients. One term: a line per level
    from its own mean to the shrunken one.

    Parameters
    ----------
    frame : DataFrame
        Columns ``level term none partial population``.
    group : str
        Name of the grouping factor.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    if ax is None:
        _, ax = pyplot().subplots(figsize=(6.4, 4.8), layout="constrained")
    terms = list(dict.fromkeys(frame["term"]))
    wide = frame.pivot(index="level", columns="term", values=["none", "partial", "population"])
    wide = wide.loc[list(dict.fromkeys(frame["level"]))]
    if len(terms) > 1:
        _plane(ax, wide, terms[0], terms[1])
    else:
        _slopes(ax, wide, terms[0], group)
    _tidy(ax)
    return ax


def _plane(ax: Any, wide: pd.DataFrame, first: str, second: str) -> None:
    (x0, y0), (x1, y1) = (
        (wide[how, first].to_numpy(float), wide[how, second].to_numpy(float))
        for how in ("none", "partial")
    )
    arrow = {
        "arrowstyle": "-|>",
        "color": GREY,
        "lw": 0.9,
        "alpha": 0.8,
        "shrinkA": 2,
        "shrinkB": 2,
    }
    for start, end in zip(zip(x0, y0, strict=True), zip(x1, y1, strict=True), strict=True):
        if np.all(np.isfinite(start)):
            ax.annotate("", xy=end, xytext=start, arrowprops=arrow)
    open_dot = {"facecolors": "white", "edgecolors": COLOURS[1], "linewidths": 1.4}
    ax.scatter(x0, y0, s=32, label="no pooling (least squares)", zorder=3, **open_dot)
    ax.scatter(x1, y1, s=32, color=COLOURS[0], label="partial pooling (mixed model)", zorder=3)
    centre = (wide["population", first].iloc[0], wide["population", second].iloc[0])
    ax.scatter(*centre, s=190, marker="*", color=COLOURS[4], label="population", zorder=4)
    if len(wide) <= 40:
        _name_levels(ax, wide.index, x0, y0)
    ax.set(xlabel=str(first), ylabel=str(second))
    ax.legend(frameon=False, fontsize=9)


def _name_levels(ax: Any, levels: Any, x: np.ndarray, y: np.ndarray) -> None:
    for level, a, b in zip(levels, x, y, strict=True):
        if np.isfinite(a) and np.isfinite(b):
            place = {"xytext": (4, 4), "textcoords": "offset points"}
            ax.annotate(str(level), (a, b), fontsize=7, color=GREY, **place)


def _slopes(ax: Any, wide: pd.DataFrame, term: str, group: str) -> None:
    none, partial = wide["none", term].to_numpy(float), wide["partial", term].to_numpy(float)
    ax.plot([0, 1], [none, partial], color=GREY, linewidth=0.9, alpha=0.7)
    ax.scatter(np.zeros(len(wide)), none, s=32, facecolors="white", edgecolors=COLOURS[1], zorder=3)
    ax.scatter(np.ones(len(wide)), partial, s=32, color=COLOURS[0], zorder=3)
    population = wide["population", term].iloc[0]
    ax.axhline(population, color=COLOURS[4], linestyle="--", linewidth=1.2, label="population")
    if len(wide) <= 40:
        for level, value in zip(wide.index, none, strict=True):
            if np.isfinite(value):
                ax.annotate(
                    str(level), (0, value), xytext=(-8, 0), textcoords="offset points",
                    ha="right", va="center", fontsize=8, color=GREY,
                )  # fmt: skip
    ax.set_xticks([0, 1], ["no pooling\n(least squares)", "partial pooling\n(mixed model)"])
    ax.set_xlim(-0.25, 1.15)
    ax.set_ylabel(f"{term} by {group}")
    ax.legend(frameon=False, fontsize=9)

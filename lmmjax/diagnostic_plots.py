"""Pictures of one fit: residuals, quantiles, leverage, influence, profiles. Matplotlib Axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax.plots import COLOURS, GREY, _panels, _tidy, pyplot

if TYPE_CHECKING:
    import pandas as pd

#: points that are named, and points of a running mean
NAMED, SMOOTH = 3, 40


def _axes(ax: Any, size: tuple[float, float] = (5.2, 4.0)) -> Any:
    if ax is not None:
        return ax
    return pyplot().subplots(figsize=size, layout="constrained")[1]


def _dots(ax: Any, x: np.ndarray, y: np.ndarray) -> None:
    ax.plot(
        x, y, "o", color=COLOURS[0], markersize=4, alpha=0.6, markeredgewidth=0, rasterized=True
    )


def _running_mean(ax: Any, x: np.ndarray, y: np.ndarray) -> None:
    """Means of y in equally full slices of x; nothing for few points."""
    slices = min(SMOOTH, len(x) // 8)
    if slices < 3:
        return
    parts = np.array_split(np.argsort(x, kind="stable"), slices)
    means = np.array([(x[i].mean(), y[i].mean()) for i in parts])
    ax.plot(*means.T, color=COLOURS[4], linewidth=1.4)


def _name(ax: Any, x: np.ndarray, y: np.ndarray, labels: Any, size: np.ndarray) -> None:
    """Label the points of the largest ``size``."""
    size = np.where(np.isfinite(size), size, -np.inf)
    for i in np.argsort(size)[::-1][:NAMED]:
        if np.isfinite(size[i]):
            ax.annotate(
                str(labels[i]), (x[i], y[i]), xytext=(4, 3), textcoords="offset points",
                fontsize=8, color=GREY,
            )  # fmt: skip


def residuals(fitted: np.ndarray, values: np.ndarray, ax: Any = None) -> Any:
    """Residuals against fitted values."""
    ax = _axes(ax)
    ax.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    _dots(ax, fitted, values)
    _running_mean(ax, fitted, values)
    ax.set(xlabel="fitted", ylabel="Pearson residual")
    _tidy(ax)
    return ax


def scale_location(fitted: np.ndarray, values: np.ndarray, ax: Any = None) -> Any:
    """Root of the absolute residuals against fitted values."""
    ax = _axes(ax)
    root = np.sqrt(np.abs(values))
    _dots(ax, fitted, root)
    _running_mean(ax, fitted, root)
    ax.set(xlabel="fitted", ylabel="√|Pearson residual|", ylim=(0, None))
    _tidy(ax)
    return ax


def _qq(ax: Any, theoretical: np.ndarray, values: np.ndarray, slope: float) -> None:
    _dots(ax, theoretical, values)
    ends = np.array([theoretical.min(), theoretical.max()])
    ax.plot(ends, slope * ends, color=GREY, linewidth=1)
    ax.set_xlabel("normal quantile")
    _tidy(ax)


def qq_residuals(frame: pd.DataFrame, ax: Any = None) -> Any:
    """Residuals of ``Fit.qq()`` against normal quantiles, with the line of their own SD."""
    ax = _axes(ax)
    values = frame["residual"].to_numpy(float)
    _qq(ax, frame["theoretical"].to_numpy(), values, float(values.std()))
    ax.set_ylabel("residual")
    return ax


def qq_blups(frame: pd.DataFrame, group: str) -> np.ndarray:
    """BLUPs of ``Fit.qq(group)`` against normal quantiles, a panel a term, with the line y = x.

    Terms whose variance is estimated as 0 have no standardised BLUPs: their panel is empty.
    """
    terms = list(dict.fromkeys(frame["term"]))
    axes = _panels(len(terms), 3, 4.2, 3.8)
    for ax, term in zip(axes, terms, strict=True):
        mine = frame[(frame["term"] == term) & frame["standardised"].notna()]
        if len(mine):
            x, y = mine["theoretical"].to_numpy(), mine["standardised"].to_numpy()
            _qq(ax, x, y, 1.0)
            _name(ax, x, y, mine["level"].to_numpy(), np.abs(y))
        ax.set_title(str(term), fontsize=10)
    axes[0].set_ylabel(f"standardised BLUP of {group}")
    return axes


def leverage(rows: pd.DataFrame, ax: Any = None) -> Any:
    """Standardised residuals against leverage, the largest Cook's distances named.

    Parameters
    ----------
    rows : DataFrame
        ``Influence.rows()``.
    """
    ax = _axes(ax)
    x, y = rows["leverage"].to_numpy(), rows["std_residual"].to_numpy()
    ax.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    _dots(ax, x, y)
    _name(ax, x, y, rows.index.to_numpy(), rows["cooks_d"].to_numpy())
    ax.set(xlabel="leverage", ylabel="standardised residual", xlim=(0, None))
    _tidy(ax)
    return ax


def influence(groups: pd.DataFrame, dfbetas: pd.DataFrame, max_levels: int = 40) -> np.ndarray:
    """Cook's distance by group, largest on top, beside DFBETAS of each coefficient.

    Parameters
    ----------
    groups, dfbetas : DataFrame
        ``Influence.groups(group)`` and ``Influence.dfbetas(group)``.
    max_levels : int
        The largest are shown; the title says of how many.

    Returns
    -------
    ndarray of two Axes
    """
    top = groups["cooks_d"].sort_values(ascending=False, kind="stable").head(max_levels).index[::-1]
    at = np.arange(len(top))
    axes = _panels(2, 2, 4.2, 1.4 + 0.2 * len(top))
    cooks = groups.loc[top, "cooks_d"].to_numpy()
    axes[0].hlines(at, 0, cooks, color=COLOURS[0], linewidth=1.4)
    axes[0].plot(cooks, at, "o", color=COLOURS[0], markersize=5)
    axes[0].set(xlabel="Cook's distance", ylabel=str(groups.index.name), xlim=(0, None))
    for i, name in enumerate(dfbetas):
        style = {"color": COLOURS[i % 6], "markersize": 4}
        axes[1].plot(dfbetas.loc[top, name], at, "o", label=str(name), **style)
    for limit in (-2, 2):
        axes[1].axvline(limit / np.sqrt(len(groups)), color=GREY, linewidth=0.8, linestyle=":")
    axes[1].set_xlabel("DFBETAS, dotted: ±2/√groups")
    axes[1].legend(frameon=False, fontsize=8)
    for ax, labels in zip(axes, (list(map(str, top)), [""] * len(top)), strict=True):
        ax.set_yticks(at, labels, fontsize=8)
        _tidy(ax)
    if len(top) < len(groups):
        axes[0].set_title(f"the {len(top)} largest of {len(groups)}", fontsize=10)
    return axes


def four(fit: Any) -> np.ndarray:
    """Residuals, their quantiles, scale and leverage of a fit."""
    axes = _panels(4, 2, 4.6, 3.6)
    fit.plot_residuals(ax=axes[0])
    fit.plot_qq(ax=axes[1])
    fit.plot_scale_location(ax=axes[2])
    fit.influence().plot_leverage(ax=axes[3])
    return axes


def zeta(frame: pd.DataFrame) -> np.ndarray:
    """Profile ζ, one panel a parameter, with the 50, 80, 95 and 99 % limits of a normal.

    Parameters
    ----------
    frame : DataFrame
        ``Fit.profile()``: ``parameter value zeta``.
    """
    from scipy import stats

    names = list(dict.fromkeys(frame["parameter"]))
    axes = _panels(len(names), 3, 3.6, 3.0)
    for ax, name in zip(axes, names, strict=True):
        mine = frame[frame["parameter"] == name]
        ax.plot(mine["value"], mine["zeta"], color=COLOURS[0], linewidth=1.6)
        for level in (0.5, 0.8, 0.95, 0.99):
            z = stats.norm.ppf(0.5 + level / 2)
            for sign in (-1, 1):
                ax.axhline(sign * z, color=GREY, linewidth=0.6, linestyle=":")
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.set_title(name, fontsize=10)
        _tidy(ax)
    axes[0].set_ylabel("ζ")
    return axes

"""Hypotheses as the caller gives them -> Lβ = rhs in the coefficients of the fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmmjax.errors import LmmError
from lmmjax.inference.grid import Rows, estimable_rows
from lmmjax.inference.words import Hypotheses, parse

if TYPE_CHECKING:
    from lmmjax.design import Design


def hypotheses(design: Design, L: Any, rhs: Any) -> Hypotheses:
    """Read a matrix, labelled rows, or words.

    Labelled rows (a frame, a Series, a dict, a list of Series or dicts) are put in the order of the
    coefficients by their labels; coefficients without a label have weight 0.

    Raises
    ------
    LmmError
        Shapes that do not fit, coefficients that are unknown, rows that are not estimable.
    """
    if isinstance(L, str) or (isinstance(L, Sequence) and L and isinstance(L[0], str)):
        if np.any(np.asarray(rhs, float) != 0):
            raise LmmError("rhs= goes with a matrix; in words write it after the equals sign.")
        return parse(L, design.x_names, design.aliased)
    if isinstance(L, Sequence | Mapping) and not L:
        raise LmmError(f"found {L!r} as a hypothesis; expected weights of coefficients.")
    found = _labelled(L)
    names = None if found is None else found.names
    matrix = np.atleast_2d(np.asarray(L, float)) if found is None else _aligned(design, found)
    matrix = _kept(design, matrix)
    values = np.asarray(rhs, float)
    if values.shape not in ((), (len(matrix),)):
        raise LmmError(
            f"rhs has shape {values.shape}; expected a number or one for each of the "
            f"{len(matrix)} rows."
        )
    right = np.broadcast_to(values, (len(matrix),)).astype(float)
    made = names or [_said(design.x_names, *row) for row in zip(matrix, right, strict=True)]
    return Hypotheses(matrix, right, made)


class _Labelled(NamedTuple):
    """Rows, the labels of their columns (None: by position), and names of the rows if any."""

    labels: list[str] | None
    values: np.ndarray  # (r, labels)
    names: list[str] | None


def _labelled(L: Any) -> _Labelled | None:
    """Rows that carry labels; None for arrays and lists of numbers."""
    if hasattr(L, "columns"):
        names = [str(i) for i in L.index] if hasattr(L, "index") else None
        return _Labelled(_texts(L.columns), np.atleast_2d(np.asarray(L, float)), names)
    rows = [L] if _is_row(L) else L
    if not (isinstance(rows, Sequence) and rows and all(_is_row(row) for row in rows)):
        return None
    labels = [_texts(row.keys(), isinstance(row, Mapping)) for row in rows]
    if all(own is None for own in labels):
        return None  # Series without labels of their own
    union = list(dict.fromkeys(x for own in labels for x in own or ["(none)"]))
    values = np.zeros((len(rows), len(union)))
    for i, (row, own) in enumerate(zip(rows, labels, strict=True)):
        values[i, [union.index(x) for x in _no_twins(own or ["(none)"])]] = _numbers(row)
    return _Labelled(union, values, None)


def _is_row(x: Any) -> bool:
    """Whether it is a dict or a Series."""
    return isinstance(x, Mapping) or (hasattr(x, "index") and hasattr(x, "items"))


def _texts(labels: Any, always: bool = False) -> list[str] | None:
    """Labels as text; None where none of them is text, so that their order alone counts."""
    labels = list(labels)
    return [str(x) for x in labels] if always or any(isinstance(x, str) for x in labels) else None


def _numbers(row: Any) -> np.ndarray:
    weights = list(row.values()) if isinstance(row, Mapping) else list(row)
    try:
        return np.array([float(w) for w in weights])
    except (TypeError, ValueError) as error:
        raise LmmError(
            f"L has the weights {weights}; expected a number for each coefficient, such as "
            "{'Days': 1}."
        ) from error


def _no_twins(labels: list[str]) -> list[str]:
    twice = sorted({x for x in labels if labels.count(x) > 1})
    if twice:
        raise LmmError(f"L has the labels {', '.join(twice)} twice; expected each one once.")
    return labels


def _aligned(design: Design, found: _Labelled) -> np.ndarray:
    """Labelled rows in the order of the coefficients; all columns where an aliased one is named."""
    if found.labels is None:
        return found.values
    labels, known = _no_twins(found.labels), [*design.x_names, *design.aliased]
    unknown = [x for x in labels if x not in known]
    if unknown:
        raise LmmError(
            f"L has the labels {', '.join(unknown)}; expected some of the coefficients "
            f"{', '.join(known)}."
        )
    weights = dict(zip(labels, found.values.T, strict=True))

    def columns(names: Sequence[str]) -> np.ndarray:
        return np.stack([weights.get(n, np.zeros(len(found.values))) for n in names], axis=1)

    if not set(labels) & set(design.aliased):
        return columns(design.x_names)
    out, kept = np.zeros((len(found.values), len(known))), np.asarray(design.spec.keep, bool)
    out[:, kept], out[:, ~kept] = columns(design.x_names), columns(design.aliased)
    return out


def _kept(design: Design, matrix: np.ndarray) -> np.ndarray:
    """The rows in the columns of the fit; full rows must be estimable."""
    everything = design.p + len(design.aliased)
    if matrix.ndim != 2 or matrix.shape[1] not in (design.p, everything):
        raise LmmError(
            f"L has shape {matrix.shape}; expected {design.p} columns, one for each of "
            f"{', '.join(design.x_names)}."
        )
    if not np.all(np.isfinite(matrix)):
        raise LmmError("L has values that are not finite; expected numbers.")
    if matrix.shape[1] == design.p:
        return matrix
    rows = estimable_rows(design, Rows(matrix, np.abs(matrix)))
    if not np.all(np.isfinite(rows)):
        bad = np.flatnonzero(~np.all(np.isfinite(rows), axis=1))
        raise LmmError(
            f"rows {bad.tolist()} of L are not estimable: the data do not tell "
            f"{', '.join(design.aliased)} from other columns. Test combinations that they do tell."
        )
    return rows


def _said(names: Sequence[str], row: np.ndarray, rhs: float) -> str:
    """A row in words: ``MachineB - 2 MachineC = 0``."""
    text = ""
    for name, c in zip(names, row, strict=True):
        if c:
            sign = ("-" if c < 0 else "") if not text else (" - " if c < 0 else " + ")
            text += sign + ("" if abs(c) == 1 else f"{abs(c):g} ") + name
    return f"{text or '0'} = {rhs:g}"

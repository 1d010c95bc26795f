"""Hypotheses as the caller gives them -> Lβ = rhs in the coefficients of the fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax.errors import LmmError
from lmmjax.inference.grid import estimable_rows
from lmmjax.inference.words import Hypotheses, parse

if TYPE_CHECKING:
    from lmmjax.design import Design


def hypotheses(design: Design, L: Any, rhs: Any) -> Hypotheses:
    """Read a matrix or words.

    Raises
    ------
    LmmError
        Shapes that do not fit, coefficients that are unknown, rows that are not estimable.
    """
    if isinstance(L, str) or (isinstance(L, Sequence) and L and isinstance(L[0], str)):
        if np.any(np.asarray(rhs, float) != 0):
            raise LmmError("rhs= goes with a matrix; in words write it after the equals sign.")
        return parse(L, design.x_names, design.aliased)
    names = [str(i) for i in L.index] if hasattr(L, "index") and hasattr(L, "columns") else None
    matrix = np.atleast_2d(np.asarray(L, float))
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
    rows = estimable_rows(design, matrix)
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

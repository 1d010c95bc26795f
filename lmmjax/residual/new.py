"""Residuals of new rows: their variances, and what is known of them from their subject's rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax.errors import DataError
from lmmjax.evaluate import Evaluator, Factor, is_missing
from lmmjax.expr import deparse
from lmmjax.precision import in_float64
from lmmjax.residual.covariance import relative_sd
from lmmjax.residual.frame import Residuals, evaluate_residual
from lmmjax.residual.language import Correlation, ResidualSpec
from lmmjax.residual.structures import ARMA, Autoregressive, Family, Structure, Toeplitz
from lmmjax.table import Table

if TYPE_CHECKING:
    from lmmjax.design import Design
    from lmmjax.model import Model


class NewRows(NamedTuple):
    """Residual subject (-1: not in training), position and log(S / reference) of new rows."""

    subject: np.ndarray  # (m,)
    pos: np.ndarray  # (m, dim)
    H: np.ndarray  # log(S / reference) = H φ_v, (m, n_variances)

    def sd(self, structure: Structure, phi: np.ndarray) -> np.ndarray:
        """Residual SDs relative to σ; ``phi`` (..., n_phi) gives (..., m)."""
        return np.exp(phi[..., structure.n_corr :] @ self.H.T)


def encode(
    model: Model, newdata: Any, *, new_subjects: str = "population", variances: bool = False
) -> NewRows:
    """Evaluate the residual structure's variables on new data, coded as in training.

    Parameters
    ----------
    new_subjects : {"raise", "population"}
        Whether subjects that were not in training are refused.
    variances : bool
        Only what the rows' own variances depend on is asked for: mostly neither the subject nor
        the position, which are then no numbers to rely on.

    Raises
    ------
    DataError
        A variable is missing, a level of varident or a position on the grid was not in training.
    """
    r, spec = model.design.residual, model.design.spec
    assert r is not None
    own = _variance_part(r.spec) if variances else r.spec
    table = Table(newdata, "newdata")
    columns = table.read(own.nodes)
    ev = Evaluator(columns, len(table), spec.states, learn=False, safe=spec.safe)
    values = evaluate_residual(own, ev)
    for name, value in values.items():
        if np.any(is_missing(value)):
            what = name.strip("|") or "the subject"
            raise DataError(
                f"found missing values of {what} in newdata; the residual structure expects one in "
                "every row. Fill them in, or remove these rows."
            )
    m = len(table)
    subject = np.arange(m) - m - 1 if not r.correlated else _subject(r, values, m)
    if new_subjects == "raise" and r.correlated:
        _refuse_new_subjects(r, values, subject)
    pos, place = _positions(r, own.correlation, values, subject, m)
    H = _design(r, values, place, m) - np.asarray(r.structure.variances.shifts, float)
    return NewRows(subject, pos, H)


def _variance_part(spec: ResidualSpec) -> ResidualSpec:
    """The structure without the variables that only correlations depend on."""
    c = spec.correlation
    if c is None or not c.heterogeneous:
        return replace(spec, correlation=None)
    # without a variable the position is the order of the rows within their subject
    return replace(spec, correlation=replace(c, subject=())) if c.positions else spec


def _refuse_new_subjects(r: Residuals, values: dict[str, Any], subject: np.ndarray) -> None:
    if np.any(subject < 0):
        factor = values["|"]
        unseen = sorted({str(factor.levels[c]) for c in factor.codes[subject < 0]})
        raise DataError(
            f"newdata has levels of {r.subject_name} that were not in the training data: "
            f"{', '.join(unseen[:5])}{' ...' if len(unseen) > 5 else ''}; expected known residual "
            "subjects. Use new_levels='population' to predict them with residuals of 0."
        )


def _subject(r: Residuals, values: dict[str, Any], m: int) -> np.ndarray:
    if "|" not in values:
        return np.zeros(m, int)
    return _place(values["|"], r.subjects)


def _place(factor: Factor, levels: Any) -> np.ndarray:
    """Codes among known levels, -1 where unknown."""
    known = {str(x): k for k, x in enumerate(levels)}
    return np.array([known.get(str(factor.levels[c]), -1) for c in factor.codes], int)


def _positions(
    r: Residuals, c: Correlation | None, values: dict[str, Any], subject: np.ndarray, m: int
) -> tuple[np.ndarray, np.ndarray]:
    if c is None:
        return np.zeros((m, 1)), np.zeros(m, int)
    if not c.positions:
        place = _next_places(r, subject)
        if c.heterogeneous or c.family in ("un", "ad", "toep"):
            _refuse_unknown(place >= len(r.grid), c.name)
        return place[:, None].astype(float), place
    given = [values[deparse(node)] for node in c.positions]
    if c.family.startswith("sp") or c.family == "car1":
        return np.column_stack([np.asarray(getattr(v, "values", v), float) for v in given]), (
            np.zeros(m, int)
        )
    place = np.zeros(m, int)
    if r.grid and (c.heterogeneous or c.family in ("un", "ad") or isinstance(given[0], Factor)):
        from lmmjax.evaluate import to_factor

        place = _place(to_factor(given[0]), r.grid)
        _refuse_unknown(place < 0, c.name)
    if isinstance(given[0], Factor) or c.family in ("un", "ad", "cs"):
        return place[:, None].astype(float), place
    return ((np.asarray(given[0], float) - r.origin) / r.step)[:, None], place


def _next_places(r: Residuals, subject: np.ndarray) -> np.ndarray:
    """With the order of rows as position, new rows follow those of their subject."""
    seen = np.bincount(r.subject, minlength=len(r.subjects))
    out = np.zeros(len(subject), int)
    count: dict[int, int] = {}
    for i, s in enumerate(subject):
        out[i] = (seen[s] if s >= 0 else 0) + count.get(s, 0)
        count[s] = count.get(s, 0) + 1
    return out


def _refuse_unknown(bad: np.ndarray, name: str) -> None:
    if np.any(bad):
        raise DataError(
            f"found {int(bad.sum())} rows of newdata at positions that were not in training; the "
            f"correlations of {name} are known at the positions of training only. Use ar1 or car1 "
            "to predict beyond them."
        )


def _design(r: Residuals, values: dict[str, Any], place: np.ndarray, m: int) -> np.ndarray:
    """H of the new rows."""
    parts = [np.zeros((m, 0))]
    c = r.spec.correlation
    if c is not None and c.heterogeneous:
        parts.append((place[:, None] == np.arange(1, len(r.grid))).astype(float))
    at = parts[-1].shape[1]
    for v in r.spec.estimated:
        key = f"{v.kind}({deparse(v.node)})"
        value = values[key]
        if v.kind == "ident":
            levels = r.levels[key]
            codes = _place(value, levels)
            if np.any(codes < 0):
                raise DataError(
                    f"newdata has levels of {deparse(v.node)} that were not in training; expected "
                    f"{', '.join(map(str, levels))}."
                )
            parts.append((codes[:, None] == np.arange(1, len(levels))).astype(float))
        else:
            x = np.asarray(getattr(value, "values", value), float)
            x = np.log(np.abs(x)) if v.kind == "power" else x
            sd = r.structure.variances.scales[at]
            mean = -r.structure.variances.shifts[at] * sd
            parts.append(((x - mean) / sd)[:, None])
        at += parts[-1].shape[1]
    return np.concatenate(parts, axis=1)


def _reaching(family: Family, lag: int) -> Family:
    """The family for lags beyond those of training; Toeplitz knows no others."""
    if isinstance(family, Autoregressive | ARMA):
        return replace(family, largest=max(family.largest, lag))
    _refuse_unknown(np.array([isinstance(family, Toeplitz) and lag >= family.T]), "toep")
    return family


class Known(NamedTuple):
    """What the subject's rows tell of the residual of one new row; a leading axis for draws."""

    rows: np.ndarray  # training rows of its subject
    weights: np.ndarray  # R⁻¹c of them
    variance: Any  # left, relative to σ²


@in_float64
def known_residuals(design: Design, new: NewRows, phi: np.ndarray) -> list[Known]:
    """BLUP weights of every new row: e_new | e = c'R⁻¹e, variance s² - c'R⁻¹c.

    ``phi`` (..., n_phi): one set of weights for each. Goldberger (1962), J. Amer. Statist. Assoc.
    57. O(T³) per row and draw.
    """
    r = design.residual
    assert r is not None
    out = []
    old = relative_sd(r, phi, design.weights)
    for i, (subject, s) in enumerate(
        zip(new.subject, np.moveaxis(new.sd(r.structure, phi), -1, 0), strict=True)
    ):
        rows = np.flatnonzero(r.subject == subject) if r.correlated else np.zeros(0, int)
        if rows.size == 0:
            out.append(Known(rows, np.zeros((*s.shape, 0)), s**2))
            continue
        C = _with_new(r, rows, new.pos[i], phi)
        # the correlation is scaled, not solved with: SDs may differ by orders of magnitude
        w = np.linalg.solve(C[..., :-1, :-1], C[..., :-1, -1:])[..., 0]
        left = s**2 * np.maximum(1 - np.sum(w * C[..., -1, :-1], axis=-1), 0.0)
        out.append(Known(rows, w * s[..., None] / old[..., rows], left))
    return out


def _with_new(r: Residuals, rows: np.ndarray, pos: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """Correlation of a subject's rows and one new row, last, at each φ: (..., T + 1, T + 1)."""
    assert r.structure.family is not None
    family = _reaching(r.structure.family, int(np.max(np.abs(r.pos[rows, 0] - pos[0]))))
    both = jnp.asarray(np.vstack([r.pos[rows], pos]))
    matrix = lambda at: family.matrix(at, both)  # noqa: E731
    flat = jnp.asarray(phi[..., : r.structure.n_corr]).reshape(-1, r.structure.n_corr)
    C = np.asarray(jax.vmap(matrix)(flat))
    return C.reshape(*phi.shape[:-1], *C.shape[1:])

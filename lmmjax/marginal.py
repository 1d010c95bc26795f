"""The marginal covariance of the rows of a group, V_i = Z_i D Z_i' + Σ_i: one, or all of them."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax.errors import DataError, DesignError
from lmmjax.precision import in_float64
from lmmjax.residual.covariance import block
from lmmjax.residual.setup import groups_of_rows
from lmmjax.residual.source import correlations
from lmmjax.residual.structures import Structure
from lmmjax.tables import correlation

Array = Any

#: numbers that covariance matrices held at once may take
BATCH_NUMBERS = 2_000_000

#: rows of a group up to which its V_i is formed: 200 MB, some seconds
MOST_ROWS = 5000

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.design import Design


def marginal_cov(
    design: Design,
    covs: list[np.ndarray],
    sigma: float,
    level: Any,
    group: str | None,
    phi: np.ndarray,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """V_i and its correlation for the rows of ``level`` of ``group``; see ``Fit.marginal_cov``."""
    import pandas as pd

    term = _subject_term(design, group)
    found = np.flatnonzero(term.levels == str(term.levels[0] if level is None else level))
    if found.size == 0:
        raise DataError(
            f"level {level!r} is not a level of {term.group}; expected one of "
            f"{', '.join(map(str, term.levels[:8]))}{' ...' if len(term.levels) > 8 else ''}."
        )
    rows = np.flatnonzero(term.codes == found[0])
    V = sigma**2 * block(design.residual, phi, design.weights, rows)
    for t, cov in zip(design.terms, covs, strict=True):
        same = t.codes[rows, None] == t.codes[rows]
        V = V + np.where(same, t.z[rows] @ cov @ t.z[rows].T, 0.0)
    labels = design.rows[rows]
    return (
        pd.DataFrame(V, index=labels, columns=labels),
        pd.DataFrame(correlation(V), index=labels, columns=labels),
    )


def _nested(inner: Any, outer: Any) -> bool:
    lies_in = np.zeros(len(inner.levels), dtype=outer.codes.dtype)
    lies_in[inner.codes] = outer.codes
    return bool(np.array_equal(lies_in[inner.codes], outer.codes))


def _factors(design: Design) -> dict[str, Any]:
    """Grouping factors of the random effects, then the residual subjects."""
    known: dict[str, Any] = {t.group: t for t in design.terms}
    r = design.residual
    if r is not None and r.correlated:
        name = r.subject_name or "all rows"
        known.setdefault(name, SimpleNamespace(group=name, codes=r.subject, levels=r.subjects))
    return known


def _subject_term(design: Design, group: str | None) -> Any:
    """The factor whose levels are the subjects: every other factor must be nested with it."""
    known = _factors(design)
    if not known:
        raise DesignError(
            "the model has no grouping factor, so its rows are independent; expected a model with "
            "random effects or correlated residuals."
        )
    if group is not None and group not in known:
        raise DataError(f"group={group!r} is not a grouping factor; expected one of {list(known)}.")
    candidates = [known[group]] if group is not None else list(known.values())
    for t in candidates:
        inside = [_nested(u, t) for u in known.values()]
        around = [group is not None and _nested(t, u) for u in known.values()]
        if all(a or b for a, b in zip(inside, around, strict=True)):
            return t
    raise DesignError(
        f"the grouping factors {list(known)} are crossed, so the rows of one level are correlated "
        "with those of others and no V_i stands alone; expected nested factors."
    )


def outermost(design: Design) -> Any:
    """The factor (``group codes levels``) whose levels are independent of each other.

    Raises
    ------
    DesignError
        No grouping factor, or crossed ones: then nothing stands alone per group.
    """
    try:
        return _subject_term(design, None)
    except DesignError as error:
        raise DesignError(
            f"there is no likelihood per group: {error} Use kind='conditional', one value per row."
        ) from None


def independent_groups(design: Design) -> np.ndarray:
    """Codes (n,) of the smallest groups of rows that are independent of each other.

    They are the levels of the outermost factor of a nested design, and single rows without any
    factor; crossed factors join what they connect.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n, rows, columns, at = design.n, [], [], design.n
    for factor in _factors(design).values():
        rows.append(np.arange(n))
        columns.append(at + factor.codes)
        at += len(factor.levels)
    if not rows:
        return np.arange(n)
    pairs = np.concatenate(rows), np.concatenate(columns)
    graph = coo_matrix((np.ones(len(pairs[0])), pairs), shape=(at, at))
    return np.unique(connected_components(graph, directed=False)[1][:n], return_inverse=True)[1]


# -------------------------------------------------------------------------------------------------
# All groups at once
# -------------------------------------------------------------------------------------------------


class GroupRows(NamedTuple):
    """Rows of groups of similar length in row order, padded to T (the last row repeated)."""

    rows: Array  # (G, T)
    mask: Array  # (G, T) 1 for a row, 0 for padding
    w: Array  # (G, T)
    z: tuple[Array, ...]  # per term (G, T, S)
    codes: tuple[Array, ...]  # per term (G, T)
    subject: Array  # residual subject (G, T)
    pos: Array  # (G, T, dim)
    H: Array  # (G, T, n_variances)


def gather(design: Design, codes: np.ndarray) -> tuple[GroupRows, ...]:
    """The rows of every group, groups of similar length together (NumPy)."""
    r, n = design.residual, design.n
    subject = np.arange(n) if r is None else r.subject
    pos = np.zeros((n, 1)) if r is None else r.pos
    H = np.zeros((n, 0)) if r is None else r.H
    return tuple(
        GroupRows(
            rows,
            mask.astype(float),
            design.weights[rows],
            tuple(t.z[rows] for t in design.terms),
            tuple(t.codes[rows] for t in design.terms),
            subject[rows],
            pos[rows],
            H[rows],
        )
        for rows, mask in groups_of_rows(codes, np.arange(n))
    )


def _covariance(
    structure: Structure | None, g: GroupRows, covs: list[Array], sigma: Array, phi: Array
) -> Array:
    """V of one group, (T, T); the identity where padded. ``g`` without its leading axis."""
    s, C = sigma / jnp.sqrt(g.w), jnp.eye(len(g.w))
    if structure is not None:
        v = phi[structure.n_corr :]
        s = s * jnp.exp(g.H @ v) / structure.variances.reference(v)
        if structure.family is not None:
            within = correlations(structure, phi, g.pos[None], g.mask[None])[0]
            C = jnp.where(g.subject[:, None] == g.subject, within, 0.0)
    V = C * s[:, None] * s
    for z, codes, cov in zip(g.z, g.codes, covs, strict=True):
        V = V + jnp.where(codes[:, None] == codes, z @ cov @ z.T, 0.0)
    real = g.mask[:, None] * g.mask > 0
    return jnp.where(real, V, jnp.eye(len(g.w)))


def whiten_group(
    structure: Structure | None,
    g: GroupRows,
    covs: list[Array],
    sigma: Array,
    phi: Array,
    values: Array,
) -> tuple[Array, Array]:
    """L⁻¹ values and log L_tt for V = LL' of one group, (T,) each; 0 where padded."""
    L = jnp.linalg.cholesky(_covariance(structure, g, covs, sigma, phi))
    white = jax.scipy.linalg.solve_triangular(L, values * g.mask, lower=True)
    return white, jnp.log(jnp.diagonal(L))


@functools.partial(jax.jit, static_argnames="structure")
def _white(
    structure: Structure | None,
    g: GroupRows,
    covs: list[Array],
    sigma: Array,
    phi: Array,
    values: Array,
) -> Array:
    def one(part: tuple[GroupRows, Array]) -> Array:
        return whiten_group(structure, part[0], covs, sigma, phi, part[1])[0]

    size = max(1, BATCH_NUMBERS // g.mask.shape[1] ** 2)
    return jax.lax.map(one, (g, values), batch_size=size)


@in_float64
def whiten(
    design: Design, covs: list[np.ndarray], sigma: float, phi: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """L⁻¹ times the values of each independent group in row order, V_i = LL': O(Σ n_i³).

    Raises
    ------
    DesignError
        A group of more than 5,000 rows.
    """
    codes = independent_groups(design)
    largest = int(np.bincount(codes).max())
    if largest > MOST_ROWS:
        raise DesignError(
            f"found {largest} rows that are correlated with each other, through nested or crossed "
            f"factors; the Cholesky factor of their covariance is made for at most {MOST_ROWS}. "
            "Use kind='pearson', or level='conditional'."
        )
    structure = None if design.residual is None else design.residual.structure
    out = np.empty(design.n)
    for g in gather(design, codes):
        arrays = jax.tree.map(jnp.asarray, (g, covs, sigma, phi, values[g.rows]))
        white = np.asarray(_white(structure, *arrays))
        out[g.rows[g.mask > 0]] = white[g.mask > 0]
    return out


def marginal_sd(
    design: Design, covs: list[np.ndarray], sigma: float, relative: np.ndarray
) -> np.ndarray:
    """Square roots of the diagonal of V, (n,); ``relative`` are the residual SDs over σ."""
    var = (sigma * relative) ** 2
    for t, cov in zip(design.terms, covs, strict=True):
        var = var + np.einsum("is,st,it->i", t.z, cov, t.z)
    return np.sqrt(var)

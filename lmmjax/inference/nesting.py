r"""Whether one fit is nested in another: judged on the spans of X and Z, never on the text.

Two models of the same response are nested if the columns of X of the smaller lie in the span of
those of the larger, and if every covariance of the smaller's random effects is one of the larger's:
for each grouping of the rows Z_small = Z_big C, and C Σ C' is a member of the larger's family.
Residual structures: :func:`lmmjax.residual.checks.contains`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from lmmjax.covariance import covariance
from lmmjax.errors import ComparisonError
from lmmjax.residual.checks import contains

if TYPE_CHECKING:
    from lmmjax.fit import Fit
    from lmmjax.model import Model

#: columns whose residual from a span is below this part of their length lie in it
SPAN = 1e-7


class Pair(NamedTuple):
    """Two nested fits, and how the smaller one lies in the larger."""

    small: Fit
    big: Fit
    groupings: list[Grouping]
    n_fixed: int  # fixed effects under test
    shift: float  # 2 log|det T| of X_small = X_big T, which REML criteria differ by


class Grouping(NamedTuple):
    """The terms of both models on one partition of the rows."""

    codes: np.ndarray  # (n,)
    big: list[int]  # positions of the terms in the larger model
    small: list[int]
    C: np.ndarray  # (S_big, S_small)


def label(fit: Fit) -> str:
    """Formula and residual structure, for tables."""
    residual = fit.model.residual
    return f"{fit.model.formula}, {residual}" if residual else fit.model.formula


def keeps_rows(fit: Fit) -> bool:
    """Whether the model was made of a table in memory."""
    from lmmjax.design import Design

    return isinstance(fit.model.design, Design)


def check_fitted(fits: Any) -> None:
    """Refuse what is not a fit, such as a model.

    Raises
    ------
    ComparisonError
    """
    from lmmjax.fit import Fit
    from lmmjax.model import Model

    for fit in fits:
        if isinstance(fit, Model):
            raise ComparisonError(
                f"found the model {fit.formula}, which is not fitted; expected fits. Fit it first: "
                "model.fit()."
            )
        if not isinstance(fit, Fit):
            raise ComparisonError(f"found a {type(fit).__name__}; expected results of Model.fit.")


def check_same_data(fits: Any) -> None:
    """Refuse fits of different rows, responses, weights or offsets.

    Raises
    ------
    ComparisonError
    """
    first = fits[0].model.design
    for fit in fits[1:]:
        design = fit.model.design
        if not keeps_rows(fits[0]) or not keeps_rows(fit):
            raise ComparisonError(
                "found a model of a streamed table, which keeps no rows; expected models made by "
                "Model(formula, data). Compare their loglik yourself, or by aic_table, if they "
                "share all rows."
            )
        if len(first.y) != len(design.y) or not first.rows.equals(design.rows):
            raise ComparisonError(
                f"found fits of different rows ({len(first.y)} and {len(design.y)}); expected the "
                "same. Fit both to the rows that are complete for both: missing values of a "
                "variable that only one model has drop rows from that one alone."
            )
        for name, word in (("y", "responses"), ("weights", "weights"), ("offset", "offsets")):
            if not np.array_equal(getattr(first, name), getattr(design, name)):
                raise ComparisonError(
                    f"found different {word}; expected the same in all models. A transformed "
                    "response changes the likelihood by its Jacobian."
                )


def check_converged(fits: Any) -> None:
    """Refuse fits that did not converge."""
    for fit in fits:
        if not fit.converged:
            raise ComparisonError(
                f"the fit of {fit.model.formula} did not converge; expected optima, since a "
                f"likelihood short of its maximum has no distribution. {fit.message}"
            )


def pair(small: Fit, big: Fit) -> Pair:
    """Check that ``small`` is nested in ``big`` and tell how.

    Raises
    ------
    ComparisonError
        Different data, methods or fixed parts under REML; not nested; not converged.
    """
    check_same_data([small, big])
    check_converged([small, big])
    if small.method != big.method:
        raise ComparisonError(
            f"found a fit by {small.method} and one by {big.method}; expected the same criterion. "
            "Refit one of them, or give refit='ml'."
        )
    T = _fixed(small.model, big.model)
    n_fixed = T.shape[0] - T.shape[1]
    if n_fixed and small.method == "REML":
        raise ComparisonError(
            f"found REML fits whose fixed parts differ by {n_fixed} columns; their criteria are "
            "likelihoods of different data. Expected the same fixed part, or ML: give refit='ml'."
        )
    shift = 2 * float(np.linalg.slogdet(T)[1]) if small.method == "REML" and len(T) else 0.0
    groupings = _groupings(small.model, big.model)
    _check_residuals(small.model, big.model)
    if big.n_params <= small.n_params:
        raise ComparisonError(
            f"found {small.n_params} and {big.n_params} parameters; expected a second model with "
            "more. The two are the same model, or were given in the wrong order."
        )
    return Pair(small, big, groupings, n_fixed, shift)


def same_span(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two matrices of full column rank span the same space."""
    return a.shape[1] == b.shape[1] and _solve(b, a) is not None


def _solve(big: np.ndarray, small: np.ndarray) -> np.ndarray | None:
    """C with big C = small, or None where small leaves the span of big; O(n p²)."""
    if small.shape[1] == 0:
        return np.zeros((big.shape[1], 0))
    if big.shape[1] == 0:
        return None
    size, own = _lengths(big), _lengths(small)
    C = np.linalg.lstsq(big / size, small / own, rcond=None)[0]
    left = np.max(np.linalg.norm(small / own - (big / size) @ C, axis=0))
    return None if left > SPAN else (C / size[:, None]) * own


def _lengths(columns: np.ndarray) -> np.ndarray:
    size = np.linalg.norm(columns, axis=0)
    return np.where(size > 0, size, 1.0)


def _fixed(small: Model, big: Model) -> np.ndarray:
    T = _solve(big.design.X, small.design.X)
    if T is None:
        raise ComparisonError(
            "not nested: the fixed part of the first model is not in the span of the second's "
            f"({', '.join(small.design.x_names)} in {', '.join(big.design.x_names)}). Expected "
            "the smaller model first; compare models that are not nested by aic_table."
        )
    return T


def partition(codes: np.ndarray) -> np.ndarray:
    """Levels numbered by first appearance: equal for equal partitions whatever their labels."""
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _groupings(small: Model, big: Model) -> list[Grouping]:
    out: list[Grouping] = []
    for k, term in enumerate(big.design.terms):
        codes = partition(term.codes)
        for g in out:
            if np.array_equal(g.codes, codes):
                g.big.append(k)
                break
        else:
            out.append(Grouping(codes, [k], [], np.zeros(0)))
    for k, term in enumerate(small.design.terms):
        codes = partition(term.codes)
        found = [g for g in out if np.array_equal(g.codes, codes)]
        if not found:
            _refuse(term, "the second model has no term on this grouping")
        found[0].small.append(k)
    return [g._replace(C=_map(g, small, big)) for g in out]


def _map(g: Grouping, small: Model, big: Model) -> np.ndarray:
    """C of Z_small = Z_big C, with the check that the larger family contains C Σ C'."""
    z_big = np.concatenate([big.design.terms[k].z for k in g.big], axis=1)
    if not g.small:
        return np.zeros((z_big.shape[1], 0))
    z_small = np.concatenate([small.design.terms[k].z for k in g.small], axis=1)
    term = small.design.terms[g.small[0]]
    C = _solve(z_big, z_small)
    if C is None:
        _refuse(term, "its columns are not in the span of the second model's")
    rng = np.random.default_rng(0)
    for _ in range(3):
        lams = [_random_factor(small.design.terms[k], rng) for k in g.small]
        root = C @ _block_diagonal(lams)
        if not _contains([big.design.terms[k] for k in g.big], root):
            _refuse(term, "the second model's covariance structure does not contain it")
    return C


def _random_factor(term: Any, rng: np.random.Generator) -> np.ndarray:
    structure = covariance(term.cov, len(term.names))
    theta = structure.start() + 0.3 * rng.standard_normal(structure.n_theta)
    return np.asarray(structure.factor(theta)) / _lengths(term.z)[:, None] * len(term.z) ** 0.5


def _contains(terms: list[Any], root: np.ndarray) -> bool:
    """Whether root root' is block-diagonal over the terms, each block of its term's family."""
    scale = np.concatenate([_lengths(t.z) for t in terms])
    sigma = (root @ root.T) * np.outer(scale, scale)
    made, at = [], 0
    for t in terms:
        mine = slice(at, at + len(t.names))
        structure = covariance(t.cov, len(t.names))
        theta = structure.from_factor(_square(root[mine]))
        made.append(np.asarray(structure.factor(theta)))
        at += len(t.names)
    lam = _block_diagonal(made) * scale[:, None]
    return bool(np.max(np.abs(lam @ lam.T - sigma)) <= 1e-6 * np.max(np.abs(sigma)))


def _square(root: np.ndarray) -> np.ndarray:
    """A square factor of root root'."""
    e, Q = np.linalg.eigh(root @ root.T)
    return Q * np.sqrt(np.maximum(e, 0.0))


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    from scipy.linalg import block_diag

    return block_diag(*blocks)


def _refuse(term: Any, why: str) -> NoReturn:
    raise ComparisonError(
        f"not nested: ({' + '.join(term.names)} | {term.group}) of the first model: {why}. "
        "Expected the smaller model first; compare models that are not nested by aic_table."
    )


def _size(model: Model) -> tuple[int, int]:
    """Numbers of fixed effects and of parameters of the random ones."""
    design = model.design
    return design.X.shape[1], sum(covariance(t.cov, len(t.names)).n_theta for t in design.terms)


def _check_residuals(small: Model, big: Model) -> None:
    own, other = small.design.residual, big.design.residual
    if own is None or small.residual == big.residual:
        return
    if other is not None and contains(other, own):
        return
    # the first is nested in the second but for the residuals: the other way round only if equal
    if _size(small) == _size(big) and (other is None or contains(own, other)):
        raise ComparisonError(
            f"found residual structures {small.residual!r} and {big.residual!r}, of which the "
            "first is the larger; expected the smaller model first. Swap the arguments."
        )
    raise ComparisonError(
        f"found residual structures {small.residual!r} and {big.residual!r}; expected independent "
        "residuals in the first model, the same structure in both, or one that the second's "
        "contains (ar1 in toep in un, for instance). Compare them by aic_table."
    )

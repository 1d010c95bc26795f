r"""The null distribution of a likelihood ratio when variances under test lie on their boundary.

Asymptotically (Self and Liang 1987, J. Am. Stat. Assoc. 82, 605-610, case 9) the statistic is
‖P_C Z‖², Z ~ N(0, I⁻¹) in the metric of the information I at the null, C the tangent cone of the
larger model modulo the space of the smaller. For a block Σ₀ of the null with null space N that cone
is {E : N'EN is positive semidefinite}. All directions but N'EN are free, so it is a product

    R^f x K,   K = {u = vech(N'EN) : positive semidefinite},   Cov(u) = its block of I⁻¹,

and f counts the free directions under test. One scalar u: weights 0.5 and 0.5 (Stram and Lee 1994,
Biometrics 50, 1171-1177). Otherwise directions are simulated: for z uniform on the sphere of
R^f x K's span and h(z) = ‖P_C z‖², P(statistic > t) = E P(χ²_{f+s} > t / h), which stays accurate
for small p. Fixed effects under test are free directions, asymptotically independent of variances.

Residual parameters that both models have are interior nuisances: they enter the information and no
direction. One under test is a free direction where its null value lies inside its range (φ of ar1,
ρ of cs, an SD ratio), and a half-line where it ends it (a nugget of 0; the decay of car1 and the
spatial families against independent rows, where the distances are multiples of the smallest, so
that exp(-smallest/range) is a parameter in which R is smooth at 0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lmmjax import determined
from lmmjax import likelihood as lk
from lmmjax.covariance import CompoundSymmetry, Diagonal, Homogeneous, Unstructured
from lmmjax.errors import ComparisonError
from lmmjax.inference import kenward_roger as kr
from lmmjax.inference.information import tables
from lmmjax.inference.linear import directions
from lmmjax.inference.nesting import Pair
from lmmjax.precision import in_float64
from lmmjax.residual import program
from lmmjax.residual.expansion import expand, source_of

if TYPE_CHECKING:
    from lmmjax.residual.frame import Residuals

#: eigenvalues of a block below this part of the largest (or of 1) count as 0 under the null
ZERO = 1e-8

#: share of a residual parameter in what the data determine below which it counts as undetermined
LOST = 0.5


class Cone(NamedTuple):
    """R^free x product of cones of positive semidefinite matrices of the given sizes."""

    free: int
    blocks: tuple[int, ...]  # sizes r; each has r (r + 1) / 2 coordinates, lower triangle by column
    cov: np.ndarray  # of all coordinates of the blocks, (s, s)


class Tail(NamedTuple):
    """P(statistic > t) under the null."""

    p_value: float
    mc_se: float
    weights: dict[int, float] | None  # df -> weight, where the cone is polyhedral


def chi_bar(cone: Cone, statistic: float, n: int, seed: int) -> Tail:
    """Tail probability; simulated (``n`` directions) unless at most one variance is at 0."""
    from scipy import stats

    s = len(cone.cov)
    if s <= 1:
        weights = {cone.free: 0.5, cone.free + 1: 0.5} if s else {cone.free: 1.0}
        return Tail(_mixture(weights, statistic), 0.0, weights)
    if statistic <= 0:
        return Tail(1.0, 0.0, None)
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, cone.free + s))
    u = z[:, cone.free :] @ np.linalg.cholesky(cone.cov).T
    on = project(cone, u)
    inverse = np.linalg.inv(cone.cov)
    left = u - on
    # ‖P u‖² = ‖u‖² - ‖u - P u‖² for a cone
    size = np.sum(z**2, axis=1)
    length = size - np.einsum("ni,ij,nj->n", left, inverse, left)
    h = np.clip(length / size, 1e-300, 1.0)
    tail = stats.chi2.sf(statistic / h, cone.free + s)
    return Tail(float(np.mean(tail)), float(np.std(tail) / np.sqrt(n)), _weights(cone, on))


def _mixture(weights: dict[int, float], statistic: float) -> float:
    from scipy import stats

    tails = [
        w * (stats.chi2.sf(statistic, k) if k else float(statistic <= 0))
        for k, w in weights.items()
    ]
    return float(sum(tails))


def _weights(cone: Cone, on: np.ndarray) -> dict[int, float] | None:
    if any(r > 1 for r in cone.blocks):
        return None
    active = np.sum(on > 1e-9 * np.sqrt(np.diag(cone.cov)), axis=1)
    return {cone.free + j: float(np.mean(active == j)) for j in range(len(cone.cov) + 1)}


def project(cone: Cone, u: np.ndarray, steps: int = 3000) -> np.ndarray:
    """Project rows of ``u`` on the cone in the metric cov⁻¹ by accelerated projected gradients.

    Notes
    -----
    O(steps n (s² + Σ r³)), fewer steps where all rows have settled.
    """
    scale = _scales(cone)
    metric = np.linalg.inv(cone.cov / np.outer(scale, scale))
    target = u / scale
    rate = 1.0 / np.linalg.eigvalsh(metric)[-1]
    x = y = _clip(cone.blocks, target)
    t = 1.0
    for _ in range(steps):
        new = _clip(cone.blocks, y - rate * (y - target) @ metric)
        t_new = 0.5 * (1 + np.sqrt(1 + 4 * t * t))
        again = np.sum((y - new) * (new - x), axis=1, keepdims=True) > 0  # restart where uphill
        y = np.where(again, new, new + (t - 1) / t_new * (new - x))
        moved = float(np.max(np.abs(new - x)))
        x, t = new, t_new
        if moved < 1e-9:
            break
    return x * scale


def _scales(cone: Cone) -> np.ndarray:
    """Congruence of each block by a diagonal, so that its variances have unit SD.

    In these units the off-diagonals are √2 times their entry, so that squared lengths are those of
    the symmetric matrices.
    """
    out, at = [], 0
    for r in cone.blocks:
        pairs = _pairs(r)
        sd = np.sqrt(np.diag(cone.cov))[at : at + len(pairs)]
        root = np.sqrt([sd[pairs.index((i, i))] for i in range(r)])
        out += [root[i] * root[j] * (1.0 if i == j else np.sqrt(0.5)) for i, j in pairs]
        at += len(pairs)
    return np.array(out)


def _pairs(r: int) -> list[tuple[int, int]]:
    return [(i, j) for j in range(r) for i in range(j, r)]


def _clip(blocks: tuple[int, ...], u: np.ndarray) -> np.ndarray:
    """Project each block's matrix on the positive semidefinite ones; off-diagonals carry √2."""
    out, at = np.empty_like(u), 0
    for r in blocks:
        pairs = _pairs(r)
        mine = slice(at, at + len(pairs))
        at += len(pairs)
        if r == 1:
            out[:, mine] = np.maximum(u[:, mine], 0.0)
            continue
        rows, columns = np.array(pairs).T
        weight = np.where(rows == columns, 1.0, np.sqrt(0.5))
        W = np.zeros((len(u), r, r))
        W[:, rows, columns] = W[:, columns, rows] = u[:, mine] * weight
        e, Q = np.linalg.eigh(W)
        W = np.einsum("nik,nk,njk->nij", Q, np.maximum(e, 0.0), Q)
        out[:, mine] = W[:, rows, columns] / weight
    return out


# -------------------------------------------------------------------------------------------------
# The cone of a pair of models
# -------------------------------------------------------------------------------------------------


@in_float64
def cone_of(pair: Pair) -> Cone:
    """The cone under the smaller model's estimates.

    Raises
    ------
    ComparisonError
        Parameters of the smaller model at an end of their range, structures without a linear
        tangent cone, residual parameters that the null leaves without meaning.
    """
    small, big = pair.small, pair.big
    if small.singular:
        raise ComparisonError(
            "the smaller model is singular: its own variances are on the boundary, where the "
            "mixture is not known. Use method='bootstrap'."
        )
    check_interior(pair)
    m = big.n_params - small.n_params - pair.n_fixed
    rows, blocks = _null_rows(pair)
    ends = [end.name for end in residual_ends(pair)]
    if not _same_residuals(pair) and len(ends) + sum(map(len, rows)) > 1:
        raise ComparisonError(
            "found residual parameters under test beside variances that are 0 under the null, "
            f"{len(ends) + sum(map(len, rows))} boundaries together; with residual parameters "
            "under test the mixture is made for one. Use method='bootstrap', or test one after "
            "the other."
        )
    if ends:
        return Cone(m - 1 + pair.n_fixed, (1,), np.ones((1, 1)))
    if not blocks:
        return Cone(m + pair.n_fixed, (), np.zeros((0, 0)))
    U = np.concatenate(rows)
    free = m - len(U) + pair.n_fixed
    if len(U) == 1:
        return Cone(free, tuple(blocks), np.ones((1, 1)))
    return Cone(free, tuple(blocks), U @ _covariance(pair)[: U.shape[1], : U.shape[1]] @ U.T)


# -------------------------------------------------------------------------------------------------
# Residual parameters at the null
# -------------------------------------------------------------------------------------------------


class End(NamedTuple):
    """A residual parameter under test whose null value ends its range."""

    name: str
    trouble: str  # why its half-line is not known, or empty


def _correlations(pair: Pair) -> list[Any]:
    fits = (pair.small, pair.big)
    found = [f.model.design.residual for f in fits]
    return [None if r is None else r.spec.correlation for r in found]


def _same_residuals(pair: Pair) -> bool:
    small, big = (f.model.design.residual for f in (pair.small, pair.big))
    if small is None or big is None:
        return small is big
    return small.structure == big.structure


def residual_ends(pair: Pair) -> list[End]:
    """Residual parameters of the larger model whose null value is an end of their range."""
    small, big = _correlations(pair)
    if big is None:
        return []
    ends = []
    if small is None and (big.family == "car1" or big.family.startswith("sp")):
        r = pair.big.model.design.residual
        assert r is not None
        uneven = "" if _multiples(r) else "distances that are not multiples of the smallest"
        ends.append(End(big.name, uneven))
    if big.nugget and not (small is not None and small.nugget):
        ends.append(End("the nugget", ""))
    return ends


def unidentified(pair: Pair) -> str:
    """Which residual parameters of the larger model the null leaves without meaning, in words."""
    small, big = _correlations(pair)
    if big is None:
        return ""
    if small is None and big.nugget:
        return "range and nugget"
    if big.family != "arma" or big.p == 0 or big.q == 0:
        return ""
    p, q = {None: (0, 0), "ar1": (1, 0)}.get(
        None if small is None else small.family,
        (0, 0) if small is None else (small.p, small.q),
    )
    return "phi and theta" if big.p > p and big.q > q else ""


def _multiples(r: Residuals) -> bool:
    """Whether all distances within subjects are multiples of the smallest; one dimension."""
    if r.pos.shape[1] != 1:
        return False
    order = np.lexsort((r.pos[:, 0], r.subject))
    same = np.diff(r.subject[order]) == 0
    steps = np.diff(r.pos[order, 0])[same]
    steps = steps[steps > 0]
    if not len(steps):
        return False
    ratio = steps / np.min(steps)
    return bool(np.all(np.abs(ratio - np.round(ratio)) < 1e-6 * ratio))


def check_interior(pair: Pair) -> None:
    """Refuse nulls at which residual parameters are not interior and regular.

    Raises
    ------
    ComparisonError
    """
    small = pair.small
    known = determined.inverse(small._hessian_s)[1][len(small.theta) :]
    lost = [n for n, k in zip(small.model.phi_names, known, strict=True) if k < LOST]
    if lost:
        raise ComparisonError(
            f"found {' and '.join(lost)} of the smaller model at an end of the range or not "
            "determined by the data, where the mixture is not known. Use method='bootstrap'."
        )
    words = unidentified(pair)
    if words:
        raise ComparisonError(
            f"found {words} under test together; where there is no correlation one of them has no "
            "meaning, and the ratio has no known mixture. Use method='bootstrap'."
        )
    for end in residual_ends(pair):
        if end.trouble:
            raise ComparisonError(
                f"found {end.name} with {end.trouble}: near independence its correlations do not "
                "vary smoothly with any parameter, and no mixture is known. Use "
                "method='bootstrap'."
            )


def _null_factors(pair: Pair) -> list[np.ndarray]:
    """Σ of every term of the larger model at the smaller's estimates, standardised, over σ².

    σ² is that of the residual source, as in :func:`lmmjax.inference.variances.variance_tables`.
    """
    model = pair.big.model
    covs = pair.small._term_covs()
    sigma2 = (pair.small.sigma / pair.small._residual_sd) ** 2
    out = [np.zeros((len(t.names),) * 2) for t in model.design.terms]
    for g in pair.groupings:
        D = g.C @ _block([covs[k] for k in g.small]) @ g.C.T
        at = 0
        for k in g.big:
            S = len(out[k])
            inverse = np.linalg.inv(model._units.B[k])
            out[k] = inverse @ D[at : at + S, at : at + S] @ inverse.T / sigma2
            at += S
    return out


def _block(blocks: list[np.ndarray]) -> np.ndarray:
    from scipy.linalg import block_diag

    return block_diag(*blocks) if blocks else np.zeros((0, 0))


def _null_rows(pair: Pair) -> tuple[list[np.ndarray], list[int]]:
    """N'EN as linear functions of ω (variances and covariances), (s_k, K) each, and the sizes."""
    structures = pair.big.model._plan.layout.structures
    sigmas = _null_factors(pair)
    counts = [_count(s) for s in structures]
    starts = np.cumsum([0, *counts])
    rows, blocks = [], []
    for k, (structure, sigma) in enumerate(zip(structures, sigmas, strict=True)):
        for N in _null_space(structure, sigma):
            r = N.shape[1]
            U = np.zeros((r * (r + 1) // 2, starts[-1]))
            for c, E in enumerate(_basis(structure)):
                W = N.T @ E @ N
                U[:, starts[k] + c] = [W[i, j] for i, j in _pairs(r)]
            rows.append(U)
            blocks.append(r)
    return rows, blocks


def _basis(structure: object) -> np.ndarray:
    from lmmjax.inference.linear import tangent

    return tangent(structure, np.eye(structure.S)).first  # type: ignore[arg-type, attr-defined]


def _count(structure: object) -> int:
    return len(_basis(structure))


def _null_space(structure: object, sigma: np.ndarray) -> list[np.ndarray]:
    """Null spaces of the block, one a cone: together for ``us``, one by one for ``diag``."""
    e, Q = np.linalg.eigh(sigma)
    if e[0] > ZERO * max(1.0, e[-1]):
        return []
    S = len(sigma)
    if isinstance(structure, Unstructured) or S == 1:
        return [Q[:, e <= ZERO * max(1.0, e[-1])]]
    if isinstance(structure, Diagonal):
        return [np.eye(S)[:, [i]] for i in np.flatnonzero(np.diag(sigma) <= ZERO)]
    if isinstance(structure, Homogeneous):
        return [np.eye(S)[:, [0]]]
    word = "cs" if isinstance(structure, CompoundSymmetry) else "homcs"
    raise ComparisonError(
        f"the mixture is known for unstructured, diagonal and homogeneous covariances; found "
        f"{word} on its boundary. Use method='bootstrap'."
    )


def _covariance(pair: Pair) -> np.ndarray:
    """Inverse of the expected information at the null, of (ω, φ) in the larger model: (K, K)."""
    model = pair.big.model
    layout = model._plan.layout
    sigmas = _null_factors(pair)
    lams = [_root(s) for s in sigmas]
    theta = np.concatenate(
        [s.from_factor(lam) for s, lam in zip(layout.structures, lams, strict=True)]
    )
    d = directions(layout, [np.asarray(f) for f in lk.factors(layout, theta)])
    residual = None
    if model.is_structured:
        phi = jnp.asarray(pair.small.phi)  # both models have the same structure here
        products = program.crossproducts(model._prepared[2], phi)
        residual = expand(source_of(model), phi)
    else:
        products = model._on_device
    found = tables(layout, theta, *products, d.sigmas, d.first, residual)
    e = kr.extend(found, float(pair.big.n_obs))
    reml = pair.big.method == "REML"
    info = kr.expected_information(e) if reml else 0.5 * e.trace2
    return kr.inverse(info)[1:, 1:]


def _root(sigma: np.ndarray) -> np.ndarray:
    e, Q = np.linalg.eigh(sigma)
    return Q * np.sqrt(np.maximum(e, 0.0))

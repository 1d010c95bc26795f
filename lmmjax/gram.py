r"""Design -> cross-products: all that the likelihood needs to know of the data.

Three steps, all in NumPy and each done once per model:

1. :func:`standardise` chooses shifts and scales for the columns of X and Z and for y, so that the
   sums of products keep their digits whatever the units (years, 1e8 offsets, 1e-6 scales), and
   records how to go back.
2. :func:`plan` decides from the data which grouping factors can be eliminated level by level
   (a *chain*: each nested in the next) and which form the dense *core*.
3. :func:`crossproducts` sums, once over the rows.

Symbols: n rows, p fixed effects, J levels, S columns of a factor (all of its terms side by side),
d columns of Z in the core. The levels are the last axis of every block, so that arithmetic on
small blocks is arithmetic on long contiguous vectors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from lmmjax import cross
from lmmjax.covariance import Covariance, covariance
from lmmjax.errors import DesignError
from lmmjax.texts import given

# -------------------------------------------------------------------------------------------------
# 1. Units
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    r"""How the standardised problem relates to the caller's units.

    With X_s = X A, y_s = (y - offset - X β₀) / c and Z_s = Z B per term (the constant is spanned by
    X where columns are shifted):  β = β₀ + c A β_s,  σ = c σ_s,  b = c B b_s,  Λ = B Λ_s.
    """

    A: np.ndarray  # (p, p)
    beta0: np.ndarray  # (p,)
    scale: float  # c
    B: tuple[np.ndarray, ...]  # per term (S, S)
    logdet_A: float
    n: int
    p: int

    def constant(self, method: str) -> float:
        """Add this to the standardised -2 log-likelihood to have it in the caller's units."""
        if method == "ML":
            return 2 * self.n * float(np.log(self.scale))
        return 2 * (self.n - self.p) * float(np.log(self.scale)) - 2 * self.logdet_A


class Standardised(NamedTuple):
    X: np.ndarray  # (n, p)
    y: np.ndarray  # (n,)
    Z: tuple[np.ndarray, ...]  # per term (n, S)
    units: Units


def _constant_direction(X: np.ndarray) -> np.ndarray:
    """Coefficients a with X a = 1, or zeros where X does not span the constant."""
    a = np.zeros(X.shape[1])
    for j, column in enumerate(X.T):
        if column[0] == 1.0 and np.all(column == 1.0):
            a[j] = 1.0
            return a
    # indicator columns that add up to one (cell means coding); anything subtler keeps its origin
    indicator = [j for j, x in enumerate(X.T) if np.all((x == 0.0) | (x == 1.0))]
    if indicator and np.all(X[:, indicator].sum(axis=1) == 1.0):
        a[indicator] = 1.0
    return a


def _rms(column: np.ndarray) -> float:
    """Root mean square, 1 where the column vanishes; right for any finite numbers."""
    with np.errstate(over="ignore"):  # looked at below
        square = float(column @ column) / len(column)
    if 1e-200 < square < 1e200:
        return float(np.sqrt(square))
    top = max(float(column.max()), -float(column.min()))
    if top == 0.0:
        return 1.0
    scaled = column / top
    return top * float(np.sqrt(scaled @ scaled / len(column)))


def _standardise_x(X: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X_s = X A with centred (where possible) and scaled columns; returns X_s, A, a."""
    a = _constant_direction(X)
    mean, size = np.zeros(len(a)), np.ones(len(a))
    Xs = np.empty(X.shape, order="F")
    for j, column in enumerate(X.T):
        if a.any() and a[j] == 0.0:
            mean[j] = column.mean()
        np.subtract(column, mean[j], out=Xs[:, j])
        size[j] = _rms(Xs[:, j])
        Xs[:, j] /= size[j]
    return Xs, shift_matrix(a, mean, size), a


def shift_matrix(a: np.ndarray, mean: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return the A of X A = (X - 1 mean') / size where X a = 1; means are 0 where a is not."""
    return (np.eye(len(a)) - np.outer(a, mean)) / size


EXACT_FIT = (
    "the fixed effects reproduce the response exactly, so no variance is left to estimate; "
    "expected a response with variation beyond the fixed part. Remove the predictor that "
    "is a copy of the response, or a fixed effect per row."
)


def _standardise_y(
    y: np.ndarray, Xs: np.ndarray, A: np.ndarray, a: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """y_s = (y - X β₀) / c with β₀ near the least-squares fit; returns y_s, β₀, c."""
    shift = float(y.mean()) if a.any() else 0.0
    centred = y - shift
    most = float(np.max(np.abs(centred)))
    gram = Xs.T @ _weighted(Xs, weights)
    coefficients = np.zeros(len(a))
    if len(a):
        coefficients = np.linalg.solve(gram, Xs.T @ _weighted(centred, weights))
    centred -= Xs @ coefficients
    size = _rms(centred)
    if not size > 1e-14 * max(most, np.finfo(float).tiny) or np.all(centred == 0.0):
        raise DesignError(EXACT_FIT)
    centred /= size
    return centred, a * shift + A @ coefficients, size


def _weighted(columns: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """W times columns; no copy where the weights are all one (None)."""
    if weights is None:
        return columns
    return columns * (weights[:, None] if columns.ndim == 2 else weights)


def _standardise_z(z: np.ndarray, structure: Covariance) -> tuple[np.ndarray, np.ndarray]:
    """Z_s = Z B; shifts only where the term has an intercept that may take up the shift."""
    S = structure.S
    B = np.eye(S)
    a = _constant_direction(z) if structure.mixes else np.zeros(S)
    constant = int(np.argmax(a)) if a.sum() == 1.0 else None
    zs = np.empty(z.shape, order="F")
    size = np.ones(S)
    for s, column in enumerate(z.T):
        if constant is not None and s != constant:
            B[constant, s] = -column.mean()
            np.add(column, B[constant, s], out=zs[:, s])
        else:
            zs[:, s] = column
        size[s] = _rms(zs[:, s])
    if not structure.scales:
        size[:] = size.mean()
    zs /= size
    return zs, B / size


def _weights(design: Any) -> np.ndarray | None:
    return np.asarray(design.weights, float) if design.has_weights else None


def standardise(design: Any) -> Standardised:
    """Shift and scale X, Z and y of a ``Design``; see :class:`Units`.

    Raises
    ------
    DesignError
        Where the fixed effects fit the response exactly.

    Notes
    -----
    O(n (p² + q)) time. Subtracting a number near the mean before products are formed keeps the
    relative error of a slope near 1e-15 where raw sums lose all digits (offset 1e8).
    """
    Xs, A, a = _standardise_x(design.X)
    y = design.y - design.offset if design.has_offset else design.y
    ys, beta0, scale = _standardise_y(y, Xs, A, a, _weights(design))
    parts = [_standardise_z(t.z, covariance(t.cov, t.z.shape[1])) for t in design.terms]
    logdet = float(np.linalg.slogdet(A)[1]) if len(A) else 0.0
    B = tuple(b for _, b in parts)
    units = Units(A, beta0, scale, B, logdet, len(y), len(A))
    return Standardised(Xs, ys, tuple(z for z, _ in parts), units)


# -------------------------------------------------------------------------------------------------
# 2. Layout
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factor:
    """A grouping factor with all the terms on it: ``S`` columns a level, ``J`` levels."""

    group: str
    terms: tuple[int, ...]  # positions of its terms in the formula
    S: int
    J: int


@dataclass(frozen=True)
class Layout:
    """What is static about a model: structures, and the order of elimination. Hashable.

    ``chain`` are the factors eliminated level by level, the first nested in the second and so on;
    ``core`` are the others, dense. ``structures`` follows the formula; θ is the concatenation of
    the structures' parameters. ``blocks`` changes the order of sums over levels and nothing else.
    """

    structures: tuple[Covariance, ...]
    chain: tuple[tuple[tuple[int, ...], int, int], ...]  # (terms, S, J)
    core: tuple[tuple[tuple[int, ...], int, int], ...]
    p: int
    sparse: bool = False  # products of the chain's one factor with the core are kept by entry
    blocks: int = 1  # equal pieces in which the levels of a factor by itself are gone through

    @cached_property
    def n_theta(self) -> int:
        return sum(s.n_theta for s in self.structures)

    @cached_property
    def d(self) -> int:
        """Columns of Z in the core."""
        return sum(S * J for _, S, J in self.core)

    @cached_property
    def q(self) -> int:
        """Number of random effects."""
        return self.d + sum(S * J for _, S, J in self.chain)

    def split(self, theta: Any) -> list[Any]:
        """Cut θ into the parameters of each term."""
        ends = itertools.accumulate((s.n_theta for s in self.structures), initial=0)
        return [theta[a:b] for a, b in itertools.pairwise(ends)]


@dataclass(frozen=True)
class Plan:
    """The layout with its labels: chain factors first, then those of the core."""

    layout: Layout
    factors: tuple[Factor, ...]

    @property
    def n_chain(self) -> int:
        return len(self.layout.chain)

    def words(self) -> str:
        """The order of elimination, in words."""
        chain, core = self.factors[: self.n_chain], self.factors[self.n_chain :]
        if not chain:
            return "least squares"
        words = "level by level: " + ", then ".join(f"{f.group} ({f.J} levels)" for f in chain)
        if not core:
            return words
        products = "kept by entry" if self.layout.sparse else "as dense blocks"
        names = ", ".join(f"{f.group} ({f.J})" for f in core)
        return f"{words}; dense core: {names}; products between them {products}"


def _parents(child: np.ndarray, J: int, parent: np.ndarray) -> np.ndarray | None:
    """Level of ``parent`` in which each level of ``child`` lies, or None where it spans several."""
    lies_in = np.zeros(J, dtype=np.int32)
    lies_in[child] = parent
    return lies_in if np.array_equal(lies_in[child], parent) else None


def parents(design: Any, the_plan: Plan) -> tuple[tuple[np.ndarray | None, ...], ...]:
    """``Gram.parent`` of the rows of a design."""
    chain = the_plan.factors[: the_plan.n_chain]
    codes = [design.terms[f.terms[0]].codes for f in chain]
    return tuple(
        tuple(_parents(codes[i], f.J, outer) for outer in codes[i + 1 :])
        for i, f in enumerate(chain)
    )


def _subjects(design: Any) -> list[tuple[np.ndarray, int]]:
    """Codes and number of the subjects whose residuals are correlated, if there are any."""
    residual = getattr(design, "residual", None)
    if residual is None or not residual.correlated:
        return []
    return [(residual.subject, len(residual.subjects))]


#: a factor of no more columns than this is not worth a place in the chain
DENSE = 32


def plan(design: Any, dense: int = DENSE) -> Plan:
    """Group the terms by factor and choose the order of elimination from the data.

    The largest factor goes first: its block of Z'Z is block-diagonal. Each further factor of more
    than ``dense`` columns, by falling size, joins the chain if every chain factor is nested in it,
    so that elimination fills in nothing outside its diagonal blocks. All others belong to the
    dense core: crossed factors, and outer factors so small that elimination would not pay. The
    products of a chain of one factor with the core are kept sparse where that is cheaper by count
    (``layout.sparse``).

    Where the residuals of a subject are correlated (``design.residual``), the subjects count as
    well: one that spans two levels of a factor couples them, so only factors in which every
    subject is nested may join the chain.
    """
    codes = {t.group: t.codes for t in design.terms}
    sizes = {t.group: len(given(t, "levels")) for t in design.terms}

    subjects = _subjects(design)

    def nested(child: str, parent: str) -> bool:
        return _parents(codes[child], sizes[child], codes[parent]) is not None

    def whole(parent: str) -> bool:
        return all(_parents(s, J, codes[parent]) is not None for s, J in subjects)

    def sparse(chain: list[Factor], core: list[Factor]) -> bool:
        structured = getattr(design, "residual", None) is not None
        return not structured and _prefers_lists(chain, core, codes)

    return arrange(design.terms, design.p, nested, sparse, dense, whole)


def arrange(
    terms: Any,
    p: int,
    nested: Callable[[str, str], bool],
    sparse: Callable[[list[Factor], list[Factor]], bool],
    dense: int = DENSE,
    whole: Callable[[str], bool] = lambda group: True,
) -> Plan:
    """Plan from the labels of the terms, a test of nesting (child, parent) and one of sparsity.

    ``whole(group)`` tells whether no residual subject spans two levels of the group.
    """
    groups: dict[str, list[int]] = {}
    for k, term in enumerate(terms):
        groups.setdefault(term.group, []).append(k)
    factors = []
    for group, members in groups.items():
        S = sum(len(terms[k].names) for k in members)
        J = len(given(terms[members[0]], "levels"))
        factors.append(Factor(group, tuple(members), S, J))
    factors.sort(key=lambda f: -f.S * f.J)
    chain: list[Factor] = []
    core: list[Factor] = []
    for f in factors:
        small = bool(chain) and f.S * f.J <= dense
        joins = not small and whole(f.group) and all(nested(c.group, f.group) for c in chain)
        (chain if joins else core).append(f)
    structures = tuple(covariance(t.cov, len(t.names)) for t in terms)
    layout = Layout(
        structures,
        tuple((f.terms, f.S, f.J) for f in chain),
        tuple((f.terms, f.S, f.J) for f in core),
        p,
        sparse(chain, core),
    )
    return Plan(layout, (*chain, *core))


def _prefers_lists(chain: list[Factor], core: list[Factor], codes: dict[str, np.ndarray]) -> bool:
    """Whether the chain's products with the core are cheaper by entry than as dense blocks."""
    d = sum(f.S * f.J for f in core)
    if len(chain) != 1 or d <= DENSE:
        return False
    first = chain[0]
    parts = [(codes[f.group], f.S, f.J) for f in core]
    pairs = cross.count_pairs(codes[first.group], first.J, parts)
    return cross.pays(pairs, first.S, first.J, d)


# -------------------------------------------------------------------------------------------------
# 3. Sums
# -------------------------------------------------------------------------------------------------


class Gram(NamedTuple):
    """Cross-products that do not involve y (a pytree of arrays). They add over rows.

    The *border* of a chain factor are its products with the core's Z columns and X, in this order;
    with X alone in a sparse layout, whose products with Z are kept by entry in ``cross``.
    """

    own: tuple[Any, ...]  # chain i: Z_i'Z_i by level, (S_i, S_i, J_i)
    up: tuple[tuple[Any, ...], ...]  # chain i, k > i: (S_i, S_k, J_i)
    parent: tuple[tuple[Any, ...], ...]  # chain i, k > i: level of k, (J_i,) int
    border: tuple[Any, ...]  # chain i: (S_i, d + p, J_i)
    core: Any  # (d + p, d + p)
    n: Any  # rows, ()
    logdet_R: Any  # log det of the residual correlation / precision weights, ()
    cross: Any = None  # Cross, in a sparse layout
    times: tuple[Any, ...] = ()  # chain i: how many equal levels each stands for, (J_i,); () = 1


class Rhs(NamedTuple):
    """Cross-products with y; one response. A batch of responses maps over these alone."""

    border: tuple[Any, ...]  # chain i: (S_i, J_i)
    core: Any  # (d + p,)
    yy: Any  # ()


class Workspace:
    """Arrays by name that the next batch of rows overwrites: new memory costs a third of a pass."""

    def __init__(self) -> None:
        self._memory: dict[Any, np.ndarray] = {}

    def __call__(self, name: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array of any content; the one of this name before is lost."""
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].size < size:
            self._memory[name] = np.empty(size)
        return self._memory[name][:size].reshape(shape)


class LevelSums:
    """Sums of an n-vector by the levels of one factor; fast where the rows are sorted by it."""

    def __init__(self, codes: np.ndarray, J: int) -> None:
        self.codes, self.J = codes, J
        self.sorted = len(codes) > 0 and bool(np.all(codes[1:] >= codes[:-1]))
        if self.sorted:
            self.starts = np.concatenate([[0], np.flatnonzero(np.diff(codes)) + 1])
            self.sorted = len(self.starts) == J
        if not self.sorted:
            self.codes = codes.astype(np.intp)  # what bincount counts: converted once

    def __call__(self, values: np.ndarray) -> np.ndarray:
        if self.sorted:
            return np.add.reduceat(values, self.starts)
        return np.bincount(self.codes, weights=values, minlength=self.J)


def _core_columns(
    core: list[tuple[np.ndarray, np.ndarray, int]], by: np.ndarray, J: int, left: np.ndarray
) -> np.ndarray:
    """Sums over rows of left * z by (level of ``by``, column of the core): (d, J)."""
    blocks = []
    for z, codes, levels in core:
        cell = codes.astype(np.int64) * J + by
        S = z.shape[1]
        block = np.empty((levels, S, J))
        for s in range(S):
            sums = np.bincount(cell, weights=left * z[:, s], minlength=levels * J)
            block[:, s] = sums.reshape(levels, J)
        blocks.append(block.reshape(levels * S, J))
    return np.concatenate(blocks) if blocks else np.zeros((0, J))


def _core_gram(
    core: list[tuple[np.ndarray, np.ndarray, int]], X: np.ndarray, w: np.ndarray | None
) -> np.ndarray:
    """[Z_c X]'W[Z_c X], shape (d + p, d + p)."""
    p = X.shape[1]
    sizes = [z.shape[1] * J for z, _, J in core]
    starts = np.cumsum([0, *sizes])
    d = int(starts[-1])
    full = np.zeros((d + p, d + p))
    full[d:, d:] = X.T @ _weighted(X, w)
    for i, (z, codes, J) in enumerate(core):
        for s in range(z.shape[1]):
            rows = starts[i] + s + z.shape[1] * np.arange(J)
            wz = _weighted(z[:, s], w)
            sums = _core_columns(core[i:], codes, J, wz)
            full[rows, starts[i] : d] = sums.T
            for j in range(p):
                full[rows, d + j] = np.bincount(codes, weights=wz * X[:, j], minlength=J)
    lower = np.tril_indices(d + p, -1)
    full[lower] = full.T[lower]
    return full


def _stack(standardised: Standardised, factor: Factor) -> np.ndarray:
    if len(factor.terms) == 1:
        return standardised.Z[factor.terms[0]]
    return np.concatenate([standardised.Z[k] for k in factor.terms], axis=1)


def _is_one(column: np.ndarray) -> bool:
    return bool(column[0] == 1.0 and np.all(column == 1.0))


def _twin(z: np.ndarray, X: np.ndarray) -> int | None:
    """Column of X that equals z: most random slopes have one, and its sums need no second pass."""
    for j, x in enumerate(X.T):
        if z[0] == x[0] and z[-1] == x[-1] and np.array_equal(z, x):
            return j
    return None


class _FactorProducts(NamedTuple):
    """Sums by level of one factor of the chain: its blocks of ``Gram`` and ``Rhs``."""

    own: np.ndarray
    up: tuple[np.ndarray, ...]
    border: np.ndarray
    rhs: np.ndarray


def _factor_products(
    f: Factor,
    codes: np.ndarray,
    z: np.ndarray,
    above: list[np.ndarray],
    core: list[tuple[np.ndarray, np.ndarray, int]],
    left: int,
    s: Standardised,
    w: np.ndarray | None,
    space: Workspace,
) -> _FactorProducts:
    """Products of one factor's columns with themselves, those above, the core, X and y.

    ``left`` columns of the core stand in the border before X: all, or none in a sparse layout.
    """
    level_sum, p = LevelSums(codes, f.J), s.X.shape[1]
    name, product = f.terms, space("product", s.y.shape)
    own, rhs = space((name, "own"), (f.S, f.S, f.J)), space((name, "y"), (f.S, f.J))
    widths = enumerate(other.shape[1] for other in above)
    up = tuple(space((name, k), (f.S, width, f.J)) for k, width in widths)
    border = space((name, "border"), (f.S, left + p, f.J))
    twins = [_twin(column, s.X) for column in z.T]
    for i, column in enumerate(z.T):
        wz = _weighted(column, w)
        unit = w is None and _is_one(column)
        for j, x in enumerate(s.X.T):
            twin, before = twins[i], twins.index(j) if j in twins else i
            if twin is not None and before < i:  # the product of these two is known
                border[i, left + j] = border[before, left + twin]
            else:
                border[i, left + j] = level_sum(x if unit else np.multiply(wz, x, out=product))
        for t in range(i, f.S):
            twin = twins[t]
            if twin is None:
                own[i, t] = level_sum(np.multiply(wz, z[:, t], out=product))
            else:
                own[i, t] = border[i, left + twin]
            own[t, i] = own[i, t]
        for block, other in zip(up, above, strict=True):
            for t in range(other.shape[1]):
                block[i, t] = level_sum(np.multiply(wz, other[:, t], out=product))
        if left:
            border[i, :left] = _core_columns(core, codes, f.J, wz)
        rhs[i] = level_sum(s.y if unit else np.multiply(wz, s.y, out=product))
    return _FactorProducts(own, up, border, rhs)


def crossproducts(
    design: Any,
    the_plan: Plan,
    standardised: Standardised,
    parents: Any = None,
    space: Workspace | None = None,
) -> tuple[Gram, Rhs]:
    """Sum the products of all columns, once over the rows.

    Parameters
    ----------
    design, the_plan, standardised
        The rows to sum over; for a part of the rows, the plan and units of the whole.
    parents : nested tuple of int arrays, optional
        ``Gram.parent`` of the whole data, where only a part of the rows is at hand.
    space : Workspace, optional
        Where the products by level are made, if they are used before the next call with it.

    Returns
    -------
    Gram, Rhs
        Float64 NumPy arrays. Memory O(q_chain (S + d + p) + (d + p)²), nothing of size n.

    Notes
    -----
    O(n (S + d_terms + p) S) time. Rows carry the weight w_i of Var(ε_i) = σ²/w_i.
    """
    X, y, w = standardised.X, standardised.y, _weights(design)
    n, p = X.shape
    chain = the_plan.factors[: the_plan.n_chain]
    rest = the_plan.factors[the_plan.n_chain :]
    codes = {f.group: design.terms[f.terms[0]].codes for f in the_plan.factors}
    core = [(_stack(standardised, f), codes[f.group], f.J) for f in rest]
    d, sparse = the_plan.layout.d, the_plan.layout.sparse
    left = 0 if sparse else d  # columns of the core in the dense border
    own, up, parent, border, rhs_border = [], [], [], [], []
    space = Workspace() if space is None else space
    stacked = [_stack(standardised, f) for f in chain]
    for i, f in enumerate(chain):
        made = _factor_products(
            f, codes[f.group], stacked[i], stacked[i + 1 :], core, left, standardised, w, space
        )
        own.append(made.own)
        up.append(made.up)
        border.append(made.border)
        rhs_border.append(made.rhs)
        known = None if parents is None else parents[i]
        found = [_parents(codes[f.group], f.J, codes[g.group]) for g in chain[i + 1 :]]
        parent.append(tuple(found if known is None else known))
    wy = _weighted(y, w)
    core_y = [np.zeros(d + p)]
    if d:
        core_y[0][:d] = _core_columns(core, np.zeros(n, np.int64), 1, wy)[:, 0]
    core_y[0][d:] = X.T @ wy
    gram = Gram(
        tuple(own),
        tuple(up),
        tuple(parent),
        tuple(border),
        _core_gram(core, X, w),
        np.float64(n),
        np.float64(0.0 if w is None else -np.sum(np.log(w))),
        cross.entries(codes[chain[0].group], stacked[0], w, chain[0].J, core) if sparse else None,
    )
    return gram, Rhs(tuple(rhs_border), core_y[0], np.float64(y @ wy))

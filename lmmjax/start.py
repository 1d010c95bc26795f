r"""Where the optimiser starts: covariances by the method of moments, from the cross-products.

MINQUE(0) (Rao 1970; Searle, Casella and McCulloch 1992, section 11.3): with P = I - X(X'X)⁻¹X' and
V = σ²I + Σ_l γ_l M_l, M_l = Z_aZ_b' (+ Z_bZ_a' for a covariance, a ≠ b), the quadratic forms have
expectations that are linear in the parameters,

    E y'PM_kPy = Σ_l γ_l tr(PM_kPM_l) + σ² tr(PM_k)
    E y'Py     = Σ_l γ_l tr(PM_l) + σ² (n - p)

so one small linear system gives every variance, and every covariance of the unstructured terms. For
balanced data that is the REML estimate itself; otherwise it is unbiased and inefficient, which is
all that a start needs: what is not well inside the cone of covariances is moved there.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from lmmjax.covariance import Covariance, Unstructured
from lmmjax.cross import Cross
from lmmjax.gram import Gram, Layout, Rhs

#: relative SDs of a start stay between these: away from the saddle at 0, and from infinity
SMALLEST, LARGEST = 0.05, 20.0

#: the lowest eigenvalue of a correlation matrix of a start
ROUND = 0.05


class _Form(NamedTuple):
    """One parameter: the covariance of columns s <= t of factor ``factor`` (chain first)."""

    factor: int
    s: int
    t: int

    @property
    def orders(self) -> list[tuple[int, int]]:
        return [(self.s, self.t)] if self.s == self.t else [(self.s, self.t), (self.t, self.s)]


class _Factor(NamedTuple):
    """What one grouping factor brings: S columns of Z over J levels."""

    u: np.ndarray  # X'Z, (S, p, J)
    trace: np.ndarray  # Σ over levels of Z'Z, (S, S)
    place: int  # among the factors of the chain, or of the core
    at: int  # first column in the core, -1 in the chain

    @property
    def S(self) -> int:
        return self.u.shape[0]

    @property
    def J(self) -> int:
        return self.u.shape[2]

    @property
    def columns(self) -> slice:
        return slice(self.at, self.at + self.S * self.J)


def identity(layout: Layout) -> np.ndarray:
    """Parameters of Λ = I for every term."""
    return np.concatenate([np.zeros(0), *(s.start() for s in layout.structures)])


def moments(layout: Layout, gram: Gram, rhs: Rhs) -> np.ndarray:
    """θ from MINQUE(0), in standardised units; shape (n_theta,). See :func:`moments_of_many`."""
    one = Rhs(tuple(b[None] for b in rhs.border), rhs.core[None], np.asarray(rhs.yy)[None])
    return moments_of_many(layout, gram, one)[0]


def moments_of_many(layout: Layout, gram: Gram, rhs: Rhs) -> np.ndarray:
    """θ from MINQUE(0) for many responses on one design, in standardised units.

    Where the design does not determine the moments, everything starts from the identity.

    Parameters
    ----------
    rhs : Rhs
        With a leading axis of m responses.

    Returns
    -------
    ndarray, shape (m, n_theta)

    Notes
    -----
    O(size of the Gram (S² + p²)) for the system, O(m q) for the responses.
    """
    out = np.tile(identity(layout), (len(rhs.yy), 1))
    if layout.n_theta == 0:
        return out
    forms, values = _covariances(layout, gram, rhs)
    if values is None:
        return out
    where = {form: values[:, i] for i, form in enumerate(forms)}
    starts = np.cumsum([0, *(s.n_theta for s in layout.structures)])
    for f, (terms, _, _) in enumerate((*layout.chain, *layout.core)):
        at = 0
        for k in terms:
            structure = layout.structures[k]
            D = np.zeros((len(out), structure.S, structure.S))
            for s, t in itertools.combinations_with_replacement(range(structure.S), 2):
                D[:, s, t] = D[:, t, s] = where.get(_Form(f, at + s, at + t), 0.0)
            out[:, starts[k] : starts[k + 1]] = _inside(structure, D)
            at += structure.S
    return out


def _inside(structure: Covariance, D: np.ndarray) -> np.ndarray:
    """θ of the nearest relative covariances well inside the cone: (m, S, S) -> (m, n_theta)."""
    S = structure.S
    D = np.nan_to_num(D, nan=1.0)
    sd = np.sqrt(np.clip(np.einsum("mss->ms", D), SMALLEST**2, LARGEST**2))
    if not isinstance(structure, Unstructured):
        return np.stack([structure.from_factor(np.diag(x)) for x in sd])
    eye = np.eye(S)
    corr = np.clip(D / (sd[:, :, None] * sd[:, None]), -1.0, 1.0) * (1 - eye) + eye
    lowest = np.linalg.eigvalsh(corr)[:, 0]
    share = np.where(lowest < ROUND, (1 - ROUND) / (1 - np.minimum(lowest, ROUND)), 1.0)
    root = np.linalg.cholesky(eye + share[:, None, None] * (corr - eye))
    columns, rows = np.triu_indices(S)
    return (sd[:, :, None] * root)[:, rows, columns]


def _covariances(layout: Layout, gram: Gram, rhs: Rhs) -> tuple[list[_Form], np.ndarray | None]:
    """The parameters, and their estimates relative to that of σ²: (m, parameters).

    None where the design does not determine them.
    """
    d = layout.d
    W = np.linalg.inv(gram.core[d:, d:])
    factors, forms = _factors(layout, gram), _forms(layout)
    system = _system(layout, gram, factors, forms, W)
    if not np.all(np.isfinite(system)) or np.linalg.cond(system) > 1e12:
        return forms, None
    fixed = rhs.core[:, d:] @ W  # (m, p)
    rest = []
    for factor in factors:
        if factor.at < 0:
            y = rhs.border[factor.place]
        else:
            y = np.moveaxis(rhs.core[:, factor.columns].reshape(-1, factor.J, factor.S), 1, 2)
        rest.append(y - np.tensordot(fixed, factor.u, (1, 1)))
    right = np.empty((len(fixed), len(forms) + 1))
    for i, (f, s, t) in enumerate(forms):
        both = np.einsum("mj,mj->m", rest[f][:, s], rest[f][:, t])
        right[:, i] = both if s == t else 2 * both
    right[:, -1] = rhs.yy - np.einsum("mp,mp->m", fixed, rhs.core[:, d:])
    values = np.linalg.solve(system, right.T).T
    residual = np.maximum(values[:, -1], 0.05 * right[:, -1] / system[-1, -1])
    with np.errstate(divide="ignore", invalid="ignore"):  # a constant response has no variances
        return forms, values[:, :-1] / residual[:, None]


def _forms(layout: Layout) -> list[_Form]:
    """Variances of every column, and covariances within unstructured terms."""
    out = []
    for f, (terms, _, _) in enumerate((*layout.chain, *layout.core)):
        at = 0
        for structure in (layout.structures[k] for k in terms):
            pairs = itertools.combinations_with_replacement(range(structure.S), 2)
            full = isinstance(structure, Unstructured)
            out += [_Form(f, at + s, at + t) for s, t in pairs if full or s == t]
            at += structure.S
    return out


def _factors(layout: Layout, gram: Gram) -> list[_Factor]:
    """The factors of the chain, then the core's."""
    d = layout.d
    X_part = slice(0, None) if layout.sparse else slice(d, None)
    out = [
        _Factor(border[:, X_part], np.sum(own, axis=-1), i, -1)
        for i, (border, own) in enumerate(zip(gram.border, gram.own, strict=True))
    ]
    at = 0
    for place, (_, S, J) in enumerate(layout.core):
        mine = slice(at, at + S * J)
        u = gram.core[d:, mine].reshape(-1, J, S)
        own = gram.core[mine, mine].reshape(J, S, J, S)
        out.append(_Factor(np.transpose(u, (2, 0, 1)), np.einsum("jsjt->st", own), place, at))
        at += S * J
    return out


# -------------------------------------------------------------------------------------------------
# The system
# -------------------------------------------------------------------------------------------------


def _system(
    layout: Layout, gram: Gram, factors: list[_Factor], forms: list[_Form], W: np.ndarray
) -> np.ndarray:
    """Expectations of the quadratic forms per unit of each parameter, σ² last: (K + 1, K + 1)."""
    K = len(forms)
    system = np.empty((K + 1, K + 1))
    F = [W @ np.einsum("apj,bqj->abpq", x.u, x.u, optimize=True) for x in factors]
    traces = {
        (f, g): _traces(layout, gram, (factors[f], F[f]), (factors[g], F[g]), W)
        for f, g in itertools.combinations_with_replacement(range(len(factors)), 2)
    }
    for i, a in enumerate(forms):
        for j, b in enumerate(forms[i:], i):
            table = traces[a.factor, b.factor]
            system[i, j] = system[j, i] = sum(
                table[s, t, u, v] for s, t in a.orders for u, v in b.orders
            )
        factor = factors[a.factor]
        overlap = np.trace(F[a.factor][a.s, a.t])
        system[i, K] = system[K, i] = len(a.orders) * (factor.trace[a.s, a.t] - overlap)
    system[K, K] = float(gram.n) - layout.p
    return system


def _traces(
    layout: Layout,
    gram: Gram,
    first: tuple[_Factor, np.ndarray],
    second: tuple[_Factor, np.ndarray],
    W: np.ndarray,
) -> np.ndarray:
    """tr(P Z_aZ_b' P Z_cZ_d') = <Z_b'PZ_c, Z_a'PZ_d>, a and b of f, c and d of g: (S, S, R, R).

    With B_bc = Z_b'Z_c and H_ad = u_a'Wu_d it is <B_bc, B_ad> - <B_bc, H_ad> - <B_ad, H_bc> +
    <H_bc, H_ad>. With each factor comes W Σ_j u_a u_b', (S, S, p, p).
    """
    (f, F), (g, G) = first, second
    if f.at >= 0:
        shape = (f.J, f.S, g.J, g.S)
        BB, BH = _dense(np.moveaxis(gram.core[f.columns, g.columns].reshape(shape), 1, 0), f, g, W)
    elif g.at < 0:
        BB, BH = _entries(*_chain_entries(gram, f.place, g.place), f, g, W)
    elif gram.cross is None:
        border = gram.border[f.place][:, g.columns].reshape(f.S, g.J, g.S, f.J)
        BB, BH = _dense(np.moveaxis(border, 3, 1), f, g, W)
    else:
        BB, BH = _entries(*_cross_entries(gram.cross, g), f, g, W)
    HH = np.einsum("bapq,dcqp->bcad", F, G, optimize=True)
    return np.einsum("bcad->abcd", BB - BH - np.einsum("adbc->bcad", BH) + HH)


#: entries gone through at a time, so that what is made of them stays in the cache
ENTRIES = 1 << 13

#: blocks by their non-zero entries: value (S, R, m), and the levels of f and g that meet (m,)
_Entries = tuple[np.ndarray, np.ndarray | slice, np.ndarray | slice]


def _chain_entries(gram: Gram, i: int, k: int) -> _Entries:
    """Levels meet themselves, or the level of the outer factor in which they lie."""
    if i == k:
        return gram.own[i], slice(None), slice(None)
    return gram.up[i][k - i - 1], slice(None), gram.parent[i][k - i - 1]


def _cross_entries(cross: Cross, g: _Factor) -> _Entries:
    """The lists of a sparse layout, sorted alike for every column of g."""
    at = cross.column - g.at
    mine = (at >= 0) & (at < g.S * g.J)
    columns = [np.flatnonzero(mine & (at % g.S == c)) for c in range(g.S)]
    value = np.stack([cross.value[:, entries] for entries in columns], axis=1)
    return value, cross.level[columns[0]], at[columns[0]] // g.S


def _entries(
    value: np.ndarray, level: Any, other: Any, f: _Factor, g: _Factor, W: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """<B_bc, B_ad> and <B_bc, H_ad> from the entries of B: (S, R, S, R) each."""
    shape, B = (f.S, g.S, f.S, g.S), value.reshape(f.S * g.S, -1)
    BH = np.zeros((f.S * g.S, f.S * g.S))
    for at in range(0, B.shape[1], ENTRIES):
        some = slice(at, at + ENTRIES)
        left, right = (
            x[..., some if isinstance(where, slice) else where[some]]
            for x, where in ((f.u, level), (g.u, other))
        )
        H = np.stack([np.sum(x * y, axis=0) for x in left for y in W @ right])
        BH += B[:, some] @ H.T
    return (B @ B.T).reshape(shape), BH.reshape(shape)


def _dense(B: np.ndarray, f: _Factor, g: _Factor, W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for dense blocks B (S, J, J', R): (S, R, S, R)."""
    p = len(W)
    BB, BH = np.empty((2, f.S, g.S, f.S, g.S))
    left, right = f.u.reshape(-1, f.J), (W @ g.u).reshape(-1, g.J)
    for b, c in itertools.product(range(f.S), range(g.S)):
        block = B[b, :, :, c]
        BB[b, c] = np.einsum("jk,ajkd->ad", block, B)
        moved = (left @ block @ right.T).reshape(f.S, p, g.S, p)
        BH[b, c] = np.einsum("apdp->ad", moved)
    return BB, BH

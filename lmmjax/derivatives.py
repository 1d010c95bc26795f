r"""Value, gradient and Hessian of the profiled criterion.

Where one grouping factor is eliminated level by level (the common layout: one factor, or one beside
crossed or small outer factors in the dense core) the derivatives have closed forms; they cost a
fraction of automatic differentiation to compile and to run. :func:`profiled` hands them to JAX as
its derivative rules, so that grad, hessian, vmap and implicit differentiation of the criterion use
them. Deeper chains, derivatives beyond the second and those in the data are automatic. The tests
hold one against the other.

With Σ = ΛΛ' for all factors, V = R + ZΣZ', and

    Ã = Z'V⁻¹Z,   T = Z'V⁻¹[X y],   S = [X y]'V⁻¹[X y],   E_k = ∂Σ/∂θ_k
    v = (-β̂, 1),  C = (ν/r²) v v' + (REML) S_x⁻¹ ⊕ 0

the rules ∂Ã = -Ã E Ã, ∂T = -Ã E T, ∂S = -T'E T give

    gradient_k  = tr(E_k Γ),   Γ = Ã - T C T'
    Hessian_kl  = tr((∂E_k/∂θ_l) Γ) - tr(Ã E_k Ã E_l) + 2 tr(C T'E_k Ã E_l T)
                  - 2 (ν/r²) (Ṡ_k v)_x' S_x⁻¹ (Ṡ_l v)_x - (ν/r⁴) (v'Ṡ_k v)(v'Ṡ_l v)
                  - (REML) tr(S_x⁻¹ Ṡ_k,x S_x⁻¹ Ṡ_l,x),      Ṡ_k = T'E_k T

Ã is never formed. With V₁ = R + Z₁Σ₁Z₁' of the chain factor, block-diagonal by level i, the core's
columns Z_c, per level a_i = Z₁'V₁⁻¹Z₁ and P_i = Z₁'V₁⁻¹Z_c, and over all rows K = Z_c'V₁⁻¹Z_c and
Q = Λ_c M Λ_c', M = (I + Λ_c'KΛ_c)⁻¹,

    Ã_ij = δ_ij a_i - P_i Q P_j',   Ã_ic = P_i (I - Q K),   Ã_cc = K - K Q K,   Ã_cc Λ_c = K Λ_c M.

For a core of many columns the Hessian's traces cost several products of (d, d) matrices. The
optimiser then uses the average information, the mean of the observed and the expected one, in which
they cancel (Gilmour, Thompson and Cullis 1995); with w_k = E_k T v and Ã_P = Ã - T_x S_x⁻¹ T_x',

    tr((∂E_k/∂θ_l) Γ) + (ν/r²) w_k'Ã_P w_l - (ν/r⁴) (v'Ṡ_k v)(v'Ṡ_l v).

The two informations differ by the chance in as many effects as a factor has levels. So rows and
columns of the parameters of small factors, where that is most, are exact after all: they need the
few columns X = Ã_{·F} of such a factor's effects F,

    tr(Ã E_k Ã E_l) = tr(X'E_kX E_l),   tr(C T'E_k Ã E_l T) = tr(C (T'E_kX) E_l T_F).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax import cross as cr
from lmmjax import likelihood as lk
from lmmjax.gram import Gram, Layout, Rhs

Derivatives = tuple[jax.Array, jax.Array, jax.Array]

#: entries of a matrix whose products with the rows of a block are unrolled
SMALL_PRODUCT = 100

#: products summed in a contraction below which it is written out
TINY = 1000

#: from this many columns of the core on, the optimiser uses the average information
LARGE_CORE = 150

#: columns of a factor of the core up to which the curvature in its parameters is always exact
FEW_COLUMNS = 32


def by_autodiff(f: Callable[[jax.Array], jax.Array], theta: jax.Array) -> Derivatives:
    """f, ∇f, ∇²f by automatic differentiation, f and ∇f evaluated once."""
    (value, gradient), push = jax.linearize(jax.value_and_grad(f), theta)
    _, hessian = jax.vmap(push)(jnp.eye(theta.shape[0], dtype=theta.dtype))
    return value, gradient, 0.5 * (hessian + hessian.T)


def has_closed_form(layout: Layout) -> bool:
    """One factor in the chain, of few enough columns that S⁴ sums over the levels are cheap."""
    return len(layout.chain) == 1 and layout.chain[0][1] <= 8


def is_approximate(layout: Layout) -> bool:
    """Whether :func:`for_optimiser` replaces most of the Hessian by the average information."""
    return has_closed_form(layout) and layout.d >= LARGE_CORE


def value_gradient_hessian(
    layout: Layout, method: str, theta: jax.Array, gram: Gram, rhs: Rhs
) -> Derivatives:
    """The profiled -2 log-likelihood in standardised units, its gradient and Hessian in θ.

    Cost: O(J (S⁴ + S² (p + 1)²)) for one factor, a small multiple of ``reduce`` otherwise.
    """
    if has_closed_form(layout):
        return closed_form(layout, method, theta, gram, rhs)

    def f(t: jax.Array) -> jax.Array:
        return lk.deviance(lk.reduce(layout, t, gram, rhs), method)

    return by_autodiff(f, theta)


def for_optimiser(
    layout: Layout, method: str, theta: jax.Array, gram: Gram, rhs: Rhs
) -> Derivatives:
    """Value, exact gradient and a curvature: the Hessian, or the average information (large core).

    Rows and columns of factors of at most ``FEW_COLUMNS`` columns are the Hessian's in any case.
    Where Λ's derivative vanishes (a variance of 0) the two curvatures agree.
    """
    if is_approximate(layout):
        return closed_form(layout, method, theta, gram, rhs, exact=False)
    return value_gradient_hessian(layout, method, theta, gram, rhs)


# -------------------------------------------------------------------------------------------------
# The criterion with its derivative rules
# -------------------------------------------------------------------------------------------------


def _value(
    layout: Layout, method: str, theta: jax.Array, gram: Gram, rhs: Rhs, units: Any
) -> jax.Array:
    return lk.deviance(lk.reduce(layout, theta, gram, rhs, units), method)


def _gradient(
    layout: Layout, method: str, theta: jax.Array, gram: Gram, rhs: Rhs, units: Any
) -> jax.Array:
    return closed_form(layout, method, theta, gram, rhs, units, order=1)[1]


def _hessian(
    layout: Layout, method: str, theta: jax.Array, gram: Gram, rhs: Rhs, units: Any
) -> jax.Array:
    return closed_form(layout, method, theta, gram, rhs, units)[2]


def _with_rule(
    plain: Callable[..., jax.Array], slope: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """``plain`` with the derivative ``slope`` in θ; automatic in the data and units."""
    rule = jax.custom_jvp(plain, nondiff_argnums=(0, 1))

    def jvp(layout: Layout, method: str, primals: Any, tangents: Any) -> tuple[Any, Any]:
        theta, *data = primals
        theta_dot, *data_dot = tangents
        zero = jax.custom_derivatives.SymbolicZero
        value = rule(layout, method, theta, *data)
        leaves, tree = jax.tree.flatten(data)
        dots = jax.tree.leaves(data_dot, is_leaf=lambda a: isinstance(a, zero))
        moving = [
            i
            for i, (leaf, dot) in enumerate(zip(leaves, dots, strict=True))
            if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact) and not isinstance(dot, zero)
        ]
        out = jnp.zeros_like(value)
        if not isinstance(theta_dot, zero):
            out = out + slope(layout, method, theta, *data) @ theta_dot
        if moving:

            def of_data(chosen: list[jax.Array]) -> jax.Array:
                filled = list(leaves)
                for i, leaf in zip(moving, chosen, strict=True):
                    filled[i] = leaf
                return plain(layout, method, theta, *jax.tree.unflatten(tree, filled))

            chosen, pushed = [leaves[i] for i in moving], [dots[i] for i in moving]
            out = out + jax.jvp(of_data, (chosen,), (pushed,))[1]
        return value, out

    rule.defjvp(jvp, symbolic_zeros=True)
    return rule


_with_gradient = _with_rule(_value, _with_rule(_gradient, _hessian))


def profiled(
    layout: Layout, method: str, theta: jax.Array, gram: Gram, rhs: Rhs, units: Sequence[Any] = ()
) -> jax.Array:
    """The profiled -2 log-likelihood in standardised units, with closed-form derivative rules.

    Parameters
    ----------
    units : sequence of arrays, optional
        As for :func:`lmmjax.likelihood.reduce`.
    """
    if has_closed_form(layout):
        return _with_gradient(layout, method, theta, gram, rhs, tuple(units))
    return lk.deviance(lk.reduce(layout, theta, gram, rhs, units), method)


def _forms(
    layout: Layout, method: str, theta: jax.Array, gram: Gram, rhs: Rhs, units: Any
) -> jax.Array:
    """log|V| and S = [X y]'V⁻¹[X y], as one vector."""
    red = lk.reduce(layout, theta, gram, rhs, units)
    xx, xy, yy = lk.quadratic(red)
    S = jnp.block([[xx, xy[:, None]], [xy[None], yy[None, None]]])
    return jnp.append(red.logdet_V, S.ravel())


def _forms_slope(
    layout: Layout, method: str, theta: jax.Array, gram: Gram, rhs: Rhs, units: Any
) -> jax.Array:
    """∂ log|V| = tr(E_k Ã), ∂S = -Ṡ_k."""
    k, E = _pieces(layout, theta, gram, rhs, units), _sigma_derivatives(layout, theta, units)
    nothing = jnp.zeros((k.red.p + 1,) * 2, theta.dtype)
    trace = _pair(_gamma(layout, k, nothing), E)
    return jnp.concatenate([trace[None], -_s_dot(layout, k, E).reshape(len(theta), -1).T])


_forms_with_slope = _with_rule(_forms, _forms_slope)


def reduce(
    layout: Layout, theta: jax.Array, gram: Gram, rhs: Rhs, units: Sequence[Any] = ()
) -> lk.Reduction:
    """What the heads read of :func:`lmmjax.likelihood.reduce`, its first derivatives closed forms.

    For large cores: a gradient of any criterion, at any σ, for little more than an evaluation.
    Without the factor itself, so not for random effects.
    """
    if not has_closed_form(layout):
        return lk.reduce(layout, theta, gram, rhs, units)
    p = layout.p
    both = _forms_with_slope(layout, "ML", theta, gram, rhs, tuple(units))
    S = both[1:].reshape(p + 1, p + 1)
    L = jnp.linalg.cholesky(S[:p, :p])
    l_y = jax.scipy.linalg.solve_triangular(L, S[:p, p], lower=True)
    n = jnp.asarray(gram.n, S.dtype)
    return lk.Reduction(n, both[0], L, l_y, S[p, p] - l_y @ l_y, None, None)


# -------------------------------------------------------------------------------------------------
# P_i = Z₁'V₁⁻¹Z_c, dense or sparse
# -------------------------------------------------------------------------------------------------


class DenseP(NamedTuple):
    """P as blocks (S, d, J)."""

    P: jax.Array

    def apply(self, v: jax.Array) -> jax.Array:
        """P_i v: (d, k) -> (S, k, J)."""
        return _left(v.T, self.P)

    def transposed(self, x: jax.Array) -> jax.Array:
        """Σ_i P_i'x_i: (S, k, J) -> (d, k)."""
        return lk.over_levels(self.P, x)

    def conjugate(self, Q: jax.Array) -> jax.Array:
        """P_iQP_i': (d, d) -> (S, S, J)."""
        return _inner(_left(Q, self.P), self.P)

    def conjugate_sum(self, Q: jax.Array) -> jax.Array:
        """Σ_i P_iQP_i': (d, d) -> (S, S); the blocks of Q above its diagonal are not used."""
        out: Any = 0.0
        for i, j in lk.row_blocks(len(Q)):
            own = 0.5 * jnp.sum(_inner(_left(Q[i:j, i:j], self.P[:, i:j]), self.P[:, i:j]), -1)
            if i:
                own = own + jnp.sum(_inner(_left(Q[i:j, :i], self.P[:, :i]), self.P[:, i:j]), -1)
            out = out + own + own.T
        return out

    def weigh(self, e: jax.Array) -> jax.Array:
        """Σ_i P_i'e_kP_i: (k, S, S) -> (k, d, d)."""
        return jnp.einsum("kab,adbe->kde", e, _outer(self.P, self.P))


class SparseP(NamedTuple):
    """P_i = N_iB_i with N_i = I - A_iG_i (S, S, J) and B by entry."""

    N: jax.Array
    cross: cr.Cross
    d: int

    def apply(self, v: jax.Array) -> jax.Array:
        """P_i v: (d, k) -> (S, k, J)."""
        return lk.matvec(self.N, cr.from_core(self.cross, v, self.N.shape[-1]))

    def transposed(self, x: jax.Array) -> jax.Array:
        """Σ_i P_i'x_i: (S, k, J) -> (d, k)."""
        return cr.to_core(self.cross, lk.per_level(self.N, x), self.d)

    def conjugate(self, Q: jax.Array) -> jax.Array:
        """P_iQP_i': (d, d) -> (S, S, J)."""
        middle = cr.conjugate_core(self.cross, Q, self.N.shape[-1])
        return _inner(lk.matvec(self.N, middle), self.N)

    def conjugate_sum(self, Q: jax.Array) -> jax.Array:
        """Σ_i P_iQP_i': (d, d) -> (S, S)."""
        return jnp.sum(self.conjugate(Q), axis=-1)

    def weigh(self, e: jax.Array) -> jax.Array:
        """Σ_i P_i'e_kP_i: (k, S, S) -> (k, d, d)."""
        products = [lk.per_level(self.N, lk.scale_rows(x.T, self.N)) for x in e]
        return jnp.stack([cr.conjugate_levels(self.cross, G, self.d) for G in products])


# -------------------------------------------------------------------------------------------------
# Pieces
# -------------------------------------------------------------------------------------------------


class Pieces(NamedTuple):
    """What the closed forms need at θ. ``k`` counts the parameters of the part named."""

    red: lk.Reduction
    lams: list[jax.Array]  # Λ per factor, chain first
    a: jax.Array  # a_i, (S, S, J)
    every_a: jax.Array  # a_i times the number of levels that it stands for (Gram.times)
    P: Any  # DenseP or SparseP
    T: jax.Array  # rows of T of the chain, (S, p + 1, J)
    T_core: jax.Array  # rows of T of the core, (d, p + 1)
    X: jax.Array  # columns F of Ã, rows of the chain, (S, m, J)
    X_core: jax.Array  # rows of the core, (d, m)
    K: jax.Array  # (d, d)
    Q: jax.Array  # Λ_c M Λ_c', (d, d)
    v: jax.Array  # (-β̂, 1)
    S_inv: jax.Array  # S_x⁻¹ (p, p)


def _pieces(
    layout: Layout,
    theta: jax.Array,
    gram: Gram,
    rhs: Rhs,
    units: Any,
    F: Sequence[int] | np.ndarray = (),
) -> Pieces:
    """From the factorisation: with W = U⁻'Λ'(·), Z₁'V₁⁻¹B = B - W_A'W_B, no inverse formed.

    ``F`` are the columns of the core's Z for which Ã is wanted.
    """
    red, d = lk.reduce(layout, theta, gram, rhs, units), layout.d
    if d == 0:
        return _plain_pieces(layout, red, gram, rhs)
    # written out once: left to itself, the compiler repeats the elimination for every use of it
    red = jax.lax.optimization_barrier(red)
    f = red.factorised
    W_A = lk.forward_substitute(f.U[0], lk.scale_rows(f.lams[0], gram.own[0]))
    W_A = jax.lax.optimization_barrier(W_A)
    W_B = jnp.concatenate([f.border[0], red.row.chain[0][:, None]], axis=1)
    B = jnp.concatenate([gram.border[0], rhs.border[0][:, None]], axis=1)
    a = gram.own[0] - lk.per_level(W_A, W_A)
    every_a = a * gram.times[0] if gram.times else a
    fixed = B - lk.per_level(W_A, W_B)
    P: DenseP | SparseP
    if f.root is None:
        P, fixed = DenseP(fixed[:, :d]), fixed[:, d:]
    else:
        eye = jnp.eye(a.shape[0], dtype=theta.dtype)[..., None]
        P = SparseP(eye - lk.per_level(W_A, f.root), gram.cross, d)
    Q = lk.conjugate_core(
        layout, [lam.T for lam in f.lams[1:]], lk.inverse_from_cholesky(f.core[:d, :d])
    )
    F, p1 = np.asarray(F, int), layout.p + 1
    K = f.schur[:d, :d]
    K_y = jnp.concatenate([f.schur[:d, d:], red.row.schur[:d, None], K[:, F]], axis=1)
    QK = Q @ K_y
    core = K_y - K @ QK
    # Ã_iF = P_i(I - QK)_F
    chain = -P.apply(QK.at[F, p1 + np.arange(len(F))].add(-1.0))
    T, X = fixed + chain[:, :p1], chain[:, p1:]
    T_core, X_core = core[:, :p1], core[:, p1:]
    v = jnp.append(-lk.fixef(red), 1.0).astype(theta.dtype)
    lams = list(f.lams)
    a, every_a, T = jax.lax.optimization_barrier((a, every_a, T))
    S_inv = lk.unscaled_vcov(red)
    return Pieces(red, lams, a, every_a, P, T, T_core, X, X_core, K, Q, v, S_inv)


def _plain_pieces(layout: Layout, red: lk.Reduction, gram: Gram, rhs: Rhs) -> Pieces:
    """:func:`_pieces` of one factor by itself."""
    lams = list(red.factorised.lams)
    B = jnp.concatenate([gram.border[0], rhs.border[0][:, None]], axis=1)
    a, every_a, T = _plain_levels(lams[0], gram.own[0], B, gram.times)
    (S, m, J), dtype = T.shape, T.dtype
    of_levels, of_core = jnp.zeros((S, 0, J), dtype), jnp.zeros((0, 0), dtype)
    P, T_core = DenseP(of_levels), jnp.zeros((0, m), dtype)
    v, S_inv = jnp.append(-lk.fixef(red), 1.0).astype(dtype), lk.unscaled_vcov(red)
    return Pieces(
        red, lams, a, every_a, P, T, T_core, of_levels, of_core, of_core, of_core, v, S_inv
    )


def _plain_levels(
    lam: jax.Array, A: jax.Array, B: jax.Array, times: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """a_i, a_i times the levels that it stands for, and T_i, of one factor by itself.

    N = (I + AΣ)⁻¹ = I - AG gives a = NA and T = NB, B = Z'R⁻¹[X y].
    """
    _, root = lk.plain_root(lam, A)
    eye = jnp.eye(len(lam), dtype=lam.dtype)[..., None]
    N = jax.lax.optimization_barrier(eye - lk.matvec(A, lk.per_level(root, root)))
    a, T = jax.lax.optimization_barrier((lk.matvec(N, A), lk.matvec(N, B)))
    return a, a * times[0] if times else a, T


class LevelSums(NamedTuple):
    """What the closed forms need of the chain's levels once C is known, summed over them."""

    gamma: jax.Array  # Σ a - T C T', (S, S)
    outer: jax.Array  # Σ T ⊗ T, (S, p + 1, S, p + 1)
    four: jax.Array  # Σ (2 T C T' - a) ⊗ a, (S, S, S, S)


def _level_sums(layout: Layout, k: Pieces, C: jax.Array, gram: Gram, rhs: Rhs) -> LevelSums:
    if layout.blocks == 1:
        return _summed(k.a, k.every_a, k.T, C)

    def part(A: jax.Array, B: jax.Array, times: Any) -> LevelSums:
        return _summed(*_plain_levels(k.lams[0], A, B, times), C)

    return lk.over_blocks(layout, part, gram, rhs)


def _summed(a: jax.Array, every_a: jax.Array, T: jax.Array, C: jax.Array) -> LevelSums:
    H = _conjugate(C, T)
    return LevelSums(jnp.sum(every_a - H, axis=-1), _outer(T, T), _outer(2 * H - every_a, a))


def _conjugate(C: jax.Array, T: jax.Array) -> jax.Array:
    """T C T' per level for a symmetric C: (m, m), (S, m, J) -> (S, S, J).

    A small C is unrolled: one fused loop over the levels.
    """
    (S, m, _), H = T.shape, {}
    if C.size > SMALL_PRODUCT:
        return jax.lax.optimization_barrier(_inner(_left(C, T), T))
    for i in range(S):
        CT = [sum(C[x, y] * T[i, y] for y in range(m)) for x in range(m)]
        for j in range(i + 1):
            H[i, j] = H[j, i] = sum(CT[x] * T[j, x] for x in range(m))
    rows = [jnp.stack([H[i, j] for j in range(S)]) for i in range(S)]
    return jax.lax.optimization_barrier(jnp.stack(rows))


def _left(A: jax.Array, x: jax.Array) -> jax.Array:
    """A x for every row of the level's block: (k, m), (S, m, J) -> (S, k, J).

    A small A is unrolled: one fused loop over the levels instead of S products.
    """
    if A.size > SMALL_PRODUCT:
        return jnp.stack([A @ rows for rows in x])
    rows = [sum(A[i, j] * x[:, j] for j in range(A.shape[1])) for i in range(A.shape[0])]
    return jnp.stack(rows, axis=1)


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y' per level: (S, m, J), (R, m, J) -> (S, R, J), a fused multiply and add."""
    return jnp.sum(x[:, None] * y[None], axis=2)


def _contract(spec: str, *operands: jax.Array) -> jax.Array:
    """``einsum`` of arrays that are tiny, or not.

    A call of the matrix library costs more than a tiny product itself; those are written as one
    fused multiply and add.
    """
    inputs, out = spec.split("->")
    sizes = {
        axis: size
        for axes, x in zip(inputs.split(","), operands, strict=True)
        for axis, size in zip(axes, x.shape, strict=True)
    }
    order = out + "".join(sorted(set(sizes) - set(out)))
    if math.prod(sizes.values()) > TINY:
        return jnp.einsum(spec, *operands)
    product: Any = 1.0
    for axes, x in zip(inputs.split(","), operands, strict=True):
        placed = jnp.transpose(x, sorted(range(x.ndim), key=lambda i: order.index(axes[i])))
        product = product * placed.reshape([sizes[a] if a in axes else 1 for a in order])
    return jnp.sum(product, axis=tuple(range(len(out), len(order))))


def _outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """Σ over levels of x ⊗ y as one product: (a, b, J), (c, d, J) -> (a, b, c, d)."""
    J = x.shape[-1]
    return (x.reshape(-1, J) @ y.reshape(-1, J).T).reshape(*x.shape[:-1], *y.shape[:-1])


def _sigmas(layout: Layout, theta: jax.Array, units: Any) -> list[jax.Array]:
    """Σ = ΛΛ' per factor, chain first."""
    lams = lk.factors(layout, theta, units)
    blocks = [lk.factor_lambda(terms, lams) for terms, _, _ in (*layout.chain, *layout.core)]
    return [_contract("ij,kj->ik", b, b) for b in blocks]


def _sigma_derivatives(layout: Layout, theta: jax.Array, units: Any) -> list[jax.Array]:
    """∂Σ/∂θ per factor, (n_theta, S, S)."""
    slopes = jax.jacfwd(lambda t: _sigmas(layout, t, units))(theta)
    return [jnp.moveaxis(s, -1, 0) for s in slopes]


def _parameters(layout: Layout, terms: tuple[int, ...]) -> np.ndarray:
    """Positions in θ of the parameters of some terms."""
    pieces = layout.split(np.arange(layout.n_theta))
    return np.concatenate([pieces[k] for k in terms])


def _core_blocks(layout: Layout) -> list[tuple[slice, int, int]]:
    """(columns, J, S) of each factor of the core."""
    ends = np.cumsum([0, *(S * J for _, S, J in layout.core)])
    return [
        (slice(int(a), int(b)), J, S)
        for a, b, (_, S, J) in zip(ends[:-1], ends[1:], layout.core, strict=True)
    ]


def _core_sums(layout: Layout, matrix: jax.Array) -> list[jax.Array]:
    """Sum of the diagonal blocks of a (d, d) matrix by factor: (S, S) each."""
    out = []
    for columns, J, S in _core_blocks(layout):
        block = matrix[columns, columns].reshape(J, S, J, S)
        out.append(jnp.einsum("jajb->ab", block))
    return out


def _apply_core(layout: Layout, E: list[jax.Array], x: jax.Array) -> jax.Array:
    """E_k x for every k: (n_theta, d, m)."""
    parts = []
    for (columns, J, S), e in zip(_core_blocks(layout), E, strict=True):
        rows = jnp.einsum("kst,jtm->kjsm", e, x[columns].reshape(J, S, -1))
        parts.append(rows.reshape(e.shape[0], J * S, -1))
    return jnp.concatenate(parts, axis=1)


def _pair(blocks: list[jax.Array], E: list[jax.Array]) -> jax.Array:
    """Σ over factors of tr(block' E_k), (k,)."""
    terms = [_contract("ab,kab->k", b, e) for b, e in zip(blocks, E, strict=True)]
    return jnp.sum(jnp.stack(terms), axis=0)


def _s_dot(
    layout: Layout, k: Pieces, E: list[jax.Array], outer: jax.Array | None = None
) -> jax.Array:
    """Ṡ_k = T'E_k T, (n_theta, p + 1, p + 1); ``outer`` is Σ T ⊗ T of the chain, where known."""
    outer = _outer(k.T, k.T) if outer is None else outer
    chain = _contract("kab,ambn->kmn", E[0], outer)
    if not layout.core:
        return chain
    return chain + jnp.einsum("dm,kdn->kmn", k.T_core, _apply_core(layout, E[1:], k.T_core))


def _traces(
    layout: Layout, k: Pieces, E: list[jax.Array], C: jax.Array, four: jax.Array
) -> jax.Array:
    """2 tr(C T'E_k Ã E_l T) - tr(Ã E_k Ã E_l), (n_theta, n_theta)."""
    hessian = _double(four, E[0], E[0])
    if not layout.core:
        return hessian
    return hessian + _core_traces(layout, k, E, C)


def _double(four: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Σ four[d, a, b, c] x_k[a, b] y_l[c, d]: Σ tr(F x_k G y_l) where four = Σ F ⊗ G."""
    return _contract("dabc,kab,lcd->kl", four, x, y)


def _core_traces(layout: Layout, k: Pieces, E: list[jax.Array], C: jax.Array) -> jax.Array:
    """What the core adds to :func:`_traces`; a few (d, d) products per parameter of the chain."""
    mine = _parameters(layout, layout.chain[0][0])
    e = E[0][mine]
    IQK = jnp.eye(layout.d, dtype=C.dtype) - k.Q @ k.K
    A_cc = k.K @ IQK
    # chain with chain
    mixed = _outer(k.P.conjugate(k.Q), k.a)
    M = k.P.weigh(e)
    G = jnp.stack([k.P.transposed(lk.scale_rows(x.T, k.T)) for x in e])
    QM, QG = _left(k.Q, M), _left(k.Q, G)
    chain = _double(mixed, e, e)
    chain = chain + chain.T - jnp.einsum("kde,led->kl", QM, QM)
    chain = chain - 2 * jnp.einsum("mn,kdm,ldn->kl", C, G, QG)
    # chain with core
    ET = _apply_core(layout, E[1:], k.T_core)
    across = 2 * jnp.einsum("mn,kdm,ldn->kl", C, _left(IQK.T, G), ET)
    for i in range(len(mine)):
        across = across.at[i].add(-_pair(_core_sums(layout, IQK.T @ M[i] @ IQK), E[1:]))
    # core with core
    core = 2 * jnp.einsum("mn,kdm,ldn->kl", C, ET, _left(A_cc, ET))
    where = _core_blocks(layout)
    for (rows, J, S), x in zip(where, E[1:], strict=True):
        for (columns, other_J, other_S), y in zip(where, E[1:], strict=True):
            block = A_cc[rows, columns].reshape(J, S, other_J, other_S)
            core = core - _double(jnp.einsum("jaid,jbic->dabc", block, block), x, y)
    whole = core.at[jnp.ix_(mine, mine)].add(chain)
    return whole.at[mine].add(across).at[:, mine].add(across.T)


def closed_form(
    layout: Layout,
    method: str,
    theta: jax.Array,
    gram: Gram,
    rhs: Rhs,
    units: Any = (),
    order: int = 2,
    exact: bool = True,
) -> Derivatives:
    """The formulas of the module's header, for a layout with one factor in the chain.

    ``order=1`` leaves the curvature at zero; ``exact=False`` gives the average information.
    """
    few, F = ((), ()) if exact else _few(layout)
    k, E = _pieces(layout, theta, gram, rhs, units, F), _sigma_derivatives(layout, theta, units)
    p, reml = k.red.p, method == "REML"
    ratio = 1.0 / lk.profiled_sigma2(k.red, method)  # ν / r²
    C = ratio * jnp.outer(k.v, k.v)
    if reml:
        C = C.at[:p, :p].add(k.S_inv)
    C = jax.lax.optimization_barrier(C)
    sums = _level_sums(layout, k, C, gram, rhs)
    gamma = _gamma(layout, k, C, sums.gamma)
    value, gradient = lk.deviance(k.red, method), _pair(gamma, E)
    if order < 2:
        return value, gradient, jnp.zeros((len(theta), len(theta)), theta.dtype)

    def linear_in_sigma(t: jax.Array) -> jax.Array:
        return _pair(gamma, [s[None] for s in _sigmas(layout, t, units)])[0]

    hessian = jax.hessian(linear_in_sigma)(theta)
    if exact:
        traces = _traces(layout, k, E, C, sums.four)
        curvature = _curvature(layout, k, E, traces, ratio, reml, sums)
    else:
        curvature = _average(layout, k, E, ratio)
    if len(few):
        rows = np.isin(np.arange(len(theta)), few)
        traces = _few_traces(layout, k, E, C, rows)
        known = _curvature(layout, k, E, traces, ratio, reml, sums)
        curvature = jnp.where(rows | rows[:, None], known, curvature)
    hessian = hessian + curvature
    return value, gradient, 0.5 * (hessian + hessian.T)


def _few(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Parameters, and columns of the core's Z, of the core's small factors."""
    of, columns = [np.zeros(0, int)], [np.zeros(0, int)]
    for (at, J, S), (terms, _, _) in zip(_core_blocks(layout), layout.core, strict=True):
        if J * S <= FEW_COLUMNS:
            of.append(_parameters(layout, terms))
            columns.append(np.arange(at.start, at.stop))
    return np.concatenate(of), np.concatenate(columns)


def _few_traces(
    layout: Layout, k: Pieces, E: list[jax.Array], C: jax.Array, rows: np.ndarray
) -> jax.Array:
    """The entries of :func:`_traces` in ``rows``, a mask of θ, or such columns; 0 elsewhere."""
    applied = _apply_core(layout, E[1:], k.X_core)
    U = _contract("kab,ambn->kmn", E[0], _outer(k.X, k.X))
    U = U + jnp.einsum("dm,kdn->kmn", k.X_core, applied)
    V = _contract("kab,ambn->kmn", E[0], _outer(k.T, k.X))
    V = jnp.einsum("im,kmn->kin", C, V + jnp.einsum("dm,kdn->kmn", k.T_core, applied))
    out, start = jnp.zeros((len(rows), len(rows)), C.dtype), 0
    for (at, J, S), e in zip(_core_blocks(layout), E[1:], strict=True):
        if J * S > FEW_COLUMNS:
            continue
        mine = slice(start, start + J * S)
        u = U[:, mine, mine].reshape(-1, J, S, J, S)
        v = V[:, :, mine].reshape(len(rows), -1, J, S)
        t = k.T_core[at].reshape(J, S, -1)
        both = 2 * jnp.einsum("kija,jbi->kab", v, t) - jnp.einsum("kjajb->kab", u)
        out = out + jnp.einsum("kab,lab->kl", both, e)
        start += J * S
    return jnp.where(rows, out, out.T)


def _curvature(
    layout: Layout,
    k: Pieces,
    E: list[jax.Array],
    traces: jax.Array,
    ratio: jax.Array,
    reml: bool,
    sums: LevelSums,
) -> jax.Array:
    """The Hessian less its term in ∂²Σ."""
    p, S_dot = k.red.p, _s_dot(layout, k, E, sums.outer)
    S_v = _contract("kmn,n->km", S_dot, k.v)
    along = _contract("km,m->k", S_v, k.v)
    shared = _contract("ki,ij,lj->kl", S_v[:, :p], k.S_inv, S_v[:, :p])
    hessian = traces - 2 * ratio * shared
    hessian = hessian - ratio / k.red.r2 * jnp.outer(along, along)
    if reml:
        MS = _contract("ij,kjm->kim", k.S_inv, S_dot[:, :p, :p])
        hessian = hessian - _contract("kij,lji->kl", MS, MS)
    return hessian


def _average(layout: Layout, k: Pieces, E: list[jax.Array], ratio: jax.Array) -> jax.Array:
    """The average information less its term in ∂²Σ: a few products with vectors a parameter."""
    p = k.red.p
    t = jnp.sum(k.T * k.v[None, :, None], axis=1)  # (S, J)
    w = jnp.einsum("kab,bj->akj", E[0], t)
    t_core = k.T_core @ k.v
    w_core = _apply_core(layout, E[1:], t_core[:, None])[..., 0].T  # (d, n_theta)
    # w'Ãw = w₁'aw₁ + 2 u'w_c + w_c'Kw_c - (u + Kw_c)'Q(u + Kw_c),  u = Σ_i P_i'w_i
    u, Kw = k.P.transposed(w), k.K @ w_core
    both = u + Kw
    q = jnp.einsum("akj,alj->kl", w, lk.matvec(k.a, w)) + u.T @ w_core + w_core.T @ both
    q = q - both.T @ (k.Q @ both)
    S_v = jnp.einsum("amj,akj->km", k.T, w) + w_core.T @ k.T_core
    along = S_v @ k.v
    q = q - S_v[:, :p] @ k.S_inv @ S_v[:, :p].T
    return ratio * q - ratio / k.red.r2 * jnp.outer(along, along)


def _gamma(
    layout: Layout, k: Pieces, C: jax.Array, chain: jax.Array | None = None
) -> list[jax.Array]:
    """Sums of the diagonal blocks of Γ = Ã - T C T' per factor, (S, S) each.

    ``chain`` is Σ a - T C T' of the chain, where known.
    """
    if chain is None:
        chain = jnp.sum(k.every_a - _conjugate(C, k.T), axis=-1)
    if not layout.core:
        return [chain]
    chain = chain - k.P.conjugate_sum(k.Q)
    data = [
        jnp.einsum("jam,mn,jbn->ab", t, C, t)
        for t in (k.T_core[at].reshape(J, S, -1) for at, J, S in _core_blocks(layout))
    ]
    return [chain, *(a - b for a, b in zip(_core_gamma(layout, k), data, strict=True))]


def _core_gamma(layout: Layout, k: Pieces) -> list[jax.Array]:
    """Sums of the diagonal blocks of Ã_cc = K - KQK per factor.

    From Ã_cc Σ_c = K Q by elementwise products where Λ is far from singular, which spares a product
    of (d, d) matrices.
    """
    lams = k.lams[1:]

    def directly() -> list[jax.Array]:
        return _core_sums(layout, k.K - k.K @ k.Q @ k.K)

    def sums() -> list[jax.Array]:
        if all(S == 1 for _, _, S in _core_blocks(layout)):  # without copies of parts of K and Q
            each = jnp.sum(k.K * k.Q, axis=1)
            return [jnp.sum(each[at])[None, None] for at, _, _ in _core_blocks(layout)]
        blocks = []
        for at, J, S in _core_blocks(layout):
            x, y = k.K[at].reshape(J, S, -1), k.Q[at].reshape(J, S, -1)
            rows = [[jnp.sum(x[:, a] * y[:, b]) for b in range(S)] for a in range(S)]
            blocks.append(jnp.array(rows))
        return blocks

    def one_sided() -> list[jax.Array]:
        out = []
        for block, lam in zip(sums(), lams, strict=True):
            half = jnp.linalg.solve(lam, block.T)
            out.append(jnp.linalg.solve(lam.T, half).T)
        return out

    if layout.d < LARGE_CORE:
        return directly()
    pivots = [jnp.abs(jnp.diagonal(jnp.linalg.qr(lam)[1])) for lam in lams]
    regular = [(jnp.min(x) > 1e-3) & (jnp.min(x) > 0.03 * jnp.max(x)) for x in pivots]
    return jax.lax.cond(jnp.all(jnp.stack(regular)), one_sided, directly)


def vcov_and_derivative(
    layout: Layout, method: str, theta: jax.Array, gram: Gram, rhs: Rhs
) -> tuple[jax.Array, jax.Array]:
    """Cov(β̂)(θ) with σ profiled, (p, p), and its derivatives in θ, (p, p, n_theta)."""
    if not has_closed_form(layout):

        def vcov(t: jax.Array) -> jax.Array:
            red = lk.reduce(layout, t, gram, rhs)
            return lk.profiled_sigma2(red, method) * lk.unscaled_vcov(red)

        return vcov(theta), jax.jacfwd(vcov)(theta)
    k = _pieces(layout, theta, gram, rhs, ())
    p, s2 = k.red.p, lk.profiled_sigma2(k.red, method)
    S_dot = jnp.moveaxis(_s_dot(layout, k, _sigma_derivatives(layout, theta, ())), 0, -1)
    slope = -jnp.einsum("m,mnk,n->k", k.v, S_dot, k.v) / lk.residual_df(k.red, method)
    dM = jnp.einsum("ia,abk,bj->ijk", k.S_inv, S_dot[:p, :p], k.S_inv)
    return s2 * k.S_inv, k.S_inv[..., None] * slope + s2 * dM

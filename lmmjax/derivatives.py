r"""Value, gradient and Hessian of the profiled criterion.

With one grouping factor the derivatives have closed forms in the small matrices of each level; they
cost a fraction of automatic differentiation to compile and to run. All other layouts, and every
derivative beyond the second, are differentiated automatically. The two are equal to rounding, and
the tests hold one against the other.

Per level i (index dropped), with Σ = ΛΛ', V = R + ZΣZ':

    Ã = Z'V⁻¹Z,   R = Z'V⁻¹[X y],   S = [X y]'V⁻¹[X y]
    v = (-β̂, 1),  C = (ν/r²) v v' + (REML) S_x⁻¹ ⊕ 0,   H = R C R',   E_k = ∂Σ/∂θ_k

    gradient_k  = tr(Γ E_k),   Γ = Σ_i (Ã - H)
    Hessian_kl  = Σ_i tr((2H - Ã) E_k Ã E_l) + tr(Γ ∂²Σ/∂θ_k∂θ_l)
                  - 2 (ν/r²) (Ṡ_k v)_x' S_x⁻¹ (Ṡ_l v)_x - (ν/r⁴) (v'Ṡ_k v)(v'Ṡ_l v)
                  - (REML) tr(S_x⁻¹ Ṡ_k,x S_x⁻¹ Ṡ_l,x),      Ṡ_k = Σ_i R'E_k R

from ∂Ã = -Ã E Ã, ∂R = -Ã E R and ∂S = -Ṡ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmmjax import likelihood as lk
from lmmjax.gram import Gram, Layout, Rhs

Derivatives = tuple[jax.Array, jax.Array, jax.Array]


def by_autodiff(f: Callable[[jax.Array], jax.Array], theta: jax.Array) -> Derivatives:
    """f, ∇f, ∇²f by automatic differentiation, f and ∇f evaluated once."""
    (value, gradient), push = jax.linearize(jax.value_and_grad(f), theta)
    _, hessian = jax.vmap(push)(jnp.eye(theta.shape[0], dtype=theta.dtype))
    return value, gradient, 0.5 * (hessian + hessian.T)


def has_closed_form(layout: Layout) -> bool:
    """One grouping factor, of few enough columns that S⁴ sums over the levels are cheap."""
    return len(layout.chain) == 1 and not layout.core and layout.chain[0][1] <= 8


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


class Pieces(NamedTuple):
    """What the closed forms need of one factor at θ."""

    red: lk.Reduction
    A: jax.Array  # Ã (S, S, J)
    RR: jax.Array  # Σ_i R R' by entries, (S, S, p + 1, p + 1)
    R: jax.Array  # (S, p + 1, J)
    v: jax.Array  # (-β̂, 1)
    M: jax.Array  # S_x⁻¹ (p, p)
    E: jax.Array  # ∂Σ/∂θ, (n_theta, S, S)


def sigma_of(layout: Layout, theta: jax.Array) -> jax.Array:
    """Σ = ΛΛ' of the one factor, all of its terms side by side."""
    lam = lk.factor_lambda(layout.chain[0][0], lk.factors(layout, theta))
    return lam @ lam.T


def pieces(layout: Layout, theta: jax.Array, gram: Gram, rhs: Rhs) -> Pieces:
    """Ã and R from the factorisation: U⁻'Λ'[A B] gives A - (·)'(·) without an inverse."""
    red = lk.reduce(layout, theta, gram, rhs)
    f, lam = red.factorised, red.factorised.lams[0]
    W_A = lk.forward_substitute(f.U[0], jnp.einsum("st,suj->tuj", lam, gram.own[0]))
    W_B = jnp.concatenate([f.border[0], red.row.chain[0][:, None]], axis=1)
    B = jnp.concatenate([gram.border[0], rhs.border[0][:, None]], axis=1)
    A = gram.own[0] - jnp.einsum("kaj,kbj->abj", W_A, W_A)
    R = B - jnp.einsum("kaj,kmj->amj", W_A, W_B)
    v = jnp.append(-lk.fixef(red), 1.0).astype(theta.dtype)
    E = jnp.moveaxis(jax.jacfwd(lambda t: sigma_of(layout, t))(theta), -1, 0)
    RR = jnp.einsum("amj,bnj->abmn", R, R)
    return Pieces(red, A, RR, R, v, lk.unscaled_vcov(red), E)


def closed_form(
    layout: Layout, method: str, theta: jax.Array, gram: Gram, rhs: Rhs
) -> Derivatives:
    """The formulas of the module's header, for a layout with one factor."""
    k = pieces(layout, theta, gram, rhs)
    p, reml = k.red.p, method == "REML"
    ratio = 1.0 / lk.profiled_sigma2(k.red, method)  # ν / r²
    C = ratio * jnp.outer(k.v, k.v)
    if reml:
        C = C.at[:p, :p].add(k.M)
    H = jnp.einsum("amj,mn,bnj->abj", k.R, C, k.R)
    gamma = jnp.sum(k.A - H, axis=-1)
    gradient = jnp.einsum("ab,kab->k", gamma, k.E)
    inner = jnp.einsum("daj,bcj->abcd", 2 * H - k.A, k.A)
    hessian = jnp.einsum("abcd,kab,lcd->kl", inner, k.E, k.E)
    hessian = hessian + jax.hessian(lambda t: jnp.sum(gamma * sigma_of(layout, t)))(theta)
    S_dot = jnp.einsum("kab,abmn->kmn", k.E, k.RR)
    S_v = S_dot @ k.v
    along = S_v @ k.v
    hessian = hessian - 2 * ratio * S_v[:, :p] @ k.M @ S_v[:, :p].T
    hessian = hessian - ratio / k.red.r2 * jnp.outer(along, along)
    if reml:
        MS = jnp.einsum("ij,kjm->kim", k.M, S_dot[:, :p, :p])
        hessian = hessian - jnp.einsum("kij,lji->kl", MS, MS)
    return lk.deviance(k.red, method), gradient, 0.5 * (hessian + hessian.T)


def vcov_and_derivative(
    layout: Layout, method: str, theta: jax.Array, gram: Gram, rhs: Rhs
) -> tuple[jax.Array, jax.Array]:
    """Cov(β̂)(θ) with σ profiled, (p, p), and its derivatives in θ, (p, p, n_theta)."""
    if not has_closed_form(layout):

        def vcov(t: jax.Array) -> jax.Array:
            red = lk.reduce(layout, t, gram, rhs)
            return lk.profiled_sigma2(red, method) * lk.unscaled_vcov(red)

        return vcov(theta), jax.jacfwd(vcov)(theta)
    k = pieces(layout, theta, gram, rhs)
    p, s2 = k.red.p, lk.profiled_sigma2(k.red, method)
    S_dot = jnp.einsum("kab,abmn->mnk", k.E, k.RR)
    slope = -jnp.einsum("m,mnk,n->k", k.v, S_dot, k.v) / lk.residual_df(k.red, method)
    dM = jnp.einsum("ia,abk,bj->ijk", k.M, S_dot[:p, :p], k.M)
    return s2 * k.M, k.M[..., None] * slope + s2 * dM

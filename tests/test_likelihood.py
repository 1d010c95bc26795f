"""The likelihood against dense matrices, and the identities that any correct one obeys."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from designs import dense, design, factor_codes, layouts, problem, random_theta

import lmmjax as lmm
from lmmjax import buckets, cross, crowded, derivatives, estimate, gram, optimize, start
from lmmjax import likelihood as lk
from lmmjax.precision import float64
from lmmjax.residual import program
from lmmjax.residual.source import Patterns, Rows

LAYOUTS = layouts()
METHODS = ("ML", "REML")


@pytest.fixture(autouse=True)
def _x64():
    with float64():
        yield


def criterion(d: Any, theta: np.ndarray, method: str, sigma: float | None = None) -> float:
    """-2 log-likelihood in the units of the data, for θ in the units of the data."""
    plan, units, g, rhs = problem(d)
    undo = [np.linalg.inv(B) for B in units.B]
    red = lk.reduce(plan.layout, jnp.asarray(theta), g, rhs, undo)
    s2 = None if sigma is None else jnp.asarray((sigma / units.scale) ** 2)
    return float(lk.deviance(red, method, s2)) + units.constant(method)


def data_factors(d: Any, theta: np.ndarray) -> list[np.ndarray]:
    plan = gram.plan(d, 0)
    return [np.asarray(a) for a in lk.factors(plan.layout, jnp.asarray(theta))]


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_blocked_equals_dense(name: str, p: int) -> None:
    d = design(LAYOUTS[name], 120, p)
    theta = random_theta(d)
    expected = dense(d, data_factors(d, theta))
    for method in METHODS:
        assert criterion(d, theta, method) == pytest.approx(expected[method], rel=1e-11, abs=1e-9)


@pytest.mark.parametrize("name", ["slope", "nested and crossed"])
def test_given_sigma_equals_dense(name: str) -> None:
    d = design(LAYOUTS[name], 120, 2)
    theta = random_theta(d)
    expected = dense(d, data_factors(d, theta), sigma=2.5)
    for method in METHODS:
        assert criterion(d, theta, method, 2.5) == pytest.approx(expected[method], rel=1e-11)


def test_without_fixed_effects() -> None:
    d = design(LAYOUTS["crossed slopes"], 120, 2)
    d.X, d.p = np.zeros((120, 0)), 0
    theta = random_theta(d)
    expected = dense(d, data_factors(d, theta))
    assert criterion(d, theta, "ML") == pytest.approx(expected["ML"], rel=1e-11)
    assert criterion(d, theta, "REML") == criterion(d, theta, "ML")


@pytest.mark.parametrize("name", [k for k in LAYOUTS if k != "linear model"])
def test_effects_equal_dense(name: str) -> None:
    d = design(LAYOUTS[name], 120, 2)
    plan, units, g, rhs = problem(d)
    theta_s = jnp.asarray(random_theta(d))
    lams = [
        B @ np.asarray(a) for B, a in zip(units.B, lk.factors(plan.layout, theta_s), strict=True)
    ]
    expected = dense(d, lams)
    red = lk.reduce(plan.layout, theta_s, g, rhs)
    beta = units.beta0 + units.scale * units.A @ np.asarray(lk.fixef(red))
    np.testing.assert_allclose(beta, expected["beta"], rtol=1e-8, atol=1e-8)
    vcov = units.A @ np.asarray(lk.unscaled_vcov(red)) @ units.A.T
    np.testing.assert_allclose(vcov, expected["unscaled_vcov"], rtol=1e-6, atol=1e-12)
    b, cov = estimate.effects(plan.layout, g, rhs, theta_s)
    for factor, b_f, cov_f in zip(plan.factors, b, cov, strict=True):
        at = 0
        for k in factor.terms:
            B, S = units.B[k], d.terms[k].z.shape[1]
            mine = units.scale * np.asarray(b_f)[at : at + S].T @ B.T
            np.testing.assert_allclose(mine, expected["ranef"][k], atol=1e-8)
            block = np.moveaxis(np.asarray(cov_f)[at : at + S, at : at + S], -1, 0)
            np.testing.assert_allclose(B @ block @ B.T, expected["ranef_cov"][k], atol=1e-8)
            at += S


@pytest.mark.parametrize("name", ["slope", "nested and crossed"])
def test_prediction_variance_equals_dense(name: str) -> None:
    d = design(LAYOUTS[name], 120, 2)
    plan, units, g, _ = problem(d)
    theta_s = jnp.asarray(random_theta(d))
    lams = [
        B @ np.asarray(a) for B, a in zip(units.B, lk.factors(plan.layout, theta_s), strict=True)
    ]
    Z, G = (dense(d, lams)[k] for k in ("Z", "G"))
    W, XZ = np.diag(d.weights), np.hstack([d.X, Z])
    C = XZ.T @ W @ XZ
    C[d.p :, d.p :] += np.linalg.inv(G)
    expected = np.einsum("ij,ij->i", XZ, np.linalg.solve(C, XZ.T).T)[:7]
    one = SimpleNamespace(
        X=d.X[:7],
        terms=tuple((t.z[:7], t.codes[:7], t.levels[t.codes[:7]]) for t in d.terms),
    )
    from lmmjax.predict import _rows

    fit = SimpleNamespace(model=SimpleNamespace(_plan=plan, _units=units))
    rows = _rows(fit, one, slice(0, 7))
    got = estimate.unscaled_prediction_variance(plan.layout, theta_s, g, rows)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


# -- identities --------------------------------------------------------------------------------


def moved(d: Any, **changes: Any) -> Any:
    return SimpleNamespace(**{**vars(d), **changes})


@pytest.fixture(scope="module")
def example() -> Any:
    return design(LAYOUTS["nested and crossed"], 120, 3)


def test_row_order_does_not_matter(example: Any) -> None:
    order = np.random.default_rng(3).permutation(120)
    terms = tuple(
        SimpleNamespace(**{**vars(t), "z": t.z[order], "codes": t.codes[order]})
        for t in example.terms
    )
    shuffled = moved(
        example,
        X=example.X[order],
        y=example.y[order],
        offset=example.offset[order],
        weights=example.weights[order],
        terms=terms,
    )
    theta = random_theta(example)
    for method in METHODS:
        same = criterion(shuffled, theta, method)
        assert same == pytest.approx(criterion(example, theta, method), rel=1e-12)


def test_labels_of_levels_do_not_matter(example: Any) -> None:
    rng = np.random.default_rng(4)
    terms = []
    for t in example.terms:
        new = rng.permutation(len(t.levels)).astype(np.int32)
        terms.append(SimpleNamespace(**{**vars(t), "codes": new[t.codes]}))
    theta = random_theta(example)
    relabelled = criterion(moved(example, terms=tuple(terms)), theta, "REML")
    assert relabelled == pytest.approx(criterion(example, theta, "REML"), rel=1e-12)


def test_sign_of_a_column_does_not_matter(example: Any) -> None:
    t = example.terms[0]
    flipped = SimpleNamespace(**{**vars(t), "z": t.z * np.array([1.0, -1.0])})
    theta = random_theta(example)
    mirrored = theta.copy()
    mirrored[1] *= -1  # Λ with the second row's sign changed
    mirrored[2] *= -1
    a = criterion(example, theta, "REML")
    b = criterion(moved(example, terms=(flipped, *example.terms[1:])), mirrored, "REML")
    assert a == pytest.approx(b, rel=1e-11)


def test_adding_fixed_effects_to_y_does_not_matter(example: Any) -> None:
    theta = random_theta(example)
    shifted = moved(example, y=example.y + example.X @ np.array([3.0, -0.2, 0.1]))
    for method in METHODS:
        assert criterion(shifted, theta, method) == pytest.approx(
            criterion(example, theta, method), rel=1e-10
        )


@pytest.mark.parametrize("c", [1e-6, 3.0, 1e6])
def test_scale_of_y_adds_its_jacobian(example: Any, c: float) -> None:
    theta = random_theta(example)
    scaled = moved(example, y=c * example.y, offset=c * example.offset)
    for method, nu in (("ML", 120), ("REML", 117)):
        difference = criterion(scaled, theta, method) - criterion(example, theta, method)
        assert difference == pytest.approx(2 * nu * np.log(c), rel=1e-11)


def test_basis_of_X_adds_its_jacobian_to_reml(example: Any) -> None:
    theta = random_theta(example)
    T = np.array([[1.0, 0.2, 0.0], [0.0, 2.0, 0.3], [0.0, 0.0, 0.5]])
    other = moved(example, X=example.X @ T)
    assert criterion(other, theta, "ML") == pytest.approx(criterion(example, theta, "ML"), rel=1e-9)
    difference = criterion(other, theta, "REML") - criterion(example, theta, "REML")
    assert difference == pytest.approx(2 * np.linalg.slogdet(T)[1], abs=1e-6)


@pytest.mark.parametrize("shift", [2000.0, 1e8])
def test_years_and_huge_offsets_cost_no_digits(shift: float) -> None:
    base = design(LAYOUTS["slope"], 120, 2)
    # numbers that stay exact under the shift, so that the data themselves lose nothing
    x, z = (np.round(a[:, 1] * 64) / 64 for a in (base.X, base.terms[0].z))
    lam = np.array([[0.7, 0.0], [0.3, 0.4]])

    def value(by: float) -> float:
        term = SimpleNamespace(**vars(base.terms[0]))
        term.z = np.column_stack([np.ones(120), z + by])
        d = moved(base, X=np.column_stack([np.ones(120), x + by]), terms=(term,))
        plan, units, g, rhs = problem(d)
        # the covariance about the same origin: b_intercept moves by -shift * b_slope
        origin = np.linalg.inv(units.B[0]) @ np.array([[1.0, -by], [0.0, 1.0]])
        red = lk.reduce_factors(plan.layout, [jnp.asarray(origin @ lam)], g, rhs)
        return float(lk.deviance(red, "REML"))

    assert value(shift) == pytest.approx(value(0.0), rel=1e-12)


def test_crossproducts_add_over_rows(example: Any) -> None:
    plan, standardised = gram.plan(example, 0), gram.standardise(example)
    whole = gram.crossproducts(example, plan, standardised)

    def part(rows: slice) -> Any:
        terms = tuple(
            SimpleNamespace(**{**vars(t), "z": t.z[rows], "codes": t.codes[rows]})
            for t in example.terms
        )
        d = moved(example, terms=terms, weights=example.weights[rows])
        z = tuple(a[rows] for a in standardised.Z)
        s = gram.Standardised(standardised.X[rows], standardised.y[rows], z, standardised.units)
        return gram.crossproducts(d, plan, s, whole[0].parent)

    first, second = part(slice(0, 50)), part(slice(50, 120))
    for name in ("own", "up", "border", "core", "n", "logdet_R"):
        a, b, c = (jax.tree.leaves(getattr(g[0], name)) for g in (first, second, whole))
        for x, y, z in zip(a, b, c, strict=True):
            np.testing.assert_allclose(x + y, z, rtol=1e-12, atol=1e-10)
    summed = jax.tree.map(np.add, first[1], second[1])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), summed, whole[1])


@pytest.mark.parametrize("name", ["slope", "compound symmetry", "nested and crossed"])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_equals_finite_differences(name: str, method: str) -> None:
    d = design(LAYOUTS[name], 120, 2)
    plan, _, g, rhs = problem(d)

    def f(t: jax.Array) -> jax.Array:
        return estimate.criterion(plan.layout, method, t, g, rhs)

    theta, h = jnp.asarray(random_theta(d)), 1e-5
    slope = jax.jit(jax.grad(f))(theta)
    value = jax.jit(f)
    numeric = [(value(theta + h * e) - value(theta - h * e)) / (2 * h) for e in np.eye(len(theta))]
    np.testing.assert_allclose(slope, numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [k for k in LAYOUTS if k != "linear model"])
def test_closed_forms_equal_autodiff(name: str) -> None:
    d = design(LAYOUTS[name], 120, 3)
    plan, _, g, rhs = problem(d, dense=32)
    layout, theta = plan.layout, jnp.asarray(random_theta(d))
    assert derivatives.has_closed_form(layout)
    method = METHODS[len(name) % 2]

    def f(t: jax.Array) -> jax.Array:
        # the plain value: estimate.criterion has the closed forms as its rules
        return lk.deviance(lk.reduce(layout, t, g, rhs), method)

    def vcov(t: jax.Array) -> jax.Array:
        red = lk.reduce(layout, t, g, rhs)
        return lk.profiled_sigma2(red, method) * lk.unscaled_vcov(red)

    def ours(t: jax.Array) -> Any:
        slope = derivatives.vcov_and_derivative(layout, method, t, g, rhs)[1]
        return *derivatives.closed_form(layout, method, t, g, rhs), slope

    def automatic(t: jax.Array) -> Any:
        return *derivatives.by_autodiff(f, t), jax.jacfwd(vcov)(t)

    for a, b in zip(jax.jit(ours)(theta), jax.jit(automatic)(theta), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


def sparse_problem(name: str) -> tuple[Any, Any, Any]:
    """A crossed design with its products kept by entry, however little that pays here."""
    d = design(LAYOUTS[name], 120, 3)
    plan = gram.plan(d, dense=32)
    layout = dataclasses.replace(plan.layout, sparse=True)
    plan = dataclasses.replace(plan, layout=layout)
    return layout, *gram.crossproducts(d, plan, gram.standardise(d))


CROSSED = ["crossed", "crossed slopes", "two in the core"]


@pytest.mark.parametrize("name", CROSSED)
def test_sparse_layout_equals_the_dense_one(name: str) -> None:
    d = design(LAYOUTS[name], 120, 3)
    plan, _, g, rhs = problem(d, dense=32)
    layout, g_sparse, rhs_sparse = sparse_problem(name)
    assert g_sparse.cross is not None
    assert g_sparse.border[0].shape[1] == 3
    theta, method = jnp.asarray(random_theta(d)), METHODS[len(name) % 2]

    def everything(layout: Any, g: Any, rhs: Any) -> Any:
        return (
            derivatives.closed_form(layout, method, theta, g, rhs),
            derivatives.vcov_and_derivative(layout, method, theta, g, rhs),
            estimate.effects(layout, g, rhs, theta),
        )

    dense_way = jax.jit(everything, static_argnums=0)(plan.layout, g, rhs)
    sparse_way = jax.jit(everything, static_argnums=0)(layout, g_sparse, rhs_sparse)
    for a, b in zip(jax.tree.leaves(sparse_way), jax.tree.leaves(dense_way), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


def test_reduction_with_closed_form_derivatives() -> None:
    layout, g, rhs = sparse_problem("crossed")
    theta = jnp.asarray(random_theta(design(LAYOUTS["crossed"], 120, 3)))

    def at(reduce: Any) -> Any:
        def f(t: jax.Array, log_sigma: jax.Array) -> jax.Array:
            red = reduce(layout, t, g, rhs)
            beta = lk.fixef(red)
            return lk.deviance(red, "REML", jnp.exp(2 * log_sigma)) + beta @ beta

        slope = jax.value_and_grad(f, (0, 1))
        return jax.jvp(slope, (theta, 0.3), (jnp.ones_like(theta), 1.0))

    ours, plain = (jax.jit(lambda r=r: at(r))() for r in (derivatives.reduce, lk.reduce))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


def test_large_core_is_fitted_by_average_information(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, g, rhs = sparse_problem("crossed")
    exact, _ = estimate.optimise(layout, "REML", g, rhs, estimate.start(layout))
    monkeypatch.setattr(derivatives, "LARGE_CORE", 1)
    assert derivatives.is_approximate(layout)
    theta = jnp.asarray(np.random.default_rng(1).normal(size=layout.n_theta))

    def average(t: jax.Array) -> Any:
        return derivatives.for_optimiser(layout, "REML", t, g, rhs)

    value, gradient, _ = jax.jit(average)(theta)
    expected = jax.jit(
        jax.value_and_grad(lambda t: derivatives.profiled(layout, "REML", t, g, rhs))
    )
    np.testing.assert_allclose(value, expected(theta)[0], rtol=1e-12)
    np.testing.assert_allclose(gradient, expected(theta)[1], rtol=1e-9, atol=1e-9)
    best = optimize.newton(average, jnp.asarray(estimate.start(layout)))
    assert int(best.status) == optimize.CONVERGED
    assert float(best.value) == pytest.approx(float(exact.value), abs=1e-7)


@pytest.mark.parametrize(("name", "few"), [("two in the core", 5), ("crossed slopes", 12)])
def test_small_factors_of_a_large_core_have_an_exact_curvature(
    name: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rows are those of the Hessian, the others are not; the gradient is automatic's."""
    layout, g, rhs = sparse_problem(name)
    monkeypatch.setattr(derivatives, "LARGE_CORE", 1)
    monkeypatch.setattr(derivatives, "FEW_COLUMNS", few)
    exact = {layout.structures[k].S * J <= few for (k,), _, J in layout.core}
    assert exact == ({True, False} if name == "two in the core" else {True})
    rng = np.random.default_rng(4)
    theta = jnp.asarray(estimate.start(layout) + 0.3 * rng.normal(size=layout.n_theta))

    def both(t: jax.Array) -> Any:
        return (
            derivatives.for_optimiser(layout, "REML", t, g, rhs),
            derivatives.closed_form(layout, "REML", t, g, rhs)[2],
            jax.grad(lambda s: lk.deviance(lk.reduce(layout, s, g, rhs), "REML"))(t),
        )

    (_, gradient, mixed), hessian, automatic = jax.jit(both)(theta)
    np.testing.assert_allclose(gradient, automatic, rtol=1e-9, atol=1e-9)
    rows = np.concatenate(
        [derivatives._parameters(layout, t) for t, S, J in layout.core if S * J <= few]
    )
    np.testing.assert_allclose(mixed[rows], hessian[rows], rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(mixed, mixed.T, rtol=1e-12)
    rest = np.setdiff1d(np.arange(layout.n_theta), rows)
    assert np.max(np.abs((mixed - hessian)[np.ix_(rest, rest)])) > 1e-3


def test_exact_curvature_of_small_factors_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, g, rhs = sparse_problem("two in the core")
    monkeypatch.setattr(derivatives, "LARGE_CORE", 1)
    monkeypatch.setattr(derivatives, "FEW_COLUMNS", 5)
    theta = jnp.asarray(estimate.start(layout))

    def single(a: Any) -> Any:
        return a.astype(np.float32) if a.dtype == np.float64 else a

    at = functools.partial(jax.jit(derivatives.for_optimiser, static_argnums=(0, 1)), layout, "ML")
    expected = at(theta, g, rhs)
    found = at(*jax.tree.map(single, (theta, g, rhs)))
    for low, high in zip(found, expected, strict=True):
        assert low.dtype == jnp.float32
        np.testing.assert_allclose(low, high, rtol=1e-4, atol=1e-4 * np.abs(high).max())


def test_a_large_core_is_fitted_in_float32() -> None:
    """150 columns of the core and more, one factor of few levels: average and exact curvature."""
    rng = np.random.default_rng(0)
    n, sizes = 3000, {"s": 300, "d": 150, "t": 6}
    data = pd.DataFrame({k: rng.integers(0, J, n) for k, J in sizes.items()})
    data["x"] = rng.normal(size=n)
    data["y"] = data.x + rng.normal(size=n)
    data["y"] += np.sum([rng.normal(size=J)[data[k]] for k, J in sizes.items()], axis=0)
    formula = "y ~ x + (1 | s) + (1 | d) + (1 | t)"
    high = lmm.Model(formula, data).fit(method="ML")
    low = lmm.Model(formula, data, dtype="float32").fit(method="ML")
    assert derivatives.is_approximate(high.model._plan.layout)
    assert low.converged, low.message
    assert low.loglik == pytest.approx(high.loglik, rel=1e-6)
    np.testing.assert_allclose(low.theta, high.theta, rtol=1e-3)
    np.testing.assert_allclose(low.beta, high.beta, rtol=1e-3)


@pytest.mark.parametrize("popular", [None, 0, 4, 9])
@pytest.mark.parametrize("most", [1, 3, 9])
def test_products_by_entry_equal_dense_ones(
    most: int, popular: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of entries a level has; with the padding of buckets, too."""
    if popular is not None:  # pairs are not kept
        monkeypatch.setattr(cross, "MOST_PAIRS", 0)
        monkeypatch.setattr(crowded, "CHUNK", 16)
        monkeypatch.setattr(crowded, "_popular", lambda *_: popular)
    rng = np.random.default_rng(most)
    S, J, d, p = 2, 40, 9, 2
    there = rng.random((J, d)).argsort(axis=1) < rng.integers(0, most + 1, J)[:, None]
    level, column = np.nonzero(there)
    B = rng.normal(size=(S, J, d)) * there
    lists = cross.from_entries(level, column, B[:, level, column], J, d)
    assert isinstance(lists.pairs, cross.Pairs) == (popular is None)
    lists = buckets._pad_cross(lists, d, d)
    G, Q = rng.normal(size=(S, S, J)), rng.normal(size=(d, d))
    G, Q = jnp.asarray(G + G.swapaxes(0, 1)), jnp.asarray(Q + Q.T)
    core = rng.normal(size=(d + p, d + p))
    core = jnp.asarray(core + core.T)
    beside = jnp.asarray(rng.normal(size=(d + p, p)))
    x, v = jnp.asarray(rng.normal(size=(S, 3, J))), jnp.asarray(rng.normal(size=(d, 3)))
    products = np.einsum("sjd,stj,tje->de", B, G, B)
    close = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(cross.conjugate_levels(lists, G, d), products, **close)
    whole = np.block([[products, beside[:d]], [beside[:d].T, beside[d:]]])
    np.testing.assert_allclose(cross.subtract_levels(lists, G, beside, core), core - whole, **close)
    expected = np.einsum("sjd,de,tje->stj", B, Q, B)
    np.testing.assert_allclose(cross.conjugate_core(lists, Q, J), expected, **close)
    np.testing.assert_allclose(cross.to_core(lists, x, d), np.einsum("sjd,skj->dk", B, x), **close)
    np.testing.assert_allclose(
        cross.from_core(lists, v, J), np.einsum("sjd,dk->skj", B, v), **close
    )


def test_rows_of_pairs_leave_few_places_empty() -> None:
    for sizes in ([1] * 50, [3] * 50, [300] * 5, [0, 2, 40, 1]):
        pairs = np.repeat(np.arange(len(sizes)), sizes)
        level, place, (rows, length) = cross._rows(np.flip(pairs), len(sizes))
        assert len(np.unique(place)) == len(pairs)
        assert np.array_equal(level[place // length], np.flip(pairs))
        assert rows * length <= max(cross.SLACK * len(pairs), len(pairs))
    assert length > 1


def test_last_step_with_an_approximate_hessian() -> None:
    """A Hessian 0.1 % off: the step from a promise of 1e-7 is the last, as the rate shows."""
    centre = jnp.asarray([0.3, -0.2])

    scale = jnp.asarray([4e4, 1e3])

    def derivatives_at(t: jax.Array) -> Any:
        value = 1e5 + 0.5 * scale @ (t - centre) ** 2
        return value, scale * (t - centre), 1.001 * jnp.diag(scale)

    found = {
        how: jax.jit(lambda t, how=how: optimize.newton(derivatives_at, t, approximate=how))
        for how in (False, True)
    }
    away, near = centre + jnp.asarray([0.002, -0.01]), centre + 2e-6
    strict, loose = found[False](away), found[True](away)
    assert int(loose.n_evals) < int(strict.n_evals)
    assert int(loose.status) == optimize.CONVERGED
    assert float(optimize.newton_decrement(loose.gradient, loose.hessian)[0]) < 1e-6
    np.testing.assert_allclose(loose.theta, centre, atol=1e-7)
    # without a step before it the rate is not known
    assert float(optimize.newton_decrement(*derivatives_at(near)[1:])[0]) < 1e-6
    assert int(found[True](near).n_evals) == 2


def _blurred(noise: float, f0: float) -> tuple[Any, jax.Array]:
    """A convex criterion of size f0 in float32, its gradient off by ``noise``, and its minimum."""
    centre, scale = jnp.asarray([0.3, -0.2], jnp.float32), jnp.asarray([4e2, 1e3], jnp.float32)

    def derivatives_at(t: jax.Array) -> Any:
        away = t - centre
        value = jnp.float32(f0) + 0.5 * scale @ away**2 + 10 * jnp.sum(away**4)
        wrong = noise * jnp.sqrt(scale) * jnp.cos(1e6 * t)
        hessian = jnp.diag(scale + 120 * away**2)
        return value, scale * away + 40 * away**3 + wrong, hessian

    return derivatives_at, centre


@pytest.mark.parametrize("f0", [0.0, 1e5, 1e8])
def test_below_the_rounding_of_the_criterion_the_gradient_judges(f0: float) -> None:
    """At 1e8 float32 tells values apart that differ by 8; θ gets as near as at 0."""
    at, centre = _blurred(0.0, f0)
    best = jax.jit(lambda t: optimize.newton(at, t))(centre + jnp.float32(0.3))
    assert int(best.status) == optimize.CONVERGED
    assert float(best.promised) < optimize.PROMISE["float32"]
    assert int(best.n_evals) < 8
    np.testing.assert_allclose(best.theta, centre, atol=1e-6)


def test_a_gradient_of_noise_ends_the_search_at_the_best_point() -> None:
    at, centre = _blurred(0.5, 1e6)
    best = jax.jit(lambda t: optimize.newton(at, t))(centre + jnp.float32(0.3))
    assert int(best.status) == optimize.FLAT_STOP
    assert optimize.PROMISE["float32"] < float(best.promised) < 2
    assert int(best.n_evals) < 20
    found = optimize.newton_decrement(*at(best.theta)[1:])[0]
    assert float(best.promised) == pytest.approx(float(found), rel=1e-4)
    assert np.abs(best.theta - centre).max() < 0.1


def test_inverse_by_halves() -> None:
    """Three blocks of at most 144 columns: what lies in two of them is computed once."""
    A = np.random.default_rng(0).normal(size=(430, 430))
    A = A @ A.T / 430 + np.eye(430)
    inverse = jax.jit(lk.inverse_from_cholesky)(jnp.linalg.cholesky(A))
    np.testing.assert_allclose(inverse @ A, np.eye(430), atol=1e-10)
    np.testing.assert_array_equal(np.tril(inverse, -144), np.triu(inverse, 144).T)


@pytest.mark.parametrize("d", [7, 23])
def test_symmetric_products_by_blocks(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lk, "BLOCK", 4)
    rng = np.random.default_rng(0)
    a, Q = jnp.asarray(rng.normal(size=(2, d, 9))), rng.normal(size=(d, d))
    Q = jnp.asarray(Q + Q.T)
    np.testing.assert_allclose(lk.self_products(a), lk.over_levels(a, a), rtol=1e-12, atol=1e-12)
    P = derivatives.DenseP(a)
    np.testing.assert_allclose(P.conjugate_sum(Q), P.conjugate(Q).sum(-1), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["intercept", "crossed"])
def test_rules_of_the_criterion_work_under_every_transformation(name: str) -> None:
    """Against the same value without rules: the derivatives in θ to the third, and in the data."""
    d = design(LAYOUTS[name], 120, 2)
    plan, _, g, rhs = problem(d, dense=32)
    layout, theta = plan.layout, jnp.asarray(random_theta(d))

    def ruled(t: jax.Array, r: Any) -> jax.Array:
        return derivatives.profiled(layout, "REML", t, g, r)

    def plain(t: jax.Array, r: Any) -> jax.Array:
        return lk.deviance(lk.reduce(layout, t, g, r), "REML")

    def all_of(f: Any) -> Any:
        third = jax.grad(jax.grad(jax.grad(lambda s: f(s * theta, rhs))))(1.0)
        in_data = jax.grad(f, argnums=1)(theta, rhs)
        mixed = jax.grad(lambda r: jnp.sum(jax.grad(f)(theta, r)))(rhs)
        many = jax.vmap(jax.grad(f), in_axes=(0, None))(jnp.stack([theta, -theta]), rhs)
        return third, in_data, mixed, many

    ours, expected = jax.jit(lambda: all_of(ruled))(), jax.jit(lambda: all_of(plain))()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", [*LAYOUTS])
def test_start_solves_the_moment_equations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MINQUE(0) against its definition by n x n matrices; entries taken four at a time."""
    monkeypatch.setattr(start, "ENTRIES", 4)
    d = design(LAYOUTS[name], 120, 2)
    d.weights, d.has_weights = np.ones(120), False
    plan, standardised = gram.plan(d, 32), gram.standardise(d)
    X, y = standardised.X, standardised.y
    P = np.eye(120) - X @ np.linalg.pinv(X)
    factors = []
    for factor in plan.factors:
        same = (c := d.terms[factor.terms[0]].codes)[:, None] == c
        factors.append((np.concatenate([standardised.Z[k] for k in factor.terms], axis=1), same))
    forms = start._forms(plan.layout)
    kernels = []
    for form in forms:
        Z, same = factors[form.factor]
        kernels.append(sum(np.outer(Z[:, s], Z[:, t]) * same for s, t in form.orders))
    kernels.append(np.eye(120))
    system = [[np.trace(P @ a @ P @ b) for b in kernels] for a in kernels]
    determined = np.linalg.cond(system) < 1e12
    if determined:
        expected = np.linalg.solve(system, [y @ P @ a @ P @ y for a in kernels])
    for sparse in {False, bool(plan.layout.core)}:
        layout = dataclasses.replace(plan.layout, sparse=sparse)
        the_plan = dataclasses.replace(plan, layout=layout)
        the_gram, rhs = gram.crossproducts(d, the_plan, standardised)
        many = jax.tree.map(lambda a: np.stack([a, 2.0 * a]), rhs)._replace(
            yy=np.array([1.0, 4.0]) * rhs.yy
        )
        _, found = start._covariances(layout, the_gram, many)
        assert (found is not None) == determined
        for row in () if found is None else found:
            np.testing.assert_allclose(row, expected[:-1] / expected[-1], rtol=1e-8)


def test_start_of_balanced_data_is_the_estimate() -> None:
    model = lmm.Model("Reaction ~ Days + (Days | Subject)", lmm.load_dataset("sleepstudy"))
    np.testing.assert_allclose(model.theta0, model.fit().theta, rtol=1e-9)


@pytest.mark.parametrize("name", ["slope", "crossed"])
def test_gradient_is_zero_where_a_column_of_the_factor_is(name: str) -> None:
    d = design(LAYOUTS[name], 120, 2)
    plan, _, g, rhs = problem(d)
    theta = jnp.zeros(plan.layout.n_theta)
    slope = jax.grad(lambda t: estimate.criterion(plan.layout, "REML", t, g, rhs))(theta)
    np.testing.assert_array_equal(slope, 0.0)


# -- contracts ----------------------------------------------------------------------------------


def test_batched_equals_single_and_nan_stays_alone() -> None:
    d = design(LAYOUTS["nested and crossed"], 120, 2)
    plan, _, g, rhs = problem(d)
    rng = np.random.default_rng(5)
    many = jax.tree.map(lambda a: np.stack([a * f for f in (1.0, 1.1, 0.9)]), rhs)
    broken = jax.tree.map(lambda a: a.copy(), many)
    for leaf in jax.tree.leaves(broken):
        leaf[1] = np.nan
    theta = jnp.asarray(rng.normal(size=plan.layout.n_theta))

    def f(r: gram.Rhs) -> jax.Array:
        return estimate.criterion(plan.layout, "REML", theta, g, r)

    batch = jax.jit(jax.vmap(f))
    values, damaged = batch(many), batch(broken)
    for i in range(3):
        one = f(jax.tree.map(lambda a, i=i: a[i], many))
        assert float(values[i]) == pytest.approx(float(one), rel=1e-12)
    assert np.isnan(damaged[1])
    np.testing.assert_array_equal(np.asarray(damaged)[[0, 2]], np.asarray(values)[[0, 2]])


def test_fit_compiles_once_for_equal_shapes() -> None:
    before = estimate.optimise._cache_size()
    for seed in range(3):
        d = design([("a", factor_codes(np.random.default_rng(0), 90, 9), 1, "us")], 90, 2, seed)
        plan, _, g, rhs = problem(d)
        theta0 = jnp.asarray(estimate.start(plan.layout))
        best, _ = estimate.optimise(plan.layout, "REML", g, rhs, theta0)
        assert int(best.status) == 0
    assert estimate.optimise._cache_size() == before + 1


@pytest.mark.parametrize("name", ["linear model", "nested", "crossed", "sparse"])
@pytest.mark.parametrize("method", METHODS)
def test_padding_changes_nothing(name: str, method: str) -> None:
    if name == "sparse":
        layout, g, rhs = sparse_problem("two in the core")
    else:
        plan, _, g, rhs = problem(design(LAYOUTS[name], 120, 3))
        layout = plan.layout
    wide, g_wide, rhs_wide = buckets.pad(layout, g, rhs)
    assert wide.p == 4
    theta = jnp.asarray(np.random.default_rng(2).normal(size=layout.n_theta))
    g_wide = buckets.with_dummies(g_wide, wide.p - layout.p, method)
    reduce = jax.jit(lk.reduce, static_argnums=0)
    expected, padded = reduce(layout, theta, g, rhs), reduce(wide, theta, g_wide, rhs_wide)
    value = float(lk.deviance(padded, method))
    assert value == pytest.approx(float(lk.deviance(expected, method)), rel=1e-13)
    beta, vcov = lk.fixef(padded), lk.unscaled_vcov(padded)
    np.testing.assert_allclose(beta[:3], lk.fixef(expected), rtol=1e-12)
    np.testing.assert_array_equal(beta[3:], 0.0)
    np.testing.assert_allclose(vcov[:3, :3], lk.unscaled_vcov(expected), rtol=1e-11)


def in_blocks(name: str, blocks: int = 4) -> tuple[Any, Any, Any, jax.Array]:
    """A factor by itself with 16 levels, one of them without rows, gone through in blocks."""
    d = design(LAYOUTS[name], 120, 3)
    plan, _, g, rhs = problem(d)
    layout, g, rhs = buckets.pad(plan.layout, g, rhs)
    if name == "slope":  # a collapsed level stands for several
        g = g._replace(times=(np.random.default_rng(4).integers(1, 5, 16).astype(float),))
    return dataclasses.replace(layout, blocks=blocks), g, rhs, jnp.asarray(random_theta(d))


@pytest.mark.parametrize("name", ["slope", "two terms on one factor"])
def test_blocks_of_levels_change_nothing(name: str) -> None:
    blocked, g, rhs, theta = in_blocks(name)
    method = METHODS[len(name) % 2]

    @functools.partial(jax.jit, static_argnums=0)
    def everything(layout: Any, thetas: jax.Array, own: Any) -> Any:
        def value(own: Any) -> jax.Array:
            return lk.deviance(lk.reduce(layout, theta, g._replace(own=own), rhs), method)

        closed = jax.vmap(lambda t: derivatives.closed_form(layout, method, t, g, rhs))(thetas)
        return closed, jax.grad(value)(own)

    moved = jnp.stack([theta, 0.5 * theta]), (jnp.asarray(g.own[0]),)
    whole = everything(dataclasses.replace(blocked, blocks=1), *moved)
    parts = everything(blocked, *moved)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_memory_of_a_fit_in_blocks_does_not_grow_with_the_levels() -> None:
    """Of 2¹⁴ levels no array is made by a fit: less than their cross-products, whole twice that."""
    layout, g, rhs, theta = in_blocks("slope")
    J = buckets.MANY_LEVELS
    layout = dataclasses.replace(layout, chain=((*layout.chain[0][:2], J),))
    layout = buckets.padded_layout(layout)
    assert layout.blocks == J // buckets.BLOCK_LEVELS
    wide = lambda a: jnp.zeros((*np.shape(a)[:-1], J))  # noqa: E731
    g = g._replace(own=(wide(g.own[0]),), border=(wide(g.border[0]),), times=())
    rhs = rhs._replace(border=(wide(rhs.border[0]),))

    def temporaries(blocks: int) -> float:
        chosen = dataclasses.replace(layout, blocks=blocks)
        memory = estimate.solve.lower(chosen, "REML", g, rhs, theta).compile().memory_analysis()
        return memory.temp_size_in_bytes / memory.argument_size_in_bytes

    assert temporaries(layout.blocks) < 1.0
    assert temporaries(1) > 2.0


def test_blocks_of_levels_are_chosen_by_count_and_on_processors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = problem(design(LAYOUTS["slope"], 120, 3))[0].layout
    crossed = problem(design(LAYOUTS["crossed"], 120, 3), dense=32)[0].layout

    def blocks(layout: Any, J: int) -> int:
        return buckets.padded_layout(
            dataclasses.replace(layout, chain=((*layout.chain[0][:2], J),))
        ).blocks

    for J in (16_384, 20_000, 100_000, 200_001, 1_000_003):
        padded = buckets.bucket_levels(J)
        assert padded % blocks(one, J) == 0
        assert padded / blocks(one, J) <= buckets.BLOCK_LEVELS
        assert padded < 1.13 * J
    assert blocks(one, 8_000) == blocks(crossed, 100_000) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert blocks(one, 100_000) == 1


def test_models_of_similar_size_share_the_program() -> None:
    """Other data, another number of levels, another formula: nothing is compiled again."""
    rng = np.random.default_rng(0)

    def fit(J: int, formula: str) -> lmm.Fit:
        g = np.repeat(np.arange(J), 4)
        data = pd.DataFrame({"g": g, "x": rng.normal(size=4 * J), "z": rng.normal(size=4 * J)})
        data["y"] = rng.normal(size=4 * J) + rng.normal(size=J)[g]
        return lmm.Model(formula, data).fit()

    fit(50, "y ~ x + (1 | g)")
    before = estimate.solve._cache_size()
    for J, formula in (
        (57, "y ~ x + (1 | g)"),
        (64, "y ~ x * z + (1 | g)"),
        (51, "y ~ 1 + (1 | g)"),
    ):
        assert fit(J, formula).converged
    assert estimate.solve._cache_size() == before


def crowded_problem(monkeypatch: pytest.MonkeyPatch, popular: int) -> tuple[Any, Any, Any]:
    """A crossed design whose pairs of levels are formed on the way."""
    monkeypatch.setattr(cross, "MOST_PAIRS", 0)
    monkeypatch.setattr(crowded, "CHUNK", 16)
    monkeypatch.setattr(crowded, "_popular", lambda *_: popular)
    layout, g, rhs = sparse_problem("crossed slopes")
    assert not isinstance(g.cross.pairs, cross.Pairs)
    return layout, g, rhs


@pytest.mark.parametrize(
    "name", ["linear model", "nested and crossed", "sparse", "crowded", "in blocks"]
)
def test_everything_lowers_for_cuda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "in blocks":
        layout, g, rhs, _ = in_blocks("slope")
    elif name in ("sparse", "crowded"):
        monkeypatch.setattr(derivatives, "LARGE_CORE", 1)
        crowd = name == "crowded"
        layout, g, rhs = crowded_problem(monkeypatch, 4) if crowd else sparse_problem("crossed")
    else:
        plan, _, g, rhs = problem(design(LAYOUTS[name], 120, 2))
        layout = plan.layout
    theta = jnp.asarray(estimate.start(layout))
    at, approximate = (layout, "REML"), derivatives.is_approximate(layout)

    def in_steps(g: Any, r: Any, t: Any) -> Any:
        s = estimate.begin(t)
        s, going = estimate.advance(approximate, s, estimate.slopes(*at, g, r, s))
        return estimate.finish(*at, g, r, s), going

    def rows(g: Any, r: Any, t: Any) -> Any:
        r = jax.tree.map(lambda a: jnp.stack([a, a]), r)
        return estimate.unscaled_prediction_variance(layout, t, g, r)

    programs = {
        "solve": lambda g, r, t: estimate.solve(*at, g, r, t),
        "in steps": in_steps,
        "effects": lambda g, r, t: estimate.effects(layout, g, r, t),
        "slopes of effects": lambda g, r, t: estimate.effect_slopes(layout, g, r, t),
        "rows": rows,
        "hessian": lambda g, r, t: estimate.hessian(*at, t, g, r),
        "vcov": lambda g, r, t: estimate.vcov_and_derivative(*at, t, g, r),
    }
    if not layout.n_theta:
        del programs["in steps"], programs["hessian"]
    for one in programs.values():
        lowers_for_cuda(one, g, rhs, theta)


def lowers_for_cuda(program: Any, *args: Any) -> None:
    """Export for a machine that is not here; nothing calls back to Python."""
    exported = jax.export.export(jax.jit(program), platforms=["cuda"])(*args)
    assert "cuda" in exported.platforms
    assert "callback" not in str(exported.mlir_module())


@pytest.mark.parametrize(
    ("residual", "kind"), [("un(time | id)", Patterns), ("car1(time | id)", Rows)]
)
def test_residual_structures_lower_for_cuda(residual: str, kind: type) -> None:
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"id": np.repeat(np.arange(30), 4), "time": np.tile(np.arange(4.0), 30)})
    data["y"] = data.time + rng.normal(size=30)[data.id] + rng.normal(size=120)
    if kind is Rows:
        data["time"] += rng.uniform(0, 0.5, 120)
    data = data.drop(index=[3, 10, 11])
    formula = "y ~ time + (1 | id)" if kind is Rows else "y ~ time"
    model = lmm.Model(formula, data, residual=residual)
    source, layout = model._source(), model._plan.layout
    assert isinstance(source, kind), type(source)
    free = jnp.asarray(model._start)
    lowers_for_cuda(lambda s, t: program.solve(layout, "REML", s, t), source, free)
    lowers_for_cuda(lambda s, t: program.vcov_and_derivative(layout, "REML", t, s), source, free)


def test_layout_is_hashable_and_chosen_from_the_data() -> None:
    d = design(LAYOUTS["nested and crossed"], 120, 2)
    plan = gram.plan(d, 0)
    assert hash(plan.layout) == hash(dataclasses.replace(plan.layout))
    assert [f.group for f in plan.factors] == ["a", "b", "c"]
    assert plan.n_chain == 2
    assert plan.words().startswith(
        "level by level: a (15 levels), then b (4 levels); dense core: c"
    )


def test_products_are_kept_by_entry_where_they_are_few() -> None:
    """Ten thousand rows, 2,000 x 300 levels: five entries a level; and the same, complete."""
    rng = np.random.default_rng(0)
    a = np.repeat(np.arange(2000), 5).astype(np.int32)
    few = gram.plan(
        design([("a", a, 1, "us"), ("b", factor_codes(rng, 10_000, 300), 1, "us")], 10_000, 1)
    )
    assert few.layout.sparse
    assert "kept by entry" in few.words()
    grid = [x.ravel().astype(np.int32) for x in np.meshgrid(np.arange(200), np.arange(50))]
    full = gram.plan(design([("a", grid[0], 1, "us"), ("b", grid[1], 1, "us")], 10_000, 1))
    assert not full.layout.sparse
    assert "dense blocks" in full.words()

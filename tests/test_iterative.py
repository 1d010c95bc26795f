"""The iterative prototype against the exact engine."""

import jax
import numpy as np
import pytest

import lmmjax as lmm
from benchmarks import iterative


@pytest.fixture(scope="module")
def crossed():
    """Two large factors and a small one, unbalanced."""
    rng = np.random.default_rng(3)
    n, sizes = 2000, {"a": 150, "b": 90, "c": 5}
    data = {k: rng.integers(0, J, n) for k, J in sizes.items()}
    data["b"] = np.minimum(data["b"], rng.integers(0, 90, n))
    data["x"] = rng.normal(size=n)
    data["y"] = data["x"] + sum(rng.normal(size=J)[data[k]] for k, J in sizes.items())
    data["y"] = data["y"] + rng.normal(size=n)
    import pandas as pd

    model = lmm.Model("y ~ x + (1 | c) + (1 | a) + (1 | b)", pd.DataFrame(data))
    return model, iterative.System.of(model)


THETA = np.array([0.4, 0.9, 0.7])


@pytest.mark.parametrize("method", ["ML", "REML"])
def test_probes_that_span_the_space_leave_no_randomness(crossed, method):
    model, system = crossed
    d = sum(system.sizes)
    value, gradient, _ = iterative.criterion(system, THETA, method, np.sqrt(d) * np.eye(d), 1e-12)
    with lmm.float64():
        exact, slope = jax.jit(jax.value_and_grad(lambda t: model.deviance(t, method)))(THETA)
    np.testing.assert_allclose(value.value, exact, rtol=1e-12)
    np.testing.assert_allclose(gradient, slope, rtol=1e-9)
    assert value.bracket < 1e-9


def test_small_factors_are_exact(crossed):
    model, system = crossed
    assert (system.sizes, system.small) == ((model.groups["b"],), (5,))
    assert system.order == (1, 2, 0)


def test_error_bars_are_calibrated(crossed):
    _, system = crossed
    d = sum(system.sizes)
    operator = iterative.Operator(system, THETA)
    exact = iterative.logdet(operator, np.sqrt(d) * np.eye(d), 1e-12)[0].value
    errors = []
    for seed in range(100):
        found, _ = iterative.logdet(operator, iterative.random_probes(d, 32, seed), 1e-8)
        errors.append((found.value - exact) / found.se)
    # mean and mean square of 100 t variables with 31 df, to 3.5 of their own standard errors
    assert abs(np.mean(errors)) < 0.36
    assert 0.53 < np.mean(np.square(errors)) < 1.6


def test_the_bracket_holds_the_value_at_every_length(crossed):
    _, system = crossed
    d = sum(system.sizes)
    operator = iterative.Operator(system, THETA)
    z = iterative.random_probes(d, 8, 0)
    lower, upper = iterative.quadrature(
        iterative.conjugate_gradients(operator, z, 1e-12), operator.floor
    )
    np.testing.assert_allclose(lower, upper, atol=1e-12)
    for steps in (1, 2, 4):
        solved = iterative.conjugate_gradients(operator, z, 1e-12, most=steps)
        below, above = iterative.quadrature(solved, operator.floor)
        assert np.all(below <= upper + 1e-12) and np.all(above >= lower - 1e-12)
        assert np.all(above - below > 0)


def test_slopes_are_refused():
    model = lmm.Model("Reaction ~ Days + (Days | Subject)", lmm.load_dataset("sleepstudy"))
    with pytest.raises(ValueError, match="expected two or more"):
        iterative.System.of(model)

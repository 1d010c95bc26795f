"""Digits: units and origins of columns change nothing but the units of the result."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import lmmjax as lmm
from lmmjax import blocks, design, gram
from lmmjax.optimize import FLAT_STOP

FORMULA = "y ~ a + f + (a | g)"


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    """Whole and dyadic numbers, so that shifting them loses nothing of the data."""
    rng = np.random.default_rng(11)
    n = 360
    g = np.repeat(np.arange(30), 12)
    a = rng.integers(0, 16, n) / 4.0
    b = rng.normal(size=(30, 2)) * [4, 1]
    y = np.round(16 * (50 + 2 * a + b[g, 0] + b[g, 1] * a + rng.normal(size=n))) / 16
    return pd.DataFrame({"y": y, "a": a, "g": g, "f": rng.choice(["p", "q"], n)})


@pytest.fixture(scope="module")
def fit(data: pd.DataFrame) -> lmm.Fit:
    return lmm.Model(FORMULA, data).fit()


CHANGES = [
    (0.0, 1e-6, 0.0, 1.0),
    (0.0, 1e6, 0.0, 1.0),
    (2000.0, 1.0, 0.0, 1.0),
    (1e8, 1.0, 0.0, 1.0),
    (0.0, 1.0, 1e8, 1.0),
    (0.0, 1.0, 0.0, 1e-6),
    (0.0, 1.0, 0.0, 1e6),
    (1e8, 1.0, 1e8, 1.0),
    (0.0, 1e6, 0.0, 1e-6),
]


@pytest.mark.parametrize("way", ["in memory", "streamed", "by blocks"])
@pytest.mark.parametrize(("shift", "scale", "y_shift", "y_scale"), CHANGES)
def test_back_transformed_results_agree(
    data: pd.DataFrame,
    fit: lmm.Fit,
    shift: float,
    scale: float,
    y_shift: float,
    y_scale: float,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved = data.assign(a=data["a"] * scale + shift, y=data["y"] * y_scale + y_shift)
    if way == "by blocks":
        monkeypatch.setattr(design, "LARGE", 64)
        monkeypatch.setattr(blocks, "LARGE", 64)
    if way == "streamed":
        model = lmm.Model.from_table(FORMULA, pa.Table.from_pandas(moved))
    else:
        model = lmm.Model(FORMULA, moved)
    if way == "by blocks":
        assert blocks.products(model.design, gram.plan(model.design)) is not None
    other = model.fit()
    n, p = fit.n_obs, 3
    assert other.converged, other.message
    # REML: X -> XT adds log|det T|, y -> c y adds (n - p) log c
    expected = fit.loglik - np.log(scale) - (n - p) * np.log(y_scale)
    assert other.loglik == pytest.approx(expected, rel=1e-9)
    assert other.sigma == pytest.approx(fit.sigma * y_scale, rel=1e-9)
    unit = np.array([1.0, 1 / scale, 1.0]) * y_scale
    np.testing.assert_allclose(other.beta.iloc[1:], (fit.beta * unit).iloc[1:], rtol=1e-9)
    np.testing.assert_allclose(other.std_errors[1:], (fit.std_errors * unit)[1:], rtol=1e-9)
    at_zero = other.beta.iloc[0] + other.beta.iloc[1] * shift - y_shift
    # The mean of y at a = 0 is a difference of numbers of this size
    size = max(abs(other.beta.iloc[1] * shift), abs(y_shift), abs(fit.beta.iloc[0] * y_scale))
    assert at_zero == pytest.approx(fit.beta.iloc[0] * y_scale, abs=1e-9 * size)
    slope = other.ranef()["a"] * scale / y_scale
    np.testing.assert_allclose(slope, fit.ranef()["a"], atol=1e-9 * fit.sigma)
    sd = other.varcorr().set_index(["term1", "term2"])["sdcor"].to_numpy()
    assert sd[1] * scale / y_scale == pytest.approx(fit.varcorr()["sdcor"][1], rel=1e-9)
    t = other.coef_table()["statistic"].to_numpy()[1:]
    np.testing.assert_allclose(t, fit.coef_table()["statistic"].to_numpy()[1:], rtol=1e-9)
    df = other.coef_table()["df"].to_numpy()[1:]
    np.testing.assert_allclose(df, fit.coef_table()["df"].to_numpy()[1:], rtol=1e-7)


def test_float32_is_as_good_as_its_digits(data: pd.DataFrame, fit: lmm.Fit) -> None:
    for shift in (0.0, 1e8):
        moved = data.assign(a=data["a"] + shift)
        low = lmm.Model(FORMULA, moved, dtype="float32").fit()
        assert low.converged, low.message
        assert low.loglik == pytest.approx(fit.loglik, rel=1e-6)
        assert low.sigma == pytest.approx(fit.sigma, rel=1e-5)
        np.testing.assert_allclose(low.beta.iloc[1:], fit.beta.iloc[1:], rtol=1e-4)
        np.testing.assert_allclose(low.std_errors[1:], fit.std_errors[1:], rtol=1e-4)


def test_float32_goes_as_far_as_its_gradient_where_the_criterion_is_large() -> None:
    """2,000 groups: 100 ulp of the criterion are 0.8, and θ has five digits all the same."""
    rng = np.random.default_rng(0)
    g, x = rng.integers(0, 2000, 20_000), rng.normal(size=20_000)
    y = x + rng.normal(size=2000)[g] + 0.4 * rng.normal(size=2000)[g] * x + rng.normal(size=20_000)
    data = pd.DataFrame({"g": g, "x": x, "y": y})
    high = lmm.Model("y ~ x + (x | g)", data).fit()
    low = lmm.Model("y ~ x + (x | g)", data, dtype="float32").fit()
    assert low.converged, low.message
    assert low.n_evals <= high.n_evals
    np.testing.assert_allclose(low.theta, high.theta, atol=2e-6)
    assert low.loglik == pytest.approx(high.loglik, rel=1e-7)


def test_a_fit_without_digits_left_says_so(fit: lmm.Fit, data: pd.DataFrame) -> None:
    low = lmm.Model(FORMULA, data, dtype="float32").fit()
    scalars = low._solution.scalars._replace(status=FLAT_STOP, promised=0.5)
    stopped = dataclasses.replace(
        low, converged=False, _solution=low._solution._replace(scalars=scalars)
    )
    assert "float32 holds no more digits" in stopped.message
    assert "use dtype='float64'" in stopped.message
    high = fit._solution._replace(scalars=fit._solution.scalars._replace(status=FLAT_STOP))
    assert "float32" not in dataclasses.replace(fit, converged=False, _solution=high).message

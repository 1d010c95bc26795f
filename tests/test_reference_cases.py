"""The reference cases are complete and fit the data that they name."""

import numpy as np
import pytest
from reference_cases import REFERENCE, case_contrasts, case_data, case_ids, load_case, numbers

REQUIRED = {"id", "data", "formula", "method", "engine", "weights", "factors"}
REQUIRED |= {"r_code", "r_versions", "trust", "expected"}


def test_engines_split_the_cases():
    assert len(case_ids(engine="lme4")) == 47
    assert case_ids(engine="stats::lm") == ["sim_houses_lm", "sim_simpson_pooled_lm"]
    assert len(case_ids()) == 49


def test_a_feature_selects_cases():
    assert case_ids(feature="offset") == ["sim_unbalanced_woff_ml"]


@pytest.mark.parametrize("case_id", case_ids())
def test_case_names_its_origin(case_id):
    case = load_case(case_id)
    assert case["id"] == case_id
    assert case.keys() >= REQUIRED
    assert case["r_versions"]["R"].startswith("R version 4.2.2")
    assert case["expected"].keys() >= {"logLik", "npar", "nobs", "sigma", "fixef"}


@pytest.mark.parametrize("case_id", case_ids())
def test_case_fits_its_data(case_id):
    case = load_case(case_id)
    frame = case_data(case)
    for name, factor in case["factors"].items():
        assert frame[name].cat.categories.tolist() == factor["levels"]
        assert frame[name].cat.ordered is factor["ordered"]
    assert len(frame) >= case["expected"]["nobs"]
    assert set(case_contrasts(case).values()) <= {"treatment", "poly"}


def test_fitted_and_residuals_add_up_to_the_response():
    case = load_case("sleepstudy_slope_reml")
    first = numbers(case["expected"]["fitted"]["first"]) + case["expected"]["residuals"]["first"]
    np.testing.assert_allclose(first, case_data(case)["Reaction"][: len(first)], rtol=1e-13)


def test_numbers_reads_missing_and_infinite_values():
    np.testing.assert_array_equal(numbers([None, "Inf", "-Inf", 1]), [np.nan, np.inf, -np.inf, 1])


def test_every_test_table_is_used_and_cited():
    used = {load_case(case_id)["data"] for case_id in case_ids()}
    readme = (REFERENCE / "README.md").read_text(encoding="utf-8")
    for path in (REFERENCE / "data").glob("*.parquet"):
        assert path.stem in used
        assert f"`{path.stem}`" in readme

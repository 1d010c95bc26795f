"""What is said when fits are compared, averaged or contrasted in a way that cannot be."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import lmmjax as lmm


@pytest.fixture(scope="module")
def plain() -> lmm.Fit:
    return lmm.Model("distance ~ age * Sex", lmm.load_dataset("Orthodont")).fit(method="ML")


@pytest.fixture(scope="module")
def structured() -> lmm.Fit:
    data = lmm.load_dataset("Orthodont")
    return lmm.Model("distance ~ age * Sex", data, residual="cs(1 | Subject)").fit(method="ML")


def test_models_that_are_not_fitted(plain: lmm.Fit) -> None:
    for call in (lmm.lrt, lmm.aic_table):
        with pytest.raises(lmm.ComparisonError, match="Fit it first"):
            call(plain.model, plain.model)
    with pytest.raises(lmm.ComparisonError, match="found a str"):
        lmm.lrt("y ~ x", plain)


def test_criteria_by_name(plain: lmm.Fit, structured: lmm.Fit) -> None:
    plainly = lmm.aic_table(plain, structured)
    for table in (
        lmm.aic_table({"iid": plain, "cs": structured}),
        lmm.aic_table(iid=plain, cs=structured),
    ):
        assert table.index.tolist() == ["iid", "cs"]
        np.testing.assert_array_equal(table, plainly)


def test_larger_residual_structure_first(plain: lmm.Fit, structured: lmm.Fit) -> None:
    with pytest.raises(lmm.ComparisonError, match="Swap the arguments"):
        lmm.lrt(structured, plain)
    mixed = lmm.Model("distance ~ age * Sex + (1 | Subject)", lmm.load_dataset("Orthodont"))
    with pytest.raises(lmm.ComparisonError, match="Compare them by aic_table"):
        lmm.lrt(structured, mixed.fit(method="ML"))


def test_first_subject_by_default(structured: lmm.Fit) -> None:
    first = structured.model.design.residual.subjects[0]
    got = structured.marginal_cov().cov
    np.testing.assert_array_equal(got, structured.marginal_cov(first).cov)


def test_no_random_term_to_test(plain: lmm.Fit, structured: lmm.Fit) -> None:
    for fit in (plain, structured):
        with pytest.raises(lmm.ComparisonError, match="without random effects"):
            fit.ranova()


def test_unknown_criterion_is_no_formula_error(plain: lmm.Fit) -> None:
    with pytest.raises(lmm.LmmError, match="expected 'REML' or 'ML'") as caught:
        plain.model.fit(method="reml2")
    assert not isinstance(caught.value, lmm.FormulaError)


def test_no_note_where_nothing_is_averaged() -> None:
    fit = lmm.Model("yield_ ~ nitro * Variety", oats()).fit()
    levels = sorted(set(oats()["nitro"]))
    assert "nitro" in fit.emmeans("Variety").attrs["note"]
    assert "nitro" in fit.emmeans("Variety", at={"nitro": levels[:2]}).attrs["note"]
    assert "note" not in fit.emmeans("Variety", at={"nitro": levels[0]}).attrs
    assert "note" not in fit.contrasts("Variety", at={"nitro": [levels[0]]}).attrs


def test_control_by_name() -> None:
    fit = lmm.Model("yield_ ~ nitro + Variety", oats()).fit()
    means = fit.emmeans("Variety").set_index("Variety")["emmean"]
    a, b, c = means.index
    got = fit.contrasts("Variety", "control", ref=b).set_index("contrast")["estimate"]
    assert got.index.tolist() == [f"{a} - {b}", f"{c} - {b}"]
    np.testing.assert_allclose(got, [means[a] - means[b], means[c] - means[b]])
    with pytest.raises(lmm.LmmError, match="is not a level"):
        fit.contrasts("Variety", "control", ref="nobody")
    with pytest.raises(lmm.LmmError, match="goes with method='control'"):
        fit.contrasts("Variety", ref=b)
    with pytest.raises(lmm.LmmError, match=r"'control'.*adjust='dunnett'"):
        fit.contrasts("Variety", "dunnett")
    with pytest.raises(lmm.LmmError, match="'fdr'"):
        fit.contrasts("Variety", adjust="sidak")


def oats() -> pd.DataFrame:
    data = lmm.load_dataset("Oats")
    return data.rename(columns={"yield": "yield_"}).astype({"nitro": str})

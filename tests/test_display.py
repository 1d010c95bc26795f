"""What people see: printed snapshots, and HTML in which nothing of the data can act as markup."""

import subprocess
import sys
import textwrap

import numpy as np
import optax
import pandas as pd
import pytest

import lmmjax as lmm
from lmmjax import display
from lmmjax.display import Page, TextTable, numbers, p_values, preformatted
from lmmjax.tables import varcorr_frame


def lines(text: str) -> list[str]:
    return textwrap.dedent(text).strip("\n").split("\n")


@pytest.fixture(scope="module")
def dyestuff() -> lmm.Fit:
    return lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff")).fit()


@pytest.fixture(scope="module")
def hostile() -> lmm.Fit:
    """Names that are markup, a missing value, an aliased column."""
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"<b>x</b>": np.arange(30.0), "g&h": np.repeat(list("<&>"), 10)})
    frame["twice"] = 2 * frame["<b>x</b>"]
    frame["y"] = rng.normal(size=30) + 3 * np.repeat([0, 1, 2], 10)
    frame.loc[3, "y"] = np.nan
    return lmm.Model("y ~ `<b>x</b>` + twice + (1 | `g&h`)", frame).fit()


def test_one_evaluation_is_one(dyestuff):
    assert dyestuff.n_evals == 1
    assert "converged (1 evaluation, largest" in dyestuff.summary()


def test_a_fit_prints_like_lme4(dyestuff):
    # summary(lmer(Yield ~ 1 + (1 | Batch), Dyestuff)), lme4 1.1-31
    expected = """
        Linear mixed model fit by REML
        Formula: Yield ~ 1 + (1 | Batch)
        Observations: 30; groups: Batch 6

        AIC 325.654   BIC 329.858   logLik -159.827   REML criterion 319.654

        Random effects
        Group     Name         Variance     SD
        Batch     (Intercept)      1764  42.00
        Residual                   2451  49.51

        Fixed effects (Satterthwaite's degrees of freedom)
                     Estimate  Std. error   df  t value  Pr(>|t|)    2.5 %   97.5 %
        (Intercept)   1527.50       19.38  5.0   78.804  6.23e-09  1477.67  1577.33
        """
    printed = lines(repr(dyestuff))
    assert printed[:-2] == lines(expected)
    assert printed[-1].startswith("Optimiser: newton, converged (")


def test_a_linear_model_has_no_random_table():
    text = repr(lmm.Model("Reaction ~ Days", lmm.load_dataset("sleepstudy")).fit())
    assert text.startswith("Linear model fit by REML")
    assert "Residual standard deviation: 47.71 (178 degrees of freedom)" in text
    assert "Random effects" not in text
    assert "residual degrees of freedom" in text


@pytest.mark.parametrize(
    ("residual", "expected"),
    [
        (None, ""),
        ("ar1(1 | Subject)", ""),
        ("un(age | Subject)", "the first position"),
        ("cs(1 | Subject) * varident(Sex) * varpower(age)", "the first level of Sex, |age| = 1"),
    ],
)
def test_the_row_of_the_residual_sd(residual, expected):
    data = lmm.load_dataset("Orthodont")
    model = lmm.Model("distance ~ age", data, residual=residual)
    assert display._reference_row(model) == expected


def test_unequal_variances_say_whose_sd_is_printed():
    model = lmm.Model("distance ~ age", lmm.load_dataset("Orthodont"), residual="varident(Sex)")
    text = repr(model.fit())
    assert "Residual standard deviation at the first level of Sex: " in text
    assert "Residual structure (residual SD: at the first level of Sex)" in text


def test_a_model_prints_before_it_is_fitted():
    model = lmm.Model("Reaction ~ Days + (Days | Subject)", lmm.load_dataset("sleepstudy"))
    expected = """
        Linear mixed model, not fitted
        Formula: Reaction ~ Days + (Days | Subject)
        Observations: 180; groups: Subject 18
        Fixed effects: (Intercept), Days
        Random effects: (Intercept), Days | Subject
        """
    assert lines(repr(model)) == lines(expected)
    assert model._repr_html_().startswith("<pre>Linear mixed model")


def test_dropped_rows_and_columns_are_told(hostile):
    text = repr(hostile)
    assert "1 row with missing values dropped (y: 1)" in text
    assert "dropped for rank deficiency: twice" in text


def test_a_singular_fit_is_said_first():
    with pytest.warns(lmm.SingularFitWarning):
        fit = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff2")).fit()
    assert "SINGULAR FIT: the variance of (Intercept) | Batch is 0" in repr(fit)
    assert "SINGULAR FIT" in fit._repr_html_()


def test_a_fit_that_did_not_converge_says_so(dyestuff):
    with pytest.warns(lmm.ConvergenceWarning):
        fit = dyestuff.model.fit(optimizer=optax.sgd(1e-9), start=[0.5])
    assert "NOT CONVERGED: did not converge: stopped at the limit of iterations" in repr(fit)
    assert "Optimiser" not in repr(fit)


def test_correlations_stand_in_a_triangle():
    cov = np.array([[4.0, 1.0, 0.0], [1.0, 1.0, -0.5], [0.0, -0.5, 1.0]])
    frame = varcorr_frame([("g", ("a", "b", "c"))], [cov], 2.0)
    expected = """
        Group     Name  Variance     SD   Corr
        g         a        4.000  2.000
                  b        1.000  1.000  0.500
                  c        1.000  1.000  0.000  -0.500
        Residual           4.000  2.000
        """
    assert lines(display.varcorr_table(frame, caption="").text()) == lines(expected)


def test_html_escapes_every_name(hostile):
    page = hostile._repr_html_()
    assert "<b>x" not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert "g&amp;h" in page


def test_html_has_tables_and_carries_its_style(dyestuff):
    page = dyestuff._repr_html_()
    assert page.count("<table>") == page.count("</table>") == 2
    assert "<style>" in page
    assert "http" not in page


def test_a_table_escapes_cells_and_caption():
    table = TextTable(["<i>"], [["a < b"]], caption="p & q")
    assert "<i>" not in table.html()
    assert "a &lt; b" in table.html()
    assert "p &amp; q" in table.html()
    assert preformatted("<") == "<pre>&lt;</pre>"


def test_a_page_wraps_long_lines_between_words():
    text = Page("T", ["word " * 50]).text()
    assert max(map(len, text.split("\n"))) <= 100


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([0.0], ["0.0"]),
        ([np.nan, np.inf, -np.inf, 1.0], ["", "∞", "-∞", "1.000"]),
        ([1e20], ["1e+20"]),
        ([0.00012345], ["0.000123"]),
        ([1234567.0, 0.5], ["1234567.00", "0.50"]),
    ],
)
def test_numbers(values, expected):
    assert numbers(values) == expected


def test_p_values_never_print_as_zero():
    assert p_values([0.0, 1e-20, 0.04321, float("nan"), 1.0]) == [
        "< 1e-16",
        "< 1e-16",
        "0.0432",
        "",
        "1",
    ]


def test_plural_and_percent():
    assert (display.plural(1, "row"), display.plural(2, "row")) == ("1 row", "2 rows")
    assert (display.percent(0.95), display.percent(0.999)) == ("95 %", "99.9 %")


# -- the package ----------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, lmmjax; heavy = {'jax', 'numpy', 'pandas', 'scipy', 'arviz', 'matplotlib', "
        "'numpyro', 'formulaic'}; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists():
    for name in lmm.__all__:
        assert getattr(lmm, name) is not None
    assert set(lmm.__all__) <= set(dir(lmm))


def test_compare_stays_a_function():
    import lmmjax.comparison

    assert lmm.compare is lmmjax.comparison.compare


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Modell'"):
        lmm.Modell  # noqa: B018

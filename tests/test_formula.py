"""Formula text to parts: R's grammar, lme4's expansions, and errors that point at the place."""

import pickle

import pytest

from lmmjax.errors import FormulaError
from lmmjax.expr import deparse, deparse_number, parse_expr
from lmmjax.formula import parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # R: deparse(quote(...))
        ("x**2+ !a&b", "x^2 + !a & b"),
        ("sin(2*pi*x)", "sin(2 * pi * x)"),
        ("I(age-11)", "I(age - 11)"),
        ("poly( x,2,raw=T )", "poly(x, 2, raw = T)"),
        ("a-(b-c)", "a - (b - c)"),
        ("a / b/c", "a/b/c"),
        ("-x^-2", "-x^-2"),
        ("a%in%b", "a %in% b"),
        ("a %% b %/% 2", "a%%b%/%2"),
        ("a : b", "a:b"),
        ("`my x` + `y`", "`my x` + y"),
        ("""f(x<=1, 'q"s', TRUE, 2L)""", 'f(x <= 1, "q\\"s", TRUE, 2L)'),
    ],
)
def test_prints_as_r(text, expected):
    assert deparse(parse_expr(text)) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [  # R: deparse(quote(...))
        (1e5, "1e+05"),
        (123456.0, "123456"),
        (0.1, "0.1"),
        (1e-5, "1e-05"),
        (0.0001, "1e-04"),
        (0.00012, "0.00012"),
        (1e15, "1e+15"),
        (123456789.0, "123456789"),
        (0.0, "0"),
        (12.5, "12.5"),
    ],
)
def test_prints_numbers_as_r(value, expected):
    assert deparse_number(value) == expected


@pytest.mark.parametrize(
    ("right", "labels", "intercept"),
    [  # R: attr(terms(y ~ ...), c("term.labels", "intercept"))
        ("a*b*c", ["a", "b", "c", "a:b", "a:c", "b:c", "a:b:c"], True),
        ("(a + b + c)^2", ["a", "b", "c", "a:b", "a:c", "b:c"], True),
        ("(a+b)**2 - a:b", ["a", "b"], True),
        ("a/b/c", ["a", "a:b", "a:b:c"], True),
        ("(a + b)/c", ["a", "b", "a:b:c"], True),
        ("MEANSES * cses + Sector * cses", None, True),
        ("b:a + a + b", ["a", "b", "b:a"], True),
        ("x - 1", ["x"], False),
        ("0 + x", ["x"], False),
        ("x + 0 + 1", ["x"], True),
        ("-1 + x - 0", ["x"], True),
        ("x - x + z", ["z"], True),
        ("a + b %in% a", ["a", "b:a"], True),
        ("x^2 + I(x^2)", ["x", "I(x^2)"], True),
        ("a + b %in% a + z/x + (a+b)^2", ["a", "z", "b", "a:b", "z:x"], True),
        ("1", [], True),
    ],
)
def test_terms_as_r(right, labels, intercept):
    terms = parse(f"y ~ {right}").terms
    if labels is None:
        labels = ["MEANSES", "cses", "Sector", "MEANSES:cses", "cses:Sector"]
    # R prints b:a and a %in% b by first appearance too, except where %in% stands alone.
    expected = [":".join(sorted(v.split(":"), key=terms.variables.index)) for v in labels]
    assert list(terms.labels) == expected
    assert terms.intercept is intercept


@pytest.mark.parametrize(
    ("bars", "expected"),
    [  # lme4: expandDoubleVerts, findbars
        ("(x | g)", ["(x | g)"]),
        ("(x || g)", ["(1 | g)", "(0 + x | g)"]),
        ("(x*z || g)", ["(1 | g)", "(0 + x | g)", "(0 + z | g)", "(0 + x:z | g)"]),
        ("(0 + x || g)", ["(0 + x | g)"]),
        ("(1 | a/b)", ["(1 | b:a)", "(1 | a)"]),
        ("(1 | a/b/c)", ["(1 | c:(b:a))", "(1 | b:a)", "(1 | a)"]),
        ("(x || a/b)", ["(1 | b:a)", "(1 | a)", "(0 + x | b:a)", "(0 + x | a)"]),
        ("(1 | a:b) + (1 | factor(g))", ["(1 | a:b)", "(1 | factor(g))"]),
        ("diag(1 + x | g) + cs(0 + f | h)", ["diag(1 + x | g)", "cs(0 + f | h)"]),
        ("us(x | g) + hom(0 + f | a/b)", ["(x | g)", "hom(0 + f | b:a)", "hom(0 + f | a)"]),
        ("homcs(0 + f | g)", ["homcs(0 + f | g)"]),
        ("((1 | g))", ["(1 | g)"]),
    ],
)
def test_bars_as_lme4(bars, expected):
    parts = parse(f"y ~ z + {bars} - 1")
    assert [bar.text for bar in parts.bars] == expected
    assert parts.fixed == "z - 1"


def test_parts():
    parts = parse("log(y)~offset(t)+x + (1|g)+ offset( log(w) )")
    assert parts.response == "log(y)"
    assert parts.fixed == "x"
    assert parts.offsets == ("t", "log(w)")
    assert parse("y ~ (1 | g)").fixed == "1"
    assert parse("y ~ I(a | b)").bars == ()
    assert pickle.loads(pickle.dumps(parts)) == parts


@pytest.mark.parametrize(
    ("text", "caret", "words"),
    [
        ("y ~ x + (1 | g", 8, "never closed"),
        ("y ~ x)", 5, "without its '('"),
        ("y ~ x +", 7, "end of the formula"),
        ("y ~ x | g", 6, "outside parentheses"),
        ("y ~ ((1 | a) | b)", 8, "bar inside a bar"),
        ("y ~", 3, "end of the formula"),
        ("~ x", 0, "no response"),
        ("y", 0, "no '~'"),
        ("", 0, "empty formula"),
        ("y ~ x z", 6, "'z'"),
        ("y ~ x ~ z", 6, "second '~'"),
        ("y ~ x$z", 5, "subscripts"),
        ("y ~ x[1]", 5, "subscripts"),
        ("y ~ 'a", 4, "never closed"),
        ("y ~ a*(1 | g)", 9, "inside '*'"),
        ("y ~ ar1(t | g)", 4, "residual="),
        ("y ~ (1 | a + b)", 11, "grouping factor"),
        ("y ~ (1 | 2)", 9, "grouping factor"),
        ("y ~ ( | g)", 6, "'|'"),
        ("y ~ (0 | g)", 7, "no random effect"),
        ("y ~ diag(x || g)", 11, "'||'"),
        ("y ~ 2*x", 4, "I(...)"),
        ("y ~ a^b", 6, "whole number"),
        ("y ~ .", 4, "name the columns"),
        ("y ~ x - (1 | g)", 11, "'-'"),
        ("y ~ x*offset(z)", 6, "'*'"),
        ("y ~ x + y", 8, "right side too"),
        ("y ~ f(x", 5, "never closed"),
        ('y ~ "a"', 4, "variable"),
    ],
)
def test_malformed_formula_shows_the_place(text, caret, words):
    with pytest.raises(FormulaError) as caught:
        parse(text)
    message, shown, arrow = str(caught.value).split("\n")
    assert words in message
    assert shown.strip() == text.strip()
    assert arrow.index("^") - 4 == caret


def test_formula_must_be_text():
    with pytest.raises(FormulaError, match="found int"):
        parse(3)

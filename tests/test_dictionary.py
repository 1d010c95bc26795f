"""Each line of docs/dictionary.md: numbers are given, cases are run, calls exist."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import residual_cases
import test_residual
import test_residual_inference
import test_residual_references

import lmmjax as lmm
from lmmjax.bayes.posterior import Posterior
from lmmjax.inference.influence import Influence
from lmmjax.residual import language
from lmmjax.residual.language import parse_residual

PAGE = Path(__file__).parent.parent / "docs" / "dictionary.md"
CALL = re.compile(
    r"`Model\((?P<arguments>.*?)\)` \| (?P<method>REML|ML) \| (?P<loglik>-[\d.]+) \|$"
)


def entries() -> list[tuple[str, str, str, dict[str, Any], str]]:
    """(formula, data set, method, keywords, log-likelihood), each model once."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if match := CALL.search(line):
            call = ast.parse(
                f"f({match['arguments'].replace(chr(92) + '|', '|')})", mode="eval"
            ).body
            assert isinstance(call, ast.Call)
            formula, data = ast.literal_eval(call.args[0]), ast.unparse(call.args[1])
            options = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
            entry = (formula, data, match["method"], options, match["loglik"])
            found[formula, data, match["method"], str(options)] = entry
    return list(found.values())


def test_the_page_has_entries() -> None:
    assert len(entries()) == 12


FAST = "varident(Diet)"


def _entry(entry: Any) -> Any:
    slow = entry[3].get("residual", FAST) != FAST  # most structures compile anew
    name = entry[3].get("residual", entry[0])
    return pytest.param(entry, marks=[pytest.mark.slow] if slow else [], id=name)


@pytest.mark.parametrize("entry", map(_entry, entries()))
def test_line_gives_its_number(entry: Any) -> None:
    formula, data, method, options, given = entry
    fit = lmm.Model(formula, lmm.load_dataset(data), **options).fit(method=method)
    tolerance = 4e-4 if len(given.partition(".")[2]) == 4 else 1e-6  # SAS rounds
    assert fit.loglik == pytest.approx(float(given), abs=tolerance)


LINE = re.compile(r"`(?P<call>[mfu]\.[^`]*)` \| (?P<value>-?[\d.]+(e-\d+)?) \|$")


def calls() -> list[tuple[str, str]]:
    """(expression, value) of the lines of inference."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [(found["call"], found["value"]) for line in lines if (found := LINE.search(line))]


def test_every_line_of_inference_is_found() -> None:
    assert len(calls()) == 20


@functools.cache
def fits() -> dict[str, lmm.Fit]:
    data = lmm.load_dataset("sleepstudy")
    random = {"m": " + (Days | Subject)", "u": " + (Days || Subject)", "f": ""}
    return {k: lmm.Model(f"Reaction ~ Days{text}", data).fit() for k, text in random.items()}


@pytest.mark.parametrize(("call", "value"), calls())
def test_line_of_inference_gives_its_number(call: str, value: str) -> None:
    """The calls are those of a page of this repository."""
    assert eval(call, {}, fits()) == pytest.approx(float(value), rel=2e-6)


# -- lines that name a case which another file fits ----------------------------------------------


def table(title: str) -> list[list[str]]:
    """Cells of the rows of the tables of a section."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    rows = [[c.strip().replace("\\|", "|") for c in row] for row in cells]
    return [row for k, row in enumerate(rows) if "---" not in row[0] and not _head(rows, k)]


def _head(rows: list[list[str]], k: int) -> bool:
    return k + 1 < len(rows) and "---" in rows[k + 1][0]


def parametrised(test: Any) -> list[Any]:
    """The cases that a test really runs."""
    (mark,) = [m for m in test.pytestmark if m.name == "parametrize"]
    return [getattr(case, "values", (case,))[0] for case in mark.args[1]]


def by_sas(test: Any, structure: str) -> dict[str, Any]:
    (found,) = [c for c in parametrised(test) if c["residual"].startswith(f"{structure}(")]
    return found


def rounded(value: float, text: str) -> bool:
    return f"{value:.{len(text.partition('.')[2])}f}" == text


def test_all_structures_have_a_row() -> None:
    rows = {row[0].strip("`").partition("(")[0] for row in table("Names of structures")}
    assert rows == {*language.CORRELATIONS, *language.SPATIAL, *language.VARIANCES}


@pytest.mark.parametrize("row", table("Names of structures"), ids=lambda row: row[0])
def test_structure_has_the_reference_that_its_row_names(row: list[str]) -> None:
    text, reference = row[0].strip("`"), row[-1]
    name = text.partition("(")[0]
    parse_residual(text)
    if reference == "none: dense algebra":
        assert any(f"{name}(" in structure for structure in test_residual.STRUCTURES)
    elif reference.startswith("SAS"):
        case = by_sas(test_residual_inference.test_kenward_roger_equals_sas, name)
        assert rounded(case["df"], reference.rpartition(" ")[2])
    else:
        found = re.search(r"nlme `(\w+)`: log-likelihood (-[\d.]+)", reference)
        assert found and found[1] in parametrised(test_residual_references.test_fit_equals_nlme)
        case = residual_cases.load(found[1])
        assert f"{name}(" in str(residual_cases.residual_text(case))
        assert rounded(case["expected"]["logLik"], found[2])


def test_cases_of_sas_among_degrees_of_freedom() -> None:
    cells = " ".join(row[-1] for row in table("Degrees of freedom"))
    kr = by_sas(test_residual_inference.test_kenward_roger_equals_sas, "csh")
    robust = by_sas(test_residual_inference.test_sandwich_equals_sas, "un")
    assert rounded(kr["se_first_order"], re.findall(r"first-order SE ([\d.]+)", cells)[0])
    assert rounded(robust["arm"], re.findall(r"empirical variance ([\d.]+)", cells)[0])


# -- all other lines: the call exists -------------------------------------------------------------

FITS = ("m", "ml", "u", "f", "fit", "small", "mmrm")
KNOWN = {**dict.fromkeys(FITS, lmm.Fit), "model": lmm.Model, "post": Posterior, "lmm": lmm}
RESULTS = {"Model": lmm.Model, "fit": lmm.Fit, "sample": Posterior, "influence": Influence}
OTHERS = {"az": "arviz", "dist": "numpyro.distributions"}


def owner(node: ast.expr) -> Any:
    """Class of an expression; None where it is no object of ours (a table, say)."""
    if isinstance(node, ast.Name):
        return KNOWN.get(node.id)
    if isinstance(node, ast.Call):
        function = node.func
        return RESULTS.get(function.attr if isinstance(function, ast.Attribute) else function.id)
    return None


def check(node: ast.AST) -> int:
    """Hold every call and attribute within against its class; how many there were."""
    seen = 0
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and (cls := owner(part.value)):
            assert hasattr(cls, part.attr), ast.unparse(part)
            seen += 1
        if not isinstance(part, ast.Call):
            continue
        keywords = {k.arg: k.value for k in part.keywords}
        if "residual" in keywords:
            parse_residual(ast.literal_eval(keywords["residual"]))
        if isinstance(part.func, ast.Name):
            inspect.signature(getattr(lmm, part.func.id)).bind(*part.args, **keywords)
            seen += 1
        elif (cls := owner(part.func.value)) is lmm:
            inspect.signature(getattr(lmm, part.func.attr)).bind(*part.args, **keywords)
        elif cls:
            inspect.signature(getattr(cls, part.func.attr)).bind(None, *part.args, **keywords)
        elif isinstance(part.func.value, ast.Name):
            module = pytest.importorskip(OTHERS[part.func.value.id])
            inspect.signature(getattr(module, part.func.attr))
            seen += 1
    return seen


TITLES = [
    "Random effects",
    "Residuals: R's `gls`, `lme`, `mmrm`; SAS's `REPEATED`",
    "Residuals and log-likelihoods of the two readings",
    "Bayesian models with correlated errors",
    "Degrees of freedom",
    "Inference and diagnostics",
    "Many fits",
]
SNIPPETS = [
    (snippet, title)
    for title in TITLES
    for row in table(title)
    for snippet in re.findall("`([^`]*)`", row[2 if title.startswith("Degrees") else 1])
]


def test_no_section_is_forgotten() -> None:
    titles = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(titles) == {*TITLES, "Names of structures"}
    assert {title for _, title in SNIPPETS} == set(TITLES)
    assert len(SNIPPETS) > 60


@pytest.mark.parametrize("snippet", dict.fromkeys(s for s, _ in SNIPPETS))
def test_call_exists(snippet: str) -> None:
    assert check(ast.parse(snippet, mode="eval")) > 0


def test_calls_of_the_readme_exist() -> None:
    readme = (PAGE.parent.parent / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Inference\n")[1].split("\n## ")[0]
    code = "".join(block.split("```")[0] for block in section.split("```python\n")[1:])
    assert all(check(line) for line in ast.parse(code).body if isinstance(line, ast.Expr))
    assert check(ast.parse(code)) > 25

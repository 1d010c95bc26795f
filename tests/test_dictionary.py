"""Each line of docs/dictionary.md that carries a number gives that number."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

import pytest

import lmmjax as lmm

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


LINE = re.compile(r"`(?P<call>[mf]\..*)` \| (?P<value>-?[\d.]+(e-\d+)?) \|$")


def calls() -> list[tuple[str, str]]:
    """(expression, value) of the lines of inference."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [(found["call"], found["value"]) for line in lines if (found := LINE.search(line))]


def test_every_line_of_inference_is_found() -> None:
    assert len(calls()) == 15


@functools.cache
def fits() -> dict[str, lmm.Fit]:
    data = lmm.load_dataset("sleepstudy")
    formulas = {"m": "Reaction ~ Days + (Days | Subject)", "f": "Reaction ~ Days"}
    return {name: lmm.Model(formula, data).fit() for name, formula in formulas.items()}


@pytest.mark.parametrize(("call", "value"), calls())
def test_line_of_inference_gives_its_number(call: str, value: str) -> None:
    """The calls are those of a page of this repository."""
    assert eval(call, {}, fits()) == pytest.approx(float(value), rel=2e-6)

"""Reference fits with structured residuals: how tests get at them."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pandas as pd
from reference_cases import REFERENCE, case_contrasts, case_data

import lmmjax as lmm

FOLDER = REFERENCE / "residual"

#: boundary optima: the reference itself can only be trusted in its log-likelihood
LOGLIK_ONLY = {"sleepstudy_lme_ar1_singular_ml", "chickweight_lme_varexp_singular_ml"}


def load(name: str) -> dict[str, Any]:
    case = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return case | {"factors": case.get("factors") or {}}


def names() -> list[str]:
    found = [path.stem for path in sorted(FOLDER.glob("*.json"))]
    return [name for name in found if "engine" in load(name)]


def residual_text(case: dict[str, Any]) -> str | None:
    """The structure of a case in lmmjax's language."""
    given = case.get("residual")
    if not given:
        return None
    factors = []
    if "corr" in given:
        kind = given["corr"]
        if kind == "exp":
            factors.append(f"spexp({', '.join(given['coords'])})")
        else:
            time = given.get("time", "1")
            time = "1" if time.startswith("row order") else time
            both = kind == "ar1" and given.get("var") == "ident" and given["by"] == "age"
            name = {"ar1": "ar1h" if both else "ar1"}.get(kind, kind)
            position = given["by"] if both and time == "1" else time
            position = "1" if both else position
            factors.append(f"{name}({position} | {given['group']})")
            if both or kind == "un":
                return factors[0]
    if "var" in given:
        what = given.get("by") or given["covariate"]
        what = "I(sqft/1000)" if case["id"] == "sim_houses_gls_varpower_ml" else what
        factors.append(f"var{given['var']}({what})")
    return " * ".join(factors)


def data(case: dict[str, Any]) -> pd.DataFrame:
    path = FOLDER / f"{case['data']}.csv"
    if not path.exists():
        return case_data(case)
    frame = pd.read_csv(path)
    for name, factor in case["factors"].items():
        frame[name] = pd.Categorical(frame[name].astype(str), categories=factor["levels"])
    return frame


def fit(case: dict[str, Any]) -> lmm.Fit:
    model = lmm.Model(
        case["formula"],
        data(case),
        residual=residual_text(case),
        contrasts=case_contrasts(case) or None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmm.SingularFitWarning)
        return model.fit(method=case["method"])


def fev() -> pd.DataFrame:
    return pd.read_csv(FOLDER / "fev.csv")


def close(got: Any, expected: Any, tolerance: float, what: str) -> None:
    """Compare relative to the largest entry of the block."""
    got, expected = np.asarray(got, float), np.asarray(expected, float)
    assert got.shape == expected.shape, what
    size = max(float(np.max(np.abs(expected), initial=0.0)), 1e-12)
    worst = float(np.max(np.abs(got - expected), initial=0.0)) / size
    assert worst <= tolerance, f"{what}: off by {worst:.2g} of the largest"

"""Reference fits made with R: how tests get at the cases and their data.

A case is the dict of one file in ``reference/cases``; ``reference/README.md`` tells its fields.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lmmjax.datasets import load_dataset

REFERENCE = Path(__file__).parent / "reference"
CONTRASTS = {"contr.treatment": "treatment", "contr.poly": "poly"}


def load_case(case_id: str) -> dict[str, Any]:
    """Read one case, such as ``"sleepstudy_slope_reml"``."""
    return json.loads((REFERENCE / "cases" / f"{case_id}.json").read_text(encoding="utf-8"))


def case_ids(engine: str | None = None, feature: str | None = None) -> list[str]:
    """List the ids of all cases, or of those of one engine or with one feature."""
    return [
        case_id
        for case_id, (case_engine, features) in _index().items()
        if engine in (None, case_engine) and (feature is None or feature in features)
    ]


def case_data(case: dict[str, Any]) -> pd.DataFrame:
    """Load the table of a case, its factors with the levels, order and flag that R used."""
    path = REFERENCE / "data" / f"{case['data']}.parquet"
    frame = pd.read_parquet(path) if path.exists() else load_dataset(case["data"])
    for name, factor in case["factors"].items():
        frame[name] = frame[name].cat.set_categories(factor["levels"], ordered=factor["ordered"])
    return frame


def case_contrasts(case: dict[str, Any]) -> dict[str, str]:
    """Translate R's contrasts of a case into those of ``Model(contrasts=)``."""
    return {name: CONTRASTS[f["contrasts"]] for name, f in case["factors"].items()}


def numbers(values: Any) -> np.ndarray:
    """Turn nested lists of a case into a float64 array: null is NaN, "Inf" and "-Inf" infinite."""
    return np.array(values, dtype=object).astype(np.float64)


@cache
def _index() -> dict[str, tuple[str, tuple[str, ...]]]:
    cases = (load_case(path.stem) for path in sorted((REFERENCE / "cases").glob("*.json")))
    return {case["id"]: (case["engine"], tuple(case["features"])) for case in cases}

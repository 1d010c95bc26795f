"""Linear mixed models on JAX: stated once; fitted by ML, REML and Bayes; compared.

>>> import lmmjax as lmm
>>> model = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff"))
>>> round(model.fit().sigma, 2)
49.51

Importing this package imports nothing heavy: names are loaded when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmmjax import datasets, studies
    from lmmjax.batchfit import BatchFit
    from lmmjax.bayes.posterior import Posterior
    from lmmjax.comparison import Comparison, compare
    from lmmjax.datasets import describe_dataset, list_datasets, load_dataset
    from lmmjax.errors import (
        ComparisonError,
        ConvergenceWarning,
        DataError,
        DataWarning,
        DesignError,
        EstimabilityWarning,
        FormulaError,
        LmmError,
        PrecisionError,
        PriorError,
        ResidualWarning,
        SingularFitWarning,
    )
    from lmmjax.fit import Fit
    from lmmjax.groups import fit_groups
    from lmmjax.inference.criteria import aic_table
    from lmmjax.inference.lrt import LikelihoodRatio, lrt
    from lmmjax.many import fit_many
    from lmmjax.model import Model
    from lmmjax.precision import enable_cache, float64
    from lmmjax.stages import TwoStage, two_stage
    from lmmjax.study import FitMethod, LRTMethod, Scenario, Study

__version__ = "0.1.0"

__all__ = [
    "BatchFit",
    "Comparison",
    "ComparisonError",
    "ConvergenceWarning",
    "DataError",
    "DataWarning",
    "DesignError",
    "EstimabilityWarning",
    "Fit",
    "FitMethod",
    "FormulaError",
    "LRTMethod",
    "LikelihoodRatio",
    "LmmError",
    "Model",
    "Posterior",
    "PrecisionError",
    "PriorError",
    "ResidualWarning",
    "Scenario",
    "SingularFitWarning",
    "Study",
    "TwoStage",
    "aic_table",
    "compare",
    "datasets",
    "describe_dataset",
    "enable_cache",
    "fit_groups",
    "fit_many",
    "float64",
    "list_datasets",
    "load_dataset",
    "lrt",
    "studies",
    "two_stage",
]

#: where each public name lives; a module stands for itself
_HOME = {
    "BatchFit": "batchfit",
    "fit_groups": "groups",
    "fit_many": "many",
    "Comparison": "comparison",
    "Fit": "fit",
    "LikelihoodRatio": "inference.lrt",
    "aic_table": "inference.criteria",
    "lrt": "inference.lrt",
    "Model": "model",
    "Posterior": "bayes.posterior",
    "FitMethod": "study",
    "LRTMethod": "study",
    "Scenario": "study",
    "Study": "study",
    "TwoStage": "stages",
    "compare": "comparison",
    "datasets": "datasets",
    "describe_dataset": "datasets",
    "enable_cache": "precision",
    "float64": "precision",
    "list_datasets": "datasets",
    "load_dataset": "datasets",
    "studies": "studies",
    "two_stage": "stages",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOME.get(name, 'errors')}")
    value = home if _HOME.get(name) == name else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

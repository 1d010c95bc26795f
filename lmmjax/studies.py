"""Bundled studies of classical claims about mixed models; each returns a :class:`lmmjax.Study`.

``study.performance()`` runs it in memory, ``study.run(path)`` keeps finished blocks on disk.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from lmmjax.study import FitMethod, LRTMethod, Scenario, Study


def _groups(groups: int, size: int) -> pd.DataFrame:
    """A balanced design: ``groups`` of ``size`` rows, a covariate of groups and one of rows."""
    g = np.repeat(np.arange(groups), size)
    return pd.DataFrame(
        {
            "g": pd.Categorical(g),
            "between": np.where(np.arange(groups) % 2 == 0, -0.5, 0.5)[g],
            "within": np.tile(np.linspace(-1, 1, size), groups),
        }
    )


def ml_bias(n_rep: int = 1000, seed: int = 0, groups: int = 10, size: int = 5) -> Study:
    """ML underestimates variance components; REML does not.

    A random intercept and a covariate of groups, 10 groups of 5 by default. ML divides by n, as if
    the fixed effects were known: the variance between groups comes out too small by about p/groups.

    Examples
    --------
    >>> table = ml_bias(n_rep=500, seed=0).performance()
    >>> of_variance = table["parameter"] == "var_(Intercept)|g"
    >>> ml, reml = table[of_variance & (table["measure"] == "relative_bias")]["value"]
    >>> bool(ml < -0.1 < reml)
    True
    """
    truth = {"between": 0.5, "sd_(Intercept)|g": 1.0, "sigma": 1.0}
    name = f"{groups} groups of {size}"
    scenario = Scenario(name, "~ between + (1 | g)", _groups(groups, size), truth)
    return Study([scenario], [FitMethod("ML", method="ML"), FitMethod("REML")], n_rep, seed)


def clustering(n_rep: int = 1000, seed: int = 0, groups: int = 10, size: int = 5) -> Study:
    """A linear model on grouped data rejects a true null far too often for a covariate of groups.

    The covariate ``between`` has no effect. The linear model takes rows for independent, so its
    standard error is too small; the mixed model with Satterthwaite's df keeps its level.
    """
    truth = {"between": 0.0, "sd_(Intercept)|g": 1.0, "sigma": 1.0}
    name = f"{groups} groups of {size}"
    scenario = Scenario(name, "~ between + (1 | g)", _groups(groups, size), truth)
    methods = [
        FitMethod("LM", formula="~ between"),
        FitMethod("LMM, Wald", df="wald"),
        FitMethod("LMM, Satterthwaite"),
    ]
    return Study([scenario], methods, n_rep, seed)


def boundary(n_rep: int = 1000, seed: int = 0, groups: int = 10, size: int = 5) -> Study:
    """The naive likelihood-ratio test of a variance is conservative; the mixture reduces that.

    No variance between groups. Under the null it lies on the boundary, where the statistic is 0 in
    about half of all samples: χ²(1) is too large a reference, ½χ²(0) + ½χ²(1) closer (Self and
    Liang 1987; Stram and Lee 1994).
    """
    scenario = Scenario(
        f"{groups} groups of {size}", "~ within", _groups(groups, size), {"sigma": 1.0}
    )
    small, big = "~ within", "~ within + (1 | g)"
    methods = [
        LRTMethod("naive", small, big, "chi2"),
        LRTMethod("mixture", small, big, "mixture"),
    ]
    return Study([scenario], methods, n_rep, seed)


#: name -> function, for the command line
BUNDLED = {"ml_bias": ml_bias, "clustering": clustering, "boundary": boundary}

r"""Likelihood-ratio tests of nested fits: χ², the mixture at the boundary, exact, bootstrap."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax.errors import ComparisonError, LmmError
from lmmjax.inference.nesting import Pair, check_fitted, label, pair

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit

#: draws by default: directions of the cone, exact statistics, refitted responses
DRAWS = {"mixture": 20_000, "exact": 100_000, "bootstrap": 1000}

METHODS = ("chi2", *DRAWS)


@dataclass(frozen=True, eq=False)
class LikelihoodRatio:
    """A likelihood-ratio test.

    Attributes
    ----------
    statistic : float
        Twice the difference of the (restricted) log-likelihoods.
    df : int
        Difference of the numbers of parameters.
    p_value, mc_se : float
        ``mc_se`` is the Monte Carlo standard error of the p-value, 0 where nothing was simulated.
    method : str
        "chi2", "mixture", "bootstrap" or "exact".
    table : DataFrame
        A row a model: ``n_params loglik deviance aic bic statistic df p_value``.
    note : str
        What the null distribution is, and with which caveats.
    weights : dict or None
        Degrees of freedom -> weight of the mixture, where there is one.
    n_failed : int
        Refits of the bootstrap that failed; they are left out.
    """

    statistic: float
    df: int
    p_value: float
    method: str
    mc_se: float
    table: pd.DataFrame
    note: str
    weights: dict[int, float] | None = field(default=None, repr=False)
    n_failed: int = 0

    def __repr__(self) -> str:
        simulated = f" (Monte Carlo SE {self.mc_se:.2g})" if self.mc_se > 0 else ""
        return "\n".join(
            [
                f"Likelihood-ratio test, {self.note}",
                f"statistic {self.statistic:.4f}, df {self.df}, p = {self.p_value:.4g}{simulated}",
                "",
                self.table.to_string(float_format=lambda x: f"{x:.6g}", na_rep=""),
            ]
        )

    def _repr_html_(self) -> str:
        from lmmjax.display import preformatted

        return preformatted(repr(self))


def lrt(
    small: Fit,
    big: Fit,
    method: str = "chi2",
    *,
    refit: str | None = None,
    n: int | None = None,
    seed: int = 0,
) -> LikelihoodRatio:
    """Test a smaller model against a larger one that contains it.

    Parameters
    ----------
    small, big : Fit
        Of the same rows and by the same criterion. Under REML the fixed parts must span the same
        space.
    method : {"chi2", "mixture", "bootstrap", "exact"}
        χ² with ``df`` degrees of freedom, conservative where variances under test are 0 under the
        null; its mixture at that boundary (cone.py); refits of responses simulated under ``small``;
        the finite-sample distribution for one variance component (exact.py), approximate where
        other random terms or residual parameters stay.
    refit : {"ml"}, optional
        Refit both by ML first: for fixed parts that differ.
    n : int, optional
        Draws: 20,000 directions (mixtures of two variances or more), 100,000 exact statistics,
        1,000 refits.
    seed : int

    Returns
    -------
    LikelihoodRatio

    Raises
    ------
    ComparisonError
        Different rows or responses; REML with different fixed parts; not nested, judged on the
        spans of X and Z; fits that did not converge; a method that does not apply.

    Examples
    --------
    >>> import lmmjax as lmm
    >>> data = lmm.load_dataset("Dyestuff")
    >>> small, big = (lmm.Model(f, data).fit() for f in ("Yield ~ 1", "Yield ~ 1 + (1 | Batch)"))
    >>> round(lmm.lrt(small, big, method="mixture").p_value, 4)
    0.0058
    """
    if method not in METHODS:
        raise LmmError(f"method={method!r} is unknown; expected one of {', '.join(METHODS)}.")
    if refit not in (None, "ml", "ML"):
        raise LmmError(f"refit={refit!r} is unknown; expected None or 'ml'.")
    if n is not None and not (isinstance(n, int | np.integer) and n >= 1):
        raise LmmError(f"n={n!r} is not a number of draws; expected an integer, 1 or more.")
    check_fitted((small, big))
    if refit:
        small, big = (f if f.method == "ML" else f.model.fit(method="ML") for f in (small, big))
    the_pair = pair(small, big)
    statistic = _statistic(the_pair)
    draws = int(n or DRAWS.get(method, 0))
    p, mc_se, extra = _JUDGES[method](the_pair, statistic, draws, seed)
    df = big.n_params - small.n_params
    table = _table(the_pair, statistic, df, p)
    return LikelihoodRatio(statistic, df, p, method, mc_se, table, **extra)


def _statistic(two: Pair) -> float:
    statistic = two.small.deviance - two.shift - two.big.deviance
    if statistic < -1e-4:
        raise ComparisonError(
            f"the larger model has the lower likelihood, by {-statistic / 2:.3g}; expected more. "
            "Its fit is not the optimum: refit it with another start=."
        )
    # below the rounding error of the criterion the two are equal
    return 0.0 if statistic < 1e-8 * (1 + abs(two.big.deviance)) else statistic


def _table(two: Pair, statistic: float, df: int, p: float) -> pd.DataFrame:
    import pandas as pd

    fits = (two.small, two.big)
    columns: dict[str, Any] = {
        name: [getattr(f, name) for f in fits]
        for name in ("n_params", "loglik", "deviance", "aic", "bic")
    }
    columns |= {"statistic": [np.nan, statistic], "df": [np.nan, df], "p_value": [np.nan, p]}
    return pd.DataFrame(columns, index=pd.Index([label(f) for f in fits], name="model"))


# -------------------------------------------------------------------------------------------------
# Null distributions: p, its Monte Carlo error, and what to say
# -------------------------------------------------------------------------------------------------

Judged = tuple[float, float, dict[str, Any]]


def _chi2(two: Pair, statistic: float, n: int, seed: int) -> Judged:
    from scipy import stats

    from lmmjax.inference.cone import residual_ends, unidentified

    df = two.big.n_params - two.small.n_params
    note = f"chi-squared with {df} df"
    if len(two.big.theta) > len(two.small.theta):
        note += " (conservative if variances under test are 0 under the null: see method='mixture')"
    ends = " and ".join(end.name for end in residual_ends(two))
    lost = unidentified(two)
    if lost:
        note += f" (not valid: the null leaves one of {lost} without meaning: see 'bootstrap')"
    elif ends:
        note += (
            f" (conservative: the null has {ends} at an end of the range: see 'mixture' or "
            "'bootstrap')"
        )
    return float(stats.chi2.sf(statistic, df)), 0.0, {"note": note}


def _mixture(two: Pair, statistic: float, n: int, seed: int) -> Judged:
    from lmmjax.inference.cone import chi_bar, cone_of

    cone = cone_of(two)
    tail = chi_bar(cone, statistic, n, seed)
    if tail.weights is None:
        note = (
            f"chi-bar-squared on a cone of {cone.free + len(cone.cov)} dimensions, {n} directions"
        )
    else:
        parts = (f"{w:.3g} chi2({k})" for k, w in tail.weights.items())
        note = "mixture " + " + ".join(parts) + (f", {n} directions" if tail.mc_se else "")
    return tail.p_value, tail.mc_se, {"note": note, "weights": tail.weights}


def _exact(two: Pair, statistic: float, n: int, seed: int) -> Judged:
    from lmmjax.inference import exact

    drawn = exact.simulate(exact.spectrum(two), n, seed)
    p, mc_se = _share(drawn, statistic)
    kind = "restricted " if two.big.method == "REML" else ""
    note = f"exact null distribution of the {kind}ratio, {n} draws"
    kept = ["other random terms stay (Greven 2008)"] if two.small.model.is_mixed else []
    if two.small.model.is_structured:
        kept.append("residual parameters are held at their estimates under the first model")
    if kept:
        note = "; ".join([note.replace("exact", "approximate", 1), *kept])
    return p, mc_se, {"note": note}


def _bootstrap(two: Pair, statistic: float, n: int, seed: int) -> Judged:
    from lmmjax.bootstrap import null_statistics

    null = null_statistics(two.small, two.big, n, seed)
    drawn = null.statistics[np.isfinite(null.statistics)] - two.shift
    if len(drawn) == 0:
        raise ComparisonError(
            f"none of {n} simulated responses could be refitted; expected some. Simplify the model."
        )
    p, mc_se = _share(drawn, statistic)
    note = f"parametric bootstrap, {len(drawn)} responses simulated under the first model"
    if null.n_failed:
        note += f" ({null.n_failed} more could not be refitted)"
    return p, mc_se, {"note": note, "n_failed": null.n_failed}


def _share(drawn: np.ndarray, statistic: float) -> tuple[float, float]:
    """(1 + exceedances) / (1 + draws) (Davison and Hinkley 1997, eq. 4.11), and its error.

    A statistic of 0 is reached by every draw; rounding in the refits is forgiven.
    """
    slack = 1e-6 * (1.0 + statistic)
    p = (1.0 + float(np.sum(drawn >= statistic - slack))) / (1.0 + len(drawn))
    return p, float(np.sqrt(p * (1 - p) / len(drawn)))


_JUDGES = {"chi2": _chi2, "mixture": _mixture, "exact": _exact, "bootstrap": _bootstrap}

r"""t and F tests of Lβ = c by any method of degrees of freedom.

A :class:`Method` is one way to judge Lβ̂: a covariance matrix, degrees of freedom of single rows,
and the F test of several rows. For q > 1 rows Satterthwaite's F decomposes LVL' = PDP', takes the
df ν_m of each independent row of P'L, and matches the mean of the F: den_df = 2E/(E - q),
E = Σ ν_m/(ν_m - 2) (Fai and Cornelius 1996, J. Stat. Comput. Simul. 54, 363-378; as in lmerTest).
The rows P'L, and so den_df (not F) to some digits, depend on how the rows of L are scaled and
mixed; those of :mod:`anova` are single coefficients wherever the hypothesis consists of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmmjax import tables
from lmmjax.errors import LmmError
from lmmjax.inference import kenward_roger as kr

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit

DF_METHODS = ("satterthwaite", "kenward-roger", "residual", "containment", "wald")

#: eigenvalues below this part of the largest count as 0 in the rank of a hypothesis
RANK = 1e-10


class FTest(NamedTuple):
    """An F test; ``scaling`` is Kenward and Roger's λ (1 otherwise), contained in ``statistic``."""

    num_df: int
    den_df: float
    statistic: float
    p_value: float
    scaling: float


@dataclass(frozen=True)
class Method:
    """One way to judge Lβ̂."""

    name: str
    beta: np.ndarray  # (p,)
    vcov: np.ndarray  # (p, p), of the statistics
    degrees: Callable[[np.ndarray], np.ndarray]  # (r, p) -> (r,)
    joint: Callable[[np.ndarray], tuple[float, float]]  # rows of full rank -> den_df, scaling
    check: Callable[[np.ndarray], None] = lambda L: None  # refuses rows it cannot judge

    def std_errors(self, L: np.ndarray) -> np.ndarray:
        """Standard errors of the rows of Lβ̂, (r,)."""
        self.check(L)
        return np.sqrt(np.einsum("ri,ij,rj->r", L, self.vcov, L))

    def f_test(self, L: np.ndarray, rhs: np.ndarray) -> FTest:
        """F test of all rows of Lβ = rhs at once; dependent rows are counted once.

        Raises
        ------
        LmmError
            Dependent rows whose right-hand sides contradict each other.
        """
        self.check(L)
        L, difference = independent(L, L @ self.beta - rhs, self.vcov)
        q = len(L)
        if q == 0:
            return FTest(0, np.nan, np.nan, np.nan, np.nan)
        unit = L / self.std_errors(L)[:, None]
        scaled = difference / self.std_errors(L)
        plain = float(scaled @ np.linalg.solve(unit @ self.vcov @ unit.T, scaled)) / q
        den, scaling = self.joint(L)
        F = scaling * plain
        return FTest(q, den, F, f_tail(F, q, den), scaling)


def f_tail(F: float, num: float, den: float) -> float:
    """Upper tail of the F distribution; infinite denominator df is χ²/num."""
    from scipy import stats

    return float(stats.chi2.sf(F * num, num) if np.isinf(den) else stats.f.sf(F, num, den))


def independent(
    L: np.ndarray, difference: np.ndarray, V: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """L and its differences where its rows are independent; otherwise rows that span the same."""
    se = np.sqrt(np.maximum(np.einsum("ri,ij,rj->r", L, V, L), 0.0))
    keep = np.any(L != 0, axis=1)
    if np.any(difference[~keep] != 0):
        raise LmmError("a hypothesis says 0 = c with c not 0; check L and rhs.")
    L, difference, se = L[keep], difference[keep], se[keep]
    if not len(L):
        return L, difference
    given = L, difference
    L, difference = L / se[:, None], difference / se
    e, P = np.linalg.eigh(L @ V @ L.T)
    real = e > RANK * e[-1]
    if real.all():
        return given
    lost = P[:, ~real].T @ difference
    if np.any(np.abs(lost) > 1e-6 * (1 + np.max(np.abs(difference)))):
        raise LmmError(
            "the rows of the hypothesis depend on each other but their right-hand sides do not "
            "agree; expected rhs that can hold together. Drop the dependent rows."
        )
    order = np.flatnonzero(real)[::-1]
    return P[:, order].T @ L, P[:, order].T @ difference


def joint_satterthwaite(nu: np.ndarray) -> float:
    """Denominator df of the F from those of its independent rows."""
    q = len(nu)
    if q == 1 or np.all(np.abs(np.diff(nu)) < 1e-8):
        return float(np.mean(nu))
    if np.any(nu <= 2):
        return 2.0
    finite = np.isfinite(nu)
    E = float(np.sum(nu[finite] / (nu[finite] - 2))) + int(np.sum(~finite))
    return 2 * E / (E - q) if E > q else np.inf


def check_df(df: str, fitted_by: str = "REML") -> str:
    """Refuse an unknown method of degrees of freedom, and Kenward-Roger for ML fits."""
    if df not in DF_METHODS:
        known = ", ".join(map(repr, DF_METHODS))
        raise LmmError(f"df={df!r} is unknown; expected one of {known}.{_meant(df)}")
    if df == "kenward-roger" and fitted_by != "REML":
        raise LmmError(
            "found df='kenward-roger' for an ML fit; the adjustment is derived for REML. Fit with "
            "method='REML', or use df='satterthwaite'."
        )
    return df


#: what else the methods are called, without case and punctuation
_ALSO = {
    "kr": "kenward-roger",
    "satterth": "satterthwaite",
    "sat": "satterthwaite",
    "lmertest": "satterthwaite",
    "contain": "containment",
    "innerouter": "containment",
    "nlme": "containment",
    "z": "wald",
    "normal": "wald",
    "asymptotic": "wald",
    "inf": "wald",
    "resid": "residual",
}


def _meant(df: Any) -> str:
    """The spelling of a method that another program, or another case, has."""
    plain = "".join(c for c in str(df).lower() if c.isalnum())
    own = {"".join(c for c in name if c.isalnum()): name for name in DF_METHODS}
    found = (own | _ALSO).get(plain)
    return "" if found is None else f" Write df={found!r}."


def check_information(information: str) -> str:
    """Refuse an unknown information matrix for Kenward-Roger."""
    if information not in kr.INFORMATION:
        raise LmmError(
            f"information={information!r} is unknown; expected 'expected' (pbkrtest) or 'observed' "
            "(SAS)."
        )
    return information


def method(
    fit: Fit, df: str | None = None, information: str | None = None, second_order: bool = True
) -> Method:
    """The method called ``df`` (the fit's own by default) for a fit.

    Raises
    ------
    LmmError
        Unknown names; Kenward-Roger for ML fits; containment for crossed factors.
    """
    name = check_df(fit.df if df is None else df, fit.method)
    information = check_information(fit.information if information is None else information)
    V = fit._model_vcov
    if fit.model.is_linear and name != "wald":
        name = "residual"  # V = σ²R has one parameter: every method gives n - p
    if name == "containment" and not fit.model.is_mixed:
        name = "residual"  # without grouping factors there is one stratum
    if name == "kenward-roger":
        return _kenward_roger(fit, information, second_order)
    if name == "satterthwaite":
        degrees = fit._satterthwaite

        def joint(L: np.ndarray) -> tuple[float, float]:
            _, P = np.linalg.eigh(L @ V @ L.T)
            return joint_satterthwaite(degrees(P.T @ L)), 1.0

        return Method(name, fit._beta, V, degrees, joint)
    if name == "containment":
        return _by_column(fit, V)
    value = np.inf if name == "wald" else float(fit.n_obs - len(fit._beta))
    return Method(name, fit._beta, V, lambda L: np.full(len(L), value), lambda L: (value, 1.0))


def _kenward_roger(fit: Fit, information: str, second_order: bool) -> Method:
    a = fit._kenward_roger(information, second_order)

    def degrees(L: np.ndarray) -> np.ndarray:
        return np.array([kr.f_distribution(a, row[None])[0] for row in L] or np.zeros(0))

    return Method(
        "kenward-roger", fit._beta, a.adjusted, degrees, lambda L: kr.f_distribution(a, L)
    )


def _by_column(fit: Fit, V: np.ndarray) -> Method:
    """Containment: the least df among the coefficients that a row (or hypothesis) involves."""
    own = fit._containment.columns

    def degrees(L: np.ndarray) -> np.ndarray:
        size = np.abs(L) * np.sqrt(np.diag(V))
        involved = size > 1e-10 * size.max(axis=1, keepdims=True, initial=1e-300)
        return np.min(np.where(involved, own, np.inf), axis=1, initial=np.inf)

    return Method("containment", fit._beta, V, degrees, lambda L: (float(degrees(L).min()), 1.0))


# -- tables -----------------------------------------------------------------------------------


def t_table(m: Method, L: np.ndarray, rhs: np.ndarray, names: list[str], level: float) -> Any:
    """A t-test a row, columns as ``coef_table``; the estimate is Lβ̂, tested against ``rhs``."""
    return tables.t_table(L @ m.beta, m.std_errors(L), m.degrees(L), names, level, rhs)


def f_frame(tests: dict[str, FTest], scaling: bool = False) -> pd.DataFrame:
    """One row a test: ``num_df den_df statistic p_value`` and perhaps ``scaling``."""
    import pandas as pd

    columns = ["num_df", "den_df", "statistic", "p_value"] + ["scaling"] * scaling
    rows = [[getattr(t, c) for c in columns] for t in tests.values()]
    frame = pd.DataFrame(rows, columns=columns, index=pd.Index(list(tests), dtype=object))
    return frame.astype({"num_df": int} | {c: float for c in columns[1:]})

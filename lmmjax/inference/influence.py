r"""``Fit.influence``: leverage, Cook's distances, and what each row or group does to the estimates.

With V(β̂) = σ²(X'V⁻¹X)⁻¹ and Δ = β̂ - β̂_D, D the rows deleted, θ fixed unless refitted:

    Cook's D   Δ' V(β̂)⁻¹ Δ / p          MDFFITS   Δ' V(β̂_D)⁻¹ Δ / p
    COVRATIO   |V(β̂_D)| / |V(β̂)|       COVTRACE  |tr(V(β̂)⁻¹V(β̂_D)) - p|
    DFBETAS    Δ_k / (σ_D √(X'V⁻¹X)⁻¹_kk)

(Belsley, Kuh and Welsch 1980; Loy and Hofmann 2014, J. Stat. Soft. 56(5), section 5). σ is the
fit's in the first four, as in HLMdiag; DFBETAS takes that without D, as R's ``dfbetas`` of ``lm``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax.errors import DataError
from lmmjax.inference import deletion

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit
    from lmmjax.inference.refits import Refits


@dataclass(frozen=True, eq=False)
class Influence:
    """Influence of rows and of groups on a fit; made by :meth:`lmmjax.Fit.influence`.

    Attributes
    ----------
    fit : Fit
    refit : bool
        Whether groups are deleted by refits of all parameters, or at the θ of the fit.
    """

    fit: Fit
    refit: bool = False
    _made: dict[str, Any] = field(default_factory=dict, repr=False)

    # -- rows -----------------------------------------------------------------------------------

    @cached_property
    def _rows(self) -> deletion.RowDeletion:
        return deletion.single_rows(self.fit)

    def rows(self) -> pd.DataFrame:
        """Diagnostics of each row, θ fixed.

        Returns
        -------
        DataFrame
            On the caller's row labels:

            - ``fitted``, ``residual``: conditional on the BLUPs;
            - ``std_residual``: y_i less its prediction from all other rows, over its SD; for
              independent errors (y - ŷ)√w / (σ√(1 - leverage)). ``student_residual`` takes the σ
              without the row (R's ``rstudent`` for linear models);
            - ``leverage``: ∂ŷ_i/∂y_i given θ, of fixed and random part (lme4's ``hatvalues``);
              ``leverage_fixed``: ∂(x_i'β̂)/∂y_i, their sum is p;
            - ``cooks_d``: of β̂ without the row, exact; ``cooks_d_conditional``: lme4's
              ``cooks.distance``, which puts the whole leverage where that formula has the part of
              β̂ (the same in linear models);
            - ``covratio``; ``sigma``: σ̂ without the row.

            NaN where a coefficient hangs on the row alone.
        """
        import pandas as pd

        fit, d = self.fit, self._rows
        left = d.left
        std = d.r / np.sqrt(left)
        nu = _nu(fit)
        with np.errstate(invalid="ignore", divide="ignore"):
            sigma = fit.sigma * np.sqrt(np.maximum(nu - std**2, 0.0) / (nu - 1))
            conditional = std**2 * d.leverage / (1 - d.leverage) / d.a.shape[1]
            student = std * fit.sigma / sigma
        columns = {
            "fitted": fit.fitted().to_numpy(),
            "residual": fit.residuals().to_numpy(),
            "std_residual": std,
            "student_residual": student,
            "leverage": d.leverage,
            "leverage_fixed": d.leverage_fixed,
            "cooks_d": std**2 * np.sum(d.a**2, axis=1) / left / d.a.shape[1],
            "cooks_d_conditional": conditional,
            "covratio": d.s / left,
            "sigma": sigma,
        }
        return pd.DataFrame(columns, index=fit.model.design.rows)

    # -- groups ---------------------------------------------------------------------------------

    def groups(self, group: Any = None) -> pd.DataFrame:
        """What leaving out each group does.

        Parameters
        ----------
        group : str or array (n_obs,), optional
            A grouping factor, the subject of the residual structure, a column of the fixed part, or
            a label for each row used. May be left out where the model has one grouping factor, or
            none beside the residual subject.

        Returns
        -------
        DataFrame
            Index level; ``n_rows cooks_d mdffits covtrace covratio sigma``, and for refits the
            variance parameters without the group under lme4's names and ``status``. NaN where a
            coefficient is not estimable without the group.
        """
        import pandas as pd

        index, d, refits = self._deleted(group)
        delta, V = d.delta, d.inverse
        p = delta.shape[1]
        sigma = d.sigma(self.fit.sigma, _nu(self.fit))
        if refits is not None:
            delta = np.linalg.solve(d.root, (self.fit._beta - refits.beta).T).T
            half = np.linalg.solve(d.root, refits.vcov)
            V = np.linalg.solve(d.root, np.swapaxes(half, 1, 2))
            sigma = refits.sigma
        frame = pd.DataFrame({"n_rows": d.n}, index=index)
        frame["cooks_d"] = np.sum(delta**2, axis=1) / p
        frame["mdffits"] = _quadratic(V, delta) / p
        frame["covtrace"] = np.abs(np.trace(V, axis1=1, axis2=2) - p)
        with np.errstate(invalid="ignore"):  # NaN where not estimable
            frame["covratio"] = np.linalg.det(V)
        frame["sigma"] = sigma
        return frame if refits is None else refits.describe(frame)

    def beta(self, group: Any = None) -> pd.DataFrame:
        """β̂ without each group: levels by coefficients."""
        return self._frame(group, self.fit._beta - self._shift(group))

    def dfbeta(self, group: Any = None) -> pd.DataFrame:
        """β̂ less β̂ without each group (as R's ``dfbeta`` of ``lm``): levels by coefficients.

        ``group="rows"`` is about single rows.
        """
        return self._frame(group, self._shift(group))

    def dfbetas(self, group: Any = None) -> pd.DataFrame:
        """:meth:`dfbeta` over the standard error at the σ̂ without the group.

        Belsley, Kuh and Welsch's limit for a look is 2/√(number of groups).
        """
        sigma = (self.rows() if _is_rows(group) else self.groups(group))["sigma"].to_numpy()
        unit = np.sqrt(np.diag(self.fit._unscaled_vcov))
        return self._frame(group, self._shift(group) / (sigma[:, None] * unit))

    def _shift(self, group: Any) -> np.ndarray:
        if _is_rows(group):
            return self._rows.dfbeta()
        _, d, refits = self._deleted(group)
        return d.dfbeta if refits is None else self.fit._beta - refits.beta

    def _frame(self, group: Any, values: np.ndarray) -> pd.DataFrame:
        import pandas as pd

        index = self.fit.model.design.rows if _is_rows(group) else self._deleted(group)[0]
        return pd.DataFrame(values, index=index, columns=list(self.fit.model.design.x_names))

    def _deleted(self, group: Any) -> tuple[pd.Index, deletion.Deletion, Refits | None]:
        """Labels, deletions at fixed θ, and refits if asked for; made once for each factor."""
        named = group is None or isinstance(group, str)
        if named and (group or "") in self._made:
            return self._made[group or ""]
        index, codes = self._codes(group)
        d = deletion.groups(self.fit, codes, len(index))
        refits = None
        if self.refit:
            from lmmjax.inference.refits import without_groups

            refits = without_groups(self.fit, codes, len(index))
        if named:
            self._made[group or ""] = index, d, refits
        return index, d, refits

    def _codes(self, group: Any) -> tuple[pd.Index, np.ndarray]:
        import pandas as pd

        deletion.check(self.fit)
        design, name = self.fit.model.design, group
        terms, residual = {t.group: t for t in design.terms}, design.residual
        subject = residual.subject_name if residual is not None and residual.correlated else None
        if group is None and not terms and subject:
            name = group = subject
        if group is None or (isinstance(group, str) and group in terms):
            name, levels, _ = self.fit._group(group)
            return pd.Index(levels, name=name), terms[name].codes
        if residual is not None and isinstance(group, str) and group == subject:
            return pd.Index(residual.subjects, name=name), residual.subject
        if isinstance(group, str) and group not in design.columns:
            raise DataError(
                f"group={group!r} is neither a grouping factor nor a column of the fixed part; "
                f"expected one of {[*terms, *design.columns]} or a label for each row used."
            )
        labels = np.asarray(design.columns[group] if isinstance(group, str) else group)
        if labels.shape != (design.n,):
            raise DataError(
                f"group has shape {labels.shape}; expected a label for each of the {design.n} rows."
            )
        found, codes = np.unique(labels.astype(str), return_inverse=True)
        return pd.Index(found, name=name if isinstance(name, str) else "group"), codes.ravel()

    # -- pictures -------------------------------------------------------------------------------

    def plot(self, group: Any = None) -> Any:
        """Cook's distance by group, largest first, and DFBETAS of each coefficient; Axes."""
        from lmmjax import diagnostic_plots as plots

        return plots.influence(self.groups(group), self.dfbetas(group))

    def plot_leverage(self, ax: Any = None) -> Any:
        """Standardised residuals against leverage, the largest Cook's distances named; Axes."""
        from lmmjax import diagnostic_plots as plots

        return plots.leverage(self.rows(), ax)

    # -- people ---------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {"fit": self.fit, "refit": self.refit, "_made": {}}

    def __repr__(self) -> str:
        from lmmjax.display import influence_page

        return influence_page(self).text()

    def _repr_html_(self) -> str:
        from lmmjax.display import influence_page

        return influence_page(self).html()


def _quadratic(V: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """δ'V⁻¹δ, NaN where V is not finite."""
    known = np.all(np.isfinite(V), axis=(1, 2)) & np.all(np.isfinite(delta), axis=1)
    out = np.full(len(V), np.nan)
    solved = np.linalg.solve(V[known], delta[known][..., None])[..., 0]
    out[known] = np.sum(delta[known] * solved, axis=1)
    return out


def _is_rows(group: Any) -> bool:
    return isinstance(group, str) and group == "rows"


def _nu(fit: Fit) -> float:
    return float(fit.n_obs - (len(fit._beta) if fit.method == "REML" else 0))

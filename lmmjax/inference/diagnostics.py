"""Data and pictures for looking at a fit: quantiles, influence, profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit
    from lmmjax.inference.influence import Influence


class DiagnosticMethods:
    """Diagnostics of a :class:`lmmjax.Fit`; the pictures are Matplotlib Axes."""

    def influence(self, refit: bool = False) -> Influence:
        """Leverage, Cook's distances, and the estimates without each row or group.

        Parameters
        ----------
        refit : bool
            Groups are left out by refits of all parameters, residual ones included, in one batch;
            by default θ and φ are kept, and the results are those of a refit of β and σ there.

        Returns
        -------
        lmmjax.inference.influence.Influence
            ``.rows()``, ``.groups(group)``, ``.beta(group)``, ``.dfbeta(group)``,
            ``.dfbetas(group)``, ``.plot(group)``.

        Notes
        -----
        One pass over the rows; nothing of size n x n or q x q for nested factors. For linear models
        these are R's ``hatvalues``, ``cooks.distance``, ``dfbetas``, ``rstudent``.

        Examples
        --------
        >>> import lmmjax as lmm
        >>> fit = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff")).fit()
        >>> fit.influence().groups("Batch")["cooks_d"].round(3).tolist()
        [0.054, 0.0, 0.142, 0.093, 0.56, 0.352]
        """
        from lmmjax.inference.influence import Influence

        return Influence(cast("Fit", self), bool(refit))

    def qq(self, group: str | None = None, *, kind: str = "pearson") -> pd.DataFrame:
        """Normal quantiles of the residuals, or of the BLUPs of a grouping factor.

        Parameters
        ----------
        group : str, optional
            A grouping factor; residuals without.
        kind : {"pearson", "normalized", "response"}
            Of the residuals, see :meth:`lmmjax.Fit.residuals`.

        Returns
        -------
        DataFrame
            Sorted. For residuals ``theoretical residual`` on the row labels. For BLUPs ``level term
            theoretical blup standardised``, term by term: BLUPs over √(Var(b) - Var(b | y)), the SD
            that they have given β and θ, so that levels with few rows are not taken for normal
            because they are shrunk; NaN where the variance is estimated as 0.

        Notes
        -----
        Plotting positions (i - a)/(n + 1 - 2a), a = 3/8 up to 10 values, 1/2 beyond (R's
        ``ppoints``).

        Examples
        --------
        >>> import lmmjax as lmm
        >>> fit = lmm.Model("Yield ~ 1 + (1 | Batch)", lmm.load_dataset("Dyestuff")).fit()
        >>> fit.qq("Batch")["level"].tolist()
        ['F', 'D', 'A', 'B', 'C', 'E']
        """
        fit = cast("Fit", self)
        return (
            quantiles_of_residuals(fit, kind) if group is None else quantiles_of_blups(fit, group)
        )

    # -- pictures ---------------------------------------------------------------------------------

    def plot_residuals(self, ax: Any = None) -> Any:
        """Conditional Pearson residuals against fitted values, with a running mean."""
        from lmmjax import diagnostic_plots as plots

        return plots.residuals(*self._pairs(), ax)

    def plot_scale_location(self, ax: Any = None) -> Any:
        """√|Pearson residual| against fitted values: level if the variance is constant."""
        from lmmjax import diagnostic_plots as plots

        return plots.scale_location(*self._pairs(), ax)

    def plot_qq(self, group: str | None = None, *, kind: str = "pearson", ax: Any = None) -> Any:
        """Normal quantiles of the residuals, or of the standardised BLUPs, a panel a term."""
        from lmmjax import diagnostic_plots as plots

        frame = self.qq(group, kind=kind)
        return plots.qq_residuals(frame, ax) if group is None else plots.qq_blups(frame, group)

    def plot_diagnostics(self) -> Any:
        """Residuals, their quantiles, scale and leverage: four Axes, as R's ``plot`` of ``lm``."""
        from lmmjax import diagnostic_plots as plots

        return plots.four(self)

    def plot_profile(self, parm: Any = None, **options: Any) -> Any:
        """Profile ζ of each parameter: straight where the normal approximation holds.

        Parameters
        ----------
        parm, **options
            As of :meth:`lmmjax.Fit.profile`.
        """
        from lmmjax import diagnostic_plots as plots

        return plots.zeta(cast("Fit", self).profile(parm, **options))

    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        fit = cast("Fit", self)
        return fit.fitted().to_numpy(), fit.residuals(kind="pearson").to_numpy()


def normal_quantiles(n: int) -> np.ndarray:
    """Normal quantiles at R's ``ppoints``, ascending, (n,)."""
    from scipy import special

    a = 3 / 8 if n <= 10 else 0.5
    return special.ndtri((np.arange(1, n + 1) - a) / (n + 1 - 2 * a))


def quantiles_of_residuals(fit: Fit, kind: str) -> pd.DataFrame:
    """The table of ``Fit.qq()``."""
    values = fit.residuals(kind=kind).sort_values(kind="stable")
    frame = values.to_frame("residual")
    frame.insert(0, "theoretical", normal_quantiles(len(values)))
    return frame


def quantiles_of_blups(fit: Fit, group: str) -> pd.DataFrame:
    """The table of ``Fit.qq(group)``."""
    import pandas as pd

    blups = fit.ranef(group)
    own = [k for k, t in enumerate(fit.model.design.terms) if t.group == group]
    covs = fit._term_covs()
    prior = np.concatenate([np.diag(covs[k]) for k in own])
    left = prior - np.einsum("jss->js", fit.ranef_cov(group))
    real = left > 1e-12 * np.maximum(prior, np.finfo(float).tiny)
    sd = np.where(real, np.sqrt(np.where(real, left, 1.0)), np.nan)
    parts = []
    for s, term in enumerate(blups.columns):
        b = blups[term].to_numpy()
        scaled = b / sd[:, s]
        order = np.argsort(np.where(np.isfinite(scaled), scaled, b), kind="stable")
        parts.append(
            pd.DataFrame(
                {
                    "level": blups.index.to_numpy()[order],
                    "term": term,
                    "theoretical": normal_quantiles(len(b)),
                    "blup": b[order],
                    "standardised": scaled[order],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)

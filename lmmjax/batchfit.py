"""The result of a batch: tidy frames over all items, statuses, contrasts, files.

Items are responses or data sets; arrays carry them as first axis, in the units of the data. Nothing
here knows the likelihood.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmmjax import batch, components
from lmmjax.errors import DataError, LmmError
from lmmjax.satterthwaite import degrees
from lmmjax.tables import check_level, missing_as_nan

if TYPE_CHECKING:
    import os

    import pandas as pd

    from lmmjax.fit import Fit

#: rows of the coefficient table that a print shows
SHOWN = 6

DF_METHODS = ("satterthwaite", "residual", "wald")


def check_df(df: str) -> str:
    """Refuse methods of degrees of freedom that a batch does not have."""
    if df not in DF_METHODS:
        raise LmmError(
            f"df={df!r} is unknown to a batch; expected one of {', '.join(map(repr, DF_METHODS))}. "
            "The single fit of an item, batch[i], may have it."
        )
    return df


class TermLabels(NamedTuple):
    """Labels of one random-effects term."""

    group: str
    names: tuple[str, ...]
    cov: str


class Arrays(NamedTuple):
    """Estimates of m items in the units of the data; the item is the first axis.

    A coefficient that an item does not have (no such level, a dependent column) is NaN.
    """

    n_obs: np.ndarray  # (m,)
    p: np.ndarray  # (m,) fixed effects that the item has
    beta: np.ndarray  # (m, p)
    vcov: np.ndarray  # (m, p, p)
    dvcov: np.ndarray  # (m, p, p, n_theta) along the profile, in the optimiser's θ
    hessian: np.ndarray  # (m, n_theta, n_theta) of the profiled criterion in the same θ
    covs: tuple[np.ndarray, ...]  # per term (m, S, S)
    sigma: np.ndarray  # (m,)
    loglik: np.ndarray  # (m,)
    n_evals: np.ndarray  # (m,)
    status: np.ndarray  # (m,) keys of batch.WORDS
    retried: np.ndarray  # (m,) bool
    residual: np.ndarray  # (m, r) parameters of the residual structure as reported


def concatenate(parts: list[Arrays]) -> Arrays:
    """Join items in order."""
    covs = tuple(np.concatenate(c) for c in zip(*(a.covs for a in parts), strict=True))
    joined = {
        name: np.concatenate([getattr(a, name) for a in parts])
        for name in Arrays._fields
        if name != "covs"
    }
    return Arrays(covs=covs, **joined)


def take(arrays: Arrays, order: np.ndarray) -> Arrays:
    """Items in another order."""
    flat = {name: getattr(arrays, name)[order] for name in Arrays._fields if name != "covs"}
    return Arrays(covs=tuple(c[order] for c in arrays.covs), **flat)


def put(arrays: Arrays, i: int, one: Arrays) -> Arrays:
    """Another estimate in the place of item ``i``."""

    def replaced(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        out = np.array(old)
        out[i] = new[0]
        return out

    flat = {
        name: replaced(getattr(arrays, name), getattr(one, name))
        for name in Arrays._fields
        if name != "covs"
    }
    return Arrays(covs=tuple(map(replaced, arrays.covs, one.covs)), **flat)


def missing_items(m: int, like: Arrays, status: int) -> Arrays:
    """``m`` items without a fit."""

    def blank(a: np.ndarray) -> np.ndarray:
        shape = (m, *a.shape[1:])
        return np.full(shape, np.nan) if a.dtype.kind == "f" else np.zeros(shape, a.dtype)

    flat = {name: blank(getattr(like, name)) for name in Arrays._fields if name != "covs"}
    flat["status"] = np.full(m, status, np.int8)
    return Arrays(covs=tuple(map(blank, like.covs)), **flat)


@dataclass(frozen=True, eq=False)
class BatchFit:
    """Many fits of one formula; made by :func:`lmmjax.fit_many` and :func:`lmmjax.fit_groups`.

    ``batch[i]`` refits item ``i`` alone and returns its full :class:`lmmjax.Fit`.

    Attributes
    ----------
    formula, method, df : str
    items : Index
        Labels of the items.
    x_names : tuple of str
        Fixed effects under R's names.
    terms : tuple of TermLabels
    arrays : Arrays
        All estimates, the item as first axis.
    seconds : float
    notes : tuple of str
        What the reader should know: interruption, stateful transforms ...
    residual : str or None
        The residual structure.
    residual_names : tuple of str
        Its parameters.
    """

    formula: str
    method: str
    df: str
    items: pd.Index
    x_names: tuple[str, ...]
    terms: tuple[TermLabels, ...]
    arrays: Arrays
    seconds: float
    notes: tuple[str, ...] = ()
    residual: str | None = None
    residual_names: tuple[str, ...] = ()
    _single: Callable[[int], Fit] | None = field(default=None, repr=False)

    # -- counts ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.items)

    @property
    def n_failed(self) -> int:
        """Items without a usable fit."""
        return int(np.sum(self.arrays.status > batch.SINGULAR))

    @property
    def n_singular(self) -> int:
        """Items with a variance component or correlation on the boundary."""
        return int(np.sum(self.arrays.status == batch.SINGULAR))

    @property
    def n_retried(self) -> int:
        """Items that were tried again from other starts."""
        return int(np.sum(self.arrays.retried))

    @cached_property
    def status(self) -> pd.DataFrame:
        """One row an item: ``status converged singular retried n_evals n_obs loglik sigma``."""
        import pandas as pd

        a = self.arrays
        columns = {
            "status": pd.Categorical.from_codes(a.status.astype(int), list(batch.WORDS.values())),
            "converged": a.status <= batch.SINGULAR,
            "singular": a.status == batch.SINGULAR,
            "retried": a.retried,
            "n_evals": a.n_evals,
            "n_obs": a.n_obs,
            "loglik": self._masked(a.loglik),
            "sigma": self._masked(a.sigma),
        }
        return pd.DataFrame(columns, index=self.items)

    @property
    def loglik(self) -> pd.Series:
        """(Restricted) log-likelihood by item, NaN where the fit failed."""
        return self.status["loglik"]

    def _masked(self, values: np.ndarray) -> np.ndarray:
        usable = self.arrays.status <= batch.SINGULAR
        return np.where(usable.reshape(-1, *[1] * (values.ndim - 1)), values, np.nan)

    # -- fixed effects ----------------------------------------------------------------------------

    def coef_table(
        self,
        df: str | None = None,
        level: float = 0.95,
        adjust: str = "none",
        term: str | list[str] | None = None,
    ) -> pd.DataFrame:
        """Tests of every coefficient of every item, item by item.

        Parameters
        ----------
        df : {"satterthwaite", "residual", "wald"}, optional
            Default: that of the batch.
        level : float
        adjust : {"none", "holm", "bh"}
            Over the items, for each coefficient: Holm (family-wise error rate) or Benjamini and
            Hochberg (false discovery rate); adds ``p_adjusted``.
        term : str or list of str, optional
            Coefficients to show; all by default.

        Returns
        -------
        DataFrame
            Columns ``item term estimate std_error df statistic p_value ci_low ci_high``.

        Notes
        -----
        O(m p² n_theta).
        """
        wanted = self._terms(term)
        L = np.eye(len(self.x_names))[[self.x_names.index(name) for name in wanted]]
        return self._tests(L, wanted, "term", np.zeros(len(L)), df, level, adjust)

    def _terms(self, term: str | list[str] | None) -> list[str]:
        wanted = list(self.x_names) if term is None else [term] if isinstance(term, str) else term
        unknown = [name for name in wanted if name not in self.x_names]
        if unknown:
            raise DataError(f"term names {unknown}; expected some of {list(self.x_names)}.")
        return wanted

    def contrasts(
        self,
        L: Any,
        rhs: Any = 0.0,
        df: str | None = None,
        level: float = 0.95,
        adjust: str = "none",
    ) -> pd.DataFrame:
        """t-tests of linear combinations L β = rhs, for all items at once.

        Parameters
        ----------
        L : dict or array
            ``{"label": {"Days": 1, "(Intercept)": 2}}``, or (r, p) in the order of ``x_names``.
        rhs : float or (r,) array
        df, level, adjust
            As in :meth:`coef_table`.

        Returns
        -------
        DataFrame
            Columns ``item contrast estimate std_error df statistic p_value ci_low ci_high``; an
            item that lacks one of the coefficients has NaN.
        """
        matrix, labels = self._matrix(L)
        values = np.broadcast_to(np.asarray(rhs, float), (len(matrix),))
        return self._tests(matrix, labels, "contrast", values, df, level, adjust)

    def _matrix(self, L: Any) -> tuple[np.ndarray, list[str]]:
        if isinstance(L, dict):
            rows = [self._row(weights) for weights in L.values()]
            return np.array(rows), [str(label) for label in L]
        matrix = np.atleast_2d(np.asarray(L, float))
        if matrix.shape[1] != len(self.x_names):
            raise DataError(
                f"L has {matrix.shape[1]} columns; expected {len(self.x_names)}, one for each of "
                f"{list(self.x_names)}."
            )
        return matrix, [f"L{i + 1}" for i in range(len(matrix))]

    def _row(self, weights: Any) -> np.ndarray:
        if not isinstance(weights, dict):
            raise DataError(
                f"found {weights!r} for a contrast; expected weights by name, such as "
                f"{{{self.x_names[0]!r}: 1}}."
            )
        self._terms(list(weights))
        return np.array([float(weights.get(name, 0.0)) for name in self.x_names])

    def _tests(
        self,
        L: np.ndarray,
        labels: list[str],
        kind: str,
        rhs: np.ndarray,
        df: str | None,
        level: float,
        adjust: str,
    ) -> pd.DataFrame:
        import pandas as pd
        from scipy import special

        estimate, se, nu = self._linear(L, rhs, self.df if df is None else df)
        with np.errstate(invalid="ignore", divide="ignore"):
            statistic = (estimate - rhs) / se
        half = special.stdtrit(nu, 0.5 + check_level(level) / 2) * se
        p_value = 2 * special.stdtr(nu, -np.abs(statistic))
        columns = {
            "estimate": estimate,
            "std_error": se,
            "df": nu,
            "statistic": statistic,
            "p_value": p_value,
            "ci_low": estimate - half,
            "ci_high": estimate + half,
        }
        if adjust != "none":
            columns["p_adjusted"] = adjusted(p_value, adjust)
        m, r = estimate.shape
        frame = pd.DataFrame({name: values.ravel() for name, values in columns.items()})
        frame.insert(0, kind, pd.Categorical(np.tile(labels, m), labels))
        frame.insert(0, "item", self.items.repeat(r))
        return frame

    def _linear(
        self, L: np.ndarray, rhs: np.ndarray, df: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Estimates, standard errors and df of L β, (m, r) each."""
        check_df(df)
        a = self.arrays
        lacking = np.isnan(self._masked(a.beta))  # (m, p)
        touched = (lacking @ (L != 0).T) > 0
        known = np.where(lacking, 0.0, a.beta)
        V, dV = np.nan_to_num(self._vcov), np.nan_to_num(a.dvcov)
        variance = np.einsum("ri,mij,rj->mr", L, V, L, optimize=True)
        hide: Any = lambda x: np.where(touched, np.nan, x)  # noqa: E731
        if df == "satterthwaite":
            nu_sigma = a.n_obs - (a.p if self.method == "REML" or self._is_linear else 0)
            hessian = np.where(np.isfinite(a.hessian), a.hessian, 0.0)
            with np.errstate(invalid="ignore", divide="ignore"):
                nu = degrees(L, V, dV, hessian, nu_sigma)
        else:
            nu = np.broadcast_to((a.n_obs - a.p)[:, None].astype(float), variance.shape)
            nu = np.full_like(variance, np.inf) if df == "wald" else nu
        return hide(known @ L.T), hide(np.sqrt(variance)), hide(nu)

    @property
    def _is_linear(self) -> bool:
        return not self.terms and self.residual is None

    @property
    def _vcov(self) -> np.ndarray:
        """Covariances of the fixed effects; with RSS/(n - p) in linear models, as ``Fit.vcov``."""
        a = self.arrays
        if not self._is_linear or self.method == "REML":
            return a.vcov
        with np.errstate(divide="ignore"):
            more = np.where(a.n_obs > a.p, a.n_obs / (a.n_obs - a.p), np.nan)
        return a.vcov * more[:, None, None]

    def vcov(self, item: Any) -> pd.DataFrame:
        """Covariance of the fixed effects of one item."""
        import pandas as pd

        names = list(self.x_names)
        return pd.DataFrame(self._vcov[self._place(item)], index=names, columns=names)

    # -- variance components ----------------------------------------------------------------------

    def varcorr(self) -> pd.DataFrame:
        """Variance components of every item, as ``Fit.varcorr`` with a column ``item``.

        Returns
        -------
        DataFrame
            Columns ``item group term1 term2 vcov sdcor``.
        """
        import pandas as pd

        rows: list[tuple[str, str | None, str | None]] = []
        vcov, sdcor = [], []
        for t, cov in zip(self.terms, map(self._masked, self.arrays.covs), strict=True):
            variance = np.maximum(np.diagonal(cov, axis1=1, axis2=2), 0.0)
            sd = np.sqrt(variance)
            for i, j in components.varcorr_places(len(t.names)):
                rows.append((t.group, t.names[i], None if i == j else t.names[j]))
                vcov.append(cov[:, i, j])
                with np.errstate(invalid="ignore", divide="ignore"):
                    sdcor.append(sd[:, i] if i == j else cov[:, i, j] / (sd[:, i] * sd[:, j]))
        sigma = self._masked(self.arrays.sigma)
        rows.append(("Residual", None, None))
        vcov.append(sigma**2)
        sdcor.append(sigma)
        m, k = len(self), len(rows)
        frame = missing_as_nan(pd.DataFrame(rows * m, columns=["group", "term1", "term2"]))
        frame.insert(0, "item", self.items.repeat(k))
        frame["vcov"], frame["sdcor"] = np.stack(vcov, 1).ravel(), np.stack(sdcor, 1).ravel()
        return frame

    def components(self) -> pd.DataFrame:
        """SDs, correlations, σ and residual parameters in a wide frame: a row an item, lme4's names
        and those of ``Fit.residual_params`` as columns."""
        import pandas as pd

        own = components.values(self.terms, self.arrays.covs, self.arrays.sigma)
        values = np.concatenate([own, self.arrays.residual], axis=1)
        names = [*components.names(self.terms), *self.residual_names]
        return pd.DataFrame(self._masked(values), index=self.items, columns=names)

    def residual_params(self) -> pd.DataFrame:
        """Parameters of the residual structure of every item, as ``Fit.residual_params``.

        Returns
        -------
        DataFrame
            Columns ``item parameter estimate``; NaN where an item does not have the parameter (a
            level or position that its data lack).
        """
        import pandas as pd

        m, r = self.arrays.residual.shape
        frame = pd.DataFrame({"estimate": self._masked(self.arrays.residual).ravel()})
        names = list(self.residual_names)
        frame.insert(0, "parameter", pd.Categorical(np.tile(np.array(names, object), m), names))
        frame.insert(0, "item", self.items.repeat(r))
        return frame

    # -- one item ---------------------------------------------------------------------------------

    def _place(self, item: Any) -> int:
        """Position of an item given its position or its label."""
        if isinstance(item, int | np.integer) and not isinstance(item, bool):
            if not -len(self) <= item < len(self):
                raise IndexError(f"item {item} of {len(self)}")
            return int(item) % len(self)
        found = np.flatnonzero(self.items == item)
        if len(found) != 1:
            raise DataError(
                f"found {len(found)} items labelled {item!r}; expected one. Labels are in .items; "
                "an integer is a position."
            )
        return int(found[0])

    def __getitem__(self, item: Any) -> Fit:
        """Full :class:`lmmjax.Fit` of one item, by position (an integer) or label."""
        place = self._place(item)
        if self._single is None:
            raise LmmError(
                "the data of this batch were not kept (a stream of blocks, or results read from a "
                "file); fit the item with lmmjax.Model."
            )
        return self._single(place)

    # -- files ------------------------------------------------------------------------------------

    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Write everything but the data to a Parquet file, one row an item.

        Returns
        -------
        pathlib.Path
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        labels = _labels_table(self.items)
        columns: dict[str, Any] = dict(zip(labels.column_names, labels.columns, strict=True))
        shapes: dict[str, list[int]] = {}
        for name, values in self._flat().items():
            shapes[name] = list(values.shape[1:])
            columns[name] = _column(values)
        head = {
            "formula": self.formula,
            "method": self.method,
            "df": self.df,
            "x_names": self.x_names,
            "terms": self.terms,
            "seconds": self.seconds,
            "notes": self.notes,
            "names": list(self.items.names),
            "labels": labels.schema.metadata[b"pandas"].decode(),
            "shapes": shapes,
            "residual": self.residual,
            "residual_names": self.residual_names,
        }
        table = pa.table(columns).replace_schema_metadata({"lmmjax": json.dumps(head)})
        pq.write_table(table, path)
        return Path(path)

    def _flat(self) -> dict[str, np.ndarray]:
        out = {name: getattr(self.arrays, name) for name in Arrays._fields if name != "covs"}
        return out | {f"cov_{k}": c for k, c in enumerate(self.arrays.covs)}

    @classmethod
    def from_parquet(cls, path: str | os.PathLike[str]) -> BatchFit:
        """Read what :meth:`to_parquet` wrote; ``[i]`` needs the data and raises."""
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        meta = (table.schema.metadata or {}).get(b"lmmjax")
        if meta is None:
            raise DataError(
                f"{str(path)!r} was not written by BatchFit.to_parquet; expected its metadata."
            )
        head = json.loads(meta)
        flat = {
            name: _array(table[name], [len(table), *shape])
            for name, shape in head["shapes"].items()
        }
        covs = tuple(flat.pop(f"cov_{k}") for k in range(len(head["terms"])))
        return cls(
            formula=head["formula"],
            method=head["method"],
            df=head["df"],
            items=_labels(table, head["names"], head["labels"]),
            x_names=tuple(head["x_names"]),
            terms=tuple(TermLabels(g, tuple(n), c) for g, n, c in head["terms"]),
            arrays=Arrays(covs=covs, **flat),
            seconds=head["seconds"],
            notes=tuple(head["notes"]),
            residual=head["residual"],
            residual_names=tuple(head["residual_names"]),
        )

    # -- people -----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "status"}

    def __repr__(self) -> str:
        counts = self.status["status"].value_counts()
        structure = f", residual {self.residual}" if self.residual else ""
        lines = [
            f"{len(self)} fits of {self.formula}{structure} by {self.method}",
            *(f"  {count:>8}  {word}" for word, count in counts.items() if count),
        ]
        if self.n_retried:
            lines.append(f"  {self.n_retried:>8}  of them tried again from other starts")
        lines += [f"note: {note}" for note in self.notes]
        table = self.coef_table()
        lines += ["", str(table.head(SHOWN).to_string(index=False))]
        if len(table) > SHOWN:
            lines.append(f"... and {len(table) - SHOWN} more rows: coef_table()")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from lmmjax.display import preformatted

        return preformatted(repr(self))


def _labels_table(items: pd.Index) -> Any:
    """Labels of the items with their types, a column a level: ``item``, or ``item_0 item_1 ...``"""
    import pandas as pd
    import pyarrow as pa

    levels = [items.get_level_values(k) for k in range(items.nlevels)]
    frame = pd.DataFrame(dict(zip(_label_names(items.nlevels), levels, strict=True)))
    try:
        return pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"found labels of items of several types, which a Parquet column cannot hold ({error});"
            " expected one type. Rename the responses, or write coef_table() instead."
        ) from error


def _label_names(n: int) -> list[str]:
    return ["item"] if n == 1 else [f"item_{k}" for k in range(n)]


def _labels(table: Any, names: list[Any], types: str) -> pd.Index:
    """What :func:`_labels_table` made of them."""
    import pandas as pd

    some = table.select(_label_names(len(names))).replace_schema_metadata({"pandas": types})
    frame = some.to_pandas()
    levels = [frame[name] for name in frame]
    if len(names) == 1:
        return pd.Index(levels[0], name=names[0])
    return pd.MultiIndex.from_arrays(levels, names=names)


def _column(values: np.ndarray) -> Any:
    """An array (m, ...) as a column, of fixed-size lists where it has more axes."""
    import pyarrow as pa

    if values.ndim == 1:
        return pa.array(values)
    width = int(np.prod(values.shape[1:]))
    if width == 0:
        return pa.nulls(len(values))
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width)


def _array(column: Any, shape: list[int]) -> np.ndarray:
    if len(shape) == 1:
        return column.to_numpy()
    if 0 in shape[1:]:
        return np.zeros(shape)
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(shape)


def adjusted(p_values: np.ndarray, method: str) -> np.ndarray:
    """Adjust each column of p-values over its rows; NaN stays and does not count.

    Parameters
    ----------
    p_values : (m, r)
    method : {"holm", "bh"}
        ``"fdr"`` is R's other name of ``"bh"``.

    References
    ----------
    Holm (1979), Scand. J. Statist. 6; Benjamini and Hochberg (1995), J. R. Stat. Soc. B 57.

    Examples
    --------
    >>> adjusted(np.array([[0.01], [0.04], [0.03]]), "holm").ravel().round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    method = "bh" if method == "fdr" else method
    if method not in ("holm", "bh"):
        raise LmmError(f"adjust={method!r} is unknown; expected 'none', 'holm' or 'bh'.")
    out = np.full_like(p_values, np.nan)
    for j, column in enumerate(p_values.T):
        known = np.flatnonzero(np.isfinite(column))
        order = known[np.argsort(column[known], kind="stable")]
        m, rank = len(order), np.arange(1, len(order) + 1)
        if method == "holm":
            steps = np.maximum.accumulate(column[order] * (m - rank + 1))
        else:
            steps = np.minimum.accumulate((column[order] * m / rank)[::-1])[::-1]
        out[order, j] = np.minimum(steps, 1.0)
    return out

r"""``fit_groups``: one formula, many data sets, ragged, a few compiled programs.

The formula is evaluated once on the whole table. Cross-products of all data sets are summed without
a loop over them (assemble.py) and padded to a few bucket sizes; each bucket is one batch. Data sets
that lack a level of a fixed factor, or have dependent columns, form buckets with the columns that
they have. With residual parameters each data set has a source of whitened rows, and these are
padded (residual/ragged.py).
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax import assemble, batch
from lmmjax.assemble import ItemUnits, Stack
from lmmjax.batchfit import (
    Arrays,
    BatchFit,
    TermLabels,
    check_df,
    concatenate,
    missing_items,
    put,
    take,
)
from lmmjax.design import Design, check_terms, design_and_residual
from lmmjax.errors import DataError, DesignError, FormulaError, ResidualWarning
from lmmjax.expr import names_in
from lmmjax.formula import parse
from lmmjax.gram import EXACT_FIT, Units, plan, standardise
from lmmjax.many import _bar, _model, _rows, at_a_time, check_chunk, check_devices, with_columns
from lmmjax.model import check_method, known_variances
from lmmjax.precision import in_float64
from lmmjax.rank import independent_columns
from lmmjax.residual import ragged
from lmmjax.residual.frame import build
from lmmjax.residual.language import ResidualSpec, parse_residual
from lmmjax.residual.source import Patterns, Rows
from lmmjax.residual.structures import CompoundSymmetry, Structure
from lmmjax.start import identity
from lmmjax.table import Table, check_index
from lmmjax.variables import take_rows

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit

#: eigenvalues of an item's centred and scaled X'X below this are looked at closely
NEARLY = 1e-9

#: free ρ of compound symmetry below which it lies within 1 % of its range from the bound
NEAR = -4.0

#: data sets fitted at a time at most
MOST = 4096


@in_float64
def fit_groups(
    formula: str,
    data: Any,
    by: str | list[str],
    *,
    method: str = "REML",
    df: str | None = None,
    residual: str | None = None,
    weights: Any = None,
    offset: Any = None,
    contrasts: dict[str, str] | None = None,
    missing: str = "drop",
    chunk: int | None = None,
    mesh: Any = None,
    progress: bool = False,
) -> BatchFit:
    """Fit one formula to many data sets: a model for each value of ``by``.

    Parameters
    ----------
    formula : str
    data : table
        All data sets, one below the other, in any order.
    by : str or list of str
        Columns whose values tell the data sets apart; several give items that are tuples.
    method, df, residual, weights, offset, contrasts, missing
        As :class:`lmmjax.Model`; weights may differ from data set to data set, and subjects and
        positions of the residual structure count within a data set. One that the structure does
        not fit (a position twice, one level of varident) fails and is told in ``notes``.
    chunk : int, optional
        Data sets at a time; 4,096 by default, fewer where their blocks are large.
    mesh : jax.sharding.Mesh, optional
        Devices to share the items among.
    progress : bool
        Show a progress bar.

    Returns
    -------
    BatchFit
        Items in level order. A data set that lacks a level of a fixed factor has NaN for that
        coefficient, as a fit of it alone would leave it out. An interrupt (Ctrl-C) returns what was
        fitted so far, with a note.

    Raises
    ------
    FormulaError, DataError, DesignError

    Notes
    -----
    The columns of ``by`` are constant within a data set. Fixed terms with them repeat others there,
    and get NaN or take the place of what they repeat, which ``notes`` tells; a grouping factor of
    them alone is refused.

    Transforms that learn from the data (``poly``, ``scale``, splines) and the levels of factors are
    those of the whole table, so that coefficients mean the same in every item.

    Levels are padded to 8 times a power of 4 (of 2 above 4,096 data sets), or all to one size where
    there is little to do; each size is a compiled program.

    Examples
    --------
    >>> import lmmjax as lmm
    >>> data = lmm.load_dataset("Machines")
    >>> batch = lmm.fit_groups("score ~ 1 + (1 | Worker)", data, by="Machine")
    >>> batch.coef_table()[["item", "estimate"]].round(2).values.tolist()
    [['A', 52.36], ['B', 60.32], ['C', 66.27]]
    """
    began = time.perf_counter()
    method = check_method(method)
    df = None if df is None else check_df(df)
    chunk = check_chunk(chunk, "data sets")
    check_devices(mesh)
    for what, values in (("weights", weights), ("offset", offset)):
        check_index(values, Table(data).rows, what)
    frame, keys = _frame_and_keys(data, by)
    told = _constant_terms(formula, by)
    spec = None if residual is None else parse_residual(residual)
    design, values = design_and_residual(
        formula,
        frame,
        residual=spec,
        weights=known_variances(spec, weights),
        offset=offset,
        contrasts=contrasts,
        missing=missing,
    )
    check_terms(design)
    labels, item = _items(keys, np.asarray(design.rows), by)
    stack, order = _stack(design, item, len(labels))
    columns = kept_columns(stack)
    df = df or ("satterthwaite" if design.terms or values else "residual")
    single = _Single(design, order, stack.item, columns, formula, method, df, spec, values)
    worker: _Worker = _Worker(stack, columns, method, mesh, chunk)
    if values:
        worker = _StructuredWorker(stack, columns, method, mesh, chunk, single, labels)
    arrays, notes = worker.run(progress)
    return BatchFit(
        formula=formula,
        method=method,
        df=df,
        items=labels,
        x_names=tuple(design.x_names),
        terms=tuple(TermLabels(t.group, tuple(t.names), t.cov) for t in design.terms),
        arrays=arrays,
        seconds=time.perf_counter() - began,
        notes=(*told, *notes),
        residual=residual,
        residual_names=tuple(worker.residual_names),
        _single=single,
    )


def _frame_and_keys(data: Any, by: str | list[str]) -> tuple[Any, list[Any]]:
    """The table on positions 0, 1 ..., and its ``by`` columns."""
    import pandas as pd

    from lmmjax.expr import Name

    names = [by] if isinstance(by, str) else list(by)
    if not names:
        raise DataError("found by=[]; expected the name of a column that tells data sets apart.")
    table = Table(data)
    columns = table.read([Name(name) for name in names])
    if isinstance(data, pd.DataFrame):
        data = data.set_axis(pd.RangeIndex(len(data)))
    return data, [columns[name] for name in names]


def _constant_terms(formula: str, by: str | list[str]) -> list[str]:
    """A note if fixed terms read ``by``, which is constant within each data set."""
    names, parsed = {by} if isinstance(by, str) else set(by), parse(formula)
    for bar in parsed.bars:
        if {name.id for factor in bar.factors for name in names_in(factor)} <= names:
            raise FormulaError(
                f"found {bar.text} and by={by!r}: the grouping factor has one level in each data "
                f"set; leave the term out."
            )
    nodes, labels = parsed.terms.nodes, parsed.terms.labels
    constant = [not names.isdisjoint(name.id for name in names_in(node)) for node in nodes]
    pairs = zip(parsed.terms.terms, labels, strict=True)
    found = [label for term, label in pairs if any(constant[v] for v in term)]
    if not found:
        return []
    what = "a term reads" if len(found) == 1 else "terms read"
    return [
        f"{what} by={by!r}, which is constant within each data set: {', '.join(found)}; the "
        "coefficients are NaN or take the place of those that they repeat: leave it out."
    ]


def _items(keys: list[Any], rows: np.ndarray, by: Any) -> tuple[pd.Index, np.ndarray]:
    """Labels of the data sets, and the data set of each row used."""
    import pandas as pd

    used = [k.iloc[rows] for k in keys]
    if any(k.isna().any() for k in used):
        raise DataError(f"found missing values in {by!r}; expected a data set for every row.")
    codes, levels = zip(*(_coded(k) for k in used), strict=True)
    if len(codes) == 1:
        found, item = np.unique(codes[0], return_inverse=True)
        return pd.Index(levels[0][found], name=keys[0].name), item
    joint = np.ravel_multi_index(codes, [len(v) for v in levels])
    found, item = np.unique(joint, return_inverse=True)
    parts = np.unravel_index(found, [len(v) for v in levels])
    arrays = [v[i] for v, i in zip(levels, parts, strict=True)]
    return pd.MultiIndex.from_arrays(arrays, names=[k.name for k in keys]), item


def _coded(key: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    import pandas as pd

    if isinstance(key.dtype, pd.CategoricalDtype):
        return key.cat.codes.to_numpy(), np.asarray(key.cat.categories)
    codes, levels = pd.factorize(key, sort=True)
    return codes, np.asarray(levels)


def _stack(design: Design, item: np.ndarray, m: int) -> tuple[Stack, np.ndarray]:
    """The rows sorted by item, and their order."""
    order = np.argsort(item, kind="stable")
    terms = tuple(dataclasses.replace(t, z=t.z[order], codes=t.codes[order]) for t in design.terms)
    y = (design.y - design.offset if design.has_offset else design.y)[order]
    w = np.asarray(design.weights, float)[order] if design.has_weights else None
    return Stack(item[order], design.X[order], y, w, terms, m), order


@dataclass(frozen=True, eq=False)
class _Single:
    """The ordinary fit of one data set, on the columns that the batch used."""

    design: Design
    order: np.ndarray
    item: np.ndarray
    columns: np.ndarray
    formula: str
    method: str
    df: str
    spec: ResidualSpec | None
    values: dict[str, Any]  # of the variables of the residual structure

    def __call__(self, i: int) -> Fit:
        residual = None if self.spec is None else self.spec.text
        return _model(self.formula, self.piece(i), residual).fit(self.method, df=self.df)

    def piece(self, i: int) -> Design:
        """The design of one data set."""
        a, b = np.searchsorted(self.item, [i, i + 1])
        rows = np.sort(self.order[a:b])
        piece = _rows(self.design, rows, drop_levels=True)
        piece = with_columns(piece, self.columns[i])
        if not self.values:
            return piece
        assert self.spec is not None
        some = {name: take_rows(value, rows) for name, value in self.values.items()}
        found = build(self.spec, some, piece.n, self.design.n_dropped, piece.rows)
        return dataclasses.replace(piece, residual=found)


# -------------------------------------------------------------------------------------------------
# Buckets
# -------------------------------------------------------------------------------------------------


@dataclass
class _Worker:
    """Sorts items into buckets and fits these one after the other."""

    stack: Stack
    columns: np.ndarray  # (m, p) that each item keeps
    method: str
    mesh: Any
    chunk: int | None

    def __post_init__(self) -> None:
        stack = self.stack
        self.residual_names: list[str] = []
        self.n = np.bincount(stack.item, minlength=stack.m)
        self.levels = [assemble.levels_of(stack, t) for t in stack.terms]
        p = self.columns.sum(axis=1)
        fits = self.n > p
        for t, v in zip(stack.terms, self.levels, strict=True):
            fits &= (v.number >= 2) & (v.number * t.z.shape[1] < self.n)
        self.status = np.where(fits, batch.NOT_RUN, batch.TOO_FEW)  # of items without a fit
        self.notes: list[str] = []

    def buckets(self) -> list[tuple[np.ndarray, np.ndarray, int]]:
        """(columns, items, size to pad to) of each bucket, items at most ``chunk``."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        sizes = [self._sizes(v.number) for v in self.levels]
        for i in np.flatnonzero(self.status == batch.NOT_RUN).tolist():
            key = (*self.columns[i].tolist(), *(int(s[i]) for s in sizes))
            groups.setdefault(key, []).append(i)
        out = []
        for key, members in groups.items():
            columns = np.array(key[: self.columns.shape[1]], bool)
            limit = self.chunk or self._chunk(key[self.columns.shape[1] :], int(columns.sum()))
            widest = min(limit, len(members))
            for at in range(0, len(members), limit):
                out.append((columns, np.array(members[at : at + limit]), widest))
        return out

    def _sizes(self, count: np.ndarray) -> np.ndarray:
        """Levels to pad to; one size for all where the work saved would not pay a compilation."""
        if self.stack.m * int(count.max()) <= 2**15:
            count = np.full_like(count, count.max())
        return bucket_size(count, 2 if self.stack.m > MOST else 4)

    def _chunk(self, sizes: tuple[int, ...], p: int) -> int:
        """Data sets at a time: their blocks take a quarter of the free memory."""
        q = [t.z.shape[1] * J for t, J in zip(self.stack.terms, sizes, strict=True)]
        largest = max(q, default=0)
        numbers = (sum(q) - largest + p) * (sum(q) + p) + 4 * largest + 1
        return at_a_time(4 * numbers, MOST)  # made, padded, on the device, results

    def run(self, progress: bool) -> tuple[Arrays, list[str]]:
        """Fit all buckets; items in order."""
        parts, places, notes = [], [], self.notes
        bar = _bar(progress, self.stack.m)
        try:
            for columns, members, widest in self.buckets():
                parts.append(self._fit(columns, members, widest))
                places.append(members)
                bar.update(len(members))
        except KeyboardInterrupt:
            if not parts:
                raise
            notes.append("interrupted; some items were not run")
            warnings.warn(notes[-1], UserWarning, stacklevel=4)
        finally:
            bar.close()
        if not parts:
            raise DataError(
                "found no data set with enough rows and levels for the model; expected more rows "
                "than effects, and two levels of each grouping factor, in at least one. "
                + " ".join(notes)
            )
        rest = np.setdiff1d(np.arange(self.stack.m), np.concatenate(places))
        blank = missing_items(len(rest), parts[0], batch.NOT_RUN)
        parts.append(blank._replace(status=self.status[rest].astype(np.int8), n_obs=self.n[rest]))
        whole = concatenate(parts)
        return take(whole, np.argsort(np.concatenate([*places, rest]), kind="stable")), notes

    def _fit(self, columns: np.ndarray, members: np.ndarray, widest: int) -> Arrays:
        some = self.stack.take(members, np.flatnonzero(columns))
        the_plan, levels = assemble.plan(some)
        sizes = tuple(int(self._sizes(v.number).max()) for v in levels)
        gram, rhs, units = assemble.products(some, the_plan, levels, sizes)
        layout = assemble.padded(the_plan, sizes)
        done = batch.fit_items(
            layout,
            self.method,
            gram,
            rhs,
            shared=False,
            mesh=self.mesh,
            size=widest,
            exact=units.exact,
        )
        return _widened(arrays_of(done, units, self.method), columns)


@dataclass
class _StructuredWorker(_Worker):
    """Data sets with a residual structure: a padded source each."""

    single: _Single
    labels: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        self.made: dict[int, tuple[Rows | Patterns, Units]] = {}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for i in np.flatnonzero(self.status == batch.NOT_RUN).tolist():
                self._make(i)
        for text in dict.fromkeys(str(w.message) for w in told):
            warnings.warn(text, ResidualWarning, stacklevel=5)
        structures = [rows.structure for rows, _ in self.made.values()]
        self.residual_names = list(dict.fromkeys(name for s in structures for name in s.names))
        kinds = dict.fromkeys(map(ragged.kind, structures))
        self.common = {
            k: ragged.Common.of([s for s in structures if ragged.kind(s) == k]) for k in kinds
        }

    def _make(self, i: int) -> None:
        """Source and units of one data set, or a status that says why there are none."""
        try:
            piece = self.single.piece(i)
            standardised = standardise(piece)
        except (DataError, DesignError) as error:
            exact = str(error) == EXACT_FIT
            self.status[i] = batch.EXACT if exact else batch.UNFIT
            if not exact:
                self.notes.append(f"{self.labels[i]}: {error}")
            return
        source = ragged.make_source(piece, plan(piece), standardised)
        self.made[i] = source, standardised.units

    def buckets(self) -> list[tuple[np.ndarray, np.ndarray, int]]:
        """(columns, items, size to pad to): one kind of structure, layout and size."""
        groups: dict[Any, list[int]] = {}
        numbers = {i: ragged.numbers(rows) for i, (rows, _) in self.made.items()}
        # one size where the work saved would not pay a compilation
        apart = max(numbers.values(), default=0) * len(self.made) > 2**24
        for i, (rows, _) in self.made.items():
            layout, sizes = rows.layout, ragged.sizes_of(rows)
            shape = [(t, S) for t, S, _ in (*layout.chain, *layout.core)]
            key = (ragged.kind(rows.structure), *self.columns[i].tolist(), *shape)
            size = [bucket_size(np.array(k), 2) for k in (sizes[0], sizes.rows)]
            key = (*key, type(rows), len(layout.chain), *(map(int, size) if apart else ()))
            groups.setdefault(key, []).append(i)
        out = []
        for members in groups.values():
            most = max(numbers[i] for i in members)
            limit = self.chunk or at_a_time(4 * most, MOST)
            widest = min(limit, len(members))
            for at in range(0, len(members), limit):
                some = np.array(members[at : at + limit])
                out.append((self.columns[some[0]], some, widest))
        return out

    def _fit(self, columns: np.ndarray, members: np.ndarray, widest: int) -> Arrays:
        arrays, phi = self._fit_rows(columns, members, widest, own_range=False)
        family = self.made[int(members[0])][0].structure.family
        if isinstance(family, CompoundSymmetry):
            # ρ near the common bound: the data set's own bound may be lower
            for i in np.flatnonzero(phi[:, 0] < NEAR):
                mine, _ = self._fit_rows(columns, members[i : i + 1], 1, own_range=True)
                arrays = put(arrays, int(i), mine)
        return arrays

    def _fit_rows(
        self, columns: np.ndarray, members: np.ndarray, widest: int, own_range: bool
    ) -> tuple[Arrays, np.ndarray]:
        """Estimates of the members, and their free residual parameters."""
        first = self.made[int(members[0])][0].structure
        common = self.common[ragged.kind(first)]
        sources = [common.apply(self.made[i][0], own_range) for i in members.tolist()]
        sizes = ragged.common_sizes(sources)
        padded = ragged.stack([ragged.pad(rows, sizes) for rows in sources])
        theta = identity(padded.layout)
        done = batch.fit_items(
            padded.layout,
            self.method,
            padded,
            padded.response,
            np.stack([np.append(theta, rows.start()) for rows in sources]),
            shared=False,
            mesh=self.mesh,
            size=widest,
        )
        units = _stacked_units([self.made[i][1] for i in members.tolist()])
        arrays = _widened(arrays_of(done, units, self.method, padded.structure), columns)
        phi = done.items.theta[:, padded.layout.n_theta :]
        return self._all_names(arrays, padded.structure.names), phi

    def _all_names(self, arrays: Arrays, names: list[str]) -> Arrays:
        """NaN for the residual parameters that these items lack, which have no curvature either."""
        lack = len(self.residual_names) - len(names)
        m, k = arrays.hessian.shape[:2]
        residual = np.full((m, len(self.residual_names)), np.nan)
        residual[:, [self.residual_names.index(name) for name in names]] = arrays.residual
        hessian = np.broadcast_to(np.eye(k + lack), (m, k + lack, k + lack)).copy()
        hessian[:, :k, :k] = arrays.hessian
        dvcov = np.pad(arrays.dvcov, [(0, 0)] * 3 + [(0, lack)])
        return arrays._replace(residual=residual, hessian=hessian, dvcov=dvcov)


def _stacked_units(units: list[Units]) -> ItemUnits:
    return ItemUnits(
        np.stack([u.A for u in units]),
        np.stack([u.beta0 for u in units]),
        np.array([u.scale for u in units]),
        tuple(np.stack(parts) for parts in zip(*(u.B for u in units), strict=True)),
        np.array([u.n for u in units]),
        np.zeros(len(units), bool),
    )


def bucket_size(count: np.ndarray, base: int) -> np.ndarray:
    """The number of levels to pad to: 8 times a power of ``base``."""
    power = np.ceil(np.log(np.maximum(count, 8) / 8) / np.log(base) - 1e-9)
    return (8 * base**power).astype(int)


def kept_columns(stack: Stack) -> np.ndarray:
    """Which columns of X each item keeps, (m, p), as ``lm`` would drop dependent ones."""
    m, p = stack.m, stack.X.shape[1]
    keep = np.ones((m, p), bool)
    if p == 0:
        return keep
    smallest = np.linalg.eigvalsh(np.nan_to_num(assemble.fixed_products(stack)))[:, 0]
    starts = np.searchsorted(stack.item, np.arange(m + 1))
    constant = bool(np.all(stack.X[:, 0] == 1.0))
    for i in np.flatnonzero(smallest < NEARLY):
        keep[i] = independent_columns(stack.X[starts[i] : starts[i + 1]], constant)
    return keep


def arrays_of(
    done: batch.Batch, units: ItemUnits, method: str, structure: Structure | None = None
) -> Arrays:
    """Estimates of items with units of their own in the units of the data."""
    natural, sd = batch.reported(structure, done.items.theta)
    items, A, scale = done.items, units.A, units.scale
    p = A.shape[-1]
    sigma = scale * np.sqrt(items.sigma2)
    covs = []
    for B, lam in zip(units.B, items.lams, strict=True):
        half = B @ lam
        covs.append((sigma**2)[:, None, None] * half @ np.swapaxes(half, 1, 2))
    reml = method == "REML"
    constant = 2 * (units.n - (p if reml else 0)) * np.log(scale)
    if reml and p:
        constant = constant - 2 * np.linalg.slogdet(A)[1]
    At = np.swapaxes(A, 1, 2)
    dV = np.einsum("mia,mabk,mjb->mijk", A, items.dvcov, A, optimize=True)
    status = np.where(units.exact & (done.status != batch.NOT_FINITE), batch.EXACT, done.status)
    return Arrays(
        n_obs=units.n,
        p=np.full(len(scale), p),
        beta=units.beta0 + scale[:, None] * np.einsum("mij,mj->mi", A, items.beta),
        vcov=sigma[:, None, None] ** 2 * (A @ items.unscaled_vcov @ At),
        dvcov=dV * scale[:, None, None, None] ** 2,
        hessian=items.hessian,
        covs=tuple(covs),
        sigma=sigma * sd,
        loglik=-0.5 * (items.value + constant),
        n_evals=items.n_evals,
        status=status.astype(np.int8),
        retried=done.retried,
        residual=natural,
    )


def _widened(arrays: Arrays, columns: np.ndarray) -> Arrays:
    """NaN for the coefficients that the items of a bucket lack."""
    if columns.all():
        return arrays
    p, at = len(columns), np.flatnonzero(columns)
    m, k = len(arrays.sigma), arrays.hessian.shape[-1]
    beta, vcov = np.full((m, p), np.nan), np.full((m, p, p), np.nan)
    dvcov = np.full((m, p, p, k), np.nan)
    beta[:, at] = arrays.beta
    vcov[np.ix_(np.arange(m), at, at)] = arrays.vcov
    dvcov[np.ix_(np.arange(m), at, at)] = arrays.dvcov
    return arrays._replace(beta=beta, vcov=vcov, dvcov=dvcov)

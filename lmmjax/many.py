r"""``fit_many``: one design, many responses, in one compiled call a chunk.

The cross-products of the design are made once; a chunk of responses adds Z'WY, X'WY and the squares
(responses.py), levels with equal blocks are collapsed (collapse.py), and the batched core does the
rest. A response with missing values has a design of its own, the rows it has; responses that lack
the same rows share one.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from lmmjax import batch, collapse, gram, start
from lmmjax.batchfit import (
    Arrays,
    BatchFit,
    TermLabels,
    check_df,
    concatenate,
    missing_items,
    take,
)
from lmmjax.design import check_identifiable, check_terms
from lmmjax.errors import DataError
from lmmjax.expr import parse_expr
from lmmjax.gram import Gram, Layout, Units
from lmmjax.late import replaced
from lmmjax.model import Model, check_method
from lmmjax.precision import in_float64
from lmmjax.rank import independent_columns, triangle
from lmmjax.residual.language import parse_residual
from lmmjax.residual.responses import StructuredResponses
from lmmjax.residual.source import Patterns
from lmmjax.residual.structures import Structure
from lmmjax.responses import Products, Responses
from lmmjax.sources import Source, open_source
from lmmjax.table import Table, check_index

if TYPE_CHECKING:
    from lmmjax.fit import Fit

#: name of the stand-in for the response while the design is built
STAND_IN = "response"

#: responses fitted at a time at most; more gain nothing
MOST = 2048

#: responses that lack the same rows from which they are a batch of their own
SEVERAL = 8


@in_float64
def fit_many(
    formula: str,
    data: Any,
    responses: Any,
    *,
    method: str = "REML",
    df: str | None = None,
    residual: str | None = None,
    weights: Any = None,
    offset: Any = None,
    contrasts: dict[str, str] | None = None,
    missing: str = "drop",
    layer: str | None = None,
    chunk: int | None = None,
    mesh: Any = None,
    progress: bool = False,
) -> BatchFit:
    """Fit one model to many responses on the same design.

    Parameters
    ----------
    formula : str
        ``"~ x + (x | g)"``; a left side is allowed and not used.
    data : table
        Covariates and groups, one row for each row of the responses.
    responses : array (rows, m), table, list of str, sparse matrix, AnnData, or iterator
        One column a response; a list names columns of ``data``; a memory map is read by chunks; an
        iterator yields blocks (rows, k) or pairs (labels, block). Rows are taken by position; a
        pandas table whose index contradicts that of the data is refused.
    method : {"REML", "ML"}
    df : {"satterthwaite", "residual", "wald"}, optional
        Default as for a single fit.
    residual : str, optional
        Residual structure, as :class:`lmmjax.Model`; each response has parameters of its own. A
        response with missing values then fails (its status says so): fit it alone.
    weights, offset, contrasts
        As :class:`lmmjax.Model`; one set for all responses.
    missing : {"drop", "raise"}
        A response with missing values is fitted on the rows it has (responses that lack the same
        rows share a design), or an error. Rows with missing covariates are dropped for all, or an
        error.
    layer : str, optional
        Layer of an AnnData object; its ``X`` by default.
    chunk : int, optional
        Responses at a time; by default chosen from the free memory, 2,048 at most.
    mesh : jax.sharding.Mesh, optional
        Devices to share the items of each chunk among.
    progress : bool
        Show a progress bar.

    Returns
    -------
    BatchFit
        An interrupt (Ctrl-C) ends the work early; what was fitted so far is returned with a note.

    Raises
    ------
    FormulaError, DataError, DesignError

    Notes
    -----
    One pass over the responses, O(n (S + p)) each; each fit costs what a single one does without
    its rows. Memory: the chunk's responses and products. The criterion of an item equals that of
    the single fit to rounding.

    Examples
    --------
    >>> import lmmjax as lmm
    >>> data = lmm.load_dataset("Machines")
    >>> two = data[["score"]].assign(twice=2 * data["score"])
    >>> batch = lmm.fit_many("~ Machine + (1 | Worker)", data, responses=two)
    >>> batch.coef_table(term="MachineB")[["item", "estimate"]].round(3).values.tolist()
    [['score', 7.967], ['twice', 15.933]]
    """
    began = time.perf_counter()
    method = check_method(method)
    df = None if df is None else check_df(df)  # before any work is done
    check_devices(mesh)
    if missing not in ("drop", "raise"):
        raise DataError(f"missing={missing!r} is unknown; expected 'drop' or 'raise'.")
    shared = _Shared.build(formula, data, residual, weights, offset, contrasts, missing)
    responses = [responses] if isinstance(responses, str) else responses
    check_index(responses, shared.labels, "responses")
    source = open_source(responses, shared.n_rows, shared.columns, layer)
    chunk = _chunk(chunk, shared.design.n, shared.numbers)
    labels: list[Any] = []
    parts: list[Arrays] = []
    notes: list[str] = []
    widest = 0
    bar = _bar(progress, None if source.labels is None else len(source.labels))
    try:
        for names, block in source.blocks(chunk):
            widest = max(widest, len(names))  # a last, smaller block runs the others' program
            parts.append(shared.fit(block, method, missing, widest, mesh, names))
            labels += names
            bar.update(len(names))
    except KeyboardInterrupt:
        if not parts:
            raise
        notes.append(_interrupted(len(labels), source, parts, labels))
    finally:
        bar.close()
    if not parts:
        raise DataError("found no responses; expected one or more columns.")
    return shared.result(labels, parts, method, df, source, notes, time.perf_counter() - began)


def check_devices(mesh: Any) -> None:
    """Refuse a ``mesh=`` that is none."""
    if mesh is not None:
        from lmmjax.sharding import check_mesh

        check_mesh(mesh)


def _interrupted(done: int, source: Source, parts: list[Arrays], labels: list[Any]) -> str:
    """Keep what is there; items not reached are told apart by their status."""
    if source.labels is not None:
        rest = source.labels[done:]
        parts.append(missing_items(len(rest), parts[0], batch.NOT_RUN))
        labels += rest
    words = f"interrupted after {done} items; the others were not run"
    warnings.warn(words, UserWarning, stacklevel=3)
    return words


def _bar(progress: bool, total: int | None) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="fit", disable=not progress)


def _chunk(chunk: int | None, n: int, q: int) -> int:
    """Responses at a time: their block, its copy and their products take a quarter of the memory.

    Temporaries of the optimiser and its Hessian exist for the items of one group of lanes only
    (batch.py); they do not grow with the chunk.
    """
    chunk = check_chunk(chunk, "responses")
    return at_a_time(3 * n + 6 * q + 1, least=16) if chunk is None else chunk


def check_chunk(chunk: Any, what: str) -> int | None:
    """Refuse what is not a number of items."""
    if chunk is None:
        return None
    if isinstance(chunk, bool) or not (isinstance(chunk, int | np.integer) and chunk > 0):
        raise DataError(f"chunk={chunk!r}; expected a positive whole number of {what}.")
    return int(chunk)


def at_a_time(numbers: float, most: int = MOST, least: int = 1) -> int:
    """Items of so many numbers that a quarter of the free memory holds."""
    return int(np.clip(free_memory() / 4 / (8 * max(numbers, 1)), least, most))


def free_memory() -> float:
    """Bytes that can still be taken without swapping; 4 GB where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return 4e9


# -------------------------------------------------------------------------------------------------
# The design that the responses share
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Shared:
    """The model with a stand-in response, and what can be made ready before Y is seen."""

    model: Model
    design: Any
    kept: np.ndarray  # positions of the rows used, (n,)
    n_rows: int
    columns: Any  # reads columns of the caller's table
    responses: Responses | StructuredResponses
    collapsed: collapse.Collapsed | None
    labels: Any  # row labels of the caller's table
    standard: tuple[Any, ...]  # plan, units, and Gram or source of the stand-in

    @classmethod
    def build(
        cls,
        formula: str,
        data: Any,
        residual: str | None,
        weights: Any,
        offset: Any,
        contrasts: Any,
        missing: str,
    ) -> _Shared:
        right = formula.split("~", 1)[-1].strip()
        text = f"{STAND_IN} ~ {right}"
        nodes = [parse_expr(right)]
        nodes += [parse_expr(a) for a in (weights, offset) if isinstance(a, str)]
        if residual is not None:
            spec = parse_residual(residual)
            known = spec.weights()
            nodes += [*spec.nodes, *([] if known is None else [parse_expr(known)])]
        table = Table(data)
        check_index(weights, table.rows, "weights")
        check_index(offset, table.rows, "offset")
        frame = _frame(table, nodes)
        model = Model(
            text,
            frame,
            residual=residual,
            weights=weights,
            offset=offset,
            contrasts=contrasts,
            missing=missing,
        )
        check_identifiable(model.design)
        model.design = design = _with_stand_in(model.design)
        ready: Responses | StructuredResponses
        if model.is_structured:
            products: Any
            plan, units, products = model._prepared
            ready = StructuredResponses(design, plan, gram.standardise(design), products)
            small = None
        else:
            plan, units, the_gram, _ = batch.standard(model)
            ready = Responses(design, plan, gram.standardise(design), the_gram)
            small = collapse.collapse(plan.layout, the_gram)
            products = the_gram
        return cls(
            model,
            design,
            np.asarray(design.rows),
            len(frame),
            lambda names: _columns(table, names),
            ready,
            small,
            table.rows,
            (plan, units, products),
        )

    @property
    def numbers(self) -> int:
        """Numbers in the products of one response."""
        if isinstance(self.responses, StructuredResponses):
            own = jax.tree.leaves(self.responses.source.response)
            return sum(int(np.size(a)) for a in own)
        return self.model._plan.layout.q + self.design.p

    def fit(
        self,
        block: np.ndarray,
        method: str,
        missing: str,
        size: int,
        mesh: Any,
        names: list[Any],
    ) -> Arrays:
        """Fit a block of responses given on all rows of the table."""
        whole = len(self.kept) == self.n_rows
        Y = block if whole else block[self.kept]
        made = self.responses(Y)
        odd = np.flatnonzero(~np.isfinite(made.scale))
        lacking = odd[np.isnan(Y[:, odd]).any(axis=0)]
        if len(lacking) == 0:
            return self._complete(made, method, size, mesh)
        if missing == "raise":
            some = ", ".join(str(names[i]) for i in lacking[:3])
            raise DataError(
                f"found missing values in {len(lacking)} responses ({some} ...); expected complete "
                'ones. Use missing="drop" to fit each on the rows it has.'
            )
        if self.model.is_structured:
            return self._complete(made, method, size, mesh)
        present = np.setdiff1d(np.arange(Y.shape[1]), lacking)
        parts = [self._incomplete(Y[:, lacking], method, mesh)]
        if len(present):
            some_made = jax.tree.map(lambda a: a[present], made)
            parts.append(self._complete(some_made, method, size, mesh))
        order = np.argsort(np.concatenate([lacking, present]), kind="stable")
        return take(concatenate(parts), order)

    def _complete(self, made: Products, method: str, size: int, mesh: Any) -> Arrays:
        plan, units, the_gram = self.standard
        layout, rhs = plan.layout, made.rhs
        structured = self.model.is_structured
        if structured:
            theta0 = starts(layout, the_gram, made)
        else:
            theta0 = start.moments_of_many(layout, the_gram, rhs)
        if self.collapsed is not None:
            layout, the_gram = self.collapsed.layout, self.collapsed.gram
            rhs = self.collapsed.rhs(rhs)
        done = batch.fit_items(
            layout, method, the_gram, rhs, theta0, size=size, mesh=mesh, exact=made.exact
        )
        structure = the_gram.structure if structured else None
        return arrays_of(done, units, made.beta0, made.scale, method, made.exact, structure)

    def _incomplete(self, Y: np.ndarray, method: str, mesh: Any) -> Arrays:
        """Each response on the rows it has.

        A pattern of several responses is a batch with one Gram; the Grams of the others are
        stacked, as many at a time as the memory takes.
        """
        _, which = np.unique(np.packbits(np.isnan(Y), axis=0), axis=1, return_inverse=True)
        by_pattern = np.argsort(which.reshape(-1), kind="stable")
        patterns = np.split(by_pattern, np.cumsum(np.bincount(which.reshape(-1)))[:-1])
        numbers = sum(int(np.size(a)) for a in jax.tree.leaves(self.standard[2]))
        limit = at_a_time(4 * numbers)  # made, stacked, padded, on the device
        alone = [mine for mine in patterns if len(mine) < SEVERAL]
        size = min(limit, sum(map(len, alone)))  # all stacks run one program
        batches = [(True, [mine]) for mine in patterns if len(mine) >= SEVERAL]
        batches += [(False, some) for some in _packs(alone, limit)]
        parts, order, few = [], [], []
        for shared, some in batches:
            found = [(mine, self._pattern(Y, mine)) for mine in some]
            few += [mine for mine, pattern in found if pattern is None]
            known = [pattern for _, pattern in found if pattern is not None]
            if known:
                padded = None if shared else size
                parts.append(self._fit_patterns(known, shared, padded, method, mesh))
                order += [mine for mine, pattern in found if pattern is not None]
        if few:
            like = parts[0] if parts else self._blank(method)
            at = np.concatenate(few)
            blank = missing_items(len(at), like, batch.TOO_FEW)
            parts.append(blank._replace(n_obs=np.sum(~np.isnan(Y[:, at]), axis=0)))
            order.append(at)
        return take(concatenate(parts), np.argsort(np.concatenate(order), kind="stable"))

    def _pattern(self, Y: np.ndarray, mine: np.ndarray) -> _Pattern | None:
        """Products of responses that lack the same rows; None where too few rows are left."""
        plan, _, the_gram = self.standard
        here = ~np.isnan(Y[:, mine[0]])
        piece = _rows(self.design, here)
        if not _estimable(piece, plan.layout):
            return None
        piece = _with_stand_in(piece)
        standardised = gram.standardise(piece)
        own, _ = gram.crossproducts(piece, plan, standardised)
        made = Responses(piece, plan, standardised, own)(Y[np.ix_(here, mine)])
        return _Pattern(own._replace(parent=the_gram.parent), standardised.units, made)

    def _fit_patterns(
        self, some: list[_Pattern], shared: bool, size: int | None, method: str, mesh: Any
    ) -> Arrays:
        counts = [len(a.made.scale) for a in some]
        grams = some[0].gram
        if not shared:
            each = [a.gram for a, k in zip(some, counts, strict=True) for _ in range(k)]
            grams = jax.tree.map(lambda *a: np.stack(a), *each)
        rhs, exact = jax.tree.map(
            lambda *a: np.concatenate(a), *[(a.made.rhs, a.made.exact) for a in some]
        )
        layout = self.standard[0].layout
        done = batch.fit_items(
            layout, method, grams, rhs, shared=shared, size=size, mesh=mesh, exact=exact
        )
        parts, ends = [], np.cumsum(counts)
        for a, b, (_, units, made) in zip(ends - counts, ends, some, strict=True):
            mine = jax.tree.map(lambda x: x[a:b], done)  # noqa: B023
            parts.append(arrays_of(mine, units, made.beta0, made.scale, method, made.exact))
        return concatenate(parts)

    def _blank(self, method: str) -> Arrays:
        """Arrays of the right shapes: those of the stand-in response."""
        return self._complete(self.responses(self.design.y[:, None]), method, 1, None)

    def result(
        self,
        labels: list[Any],
        parts: list[Arrays],
        method: str,
        df: str | None,
        source: Source,
        notes: list[str],
        seconds: float,
    ) -> BatchFit:
        import pandas as pd

        default = "satterthwaite" if self.design.terms else "residual"
        df = default if df is None else df

        single = None
        if source.column is not None:
            single = _Single(self.model, self.kept, self.labels, source.column, labels, method, df)
        return BatchFit(
            formula=f"~ {self.model.formula.split('~', 1)[1].strip()}",
            method=method,
            df=df,
            items=pd.Index(labels, name="item"),
            x_names=tuple(self.design.x_names),
            terms=tuple(TermLabels(t.group, tuple(t.names), t.cov) for t in self.design.terms),
            arrays=concatenate(parts),
            seconds=seconds,
            notes=tuple(notes),
            residual=self.model.residual,
            residual_names=tuple(self.model.phi_names),
            _single=single,
        )


class _Pattern(NamedTuple):
    """Responses that lack the same rows."""

    gram: Gram
    units: Units
    made: Products


def _packs(patterns: list[np.ndarray], limit: int) -> Iterator[list[np.ndarray]]:
    """Patterns of together at most ``limit`` responses, or a single one."""
    some: list[np.ndarray] = []
    for mine in patterns:
        if some and sum(map(len, some)) + len(mine) > limit:
            yield some
            some = []
        some.append(mine)
    if some:
        yield some


@dataclass(frozen=True, eq=False)
class _Single:
    """The ordinary fit of one response on the rows that it has."""

    model: Model  # of the stand-in
    kept: np.ndarray
    labels: Any  # of the rows of the caller's table
    column: Callable[[int], np.ndarray]
    names: list[Any]
    method: str
    df: str

    def __call__(self, i: int) -> Fit:
        y, name = self.column(i)[self.kept], self.names[i]
        name = name if isinstance(name, str) else "y"  # a column of an array
        whole = self.model.design
        design = dataclasses.replace(whole, y=y, response=name, rows=self.labels[self.kept])
        here = ~np.isnan(y)
        if not here.all() and self.model.is_structured:
            raise DataError(
                f"found {int(np.sum(~here))} missing values in response {name}; expected a "
                "complete one for a batch with residual=. Fit it with lmmjax.Model."
            )
        if not here.all():
            design = _rows(design, here, drop_levels=True)
            design = with_columns(
                design, independent_columns(design.X, "(Intercept)" in design.x_names)
            )
        right = whole.formula.split("~", 1)[1].strip()
        model = _model(f"{name} ~ {right}", design, self.model.residual)
        return model.fit(self.method, df=self.df)


def _model(formula: str, design: Any, residual: str | None = None) -> Model:
    """A model from a design that is there already."""
    check_terms(design)
    model = Model.__new__(Model)
    model.formula, model.residual, model.dtype = formula, residual, "float64"
    model.design = design
    return model


def starts(layout: Layout, source: Any, made: Products) -> np.ndarray:
    """(θ, φ) that each response begins with, (m, n_theta + n_phi)."""
    theta = np.tile(start.identity(layout), (len(made.scale), 1))
    phi = np.tile(source.structure.start(), (len(theta), 1))
    if isinstance(source, Patterns):  # it looks at the residuals
        for i in np.flatnonzero(np.isfinite(made.scale)):
            phi[i] = source.with_response(jax.tree.map(lambda a: a[i], made.rhs)).start()  # noqa: B023
    return np.concatenate([theta, phi], axis=1)


def _frame(table: Table, nodes: list[Any]) -> Any:
    """The covariates on positions 0, 1 ... with a stand-in response that varies."""
    import pandas as pd

    columns = table.read(nodes)
    n = len(table)
    frame = pd.DataFrame({name: c.array for name, c in columns.items()}, index=pd.RangeIndex(n))
    if STAND_IN in frame:
        raise DataError(f"found a covariate named {STAND_IN!r}; rename it for fit_many.")
    draw = np.random.default_rng(3_141_592_653).standard_normal(n)
    return frame.assign(**{STAND_IN: draw})


def _with_stand_in(design: Any) -> Any:
    """A response that X cannot reproduce: one row differs from the others.

    Of any p + 1 unit vectors one is outside the span of the p columns; taken is the one furthest
    from it, whose row has the least leverage.
    """
    first = design.X[: design.p + 1]
    size = np.sqrt(np.mean(design.X**2, axis=0))
    R = triangle(design.X / size)
    leverage = np.sum(np.linalg.solve(R.T, (first / size).T) ** 2, axis=0)
    y = np.array(design.offset)
    y[np.argmin(leverage)] += max(1.0, float(np.max(np.abs(y))))
    return replaced(design, y=y)


def _columns(table: Table, names: list[str]) -> Any:
    import pandas as pd

    from lmmjax.expr import Name

    return pd.DataFrame(table.read([Name(name) for name in names]))


def _rows(design: Any, here: np.ndarray, drop_levels: bool = False) -> Any:
    """The design on some of its rows (a mask, or positions); levels stay unless dropped."""
    terms = []
    for t in design.terms:
        codes, levels = t.codes[here], t.levels
        if drop_levels:
            used, codes = np.unique(codes, return_inverse=True)
            codes, levels = codes.astype(np.int32), levels[used]
        terms.append(dataclasses.replace(t, z=t.z[here], codes=codes, levels=levels))
    return dataclasses.replace(
        design,
        y=design.y[here],
        X=np.asfortranarray(design.X[here]),
        offset=design.offset[here],
        weights=design.weights[here],
        rows=design.rows[here],
        n_dropped=design.n_dropped + design.n - len(design.y[here]),
        terms=tuple(terms),
    )


def with_columns(design: Any, keep: np.ndarray) -> Any:
    """The design on some of its columns of X, a mask; the others are told as aliased."""
    if keep.all():
        return design
    names = np.array(design.x_names)
    return dataclasses.replace(
        design,
        X=np.asfortranarray(design.X[:, keep]),
        x_names=tuple(names[keep]),
        x_assign=design.x_assign[keep],
        aliased=(*design.aliased, *names[~keep]),
    )


def _estimable(design: Any, layout: Layout) -> bool:
    """Whether the rows left determine all coefficients and allow every term."""
    if design.n <= design.p:
        return False
    for t in design.terms:
        levels = len(np.unique(t.codes))
        if levels < 2 or levels * t.z.shape[1] >= design.n:
            return False
    return bool(independent_columns(design.X, "(Intercept)" in design.x_names).all())


# -------------------------------------------------------------------------------------------------
# Back to the units of the data
# -------------------------------------------------------------------------------------------------


def arrays_of(
    done: batch.Batch,
    units: Units,
    beta0: np.ndarray,
    scale: np.ndarray,
    method: str,
    exact: np.ndarray,
    structure: Structure | None = None,
) -> Arrays:
    """Estimates of items on one design in the units of the data.

    Parameters
    ----------
    done : Batch
    units : Units
        Its A and B are shared; its β₀ and scale are not used.
    beta0 : (m, p)
    scale : (m,)
    exact : (m,) bool
        Items that X reproduces.
    structure : Structure, optional
        Of the residuals.
    """
    items = done.items
    m, A = len(scale), units.A
    natural, sd = batch.reported(structure, items.theta)
    sigma = scale * np.sqrt(items.sigma2)
    covs = []
    for B, lam in zip(units.B, items.lams, strict=True):
        half = B @ lam
        covs.append((sigma**2)[:, None, None] * half @ np.swapaxes(half, 1, 2))
    nu = units.n - (units.p if method == "REML" else 0)
    constant = 2 * nu * np.log(scale) - (2 * units.logdet_A if method == "REML" else 0.0)
    V = sigma[:, None, None] ** 2 * (A @ items.unscaled_vcov @ A.T)
    dV = np.einsum("ia,mabk,jb->mijk", A, items.dvcov, A, optimize=True)
    status = np.where(exact & (done.status != batch.NOT_FINITE), batch.EXACT, done.status)
    return Arrays(
        n_obs=np.full(m, units.n),
        p=np.full(m, units.p),
        beta=beta0 + scale[:, None] * items.beta @ A.T,
        vcov=V,
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

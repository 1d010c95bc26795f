r"""The two-stage formulation: a regression per subject, then a regression of its coefficients.

    stage 1   Y_i = Z_i β_i + ε_i                 one regression per subject
    stage 2   β_i = K_i β + b_i                   coefficients on subject-level predictors
    together  Y_i = X_i β + Z_i b_i + ε_i,        X_i = Z_i K_i

(Laird and Ware 1982, Biometrics 38; Verbeke and Molenberghs 2000, chapter 3). The one-step mixed
model uses all of the information; the two steps show where it comes from.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from lmmjax.design import Design, build_design
from lmmjax.errors import DataError, DataWarning, DesignError, FormulaError
from lmmjax.expr import Name, deparse, names_in
from lmmjax.formula import parse
from lmmjax.table import Table

if TYPE_CHECKING:
    from lmmjax.fit import Fit
    from lmmjax.model import Model

INTERCEPT = "(Intercept)"


class SubjectMatrices(NamedTuple):
    """The matrices of one subject, labelled: X = Z K, V of the fitted one-step model."""

    Z: pd.DataFrame
    K: pd.DataFrame
    X: pd.DataFrame
    V: pd.DataFrame


def two_stage(
    formula: str,
    by: str,
    level2: str | Mapping[str, str] = "~ 1",
    random: str | None = None,
    data: Any = None,
) -> TwoStage:
    """State a model in two stages.

    Parameters
    ----------
    formula : str
        Stage 1, within a subject: ``"weight ~ time"``.
    by : str
        Column that names the subject.
    level2 : str or dict
        Stage 2: one formula for all coefficients, ``"~ group"``, or one per coefficient,
        ``{"(Intercept)": "~ 1", "time": "~ 0 + group"}``; coefficients left out have ``"~ 1"``.
        Its variables must be constant within a subject.
    random : str, optional
        Which coefficients vary between subjects in the one-step model, as the left side of a bar:
        ``"1"``, ``"1 + time"`` ... Default: all of stage 1.
    data : table

    Returns
    -------
    TwoStage

    Raises
    ------
    FormulaError, DataError, DesignError

    Warns
    -----
    DataWarning
        Subjects with too few rows for a regression of their own; they have no estimates in stage 1
        and are left out of stage 2, but not of the one-step model. Subjects with as many rows as
        coefficients, whose estimates have no standard errors.

    Examples
    --------
    >>> import lmmjax as lmm
    >>> two = lmm.two_stage("weight ~ month", by="patient", data=lmm.load_dataset("weights"),
    ...                     level2={"(Intercept)": "~ 1", "month": "~ 0 + group"})
    >>> two.model().formula
    'weight ~ 1 + month:group + (1 + month | patient)'
    >>> two.stage1().shape
    (100, 2)
    """
    if parse(formula).bars:
        raise FormulaError(
            f"found random effects in {formula!r}; expected the regression of one subject, such as "
            "'weight ~ time'. Say with random= which coefficients vary."
        )
    return TwoStage(formula, by, _level2(formula, level2), random, data)


def _level2(formula: str, given: str | Mapping[str, str]) -> dict[str, str]:
    """Stage 2 as one right side per term of stage 1."""
    terms = parse(formula).terms
    labels = [*([INTERCEPT] if terms.intercept else []), *terms.labels]
    if isinstance(given, str):
        return {label: _right_side(given) for label in labels}
    unknown = [name for name in given if name not in labels]
    if unknown:
        raise FormulaError(f"found level2 for {unknown}; expected the terms of stage 1, {labels}.")
    return {label: _right_side(given.get(label, "~ 1")) for label in labels}


def _right_side(text: str) -> str:
    left, tilde, right = text.partition("~")
    if not tilde or left.strip() or not right.strip():
        raise FormulaError(f"found level2={text!r}; expected a right side, such as '~ group'.")
    return right.strip()


@dataclass(frozen=True, eq=False)
class TwoStage:
    """A model stated in two stages; made by :func:`two_stage`.

    Attributes
    ----------
    formula, by : str
    level2 : dict
        Right side of stage 2 per term of stage 1.
    random : str or None
    data : table
    """

    formula: str
    by: str
    level2: dict[str, str]
    random: str | None
    data: Any

    # -- stage 1 --------------------------------------------------------------------------------

    @cached_property
    def _frame(self) -> pd.DataFrame:
        """The columns used, complete rows only, on the caller's labels."""
        table = Table(self.data)
        texts = [self._one_step, *(f"{self._response} ~ {r}" for r in self.level2.values())]
        columns = table.read([Name(name) for text in texts for name in _names(text)])
        frame = pd.DataFrame({k: v.array for k, v in columns.items()})
        design = build_design(self._one_step, frame)
        frame = frame.set_axis(table.rows)
        return frame if design.n == len(frame) else frame.iloc[np.asarray(design.rows)]

    @cached_property
    def _response(self) -> str:
        return deparse(parse(self.formula).response_node)

    @cached_property
    def _design1(self) -> Design:
        return build_design(self.formula, self._frame)

    @cached_property
    def _codes(self) -> tuple[np.ndarray, np.ndarray]:
        """Subject of each row, and the subjects' labels."""
        term = build_design(f"{self._response} ~ 1 + (1 | {self.by})", self._frame).terms[0]
        return term.codes, term.levels

    @cached_property
    def _regressions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Estimates (J, k), their SEs, and unscaled variances (Z'Z)⁻¹ (J, k)."""
        codes, levels = self._codes
        Z, y = self._design1.X, self._design1.y - self._design1.offset
        k = Z.shape[1]
        estimates, se, unscaled = np.full((3, len(levels), k), np.nan)
        few, exact = [], []
        for j in range(len(levels)):
            rows = codes == j
            if np.linalg.matrix_rank(Z[rows]) < k:
                few.append(str(levels[j]))
                continue
            inverse = np.linalg.pinv(Z[rows])
            estimates[j], unscaled[j] = inverse @ y[rows], np.sum(inverse**2, axis=1)
            left = int(rows.sum()) - k
            if left:
                rss = np.sum((y[rows] - Z[rows] @ estimates[j]) ** 2)
                se[j] = np.sqrt(rss / left * unscaled[j])
            else:
                exact.append(str(levels[j]))
        if exact:
            warnings.warn(
                f"{len(exact)} of {len(levels)} subjects have {k} rows for {k} coefficients "
                f"({', '.join(exact[:5])}{' ...' if len(exact) > 5 else ''}): their estimates "
                "reproduce the rows and have no standard errors, yet enter stage 2 with the weight "
                "of the others. The one-step model weighs them by what they tell.",
                DataWarning,
                stacklevel=3,
            )
        if few:
            warnings.warn(
                f"{len(few)} of {len(levels)} subjects have too few distinct rows for a regression "
                f"with {k} coefficients ({', '.join(few[:5])}{' ...' if len(few) > 5 else ''}); "
                "they have no estimates in stage 1 and are left out of stage 2. The one-step model "
                "uses them.",
                DataWarning,
                stacklevel=3,
            )
        if len(few) == len(levels):
            raise DesignError(
                "no subject has enough rows for a regression of its own; expected subjects with "
                f"at least {k} rows. Use model(), the one-step model."
            )
        return estimates, se, unscaled

    def stage1(self) -> pd.DataFrame:
        """Estimates of each subject's own regression: subjects by coefficients."""
        return self._by_subject(self._regressions[0])

    def stage1_se(self) -> pd.DataFrame:
        """Their standard errors, from each subject's own residual variance; NaN without df."""
        return self._by_subject(self._regressions[1])

    def _by_subject(self, values: np.ndarray) -> pd.DataFrame:
        index = pd.Index(self._codes[1], name=self.by)
        return pd.DataFrame(values, index=index, columns=list(self._design1.x_names))

    # -- stage 2 --------------------------------------------------------------------------------

    @cached_property
    def _subjects(self) -> pd.DataFrame:
        """One row per subject; refuses predictors that vary within one."""
        codes, levels = self._codes
        _, first = np.unique(codes, return_index=True)
        out = self._frame.iloc[first].set_axis(pd.Index(levels, name=self.by))
        predictors = {name for right in self.level2.values() for name in _predictors(right)}
        for name in predictors & set(out):
            here = np.asarray(self._frame[name].astype(object))
            same = np.asarray(out[name].astype(object))[codes] == here
            if not np.all(same):
                where = levels[codes[np.flatnonzero(~same)[0]]]
                raise DataError(
                    f"found several values of {name} within {self.by} {where}; stage 2 expects "
                    "predictors that are constant within a subject. Put it in stage 1."
                )
        return out

    def _terms_of_columns(self) -> list[str]:
        """The stage-1 term of each coefficient."""
        d = self._design1
        return [d.x_terms[a] for a in d.x_assign]

    def _stage2_model(self, k: int, weights: str | None) -> Model:
        from lmmjax.model import Model

        frame = self._subjects.assign(
            **{_ESTIMATE: self._regressions[0][:, k], _PRECISION: 1 / self._regressions[2][:, k]}
        )
        right = self.level2[self._terms_of_columns()[k]]
        known = _PRECISION if weights == "precision" else None
        return Model(f"{_ESTIMATE} ~ {right}", frame, weights=known)

    def stage2(self, weights: str | None = None, level: float = 0.95) -> pd.DataFrame:
        """Regress the coefficients on subject-level predictors.

        Parameters
        ----------
        weights : {None, "precision"}
            Least squares, or weighted by the precision of each subject's estimate, 1/(Z_i'Z_i)⁻¹
            (the residual variance of stage 1 is taken as common).
        level : float
            Of the confidence intervals.

        Returns
        -------
        DataFrame
            Index (coefficient, term), columns as ``Fit.coef_table``; exact t on subjects - terms
            degrees of freedom. It ignores that the estimates of stage 1 are uncertain.
        """
        if weights not in (None, "precision"):
            raise DataError(f"found weights={weights!r}; expected None or 'precision'.")
        names = self._design1.x_names
        fits = [self._stage2_model(k, weights).fit() for k in range(len(names))]
        tables = [fit.coef_table(level=level) for fit in fits]
        return pd.concat(tables, keys=names, names=["coefficient", "term"])

    # -- one step -------------------------------------------------------------------------------

    @property
    def _one_step(self) -> str:
        """The formula of the equivalent mixed model."""
        parts = []
        for label, right in self.level2.items():
            terms = parse(f"y ~ {right}").terms
            own = [] if label == INTERCEPT else [label]
            start = ["1" if label == INTERCEPT else label] if terms.intercept else []
            products = [":".join([*own, *x.split(":")]) for x in terms.labels]
            if label == INTERCEPT and not terms.intercept:
                start = ["0"]
            parts += [*start, *products]
        if INTERCEPT not in self.level2:
            parts.insert(0, "0")
        left, _, right1 = self.formula.partition("~")
        bar = self.random if self.random is not None else _explicit(right1)
        return f"{left.strip()} ~ {' + '.join(parts)} + ({bar} | {self.by})"

    def model(self) -> Model:
        """The equivalent one-step mixed model; its X equals Z_i K_i of every subject.

        Raises
        ------
        DesignError
            Where R's rules of coding give other columns than Z_i K_i.
        """
        from lmmjax.model import Model

        model = Model(self._one_step, self._frame)
        self._columns_of(model.design)
        return model

    def _level2_columns(self) -> list[tuple[int, str, np.ndarray]]:
        """(coefficient, term, value per subject) of every column of K."""
        out, d = [], self._design1
        for k, label in enumerate(self._terms_of_columns()):
            spread = np.arange(len(self._subjects), dtype=float)
            frame = self._subjects.assign(**{_ESTIMATE: spread})
            design = build_design(f"{_ESTIMATE} ~ {self.level2[label]}", frame)
            out += [
                (k, f"{d.x_names[k]}, {n}", a)
                for n, a in zip(design.x_names, design.X.T, strict=True)
            ]
        return out

    def _columns_of(self, design: Design) -> list[tuple[int, str, np.ndarray]]:
        """Columns of K in the order of the one-step X."""
        codes, Z = self._codes[0], self._design1.X
        columns = self._level2_columns()
        made = np.column_stack([Z[:, k] * a[codes] for k, _, a in columns])
        size = np.maximum(np.max(np.abs(made), axis=0), 1e-300)
        order = []
        for x in design.X.T:
            gap = np.max(np.abs(made - x[:, None]), axis=0) / size
            best = int(np.argmin(gap))
            if gap[best] > 1e-12 or best in order:
                break
            order.append(best)
        if len(order) != len(columns) or design.p != len(columns):
            raise DesignError(
                f"the formula {design.formula!r} has other columns than Z_i K_i: R's coding of its "
                f"factors differs ({', '.join(design.x_names)}, expected products of "
                f"{', '.join(name for _, name, _ in columns)}). Use the same kind of formula for "
                "all coefficients, or numeric indicator columns as predictors."
            )
        return [columns[j] for j in order]

    @cached_property
    def _fit(self) -> Fit:
        return self.model().fit()

    def compare(self, weights: str | None = None) -> pd.DataFrame:
        """Two-step and one-step (REML) estimates side by side.

        Returns
        -------
        DataFrame
            Index (coefficient, term), columns ``two_step two_step_se one_step one_step_se``.
        """
        table = self.stage2(weights)
        design, fit = self._fit.model.design, self._fit
        columns = self._columns_of(design)
        names = self._design1.x_names
        at = {}
        for j, (k, name, _) in enumerate(columns):
            at[names[k], name.removeprefix(f"{names[k]}, ")] = j
        order = [at[key] for key in table.index]
        return pd.DataFrame(
            {
                "two_step": table["estimate"],
                "two_step_se": table["std_error"],
                "one_step": fit.beta.to_numpy()[order],
                "one_step_se": fit.std_errors[order],
            }
        )

    def matrices(self, subject: Any) -> SubjectMatrices:
        """Z_i, K_i, X_i = Z_i K_i and V_i = Z_i D Z_i' + σ²I of one subject (one-step REML fit)."""
        codes, levels = self._codes
        found = np.flatnonzero(levels == str(subject))
        if found.size == 0:
            raise DataError(
                f"{subject!r} is no level of {self.by}; expected one of "
                f"{', '.join(map(str, levels[:8]))}{' ...' if len(levels) > 8 else ''}."
            )
        fit, names = self._fit, list(self._design1.x_names)
        rows = codes == found[0]
        labels = self._frame.index[rows]
        K = np.zeros((len(names), fit.model.design.p))
        for j, (k, _, a) in enumerate(self._columns_of(fit.model.design)):
            K[k, j] = a[found[0]]
        Z = self._design1.X[rows]
        columns = list(fit.model.design.x_names)
        return SubjectMatrices(
            pd.DataFrame(Z, index=labels, columns=names),
            pd.DataFrame(K, index=names, columns=columns),
            pd.DataFrame(Z @ K, index=labels, columns=columns),
            fit.marginal_cov(subject, self.by).cov,
        )

    def __repr__(self) -> str:
        stage2 = [f"  {name}: ~ {right}" for name, right in self.level2.items()]
        lines = [f"Stage 1, per {self.by}: {self.formula}", "Stage 2:", *stage2]
        return "\n".join([*lines, f"One step: {self._one_step}"])


_ESTIMATE, _PRECISION = "estimate_", "precision_"


def _explicit(right: str) -> str:
    """The right side of stage 1 with its intercept spelt out."""
    text = right.strip()
    terms = parse(f"y ~ {text}").terms
    return " + ".join(["1" if terms.intercept else "0", *terms.labels])


def _predictors(right: str) -> set[str]:
    return {name.id for node in parse(f"y ~ {right}").terms.nodes for name in names_in(node)}


def _names(text: str) -> list[str]:
    """Columns that a formula names, the response's first."""
    parsed = parse(text)
    nodes = [parsed.response_node, *parsed.terms.nodes, *parsed.offset_nodes]
    nodes += [node for bar in parsed.bars for node in bar.factors]
    return list(dict.fromkeys(name.id for node in nodes for name in names_in(node)))

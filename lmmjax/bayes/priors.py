r"""Priors: one distribution per parameter, in the units of the data.

    key                    parameter                                    default
    ``(Intercept)``        a fixed effect, by R's name                  normal, at the mean of y
    ``Days``               a fixed effect                               normal(0, 2.5 sd_y/sd_x)
    ``sd_Days|Subject``    SD of a random effect                        half-t(3, 2.5 sd_y/sd_z)
    ``cor_Subject``        correlation matrices of the terms on a group LKJ(1)
    ``sigma``              residual SD of a row of weight 1             half-t(3, sd_y)

Residual parameters have the keys that residual.py lists. With varpower and varexp, whose σ belongs
to a row that may be far from the data, the default prior of ``sigma`` is that of the SD of a row of
average log SD.

The set ``"reml"`` is flat on all of them, SDs and σ on their own scale and correlation matrices
uniform, so that the posterior density of (SD, correlation, σ, residual parameters) with β
integrated out *is* the restricted likelihood; it is improper, and refused where the posterior would
be improper too. ``"flat"`` is another name for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints

from lmmjax.bayes import residual
from lmmjax.errors import PriorError
from lmmjax.gram import _constant_direction, _standardise_x
from lmmjax.precision import float64

if TYPE_CHECKING:
    from lmmjax.design import Design, Term

BASES = ("default", "reml", "flat")

#: structures whose correlation has a prior of its own (cs: uniform over its range, not a choice)
LKJ_STRUCTURES = ("us",)


@dataclass(frozen=True, eq=False)
class Priors:
    """The prior of every parameter of one model. Made by :func:`resolve`.

    Attributes
    ----------
    base : str
        The set that fills the parameters the caller left out: ``default``, ``reml`` or ``flat``.
    entries : dict
        Key -> NumPyro distribution; for ``cor_<group>`` the concentration of LKJ, a float.
    given : frozenset of str
        Keys that the caller chose.
    distant : bool
        Whether σ belongs to a row that may be far from the data (varpower, varexp).
    """

    base: str
    entries: Mapping[str, Any]
    given: frozenset[str]
    distant: bool = False

    @property
    def improper(self) -> bool:
        """Whether any prior does not integrate to one."""
        return any(is_flat(d) for d in self.entries.values())

    @property
    def typical_sigma(self) -> bool:
        """Whether the prior of σ is that of a row of average log SD, not of the reference row."""
        return self.distant and self.base == "default" and "sigma" not in self.given

    def describe(self) -> str:
        """The priors in words, one line per parameter, in the units of the data."""
        width = max(len(key) for key in self.entries)
        notes = dict.fromkeys(self.given, "  (given)")
        if self.typical_sigma:
            notes["sigma"] = "  on the SD of a row of average log SD"
        lines = [f"{k:<{width}}  {words(d)}{notes.get(k, '')}" for k, d in self.entries.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Priors ({self.base}):\n{self.describe()}"


# -------------------------------------------------------------------------------------------------
# Names
# -------------------------------------------------------------------------------------------------


def sd_names(term: Term) -> tuple[str, ...]:
    """Names of the free SDs of a term: its columns, or one ``hom`` that they share."""
    return ("hom",) if term.cov in ("hom", "homcs") else tuple(term.names)


def sd_keys(term: Term) -> list[str]:
    """Prior keys of the free SDs of a term."""
    return [f"sd_{name}|{term.group}" for name in sd_names(term)]


def _has_lkj(term: Term) -> bool:
    return term.cov in LKJ_STRUCTURES and len(term.names) > 1


def keys(design: Design) -> list[str]:
    """All prior keys of a model, in the order in which they are printed."""
    sds = [key for term in design.terms for key in sd_keys(term)]
    cors = [f"cor_{term.group}" for term in design.terms if _has_lkj(term)]
    sds, cors = list(dict.fromkeys(sds)), list(dict.fromkeys(cors))
    return [*design.x_names, *sds, *cors, *residual.keys(design), "sigma"]


# -------------------------------------------------------------------------------------------------
# The sets
# -------------------------------------------------------------------------------------------------


def half_t(df: float, scale: float) -> Any:
    """Student's t with ``df`` degrees of freedom and a scale, folded at 0."""
    return dist.FoldedDistribution(dist.StudentT(float(df), 0.0, float(scale)))


def flat(support: Any) -> Any:
    """Density 1 on ``support`` (improper)."""
    return dist.ImproperUniform(support, (), ())


def is_flat(prior: Any) -> bool:
    """Whether a prior is improper uniform."""
    return isinstance(prior, dist.ImproperUniform)


def _flat_set(design: Design) -> dict[str, Any]:
    out: dict[str, Any] = {name: flat(constraints.real) for name in design.x_names}
    for key in keys(design)[design.p :]:
        out[key] = 1.0 if key.startswith("cor_") else flat(constraints.positive)
    return out | residual.flat_set(design)


def _default_set(design: Design) -> dict[str, Any]:
    y = design.y - design.offset
    sd_y = float(np.std(y, ddof=1))
    out = dict(zip(design.x_names, _default_fixed(design, y, sd_y), strict=True))
    for term in design.terms:
        sizes = [_spread(column) for column in term.z.T]
        shared = term.cov in ("hom", "homcs")
        scales = [float(np.mean(sizes))] if shared else sizes
        out |= {k: half_t(3, 2.5 * sd_y / s) for k, s in zip(sd_keys(term), scales, strict=True)}
    out |= {key: 1.0 for key in keys(design) if key.startswith("cor_") and key not in out}
    # sigma belongs to a row of weight 1, which may be far from a typical row
    typical = math.exp(0.5 * float(np.mean(np.log(design.weights))))
    return out | residual.default_set(design) | {"sigma": half_t(3, sd_y * typical)}


def _spread(column: np.ndarray) -> float:
    """SD of a column; the size of a constant one."""
    sd = float(np.std(column, ddof=1))
    size = float(np.max(np.abs(column)))
    return sd if sd > 1e-12 * size else size


def _default_fixed(design: Design, y: np.ndarray, sd_y: float) -> list[Any]:
    """Normal priors of the coefficients.

    Those that make up the constant (the intercept, or the means of cell-means coding) sit at the
    mean of y, widened by the height that the slopes' priors allow the line to reach at x = 0.
    """
    X = design.X
    constant = _constant_direction(X)
    if not constant.any():
        rms_y = float(np.sqrt(np.mean(y**2)))
        rms = np.sqrt(np.mean(X**2, axis=0))
        return [dist.Normal(0.0, 2.5 * rms_y / float(r)) for r in rms]
    level = constant != 0
    slopes = np.array([2.5 * sd_y / _spread(column) for column in X.T])
    reach = np.sum((slopes * X.mean(axis=0))[~level] ** 2)
    wide = math.sqrt((2.5 * sd_y) ** 2 + float(reach))
    mean = float(np.mean(y))
    return [
        dist.Normal(mean, wide) if is_level else dist.Normal(0.0, float(s))
        for is_level, s in zip(level, slopes, strict=True)
    ]


# -------------------------------------------------------------------------------------------------
# From what the caller said to one distribution per parameter
# -------------------------------------------------------------------------------------------------


def resolve(design: Design, priors: Any = "default") -> Priors:
    """Fill in, check and freeze the priors of a model.

    Parameters
    ----------
    priors : {"default", "reml", "flat"}, dict or Priors
        A dict maps keys to NumPyro distributions in the units of the data (``cor_<group>`` to an
        LKJ distribution or its concentration); ``"base"`` names the set for the keys left out.

    Raises
    ------
    PriorError
        Unknown set or key, a distribution of the wrong support, or a flat prior where the
        posterior would be improper.
    """
    if isinstance(priors, Priors):
        given = {k: v for k, v in priors.entries.items() if k in priors.given}
        priors = {"base": priors.base, **given}
    chosen = dict(priors) if isinstance(priors, Mapping) else {"base": priors}
    base = chosen.pop("base", "default")
    if not isinstance(base, str) or base not in BASES:
        raise PriorError(
            f"priors={base!r} is unknown; expected one of {', '.join(map(repr, BASES))}, or a dict "
            f"with keys such as {', '.join(map(repr, keys(design)[:4]))}."
        )
    _check_clash(design)
    _check_keys(design, chosen)
    with float64():
        entries = _default_set(design) if base == "default" else _flat_set(design)
        entries |= {key: _checked(design, key, value) for key, value in chosen.items()}
        entries = {key: _plain(entries[key]) for key in keys(design)}
    r = design.residual
    distant = r is not None and residual.has_distant_sigma(r.structure)
    out = Priors(base, entries, frozenset(chosen), distant)
    check_proper(design, out)
    return out


def _check_clash(design: Design) -> None:
    others = keys(design)[design.p :]
    clash = set(design.x_names) & set(others)
    if clash:
        raise PriorError(
            f"the fixed effect {min(clash)!r} has the name of a variance parameter, so its prior "
            "cannot be told from that one; expected different names. Rename the column."
        )
    if len(set(others)) < len(others):
        raise PriorError(
            f"the grouping factor 'residual' gives two parameters one prior key among {others}; "
            "expected another name. Rename the column."
        )


def _check_keys(design: Design, chosen: Mapping[str, Any]) -> None:
    known = keys(design)
    for key in chosen:
        if key not in known:
            close = get_close_matches(str(key), known, n=3)
            hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
            raise PriorError(
                f"priors has the key {key!r}, which names no parameter of this model; expected "
                f"one of {', '.join(map(repr, known))}, or 'base'.{hint}"
            )


def _plain(prior: Any) -> Any:
    """The distribution with Python floats in place of device arrays: it pickles anywhere."""
    if not isinstance(prior, dist.Distribution):
        return prior
    return jax.tree.map(lambda a: float(a) if np.ndim(a) == 0 else np.asarray(a), prior)


def _checked(design: Design, key: str, prior: Any) -> Any:
    if key.startswith("cor_") and key not in design.x_names:
        return _concentration(key, prior)
    if not isinstance(prior, dist.Distribution) or prior.shape() != ():
        raise PriorError(
            f"the prior of {key!r} is {prior!r}; expected a scalar NumPyro distribution such as "
            "numpyro.distributions.Normal(0, 1)."
        )
    if prior.support.is_discrete:
        raise PriorError(f"the prior of {key!r} is discrete; expected a continuous distribution.")
    if key in residual.keys(design):
        residual.check_support(design, key, prior)
    elif key not in design.x_names and not _is_positive(prior.support):
        raise PriorError(
            f"the prior of {key!r} is {words(prior)} with support {prior.support}; a standard "
            "deviation is positive. Use HalfNormal, Exponential, LogNormal, or a Gamma, say."
        )
    return prior


def _is_positive(support: Any) -> bool:
    """Whether a support lies within the positive half-line."""
    base = getattr(support, "base_constraint", support)
    lower = getattr(base, "lower_bound", None)
    return lower is not None and bool(np.all(np.asarray(lower) >= 0))


def _concentration(key: str, prior: Any) -> float:
    value = getattr(prior, "concentration", prior)
    lkj = isinstance(prior, dist.LKJ | dist.LKJCholesky)
    if not (lkj or isinstance(prior, int | float)) or not np.ndim(value) == 0 or not value > 0:
        raise PriorError(
            f"the prior of {key!r} is {prior!r}; expected numpyro.distributions.LKJ or "
            "LKJCholesky, or its concentration, a positive number."
        )
    return float(value)


# -------------------------------------------------------------------------------------------------
# Improper posteriors
# -------------------------------------------------------------------------------------------------


def absorbed(design: Design, term: Term, column: int) -> int:
    """Dimension of col(X) that lies in the span of one random-effects column over its levels.

    O(n p²) time.
    """
    Xs, _, _ = _standardise_x(design.X)
    z, codes, J = term.z[:, column], term.codes, len(term.levels)
    size = np.bincount(codes, weights=z * z, minlength=J)
    size = np.where(size > 0, size, 1.0)
    left = np.empty_like(Xs)
    for j, x in enumerate(Xs.T):
        left[:, j] = x - z * (np.bincount(codes, weights=z * x, minlength=J) / size)[codes]
    values = np.linalg.eigvalsh(left.T @ left / max(design.n, 1))
    return int(np.sum(values < 1e-12))


def check_proper(design: Design, priors: Priors) -> None:
    """Refuse flat priors on an SD whose likelihood does not fall off fast enough.

    As an SD grows, the restricted likelihood falls as SD^-(J - r), J levels of which r directions
    are absorbed by the fixed effects: it integrates if J - r >= 2.
    """
    for term in design.terms:
        flat_sds = [is_flat(priors.entries[key]) for key in sd_keys(term)]
        if len(flat_sds) < len(term.names):
            flat_sds = flat_sds * len(term.names)
        for s, name in enumerate(term.names):
            if flat_sds[s]:
                _check_levels(design, term, s, name, priors.base)
    if is_flat(priors.entries["sigma"]):
        _check_residual(design, priors.base)
    residual.check_proper(design, priors.entries, priors.base)


def _check_levels(design: Design, term: Term, s: int, name: str, base: str) -> None:
    J = len(np.unique(term.codes[term.z[:, s] != 0]))
    r = absorbed(design, term, s)
    if J - r < 2:
        raise PriorError(
            f"a flat prior on the SD of {name} | {term.group} makes the posterior improper: it has "
            f"{J} levels, of which {r} {'is' if r == 1 else 'are'} absorbed by the fixed effects; "
            f"expected at least {r + 2}. Use priors='default', or give "
            f"'sd_{name}|{term.group}' a proper prior such as HalfNormal (now priors={base!r})."
        )


def _check_residual(design: Design, base: str) -> None:
    for term in design.terms:
        effects = len(term.levels) * term.z.shape[1]
        if effects >= design.n:
            raise PriorError(
                f"a flat prior on sigma makes the posterior improper: the term on {term.group} has "
                f"{effects} effects for {design.n} rows; expected fewer effects than rows. Use "
                f"priors='default', or give 'sigma' a proper prior (now priors={base!r})."
            )
    if design.n - design.p < 2:
        raise PriorError(
            f"a flat prior on sigma makes the posterior improper: {design.n} rows for {design.p} "
            "fixed effects; expected at least two rows more. Use priors='default'."
        )


# -------------------------------------------------------------------------------------------------
# Words
# -------------------------------------------------------------------------------------------------


def words(prior: Any) -> str:
    """A prior in words, such as ``half-t(3, 140.8)``."""
    if not isinstance(prior, dist.Distribution):
        return f"LKJ({prior:g}) on correlation matrices"
    if is_flat(prior):
        return "flat (improper)"
    if isinstance(prior, dist.FoldedDistribution) and isinstance(prior.base_dist, dist.StudentT):
        t = prior.base_dist
        centre = f", {_number(t.loc)}" if float(t.loc) != 0 else ""
        return f"half-t({_number(t.df)}{centre}, {_number(t.scale)})"
    if any(isinstance(t, residual.RangeToCorrelation) for t in getattr(prior, "transforms", ())):
        # NumPyro unpacks the log-normal law of r into a normal one and its transform
        law = prior.base_dist
        return f"exp(-1/r), r LogNormal({_number(law.loc)}, {_number(law.scale)})"
    name = type(prior).__name__
    if isinstance(prior, dist.Normal):
        name = "normal"
    return f"{name}({', '.join(_arguments(prior))})"


def _arguments(prior: Any) -> Iterator[str]:
    for name in type(prior).arg_constraints:
        value = getattr(prior, name, None)
        if value is not None and np.ndim(value) == 0:
            yield _number(value)


def _number(value: Any) -> str:
    return f"{float(value):.4g}"

r"""Sources of many data sets with one residual structure, padded to a common shape.

Every data set has a source of its own: sums by pattern where there are no random effects and few
positions (``Patterns``, with derivatives in closed form), whitened rows otherwise (``Rows``).
Padding adds nothing to any sum: a row of zeros, a subject of such rows with a pattern that is all
padding (log-determinant 0), a pattern without subjects, a level without rows. What is static about
the structures and only sets units (typical distances, means and SDs of variance covariates, the
largest lag) is made common first, so that they share a program; what changes the parameters
(positions, levels, lags) tells buckets apart.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from lmmjax.buckets import bucket
from lmmjax.gram import Layout, Plan, Standardised
from lmmjax.residual.setup import patterns_source, whitened_rows
from lmmjax.residual.source import Block, Patterns, Rows, Where
from lmmjax.residual.structures import (
    ARMA,
    Autoregressive,
    CompoundSymmetry,
    Family,
    Spatial,
    Structure,
    Variances,
)


class Sizes(NamedTuple):
    """What sources of whitened rows are padded to."""

    subjects: int  # G
    rows: int  # T, of the longest subject
    patterns: int  # P, one of padding included
    chain: tuple[int, ...]  # levels of each factor
    core: tuple[int, ...]
    slots: tuple[int, ...]  # levels of each core factor that a subject meets


class PatternSizes(NamedTuple):
    """What sums by pattern are padded to."""

    patterns: int  # P
    rows: int  # T
    places: int  # U, of the grid


def make_source(design: Any, the_plan: Plan, standardised: Standardised) -> Rows | Patterns:
    """The source of one data set."""
    rows = whitened_rows(design, the_plan, standardised)
    sums = None if design.terms else patterns_source(rows, 1.0)
    return rows if sums is None else sums


# -------------------------------------------------------------------------------------------------
# A common structure
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Common:
    """What structures of one kind have in common: units that change no parameter's meaning."""

    largest: int  # lag
    scale: float  # typical distance
    T: int  # rows of the largest subject
    scales: tuple[float, ...]
    shifts: tuple[float, ...]

    @classmethod
    def of(cls, structures: list[Structure]) -> Common:
        """Medians and maxima over the data sets."""
        families = [s.family for s in structures]
        scales = np.array([s.variances.scales for s in structures], float)
        mean = np.median([_means(s.variances) for s in structures], axis=0)
        sd = np.median(scales, axis=0)
        return cls(
            max(getattr(f, "largest", 0) for f in families),
            float(np.median([getattr(f, "scale", 1.0) for f in families])),
            max(getattr(f, "T", 0) for f in families),
            tuple(sd.tolist()),
            tuple((-mean / sd).tolist()),
        )

    def apply(self, source: Rows | Patterns, own_range: bool = False) -> Rows | Patterns:
        """The source in the common units; ρ of compound symmetry keeps its range if asked to.

        The least ρ is -1/(T-1): that of the largest subject of all data sets is above that of a
        data set of smaller subjects.
        """
        s = source.structure
        variances = replace(s.variances, scales=self.scales, shifts=self.shifts)
        structure = Structure(self._family(s.family, own_range), variances)
        if isinstance(source, Patterns):
            return replace(source, structure=structure, H=self._H(source.H, s.variances))
        H = [self._H(b.H, s.variances) * b.mask[..., None] for b in source.blocks]
        blocks = tuple(replace(b, H=h) for b, h in zip(source.blocks, H, strict=True))
        return replace(source, structure=structure, blocks=blocks)

    def _family(self, family: Family | None, own_range: bool) -> Family | None:
        if isinstance(family, Autoregressive | ARMA):
            return replace(family, largest=self.largest)
        if isinstance(family, Spatial):
            return replace(family, scale=self.scale)
        if isinstance(family, CompoundSymmetry) and not own_range:
            return replace(family, T=self.T)
        return family

    def _H(self, H: np.ndarray, own: Variances) -> np.ndarray:
        """H = x / sd + shift in the common sd and shift; SD ratios have sd 1 and shift 0."""
        x = (H - np.array(own.shifts)) * np.array(own.scales)
        return x / np.array(self.scales) + np.array(self.shifts)


def _means(v: Variances) -> np.ndarray:
    return -np.array(v.shifts, float) * np.array(v.scales, float)


def kind(structure: Structure) -> Any:
    """A key that structures share whose parameters are the same."""
    family, v = structure.family, structure.variances
    if isinstance(family, Autoregressive | ARMA):
        family = replace(family, largest=0)
    elif isinstance(family, Spatial):
        family = replace(family, scale=1.0)
    elif isinstance(family, CompoundSymmetry):
        family = replace(family, T=2)
    return family, v.names, v.kinds


# -------------------------------------------------------------------------------------------------
# Padding
# -------------------------------------------------------------------------------------------------


def sizes_of(rows: Rows | Patterns) -> Any:
    """The sizes of one source; of whitened rows with one more pattern."""
    if isinstance(rows, Patterns):
        P, T = rows.mask.shape
        return PatternSizes(P, T, len(rows.pos))
    layout, width = rows.layout, rows.blocks[0].M.shape[2]
    local = sum(S for _, S, _ in layout.chain)
    core = width - local - layout.p - 1  # columns of the core's slots
    return Sizes(
        sum(len(b.mask) for b in rows.blocks),
        max(b.mask.shape[1] for b in rows.blocks),
        1 + sum(len(b.patterns) for b in rows.blocks),
        tuple(J for _, _, J in layout.chain),
        tuple(J for _, _, J in layout.core),
        _slots(rows, core),
    )


def numbers(rows: Rows | Patterns) -> int:
    """Numbers in the columns or sums of one source, padded to one block."""
    if isinstance(rows, Patterns):
        return rows.sums.size
    sizes = sizes_of(rows)
    return sizes.subjects * sizes.rows * rows.blocks[0].M.shape[2]


def _largest(values: Any) -> Any:
    """The largest of numbers, or of tuples place by place, rounded up to a bucket."""
    if isinstance(values[0], tuple):
        return tuple(_largest(place) for place in zip(*values, strict=True))
    return bucket(max(values)) if max(values) > 1 else 1


def _slots(rows: Rows, columns: int) -> tuple[int, ...]:
    """Slots of each core factor, told from where their columns stand."""
    at, first, out = 0, 0, []
    where = np.asarray(rows.where.core)[:, :columns]
    for _, S, J in rows.layout.core:
        mine = (where >= first) & (where < first + S * J)
        out.append(int(np.max(mine.sum(axis=1), initial=0)) // S)
        at += out[-1] * S
        first += S * J
    assert at == columns, "the slots of a core factor stand side by side"
    return tuple(out)


def common_sizes(sources: list[Any]) -> Any:
    """Sizes that all sources fit into, rounded up to buckets."""
    every = [sizes_of(s) for s in sources]
    return type(every[0])(*(_largest(values) for values in zip(*every, strict=True)))


def pad(source: Any, to: Any) -> Any:
    """The source in the given sizes: rows in one block, or sums by pattern."""
    return _pad_sums(source, to) if isinstance(source, Patterns) else _pad_rows(source, to)


def _pad_sums(source: Patterns, to: PatternSizes) -> Patterns:
    (P, T), U = source.mask.shape, len(source.pos)
    sums = source.sums.reshape(P, T * (T + 1) // 2, -1)  # triangles by row: more rows at the end
    more = to.rows * (to.rows + 1) // 2 - sums.shape[1]
    sums = np.pad(sums, ((0, to.patterns - P), (0, more), (0, 0)))
    both, places = ((0, to.patterns - P), (0, to.rows - T)), ((0, to.places - U), (0, 0))
    return replace(
        source,
        sums=sums.reshape(-1, sums.shape[2]),
        pos=np.pad(source.pos, places),
        H=np.pad(source.H, places),
        place=np.pad(source.place, both),
        mask=np.pad(source.mask, both),
        counts=np.pad(source.counts, (0, to.patterns - P)),
    )


def _pad_rows(rows: Rows, to: Sizes) -> Rows:
    own = sizes_of(rows)
    layout = rows.layout
    padded_layout = dataclasses.replace(
        layout, chain=_resized(layout.chain, to.chain), core=_resized(layout.core, to.core)
    )
    places = _columns(layout, own.slots, to.slots)
    local = sum(S for _, S, _ in layout.chain)
    width = local + sum(S * m for (_, S, _), m in zip(layout.core, to.slots, strict=True))
    return Rows(
        padded_layout,
        rows.structure,
        (_block(rows, to, places, width + layout.p + 1),),
        _where(rows, to, padded_layout, places[local:-1] - local),
        rows.n,
        rows.logdet_W,
    )


def _resized(factors: Any, levels: tuple[int, ...]) -> Any:
    return tuple((t, S, J) for (t, S, _), J in zip(factors, levels, strict=True))


def _columns(layout: Layout, slots: tuple[int, ...], to: tuple[int, ...]) -> np.ndarray:
    """Where each local column goes when each core factor has more slots."""
    local = sum(S for _, S, _ in layout.chain)
    out, at = [np.arange(local)], local
    for (_, S, _), m, more in zip(layout.core, slots, to, strict=True):
        out.append(at + np.arange(S * m))
        at += S * more
    return np.concatenate([*out, at + np.arange(layout.p + 1)])


def _block(rows: Rows, to: Sizes, places: np.ndarray, width: int) -> Block:
    """All blocks as one, padded; subjects of padding have the last pattern, all padding."""
    G, T = to.subjects, to.rows
    dim = rows.blocks[0].pos.shape[2]
    M, mask = np.zeros((G, T, width)), np.zeros((G, T))
    H, pos = np.zeros((G, T, rows.structure.variances.n_phi)), np.zeros((G, T, dim))
    pattern = np.full(G, to.patterns - 1, np.int32)
    patterns, pattern_mask = np.zeros((to.patterns, T, dim)), np.zeros((to.patterns, T))
    g = q = 0
    for b in rows.blocks:
        t, more = b.mask.shape[1], slice(g, g + len(b.mask))
        M[more, :t][..., places] = b.M
        mask[more, :t], H[more, :t], pos[more, :t] = b.mask, b.H, b.pos
        pattern[more] = q + b.pattern
        patterns[q : q + len(b.patterns), :t] = b.patterns
        pattern_mask[q : q + len(b.patterns), :t] = b.pattern_mask
        g, q = g + len(b.mask), q + len(b.patterns)
    return Block(M, mask, H, pos, pattern, patterns, pattern_mask)


def _where(rows: Rows, to: Sizes, layout: Layout, places: np.ndarray) -> Where:
    """Levels of the local columns among the padded ones."""
    own, core = rows.layout, np.asarray(rows.where.core)
    G = to.subjects
    chain = tuple(_more(codes, G) for codes in rows.where.chain)
    parent = tuple(
        tuple(_more(codes, J) for codes in row)
        for row, J in zip(rows.where.parent, to.chain, strict=True)
    )
    moved = core.copy()
    first = new = 0
    for (_, S, J), J_to in zip(own.core, to.core, strict=True):
        mine = (core >= first) & (core < first + S * J)
        moved[mine] += new - first
        first, new = first + S * J, new + S * J_to
    moved[core >= first] += new - first  # X
    width = sum(S * m for (_, S, _), m in zip(own.core, to.slots, strict=True))
    out = np.zeros((G, width + layout.p), np.int32)
    out[:, width:] = new + np.arange(layout.p)
    out[: len(core), places] = moved
    return Where(chain, out, parent)


def _more(codes: Any, size: int) -> np.ndarray:
    """Zeros appended: what is padded has no rows."""
    codes = np.asarray(codes)
    return np.pad(codes, (0, size - len(codes)))


def stack(sources: list[Any]) -> Any:
    """Sources of one shape as one with a leading axis."""
    return jax.tree.map(lambda *a: np.stack(a), *sources)

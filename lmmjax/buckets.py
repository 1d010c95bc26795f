r"""Shapes padded to buckets, so that models of similar size share compiled programs.

Compiling a fit takes a thousand times longer than running it, and compiled code is tied to shapes.
What is padded contributes exactly nothing: a level without rows has zero products, so its block of
Λ'AΛ + I is I and its log-determinant 0; a dummy fixed effect is a unit diagonal of X'X without any
other product, so its coefficient is 0 and its log-determinant 0. The residual degrees of freedom
n - p stay right if n counts the dummies too (REML).

On a processor the levels of a large factor by itself are gone through in blocks that fit its cache
(likelihood.over_blocks); an accelerator takes them at once, and so does a fit over several devices.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from lmmjax.cross import Cross, Pairs
from lmmjax.gram import Gram, Layout, Rhs

#: a dense core is factorised in cubic time: beyond this many columns padding would cost
LARGEST_CORE = 64

#: levels from which a factor by itself is gone through in blocks, and levels of a block at most:
#: its arrays, some 60 numbers a level for a slope, then stay in the second-level cache
MANY_LEVELS, BLOCK_LEVELS = 2**14, 2**12


def bucket(size: int, steps: int = 2) -> int:
    """The next size that programs are compiled for: ``steps`` sizes for each doubling, from 4 on.

    >>> [bucket(n) for n in (1, 4, 5, 7, 18, 100, 5000)]
    [4, 4, 6, 8, 24, 128, 6144]
    """
    if size <= 4:
        return 4
    unit = max(1, 2 ** ((size - 1).bit_length() - 1) // steps)
    return -(-size // unit) * unit


def bucket_levels(size: int) -> int:
    """Finer buckets for many levels, whose arithmetic costs more than their compilation."""
    return bucket(size, 2 if size < 1000 else 8 if size < MANY_LEVELS else 16)


def level_blocks(J: int) -> int:
    """In how many equal blocks a processor goes through J levels of a factor by itself.

    >>> [level_blocks(J) for J in (18, 8192, 20480, 204800)]
    [1, 1, 5, 50]
    """
    if J < MANY_LEVELS:
        return 1
    fits = (n for n in range(-(-J // BLOCK_LEVELS), J // 8 + 1) if J % (8 * n) == 0)
    return next(fits, 1)


def padded_layout(layout: Layout) -> Layout:
    """The layout of the bucket into which a model falls."""
    core = layout.core
    if layout.d <= LARGEST_CORE and not layout.sparse:
        core = tuple((terms, S, bucket(J)) for terms, S, J in core)
    chain = tuple((terms, S, bucket_levels(J)) for terms, S, J in layout.chain)
    p = bucket(layout.p) if layout.p else 0
    blocks = 1
    if len(chain) == 1 and not core and jax.default_backend() == "cpu":
        blocks = level_blocks(chain[0][2])
    return dataclasses.replace(layout, chain=chain, core=core, p=p, blocks=blocks)


def pad(layout: Layout, gram: Gram, rhs: Rhs) -> tuple[Layout, Gram, Rhs]:
    """Zero levels and dummy fixed effects added; n as it was (see :func:`with_dummies`).

    O(size of the Gram) time; the arrays keep their type.
    """
    to = padded_layout(layout)
    if to == layout:
        return layout, gram, rhs
    core = np.concatenate([_core_positions(layout, to), to.d + np.arange(layout.p)])
    fixed = to.d + np.arange(layout.p, to.p)
    border = np.arange(layout.p) if layout.sparse else core
    width = to.p + (0 if layout.sparse else to.d)
    full = np.zeros((to.d + to.p, to.d + to.p), gram.core.dtype)
    full[np.ix_(core, core)] = gram.core
    full[fixed, fixed] = 1.0
    sizes = [J for _, _, J in to.chain]
    padded = Gram(
        own=tuple(_levels(a, J) for a, J in zip(gram.own, sizes, strict=True)),
        up=tuple(tuple(_levels(a, J) for a in row) for row, J in zip(gram.up, sizes, strict=True)),
        parent=tuple(
            tuple(_levels(a, J) for a in row) for row, J in zip(gram.parent, sizes, strict=True)
        ),
        border=tuple(_border(a, border, width, J) for a, J in zip(gram.border, sizes, strict=True)),
        core=full,
        n=gram.n,
        logdet_R=gram.logdet_R,
        times=tuple(_levels(a, J) for a, J in zip(gram.times, sizes, strict=False)),
        cross=None if gram.cross is None else _pad_cross(gram.cross, layout.d, to.d),
    )
    y = _spread(rhs.core, core, to.d + to.p, axis=0)
    ends = [_levels(a, J) for a, J in zip(rhs.border, sizes, strict=True)]
    return to, padded, Rhs(tuple(ends), y, rhs.yy)


def with_dummies(gram: Gram, dummies: int, method: str) -> Gram:
    """The Gram whose n counts the dummy fixed effects where the criterion subtracts them."""
    return gram._replace(n=gram.n + dummies) if method == "REML" else gram


def _core_positions(layout: Layout, to: Layout) -> np.ndarray:
    """Where each column of the core goes."""
    out, at = [np.zeros(0, int)], 0
    for (_, S, J), (_, _, J_to) in zip(layout.core, to.core, strict=True):
        out.append(at + np.arange(S * J))
        at += S * J_to
    return np.concatenate(out)


def _levels(a: Any, J: int) -> np.ndarray:
    """Zeros appended to the last axis."""
    out = _zeros((*np.shape(a)[:-1], J), a.dtype)
    out[..., : np.shape(a)[-1]] = a
    return out


def _zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros whose memory JAX can use as it is on a processor: at a multiple of 64 bytes."""
    size, line = math.prod(shape) * np.dtype(dtype).itemsize, 64
    memory = np.zeros(size + line, np.uint8)
    start = -memory.ctypes.data % line
    return memory[start : start + size].view(dtype).reshape(shape)


def _border(a: Any, positions: np.ndarray, width: int, J: int) -> np.ndarray:
    """Columns moved to ``positions`` of ``width``, and zero levels appended: (S, width, J)."""
    out = _zeros((a.shape[0], width, J), a.dtype)
    if np.array_equal(positions, np.arange(len(positions))):
        out[:, : len(positions), : a.shape[-1]] = a  # half the time of an index array
    else:
        out[:, positions, : a.shape[-1]] = a
    return out


def _spread(a: Any, positions: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Entries moved to ``positions`` along an axis of the new ``size``, zeros elsewhere."""
    shape = list(np.shape(a))
    shape[axis] = size
    out = np.zeros(shape, a.dtype)
    where: list[Any] = [slice(None)] * len(shape)
    where[axis] = positions
    out[tuple(where)] = a
    return out


def _pad_cross(cross: Cross, d: int, to: int) -> Cross:
    """Entries and pairs of value 0 appended; the core of a sparse layout keeps its columns."""
    assert d == to, "the core of a sparse layout is not padded"
    m = bucket(len(cross.level), 8)
    level, column, value = (_levels(a, m) for a in cross[:3])
    return Cross(level, column, value, _pad_pairs(cross.pairs))


def _pad_pairs(pairs: Pairs | Any) -> Any:
    """Cells and rows appended; circles, of which there are many pairs, stay."""
    if not isinstance(pairs, Pairs):
        return pairs
    rows = bucket(len(pairs.level), 8)
    more = [(0, rows - len(pairs.level)), (0, 0)]
    return Pairs(
        _levels(pairs.cells, bucket(len(pairs.cells), 8)),
        _levels(pairs.level, rows),
        np.pad(pairs.cell, more),
        np.pad(pairs.value, [(0, 0), (0, 0), *more]),
    )

"""One BLAS thread during a fit.

The factorisations of a crossed core are too small for many threads to pay, and beside other work
OpenBLAS threads wait for each other: InstEval was six times slower beside one busy process.
Compiled code calls SciPy's OpenBLAS, whose threads are those of the whole process, so the limit is
counted: the first fit that enters sets it, the last one that leaves restores what was there.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

#: a dense core of fewer columns never wakes a second BLAS thread
SMALL = 64

_lock = threading.Lock()
_inside: list[Any] = []  # limiters in force: one entry per fit, the first one holds the old numbers


@functools.cache
def _controller() -> Any:
    """The BLAS libraries of the process, SciPy's (which JAX calls) and NumPy's."""
    import scipy.linalg  # noqa: F401  loads its library, so that it is found
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def one_blas_thread(wanted: bool = True) -> AbstractContextManager[None]:
    """Run the block with one BLAS thread, where ``wanted``; safe in several threads at once."""
    return _limited() if wanted else nullcontext()


@contextmanager
def _limited() -> Iterator[None]:
    with _lock:
        _inside.append(None if _inside else _controller().limit(limits=1, user_api="blas"))
    try:
        yield
    finally:
        with _lock:
            limiter = _inside[0]
            _inside.pop()
            if not _inside:
                limiter.restore_original_limits()

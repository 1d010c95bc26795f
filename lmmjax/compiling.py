"""Programs compiled before they run, and the compiler's memory handed back in between.

XLA takes some 150 MB to compile a fit, 1.2 MB for each kernel, and frees them; the C library keeps
most of that for later allocations of small pieces, while large arrays are new memory.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

_done: set[Any] = set()


def compiled_first(program: Any, key: Any, *args: Any, **static: Any) -> Any:
    """Call a jitted ``program``; at the first call of a ``key`` compile it apart from running it.

    Parameters
    ----------
    program : function under ``jax.jit``
        It keeps what is compiled here: the call itself finds it.
    key : hashable
        What is static about the call, and its shapes and types.
    """
    if (key := (program, key)) not in _done:
        program.lower(*args, **static).compile()
        return_free_memory()
        _done.add(key)
    return program(*args, **static)


def return_free_memory() -> None:
    """Give memory that is free within the C library back to the system (glibc; else nothing)."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim

"""Double precision without touching the caller's JAX configuration.

Public methods run inside :func:`float64` and hand back NumPy and pandas, so the caller's own
arrays and compiled functions never change their type. Functions that are *given away* to be
transformed by the caller (``Model.deviance``, ``Model.numpyro_model``) cannot switch precision
under somebody else's ``grad`` or ``jit``; they check it with :func:`require_float64` instead.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from lmmjax.errors import PrecisionError


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Run the block in double precision; nothing outside the block changes.

    The switch is local to the thread that enters it: a worker thread enters its own.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import lmmjax as lmm
    >>> with lmm.float64():
    ...     jnp.zeros(2).dtype
    dtype('float64')
    """
    with jax.enable_x64(True):
        yield


def in_float64[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public method so that its body runs in double precision.

    A caller's strict promotion of ranks or types holds for the caller's code, not for ours.
    """

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return inside


def is_float64() -> bool:
    """Tell whether JAX makes float64 arrays at this place."""
    return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]


def require_float64(name: str) -> None:
    """Raise :class:`PrecisionError` where ``name`` would silently lose half its digits."""
    if not is_float64():
        raise PrecisionError(
            f"{name} was called while JAX makes 32-bit arrays; it needs 64-bit ones. "
            "Put the call, and the transformation around it, inside `with lmmjax.float64():`, "
            'or build the model with dtype="float32" to accept the loss of digits.'
        )


def enable_cache(path: str | os.PathLike[str] | None = None) -> Path | None:
    """Keep compiled programs on disk, so that the next process need not compile them again.

    A cache that the user has set before is respected: its folder is returned and nothing changes.
    Where ``LMMJAX_CACHE`` is set, the library calls this itself before it computes.

    Parameters
    ----------
    path : path, optional
        Folder of the cache. By default ``LMMJAX_CACHE``, or ``lmmjax`` in the user's cache folder.

    Returns
    -------
    pathlib.Path or None
        The folder in use. None if it cannot be written, which a warning says once: programs are
        then compiled anew.
    """
    already = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if already:
        return Path(already)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(path or os.environ.get("LMMJAX_CACHE") or Path(base) / "lmmjax")
    if not _writable(folder):
        # JAX would complain once for every program that it compiles
        _tell_once(folder)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return folder


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@functools.cache
def _tell_once(folder: Path) -> None:
    warnings.warn(
        f"the cache {folder} cannot be written; compiled programs are not kept. Set LMMJAX_CACHE "
        "to a folder that can be written.",
        stacklevel=3,
    )


# Everything that compiles imports this module first
if os.environ.get("LMMJAX_CACHE"):
    enable_cache()

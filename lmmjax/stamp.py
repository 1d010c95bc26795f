"""Identities of functions, objects and tables that hold from one process to the next.

What was computed with a function may be read back only for the same function. Its address says
nothing about that; its source, the values it encloses and the globals it reads do.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import inspect
import json
import sys
import sysconfig
import types
from typing import Any

import numpy as np
import pandas as pd

from lmmjax.errors import DataError

__all__ = ["digest", "stamp", "table_digest"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def stamp(value: Any, what: str) -> str:
    """Identify an object by its attribute ``key``, or by its source and the values it holds.

    Parameters
    ----------
    value : object
        A function, or an object with a state.
    what : str
        Its name in messages.

    Raises
    ------
    DataError
        If there is no ``key``, and the source or a value cannot be read.

    Examples
    --------
    >>> import math
    >>> stamp(math.sqrt, "method 'root'") == stamp(math.sqrt, "method 'root'")
    True
    """
    key = getattr(value, "key", None)
    if key is not None:
        return f"key {key}"
    try:
        return digest(json.dumps(_identity(value, ())).encode())
    except _UnknownError as err:
        raise DataError(
            f"{what} cannot be recognised in another process: {err}; expected Python source and "
            "plain values. Give it an attribute key, a text to be changed whenever it changes."
        ) from err


def digest(content: bytes) -> str:
    """Return 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def table_digest(data: Any) -> str:
    """Identify a table by its names, types, levels and rows, each in their order."""
    import narwhals as nw

    frame = pd.DataFrame(data) if isinstance(data, pd.DataFrame | dict) else None
    if frame is None:
        frame = nw.from_native(data).lazy().collect().to_pandas()
    heads = []
    for i, name in enumerate(frame.columns):
        kind = frame.dtypes.iloc[i]
        levels = [*kind.categories, kind.ordered] if isinstance(kind, pd.CategoricalDtype) else []
        heads.append([str(name), str(kind), *map(str, levels)])
    rows = pd.util.hash_pandas_object(frame).to_numpy()
    return digest(json.dumps(heads).encode() + rows.tobytes())


class _UnknownError(Exception):
    """A value without an identity."""


def _identity(value: Any, seen: tuple[int, ...]) -> Any:
    """Texts and lists of them that are equal in another process where the value is."""
    if isinstance(value, _PLAIN):
        return f"{type(value).__name__} {value!r}"
    if id(value) in seen:
        return "itself"
    seen = (*seen, id(value))
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        array = np.ascontiguousarray(value)
        return [array.dtype.str, list(array.shape), digest(array.tobytes())]
    if isinstance(value, pd.DataFrame | pd.Series):
        return ["table", table_digest(pd.DataFrame(value))]
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(_identity(v, seen) for v in value)]
    if isinstance(value, dict):
        return ["dict", *([_identity(k, seen), _identity(v, seen)] for k, v in value.items())]
    if isinstance(value, set | frozenset):
        return ["set", *sorted(json.dumps(_identity(v, seen)) for v in value)]
    if isinstance(value, types.ModuleType):
        return ["module", value.__name__]
    return _of_code(value, seen)


def _of_code(value: Any, seen: tuple[int, ...]) -> Any:
    """Identity of what has source: functions, classes, instances."""
    plain = isinstance(value, types.FunctionType)
    if callable(value) and not plain:
        value = inspect.unwrap(value)  # a compiled or cached function: that which it calls
    if isinstance(value, functools.partial):
        return ["partial", *(_identity(v, seen) for v in (value.func, value.args, value.keywords))]
    if isinstance(value, types.MethodType):
        return ["method", _identity(value.__self__, seen), value.__name__]
    module = getattr(value, "__module__", None) or "builtins"
    named = hasattr(value, "__qualname__") or isinstance(value, np.ufunc)
    if named and _installed(module) and not (plain and module == "builtins"):  # made by exec
        return [module, getattr(value, "__qualname__", value.__name__)]
    if isinstance(value, types.FunctionType):
        return ["function", _source(value), *_surroundings(value, seen)]
    if isinstance(value, type):
        parts = (
            getattr(f, "fget", None) or getattr(f, "__func__", f) for f in vars(value).values()
        )
        inside = (f for f in parts if isinstance(f, types.FunctionType))
        bases = [_identity(base, seen) for base in value.__bases__]
        # what dataclasses write themselves has no source, and follows from that of the class
        own = (f for f in inside if f.__code__.co_filename not in ("<string>", "<stdin>"))
        return ["class", _source(value), bases, [_surroundings(f, seen) for f in own]]
    return ["instance", _identity(type(value), seen), _state(value, seen)]


def _state(value: Any, seen: tuple[int, ...]) -> Any:
    kind = type(value)
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value)]
    elif hasattr(value, "__dict__") and not _installed(kind.__module__):
        lazy = functools.cached_property
        names = [n for n in vars(value) if not isinstance(getattr(kind, n, None), lazy)]
    else:
        raise _UnknownError(f"it uses an object of type {kind.__name__}")
    return [[name, _identity(getattr(value, name), seen)] for name in names]


def _surroundings(function: types.FunctionType, seen: tuple[int, ...]) -> list[Any]:
    """Defaults, enclosed values, and the globals that the code reads."""
    code = function.__code__
    cells = [c.cell_contents for c in function.__closure__ or () if c.cell_contents is not None]
    known = function.__globals__
    read = {name: known[name] for name in sorted(_globals_of(code)) if name in known}
    values = (function.__defaults__, function.__kwdefaults__, cells, read)
    return [*(_identity(v, seen) for v in values), _place(code)]


def _globals_of(code: types.CodeType) -> set[str]:
    names = {i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD_GLOBAL")}
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return names.union(*map(_globals_of, inner))


def _place(code: types.CodeType) -> list[int]:
    """Columns of a lambda: a line of source may hold several."""
    if code.co_name != "<lambda>":
        return []
    at = [p for p in code.co_positions() if p[2] is not None and p[3]]
    return [min(p[2] or 0 for p in at), max(p[3] or 0 for p in at)] if at else []


def _source(value: Any) -> str:
    try:
        return inspect.cleandoc("\n" + inspect.getsource(value))
    except (OSError, TypeError) as err:
        raise _UnknownError(f"{value.__qualname__} has no source that can be read") from err


def _installed(module: str) -> bool:
    """Tell code of libraries, which its name identifies, from code of the user."""
    root = module.partition(".")[0]
    if root in ("lmmjax", *sys.stdlib_module_names) and root != "__main__":
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return any(file.startswith(sysconfig.get_path(kind)) for kind in ("purelib", "platlib"))

"""Settings that every test shares."""

import os
from pathlib import Path

import jax
import pytest

# Plots are drawn to memory: a machine that runs tests need not have a display.
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """The cache of compiled programs is a setting of the process: leave that of the tests alone."""
    from lmmjax import cli

    monkeypatch.setattr(cli, "use_cache", lambda: None)


#: a compiled program maps its code into memory, and the system allows a process 65,530 mappings
MOST_MAPPINGS = 30_000


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Forget compiled programs before there are more than a process may map."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()

"""Settings that every test shares."""

import os

import pytest

# Plots are drawn to memory: a machine that runs tests need not have a display.
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """The cache of compiled programs is a setting of the process: leave that of the tests alone."""
    from lmmjax import cli

    monkeypatch.setattr(cli, "use_cache", lambda: None)

"""Settings that every test shares."""

import os

# Plots are drawn to memory: a machine that runs tests need not have a display.
os.environ.setdefault("MPLBACKEND", "Agg")

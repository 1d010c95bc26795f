# `make demo` and `make test` need Python 3.12 or newer with pip, and make. Both build .venv first.

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
MODERN := import sys; sys.exit(sys.version_info < (3, 12))

# The first Python that is new enough; set PYTHON=... to choose another one.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12; do \
	$$p -c '$(MODERN)' >/dev/null 2>&1 && { echo $$p; break; }; done)

# The suite compiles more than it computes, so a second process pays.
WORKERS ?= 2

.PHONY: demo test slow spark lint bench bench-peers install clean
.DEFAULT_GOAL := demo

demo: install  ## ML, REML and NUTS on the sleep study, compared
	$(PY) -m lmmjax.demo

test: install  ## every fast test, doctest and notebook
	$(PY) -m pytest -n $(WORKERS)

slow: install  ## calibration, coverage and large data: minutes to hours
	$(PY) -m pytest -m slow

spark: install  ## the Spark source, local mode: needs Java 17, fetches some 450 MB
	$(PY) -m pip install --quiet --editable '.[dev,spark]'
	$(PY) -m pytest -k spark tests/test_stream.py

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy lmmjax

bench-peers: install  ## the other libraries, each in an environment of its own under .bench
	$(PY) -m benchmarks.peers setup

bench: bench-peers  ## measure everything and write docs/benchmarks.md
	$(PY) -m benchmarks

install: $(STAMP)

# Without ensurepip (Debian's python3 without python3-venv), the outer pip fills the environment.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(MODERN)' || { \
	  echo "lmmjax needs Python 3.12 or newer; found: $$($(or $(PYTHON),python3) --version 2>&1)." \
	       "Install it, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip --clear $(VENV) && \
	  $(PYTHON) -m pip --python $(PY) install --quiet pip; }
	$(PY) -m pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache

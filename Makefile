# make demo and make test set up everything they need in .venv; only Python and make are assumed.
PYTHON ?= python3
VENV ?= .venv
# Where pip finds torch; empty is pip's own default. The README says how to get a CPU-only build.
TORCH_INDEX ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# One thread a process: two of them share the machine with Ray's workers.
export OMP_NUM_THREADS ?= 1
# Processes that share the tests without Ray.
WORKERS ?= 2
# Tests that start Ray have the machine to themselves: they wait for deaths, heartbeats and workers.
# Tests start hundreds of processes, which would compile the package each where PYTHONDONTWRITEBYTECODE is set.
COMPILE := $(BIN)/python -m compileall -q lcray

.PHONY: demo test test-slow fuzz soak coverage docs lint types bench gpu setup clean

demo: $(VENV)/.demo
	$(BIN)/lcray demo

test: $(VENV)/.dev
	$(COMPILE)
	$(BIN)/python -m pytest -m "not slow and not ray and not alone" -n $(WORKERS) --dist worksteal
	$(BIN)/python -m pytest -m "not slow and (ray or alone)"

test-slow: $(VENV)/.dev
	$(COMPILE)
	$(BIN)/python -m pytest -m "slow and not ray and not alone" -n $(WORKERS) --dist worksteal
	$(BIN)/python -m pytest -m "slow and (ray or alone)"

fuzz: $(VENV)/.dev
	LCRAY_FUZZ=100000 $(BIN)/python -m pytest -m slow tests/project/test_fuzz.py

coverage: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow or not slow" --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

# The site, into site/; a slow test builds it as well, and checks that it asks no network.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

soak: $(VENV)/.dev
	$(BIN)/python -m tests.soak

bench: $(VENV)/.dev
	$(BIN)/python -m tests.benchmarks

# What takes another way on a GPU; nothing of it starts Ray.
gpu: $(VENV)/.dev
	$(BIN)/python -m pytest tests/gpu -rs

setup: $(VENV)/.dev

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage

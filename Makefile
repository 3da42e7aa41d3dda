# Needs Python 3.11 or newer and make, no root: everything is installed into .venv.
#
#   PYTHON=python3.12     the interpreter that makes .venv
#   PIP_ARGS="..."        more arguments for every pip install, such as a package index
#   ARGS="..."            more arguments for `make smoke`, `make test`, `make cluster`, `make soak` and the benchmarks
#   SETUP= BIN=/usr/bin   with `make test-gpu` and `make bench-gpu`: a Python that has everything, and nothing installed

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := setup
STAMP := $(VENV)/.setup-done
TWO := --numprocesses 2 --dist loadfile
PIP_INSTALL = -m pip install --disable-pip-version-check --quiet -c constraints.txt $(PIP_ARGS)

SHELL := /bin/sh
.SHELLFLAGS := -eu -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup smoke check test test-gpu bench-gpu bench-cpu soak cluster wheel wheel-test clean

help:  ## print this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## create .venv with everything pinned in constraints.txt, and mempar itself, editable

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "setup: there is no '$(PYTHON)' here; mempar needs Python 3.11 or newer; use make PYTHON=/path/to/python3"; \
	  exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "setup: '$(PYTHON)' is $$($(PYTHON) -V); mempar needs Python 3.11 or newer; use make PYTHON=python3.11"; \
	  exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "setup: '$(PYTHON)' cannot make a virtual environment: its modules venv or ensurepip are missing;" \
	    "Debian and Ubuntu ship them apart, in python3-venv: install that, or use make PYTHON=<another Python>"; \
	  exit 1; } >&2
	$(PYTHON) -m venv $(VENV)

# Build backends are installed first, so that they are pinned too and the later builds need no network; setuptools is
# deepspeed's, which is served as source alone.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(PIP_INSTALL) hatchling editables setuptools
	$(BIN)/python $(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

smoke: setup  ## train the smoke recipe on this machine
	$(BIN)/mempar train smoke $(ARGS)

check: setup  ## formatting, lint, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# Two files at a time: many tests wait, for processes to start or to be missed.
test: setup check  ## check, then every test that needs no GPU and no patience
	$(BIN)/python -m pytest $(TWO) $(ARGS)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO) tests/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_oracle_law.py tests/test_exchange.py tests/test_gradsync.py \
	  -k "two-row_adam-untied-mha-float32 or float32-3x2 or sum_over"

test-gpu: $(SETUP)  ## on one GPU: every operation's kernels, and the laws of the engine on them
	$(BIN)/python -m pytest tests/kernels tests/test_oracle_law.py --device cuda
	$(BIN)/python -m pytest tests/gpu -m gpu $(ARGS)

bench-gpu: $(SETUP)  ## on one GPU: every operation at the recipes' shapes, right first, then timed
	$(BIN)/python benchmarks/kernels.py --device cuda $(or $(ARGS),--out benchmarks/results/kernels-gpu.json)

bench-cpu: setup  ## the operations of torch on this machine, beside F.embedding_bag
	$(BIN)/python benchmarks/kernels.py --device cpu $(or $(ARGS),--out benchmarks/results/kernels-cpu.json)

soak: setup  ## the long randomised runs
	$(BIN)/python -m pytest -m soak $(ARGS)

cluster: setup  ## as root on Debian: launches on a SLURM of two nodes and on hosts in network namespaces, pages in Chromium
	$(BIN)/python -m pytest -m cluster tests/cluster $(ARGS)

wheel: setup  ## build the wheel into dist/
	rm -rf dist
	$(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

wheel-test: wheel  ## install the wheel in a fresh environment outside the tree and train two steps
	@root="$$PWD"; work="$$(mktemp -d)"; trap 'rm -rf "$$work"' EXIT; trap 'exit 130' INT TERM; \
	$(BIN)/python -m venv "$$work/venv"; \
	"$$work/venv/bin/python" $(PIP_INSTALL) "$$root"/dist/mempar-*.whl; \
	cd "$$work"; \
	venv/bin/mempar --help; \
	venv/bin/mempar train smoke train.steps=2 --out "$$work/run"; \
	echo "wheel-test: ok"

clean:  ## remove build outputs and caches; .venv and runs/ stay
	rm -rf dist build .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything from an empty machine with Python >= 3.11 and make. `make demo`, `make test`, `make check`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check docs dist matrix gpu bench models coverage clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP) check
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as static files in site/, which open without a server or a network.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Wheel and source distribution in dist/; tests/test_packaging.py looks into both.
dist: $(STAMP)
	$(BIN)/python -m hatchling build

# Every Python on this machine with every torch that is asked for: make matrix TORCH="2.6 2.13"
matrix: $(STAMP)
	$(BIN)/python benchmarks/matrix.py --out results/matrix.json $(if $(TORCH),--torch $(TORCH))

gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

bench: $(STAMP)
	$(BIN)/python benchmarks/step_cost.py

# Stock models of other packages; nothing else needs them.
models: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --requirement benchmarks/stock.txt

coverage: models
	$(BIN)/python benchmarks/coverage.py --out results/coverage.json

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# torch first and alone: pip then takes the CPU build where one is at hand, and nothing later pulls another one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab,dev]'
	touch $@

clean:
	rm -rf $(VENV) .matrix build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis runs

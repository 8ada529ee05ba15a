# make demo: environment, install, starter model and data, a real run, its plot and table. make test: the test suite.
PYTHON ?= python3
VENV := .venv
WORKERS ?= 2
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test product matrix check bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/gradientless train --yes

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

product: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses $(WORKERS) tests/language/test_product.py --product

matrix: $(VENV)/.installed
	$(BIN)/python tests/architectures/matrix.py --out docs/architectures.md

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/gld_step.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache

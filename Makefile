# make demo: environment, install, starter model and data, a real run, its plot and table. make demo-head: a second one,
# of a head. make test: the test suite.
# make test-newest, make test-oldest: the suite with the newest and the oldest versions that pyproject.toml allows.
PYTHON ?= python3
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
WORKERS ?= 2
VERSIONS := pinned
VENV := .venv$(if $(filter-out pinned,$(VERSIONS)),-$(VERSIONS))
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INSTALL := $(BIN)/python -m pip install --quiet
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo demo-head test test-newest test-oldest product matrix check bench constraints clean

$(VENV)/.installed: pyproject.toml constraints.txt constraints.py
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --constraint constraints.txt --upgrade pip
ifeq ($(VERSIONS),pinned)
	$(INSTALL) --constraint constraints.txt --build-constraint constraints.txt --editable ".[dev]"
else ifeq ($(VERSIONS),oldest)
	$(INSTALL) --no-deps --editable .
	$(BIN)/python constraints.py oldest > $(VENV)/oldest.txt
	$(INSTALL) --constraint $(VENV)/oldest.txt --editable ".[dev]"
else
	$(INSTALL) --upgrade --upgrade-strategy eager --editable ".[dev]"
endif
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/gradientless train demo --yes

demo-head: $(VENV)/.installed
	$(BIN)/gradientless train --yes

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --versions $(VERSIONS)

test-newest:
	rm -f .venv-newest/.installed  # what is newest changes from day to day
	$(MAKE) test VERSIONS=newest

test-oldest:
	$(MAKE) test VERSIONS=oldest

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

constraints: $(VENV)/.installed
	$(BIN)/python constraints.py pinned $(PYTHONS) > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf .venv .venv-newest .venv-oldest build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache

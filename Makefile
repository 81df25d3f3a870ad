# Two commands on a fresh machine: `make tune` and `make test`.
# TORCH: the build of torch to install. The default is a CPU build where the index offers one;
# GPU users: make tune TORCH='torch>=2.4'
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/vit8

.PHONY: tune test fast lint bench clean

tune: $(VENV)/.installed
	@if [ -e $(RUN)/study.db ]; then $(BIN)/bmm tune --resume $(RUN); \
	else $(BIN)/bmm tune --anchor tsv --budget 50 --out $(RUN); fi

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/zoo.py --quick

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

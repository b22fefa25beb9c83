# make run: the main job. make help: what else there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_ARGS ?=

.PHONY: help run test check bench fidelity experiment experiments clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

## make run                 set up, then the main job; ends with runs/<id>/report.html
run: $(VENV)/.ready
	$(BIN)/testbed run experiments/first_run/run.toml $(RUN_ARGS)

## make test                set up and run all tests
test: $(VENV)/.ready
	$(BIN)/pytest

## make check               format, lint, types, import contracts, quick tests
check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -m 'not live and not real_memory'

clean:
	rm -rf $(VENV) runs

# make run: the main job. make help: what else there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_ARGS ?=

.PHONY: help run test lint check bench fidelity experiment experiments clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	-$(BIN)/python -c 'from testbed.core import compiled; compiled.build()'
	@touch $@

## make run                 set up, then the main job; ends with runs/<id>/report.html
run: $(VENV)/.ready
	$(BIN)/testbed run experiments/first_run/run.toml $(RUN_ARGS)

## make test                set up and run all tests
test: $(VENV)/.ready
	$(BIN)/pytest

## make lint                format, lint, types, import contracts
lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

## make check               the same and quick tests
check: lint
	$(BIN)/pytest -m 'not live and not real_memory'

## make bench               speed: sizes, NVIDIA Dynamo's replay beside ours, a live coordinator's intake
##                          and round trips, lateness, recorder, growth; DYNAMO_REQUESTS=200000 takes long
DYNAMO_REQUESTS ?= 20000
bench: $(VENV)/.ready
	$(BIN)/testbed bench sizes --scale 0.3
	$(BIN)/testbed bench dynamo
	$(BIN)/testbed bench dynamo --instances 1000 --requests $(DYNAMO_REQUESTS) --rate 6450
	$(BIN)/testbed bench intake --nodes 2000 --connections 16 --seconds 5
	$(BIN)/testbed bench roundtrip --seconds 5
	$(BIN)/testbed bench lateness --instances 50 --instances 100 --instances 200 --instances 400 \
		--seconds 5
	$(BIN)/testbed bench recorder
	@mkdir -p runs
	$(BIN)/testbed bench growth --figure runs/growth.svg

## make fidelity            error tables against measured data, and runs/fidelity.html
fidelity: $(VENV)/.ready
	@mkdir -p runs
	$(BIN)/testbed fidelity $(if $(DATA),--data $(DATA)) --html runs/fidelity.html

## make experiment NAME=first_run [MODE=virtual]    RUN_ARGS=--quick for a short one
experiment: $(VENV)/.ready
	$(BIN)/testbed experiment $(NAME) $(if $(MODE),--mode $(MODE)) $(RUN_ARGS)

## make experiments         all of them, in virtual time; RUN_ARGS=--quick for a minute each
experiments: $(VENV)/.ready
	for spec in experiments/*/run.toml; do $(BIN)/testbed experiment $$(dirname $$spec) --mode virtual $(RUN_ARGS) || exit 1; done

clean:
	rm -rf $(VENV) runs

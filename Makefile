# Everything here works on a fresh clone: each target makes what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := deploy/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

# make run TGI_URL=http://host:port | CONFIG=proxy.yaml | LISTEN=host:port
SERVE_ARGS := $(if $(LISTEN),--listen $(LISTEN)) $(if $(TGI_URL),--tgi-url $(TGI_URL)) $(if $(CONFIG),--config $(CONFIG))

.PHONY: help run test check fmt types lint cov fuzz bench load soak e2e clean

help: ## say what each target does
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(VENV)/.run: setup.cfg pyproject.toml $(CONSTRAINTS)
	@echo 'Setting up $(VENV), once; this takes some ten seconds.'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[speed]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --editable '.[speed,test,dev]'
	@touch $@

run: $(VENV)/.run ## serve on 127.0.0.1:8080; TGI_URL=http://host:port or CONFIG=file
	$(BIN)/python -m proxy serve $(SERVE_ARGS)

test: $(VENV)/.dev ## run the tests
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy
	$(BIN)/mypy tests

check: lint types ## formatter, linter, types

fmt: $(VENV)/.dev ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

cov: $(VENV)/.dev ## tests with branch coverage
	$(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage report

fuzz: $(VENV)/.dev ## the property tests with 10,000 examples each, then atheris for FUZZ_SECONDS per target
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -m hypothesis --timeout 0
	$(PIP) --editable '.[fuzz]' || echo 'atheris cannot be installed here'
	$(BIN)/python -m tests.fuzz $(TARGETS)

bench: $(VENV)/.dev ## microbenchmarks, µs per event
	$(BIN)/python -m tests.bench

load: $(VENV)/.dev ## under load by wrk, beside nginx; PEERS=litellm, ARGS='--quick --svg FILE'
	$(BIN)/python -m tests.bench.load $(if $(PEERS),--peers $(PEERS)) $(ARGS)

soak: $(VENV)/.dev ## mixed clients and faults at once for SOAK_MINUTES (2): does anything leak, hang or lie?
	$(BIN)/python -m tests.soak --minutes $(or $(SOAK_MINUTES),2)

build/bench/%: tests/bench/%.c
	@mkdir -p $(@D)
	$(CC) -O2 -std=gnu11 -Wall -Wextra -o $@ $<

e2e: $(VENV)/.dev ## against a real llama.cpp server, where one is found
	$(BIN)/python -m pytest tests/e2e -m e2e

clean: ## remove what the other targets made
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .fuzz .coverage

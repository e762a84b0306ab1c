# Everything here works on a fresh clone: each target makes what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := deploy/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

# make run TGI_URL=http://host:port | CONFIG=proxy.yaml | LISTEN=host:port | COMPILED=1
SERVE_ARGS := $(if $(LISTEN),--listen $(LISTEN)) $(if $(TGI_URL),--tgi-url $(TGI_URL)) $(if $(CONFIG),--config $(CONFIG))

COPY := build/compiled
# Before what is installed; and the current directory, the source's, is not looked at.
FROM_COPY := env PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(COPY)

.PHONY: help run compiled wheel test testcompiled check fmt types lint cov fuzz bench load soak e2e clean

help: ## say what each target does
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/.run: setup.cfg pyproject.toml $(CONSTRAINTS)
	@echo 'Setting up $(VENV), once; this takes some ten seconds.'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[speed]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --editable '.[speed,test,dev,compile]'
	@touch $(VENV)/.compile $@

$(VENV)/.compile: $(VENV)/.run
	$(PIP) --editable '.[speed,compile]'
	@touch $@

run: $(VENV)/.run $(if $(COMPILED),$(COPY)/.done) ## serve on 127.0.0.1:8080; TGI_URL=http://host:port, CONFIG=file, COMPILED=1
	$(if $(COMPILED),$(FROM_COPY)) $(BIN)/python -m proxy serve $(SERVE_ARGS)

compiled: $(COPY)/.done ## have Cython compile what every request runs through, into build/compiled

$(COPY)/.done: deploy/compile.py deploy/lookups.h $(VENV)/.compile $(shell find proxy -name '*.py')
	@echo 'Compiling the proxy into $(COPY); this takes about a minute, on two cores.'
	@$(BIN)/python $< $(COPY)
	@touch $@

wheel: $(COPY)/.done ## a wheel of the compiled proxy in dist, for this Python and this system
	rm -rf build/wheel
	mkdir -p build/wheel
	cp -R $(COPY)/proxy deploy/setup.py setup.cfg pyproject.toml README.md LICENSE build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist ./build/wheel

test: $(VENV)/.dev ## run the tests
	$(BIN)/python -m pytest

testcompiled: $(VENV)/.dev $(COPY)/.done ## run them against the compiled proxy
	cd $(COPY) && rm -rf tests deploy
	cp -R tests deploy Makefile README.md SECURITY.md setup.cfg pyproject.toml $(COPY)
	cd $(COPY) && $(CURDIR)/$(BIN)/python -m proxy --version | grep compiled
	cd $(COPY) && $(CURDIR)/$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy
	$(BIN)/mypy tests
	$(BIN)/mypy deploy/compile.py

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

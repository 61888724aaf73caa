# Every check is defined here once; hooks and CI call these targets.

# The first of these that runs: a version manager's shim may be on PATH without its Python.
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && command -v $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv serve test test-rest test-all determinism faults format lint types arch bench check

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## make .venv and install with constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
		echo "no python3.11 or python3 on PATH; install Python 3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is older than Python 3.11; install that, or name one: make PYTHON=..." >&2; \
		exit 1; }
	"$(PYTHON)" -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

serve: $(STAMP) ## start a server; flags go into ARGS, as in ARGS='--port 8080'
	@exec $(BIN)/afd-server serve $(ARGS)

test: $(STAMP) ## the tests that need no model, no Ray and little time
	$(BIN)/python -m pytest $(ARGS)

test-rest: $(STAMP) ## the others: those marked slow, ray or faults
	$(BIN)/python -m pytest -m 'slow or ray or faults' $(ARGS)

test-all: test test-rest ## all tests

determinism: $(STAMP) ## 10,000 requests alone and in random company, compared bit for bit
	$(BIN)/python -m pytest tests/workers/test_determinism.py --comparisons 10000 --timeout 7200 $(ARGS)

faults: $(STAMP) ## the tests that kill, delay or lose things
	$(BIN)/python -m pytest -m faults $(ARGS)

format: $(STAMP) ## put the code into its form
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .

lint: $(STAMP) ## ruff: rules and form
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

arch: $(STAMP) ## who may import whom
	$(BIN)/lint-imports

bench: $(STAMP) ## open-loop load on a running server; flags go into ARGS
	$(BIN)/afd-server bench $(ARGS)

check: lint types arch test-all ## everything that must hold before a merge

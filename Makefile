# Everything starts here: `make setup`, then `make demo`. Each target installs what it needs first.
#
#   PYTHON=python3.12              the interpreter that makes the virtual environment (3.11 or newer)
#   VENV=.venv                     where that environment is
#   EXTRAS=dev,gpu                 the optional sets of pyproject.toml to install
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu    another index to take the build of torch from
#   ARGS="..."                     more arguments for pytest, `medusa demo` or `medusa serve`
#   TEST_PROCESSES=2               how many processes the tests run in; 0: one, in which --pdb works
#   REQUIRE_SERVICES=1             a test whose service (PostgreSQL, Redis, kubectl, moto) is missing fails, not skips

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup tools demo serve test test-all lint types format clean

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
TORCH_INDEX ?=
ARGS ?=
TEST_PROCESSES ?= 2
REQUIRE_SERVICES ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := .tools
TOOLS_STAMP := $(TOOLS)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

# Nothing below reaches for the network, reports usage, or waits for a token of Ray's.
test test-all demo: export RAY_AUTH_MODE := disabled
test test-all demo: export RAY_USAGE_STATS_ENABLED := 0
test test-all demo: export RAY_TRAIN_HEALTH_CHECK_INTERVAL_S := 0.2
test test-all demo: export HF_HUB_OFFLINE := 1
test test-all demo: export TRANSFORMERS_OFFLINE := 1
test test-all demo: export HF_HUB_DISABLE_TELEMETRY := 1
test test-all demo: export TOKENIZERS_PARALLELISM := false
test test-all demo: export MLFLOW_DISABLE_TELEMETRY := true
test test-all demo: export DO_NOT_TRACK := true
test test-all demo: export AWS_EC2_METADATA_DISABLED := true
test test-all: export REQUIRE_SERVICES := $(REQUIRE_SERVICES)

help: ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 18

setup: $(STAMP) ## make the virtual environment; does nothing while it is up to date

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make setup PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP) --editable ".[$(EXTRAS)]"
	@touch $(STAMP)

tools: $(TOOLS_STAMP) ## lm_eval and guidellm, with which slow tests judge the service, in an environment of their own

$(TOOLS_STAMP): benchmarks/tools.txt constraints.txt
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip --disable-pip-version-check install --constraint constraints.txt \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(TOOLS)/bin/python -m pip --disable-pip-version-check install --requirement benchmarks/tools.txt
	@touch $(TOOLS_STAMP)

demo: $(STAMP) ## the whole path on the small model in this repository: distil, train, prove, serve, ask
	$(BIN)/medusa demo $(ARGS)

serve: $(STAMP) ## the REST service on this machine (ARGS="--model models:/NAME@champion")
	$(BIN)/medusa serve $(ARGS)

test: lint types ## lint, types and the fast tests
	$(BIN)/python -m pytest -m "not gpu and not slow" -n $(TEST_PROCESSES) --no-loadscope-reorder $(ARGS)

test-all: lint types tools ## lint, types and every test that needs no GPU
	PATH="$$PATH:$(CURDIR)/$(TOOLS)/bin" $(BIN)/python -m pytest -m "not gpu" -n $(TEST_PROCESSES) \
	  --no-loadscope-reorder $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP) ## mypy over the core
	$(BIN)/mypy medusa

format: $(STAMP) ## rewrite the files as `make lint` wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove the environment and everything that was made
	rm -rf $(VENV) $(TOOLS) build dist runs mlruns mlflow.db *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything here works on a machine that has Python >= 3.11, make and a package index, and nothing else.
# `make` alone prints the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written when the environment is complete; older than pyproject.toml means that it has to be brought up to date.
STAMP := $(VENV)/.complete

.DEFAULT_GOAL := help
.PHONY: help venv demo test check lint format bench clean

help: ## print this list
	@echo "targets (options for what a target runs go into ARGS, as in: make test ARGS='-k actors'):"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

venv: $(STAMP) ## create .venv with afield (editable) and every tool the tests need

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "afield needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.x" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing afield and its test tools into $(VENV) (the first time takes a minute or two)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

demo: $(STAMP) ## train and serve a classifier with weights in device memory: examples/digits_pipeline.py
	@$(BIN)/python examples/digits_pipeline.py $(ARGS)

# Whole files go to worker processes, in the order that tests/budget.py gives them; not where ARGS takes that plugin away.
SPREAD = $(if $(findstring no:xdist,$(ARGS)),,-n auto --dist loadfile --no-loadscope-reorder)

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest $(SPREAD) --durations=15 $(ARGS)

check: $(STAMP) ## what is quick, for daily work: lint, and the tests that are not marked slow
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest $(SPREAD) -m "not slow" $(ARGS)

lint: $(STAMP) ## check style and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy -p afield

format: $(STAMP) ## apply the style
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(STAMP) ## measure, beside the machine's own limits: benchmarks/micro.py, then device.py (options: DEVICE_ARGS)
	@$(BIN)/python -m benchmarks.micro $(ARGS)
	@$(BIN)/python -m benchmarks.device $(or $(DEVICE_ARGS),$(filter --quick,$(ARGS)))

clean: ## remove what the targets made
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

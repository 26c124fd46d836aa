# Everything here works on a machine that has Python >= 3.11, make and a package index, and nothing else.
# `make` alone prints the targets.

# The environment is .venv. Whoever names a Python (make test PYTHON=python3.12) gets an environment of that version: .venv
# if that is what made it, or if there is none yet, and else one beside it, .venv-3.12. So no Python is taken for another.
VENV := .venv
ifneq ($(origin PYTHON),undefined)
NAMED := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
$(if $(NAMED),,$(error PYTHON=$(PYTHON) cannot be run; name one that can, as in: make test PYTHON=python3.12))
FOUND := $(shell sed -n 's/^version[_a-z]* = \([0-9]*\.[0-9]*\).*/\1/p' .venv/pyvenv.cfg 2>/dev/null)
VENV := .venv$(if $(FOUND),$(if $(filter $(FOUND),$(NAMED)),,-$(NAMED)))
endif
PYTHON ?= python3
BIN := $(VENV)/bin
# Written when the environment is complete; older than one of these files means that it has to be brought up to date.
STAMP := $(VENV)/.complete
# The same with the newest versions that pyproject.toml allows, whatever constraints.txt says.
LATEST := $(VENV)-latest
# For `make lock` alone. What it writes changes with minor versions, so a new one is let in by hand.
UV := .venv-lock/bin/uv
UV_VERSION := uv==0.13.*

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# What builds the package is held to constraints.txt as well; older and newer pips look at different variables for that.
LOCKED := PIP_CONSTRAINT="$$PIP_CONSTRAINT constraints.txt" PIP_BUILD_CONSTRAINT="$$PIP_BUILD_CONSTRAINT constraints.txt"

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-latest check lint format bench build lock clean

help: ## print this list
	@echo "targets (options for what a target runs go into ARGS, as in: make test ARGS='-k actors'):"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

venv: $(STAMP) ## create .venv with afield (editable) and every tool the tests need, in the versions of constraints.txt

# $(call create,DIRECTORY): make an environment, anew where the one that is there does not work.
define create
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "afield needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.x" >&2; exit 1; }
@$(1)/bin/python -c 'import pip' 2>/dev/null || { echo "creating $(1)"; $(PYTHON) -m venv --clear $(1); }
endef

$(STAMP): pyproject.toml constraints.txt
	$(call create,$(VENV))
	@echo "installing afield and its test tools into $(VENV) (the first time takes a minute or two)"
	@$(LOCKED) $(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable '.[test]'
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

# The newest pip, too: it is several times faster. Nothing is compiled: of most modules no test makes use.
test-latest: ## run the tests marked contract with the newest versions that pyproject.toml allows, in .venv-latest
	$(call create,$(LATEST))
	@echo "bringing $(LATEST) up to date with the newest versions"
	@$(LATEST)/bin/python $(PIP_INSTALL) --upgrade pip
	@$(LATEST)/bin/python $(PIP_INSTALL) --no-compile --upgrade --upgrade-strategy eager --editable '.[test]'
	@newer=$$($(LATEST)/bin/python -m pip freeze --exclude-editable | tr _ - \
		| grep -vixF "$$(sed 's/ *[;#].*//; /^$$/d' constraints.txt)"); \
		echo "versions that constraints.txt does not have:" $${newer:-none}
	$(LATEST)/bin/python -m pytest $(SPREAD) -m contract $$(grep -l 'mark\.contract' tests/*.py) $(ARGS)

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

build: $(STAMP) ## make the wheel and the source archive, into dist/
	@$(BIN)/python -m build --no-isolation --outdir dist $(ARGS)

lock: $(UV) ## write constraints.txt anew with the newest versions (ARGS='--upgrade-package numpy': of one package alone)
	@$(UV) pip compile --quiet --universal --python-version 3.11 --extra test --no-annotate --no-emit-index-url \
		--no-emit-find-links --custom-compile-command 'make lock' $(or $(ARGS),--upgrade) -o constraints.txt pyproject.toml
	@# The bounds of tool.uv.environments, which would stand on each line.
	@sed -i "s/python_full_version < '3.14' and //; s/ and sys_platform == 'linux'//; s/ ; sys_platform == 'linux'//" constraints.txt
	@for python in 3.11 3.12 3.13; do for machine in x86_64 aarch64; do \
		$(UV) pip compile --quiet --python-version $$python --python-platform $$machine-manylinux_2_28 --extra test \
			--only-binary :all: --constraint constraints.txt pyproject.toml >/dev/null \
			|| { echo "constraints.txt does not do for Python $$python on $$machine" >&2; exit 1; }; \
	done; done

$(UV): Makefile
	@$(PYTHON) -m venv --clear .venv-lock
	@.venv-lock/bin/python $(PIP_INSTALL) '$(UV_VERSION)'
	@touch $@

clean: ## remove what the targets made
	rm -rf .venv .venv-3.* .venv-latest .venv-lock build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `make demo` and `make test` install what they need by themselves; afterwards they start at once.
#   make demo    the main job on real digits, ends in runs/demo/report.html     (light environment, .venv)
#   make test    all tests; ARGS="..." goes to pytest                            (full environment, .venv-dev)
#   make bench   the numbers: time and memory beside plain loops and peers; ARGS names single benchmarks
#   make compat  the tests of the library on the lowest torch and numpy it supports, and on the newest there are
#   make docs | lint | types | coverage | format | locks | clean

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# Any Python from 3.11 on; the locks were made with 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
ARGS ?=
WORKERS ?= 2

LIGHT := .venv
FULL := .venv-dev
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_PROGRESS_BAR := off

.PHONY: help demo test compat bench docs lint format types coverage locks clean install-light install-full

help:
	@sed -n '1,/^$$/p' Makefile | sed 's/^# \{0,1\}//'

install-light: $(LIGHT)/.installed
install-full: $(FULL)/.installed

# The stamp is touched last, and `.installing` lives for as long as pip copies packages: an installation that was
# interrupted there is started afresh instead of trusted.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Détente needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Name another one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@start=$$SECONDS; \
	 fresh=""; if [ -e $(1)/.installing ] || ! [ -x $(1)/bin/pip ]; then fresh=--clear; fi; \
	 if [ -n "$$fresh" ]; then \
	   echo "Making the $(2) environment $(1) from $(3): about $(4), once."; \
	   $(PYTHON) -m venv --clear $(1); \
	 else \
	   echo "Bringing the $(2) environment $(1) up to date with $(3)."; \
	 fi; \
	 touch $(1)/.installing; \
	 $(1)/bin/pip install -qq -r $(3); \
	 rm $(1)/.installing; \
	 $(1)/bin/pip install -qq --no-deps --no-build-isolation -e .; \
	 touch $(1)/.installed; \
	 echo "Installed in $$((SECONDS - start)) s."
endef

$(LIGHT)/.installed: requirements-light.txt pyproject.toml
	$(call install,$(LIGHT),light,requirements-light.txt,two minutes and 1.6 GB)

$(FULL)/.installed: requirements-dev.txt pyproject.toml
	$(call install,$(FULL),full,requirements-dev.txt,five minutes and 7 GB)

demo: $(LIGHT)/.installed
	@$(LIGHT)/bin/detente demo $(ARGS)

test: $(FULL)/.installed
	@$(FULL)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# What the metadata promise: the lowest versions, whose gaps only running shows, and the newest that pip finds.
# Warnings are no errors here: another version deprecates other names. COMPAT names what is run, and
# VERSIONS with which.
COMPAT ?= tests/geometry tests/methods tests/laws tests/autograd tests/step tests/optim tests/linesearch \
  tests/distributed tests/training tests/records tests/statistics tests/experiments
lowest := "torch==2.6.0" "numpy==2.0.0"
newest := torch numpy
VERSIONS ?= lowest newest

compat:
	@for name in $(VERSIONS); do \
	   where=.venv-compat-$$name; \
	   case $$name in lowest) pins='$(lowest)';; newest) pins='--upgrade $(newest)';; esac; \
	   if ! [ -e $$where/.installed ]; then \
	     echo "Making $$where: minutes and several GB, once."; \
	     $(PYTHON) -m venv --clear $$where; \
	     eval "$$where/bin/pip install -qq $$pins -e '.[train,report,dev]'"; \
	     touch $$where/.installed; \
	   fi; \
	   echo "=== $$name: $$($$where/bin/python -c 'import numpy, torch; print("torch", torch.__version__, "numpy", numpy.__version__)')"; \
	   $$where/bin/python -m pytest -n $(WORKERS) --dist worksteal -q -W default $(COMPAT) $(ARGS); \
	 done

bench: $(FULL)/.installed
	@$(FULL)/bin/python -m benchmarks $(ARGS)

docs: $(FULL)/.installed
	@NO_MKDOCS_2_WARNING=1 $(FULL)/bin/mkdocs build --strict --quiet && echo "Docs: site/index.html"

lint: $(FULL)/.installed
	@$(FULL)/bin/ruff check . && $(FULL)/bin/ruff format --check .

format: $(FULL)/.installed
	@$(FULL)/bin/ruff check --fix . ; $(FULL)/bin/ruff format .

types: $(FULL)/.installed
	@$(FULL)/bin/mypy

coverage: $(FULL)/.installed
	@$(FULL)/bin/coverage erase
	@$(FULL)/bin/coverage run -m pytest -n $(WORKERS) --dist worksteal -q $(ARGS)
	@$(FULL)/bin/coverage combine --quiet && $(FULL)/bin/coverage report

# Resolve the .in files anew in throw-away environments and write what pip chose.
locks:
	@for name in light dev; do \
	   where=$$(mktemp -d); \
	   echo "Resolving requirements-$$name.in (minutes)"; \
	   $(PYTHON) -m venv $$where && $$where/bin/pip install -qq -r requirements-$$name.in; \
	   { printf '%s\n' \
	       "# Made by 'make locks' (Linux, x86-64, Python 3.11): requirements-$$name.in resolved in a fresh environment," \
	       "# then 'pip freeze --all' without pip and detente, and without local version suffixes."; \
	     $$where/bin/pip freeze --all --exclude pip --exclude detente | sed -E 's/\+[A-Za-z0-9.]+$$//'; \
	   } > requirements-$$name.txt.new; \
	   mv requirements-$$name.txt.new requirements-$$name.txt; rm -rf $$where; \
	 done

# What can be made again in seconds; the environments, which cannot, stay.
clean:
	rm -rf site build dist htmlcov .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

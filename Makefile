# Fedloom. `make` or `make help` lists what there is.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2 # processes that share the tests out: one runs all that need a Ray cluster of two CPUs
UV_VERSION := 0.13.8
AUDIT_VERSION := 2.10.1

BIN := $(VENV)/bin
# An environment is up to date for one checkout, one pyproject.toml and one constraints.txt.
KEY := $(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.fedloom-$(KEY)

.PHONY: help
help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

.PHONY: venv
venv: $(STAMP) ## make the environment in .venv from constraints.txt (again only when it has changed)

# uv does not read pip's settings: a folder of wheels or an index is passed on only where pip has one.
PIP_HAS = $(BIN)/python -m pip config get global.$(1) 2>/dev/null | tr -s ' \n' ',' | sed 's/,$$//' || true
UV = links=$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-$$($(call PIP_HAS,find-links))}}; \
	index=$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(call PIP_HAS,index-url))}}; \
	env $${links:+"UV_FIND_LINKS=$$links"} $${index:+"UV_DEFAULT_INDEX=$$index"} $(BIN)/python -m uv

# An installation that was interrupted leaves packages that look installed and are not: it is begun anew.
# Without uv, plain pip installs the same versions: minutes in place of seconds.
$(STAMP):
	@command -v $(PYTHON) >/dev/null && \
		$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
		echo "error: $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo "no program here")." \
			"Fedloom needs Python 3.11, 3.12 or 3.13; name one, e.g. make venv PYTHON=python3.11" >&2; exit 1; }
	@{ [ ! -e $(VENV)/.unfinished ] && $(BIN)/python -m pip --version >/dev/null 2>&1; } || \
		$(PYTHON) -m venv $$([ ! -e $(VENV)/pyvenv.cfg ] || echo --clear) $(VENV)
	@rm -f $(VENV)/.fedloom-*
	@touch $(VENV)/.unfinished
	@echo "installing Fedloom and about 210 packages into $(VENV)"
	@if $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION); then \
		$(UV) pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else \
		echo "uv cannot be installed; plain pip takes its place" >&2; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	fi
	@mv $(VENV)/.unfinished $@

.PHONY: chaos
chaos: $(STAMP) ## break a run in every way and compare its bits: losses, memory, kills at random moments, a soak
	PYTHONPATH=. $(BIN)/python tests/chaos.py
	PYTHONPATH=. $(BIN)/python tests/lost_node.py
	PYTHONPATH=. $(BIN)/python tests/starved.py
	PYTHONPATH=. $(BIN)/python tests/cuts.py --cuts 100
	PYTHONPATH=. $(BIN)/python tests/soak.py
	PYTHONPATH=. $(BIN)/python tests/lost_cluster.py

.PHONY: demo
demo: $(STAMP) ## compare the five methods on a small built-in task, on this machine
	@$(BIN)/fedloom demo

.PHONY: check
check: $(STAMP) ## formatting, lint, types and the pages of docs/, as CI does
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy -p fedloom
	$(SITE)

.PHONY: test
test: $(STAMP) ## the whole test suite, in WORKERS=2 processes
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder --durations 10

# All pages are read anew (-E): a warning about a page that has not changed would be given once only.
SITE = $(BIN)/python -m sphinx -q -E -a -W --keep-going -c docs -d build/pages . build/site

.PHONY: docs
docs: $(STAMP) ## build the pages of docs/ into build/site; a warning is an error, and no network is asked
	$(SITE)
	@echo "open build/site/index.html"

.PHONY: format
format: $(STAMP) ## format the code and apply the linter's safe repairs
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

.PHONY: wheel
wheel: $(STAMP) ## build the sdist and the wheel into dist/
	$(BIN)/python -m build --no-isolation

.PHONY: constraints
constraints: $(STAMP) ## resolve pyproject.toml anew and rewrite constraints.txt
	@{ sed -n '/^#/p' constraints.txt; \
		$(UV) pip compile --quiet --python $(BIN)/python --no-header --no-annotate \
			--extra dev --extra deepspeed --extra quantization pyproject.toml \
			| sed 's/+cpu$$//'; } > $(VENV)/constraints.new
	@mv $(VENV)/constraints.new constraints.txt
	@echo "constraints.txt is rewritten; run make check test before you commit it"

.PHONY: audit
audit: $(STAMP) ## ask a public database for known weaknesses of the packages in constraints.txt; needs a network
	@$(UV) tool run pip-audit==$(AUDIT_VERSION) --requirement constraints.txt --no-deps --disable-pip

.PHONY: clean
clean: ## remove what builds and tools left behind; runs and .venv stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

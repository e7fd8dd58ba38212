# Everything runs in .venv, which is made on first use and made up to date
# when pyproject.toml or constraints.txt change.
PYTHON ?= python3
ARGS ?=
OUT ?= bench-results

VENV := .venv
STAMP := $(VENV)/.installed
PACKAGES := kernels optim scheduler profiling cli

.DEFAULT_GOAL := help
.PHONY: help bench benchmarks test lint gpu format readme wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=python3.12  the interpreter that .venv is made from (3.10 or newer)"
	@echo "  ARGS='...'         more arguments for pytest or for hogstream bench"
	@echo "  OUT=folder         where bench and gpu write (bench-results)"

bench: $(STAMP) ## measure this machine: bench.json and report.html in OUT
	@mkdir -p '$(OUT)'
	$(VENV)/bin/hogstream bench --json '$(OUT)/bench.json' --report '$(OUT)/report.html' $(ARGS)

benchmarks: $(STAMP) ## time kernels, optimizer and scheduler, to compare with before
	$(VENV)/bin/pytest benchmarks $(ARGS)

# Not `python -m pytest`: that puts the root, and so our folders' bare names, on sys.path.
test: $(STAMP) ## run the tests
	$(VENV)/bin/pytest $(ARGS)

# On a machine with a GPU and no network: with the packages of PYTHON, and not in .venv.
gpu: ## measure and test a CUDA device, in 9 minutes: JSON files in OUT
	@$(PYTHON) -c 'import sys, torch; \
		sys.exit(None if torch.cuda.is_available() else "make gpu: torch finds no CUDA device")'
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	$(PYTHON) scripts/gpu_suite.py '$(OUT)'

lint: $(STAMP) ## check style, format and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(STAMP) ## format the code and apply ruff's safe fixes
	$(VENV)/bin/ruff check --fix-only
	$(VENV)/bin/ruff format

readme: $(STAMP) ## write README's tables from docs/results
	$(VENV)/bin/python scripts/results_page.py

wheel: $(STAMP) ## build the sdist, and the wheel from it, in dist/
	$(VENV)/bin/python -m build

clean: ## remove .venv, caches and whatever was built
	rm -rf $(VENV) build dist bench-results *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(PACKAGES) benchmarks scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "hogstream needs Python 3.10 or newer: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@echo "Setting up $(VENV): the first time takes a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[all]'
	@mkdir -p $(VENV)/typing/hogstream
	@for name in $(PACKAGES); do ln -sfn ../../../$$name $(VENV)/typing/hogstream/$$name; done
	@touch $@

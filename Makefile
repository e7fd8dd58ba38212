# Everything runs in .venv, which is made on first use and made up to date
# when pyproject.toml or constraints.txt change.
PYTHON ?= python3
ARGS ?=
OUT ?= bench-results
JOBS ?= 2
SECONDS ?= 60
SEED ?= 1
FUZZ ?=
RUNS ?=
SEEDS ?= 300
MUTATION ?=
STAGES ?= all
COMMIT ?=
DEVICE ?= cuda
GPU_PYTHON ?= 3.12
ARCHIVES ?=
NAME ?= oldest

VENV := .venv
OTHER = .versions/$(NAME)
STAMP := $(VENV)/.installed
PACKAGES := kernels optim scheduler profiling workloads cli

.DEFAULT_GOAL := help
.PHONY: help bench models test versions test-quick fuzz simulate prove lint gpu gpu-wheels gpu-results format docs results wheel clean

# Tests of a file stay in one process, as they share what they compile. Not `python -m pytest`: that
# puts the root, and so our folders' bare names, on sys.path.
PYTEST := $(VENV)/bin/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=python3.12  the interpreter that .venv is made from (3.10 or newer)"
	@echo "  ARGS='...'         more arguments for pytest, hogstream bench or prove"
	@echo "  JOBS=N             processes that run tests side by side (2; 0 for one without more)"
	@echo "  SECONDS=600 SEED=1 how long fuzz runs, and from which seed on (60, 1)"
	@echo "  FUZZ=NAME RUNS=N   one fuzz, and so many seeds in place of a time"
	@echo "  SEEDS=A:B          which seeds simulate runs, or how many from 0 on (300)"
	@echo "  MUTATION=NAME      with which fault in the lanes; all for each of them"
	@echo "  OUT=folder         where bench and gpu write (bench-results)"
	@echo "  STAGES=early       which stages gpu runs: early, late, or names, with commas (all)"
	@echo "  COMMIT=hash        of the tree, for gpu where there is no .git"
	@echo "  DEVICE=cpu         gpu is rehearsed without a GPU"
	@echo "  ARCHIVES='A B'     of gpu, for gpu-results"

bench: $(STAMP) ## measure this machine: bench.json and report.html in OUT
	@mkdir -p '$(OUT)'
	$(VENV)/bin/hogstream bench --today --json '$(OUT)/bench.json' --report '$(OUT)/report.html' $(ARGS)

models: $(STAMP) ## measure training of small models against the same by hand: models.json in OUT
	@mkdir -p '$(OUT)'
	$(VENV)/bin/python scripts/model_rates.py --json '$(OUT)/models.json' $(ARGS)

test: $(STAMP) ## run all tests
	$(PYTEST) $(ARGS)

versions: ## run all tests with other versions: NAME=oldest PYTHON=python3.10, NAME=gpu PYTHON=python3.12
	@test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	@$(OTHER)/bin/pip install --quiet -r tests/versions/$(NAME).txt
	@$(OTHER)/bin/pip install --quiet --no-deps -e .
	$(OTHER)/bin/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-quick: $(STAMP) ## run all but those marked slow: under a minute
	$(PYTEST) -m 'not slow' $(ARGS)

fuzz: $(STAMP) ## run random cases for SECONDS, from SEED on; FUZZ=optimizer, scheduler or process
	$(VENV)/bin/python tests/support/fuzz.py --seconds $(SECONDS) --seed $(SEED) \
		$(if $(RUNS),--runs $(RUNS)) $(FUZZ)

simulate: $(STAMP) ## run CUDA lanes on a driver for tests, SEEDS of them, until one fails
	$(VENV)/bin/python tests/support/simulate.py --seeds $(SEEDS) \
		$(if $(MUTATION),--mutation "$(MUTATION)")

prove: $(STAMP) ## execute the PTX of all kernels on NumPy: bits, races, faults; ARGS=races for a part
	$(VENV)/bin/python tests/support/prove.py $(ARGS)

# On a machine with a GPU and no network: with the packages of PYTHON, and not in .venv.
gpu: ## test and measure a CUDA device: an archive in OUT; STAGES=early or late, or names
	@PYTHONPATH=scripts $(PYTHON) -m gpu.suite '$(OUT)' --stages '$(STAGES)' --commit '$(COMMIT)' --device '$(DEVICE)'

# Platforms as pip names them: it takes no wheel for an older one than it is told of.
PLATFORMS := $(addprefix --platform manylinux,_2_28_x86_64 _2_27_x86_64 _2_17_x86_64 2014_x86_64)
gpu-wheels: ## download into wheels/ what such a machine may lack, for its GPU_PYTHON (3.12)
	rm -rf wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary :all: --dest wheels \
		--implementation cp --python-version $(GPU_PYTHON) $(PLATFORMS) \
		--constraint constraints.txt --requirement scripts/gpu/wheels.txt
	@du -sh wheels

gpu-results: $(STAMP) ## put the results of ARCHIVES into docs/results, and show what failed
	PYTHONPATH=scripts $(VENV)/bin/python -m gpu.results $(ARCHIVES)

lint: $(STAMP) ## check style, format, the order of imports, and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports --no-logo --no-cache
	$(VENV)/bin/mypy

format: $(STAMP) ## format the code and apply ruff's safe fixes
	$(VENV)/bin/ruff check --fix-only
	$(VENV)/bin/ruff format

docs: $(STAMP) ## build the site, in site/
	$(VENV)/bin/mkdocs build --strict

results: $(STAMP) ## write the pages of results, and README's, from docs/results/*.json
	$(VENV)/bin/python scripts/results_page.py

wheel: $(STAMP) ## build the sdist, and the wheel from it, in dist/
	$(VENV)/bin/python -m build

clean: ## remove .venv, caches and whatever was built
	rm -rf $(VENV) .versions build dist site bench-results wheels *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(PACKAGES) scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "hogstream needs Python 3.10 or newer: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@echo "Setting up $(VENV): the first time takes a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[all]'
	@mkdir -p $(VENV)/typing/hogstream
	@for name in $(PACKAGES); do ln -sfn ../../../$$name $(VENV)/typing/hogstream/$$name; done
	@touch $@

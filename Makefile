# make setup | quickstart | smollm2 | check | test | test-slow | clean.  Each makes .venv when it is missing or out of date.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
CORES ?= $(shell nproc)
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false

.PHONY: setup quickstart smollm2 check format test test-slow clean

setup: .venv/installed

.venv/installed: requirements-cpu.lock setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "make setup: $(PYTHON) is not Python 3.11, for which requirements-cpu.lock was made. Remedy: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "make setup: installing the locked versions into .venv (about 2 minutes, 4 GB)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-cpu.lock || \
	  { echo "make setup: pip could not install the locked versions. If it did not find torch 2.13.0+cpu: that file lives in PyTorch's CPU wheel index. Remedy: set PIP_EXTRA_INDEX_URL to it, or PIP_FIND_LINKS to a folder that has the wheel."; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

quickstart: setup
	$(BIN)/python launch/train.py --cfg configs/quickstart.yaml

smollm2: setup
	$(BIN)/python launch/train.py --cfg configs/smollm2.yaml

# What needs no run of the code: format, lint, order of imports, types.
check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

# Beside each other on all cores, four at most, since each has imported everything. Several ranks take turns.
test: setup
	$(BIN)/python -m pytest -m "not gpu and not slow" -n $$(( $(CORES) < 4 ? $(CORES) : 4 )) --dist worksteal

# By file, since the tests of one share their engines; two at most, each with a Ray of its own.
test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu" -n $$(( $(CORES) < 2 ? $(CORES) : 2 )) --dist loadfile --no-loadscope-reorder

clean:
	rm -rf .venv runs build *.egg-info

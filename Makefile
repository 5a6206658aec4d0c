# Every target makes its own environment first; the second time that costs nothing. `make help` lists the targets.
#   PYTHON=python3.12 make test     another Python (3.11 to 3.13)        VENV=/tmp/env make test    another place
#   make demo ARGS="--sessions 8"   options of the demo (ARGS=--help)    make test TESTS=tests/ops  one part of the tests
#   make demo ENGINE=sglang         the demo on SGLang        make test-triton TRITON=3.6.0   the kernels under another Triton
#   make demo MODEL=smollm2         a real model, documents and a conversation that outlives its server
#   make demo SYSTEM=memo           a real model and a memory model beside it; TRAIN=1 trains both adapters first
#   make test-vllm VLLM=0.33.0      vLLM's tests under another vLLM
# vLLM and SGLang pin different versions of the same packages: SGLang has an environment of its own, SGLANG_VENV.

VENV ?= .venv
SGLANG_VENV ?= .venv-sglang
TRITON ?= 3.6.0
TRITON_VENV ?= .venv-triton-$(TRITON)
VLLM ?= 0.33.0
VLLM_VENV ?= .venv-vllm-$(VLLM)
ENGINE ?= vllm
MODEL ?= recall
SYSTEM ?=
TRAIN ?=
PYTHON ?=
TESTS ?= tests
ARGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
SGLANG_BIN := $(SGLANG_VENV)/bin

# SGLang's tests run in its environment, all others in vLLM's; TESTS may name tests of both.
SGLANG_TESTS := $(patsubst tests,tests/sglang_engine,$(filter tests tests/sglang_engine%,$(TESTS:/=)))
OTHER_TESTS := $(filter-out tests/sglang_engine%,$(TESTS))

# Engines take most of the time, and one thread each: two test files run side by side. Two threads of torch on a busy core
# are ten times slower than one.
PYTEST = -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
define run_tests
$(if $(OTHER_TESTS),OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(OTHER_TESTS) --ignore=tests/sglang_engine -m "$(1)")
$(if $(SGLANG_TESTS),OMP_NUM_THREADS=1 $(SGLANG_BIN)/python $(PYTEST) $(SGLANG_TESTS) -m "$(1)")
endef

# Tests that need a GPU run where there is one.
FAST := $(if $(shell nvidia-smi -L 2>/dev/null),not slow and not real,not slow and not real and not gpu)
ALL := $(if $(shell nvidia-smi -L 2>/dev/null),,not gpu)

.DEFAULT_GOAL := help
.PHONY: help env env-sglang demo docs lint test test-fast test-all test-triton test-vllm clean

help:
	@echo "make demo      a small model with and without memory, on a real server (about two minutes); ENGINE=vllm or sglang; MODEL=smollm2; SYSTEM=memo"
	@echo "make test      style and tests, as CI runs them"
	@echo "make test-fast the tests that need neither an engine nor a compiler of kernels: some three minutes"
	@echo "make test-all  the same with the soaks, more of the real model, the kernels under the oldest Triton that we take, $(TRITON), and vLLM $(VLLM)"
	@echo "make test-triton  the kernels alone, compiled and interpreted under TRITON=$(TRITON)"
	@echo "make test-vllm  vLLM's tests under VLLM=$(VLLM); without a GPU its Python files over the compiled part of $(VENV)'s"
	@echo "make lint      style alone"
	@echo "make docs      the generated parts of docs/ written anew, and the site in .cache/site"
	@echo "make env       the environment alone: $(VENV); make env-sglang: SGLang's, $(SGLANG_VENV)"
	@echo "make clean     remove the environments and every cache"

env:
	@VENV="$(VENV)" PYTHON="$(PYTHON)" bash scripts/environment.sh

env-sglang:
	@VENV="$(SGLANG_VENV)" PYTHON="$(PYTHON)" bash scripts/environment_sglang.sh

demo: $(if $(filter sglang,$(ENGINE)),env-sglang,env)
ifeq ($(SYSTEM),memo)
	@$(BIN)/python -m benchmarks.memo $(if $(TRAIN),--train) $(ARGS)
else
	@$(if $(filter sglang,$(ENGINE)),$(SGLANG_BIN),$(BIN))/python -m benchmarks.$(if $(filter smollm2,$(MODEL)),demo_real,demo) --engine $(ENGINE) $(ARGS)
endif

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Tests build the site, too, and fail where a generated part is out of date (tests/house/test_docs.py).
docs: env
	$(BIN)/python scripts/make_docs.py
	$(BIN)/python -m mkdocs build --strict --quiet --site-dir .cache/site

test: lint $(if $(SGLANG_TESTS),env-sglang)
	$(call run_tests,$(FAST))

# In some three minutes: no engine, and no Triton kernel compiled or interpreted.
test-fast: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(OTHER_TESTS) --ignore=tests/sglang_engine -m "$(FAST) and not engine and not kernels"

# With the variable engines start as users start them, see tests/support/zygote.py.
test-all: export MEM_TRITON_TEST_SPAWN=1
test-all: lint $(if $(SGLANG_TESTS),env-sglang)
	$(call run_tests,$(ALL))
	$(if $(filter tests,$(TESTS)),$(MAKE) test-triton test-vllm)

# Compiled for GPUs that are not here, and interpreted on the CPU.
test-triton:
	@VENV="$(TRITON_VENV)" TRITON="$(TRITON)" PYTHON="$(PYTHON)" bash scripts/environment_triton.sh
	OMP_NUM_THREADS=1 $(TRITON_VENV)/bin/python $(PYTEST) tests/ops/test_in_interpreter.py $(wildcard tests/ops/test_*aot*.py) -m "not slow"

# TESTS may name some of them, such as tests/vllm_engine/test_session_server.py.
test-vllm: env
	@VENV="$(VLLM_VENV)" VLLM="$(VLLM)" BASE="$(VENV)" PYTHON="$(PYTHON)" bash scripts/environment_vllm.sh
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python $(PYTEST) $(patsubst tests,tests/vllm_engine,$(TESTS)) -m "$(FAST)"

clean:
	rm -rf .venv .venv-sglang .venv-triton-* .venv-vllm-* .pytest_cache .hypothesis .ruff_cache .cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

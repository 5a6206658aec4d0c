# Every target makes its own environment first; the second time that costs nothing. `make help` lists the targets.
#   PYTHON=python3.12 make test     another Python (3.10 to 3.13)        VENV=/tmp/env make test    another place
#   make demo ARGS="--sessions 8"   options of the demo (ARGS=--help)    make test TESTS=tests/ops  one part of the tests

VENV ?= .venv
PYTHON ?=
TESTS ?= tests
ARGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin

# Engines take most of the time, and one thread each: two test files run side by side. Two threads of torch on a busy core
# are ten times slower than one.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) -n $(WORKERS) --dist loadfile

# Tests that need a GPU run where there is one.
FAST := $(if $(shell nvidia-smi -L 2>/dev/null),not slow,not slow and not gpu)
ALL := $(if $(shell nvidia-smi -L 2>/dev/null),,not gpu)

.DEFAULT_GOAL := help
.PHONY: help env demo lint test test-all clean

help:
	@echo "make demo      a small model with and without memory, on a real vLLM server (about two minutes)"
	@echo "make test      style and tests, as CI runs them"
	@echo "make test-all  the same with the soaks"
	@echo "make lint      style alone"
	@echo "make env       the environment alone: $(VENV)"
	@echo "make clean     remove the environment and every cache"

env:
	@VENV="$(VENV)" PYTHON="$(PYTHON)" bash scripts/environment.sh

demo: env
	@$(BIN)/python -m benchmarks.demo $(ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(PYTEST) -m "$(FAST)"

test-all: lint
	$(PYTEST) -m "$(ALL)"

clean:
	rm -rf .venv .pytest_cache .hypothesis .ruff_cache .cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

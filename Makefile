# The project's verbs. `make` lists them.
PYTHON ?= python3
ifeq ($(origin CXX),default)  # make's own default is g++, which a machine with clang alone does not have
CXX := c++
endif
BIN := .venv/bin
STAMP := .venv/.tenfold-env
BUILT_FROM := pyproject.toml constraints.txt CMakeLists.txt $(shell find native -type f)
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadgroup
SANITIZED_TESTS := $(SIDE_BY_SIDE) -q -m 'not slow' -k 'cpu or native' tests/ops tests/test_native.py tests/test_engine.py

.DEFAULT_GOAL := help
.PHONY: help env run test test-all test-long test-gpu lint sanitize oracle clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## a virtual environment in .venv with everything in it

$(STAMP): $(BUILT_FROM)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "tenfold needs Python 3.11 or newer, and '$(PYTHON)' is not one; try: make PYTHON=python3.12"; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || { \
	  echo "tenfold needs a C++ compiler, and '$(CXX)' is not one; install g++ or clang, or try: make CXX=NAME"; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch
	CXX="$(CXX)" $(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

run: env ## hide facts in a long text and let the embedded model find them
	$(BIN)/tenfold demo

lint: env ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## style, types, tests and the sanitizers
	$(BIN)/pytest $(SIDE_BY_SIDE) -q -m 'not slow'
	@$(MAKE) --no-print-directory sanitize

test-all: lint ## the same with the slow tests
	$(BIN)/pytest $(SIDE_BY_SIDE) -q
	@$(MAKE) --no-print-directory sanitize

test-long: env ## hours, before a release: all slow tests, then the long ones of the server
	$(BIN)/pytest -q -m slow
	$(BIN)/python -m tests.long

test-gpu: env ## the tests of the GPU backend on this machine's NVIDIA GPU
	TRITON_INTERPRET=0 $(BIN)/pytest -q tests/ops/triton

sanitize: env ## the tests of the kernels, every read and write checked
	CXX="$(CXX)" tests/sanitize $(BIN)/python $(SANITIZED_TESTS)

oracle: env ## the full comparison with the reference implementation
	$(BIN)/python benchmarks/oracle.py

clean: ## remove .venv and everything that was built
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

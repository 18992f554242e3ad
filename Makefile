# Penumbra: `make up` serves, `make test` checks. Both need Python >= 3.11, make and (for speed) g++; nothing else.

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
EXTRAS ?=

# The first Python that is new enough; `make PYTHON=/path/to/python3.12 install` to choose one.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
need_python = $(if $(PYTHON),,$(error Penumbra needs Python 3.11 or newer and none was found on PATH. \
	Install python3.11, or say where it is: make $@ PYTHON=/path/to/python3.11))

# One thread per process in tests: two cores are shared by whole clusters.
export OMP_NUM_THREADS ?= 1

.PHONY: help install install-dev up test test-gpu test-long lint format stubs chaos bench bench-900k loadtest sbom clean

help:
	@echo 'make up [ARGS="--prefill 2 --decode 2"]   install, then serve http://127.0.0.1:8000; Ctrl-C stops it'
	@echo 'make test                                 install, then lint, types and every test that needs no GPU'
	@echo 'make install [EXTRAS="gpu ray"]           the step both share; does nothing when nothing changed'
	@echo 'make loadtest [SCENARIO=smoke]             a load test on a cluster of its own, and a report with pictures'
	@echo 'make test-long | lint | format | stubs | bench | bench-900k | clean'

install:
	@$(need_python)$(PYTHON) deploy/install.py $(EXTRAS)

install-dev:
	@$(need_python)$(PYTHON) deploy/install.py dev $(EXTRAS)

up: install
	@exec $(BIN)/penumbra up $(ARGS)

test: lint
	$(BIN)/python -m pytest -m "not long and not gpu" --durations=15 $(ARGS)

# With Ray, which CI does without: it starts too slowly for tests that run with every change.
test-long:
	@$(need_python)$(PYTHON) deploy/install.py dev ray $(EXTRAS)
	$(BIN)/python -m pytest -m "long and not gpu" --timeout=3600 --junitxml=build/test-long.xml $(ARGS); \
	  code=$$?; $(BIN)/python -m bench.long_tests build/test-long.xml && exit $$code

# Needs a GPU and the gpu extra; without a GPU these tests are not even collected.
test-gpu:
	@$(need_python)$(PYTHON) deploy/install.py dev gpu
	$(BIN)/python -m pytest -m gpu tests/gpu tests/kernels --timeout=600 $(ARGS)

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The path under proto/ is the Python path, so the generated imports are right as they come.
stubs: install-dev
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. --grpc_python_out=. proto/wire/v1/*.proto

# Forty minutes and more: every fault, then 200 kills under 2,000 answers, then pairs of faults. Writes docs/faults.md; run
# again after an interruption, it goes on with what is missing at this commit.
chaos: install-dev
	$(BIN)/penumbra chaos --resume $(ARGS)

bench: install-dev
	$(BIN)/penumbra bench transfer
	$(BIN)/penumbra bench verification
	$(BIN)/penumbra bench engine
	$(BIN)/penumbra bench flat
	$(BIN)/penumbra bench prefix
	$(BIN)/penumbra bench cache
	$(BIN)/penumbra bench reuse

# An hour of two cores: not part of `bench`.
bench-900k: install-dev
	$(BIN)/penumbra bench 900k

# A minute with `smoke`; the report lies in build/loadtest/, its row in bench/results/loadtest.csv.
SCENARIO ?= smoke
loadtest:
	@$(need_python)$(PYTHON) deploy/install.py load
	$(BIN)/penumbra loadtest run $(SCENARIO) $(ARGS)

# What an image installs, into build/images/, and its CycloneDX SBOM.
sbom: install-dev
	$(BIN)/python -m deploy.images.sbom $(or $(IMAGE),router)

clean:
	rm -rf $(VENV) build penumbra.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis engine/_penumbra_cpu*.so

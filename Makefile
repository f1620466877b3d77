# The developer interface. The first run of any target makes the environment, later runs reuse it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest
# Side by side, the tests of a file in one process. Engines come after all that must see Hugging
# Face's classes as they were made, and so in a process after theirs.
PARALLEL := -n 2 --dist loadfile
V2 := VLLM_STEER_TEST_RUNNER=v2
# Of test-version: the vLLM, and the runs (v1-matrix and v2-matrix are the longer ones).
VERSION ?= 0.32.0
RUNS ?= v1,v2,http,kernels
# Of soak: v1, v2, api-servers, data-parallel or tensor-parallel.
CONFIGURATION ?= v1

.PHONY: demo test test-all test-gpu test-version soak check docs format clean

demo: $(READY)  ## serve the embedded model and answer one batch under different steers
	$(BIN)/vllm-steer demo

test: $(READY)  ## everything but the matrix, on both model runners
	$(PYTEST) $(PARALLEL) -m "not engine and not matrix and not triton and not gpu"
	$(PYTEST) $(PARALLEL) -m "engine and not matrix and not triton and not gpu"
	$(V2) $(PYTEST) -n 2 -m "triton and not engine and not matrix and not gpu"
	$(V2) $(PYTEST) $(PARALLEL) -m "engine and not matrix and not gpu"

test-all: $(READY)  ## the longer matrix, on both model runners
	$(PYTEST) $(PARALLEL) -m "matrix and not engine and not triton and not gpu"
	$(PYTEST) -n 2 -m "matrix and engine and not triton and not gpu"
	$(V2) $(PYTEST) -n 2 -m "(engine or triton) and matrix and not gpu"

test-gpu: $(READY)  ## the kernels on a card, and engines with CUDA graphs against references
	$(PYTEST) -m "triton or gpu" tests/triton
	rm -rf build/card
	$(BIN)/python -m benchmarks.card.pack build/card/pack
	$(BIN)/python -m benchmarks.card.run build/card/pack build/card/out --only machine,kernels,engine-v2,engine-v1,reading-v2,reading-v1

test-version: .venv-$(VERSION)/.ready  ## both model runners on another vLLM: VERSION=0.25.1
	.venv-$(VERSION)/bin/python scripts/test_version.py $(VERSION) --runs $(RUNS)

soak: $(READY)  ## 10,000 mixed requests while steers are loaded: CONFIGURATION=api-servers
	$(BIN)/python -m benchmarks.soak.run --configuration $(CONFIGURATION) --json benchmarks/results/soak/$(CONFIGURATION).json

check: $(READY)  ## lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(READY)  ## the documentation as a site, in site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-* build dist site *.egg-info

$(READY): setup.py pyproject.toml requirements-cpu.txt scripts/make_environment.py $(wildcard stubs/*/pyproject.toml)
	$(PYTHON) scripts/make_environment.py $(VENV)
	touch $@

.venv-%/.ready: setup.py pyproject.toml scripts/make_environment.py $(wildcard stubs/*/pyproject.toml)
	$(PYTHON) scripts/make_environment.py .venv-$* $*
	touch $@

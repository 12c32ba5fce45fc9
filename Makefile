# Everything a person types here. Needs make, a C++ compiler and Python >= 3.10; the rest is installed
# into $(VENV). Stamp files make a second call fast.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# One thread a worker: torch's own pools on top of them would oversubscribe the cores. A test that is
# about threads sets their number itself.
WORKERS ?= auto
PYTEST_ARGS ?= -n $(WORKERS) --maxprocesses 8 --dist worksteal
# Installed before anything that has a range on torch, so that no range ever chooses a build by itself.
TORCH ?= torch==2.13.0
# For the tests alone, and without what it asks for: timm wants torchvision, each of whose wheels wants
# one build of torch. The tests need none of it; the rest comes with the test extra.
TIMM ?= timm==1.0.31

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIN := $(VENV)/pin.txt
# What the native library and the package metadata are made from: a change installs again.
BUILD_FILES := pyproject.toml setup.py $(wildcard CMakeLists.txt) \
	$(shell find csrc -type f 2>/dev/null | sort)
CXX_FILES = $(shell find csrc tests -type f \
	\( -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \))

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench gpu wheel docs clean

help: ## Lists the targets.
	@echo "make TARGET [ARGS='...'] [PYTHON=python3] [VENV=.venv]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed ## Prefills a long video prompt dense and sparse, and shows speed, error and a picture.
	$(BIN)/permattn demo $(ARGS)

test: $(VENV)/.test ## Runs the whole test suite on the CPU.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) $(ARGS)

lint: $(VENV)/.lint ## Checks style and types: ruff, mypy, clang-format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p permattn -p bench
	@files="$(CXX_FILES)"; if [ -n "$$files" ]; then \
		echo "clang-format --dry-run: $$(echo $$files | wc -w) files"; \
		$(BIN)/clang-format --dry-run --Werror $$files; fi

format: $(VENV)/.lint ## Rewrites the sources in the style that lint wants.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@files="$(CXX_FILES)"; if [ -n "$$files" ]; then $(BIN)/clang-format -i $$files; fi

bench: $(VENV)/.installed ## Checks, then times permattn against torch; writes bench/results and the docs.
	$(BIN)/python -m bench.run $(ARGS)
	$(BIN)/python -m bench.docs

gpu: ## Runs the GPU suite from this tree as it lies (no install, no network; see ARGS=--help).
	$(PYTHON) bench/gpu.py $(ARGS)

wheel: $(VENV)/.torch ## Builds the wheel into dist, with CUDA kernels for every device where nvcc is found (minutes).
	$(PIP) wheel --no-build-isolation --no-deps -w dist .

docs: $(VENV)/.installed ## Writes docs/performance.md and the README's numbers from bench/results.
	$(BIN)/python -m bench.docs

clean: ## Removes everything that these targets made, except results.
	rm -rf $(VENV) build dist demo-out .mypy_cache .pytest_cache .ruff_cache .hypothesis .cache
	find . -name '*.egg-info' -prune -exec rm -rf {} +
	find python triton_kernels bench tests -name __pycache__ -prune -exec rm -rf {} +
	find python -name '*.so' -delete

$(VENV)/.torch:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q 'setuptools>=77' wheel
	$(PIP) install -q '$(TORCH)'
	echo '$(TORCH)' > $(PIN)
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(BUILD_FILES)
	$(PIP) install -q --no-build-isolation -c $(PIN) -e '.[test,triton]'
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) install -q --no-deps '$(TIMM)'
	touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(PIP) install -q --no-build-isolation -c $(PIN) -e '.[lint]'
	touch $@

# Each target sets itself up in .venv: only Python >= 3.11 and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# Where there is no GPU, the compiled CUDA kernels are of use to the tests alone, and two architectures are enough.
GPU := $(wildcard /dev/nvidia[0-9]* /dev/dxg)
ifeq ($(GPU),)
test-deep: export GPTKERN_CUDA_ARCHS ?= 80;90a
endif

.PHONY: help demo test test-deep emulator lint bench gpu figures tables docs clean

# Why no environment can be made, in one line; nothing where one can.
obstacle = $(shell $(PYTHON) building/obstacle.py 2>/dev/null || echo it cannot be run)

help:  ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# Editable, so that a change to a kernel is what runs next; by a path, since setuptools' finder loses against a folder
# `gptkern` in the working directory, which is what a clone is called.
EDITABLE := --config-settings editable_mode=compat -e

$(VENV)/installed: pyproject.toml setup.py MANIFEST.in constraints.txt
	$(if $(obstacle),$(error $(PYTHON): $(obstacle). `make PYTHON=…` takes another one))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	GPTKERN_CUDA=0 $(BIN)/pip install --quiet -c constraints.txt $(EDITABLE) '.[test]'
	touch $@

# The compiled CUDA kernels. Where there is nothing to compile them with, pip says so and goes on.
$(VENV)/cuda: $(VENV)/installed $(wildcard building/*.py csrc/*.* csrc/*/*)
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/pip install --verbose --no-deps $(EDITABLE) . >$(VENV)/cuda.log 2>&1 || (cat $(VENV)/cuda.log; exit 1)
	@grep -h '^ *gptkern: ' $(VENV)/cuda.log
	touch $@

demo: $(VENV)/installed $(if $(GPU),$(VENV)/cuda)  ## the main job: train, swap, quantise, generate, report
	$(BIN)/gptkern demo

test: lint emulator $(if $(GPU),$(VENV)/cuda)  ## what a change of the code breaks first: at most 8 minutes on two cores, installation included
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not deep" tests

test-deep: $(VENV)/cuda emulator  ## the rest: compilers, sanitizers, mutants, all seeds and sizes; at most 40 minutes
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m deep tests

# Before the tests, whose workers would wait for one another.
emulator: $(VENV)/installed
	$(BIN)/python -m gptkern.backends.cuda.emulated

lint: $(VENV)/installed  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/installed $(if $(GPU),$(VENV)/cuda)  ## the quick cells on pytest-benchmark
	$(BIN)/python -m pytest bench --benchmark-sort=name

OUT ?= out/gpu

# Sets nothing up: a machine with a GPU often has no network, and its Python has what is needed.
gpu:  ## on a machine with a GPU: check, test, sanitize and measure, in nine minutes; DRY=1 lists the steps
	$(PYTHON) bench/gpu.py $(OUT) $(if $(DRY),--dry-run)

figures: $(VENV)/installed  ## the figures of docs/ from bench/results/
	$(BIN)/python bench/publish.py

tables: $(VENV)/cuda  ## docs/cuda_resources.md, cuda_other_architectures.md, cuda_counters.md and predictions.md, from the kernels, and what README.md says of them
	$(BIN)/python bench/cuda_tables.py
	$(BIN)/python bench/predict.py
	$(BIN)/python docs/kernel_facts.py

docs: $(VENV)/installed  ## docs/api/ from the docstrings, what README.md says of the kernels from docs/cuda_*.md, the keys of docs/recipe.md
	$(BIN)/python docs/api_pages.py
	$(BIN)/python docs/kernel_facts.py
	$(BIN)/python docs/recipe_keys.py

clean:
	rm -rf $(VENV) build dist *.egg-info out gptkern/_cuda.*.so gptkern/backends/cuda/not_built.txt

# Each target sets itself up in .venv: only Python >= 3.10 and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test lint bench gpu figures clean

# Editable, so that a change to a kernel is what runs next.
$(VENV)/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/installed  ## the main job: train, swap, quantise, generate, report
	$(BIN)/gptkern demo

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/installed
	$(BIN)/python -m pytest bench --benchmark-sort=name

OUT ?= out/gpu

# Sets nothing up: a machine with a GPU often has no network, and its Python has what is needed.
gpu:  ## on a machine with a GPU: check, test, sanitize and measure, in nine minutes; DRY=1 lists the steps
	$(PYTHON) bench/gpu.py --out $(OUT) $(if $(DRY),--dry-run)

figures: $(VENV)/installed  ## the figures of README.md and docs/ from bench/results/
	$(BIN)/python bench/publish.py

clean:
	rm -rf $(VENV) build dist *.egg-info out

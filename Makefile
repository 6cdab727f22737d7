# Fresh machine: `make demo` runs the main job on a real model, `make test` the test suite.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
MODEL  := models/SmolLM2-135M-Instruct

.PHONY: help install model demo test lint check gpu-check clean

help:
	@echo "make demo     search SmolLM2-135M's bitwidths here, export the winner, generate text"
	@echo "make test     lint, types and the whole test suite"
	@echo "make install  a virtual environment in $(VENV) with pinned versions"

install: $(READY)

# The pins are what was tested; pyproject.toml has the ranges that users' own environments may have.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

model: $(MODEL)/config.json

$(MODEL)/config.json: | $(READY)
	$(BIN)/python experiments/smollm2_bitwidths/get_model.py $(MODEL)

demo: model
	$(BIN)/python experiments/smollm2_bitwidths/demo.py --model $(MODEL)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy autocomp

test: lint
	$(BIN)/python -m pytest

gpu-check: $(READY)
	PYTHONPATH=. $(BIN)/python experiments/bench_kernels/gpu_check.py

clean:
	rm -rf $(VENV) dist build runs .pytest_cache .mypy_cache .ruff_cache

# `make bench` and `make test` each work alone on a fresh clone: they make the environment they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_ARGS ?=
BENCH_ARGS ?=
OUT ?= runs/gpu-check

.PHONY: install bench test lint gpu-check clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test,bench,pyg]'
	touch $@

bench: $(STAMP)
	$(BIN)/python -m benchmarks.report $(BENCH_ARGS)

# Two processes: Triton either compiles or interprets, by a variable that is read when it is imported.
test: $(STAMP)
	$(if $(TEST_ARGS),,TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreter)
	$(BIN)/python -m pytest $(TEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# With PyTorch for CUDA already there, `python -m benchmarks.gpu_check --out FOLDER` does the same from a bare checkout.
gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_check --out $(OUT)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

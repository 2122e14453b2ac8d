# `make bench` and `make test` each work alone on a fresh clone: they make the environment they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONSTRAINTS := constraints.txt
OLDEST := .venv-oldest
# Versions of Triton in kernels/resources.csv: what torch 2.11 and 2.13 require.
TRITONS := 3.6.0 3.7.1
TEST_ARGS ?=
BENCH_ARGS ?=
SCREEN_ARGS ?=
OUT ?= runs/gpu-check

.PHONY: install install-peers wheel bench bench-full screen test test-all test-ray test-machines test-oldest record sanitize docs lint gpu-check clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) 'setuptools>=77' wheel ninja torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --no-build-isolation -e '.[test,bench,pyg,docs]'
	touch $@

# What an extra asks for; cellattn, which is there, is not built again.
EXTRA := $(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS)

# Built from source, a quarter of an hour or more: peers of the k-hop benchmark, and what interoperation is checked against.
install-peers: $(STAMP)
	FORCE_ONLY_CPU=1 $(EXTRA) --no-build-isolation 'cellattn[peers]'

# dist/: one file for Python 3.10 on, torch 2.11 on, and any Linux with glibc 2.28, whatever this machine has; with the CUDA half
# where nvcc is, without it for CELLATTN_CUDA=0. LibTorch is the user's.
wheel: $(STAMP)
	$(EXTRA) --quiet 'cellattn[wheel]'
	rm -rf build/wheel
	CELLATTN_GLIBC=2.28 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --plat "manylinux_2_28_$$(uname -m)" \
	--exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl

# Five minutes on two cores; what is interrupted goes on. The whole report, a third of an hour there, is bench-full.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.quick $(BENCH_ARGS)

bench-full: $(STAMP)
	$(BIN)/python -m benchmarks.report $(BENCH_ARGS)

# Trains at the full cell for a few epochs, then screens all triples of 632 genes and all pairs; an hour or so on two cores.
# Run again, it goes on. SCREEN_ARGS="--tokens labelled --roster 40 --epochs 1" makes it small.
screen: $(STAMP)
	$(BIN)/python -m benchmarks.screen $(SCREEN_ARGS)

# A worker a core, eight at most: each takes half a gigabyte.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadgroup
SOME := -m "not exhaustive"

# Two runs: Triton either compiles or interprets, by a variable that is read when it is imported.
test: $(STAMP)
	$(if $(TEST_ARGS),,TRITON_INTERPRET=1 $(PYTEST) $(SOME) tests/interpreter)
	$(PYTEST) $(SOME) $(TEST_ARGS)

# As CI runs it: the exhaustive tests too.
test-all: $(STAMP)
	$(MAKE) test SOME=

# A Ray cluster of two nodes on this machine, one of which is killed; Ray is no part of `make install`, where it is skipped.
test-ray: $(STAMP)
	$(EXTRA) --quiet 'cellattn[ray]'
	$(BIN)/python -m pytest tests/screen/test_ray.py $(TEST_ARGS)

# The same tests with the threads, instruction sets and libraries of other machines, one after another: an hour or more.
test-machines: $(STAMP)
	$(BIN)/python -m tests.machines $(TEST_ARGS)

# The same tests under the oldest versions supported. No part of CI: torch 2.11 brings 5 GB, most of it CUDA.
test-oldest:
	$(MAKE) test VENV=$(OLDEST) CONSTRAINTS=constraints-oldest.txt

# Registers depend on Triton alone, so its versions share an environment: PYTHONPATH comes before what is installed in it.
record: $(TRITONS:%=$(VENV)/triton-%)
	set -e; for version in $(TRITONS); do PYTHONPATH=$(VENV)/triton-$$version $(BIN)/python -m tests.kernels.record; done

$(VENV)/triton-%: | $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$*

# The extension and the tests that call it, in a tree of their own under AddressSanitizer and UndefinedBehaviorSanitizer.
# An allocation that is too large fails, as it does without them, where AddressSanitizer would end the process.
# Not ThreadSanitizer: threads come from the OpenMP runtime that torch brings, whose barriers it cannot see.
SANITIZED := build/sanitized
SANITIZERS := address,undefined
sanitize: $(STAMP)
	CELLATTN_CUDA=0 CELLATTN_SANITIZE=$(SANITIZERS) $(BIN)/python setup.py -q build --build-base build/sanitizing --build-lib $(SANITIZED)
	cp -r tests pyproject.toml $(SANITIZED)/
	cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0:protect_shadow_gap=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	$(abspath $(BIN))/python -m pytest -p no:cacheprovider $(or $(TEST_ARGS),$(SANITIZE_TESTS))
SANITIZE_TESTS := tests/ops/test_khop_mask.py tests/ops/test_khop_subgraph.py tests/ops/test_perturbation_mask.py \
	tests/ops/test_masked_spmm.py tests/ops/test_relational_spmm.py tests/ops/test_screening.py tests/ops/test_raw_operators.py tests/test_subgraph.py

# The documentation as a site, build/site/index.html; a warning is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports --no-logo --no-cache

# With PyTorch for CUDA already there, `python -m benchmarks.gpu_check --out FOLDER` does the same from a bare checkout; without
# --full, in sections of a few minutes each (`--plan 540` says which go into one command of nine minutes).
gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_check --full --out $(OUT)

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

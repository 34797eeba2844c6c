# The whole developer interface. `make check` before every commit.
PYTHON ?= .venv/bin/python

.PHONY: check test bench setup

check: export OMP_NUM_THREADS ?= 1
check:          ## ruff, format, import contracts, mypy strict, unit tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(dir $(PYTHON))lint-imports
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/unit

test:           ## all tests, installing what they need
	sh scripts/test

bench:          ## the benchmarks that run on this machine
	$(PYTHON) -m benchmarks

setup:          ## the virtual environment with everything for development
	sh scripts/setup dev

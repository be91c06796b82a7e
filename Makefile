# `make run`, `make test` and `make check` do all the set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
ARGS ?=
# Workers of `-n auto`: three for two of the cores this process may use, where the system tells. Some tests wait for
# processes, which wait for each other.
export PYTEST_XDIST_AUTO_NUM_WORKERS ?= $(shell n=$$(nproc 2>/dev/null) && echo $$((n * 3 / 2)))

.PHONY: run test regression check format clean

run: $(VENV)/.ready
	$(VENV)/bin/python -m harness run --methods reallm,gptq $(ARGS)

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest $(ARGS)

regression: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -m whole tests/harness/test_regression.py $(ARGS)

check: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

PIP := $(VENV)/bin/pip install --disable-pip-version-check --no-compile -q -c constraints.txt

# torch first and alone: with it in place nothing else can pull another build of it. pip compiles one file after the
# other, tests of the packages too; what of theirs is no Python of today stays as it is.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[test]'
	$(VENV)/bin/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	touch $@

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis

# `make run`, `make test` and `make check` do all the set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
ARGS ?=
# Workers of `-n auto`: the cores this process may use, where the system tells.
export PYTEST_XDIST_AUTO_NUM_WORKERS ?= $(shell nproc 2>/dev/null)

.PHONY: run test check format clean

run: $(VENV)/.ready
	$(VENV)/bin/python -m harness run --methods reallm,gptq $(ARGS)

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest $(ARGS)

check: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# torch first and alone: with it in place nothing else can pull another build of it.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check -q torch==2.13.0 -c constraints.txt
	$(VENV)/bin/pip install --disable-pip-version-check -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis

# `make run` and `make test` do all the set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
ARGS ?=

.PHONY: run test clean

run: $(VENV)/.ready
	$(VENV)/bin/python -m harness run --methods reallm,gptq $(ARGS)

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest $(ARGS)

# torch first and alone: with it in place nothing else can pull another build of it.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check -q torch==2.13.0 -c constraints.txt
	$(VENV)/bin/pip install --disable-pip-version-check -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV)

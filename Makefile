# Every target sets up its own virtual environment in .venv; nothing else is needed than Python 3.11 or newer.
PYTHON ?= python3
BIN = .venv/bin
ARGS ?=

.PHONY: compare test slow lint smoke check

compare: .venv/installed
	$(BIN)/python -m experiments.compare $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest -n 2 $(ARGS)

slow: .venv/installed
	$(BIN)/python -m pytest -n 2 -m slow $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The other experiments are tried in the slow tests.
smoke: .venv/installed
	$(BIN)/python -m experiments.compare --smoke --out $$(mktemp -d)

check: lint test slow smoke

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[experiments,test]"
	touch $@

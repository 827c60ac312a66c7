# Two commands do all the set-up: `make demo` and `make test`. Each makes a virtual environment and installs into it.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-out
BIN := $(VENV)/bin
# A worker a core that this process may use (nproc would take OMP_NUM_THREADS for that number).
WORKERS ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo auto)
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check clean

# torch first: the pinned build is then in place when its dependants are resolved.
$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $$(grep '^torch==' constraints.txt)
	touch $@

$(VENV)/demo: $(VENV)/base
	$(INSTALL) -e '.[demo]'
	touch $@

$(VENV)/dev: $(VENV)/base
	$(INSTALL) -e '.[dev]'
	touch $@ $(VENV)/demo

demo: $(VENV)/demo
	$(BIN)/interfuse demo --out $(OUT) --overwrite

test: $(VENV)/dev
	$(PYTEST)

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

clean:
	rm -rf $(VENV) $(OUT) .pytest_cache .mypy_cache .ruff_cache

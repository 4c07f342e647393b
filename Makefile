# make train   the main job on the embedded default (scikit-learn's digits)
# make test    all tests
# make test-faults   the fault tests in full: more kills, and half an hour of chaos (FAULT_SEED=n, CHAOS_MINUTES=n)
# make check   style and types, as CI runs them
# On a fresh machine each of them first creates .venv from the pinned versions in constraints.txt.

VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/

train: $(VENV)/.installed
	$(RUN)vit-dist train $(ARGS)

test: $(VENV)/.installed
	$(RUN)python -m pytest $(ARGS)

test-faults: $(VENV)/.installed
	FAULTS=1 CHAOS_MINUTES=$${CHAOS_MINUTES:-30} $(RUN)python -m pytest -rP -s tests/faults $(ARGS)

check: $(VENV)/.installed
	$(RUN)ruff format --check .
	$(RUN)ruff check .
	$(RUN)mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: train test test-faults check

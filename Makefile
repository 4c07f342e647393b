# make train   the main job on the embedded default (scikit-learn's digits)
# make test    all tests
# make check   style and types, as CI runs them
# On a fresh machine each of them first creates .venv from the pinned versions in constraints.txt.

VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/

train: $(VENV)/.installed
	$(RUN)vit-dist train $(ARGS)

test: $(VENV)/.installed
	$(RUN)python -m pytest $(ARGS)

check: $(VENV)/.installed
	$(RUN)ruff format --check .
	$(RUN)ruff check .
	$(RUN)mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: train test check

# make train   the main job on the embedded default (scikit-learn's digits)
# make test    the tests, in two processes side by side (ARGS="tests/test_plan.py -k bench": those; --seed=N: its draws)
# make test-all   also what is slow or needs a real Slurm (root, and the packages that .ci/run installs)
# make check   style and types, as CI runs them
# On a fresh machine each of them first creates .venv from the pinned versions in constraints.txt.

VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/

train: $(VENV)/.installed
	$(RUN)vit-dist train $(ARGS)

test: $(VENV)/.installed
	$(RUN)python tests/lanes.py $(ARGS)

test-all: $(VENV)/.installed
	$(RUN)python tests/lanes.py -m "not external" $(ARGS)

check: $(VENV)/.installed
	$(RUN)ruff format --check .
	$(RUN)ruff check .
	$(RUN)mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: train test test-all check

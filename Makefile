# `make demo` and `make test` set up everything they need in .venv; a second run takes seconds.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Nothing here may reach for the Hub.
export HF_HUB_OFFLINE := 1
export MPLBACKEND := Agg

.PHONY: demo test check test-slow fidelity benchmark wheel clean

demo: $(VENV)/demo-installed
	mkdir -p demo
	$(BIN)/sgtr-hf predict src/sgtr_hf/assets/tabletop.jpg --output demo/graph.json --draw demo/graph.png
	@echo "The picture with its scene graph: demo/graph.png; as JSON: demo/graph.json"

test: check
	$(BIN)/pytest -n auto

check: $(VENV)/dev-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Checks that take minutes: two processes, long trainings.
test-slow: $(VENV)/dev-installed
	$(BIN)/pytest -m slow

# Compares with recorded figures of the original implementations; SGTR_GOLDEN_DIR names their folder.
fidelity: $(VENV)/dev-installed
	$(BIN)/pytest -m fidelity

benchmark: $(VENV)/dev-installed
	$(BIN)/python benchmarks/shipped_model.py

wheel: $(VENV)/dev-installed
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) demo dist build src/*.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo-installed: setup.cfg pyproject.toml | $(VENV)/bin/python
	test -e $(VENV)/dev-installed || $(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/dev-installed: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

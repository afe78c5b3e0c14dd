# Single words. `make demo` and `make test` set up everything they need on a machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test setup lint types unit bench train docs format clean fuzz flood

demo: setup            ## one prefill, one decode, one router: the main job, checked against a single process
	$(BIN)/kvbaton demo

test: setup lint types unit  ## everything that must hold before a change lands

setup: $(READY)

# torch first and pinned: whatever else asks for "any torch" is then satisfied, and a CPU machine gets the CPU build.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[serve,dev]'
	touch $(READY)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/python -m pytest

bench: setup           ## medians and ratios of the data plane, in one run
	$(BIN)/kvbaton bench transfer --suite

fuzz: setup            ## look for what breaks the codec, the cores and the API, for about 5 minutes
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	KVBATON_FUZZ_EXAMPLES=200 $(BIN)/python -m pytest -q tests/fuzz
	$(BIN)/python tests/fuzz/coverage_guided.py --seconds 60
	$(BIN)/python tests/fuzz/api_fuzz.py --seconds 40

flood: setup           ## 10,000 rooms and half-open connections, bodies of 100 MiB, while requests go on (about 5 minutes)
	KVBATON_FLOOD=full $(BIN)/python -m pytest -q tests/processes/test_flood.py

docs: setup            ## regenerate what is generated in docs/
	$(BIN)/python tools/protocol_diagram.py

train: setup           ## train the bundled recall model again (about 15 minutes on two cores)
	$(BIN)/python training/recall.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

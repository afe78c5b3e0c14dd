# Single words. `make demo` and `make test` set up everything they need on a machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What `make update` installs of torch; `TORCH=torch` takes the newest.
TORCH ?= $(shell grep '^torch==' constraints.txt)

.PHONY: real clients vllm sglang wheel update latest oldest models conformance demo test setup lint types unit properties bench train docs format clean fuzz flood audit chaos soak failover

demo: setup            ## one prefill, one decode, one router: the main job, checked against a single process
	$(BIN)/kvbaton demo

test: setup lint types unit wheel  ## everything that must hold before a change lands

setup: $(READY)

# Exact versions, so that the same commit gives the same result on any day. torch first: whatever else asks for "any
# torch" is then satisfied, and a CPU machine gets the CPU build.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[serve,cu12,dev]'
	touch $(READY)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/python -m pytest -n 2

# Other versions, each in a virtual environment of its own. torch stays at the constraints' version but in `update`:
# another one may be a build for GPUs, of gigabytes.
TESTS := -m pytest -n 2

latest:                ## all tests with the newest versions that pyproject.toml allows
	mkdir -p build && grep '^torch==' constraints.txt > build/latest.txt
	$(PYTHON) -m venv --clear .venv-latest
	.venv-latest/bin/pip install --quiet --disable-pip-version-check --constraint build/latest.txt torch
	.venv-latest/bin/pip install --quiet --disable-pip-version-check --constraint build/latest.txt -e '.[serve,cu12,dev]'
	.venv-latest/bin/python $(TESTS)

oldest:                ## all tests with the lowest versions that pyproject.toml declares
	mkdir -p build && $(PYTHON) lab/floors.py > build/oldest.txt
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --constraint build/oldest.txt torch
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --constraint build/oldest.txt -e '.[serve,cu12,dev]'
	.venv-oldest/bin/python $(TESTS)

update:                ## resolve constraints.txt anew: installs the newest, runs everything, and only then writes it
	$(PYTHON) -m venv --clear .venv-update
	.venv-update/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-update/bin/pip install --quiet --disable-pip-version-check -e '.[serve,cu12,dev,plot]'
	.venv-update/bin/ruff check . && .venv-update/bin/ruff format --check . && .venv-update/bin/mypy
	.venv-update/bin/python $(TESTS)
	mkdir -p build && head -1 constraints.txt > build/constraints.txt
	.venv-update/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' >> build/constraints.txt
	mv build/constraints.txt constraints.txt

wheel: setup           ## build the wheel, install it in an empty environment, run the first example there (20 s)
	$(BIN)/python -m lab wheel

properties: setup      ## 10,000 random layouts and topologies against an independent numpy reshard (minutes)
	KVBATON_PROPERTY_CASES=10000 $(BIN)/python -m pytest tests/property

models: setup          ## a tiny random checkpoint of every model family, in build/models
	$(BIN)/python -m lab models

conformance: setup     ## every model family times every topology, against a single process (about 6 minutes)
	$(BIN)/python -m lab conformance

vllm: setup            ## the connector in real vLLM processes, in an environment of its own (about 20 minutes; `python -m lab vllm --help`)
	$(BIN)/python -m lab vllm --json

clients: setup         ## clients of others, their own code, in front of our servers, in an environment of their own (about 10 minutes)
	$(BIN)/python -m lab clients --json

real: setup            ## SmolLM2-135M, single and as a pair, against generate and by lm-eval (about 6 minutes)
	$(BIN)/python -m lab real

sglang: setup          ## the transfer backend in real SGLang processes, in an environment of its own (`python -m lab sglang --help`)
	$(BIN)/python -m lab sglang --json

bench: setup           ## medians and ratios of the data plane, in one run
	$(BIN)/kvbaton bench transfer --suite

fuzz: setup            ## look for what breaks the codec, the cores and the API, for about 6 minutes
	$(PIP) -e '.[fuzz]'
	KVBATON_FUZZ_EXAMPLES=100 $(BIN)/python -m pytest -q tests/fuzz
	$(BIN)/python tests/fuzz/coverage_guided.py --seconds 60
	$(BIN)/python tests/fuzz/api_fuzz.py --seconds 40

flood: setup           ## rooms, connections, bodies, registrations by the thousand while requests go on (about 8 minutes)
	$(BIN)/python -m lab flood

audit:                 ## known advisories of the pinned versions; the tables of docs/advisories.md are written by hand
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	failed=0; for database in pypi osv; do \
	    .venv-audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt \
	        --vulnerability-service $$database || failed=1; \
	done; exit $$failed

chaos: setup           ## the whole fault matrix on real processes, alone and with a second worker; the table goes to docs/
	$(BIN)/python -m lab chaos --write docs/reliability.md

failover: setup        ## one of two workers killed, stopped, or all restarted in turn under load; no client may notice
	$(BIN)/python -m lab failover
	$(BIN)/python -m lab failover --faults term --victims all --requests 1200

soak: setup            ## 400,000 rooms with aborts and kills, and what grew meanwhile; the plot goes to docs/
	$(BIN)/python -m lab soak --rooms 400000 --sample-rooms 2000 --restart-seconds 10 --plot docs/soak.svg

docs: setup            ## regenerate what is generated in docs/
	$(BIN)/python -m lab docs

train: setup           ## train the bundled recall model again (about 15 minutes on two cores)
	$(BIN)/python -m lab train

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-latest .venv-oldest .venv-update .venv-audit .venv-clients .venv-real .mypy_cache .ruff_cache .pytest_cache .hypothesis

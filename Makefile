# Set-up, tests, demo. Everything lives in a virtual environment of this folder; nothing else has to be prepared.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= auto
BIN := $(VENV)/bin
ifdef SYSTEM  # torch is there, in VENV if that exists, else in PYTHON's own environment, on top of which VENV is made
TORCH = torch==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))')
MAKE_VENV := { test -x $(BIN)/python || $(PYTHON) -m venv --system-site-packages $(VENV); } && $(BIN)/python -c 'import torch'
else
MAKE_VENV := $(PYTHON) -m venv $(VENV)
endif

.PHONY: setup demo test bench ledger lint clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); say make PYTHON=/path/to/python3.12"; exit 1; }
	$(MAKE_VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[test,examples,bench,libraries]' $(TORCH)  # again: no library may replace it
	@touch $@

demo: setup
	$(BIN)/python examples/char_lm.py

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m kernels

bench: setup
	@$(BIN)/python bench/run.py --suite all --quick --processes 2 --modes inference training --json runs/bench/results.json; \
		status=$$?; $(BIN)/python bench/report.py runs/bench/results.json && exit $$status  # of what there is, in any case
	$(BIN)/python bench/host.py --json runs/bench/host.json

ledger: setup
	$(BIN)/python tests/persistent_build.py sm_80 sm_90 sm_100 sm_120

lint: setup
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

clean:
	rm -rf $(if $(SYSTEM),,$(VENV)) .venv-* dist build *.egg-info

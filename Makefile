# `make quickstart` and `make test` set up all they need in .venv; run again, they set up nothing.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Test processes, one thread each: small models gain nothing from more threads.
WORKERS ?= 2
export HF_HUB_OFFLINE ?= 1
export AXOLOTL_DO_NOT_TRACK := 1
export WANDB_MODE := disabled

.PHONY: quickstart test test-fast test-nodes test-saves test-real test-newest lint format bench bench-criteria bench-ablation families docs clean

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or newer, found %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python tests/support/extensions.py 2>/dev/null
	touch $@

quickstart: .venv/installed
	$(BIN)/python examples/quickstart/quickstart.py

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not multinode and not matrix and not real'

# Two network namespaces for two nodes: as root, with iproute2; some minutes.
test-nodes: .venv/installed
	$(BIN)/python -m pytest -m multinode

# Two ranks under each kind of sharding, cut off and gone on with; kills at every call: over a
# quarter of an hour.
test-saves: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m matrix

# Whole stories on SmolLM2-135M and Gemma 3 270M, downloaded once: a quarter of an hour.
test-real: .venv/installed
	$(BIN)/python -m pytest -m real --durations 0

# All that `make test` runs, with the newest transformers, PEFT and DeepSpeed: what breaks. Fails nothing.
test-newest: .venv/installed
	$(BIN)/python benchmarks/newest.py

test-fast: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow and not multinode and not matrix and not real'

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/installed
	$(BIN)/python benchmarks/recover.py --csv
	$(BIN)/python benchmarks/prune_stream.py --csv
	$(BIN)/python benchmarks/prune_stream.py --scaling --cache warm --method magnitude --csv
	$(BIN)/python benchmarks/masked.py --csv
	$(BIN)/python examples/quickstart/quickstart.py
	$(BIN)/python benchmarks/quickstart.py
	$(BIN)/python benchmarks/embeddings.py
	$(BIN)/python benchmarks/taylor_stream.py --csv

# An hour on two cores; rows that are there are not run again.
bench-criteria: .venv/installed
	$(BIN)/python benchmarks/criteria.py

# An hour on one core alone; rows that are there are not run again.
bench-ablation: .venv/installed
	$(BIN)/python benchmarks/ablation.py

# What of docs/ follows from the code: keys.md, the tables of families, GPUs and ways.
docs: .venv/installed
	$(BIN)/python docs/generate.py

# The table of families, from their declarations, to look at.
families: .venv/installed
	@$(BIN)/python tests/support/families.py

clean:
	rm -rf build .pytest_cache .ruff_cache .mypy_cache .hypothesis

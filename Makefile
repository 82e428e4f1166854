PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.PHONY: quickstart test lint bench vision clean

quickstart: $(READY)  ## train the small model on this machine's own Python library, then read what it writes
	$(BIN)/fulmen quickstart

test: $(READY)        ## lint, import contracts and the whole suite
	$(BIN)/python -m pytest -n auto --maxprocesses 8

lint: $(READY)
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/lint-imports

bench: $(READY)       ## training and decoding on this CPU beside transformers
	$(BIN)/fulmen bench cpu

vision: $(READY)      ## a model learns to see, stage by stage; a quarter of an hour on one GPU
	$(BIN)/python bench/vision.py

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs

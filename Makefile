# Everything runs in .venv, which is made on first use and refreshed when pyproject.toml changes.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help demo test test-slow check format record-release clean

help:
	@echo "make demo          pretrain a small model, export it, load it elsewhere, draw a picture (IMAGES=dir for your own)"
	@echo "make test          the test suite"
	@echo "make test-slow     proofs that take longer (recorded in docs/)"
	@echo "make check         lint and types"

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(shell command -v $(PYTHON) || command -v python3) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,demo,train]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/hf-rsheat demo $(if $(IMAGES),--images '$(IMAGES)') $(if $(OUTPUT),--output '$(OUTPUT)')

test: $(VENV)/.installed
	$(PYTEST)

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

record-release: $(VENV)/.installed
	$(BIN)/python -m hf_rsheat.hub.released

clean:
	rm -rf $(VENV) .demo build dist *.egg-info

.DEFAULT_GOAL := help
SHELL := bash
# Use the active environment as it is; otherwise use .venv, and make it if it is missing.
VENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.aekt-ready
# Waiting threads must not spin: on a busy machine they would take the processors from each other.
export OMP_WAIT_POLICY := PASSIVE
TEST := WANDB_MODE=offline OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto

.PHONY: help setup quickstart test test-all check docs clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## Make the environment, or bring the active one up to date

$(READY): pyproject.toml
	@test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --editable '.[dev]'
	@touch $(READY)

quickstart: $(READY)  ## A demonstration on embedded data: a teacher, and a student alone, by KD and by AEKT
	$(PYTHON) -m src.train -m experiment=quickstart method=kd,aekt,vanilla
	$(PYTHON) -m src.report runs=runs/quickstart out=reports/quickstart

test: check  ## Types, style, doctests and the fast tests
	$(TEST) -m "not slow"

test-all: check  ## The slow tests too
	$(TEST)

docs: $(READY)  ## The documentation, in docs/_build/html; warnings are errors
	$(PYTHON) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

check: $(READY)  ## Types and style
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

clean:  ## Remove the environment, caches and built docs; runs, data and reports stay
	rm -rf .venv docs/_build docs/generated .pytest_cache .mypy_cache .ruff_cache

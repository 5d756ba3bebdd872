# kvc: `make demo` and `make test` each set up .venv by themselves; the second time they install nothing.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NAME ?= demo
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test lint tensorboard clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  \033[1m%-12s\033[0m %s\n", $$1, $$2}'
	@echo "  Variables: TORCH='torch==2.13.0 --index-url URL' (another torch build), PYTHON=python3.12, NAME=demo"

setup: $(STAMP) ## Create .venv and install kvc with its development tools

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kvc needs Python 3.11 or newer; set PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Train and test the COMP classifier on the tiny model: table and picture in runs/demo
	$(BIN)/python -m kvc fit --config configs/comp/tiny.yaml --name $(NAME)
	$(BIN)/python -m kvc compare runs/$(NAME)

test: lint ## Lint, types and the test suite
	$(BIN)/python -m pytest -n 2

lint: $(STAMP) ## ruff (lint and format) and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tensorboard: $(STAMP) ## Show all runs in TensorBoard
	$(BIN)/tensorboard --logdir runs

clean: ## Remove .venv and caches (runs/ stays)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# kvc: `make demo` and `make test` each set up .venv by themselves; the second time they install nothing.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NAME ?= demo
# Of `make autocompressor`; a BASE without an owner is one of OPT's, or `tiny`.
BASE ?= opt-125m
BATCH ?= 16
LR ?= 2e-5
NUM_GPUS ?= 1
CML ?= 50
# Blocks of tokens fit one tokenizer: those of Llama 3 are others than those of Llama 2.
AC_CONFIG = $(if $(filter tiny,$(BASE)),tiny_variable,$(if $(findstring lama-3,$(BASE)),llama3_8b,$(if $(findstring lama,$(BASE)),llama2_7b_6k,opt_125m)))
# Of `make ablations`; empty: all GPUs, else one CPU slot.
SLOTS ?=
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo autocompressor ablations test lint tensorboard clean

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

# The batch is that of all GPUs together; one block at a time fits any of them.
autocompressor: $(STAMP) ## Train a variable-length AutoCompressor: BASE=opt-125m BATCH=16 LR=2e-5 NUM_GPUS=1 CML=50
	@test $$(( $(BATCH) % $(NUM_GPUS) )) -eq 0 -a $(BATCH) -gt 0 || { echo "BATCH=$(BATCH) is no multiple of NUM_GPUS=$(NUM_GPUS)" >&2; exit 2; }
	HF_HUB_OFFLINE=$(if $(filter tiny,$(BASE)),1,0) $(BIN)/python -m kvc fit \
	  --config configs/autocompressor/$(AC_CONFIG).yaml \
	  --model.backbone.pretrained $(if $(findstring /,$(BASE))$(filter tiny,$(BASE)),$(BASE),facebook/$(BASE)) \
	  --model.summary kvc.methods.autocompressor.summaries.Variable --model.summary.compression_max_len $(CML) \
	  --model.optim.lr $(LR) --data.batch_size 1 --trainer.devices $(NUM_GPUS) \
	  --trainer.accumulate_grad_batches $$(( $(BATCH) / $(NUM_GPUS) )) \
	  --name autocompressor-$(notdir $(BASE))

# The same command again runs what is missing or failed, and nothing else.
ablations: $(STAMP) ## Twelve context compressors on the tiny model, compared: SLOTS=cpu:2 or SLOTS=0,1,2,3 (default: all GPUs)
	$(BIN)/python -m kvc sweep experiments/squad_ablations.yaml $(if $(SLOTS),--slots $(SLOTS))

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

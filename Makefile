# make book   a virtual environment, every notebook executed, the pages built
# make test   everything that checks
# make help   the rest
#
# VENV=DIR     where the virtual environment is (default .venv)
# PYTHON=EXE   the Python that makes it (default: the first one that will do)
# PORT=N       the port of `make serve` (default 8000)

VENV ?= .venv
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,\
  $(shell $(p) tools/environment.py --fits 2>/dev/null)) python3)
PORT ?= 8000

bin := $(VENV)/bin
ready := $(VENV)/.ready
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
export PYTHONUNBUFFERED := 1
# The networks of the chapters are too small to gain from threads, and lose
# much where other processes use the same cores.
export OMP_NUM_THREADS ?= 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: book serve test notebooks bench lint lock clean help

# Installed again only when what is to be installed has changed.
$(ready): pyproject.toml constraints.txt
	@$(PYTHON) tools/environment.py $(VENV)

book: $(ready) ## execute the notebooks that changed and build the pages
	@$(bin)/python -m tools.book

serve: ## show the built pages on 127.0.0.1 (PORT=8000)
	@$(PYTHON) tools/serve.py $(PORT)

test: $(ready) ## everything that checks: style, units, notebooks, pages
	@$(bin)/python -m tools.check

notebooks: $(ready) ## execute the notebooks in place and write their outputs
	@$(bin)/python -m tools.notebooks --execute

bench: $(ready) ## measure the layers against torch.nn (some minutes)
	@env -u OMP_NUM_THREADS $(bin)/python -m benchmarks.speed \
	  --out _build/records

lint: $(ready) ## ruff, and the rules for stamped text
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .
	@$(bin)/python -m tools.notebooks --check

lock: $(ready) ## write what is installed to constraints.txt
	@$(bin)/python -m tools.lock

clean: ## remove the built pages, their cache and other leftovers
	rm -rf _build .pytest_cache .ruff_cache .hypothesis

help:
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' \
	  $(MAKEFILE_LIST)

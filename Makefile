# make help | setup | quickstart | check | test
SHELL := /bin/bash
BIN := .venv/bin
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')

.PHONY: help setup quickstart check format docs test test-oldest test-all test-gpu
.DEFAULT_GOAL := help

help:
	@echo "make setup       .venv with everything in it (once; repeated calls cost nothing)"
	@echo "make quickstart  train a small real model on long code samples: 2 CPU ranks, or one rank a GPU"
	@echo "make check       ruff, mypy, import contracts"
	@echo "make test        the tests that need no GPU; TESTS=tests/unit for some of them, WORKERS=8 on more cores"
	@echo "make test-oldest the same with the oldest transformers that is allowed"
	@echo "make test-all    these, and the ones that take minutes to hours"
	@echo "make test-gpu    what needs GPUs, on one or two of them: kernels, whole runs, time and memory beside the plan"
	@echo "make format      let ruff format and mend what it can"
	@echo "make docs        pages and tables that are made from the code, then all pages as a site in build/site"

# Made again only when what it was made from has changed.
.venv/.installed: pyproject.toml launch/setup.sh
	@bash launch/setup.sh

setup: .venv/.installed

quickstart: setup
ifeq ($(GPUS),0)
	PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --log_level error --num_gpus 2 launch/train.py
else
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --log_level error launch/train.py
endif
	@echo "To have ds-longft at hand: source $(BIN)/activate"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup
	$(BIN)/python docs/make_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Two test processes on two cores, a file at a time each, and one report. One thread a rank: tests start up to four of them.
# The files with ranks come first; `python -m pytest FILE` runs one in a single process.
WORKERS ?= 2
PYTEST = PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	-n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 20

test: setup
	$(PYTEST) -m "not gpu and not slow" $(TESTS)

# With the oldest transformers that pyproject.toml allows.
OLDEST = build/oldest
test-oldest: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(OLDEST) transformers==5.17.0 huggingface_hub==1.33.0
	PYTHONPATH="$(CURDIR)/$(OLDEST)" $(PYTEST) -m "not gpu and not slow" $(TESTS)

# Also the long ones: the soak of kills, a real SLURM, hosts that lose each other.
test-all: setup
	$(PYTEST) -m "not gpu" $(TESTS)

# PART=kernels, runs or steps for one of its parts; each takes less than ten minutes on two GPUs.
test-gpu: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.gpu.check $(if $(PART),--part $(PART))

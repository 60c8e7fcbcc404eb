# The two commands of the README are `make quickstart` and `make test`; `make help` lists the rest.
SHELL := /bin/bash
VENV ?= .venv
export RLPOST_VENV := $(VENV)
RUN := $(VENV)/bin
# Two test processes, each with one thread: the tests start processes of their own, and threads that spin against each
# other are many times slower than threads that take turns.
PYTEST := OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Compiled modules are kept even where the environment says otherwise: the tests start hundreds of processes, and each
# would compile torch, transformers and vLLM again.
unexport PYTHONDONTWRITEBYTECODE

# One GPU where launch/install.sh sees one too, else the CPU.
TOPOLOGY ?= $(if $(shell nvidia-smi -L 2>/dev/null),launch/gpu.yaml,launch/cpu.yaml)

# Of `make bench`: full, medium or small.
SCALE ?= full

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-gpu check format bench docs clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install:  ## create .venv with everything (returns at once when nothing changed)
	@launch/install.sh

# Passive waiting: threads that spin while another program has the core make everything many times slower.
quickstart: install  ## post-train a real language model with GRPO on this machine and show what it learned
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(nproc)} OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} launch/run.sh $(TOPOLOGY) recipes/quickstart.yaml $(ARGS)

test: install  ## the test suite (real vLLM, DeepSpeed, several processes; minutes)
	@$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-slow: install  ## the long tests
	@$(PYTEST) -m "slow and not gpu" $(ARGS)

test-gpu: install  ## the tests that need a CUDA device
	@$(RUN)/python -m pytest -m gpu $(ARGS)

check: install  ## the fast inner loop: format, lint, types, quick tests
	@$(RUN)/ruff format --check . && $(RUN)/ruff check . && $(RUN)/lint-imports --no-logo && $(RUN)/mypy && $(PYTEST) -q -m "not slow and not gpu and not engine and not thorough" $(ARGS)

bench: install  ## on frozen rollouts, beside TRL and by itself: make bench MODEL=folder (hours; SCALE=small: less)
	@$(RUN)/python -m benchmarks.trl_parity --model $(MODEL) && \
	$(RUN)/python -m benchmarks.trl --model $(MODEL) --scale $(SCALE) $(ARGS) && \
	$(RUN)/python -m benchmarks.learner --model $(MODEL) --scale $(SCALE)

docs: install  ## regenerate the recipe reference, its JSON schema and the drawing of the rooms
	@$(RUN)/rlpost schema > recipes/schema.json && $(RUN)/rlpost recipe-docs > docs/recipe.md && $(RUN)/python docs/draw_rooms.py

format:  ## rewrite files in the house style
	@$(RUN)/ruff format . && $(RUN)/ruff check --fix .

clean:  ## remove caches (never runs or checkpoints)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

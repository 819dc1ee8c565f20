# care-compress: every verb sets up what it needs; a second run reinstalls nothing.
.DEFAULT_GOAL := help
SHELL := /bin/bash

# The first interpreter that really runs and is new enough (a pyenv shim may exist and not run).
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

RECIPE ?= int8_qat
SWEEP ?= int8_grid
MODELS ?= fp32 int8
TARGET ?= tensorrt-jetson-orin
# What bundle and engine take: a run's name, by default that of the recipe.
DEPLOYED = $(or $(RUN),$(basename $(notdir $(RECIPE))))
# A finished run is packed as it is; values for another one would be ignored.
GIVEN = $(strip $(ARCH)$(CKPT)$(DATA)$(RES)$(CROP)$(SET))
define READY
	@test -f 'recipes/targets/$(TARGET).yaml' || { echo "there is no target $(TARGET); see recipes/targets/"; exit 2; }
	@test -z '$(GIVEN)' || test ! -d 'runs/$(DEPLOYED)' || { \
		echo "run $(DEPLOYED) exists: give these values to make quantize, or name a new RUN="; exit 2; }
	@test -d 'runs/$(DEPLOYED)' || $(MAKE) --no-print-directory quantize
endef
# ARCH CKPT DATA RES CROP RUN: shorthands for the values people change most; SET="a.b=1 c.d=2" reaches every other one.

# What there is to measure: bench/WHAT.py.
WHAT ?= speed
BENCHES := speed dense data train quantize evaluate memory ablate slim engines

.PHONY: help setup quantize sweep compare report bundle engine doctor test test-slow faults check bench known-bench reference mutants clean audit recipes

help:
	@echo "care-compress: make VERB [NAME=value]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1@\2/p' $(MAKEFILE_LIST) | awk -F'@' '{printf "  %-11s %s\n", $$1, $$2}'

setup: $(VENV)/.user ## create .venv and install care-compress

quantize: $(VENV)/.user $(if $(RAY),$(VENV)/.ray) ## run a recipe: RECIPE=int8_qat [ARCH= CKPT= DATA= RES= CROP= RUN= SET="a.b=1" REPAIR=1 RAY=local]
	@$(BIN)/care-compress quantize '$(RECIPE)' $(if $(CKPT),--ckpt '$(CKPT)') $(if $(ARCH),--arch '$(ARCH)') \
		$(if $(DATA),--data '$(DATA)') $(if $(RES),--res '$(RES)') $(if $(CROP),--crop '$(CROP)') \
		$(if $(RUN),--name '$(RUN)') $(foreach pair,$(SET),--set '$(pair)') $(if $(REPAIR),--repair) \
		$(if $(RAY),--ray '$(RAY)')

sweep: $(VENV)/.ray ## many recipes on Ray, one page: SWEEP=int8_grid [ADDRESS=auto RUN= REPAIR=1 PLAN=1]
	@$(BIN)/care-compress sweep '$(SWEEP)' $(if $(ADDRESS),--address '$(ADDRESS)') $(if $(RUN),--name '$(RUN)') \
		$(if $(REPAIR),--repair) $(if $(PLAN),--dry-run)

compare: $(VENV)/.user ## models side by side on every target: MODELS="fp32 int8"
	@$(BIN)/python eval/compare.py $(MODELS)

report: $(VENV)/.user ## one page of a finished run: [RUN=int8_qat]
	@$(BIN)/care-compress report '$(DEPLOYED)'

bundle: $(VENV)/.user ## pack a run for a device: TARGET=tensorrt-jetson-orin, openvino-cpu, ... [RUN=int8_qat]
	$(READY)
	@$(BIN)/care-compress bundle '$(TARGET)' --run '$(DEPLOYED)'

engine: $(VENV)/.user ## build and verify a run's engines on this machine: TARGET=tensorrt-gpu [RUN=int8_qat]
	$(READY)
	@$(BIN)/care-compress engine '$(TARGET)' --run '$(DEPLOYED)'

doctor: $(VENV)/.user ## what this machine can export, build, run and measure
	@$(BIN)/care-compress doctor

test: $(VENV)/.dev ## the test suite (15 minutes on two cores, 18 with empty caches)
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

test-slow: $(VENV)/.dev ## what make test leaves out: searches, NNCF's control, peers (10 minutes)
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

faults: $(VENV)/.dev ## kill it, fill its disk, damage its files, feed it rubbish (20 minutes on two cores)
	@$(BIN)/python -m pytest -n 2 --dist loadscope tests/faults

check: $(VENV)/.dev ## ruff, mypy strict, one-way imports, bandit, recipes and targets
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/bandit --quiet --configfile pyproject.toml --recursive care_compress eval bench
	@$(BIN)/care-compress recipes --check

# INT8 beside every alternative (speed: 25 to 50 minutes, into docs/PERFORMANCE.md), what each method is worth (ablate: into
# docs/RESULTS.md), what pruning costs (slim: there, too), and what loading, training, quantizing and evaluating cost. speed and ablate go on where they stopped.
bench: known-bench $(VENV)/.dev $(if $(filter all,$(PEERS)),.peers/.done) ## measure: WHAT=speed|dense|data|train|quantize|evaluate|memory|ablate|slim|engines [ARCH= CKPT= DATA= RES= CROP= PEERS=all RAY=local TRAIN=]
	@$(BIN)/python bench/$(WHAT).py $(BENCH_$(WHAT))

BENCH_speed = $(if $(ARCH),--arch '$(ARCH)') $(if $(CKPT),--ckpt '$(CKPT)') $(if $(DATA),--data '$(DATA)') \
	$(if $(RES),--resolution '$(RES)') $(if $(CROP),--crop '$(CROP)')
BENCH_ablate = --report $(if $(RAY),--ray '$(RAY)') $(if $(CKPT),--ckpt '$(CKPT)') $(if $(DATA),--data '$(DATA)') $(if $(RES),--res '$(RES)')

BENCH_slim = $(if $(CKPT),--ckpt '$(CKPT)') $(if $(DATA),--data '$(DATA)') $(if $(RES),--res '$(RES)') $(if $(TRAIN),--train '$(TRAIN)')
BENCH_dense = $(if $(ARCH),--arch '$(ARCH)')
BENCH_memory = $(if $(ARCH),--arch '$(ARCH)')
BENCH_engines = $(if $(CKPT),--ckpt '$(CKPT)') $(if $(DATA),--data '$(DATA)') $(if $(RES),--res '$(RES)')

# Quantizers that are no dependencies, in a folder that only bench/peer_quantizers.py looks into.
.peers/.done: bench/peers.txt | $(VENV)/.dev
	@echo "installing other tools' quantizers into .peers"
	@rm -rf .peers
	@$(INSTALL) --no-deps --target .peers -r $<
	@touch $@

# Before anything is installed for it.
known-bench:
	@: $(if $(and $(filter 1,$(words $(WHAT))),$(filter $(BENCHES),$(WHAT))),,$(error there is no bench '$(WHAT)'; WHAT is one of: $(BENCHES)))

reference: $(VENV)/.user $(if $(RAY),$(VENV)/.ray) ## check that recipes still give their accepted values: [MODELS="fp32 int8_ptq" RAY=local]
	@$(BIN)/care-compress reference $(if $(filter command% environment%,$(origin MODELS)),$(MODELS)) $(if $(RAY),--ray '$(RAY)')

# Plausible bugs, planted one at a time: every test that should notice does (bench/mutants.yaml).
mutants: $(VENV)/.dev
	@$(BIN)/python bench/mutants.py $(MUTANTS)

audit: $(VENV)/.dev
	@$(INSTALL) pip-audit
	@$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

recipes: $(VENV)/.user
	@$(BIN)/care-compress recipes

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .peers .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed. Fix: install it, or make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.user: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing care-compress (first time: a few minutes)"
	@$(INSTALL) -e '.[openvino]'
	@touch $@

$(VENV)/.ray: $(VENV)/.user
	@echo "installing Ray"
	@$(INSTALL) -e '.[openvino,ray]'
	@touch $@

$(VENV)/.dev: $(VENV)/.user
	@echo "installing the development tools"
	@$(INSTALL) -e '.[openvino,tensorrt-rtx,dev]'
	@touch $@

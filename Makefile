# make demo   the whole method on the embedded default        make test   the test suite
# Variables: SCALE=tiny|smoke|llama2  LOSSES=kld,tvd,tvdpp  SEEDS=1,2,3  ARGS="any Hydra override"
PYTHON ?= python3
SCALE ?= tiny
LOSSES ?= kld,tvd,tvdpp
SEEDS ?= 1
ARGS ?=
VENV ?= .venv
PY := $(VENV)/bin/python
RUN := $(PY) -m experiments
comma := ,

.DEFAULT_GOAL := help
.PHONY: help setup demo test check prepare pretrain respond cache finetune evaluate gamma tables tiny-target clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo
	@echo 'SCALE=$(SCALE) LOSSES=$(LOSSES) SEEDS=$(SEEDS) ARGS="$(ARGS)"'

setup: $(VENV)/.installed ## create .venv and install the project into it

$(VENV)/.installed: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: setup ## every stage on SCALE, then the results table, figures and report
	$(RUN).pipeline scale=$(SCALE) losses=[$(LOSSES)] seeds=[$(SEEDS)] $(ARGS)

test: setup ## the test suite
	$(PY) -m pytest

check: setup ## formatting, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

prepare: setup ## stage 0: text, instructions, evaluation prompts
	$(RUN).prepare scale=$(SCALE) $(ARGS)

pretrain: setup ## stage 1: a drafter from scratch
	$(RUN).pretrain scale=$(SCALE) $(ARGS)

respond: setup ## stage 2: the target answers the instructions
	$(RUN).respond scale=$(SCALE) $(ARGS)

cache: setup ## stage 2b: the target's distributions at the response tokens
	$(RUN).cache scale=$(SCALE) $(ARGS)

finetune: setup ## stage 3: distillation, for LOSSES x SEEDS
	$(RUN).finetune -m scale=$(SCALE) loss=$(LOSSES) seed=$(SEEDS) $(ARGS)

evaluate: setup ## stage 4: speculative decoding against the baseline
	$(RUN).evaluate scale=$(SCALE) $(ARGS)

gamma: setup ## which gamma pays on this machine, for the drafter of LOSSES and SEEDS that come first
	$(RUN).gamma scale=$(SCALE) gamma.drafter=runs/$(SCALE)/finetune/$(word 1,$(subst $(comma), ,$(LOSSES)))-seed$(word 1,$(subst $(comma), ,$(SEEDS))) $(ARGS)

tables: setup ## stage 5: Markdown, figures, HTML report
	$(RUN).tables scale=$(SCALE) $(ARGS)

tiny-target: setup ## make the embedded default's target again (two hours)
	$(RUN).tiny_target $(ARGS)

clean: ## remove the runs of SCALE
	rm -rf runs/$(SCALE)

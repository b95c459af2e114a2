# Every target makes what it needs: the first one builds .venv, which takes a while; the second time nothing is redone.
# Usage: make <target> [VARIABLE=value ...]; `make help` lists them.

DATASET    ?= synthetic
METHOD     ?= $(if $(SYNTHETIC),all,cdc_mmpg)
SEED       ?= 0
OUT        ?= checkpoints
PYTHON     ?= python3
JOBS       ?= $(if $(SYNTHETIC),2,1)

SYNTHETIC := $(filter synthetic,$(DATASET))
# The tasks of MSRVTT, and of TGIF, are about the same clips: they share the folder and the frames.
FAMILY    := $(patsubst tgif_%,tgif,$(patsubst msrvtt_%,msrvtt,$(DATASET)))
ROOT      := $(OUT)/$(DATASET)
PY        := .venv/bin/python

# The embedded dataset makes itself, its vocabulary and its encoder.
DATA      ?= $(if $(SYNTHETIC),$(ROOT)/data/clips,data/$(FAMILY))
VOCAB     ?= $(if $(SYNTHETIC),$(DATA)/vocab.txt)
PRETRAIN  := $(if $(SYNTHETIC),$(if $(CHECKPOINT),,run/encoder_pretraining))

# The longest first, so that side by side none is left alone at the end.
ALL      := linear fine_tuning cdc_mmpg hyper hyper_fan_in
FROZEN   := cdc_mmpg_frozen
SESSIONS := cdc_mmpg_session session_concatenated session_oracle
PHASES   := encoder_pretraining adr_pretraining adr_pretraining_frozen
METHODS  := $(ALL) $(FROZEN) $(SESSIONS) cdc_mmpg_session_full $(PHASES)
RUNS     := $(addprefix run/,$(METHODS))
WANTED   := $(addprefix run/,$(if $(filter all,$(METHOD)),$(ALL) $(if $(SYNTHETIC),$(SESSIONS),$(FROZEN)),$(METHOD)))

ifneq ($(filter train data predict table,$(MAKECMDGOALS)),)
ifeq ($(filter $(METHOD),all $(METHODS)),)
$(error METHOD=$(METHOD) is none of: all $(METHODS))
endif
ifeq ($(wildcard experiments/datasets/$(DATASET).yaml),)
$(error DATASET=$(DATASET) is none of: $(basename $(notdir $(wildcard experiments/datasets/*.yaml))))
endif
endif

.DEFAULT_GOAL := help
.PHONY: help environment data train predict table figures checkpoint benchmark test lint check clean $(RUNS)

help: ## list the targets and their variables
	@grep -hE '^[a-z_]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z_]+):.*## (.*)/  make \1\t\2/' | expand -t 22

environment: .venv/.ready ## build .venv (uv, requirements.txt): PYTHON=

.venv/.ready: requirements.txt pyproject.toml
	@echo "Building .venv: about 3 GB to fetch and 6 GB on disk, mostly CUDA for PyTorch; half a minute to several."
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11, 3.12 or 3.13 is needed, not " + sys.version.split()[0] + ": name one with PYTHON=")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet uv
	.venv/bin/uv pip install --quiet --python $(PY) -r requirements.txt
	.venv/bin/uv pip install --quiet --python $(PY) --no-deps --editable .
	touch $@

# The linear head stands for all methods: what is prepared is the same.
data: .venv/.ready $(if $(SYNTHETIC),$(DATA)/digests.json) ## check a dataset and decode its clips, for training to find: DATASET= DATA= ARGS= OUT=
	@$(PY) -m cdc_mmpg.prepare "$(ROOT)" --config experiments/methods/linear.yaml --config experiments/datasets/$(DATASET).yaml \
		$(PLACES) $(ARGS)

# Runs that do not build on each other go side by side, JOBS at a time, each with its share of the processors.
train: .venv/.ready $(PRETRAIN) ## train and test: DATASET= DATA= METHOD=<name>|all CHECKPOINT= VOCAB= SEED= JOBS= DEVICES= NODES= PRECISION= EPOCHS= ARGS= ARGS_<method>= OUT=
	@$(MAKE) --no-print-directory $(if $(filter-out 1,$(JOBS)),--jobs=$(JOBS) $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)) $(WANTED)
	$(if $(filter-out $(PHASES),$(METHOD)),@$(PY) -m cdc_mmpg.tables "$(ROOT)")

# Phase two builds on phase one; the frozen recipe adapts the encoder first.
run/cdc_mmpg: run/adr_pretraining
run/adr_pretraining_frozen: run/fine_tuning
run/cdc_mmpg_frozen: run/adr_pretraining_frozen
ifneq ($(SYNTHETIC),)
$(filter-out run/encoder_pretraining,$(RUNS)): $(PRETRAIN)
# The first run on the frozen encoder computes its features, for all.
$(addprefix run/,hyper hyper_fan_in adr_pretraining $(SESSIONS)): $(if $(filter all,$(METHOD)),run/linear)
$(RUNS): $(DATA)/digests.json
$(DATA)/digests.json: | .venv/.ready
	$(PY) -m data_modules.synthetic_clips "$(DATA)"
endif

PLACES  = --data.init_args.root="$(DATA)" --data.init_args.cache_dir="$(OUT)/$(FAMILY)/data" \
	$(if $(VOCAB),--data.init_args.vocab="$(VOCAB)")
OPTIONS = $(PLACES) --seed_everything=$(SEED) \
	$(if $(EPOCHS),--trainer.max_epochs=$(EPOCHS)) \
	$(if $(DEVICES),--trainer.devices=$(DEVICES)) \
	$(if $(NODES),--trainer.num_nodes=$(NODES)) \
	$(if $(PRECISION),--trainer.precision=$(PRECISION)) \
	$(if $(filter-out 1,$(JOBS)),$(if $(PRETRAINING),,--trainer.enable_progress_bar=false))

ENCODER = --model.init_args.encoder.checkpoint=
START   = $(if $(PRETRAIN),$(ROOT)/encoder_pretraining/seed$(SEED)/encoder.safetensors,$(CHECKPOINT))
ADR     = --model.init_args.adr="$(ROOT)/$(1)/seed$(SEED)/adr.safetensors"
TUNED   = $(ENCODER)"$(ROOT)/fine_tuning/seed$(SEED)/encoder.safetensors"
BUILDS_ON_encoder_pretraining    = $(if $(CHECKPOINT),$(ENCODER)"$(CHECKPOINT)")
BUILDS_ON_adr_pretraining_frozen = $(TUNED)
BUILDS_ON_cdc_mmpg_frozen        = $(TUNED) $(call ADR,adr_pretraining_frozen)
BUILDS_ON_cdc_mmpg               = $(STARTS) $(call ADR,adr_pretraining)
STARTS    = $(if $(START),$(ENCODER)"$(START)")
BUILDS_ON = $(if $(filter undefined,$(origin BUILDS_ON_$*)),$(STARTS),$(BUILDS_ON_$*))
CONFIGS   = experiments/methods/$*.yaml experiments/datasets/$(DATASET).yaml $(wildcard experiments/tuned/$(DATASET).$*.yaml)

run/encoder_pretraining: PRETRAINING = 1
$(filter-out run/encoder_pretraining,$(RUNS)): export OMP_NUM_THREADS ?= $(if $(filter-out 1,$(JOBS)),$(THREADS))
THREADS = $(shell $(PYTHON) -c 'import os; print(max(1, (os.cpu_count() or 1) // $(JOBS)))')

# ARGS reaches every run, ARGS_<method> that one alone.
$(RUNS): run/%: .venv/.ready
	exec $(PY) -m cdc_mmpg.cli fit $(addprefix --config ,$(CONFIGS)) \
		--trainer.default_root_dir="$(ROOT)/$*/seed$(SEED)" $(OPTIONS) $(BUILDS_ON) $(ARGS) $(ARGS_$*)

# Through the environment, verbatim: neither make nor the shell may read into a question.
predict: export CLIP := $(value VIDEO)
predict: export ASKED := $(value QUESTION)
predict: export OFFERED := $(value CHOICES)
predict: .venv/.ready ## answer a question about a file, or choose a text: VIDEO= QUESTION= CHOICES='a | b' METHOD= DATASET= SEED= VOCAB= OUT=
	@$(PY) -m cdc_mmpg.predict --run "$(ROOT)/$(METHOD)/seed$(SEED)" --video "$$CLIP" --question "$$ASKED" --choices "$$OFFERED" \
		$(if $(VOCAB),--vocab "$(VOCAB)")

table: .venv/.ready ## the methods of a dataset side by side, in the terminal and as Markdown: DATASET= OUT=
	@$(PY) -m cdc_mmpg.tables "$(ROOT)"

figures: .venv/.ready ## the README's pictures, from a dataset's runs: DATASET= DATA= OUT=
	@$(PY) -m cdc_mmpg.figures "$(ROOT)" --data "$(DATA)"

checkpoint: .venv/.ready ## what the encoder takes of a checkpoint, drops, and lacks: FILE=
	@$(PY) -m cdc_mmpg.checkpoint "$(FILE)"

benchmark: .venv/.ready ## training speed at the paper's size: ARGS='--batch-size 8 --steps 5' on a small machine
	@$(PY) -m cdc_mmpg.benchmark $(ARGS)

test: .venv/.ready ## run the tests: ARGS= for pytest
	$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: .venv/.ready ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

check: lint test ## what CI runs

clean: ## remove the environment and the tools' caches; checkpoints stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info src/*.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

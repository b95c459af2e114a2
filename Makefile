# Every target makes what it needs: the first one builds .venv, which takes a while; the second time nothing is redone.
# Usage: make <target> [VARIABLE=value ...]; `make help` lists them.

comma  := ,
quoted  = '$(subst ','\'',$1)'
# 1 where all of the value of $1 matches the regular expression $2.
matches = $(filter 1,$(shell printf '%s' $(call quoted,$($1)) | tr '\n' '"' | grep -cxE '$2'))

DATASET    ?= synthetic
# The names that people type.
override DATASET := $(shell printf '%s' $(call quoted,$(DATASET)) | tr 'A-Z -' 'a-z__' | sed -E \
	's/^msr_vtt/msrvtt/; s/^(msvd|msrvtt|tgif)_?(vid)?qa$$/\1/; s/^(tgif_?(qa_?)?)?frame_?qa$$/tgif/; s/^tgif_?qa_/tgif_/; \
	s/^msrvtt_(mc|multiple_choice|mc_?qa)$$/msrvtt_choice/; s/^msrvtt_ret$$/msrvtt_retrieval/; s/^embedded$$/synthetic/')
METHOD     ?= $(if $(SYNTHETIC),all,cdc_mmpg)
SEED       ?= 0
# Seeds 0 to SEEDS - 1 instead of SEED. ENCODER_SEED: whose encoder is taken, where that is another seed's.
SEEDS      ?=
# SIZE=toy makes the embedded dataset small, to try the chain in minutes; its runs have a folder of their own.
OUT        ?= checkpoints$(if $(SIZE),/$(SIZE))
PYTHON     ?= python3
# What starts a run's processes instead of Lightning: LAUNCH=srun, LAUNCH='.venv/bin/torchrun --nproc-per-node=8 --no-python'.
LAUNCH     ?=
JOBS       ?= $(if $(LAUNCH),1,$(if $(SYNTHETIC),2,1))

# "~" as the shell's, which expands it in some shells only.
home         = $(if $(filter ~ ~/%,$(firstword $1)),$(HOME)$(patsubst ~%,%,$1),$1)
override OUT := $(call home,$(OUT))
WHOLE       := [1-9][0-9]{0,2}
demand       = $(if $(if $($1),$(call matches,$1,$2),$3),,$(error $1=$($1): $1 is $4))
$(call demand,OUT,[^-"$$`\\][^"$$`\\]*,,the folder where runs go: its name does not begin with "-" and has no quote$(comma) dollar or backslash)
$(if $(and $(wildcard $(OUT)),$(filter 1,$(words $(OUT)))),$(if $(wildcard $(OUT)/.),,$(error OUT=$(OUT) is a file: OUT is the folder where runs go)))
$(call demand,JOBS,$(WHOLE),,how many runs go side by side: a whole number from 1)
$(call demand,SEED,0|[1-9][0-9]{0$(comma)8},,a whole number from 0)
$(call demand,SEEDS,$(WHOLE),1,how many seeds from 0 on: a whole number from 1)
$(call demand,NODES,$(WHOLE),1,how many machines train together: a whole number from 1)
$(call demand,EPOCHS,$(WHOLE)|[1-9][0-9]{3},1,a whole number from 1)
$(call demand,DEVICES,auto|-1|$(WHOLE)|[0-9]+$(comma)|\[?[0-9]+($(comma)[0-9]+)+\]?,1,how many processes or GPUs train together: a whole number from 1$(comma) "auto" (all GPUs)$(comma) or their numbers ("0$(comma)1"))
$(call demand,MATMUL,highest|high,1,"highest" (float32) or "high" (TensorFloat-32 on a GPU): how float32 is multiplied)
$(call demand,COMPILE,0|1,1,0 or 1: whether the encoder is compiled)
$(call demand,FRAME_CACHE,disk|device,1,where batches are read from: "disk"$(comma) or "device" for the memory of the GPU (or CPU) that computes)
$(call demand,SIZE,full|toy,1,"full" or "toy": of the embedded dataset)

SYNTHETIC := $(filter synthetic,$(DATASET))
# The tasks of MSRVTT, and of TGIF, are about the same clips: they share the folder and the frames.
FAMILY    := $(patsubst tgif_%,tgif,$(patsubst msrvtt_%,msrvtt,$(DATASET)))
ROOT      := $(OUT)/$(DATASET)
PY        := .venv/bin/python

# The embedded dataset makes itself, its vocabulary and its encoder.
CACHE     ?= $(OUT)/$(FAMILY)/data
DATA      ?= $(if $(SYNTHETIC),$(CACHE)/clips,data/$(FAMILY))
override CACHE := $(call home,$(CACHE))
override DATA  := $(call home,$(DATA))
VOCAB     ?= $(if $(SYNTHETIC),$(DATA)/vocab.txt)
PRETRAIN  := $(if $(SYNTHETIC),$(if $(CHECKPOINT),,encoder_pretraining))

# The longest first, so that side by side none is left alone at the end.
ALL      := linear fine_tuning cdc_mmpg hyper hyper_fan_in
FROZEN   := cdc_mmpg_frozen
SESSIONS := cdc_mmpg_session cdc_mmpg_session_basis session_concatenated session_oracle cdc_mmpg_session_full cdc_mmpg_session_plain
PHASES   := encoder_pretraining adr_pretraining adr_pretraining_frozen
CONTROLS := on_device privacy
METHODS  := $(ALL) $(FROZEN) $(SESSIONS) $(PHASES) $(CONTROLS)

# A variant of a method is METHOD=<method>.<variant>: a run of its own, with these arguments.
FRAMES       := frames2 frames4 frames5
REASONERS    := $(foreach axis,feature group8 batch,$(foreach target,anchor global,$(axis)_$(target)))
frames        = --data.init_args.num_frames=$(patsubst frames%,%,$1)
reasoner      = $(if $(filter adr_%,$2),--model.init_args.axis=$(patsubst group%,group:%,$(firstword $(subst _, ,$1))) --model.init_args.target=$(lastword $(subst _, ,$1)))
VARIANTS     := $(foreach method,$(ALL) $(FROZEN) $(PHASES),$(FRAMES:%=$(method).%)) $(foreach method,cdc_mmpg cdc_mmpg_frozen adr_pretraining adr_pretraining_frozen,$(REASONERS:%=$(method).%))

upto     = $(shell seq 0 $$(($1 - 1)))
SEVERAL := $(if $(SEEDS),$(call upto,$(SEEDS)),$(SEED))
# What is asked for, for every seed, as run/<method>[.<variant>]/<seed>.
ASKED   := $(if $(filter all,$(METHOD)),$(ALL) $(if $(SYNTHETIC),$(SESSIONS) $(CONTROLS),$(FROZEN)),$(METHOD))
WANTED  := $(foreach method,$(ASKED),$(foreach seed,$(SEVERAL),run/$(method)/$(seed)))

ifneq ($(filter train data predict table export serve device delay demo,$(MAKECMDGOALS)),)
ifneq ($(filter-out all $(METHODS) $(VARIANTS),$(METHOD)),)
$(error METHOD=$(METHOD) is none of: all $(METHODS), nor a variant: $(FRAMES:%=<method>.%), $(REASONERS:%=cdc_mmpg_frozen.%))
endif
ifeq ($(wildcard experiments/datasets/$(DATASET).yaml),)
$(error DATASET=$(DATASET) is none of: $(basename $(notdir $(wildcard experiments/datasets/*.yaml))))
endif
endif

.DEFAULT_GOAL := help
.PHONY: help environment data train tables report predict export serve device delay demo table figures checkpoint sweep benchmark test test-slow lint check clean

help: ## list the targets and their variables
	@grep -hE '^[a-z_-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z_-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

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
	@$(PY) -m cdc_mmpg.commands.prepare "$(ROOT)" --config experiments/methods/linear.yaml --config experiments/datasets/$(DATASET).yaml \
		$(PLACES) $(ARGS)

# Runs that do not build on each other go side by side, JOBS at a time, each with its share of the processors; a single
# seed's pretraining comes first and has all of them.
PARALLEL = $(if $(filter-out 1,$(JOBS)),--jobs=$(JOBS) $(if $(filter output-sync,$(.FEATURES)),--output-sync=target))
train: .venv/.ready $(if $(PRETRAIN),$(if $(SEEDS),,run/$(PRETRAIN)/$(or $(ENCODER_SEED),$(SEED)))) ## train and test: DATASET= DATA= METHOD=<name>|all SEED= SEEDS= CHECKPOINT= VOCAB= SIZE= JOBS= DEVICES= NODES= LAUNCH= PRECISION= MATMUL= COMPILE=1 FRAME_CACHE= EPOCHS= ARGS= ARGS_<method>= CACHE= OUT=
	@$(MAKE) --no-print-directory $(PARALLEL) $(WANTED)
	$(if $(filter-out $(PHASES) $(CONTROLS),$(METHOD)),@$(PY) -m cdc_mmpg.report.tables "$(ROOT)")

# A run's target is run/<method>[.<variant>]/<seed>, its folder <dataset>/<method>[.<variant>]/seed<seed>.
method  = $(firstword $(subst ., ,$(firstword $(subst /, ,$1))))
variant = $(word 2,$(subst ., ,$(firstword $(subst /, ,$1))))
seed    = $(lastword $(subst /, ,$1))
folder  = $(ROOT)/$(firstword $(subst /, ,$1))/seed$(call seed,$1)
# The same variant of another method; the encoder of the same seed, or of ENCODER_SEED.
beside  = $2$(addprefix .,$(call variant,$1))/$(call seed,$1)
origin_ = $2/$(if $(ENCODER_SEED),$(ENCODER_SEED),$(call seed,$1))

ENCODER = --model.init_args.encoder.checkpoint=
START   = $(if $(PRETRAIN),$(ROOT)/encoder_pretraining/seed$(notdir $(call origin_,$1))/encoder.safetensors,$(CHECKPOINT))
STARTS  = $(if $(START),$(ENCODER)"$(START)")
TUNED   = $(ENCODER)"$(ROOT)/fine_tuning/seed$(notdir $(call origin_,$1))/encoder.safetensors"
ADR     = --model.init_args.adr="$(call folder,$(call beside,$1,$2))/adr.safetensors"
BUILDS_ON_encoder_pretraining    = $(if $(CHECKPOINT),$(ENCODER)"$(CHECKPOINT)")
BUILDS_ON_adr_pretraining_frozen = $(TUNED)
BUILDS_ON_cdc_mmpg_frozen        = $(TUNED) $(call ADR,$1,adr_pretraining_frozen)
BUILDS_ON_cdc_mmpg               = $(STARTS) $(call ADR,$1,adr_pretraining)
BUILDS_ON = $(if $(filter undefined,$(origin BUILDS_ON_$(call method,$1))),$(STARTS),$(BUILDS_ON_$(call method,$1)))
VARIED    = $(if $(call variant,$1),$(call $(if $(filter frames%,$(call variant,$1)),frames,reasoner),$(call variant,$1),$(call method,$1)))
CONFIGS   = $(addprefix --config ,experiments/methods/$(call method,$1).yaml experiments/datasets/$(DATASET).yaml $(wildcard experiments/tuned/$(DATASET).$(call method,$1).yaml))

PLACES  = --data.init_args.root="$(DATA)" --data.init_args.cache_dir="$(CACHE)" \
	$(if $(VOCAB),--data.init_args.vocab="$(VOCAB)")
OPTIONS = $(PLACES) \
	$(if $(EPOCHS),--trainer.max_epochs=$(EPOCHS)) \
	$(if $(DEVICES),--trainer.devices=$(DEVICES)) \
	$(if $(NODES),--trainer.num_nodes=$(NODES)) \
	$(if $(PRECISION),--trainer.precision=$(PRECISION)) \
	$(if $(MATMUL),--matmul=$(MATMUL)) $(if $(filter-out 0,$(COMPILE)),--compile=true) \
	$(if $(FRAME_CACHE),--data.init_args.frame_cache=$(FRAME_CACHE)) \
	$(if $(filter-out 1,$(JOBS)),$(if $(ALONE),,--trainer.enable_progress_bar=false))
# ARGS reaches every run, ARGS_<method> that one alone.
FIT     = fit $(CONFIGS) --trainer.default_root_dir="$(call folder,$1)" --seed_everything=$(call seed,$1) $(OPTIONS) \
	$(BUILDS_ON) $(VARIED) $(ARGS) $(ARGS_$(call method,$1))

# Phase two builds on phase one, the frozen recipe on an encoder that was adapted first, all on what makes the encoder.
NEEDS_cdc_mmpg               = $(call beside,$1,adr_pretraining)
NEEDS_adr_pretraining_frozen = $(call origin_,$1,fine_tuning)
NEEDS_cdc_mmpg_frozen        = $(call beside,$1,adr_pretraining_frozen)
NEEDS_on_device              = $(call origin_,$1,fine_tuning)
# The first run on the frozen encoder computes its features, for all.
FIRST = $(if $(filter all,$(METHOD)),$(if $(filter hyper hyper_fan_in adr_pretraining $(SESSIONS),$(call method,$1)),linear/$(call seed,$1)))
NEEDS = $(addprefix run/,$(NEEDS_$(call method,$1)) $(call FIRST,$1) $(if $(filter encoder_pretraining/%,$1),,$(addsuffix /$(notdir $(call origin_,$1)),$(PRETRAIN))))

THREADS = $(eval THREADS := $$(shell $(PY) -c 'from cdc_mmpg.processors import count_processors; print(max(1, count_processors() // $(JOBS)))'))$(THREADS)
ALONE   = $(if $(filter run/encoder_pretraining/%,$@),$(if $(SEEDS),,1))
SHARE   = $(if $(ALONE),,$(if $(filter-out 1,$(JOBS)),OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(THREADS)}))

# All that could be asked for, by name: make does not chain a pattern with itself.
NUMBERS := $(sort 0 1 2 3 4 $(SEVERAL) $(SEED) $(ENCODER_SEED))
RUNS    := $(foreach method,$(filter-out $(CONTROLS),$(METHODS)) $(VARIANTS),$(NUMBERS:%=run/$(method)/%))
.PHONY: $(RUNS) $(foreach control,$(CONTROLS),$(NUMBERS:%=run/$(control)/%)) $(REASONERS:%=study/%)

.SECONDEXPANSION:
$(RUNS): run/%: .venv/.ready $(if $(SYNTHETIC),$(DATA)/digests.json) $$(call NEEDS,$$*)
	exec env $(SHARE) $(LAUNCH) $(PY) -m cdc_mmpg.training.cli $(call FIT,$*)

$(NUMBERS:%=run/on_device/%): run/on_device/%: .venv/.ready $$(call NEEDS,on_device/$$*)
	exec env $(SHARE) $(PY) -m cdc_mmpg.controls.on_device "$(call folder,fine_tuning/$*)"

$(NUMBERS:%=run/privacy/%): run/privacy/%: .venv/.ready $$(addprefix run/,$$(addsuffix /$$*,$$(PRETRAIN)))
	exec env $(SHARE) $(PY) -m cdc_mmpg.controls.privacy "$(call folder,encoder_pretraining/$*)"

ifneq ($(SYNTHETIC),)
$(DATA)/digests.json: $(if $(SIZE),check-size) | .venv/.ready
	$(PY) -m data_modules.synthetic_clips "$(DATA)" $(if $(SIZE),--size "$(SIZE)")

.PHONY: check-size # what is there may be of another size
check-size:
endif

# Every table of the paper, and what it does not ask: three seeds of the main rows, one of the rest (FULL=1: five of
# all, hours); whether the reasoner does anything, over five seeds on one encoder's features.
MAIN  := linear fine_tuning cdc_mmpg hyper_fan_in cdc_mmpg_session cdc_mmpg_session_basis session_concatenated session_oracle
STUDY := $(addprefix study/,$(REASONERS))
REST  := $(ALL) $(SESSIONS) $(CONTROLS) $(FRAMES:%=fine_tuning.%)
tables: SEEDS = $(if $(FULL),5,3)
tables: .venv/.ready ## every table of the paper, ours beside it: DATASET= DATA= FULL=1 JOBS= CACHE= OUT=
	$(if $(SYNTHETIC),@$(MAKE) --no-print-directory METHOD=all SEEDS=$(SEEDS) $(PARALLEL) $(EVIDENCE))
	@$(PY) -m cdc_mmpg.report.tables --paper "$(ROOT)"

EVIDENCE = $(foreach seed,$(call upto,$(SEEDS)),$(foreach method,$(if $(FULL),$(REST),$(MAIN)),run/$(method)/$(seed))) $(REST:%=run/%/0) $(STUDY)

$(STUDY): study/%: run/fine_tuning/0
	exec env $(SHARE) $(LAUNCH) $(PY) -m cdc_mmpg.training.cli $(foreach seed,0 1 2 3 4,$(foreach method,adr_pretraining_frozen cdc_mmpg_frozen,$(call FIT,$(method).$*/$(seed)) --))
$(STUDY): ENCODER_SEED = 0

report: .venv/.ready ## one page with every figure, and where each comes from: DATASET= DATA= OUT=
	@$(PY) -m cdc_mmpg.report.page "$(ROOT)" --data "$(DATA)"

sweep: .venv/.ready $(if $(PRETRAIN),run/$(PRETRAIN)/0) ## learning rates, by W&B's agent or, without a server, one after another: experiments/sweep.yaml
	@$(PY) -m cdc_mmpg.commands.sweep experiments/sweep.yaml

# Through the environment, verbatim: neither make nor the shell may read into a question.
predict: export CLIP := $(value VIDEO)
predict: export ASKED := $(value QUESTION)
predict: export OFFERED := $(value CHOICES)
predict: .venv/.ready ## answer a question about a file, or choose a text: VIDEO= QUESTION= CHOICES='a | b' METHOD= DATASET= SEED= VOCAB= OUT=
	@$(PY) -m cdc_mmpg.commands.predict --run="$(RUN)" --video="$$CLIP" --question="$$ASKED" --choices="$$OFFERED" \
		$(if $(VOCAB),--vocab="$(VOCAB)")

# What predicts and is deployed: the session's run, unless METHOD= names another. Only the demo trains what is not there.
SERVED     = $(if $(filter all,$(METHOD)),cdc_mmpg_session,$(METHOD))
RUN        = $(ROOT)/$(SERVED)/seed$(SEED)
DEPLOYMENT = $(RUN)/deployment
HOST    ?= 127.0.0.1
PORT    ?= 8000
CLOUD   ?= http://127.0.0.1:$(PORT)

TRAINED = $(if $(SYNTHETIC),$(if $(wildcard $(RUN)/results.json),,run/$(SERVED)/$(SEED)))
export: .venv/.ready ## bundles for a device and for the cloud: METHOD= DATASET= SEED= ARGS= OUT=
	@$(PY) -m cdc_mmpg.deployment.export "$(RUN)" $(ARGS)

serve: .venv/.ready ## the cloud's service, of an export: METHOD= DATASET= SEED= HOST= PORT= WORKERS= KEYS= CERTIFICATE= CERTIFICATE_KEY= ARGS= OUT=
	@exec $(PY) -m cdc_mmpg.cloud "$(DEPLOYMENT)/cloud" --host "$(HOST)" --port "$(PORT)" $(if $(WORKERS),--workers "$(WORKERS)") \
		$(if $(KEYS),--keys "$(KEYS)") $(if $(CERTIFICATE),--certificate "$(CERTIFICATE)") \
		$(if $(CERTIFICATE_KEY),--certificate-key "$(CERTIFICATE_KEY)") $(ARGS)

device: export CLIP := $(value VIDEO)
device: export ASKED := $(value QUESTION)
device: export OFFERED := $(value CHOICES)
device: .venv/.ready ## ask the device's client, with an export and the service: VIDEO= QUESTION= CHOICES= CLOUD= INT8=1 ARGS=--new-session METHOD= DATASET= SEED= ARGS= OUT=
	@$(PY) -m cdc_mmpg.device "$(DEPLOYMENT)/device$(if $(INT8),-int8)" --video="$$CLIP" --question="$$ASKED" --choices="$$OFFERED" \
		--cloud="$(CLOUD)" --state "$(DEPLOYMENT)/state" $(ARGS)

demo: .venv/.ready $$(TRAINED) $$(if $$(wildcard $$(DEPLOYMENT)/export.json),,export) ## a session of an unseen device, through service and client: SEED= ARGS='--device unseen003' OUT=
	@$(PY) -m cdc_mmpg.deployment.demo "$(RUN)" --data "$(DATA)" $(ARGS)

delay: .venv/.ready ## Table 6 by measurement, on a shaped link: DATASET= ARGS= OUT=
	@$(PY) -m cdc_mmpg.benchmarks.delay "$(ROOT)" $(ARGS)

table: .venv/.ready ## the methods of a dataset side by side, in the terminal and as Markdown: DATASET= OUT=
	@$(PY) -m cdc_mmpg.report.tables "$(ROOT)"

figures: .venv/.ready ## the README's pictures, from a dataset's runs: DATASET= DATA= OUT=
	@$(PY) -m cdc_mmpg.report.figures "$(ROOT)" --data "$(DATA)"

checkpoint: .venv/.ready ## what the encoder takes of a checkpoint, drops, and lacks: FILE=
	@$(PY) -m cdc_mmpg.commands.checkpoint "$(FILE)"

benchmark: .venv/.ready ## speed at the paper's size, of training, with OF=loading of what brings it samples, or with OF=deployment of service and device: ARGS='--batch-size 8 --steps 5' on a small machine
	@$(PY) -m $(if $(filter loading,$(OF)),data_modules,cdc_mmpg).benchmark$(if $(OF),_$(OF)) $(ARGS)

PYTEST = $(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
test: .venv/.ready ## run all tests but the slow ones: ARGS= for pytest
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: .venv/.ready ## run the slow tests (fresh interpreters, many processes): ARGS= for pytest
	$(PYTEST) -m slow $(ARGS)

lint: .venv/.ready ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

check: lint test test-slow ## what CI runs

clean: ## remove the environment and the tools' caches; checkpoints stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info src/*.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# Every target makes what it needs: the first one builds .venv, which takes a while; the second time nothing is redone.
# Usage: make <target> [VARIABLE=value ...]; `make help` lists them. All but the tools' targets are commands of `cdc-mmpg`,
# which reads the variables itself (src/cdc_mmpg/commands) and refuses those that it does not know; `make -n` lists.

PYTHON ?= python3
PY     := .venv/bin/python
# Before .venv is there, `make -n` lists all the same.
CDC    := if [ -x .venv/bin/cdc-mmpg ]; then exec .venv/bin/cdc-mmpg "$$@"; else PYTHONPATH=src exec $(PYTHON) -m cdc_mmpg "$$@"; fi

.DEFAULT_GOAL := help
.PHONY: help environment data train tables report predict export serve device delay demo table figures checkpoint sweep benchmark test test-slow lint check clean

help: ## list the targets and their variables
	@grep -hE '^[a-z_-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z_-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

environment: .venv/.ready ## build .venv (uv, requirements.txt): PYTHON=

.venv/.ready: requirements.txt pyproject.toml
	@echo "Building .venv: about 3 GB to fetch and 6 GB on disk, mostly CUDA for PyTorch; one minute to several."
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11, 3.12 or 3.13 is needed, not " + sys.version.split()[0] + ": name one with PYTHON=")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet uv
	.venv/bin/uv pip install --quiet --compile-bytecode --python $(PY) -r requirements.txt
	.venv/bin/uv pip install --quiet --python $(PY) --no-deps --editable .
	touch $@

data: ## check a dataset and decode its clips, for training to find: DATASET= DATA= ARGS= OUT=
train: ## train and test: DATASET= DATA= METHOD=<name>|main|all SEED= SEEDS= CHECKPOINT= VOCAB= SIZE= JOBS= DEVICES= NODES= LAUNCH= PRECISION= MATMUL= COMPILE=1 FRAME_CACHE= EPOCHS= ARGS= ARGS_<method>= CACHE= OUT=
tables: ## every table of the paper, ours beside it: DATASET= DATA= FULL=1 JOBS= CACHE= OUT=
table: ## the methods of a dataset side by side, in the terminal and as Markdown: DATASET= OUT=
report: ## one page with every figure, and where each comes from: DATASET= DATA= OUT=
figures: ## the README's pictures, from a dataset's runs: DATASET= DATA= OUT=
predict: ## answer a question about a file, or choose a text: VIDEO= QUESTION= CHOICES='a | b' METHOD= DATASET= SEED= VOCAB= OUT=
export: ## bundles for a device and for the cloud: METHOD= DATASET= SEED= ARGS= OUT=
serve: ## the cloud's service, of an export: METHOD= DATASET= SEED= HOST= PORT= WORKERS= KEYS= CERTIFICATE= CERTIFICATE_KEY= ARGS= OUT=
device: ## ask the device's client, with an export and the service: VIDEO= QUESTION= CHOICES= CLOUD= INT8=1 ARGS=--new-session METHOD= DATASET= SEED= ARGS= OUT=
demo: ## a session of an unseen device, through service and client: SEED= ARGS='--device unseen003' OUT=
delay: ## Table 6 by measurement, on a shaped link: DATASET= ARGS= OUT=
sweep: ## learning rates, by W&B's agent or, without a server, on this machine: experiments/sweep.yaml
checkpoint: ## what the encoder takes of a checkpoint, drops, and lacks: FILE=
benchmark: ## speed at the paper's size, of training, with OF=loading of what brings it samples, with OF=deployment of service and device, or with OF=adapting of what a device could do by itself: ARGS='--batch-size 8 --steps 5' on a small machine

# Variables reach it through MAKEFLAGS, verbatim: neither make nor the shell may read into a question.
data train tables table report figures predict export serve device demo delay sweep checkpoint benchmark: .venv/.ready
	+@set -- $@ --make; $(CDC)

PYTEST = $(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
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

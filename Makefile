# Every target makes what it needs: the first one builds .venv, which takes a while; later ones reuse it.
# Usage: make <target> [VARIABLE=value ...]; `make help` lists them. All but the tools' targets are commands of `cdc-mmpg`,
# which reads the variables (src/cdc_mmpg/commands) and refuses unknown ones; `make -n <target>` lists its programs.

PYTHON ?= python3
PY     := .venv/bin/python
# `make -n` works without .venv.
CDC    := if [ -x .venv/bin/cdc-mmpg ]; then exec .venv/bin/cdc-mmpg "$$@"; else PYTHONPATH=src exec $(PYTHON) -m cdc_mmpg "$$@"; fi

TSC    := src/cdc_mmpg/device/web/node_modules/.bin/tsc

.DEFAULT_GOAL := help
.PHONY: help environment data train tables report predict export web serve device delay demo table figures checkpoint sweep benchmark test test-slow lint check clean

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

data: ## check a dataset and decode its clips into the cache: DATASET= DATA= VOCAB= ARGS= OUT=
train: ## train and test: DATASET= DATA= METHOD=<name>|main|all SEED= SEEDS= CHECKPOINT= VOCAB= SIZE= JOBS= DEVICES= NODES= LAUNCH= PRECISION= MATMUL= COMPILE=1 FRAME_CACHE= EPOCHS= ARGS= ARGS_<method>= CACHE= OUT=
tables: ## write all tables of the paper with our figures beside them: DATASET= DATA= FULL=1 JOBS= CACHE= OUT=
table: ## compare the methods of a dataset, in the terminal and as Markdown: DATASET= OUT=
report: ## write one HTML page with all figures, and their sources as JSON: DATASET= DATA= OUT=
figures: ## draw the README's pictures from a dataset's runs: DATASET= DATA= OUT=
predict: ## answer a question about a file, or choose a text: VIDEO= QUESTION= CHOICES='a | b' METHOD= DATASET= SEED= VOCAB= OUT=
export: ## write bundles of a run for device and cloud: METHOD= DATASET= SEED= ARGS= OUT=
web: ## install the libraries of the browser's page (npm)
serve: ## start the cloud service of an export, with WEB=1 and the browser's page: METHOD= DATASET= SEED= WEB=1 HOST= PORT= WORKERS= KEYS= CERTIFICATE= CERTIFICATE_KEY= ARGS= OUT=
device: ## ask the device client, with an export and a running service: VIDEO= QUESTION= CHOICES= CLOUD= INT8=1 ARGS=--new-session METHOD= DATASET= SEED= ARGS= OUT=
demo: ## play a session of an unseen device in the browser: DEMO=terminal SEED= PORT= ARGS='--device unseen003' OUT=
delay: ## measure the delays of Table 6 on a rate-limited link: DATASET= ARGS= OUT=
sweep: ## tune learning rates, with W&B or locally: experiments/sweep.yaml
checkpoint: ## list which weights of a checkpoint the encoder uses, drops and lacks: FILE=
benchmark: ## measure speed at the paper's size: training, or OF=loading, deployment (service and device), adapting (on the device): ARGS='--batch-size 8 --steps 5' on a small machine

# Variables arrive through MAKEFLAGS verbatim, so neither make nor the shell can alter a question.
data train tables table report figures predict export web serve device demo delay sweep checkpoint benchmark: .venv/.ready
	+@set -- $@ --make; $(CDC)

# Tests often wait for processes and time limits, so three workers suit two processors.
PYTEST = $(PY) -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder
test: .venv/.ready ## run all tests but the slow ones: ARGS= for pytest
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: .venv/.ready ## run the slow tests (fresh interpreters, many processes): ARGS= for pytest
	$(PYTEST) -m slow $(ARGS)

lint: .venv/.ready ## run ruff, mypy and, after make web, tsc
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	! test -x $(TSC) || $(TSC) --project src/cdc_mmpg/device/web/jsconfig.json

check: lint ## run all that CI runs
	$(PYTEST) $(ARGS)

clean: ## remove the environment and the caches of tools, not checkpoints
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info src/*.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

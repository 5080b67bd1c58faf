# make help says what there is (see docs/install.md)
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
LOCK := requirements/cpu.lock
TORCH := $(shell grep '^torch==' $(LOCK))
# PyTorch's public CPU wheels: used where pip does not find a torch+cpu build by itself.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# Start-up is import-bound: bytecode must be kept, whatever the machine's habit. One thread per process on few cores.
export PYTHONDONTWRITEBYTECODE :=
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export TORCH_COMPILE_DISABLE ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export RAY_USAGE_STATS_ENABLED ?= 0
export VLLM_NO_USAGE_STATS ?= 1

PYTEST = $(PY) -m pytest
TYPED = redone/types.py redone/api.py redone/errors.py redone/config redone/algo redone/data redone/reward redone/weights

.PHONY: system-packages help install quickstart quickstart-fast quickstart-sentiment test test-full test-extra \
	test-megatron-next test-sglang gpu-check lint lock clean

help:
	@echo "make quickstart  install, prepare model and data, the three stages on SmolLM2 and eight tasks (CPU)"
	@echo "make quickstart-fast  the same graph on a tiny random model (toy tasks)"
	@echo "make quickstart-sentiment  one RL run instead: the sentiment of real tweets (CPU)"
	@echo "make test        install, lint, and the test suite          make test-full   the long must-shows (after make test)"
	@echo "make test-extra  what make test-full has no time for: further layouts, killed pipeline"
	@echo "make test-megatron-next  the trainer's tests on the sources of megatron-core $(NEXT_MEGATRON)"
	@echo "make gpu-check   kernels on a CUDA device (system python)   make lint        ruff and mypy"
	@echo "make test-sglang the SGLang adapter against the real SGLang on the CPU, in an environment of its own"
	@echo "make install     only .venv                                 make clean       remove .venv and caches"

install: $(STAMP)

$(STAMP): $(VENV)/.locked setup.py pyproject.toml
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.locked: $(LOCK)
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 or 3.12 is needed (make PYTHON=/path/to/python3.11)" >&2; exit 1; fi
	@echo "install: $$($(PYTHON) --version) -> $(VENV)"
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check uv || echo "no uv: pip installs everything (slower)"
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps $(TORCH) \
		|| $(PY) -m pip install --disable-pip-version-check --no-deps --index-url $(TORCH_CPU_INDEX) $(TORCH)
	grep -v '^torch==' $(LOCK) > $(VENV)/rest.lock
	$(VENV)/bin/uv pip install --quiet --python $(PY) --no-deps -r $(VENV)/rest.lock \
		|| $(PY) -m pip install --disable-pip-version-check --no-deps -r $(VENV)/rest.lock
	$(PY) launcher/redone_launcher/warm.py
	@touch $@

quickstart: NO_SLURM = 1
quickstart: install system-packages
	$(VENV)/bin/redone data prepare --dest assets
	$(VENV)/bin/redone run configs/quickstart/pipeline.yaml

quickstart-fast: install
	$(VENV)/bin/redone data prepare --only tiny --dest assets
	$(VENV)/bin/redone run configs/tiny/pipeline.yaml

quickstart-sentiment: install
	$(VENV)/bin/redone data prepare --dest assets
	$(VENV)/bin/redone run configs/quickstart/smollm2.yaml

# Code rewards run in bubblewrap, tests/slurm on a private SLURM; their tests fail without. Debian starts daemons that
# it installs; the policy file, removed again, keeps it from that.
POLICY = /usr/sbin/policy-rc.d
system-packages:
	@missing=""; \
	command -v bwrap >/dev/null || missing="bubblewrap"; \
	[ -n "$(NO_SLURM)" ] \
		|| { command -v sbatch && command -v slurmctld && command -v munged; } >/dev/null \
		|| missing="$$missing slurm-wlm munge"; \
	if [ -n "$$missing" ]; then \
		if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
			echo "missing, and only root can install it, with apt: apt-get install $$missing" >&2; exit 1; \
		fi; \
		if [ ! -e $(POLICY) ]; then \
			printf '#!/bin/sh\nexit 101\n' >$(POLICY); chmod 755 $(POLICY); trap 'rm -f $(POLICY)' EXIT; \
		fi; \
		{ apt-get install -y -qq --no-install-recommends $$missing || { apt-get update -qq && \
			apt-get install -y -qq --no-install-recommends $$missing; }; } >/dev/null; \
	fi

test: system-packages lint
	$(PYTEST) -m "not slow and not gpu and not sglang"

test-full: system-packages lint
	$(PYTEST) -m "slow and not extra and not gpu and not sglang"

test-extra: system-packages lint
	$(PYTEST) -m "extra"

# The trainer's tests on the sources of a newer megatron-core, which stands before the installed one on the ranks'
# PYTHONPATH. Its wheel is for Python 3.12 because of one compiled helper that nothing here imports.
NEXT_MEGATRON := 0.19.2
NEXT_FOLDER := .cache/megatron-core-$(NEXT_MEGATRON)

$(NEXT_FOLDER)/.unpacked: requirements/megatron-next.txt $(VENV)/.locked
	rm -rf $(NEXT_FOLDER)
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --python-version 3.12 \
		--only-binary=:all: -r $< -d $(NEXT_FOLDER)/wheel
	$(PY) -m zipfile -e $(NEXT_FOLDER)/wheel/megatron_core-$(NEXT_MEGATRON)-*.whl $(NEXT_FOLDER)/src
	@touch $@

test-megatron-next: install $(NEXT_FOLDER)/.unpacked
	REDONE_MEGATRON=$(NEXT_MEGATRON) PYTHONPATH=$(CURDIR)/$(NEXT_FOLDER)/src:$${PYTHONPATH:-} \
		$(PYTEST) -m "not slow" tests/dist/test_trainer.py tests/dist/test_moe_and_sharing.py

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m mypy $(TYPED)

# SGLang in an environment of its own, on the CPU: its kernel package and torchvision are stubs (tests/sglang/stubs), so
# this shows the adapter, SGLang's scheduler, cache and weight loading, and nothing of its kernels. Left out of make test.
SGLANG_VENV ?= .venv-sglang
SGLANG_PY := $(SGLANG_VENV)/bin/python
SGLANG_LOCK := requirements/sglang-cpu.txt

$(SGLANG_VENV)/.installed: $(SGLANG_LOCK)
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 or 3.12 is needed (make PYTHON=/path/to/python3.11)" >&2; exit 1; fi
	rm -rf $(SGLANG_VENV)
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_PY) -m pip install --quiet --disable-pip-version-check uv
	$(SGLANG_PY) -m pip install --quiet --disable-pip-version-check --no-deps $(TORCH) \
		|| $(SGLANG_PY) -m pip install --disable-pip-version-check --no-deps --index-url $(TORCH_CPU_INDEX) $(TORCH)
	$(SGLANG_VENV)/bin/uv pip install --quiet --python $(SGLANG_PY) --no-deps -r $(SGLANG_LOCK)
	@touch $@

test-sglang: install $(SGLANG_VENV)/.installed
	REDONE_DRIVER_PYTHON=$(abspath $(PY)) PYTHONPATH=.:kernels:launcher:tests/sglang/stubs $(SGLANG_PY) -m pytest -m "sglang" tests/sglang

# Needs no .venv: any python3 with torch, triton and pytest on a machine with a CUDA device. torch.compile, off in the
# CPU tests, is one of the peers. A copy without history names its commit: make gpu-check REDONE_COMMIT=...
GPU_PYTHON ?= python3
GPU_ENV = env -u TRITON_INTERPRET PYTHONPATH=.:kernels TORCH_COMPILE_DISABLE=0
gpu-check:
	@$(GPU_PYTHON) -c 'import importlib.util as u, sys; m = [n for n in ("torch", "triton", "pytest") if u.find_spec(n) is None]; \
	sys.exit(m and "gpu-check: " + sys.executable + " lacks " + ", ".join(m) or 0)'
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "gpu-check: torch sees no CUDA device")'
	@$(GPU_ENV) $(GPU_PYTHON) -c 'import sys; sys.path.insert(0, "benchmarks/kernels"); import measure; measure.commit()'
	$(GPU_ENV) $(GPU_PYTHON) -m pytest --confcutdir=tests/gpu -o addopts=--import-mode=importlib -q -m gpu tests/gpu
	$(GPU_ENV) REDONE_KERNELS_DEVICE=cuda $(GPU_PYTHON) -m pytest --confcutdir=tests/kernels \
		-o addopts=--import-mode=importlib -q -m "not slow" tests/kernels
	$(GPU_ENV) $(GPU_PYTHON) benchmarks/kernels/run.py

# Rewrites the pins. LOCK_FLAGS: e.g. --upgrade, or --find-links FOLDER where a folder holds the torch+cpu wheel.
LOCK_FLAGS ?= --extra-index-url $(TORCH_CPU_INDEX) --index-strategy unsafe-best-match
COMPILE = $(VENV)/bin/uv pip compile --quiet --no-annotate --no-header --no-emit-find-links --no-emit-index-url
lock: install
	$(COMPILE) requirements/cpu.in --override requirements/overrides-cpu.txt --python-version 3.11 $(LOCK_FLAGS) \
		-o requirements/cpu.lock
	$(COMPILE) requirements/cuda-vllm.in --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
		-o requirements/cuda-vllm.txt
	$(COMPILE) requirements/cuda-sglang.in --python-version 3.12 --python-platform x86_64-manylinux_2_34 \
		-o requirements/cuda-sglang.txt

clean:
	rm -rf $(VENV) $(SGLANG_VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .cache .hypothesis
	find redone kernels launcher tests -name __pycache__ -type d -prune -exec rm -rf {} +

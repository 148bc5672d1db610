# Everything here works on a machine that has only Python >= 3.11 and make: the first target that needs
# packages sets up the virtual environment $(VENV). An environment that is there already is reused.
#
#   make test PYTHON=python3.12                     which interpreter a new environment is made from
#   make test VENV_ARGS=--system-site-packages      let a new environment see an installed torch
#   make test PYTEST_ARGS="tests/ddim -x"           what pytest gets, in one process then
#   make test WORKERS=1                             how many processes share all of the tests
#   make demo DEMO_ARGS="--help"                    what a demo gets

PYTHON ?= python3
VENV := .venv
VENV_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= auto
DEMO_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-ldm demo-txt2img test test-full lint format venv clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo "  variables: PYTHON, VENV_ARGS, PYTEST_ARGS, WORKERS, DEMO_ARGS (see the top of the Makefile)"

demo: $(READY)  ## quantize, calibrate, resume and sample the bundled model; writes demo/
	$(BIN)/python scripts/demo.py $(DEMO_ARGS)

demo-ldm: $(READY)  ## the same for the latent model of emoji; writes demo-ldm/
	$(BIN)/python scripts/demo_ldm.py $(DEMO_ARGS)

demo-txt2img: $(READY)  ## the same for the text-to-image model of emoji; writes demo-txt2img/
	$(BIN)/python scripts/demo_txt2img.py $(DEMO_ARGS)

# A thread for each process: small networks gain nothing from more, and lose where processes compete; where a test has
# several, those that wait sleep. (Alone on its cores a calibration is three times as quick if they do not.) A file's
# tests stay together, because they share what was calibrated for them.
test: export OMP_WAIT_POLICY := PASSIVE
test: $(READY)  ## run the tests; PYTEST_ARGS="..." narrows them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
		$(or $(PYTEST_ARGS),-n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder)

# The same tests, more of each: see docs/reliability.md. The wheel is installed with all it needs, from pip's index.
test-full: export FUZZ_CASES := 2000
test-full: export KILL_MOMENTS := 10
test-full: export INSTALL_WHEEL := 1
test-full: export THOROUGH := 1
test-full: test  ## the tests with 2000 broken files a loader, 10 kills a command, and the wheel in an empty environment

lint: $(READY)  ## check style, formatting and types, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## put formatting and import order right
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

venv: $(READY)  ## only set up the virtual environment

clean:  ## remove caches, build leftovers and the demo's output; keeps .venv and runs/
	rm -rf build dist demo demo-ldm demo-txt2img *.egg-info .coverage* .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name $(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the virtual environment too
	rm -rf $(VENV)

# ---- the virtual environment ---------------------------------------------------------------------------------

FIND_PYTHON = command -v "$(PYTHON)" >/dev/null || { \
	echo "error: no interpreter '$(PYTHON)'. Install Python 3.11 or newer, or name one: make ... PYTHON=/path/to/python3" >&2; \
	exit 1; }

# $(1): the interpreter to look at, $(2): what to do about one that is too old.
NEW_ENOUGH = "$(1)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "error: $(1) is not a working Python 3.11 or newer (it says: $$("$(1)" --version 2>&1 | head -n 1)). $(2)" >&2; \
	exit 1; }

HAS_VENV = "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "error: $(PYTHON) has no venv module (on Debian and Ubuntu: apt install python3-venv)." >&2; \
	echo "       Install it, or name another interpreter: make ... PYTHON=/path/to/python3" >&2; \
	exit 1; }

# torch comes first and in the pinned versions, so that a new environment holds the combination the tests ran with.
# A torch that can be imported already (an older environment, --system-site-packages) is left as it is, and the
# second install leaves every package alone that satisfies pyproject.toml. The stamp comes last: an interrupted
# set-up is taken up again by the next call.
$(READY): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		$(FIND_PYTHON); \
		$(call NEW_ENOUGH,$(PYTHON),Name a newer one: make ... PYTHON=/path/to/python3); \
		$(HAS_VENV); \
		echo "making $(VENV) with $$("$(PYTHON)" --version)"; \
		"$(PYTHON)" -m venv $(VENV_ARGS) $(VENV) || exit 1; \
	fi
	@$(call NEW_ENOUGH,$(BIN)/python,Remove it with 'make distclean' and try again.)
	@$(BIN)/python -c 'import torch, torchvision' 2>/dev/null \
		|| { echo "installing torch (the first time takes minutes)"; \
			$(BIN)/python -m pip install --quiet -c constraints.txt torch torchvision; }
	@echo "installing qdiff and what it needs"
	@$(BIN)/python -m pip install --quiet -e ".[dev,train]"
	@touch $@

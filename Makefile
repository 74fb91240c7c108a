# What people type: `make run` on a laptop, `make test` before a commit.
#
#   PYTHON=python3.12      the interpreter of .venv; the default is the first of 3.11 and newer that is found
#   MODEL=...              what `make run` serves: a folder or a hub id; the default is a small demo model
#   PORT=8080              where `make run` serves
#   SERVE_ARGS='...'       more options for `tokenfleet serve`
#   PYTEST_ARGS='-k ...'   more options for pytest
#   FUZZ_ARGS='--seed 7'   options of the fuzzers: a seed to do again, --seconds, --case
#   PIP_ARGS='...'         more options for pip. On Linux, PyPI's torch brings CUDA, some gigabytes; without an NVIDIA
#                          GPU, name the package index of torch's CPU builds: PIP_ARGS='--extra-index-url <index>'

CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in $(CANDIDATES); do \
	$$name -c '$(IS_NEW_ENOUGH)' 2>/dev/null && echo $$name && break; done)
PORT ?= 8080
DEMO := .models/SmolLM2-135M-Instruct
MODEL ?= $(DEMO)
SERVE_ARGS ?=
PYTEST_ARGS ?=
PIP_ARGS ?=
CHAOS_S ?= 600
CHAOS_SEEDS ?= 1,2,3
CHAOS_ARGS ?=
FUZZ_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
CODE := common gateway worker tests
BUILT_FROM := setup.cfg pyproject.toml $(wildcard worker/kernels/cpu/*.cpp worker/kernels/cpu/*.h)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) --editable

.PHONY: help run test chaos fuzz model lint clean
.DELETE_ON_ERROR:

help:
	@echo "make run     install, fetch a small model, serve it on port $(PORT)"
	@echo "make test    install, run every test, report coverage"
	@echo "make chaos   break a fleet in every way for ten minutes; goes on where it ended the last time"
	@echo "make fuzz    shoot at a gateway: 5,000 requests from its schema, then five minutes of spoiled HTTP"
	@echo "make model   fetch the small model into $(DEMO)"
	@echo "make lint    check style and format"
	@echo "make clean   remove what was built and installed here; fetched models stay"

run: $(VENV)/installed $(if $(filter $(DEMO),$(MODEL)),$(DEMO)/config.json)
	@exec $(BIN)/tokenfleet serve --model-id $(MODEL) --port $(PORT) $(SERVE_ARGS)

# One thread a process: the models of the tests are tiny, and threads that wait for each other are all they would add.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest \
		--cov=common --cov=gateway --cov-report=term $(PYTEST_ARGS)

chaos: $(VENV)/installed-test
	@mkdir -p .cache
	$(BIN)/python -m tests.chaos --seeds $(CHAOS_SEEDS) --seconds $(CHAOS_S) --results .cache/chaos.jsonl $(CHAOS_ARGS)

fuzz: $(VENV)/installed-test
	$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

model: $(DEMO)/config.json

lint: $(VENV)/installed-test
	$(BIN)/ruff check --line-length 100 --ignore B008,C408,RUF009,SIM905,TRY004 $(CODE)
	$(BIN)/ruff format --line-length 100 --check $(CODE)

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .coverage* .hypothesis .pytest_cache .ruff_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO)/config.json: | $(VENV)/installed
	@echo "==> fetching the demo model into $(DEMO)"
	$(BIN)/tokenfleet demo-model --output $(dir $(DEMO))

$(VENV)/installed: $(BUILT_FROM) | $(BIN)/python
	@echo "==> installing tokenfleet and what it needs into $(VENV)"
	$(INSTALL) '.[gateway,worker,local]'
	@touch $@

$(VENV)/installed-test: $(BUILT_FROM) | $(BIN)/python
	@echo "==> installing tokenfleet, what it needs and the tools of its tests into $(VENV)"
	$(INSTALL) '.[gateway,worker,local,test]'
	@touch $@ $(VENV)/installed

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "tokenfleet needs Python 3.11 or newer; name one: make PYTHON=..." >&2; exit 1; }
	@echo "==> making $(VENV) with $(PYTHON)"
	$(PYTHON) -m venv $(VENV)

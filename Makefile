# make demo, make test: all that a newcomer needs. Each makes .venv and installs into it first.
#
#   make test PYTHON=/path/to/python           that interpreter as it is; nothing is installed
#   make test VENV=none                        the same with python3
#   make test PYTHON=python3.12 VENV=.venv312  an environment of its own from that interpreter

SHELL := /bin/bash
ifeq ($(origin PYTHON),undefined)
VENV ?= .venv
else
VENV ?= none
endif
PYTHON ?= python3
EXTRAS ?= train,eval,dev
# Tests run in several processes of one thread each; `make test PARALLEL=` runs them in one.
PARALLEL ?= -n auto --maxprocesses 4

ifeq ($(VENV),none)
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
endif

# Third-party switches for child processes; mllm itself reads no environment variable.
export TOKENIZERS_PARALLELISM := false
# What `make` runs is offline; nothing here may wait for a hub.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
test test-all: export OMP_NUM_THREADS := 1
# A page of news about mkdocs at every build.
site: export NO_MKDOCS_2_WARNING := 1

.PHONY: help demo test test-all lint docs site notebooks install clean

help:
	@echo "make demo      the whole job on the embedded model; leaves demo/report.html"
	@echo "make test      the fast tests"
	@echo "make test-all  every test: all combinations of the invariant matrix, 2,000 drawn plans; an hour"
	@echo "make lint      ruff"
	@echo "make docs      write the machine-made pages of docs/ anew"
	@echo "make site      build the documentation into site/, links checked (extra: docs)"
	@echo "make notebooks run the notebooks of docs/ and keep their outputs (extra: docs)"

install:
ifneq ($(VENV),none)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@scripts/install.sh $(PY) $(EXTRAS)
endif

demo: install
	$(PY) -m mllm demo --output demo $(ARGS)

test: install
	$(PY) -m pytest -q -m "not slow" $(PARALLEL) $(ARGS)

test-all: install
	$(PY) -m pytest -q $(PARALLEL) $(ARGS)

lint: install
	$(PY) -m ruff check mllm tests scripts

docs: install
	$(PY) -m scripts.make_models_doc
	$(PY) -m scripts.make_verdicts
	$(PY) -m scripts.make_performance
	$(PY) -m scripts.make_scaling

site notebooks: EXTRAS := $(EXTRAS),docs

site: install
	$(PY) -m mkdocs build --strict

notebooks: install
	$(PY) -m scripts.run_notebooks

clean:
	rm -rf .venv build dist site .pytest_cache .ruff_cache

# On a machine with python3 (3.11 or newer, with its venv module), make and git:
#
#     make demo    train a network with torch.optim and with fusedopt, and compare
#     make test    run all tests
#
# Both install what they need into .venv, in this folder, once; `make` alone names the other commands and the variables.

# The torch build to install: a version, or the path of a wheel. Which build of a version pip finds (CPU or CUDA) follows
# pip's own configuration and its environment variables (PIP_...), as with every package.
TORCH ?= torch==2.13.0
# For the tests, on Linux alone. A CUDA build of torch asks for one version of Triton: choose both together.
TRITON ?= $(if $(filter Linux,$(shell uname)),triton==3.7.1)
NEWEST_TRITON ?= triton==3.9.0
# The interpreter that makes .venv.
PYTHON ?= python3
# Options for the command itself, as in: make test ARGS="-k adam"
ARGS ?=
# Processes that run tests, a file at a time; each takes about 1.5 GB of memory.
JOBS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest --numprocesses $(JOBS) --dist loadfile
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# The build of fusedopt itself takes the setuptools of .venv, which is pinned; pip would fetch the newest.
INSTALL := $(PIP) --upgrade setuptools && $(PIP) --no-build-isolation '$(TORCH)' --editable
DEFINITION := setup.py pyproject.toml constraints.txt
CHOICES := $(PYTHON) $(TORCH) $(TRITON)

# For bench-compare: the revision to compare with.
BASE ?=

.PHONY: help demo lecture test test-newest-triton gpu-proof lint bench bench-readme bench-compare docs info clean always
.DEFAULT_GOAL := help

help:
	@echo 'make demo                 train a real network with torch.optim and with fusedopt, and compare'
	@echo 'make lecture              run the lecture, and write docs/lecture; by ARGS=momentum one topic, to build/lecture'
	@echo 'make test                 run all tests'
	@echo 'make test-newest-triton   run the tests of the Triton kernels with $(NEWEST_TRITON)'
	@echo 'make gpu-proof            execute and measure all compiled GPU kernels, without a GPU, and write docs/gpu_proof.md'
	@echo 'make lint                 check format, style and types'
	@echo 'make bench                measure optimizers against torch.optim, and write a report'
	@echo 'make bench-readme         put the newest whole report of bench/results into README.md'
	@echo 'make bench-compare        compare with another revision, as in: make bench-compare BASE=HEAD~1'
	@echo 'make docs                 build the documentation: build/docs/index.html'
	@echo 'make info                 print versions, backends, devices, and what is missing'
	@echo 'make clean                remove .venv and all else that was made'
	@echo
	@echo 'Variables, as in: make test TORCH=torch==2.12.0 ARGS="-k adam"'
	@echo '  TORCH    the torch build to install: a version or the path of a wheel   [$(TORCH)]'
	@echo '  TRITON   for the tests; a CUDA build of torch asks for one version      [$(TRITON)]'
	@echo '  PYTHON   the interpreter that makes .venv                               [$(PYTHON)]'
	@echo '  BASE     the revision that bench-compare compares with'
	@echo '  JOBS     processes that run tests                                       [$(JOBS)]'
	@echo '  ARGS     options for the command itself'
	@echo 'Another TORCH, TRITON or PYTHON makes .venv anew; export a variable to have it hold for all commands.'

demo: $(VENV)/demo
	@$(RUN) -m fusedopt demo $(ARGS)

# The page that is kept is of a whole run on the digits; what else is asked for goes to build/lecture.
lecture: $(VENV)/lecture
	@$(RUN) -m examples.lecture $(or $(ARGS),--output docs/lecture)

test: $(VENV)/test
	@$(PYTEST) $(ARGS)

test-newest-triton: $(VENV)/newest-triton
	@PYTHONPATH=$(VENV)/newest-triton-packages $(PYTEST) -m triton $(ARGS)

# Not in Triton's interpreter, which compiles nothing.
gpu-proof: $(VENV)/test
	@TRITON_INTERPRET=0 $(PYTEST) -m compiled --gpu-proof $(ARGS)
	@TRITON_INTERPRET=0 $(RUN) docs/gpu_proof.py

lint: $(VENV)/lint
	@$(RUN) -m ruff format --check --quiet
	@$(RUN) -m ruff check --quiet
	@$(RUN) -m mypy

bench: $(VENV)/test
	@$(RUN) -m bench --quick $(ARGS)

bench-readme: $(VENV)/test
	@$(RUN) -m bench.readme $(ARGS)

bench-compare: $(VENV)/test
	@$(RUN) -m bench.compare '$(BASE)' $(ARGS)

# A warning is an error, and so is a name that leads nowhere.
docs: $(VENV)/docs
	@$(RUN) -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs build/docs $(ARGS)

info: $(VENV)/demo
	@$(RUN) -m fusedopt info $(ARGS)

clean:
	rm -rf $(VENV) build dist docs/optimizers fusedopt.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What .venv was made with; rewritten, and so newer than .venv, only when a choice changes.
$(VENV)/choices: always
	@mkdir -p $(VENV)
	@echo '$(CHOICES)' | cmp -s - $@ || echo '$(CHOICES)' > $@

$(VENV)/made: $(VENV)/choices
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'fusedopt needs Python 3.11 or newer: install it, or name one, as in: make test PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo 'The venv module of $(PYTHON) is missing; on Debian and Ubuntu: apt install python3-venv'; exit 1; }
	@echo 'Making a virtual environment in $(VENV) ...'
	@$(PYTHON) -m venv --clear $(VENV)
	@echo '$(CHOICES)' > $(VENV)/choices
	@touch $@

$(VENV)/demo: $(VENV)/made $(DEFINITION)
	@echo 'Installing what the demo needs: $(TORCH), numba, scikit-learn, matplotlib, rich. Once; it takes minutes ...'
	@$(INSTALL) '.[demo]'
	@touch $@

$(VENV)/lecture: $(VENV)/made $(DEFINITION)
	@echo 'Installing what the lecture needs: $(TORCH), numba, scikit-learn, matplotlib, rich. Once; it takes minutes ...'
	@$(INSTALL) '.[lecture]'
	@touch $(VENV)/demo $@

$(VENV)/test: $(VENV)/made $(DEFINITION)
	@echo 'Installing what the tests need: $(TORCH), $(TRITON), numba, pytest, lightning, transformers and more. Once; it takes minutes ...'
	@$(INSTALL) '.[test,frameworks]' $(TRITON:%='%')
	@touch $(VENV)/demo $(VENV)/lecture $@

$(VENV)/lint: $(VENV)/test
	@echo 'Installing ruff and mypy ...'
	@$(INSTALL) '.[dev]'
	@touch $@

$(VENV)/docs: $(VENV)/made $(DEFINITION)
	@echo 'Installing what the documentation needs: $(TORCH), numba, Sphinx. Once; it takes minutes ...'
	@$(INSTALL) '.[docs]'
	@touch $@

$(VENV)/newest-triton: $(VENV)/test
	@echo 'Installing $(NEWEST_TRITON) beside $(TRITON) ...'
	@$(PIP) --no-deps --upgrade --target $(VENV)/newest-triton-packages '$(NEWEST_TRITON)'
	@touch $@

# Every target first makes the environment: make train, make test, make lint, make audit.
PYTHON ?= python3
VENV   ?= .venv
# pip picks the build of torch for this machine, CUDA or CPU. Of triton there is none for macOS.
TORCH  ?= torch==2.13.0 $(if $(filter Linux,$(shell uname -s)),triton==3.7.1)
ARGS   ?=
JOBS   ?= 2
BIN     = $(VENV)/bin

.PHONY: train test test-versions test-oldest test-newest lint audit docs install clean

train: install
	$(BIN)/python train.py $(ARGS)

test: install
	$(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# The same on both ends of the range that pyproject.toml has; each pair in an environment of its own.
test-versions: test-oldest test-newest

test-oldest test-newest: test-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

.venv-oldest/.installed: TORCH = torch==2.11.0 triton==3.6.0
.venv-newest/.installed: TORCH = torch==2.15.0 triton==3.9.0

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compiles every kernel for an RTX 4070, which need not be present; fails on spills.
audit: install
	$(BIN)/python -m bench.audit --arch sm_89 $(ARGS)

# README, CONTRIBUTING, docs/ and the docstrings as a site, build/site/index.html; any warning is an error.
docs: install
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --conf-dir docs --doctree-dir build/doctrees . build/site
	cp build/site/README.html build/site/index.html

install: $(VENV)/.installed

%/.installed: pyproject.toml
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install $(TORCH)
	$*/bin/python -m pip install --quiet --editable ".[dev,docs,hf,plot,gpu]"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build

# Every target first makes the environment: make train, make test, make lint, make audit.
PYTHON ?= python3
VENV   ?= .venv
# pip picks the build of torch for this machine, CUDA or CPU. Of triton there is none for macOS.
TORCH  ?= torch==2.13.0 $(if $(filter Linux,$(shell uname -s)),triton==3.7.1)
ARGS   ?=
JOBS   ?= 2
BIN     = $(VENV)/bin

.PHONY: train test lint audit install clean

train: install
	$(BIN)/python train.py $(ARGS)

test: install
	$(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compiles every kernel for an RTX 4070, which need not be present; fails on spills.
audit: install
	$(BIN)/python -m bench.audit --arch sm_89 $(ARGS)

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev,hf,plot,gpu]"
	touch $@

clean:
	rm -rf $(VENV)

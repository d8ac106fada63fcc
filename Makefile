# make train: an environment, then the main job. make test: the same environment, then every test. make audit, make lint.
PYTHON ?= python3
VENV   ?= .venv
# The build of torch that this machine's pip offers: CUDA where it finds one, CPU where that is what there is.
TORCH  ?= torch==2.13.0 triton==3.7.1
ARGS   ?=
JOBS   ?= 2
BIN     = $(VENV)/bin

.PHONY: train test lint audit install clean

train: install
	$(BIN)/python train.py --kernels triton $(ARGS)

test: install
	$(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every kernel compiled for an RTX 4070, which need not be here; fails on spills.
audit: install
	$(BIN)/python -m bench.audit --arch sm_89 $(ARGS)

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev,hf,plot]"
	touch $@

clean:
	rm -rf $(VENV)

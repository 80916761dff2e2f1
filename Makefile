# One command each for what one does with this repository; `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= auto
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench clean

help:  ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 16

# PyTorch first: the CPU build unless there is an NVIDIA driver (TORCH=<requirement> chooses another), so that pip does
# not take gigabytes of CUDA libraries for a machine that cannot use them.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

setup: $(BIN)/python  ## Virtual environment with torch, the library and the `lpd` command
	@$(BIN)/python build_backend/install_torch.py $(TORCH)
	$(BIN)/pip install --quiet '.[tools]'

demo: setup  ## Draw a labelled grid of images with the bundled model
	$(BIN)/lpd sample --output demo/grid.png

test: $(BIN)/python  ## Build, then run the whole test suite
	@$(BIN)/python build_backend/install_torch.py $(TORCH)
	LPD_WERROR=ON $(BIN)/pip install --quiet '.[tools,test]'
	GOMP_SPINCOUNT=0 $(BIN)/pytest $(PYTEST_ARGS)

lint: $(BIN)/python  ## Check style and types (ruff, mypy, clang-format)
	@$(BIN)/python build_backend/install_torch.py $(TORCH)
	$(BIN)/pip install --quiet 'ruff==0.17.6' 'mypy==2.4.1' 'clang-format==23.1.5' 'typer>=0.12' 'rich>=13' 'safetensors' 'pillow' 'numpy'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/**.h' 'csrc/**.cpp')

format: $(BIN)/python  ## Rewrite sources in the house style
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/**.h' 'csrc/**.cpp')

bench: setup  ## Time the operators against plain torch in the same run
	GOMP_SPINCOUNT=0 $(BIN)/lpd bench

clean:  ## Remove what the commands above made
	rm -rf build dist demo $(VENV)

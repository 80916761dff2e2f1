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

# PyTorch comes first, so that the extension is built against it; TORCH=<requirement> chooses another than
# build_backend/install_torch.py would.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

.PHONY: torch lint-tools
torch: $(BIN)/python
	@$(BIN)/python build_backend/install_torch.py '$(TORCH)'

lint-tools: $(BIN)/python
	$(BIN)/pip install --quiet -r requirements-lint.txt

setup: torch  ## Virtual environment with torch, the library and the `lpd` command
	$(BIN)/pip install --quiet '.[tools]'

demo: setup  ## Draw a labelled grid of images with the bundled model
	$(BIN)/lpd sample --output demo/grid.png

test: torch  ## Build, then run the whole test suite
	LPD_WERROR=ON $(BIN)/pip install --quiet '.[tools,test]'
	GOMP_SPINCOUNT=0 $(BIN)/pytest $(PYTEST_ARGS)

lint: torch lint-tools  ## Check style and types (ruff, mypy, clang-format)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/**.h' 'csrc/**.cpp')

format: lint-tools  ## Rewrite sources in the house style
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/**.h' 'csrc/**.cpp')

bench: setup  ## Time the operators against plain torch in the same run
	GOMP_SPINCOUNT=0 $(BIN)/lpd bench

clean:  ## Remove what the commands above made
	rm -rf build dist demo $(VENV)

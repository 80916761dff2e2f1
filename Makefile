# One command each for what one does with this repository; `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=  # --system-site-packages takes the torch that is installed already
LPD_WERROR ?= ON
BIN := $(VENV)/bin
TORCH ?= auto
# Processes that share out the tests, file by file; conftest.py puts the slow files first.
JOBS ?= 2
# Without the page in a browser, which `make test-web` drives: Playwright leaves event loops to whatever test comes next.
PYTEST = GOMP_SPINCOUNT=0 $(BIN)/pytest --ignore=tests/web --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK = 1

SOURCES := $(foreach suffix,h cpp cu cuh,'csrc/**.$(suffix)' 'tests/**.$(suffix)')

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-web emulated fuzz fuzz-asan lint format docs bench bench-cpp cuda-all cuda-table test-gpu bench-gpu gpu-report clean

help:  ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

# PyTorch comes first, so that the extension is built against it; TORCH=<requirement> chooses another than
# build_backend/install_torch.py would.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)

.PHONY: torch lint-tools build-tools
torch: $(BIN)/python
	@$(BIN)/python build_backend/install_torch.py '$(TORCH)'

lint-tools: $(BIN)/python
	$(BIN)/pip install --quiet -r requirements-lint.txt

build-tools: $(BIN)/python
	$(BIN)/pip install --quiet scikit-build-core pybind11 cmake ninja

# CUDA kernels take minutes to compile: without a GPU they are, if LPD_CUDA asks for them.
GPUS = $(shell nvidia-smi --list-gpus 2> /dev/null)
setup: torch  ## Virtual environment with torch, the library and the `lpd` command
	@$(if $(LPD_CUDA)$(GPUS),,echo "No NVIDIA GPU was found, so the CUDA kernels are left out: LPD_CUDA=ON compiles them.")
	LPD_CUDA=$(or $(LPD_CUDA),$(if $(GPUS),AUTO,OFF)) $(BIN)/pip install --quiet '.[tools]'

DEMO = happy-face sad-face heart flag clock car moon fruit button weather
demo: setup  ## Draw a labelled grid of images with the bundled model
	$(BIN)/lpd sample $(DEMO) --output demo/grid.png --force

# The inner loop: compiles what changed, without nvcc.
check: torch build-tools lint emulated  ## Check style and types, and run the fast tests (3 minutes)
	LPD_CUDA=OFF LPD_WERROR=$(LPD_WERROR) $(BIN)/pip install --quiet --no-build-isolation -C build-dir=build/check \
	  '.[tools,train,serve,web,ray,test]'
	LPD_REQUIRE="$(LPD_REQUIRE) emulated" $(PYTEST) -m "not slow" $(PYTEST_ARGS)

# What the tests run on: the library as users install it, for two architectures; `make cuda-all` checks all of them.
.PHONY: test-build
test-build: export LPD_CUDA_ARCHITECTURES ?= 80-real;90-real
test-build: torch
	LPD_WERROR=$(LPD_WERROR) $(BIN)/pip install --quiet '.[tools,train,serve,web,ray,test]'

test: test-build emulated  ## Build, then run the whole test suite
	LPD_REQUIRE="$(LPD_REQUIRE) emulated" $(PYTEST) $(PYTEST_ARGS)

# With what `make test` or `make check` installed; without either, as `make test` does.
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
test-web:  ## Drive the page of `lpd demo` in headless Chromium (Debian's chromium), after `make test` or `make check`
	@if [ -z "$(CHROMIUM)" ]; then echo "SKIPPED: the page was NOT TESTED, no Chromium was found (Debian: apt install chromium)."; \
	else $(MAKE) --no-print-directory drive-page; fi

# A browser on a busy machine may be late: what fails is tried once more.
DRIVE = LPD_CHROMIUM="$(CHROMIUM)" LPD_SCREENSHOT=docs/guide/demo_page.png GOMP_SPINCOUNT=0 $(BIN)/pytest tests/web
.PHONY: drive-page
drive-page: $(if $(wildcard $(BIN)/lpd),,test-build)
	$(BIN)/pip install --quiet 'playwright>=1.50'
	$(DRIVE) $(PYTEST_ARGS) || $(DRIVE) --last-failed $(PYTEST_ARGS)

emulated: torch build-tools  ## Build the CUDA kernels for the CPU (torch.ops.lpd_emulated), which the tests then run too
	@mkdir -p build && $(BIN)/cmake -S . -B build/emulated -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DLPD_CUDA=OFF \
	  -DLPD_EMULATED_CUDA=ON -DLPD_WERROR=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python > build/emulated.log \
	  || (cat build/emulated.log; false)
	@$(BIN)/cmake --build build/emulated --target lpd_emulated

# Random calls and files, of another seed each time; a fault ends it and prints what repeats it. `make test` has a minute.
CALLS ?= 1000000
FILES ?= 100000
FUZZ = $(BIN)/python tests/support/fuzz.py
fuzz: test-build emulated fuzz-files  ## Fuzz the operators for as long as CALLS says (1000000: an hour), after files
	GOMP_SPINCOUNT=0 OMP_NUM_THREADS=1 $(FUZZ) operators --calls $(CALLS)

.PHONY: fuzz-files
fuzz-files: test-build  ## Read damaged files, as many as FILES says (100000: a quarter of an hour)
	GOMP_SPINCOUNT=0 OMP_NUM_THREADS=1 $(FUZZ) files --calls $(FILES)

# The sanitizer's library must be there before Python's first allocation, and libstdc++ before it looks for exceptions.
fuzz-asan: CALLS = 100000
fuzz-asan: torch build-tools  ## Fuzz the operators of a build with AddressSanitizer (CALLS=100000)
	LPD_CUDA=OFF $(BIN)/pip install --quiet --no-build-isolation --no-deps --upgrade --target build/asan/site \
	  -C build-dir=build/asan -C cmake.define.LPD_SANITIZE=address .
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" PYTHONPATH=build/asan/site \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 OMP_NUM_THREADS=1 LPD_EMULATED_LIBRARY=none \
	  $(FUZZ) operators --calls $(CALLS)

lint: torch lint-tools  ## Check style and types (ruff, mypy, clang-format)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files $(SOURCES))

format: lint-tools  ## Rewrite sources in the house style
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files $(SOURCES))

docs: $(BIN)/python  ## Build the site from docs/ and the docstrings into build/site; a warning or a dead link fails
	$(BIN)/pip install --quiet -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: setup bench-cpp  ## Time kernels, operators, decodes and images; JSON in build/bench, and their tables
	GOMP_SPINCOUNT=0 $(BIN)/lpd bench --part operators --part decode --part tokenizer --part image \
	  --output build/bench/python.json
	$(BIN)/lpd bench-tables build/bench/python.json build/bench/cpu.json

bench-check: setup  ## Fail if a ratio fell a quarter below the committed one (ARGS=--write: write this processor's)
	GOMP_SPINCOUNT=0 $(BIN)/lpd bench-check $(ARGS)

bench-cpp:  ## Time the CPU kernels of decoding, per instruction set, against the processor's peak (needs libbenchmark-dev)
	@command -v cmake > /dev/null || (echo "cmake was not found: install it (Debian: apt install cmake)."; false)
	cmake -S . -B build/bench -DLPD_BENCHMARKS=ON -DLPD_CUDA=OFF --log-level=WARNING
	cmake --build build/bench --target lpd_bench_cpu --parallel
	build/bench/csrc/bench/lpd_bench_cpu --benchmark_min_time=0.05 --benchmark_out=build/bench/cpu.json

cuda-all:  ## Compile the CUDA kernels for every architecture and check the machine code (needs nvcc, no GPU)
	LPD_CUDA=ON LPD_CUDA_ARCHITECTURES= $(MAKE) test-build
	LPD_REQUIRE=nvcc $(BIN)/pytest tests/operators/test_cuda_static.py

cuda-table:  ## Write the table of registers and shared memory that the tests compare with
	LPD_CUDA=ON LPD_CUDA_ARCHITECTURES= $(MAKE) test-build
	$(BIN)/python tests/support/cuda_static.py

# The kernels are compiled for the GPU at hand alone. Warnings of a compiler unknown here are no reason not to test.
GPU = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
FOR_GPU = LPD_CUDA=ON LPD_CUDA_ARCHITECTURES=$(GPU)-real LPD_WERROR=OFF
.PHONY: gpu
gpu:
	@command -v nvidia-smi > /dev/null || (echo "nvidia-smi was not found: this needs an NVIDIA GPU and its driver."; false)
	@command -v nvcc > /dev/null || test -n "$$CUDACXX" || (echo "nvcc was not found: put it on PATH or set CUDACXX."; false)

test-gpu: gpu  ## All tests with the CUDA backend, on a machine with a GPU; a CUDA test that is skipped fails
	$(FOR_GPU) LPD_REQUIRE=cuda $(MAKE) test JOBS=0

bench-gpu: gpu torch  ## Time every operator and whole decodes on the GPU against plain torch in the same run
	$(FOR_GPU) $(BIN)/pip install --quiet '.[tools]'
	$(BIN)/lpd bench --device cuda --shape L-256-20 --shape L-512-48 --batch 1 --batch 32 --part operators --part decode \
	  --output build/bench-gpu.json

# With the torch that is there; nothing is installed. Needs nvcc, cmake, pybind11 and pytest.
gpu-report:  ## Tests and figures that ten minutes on a GPU give, into docs/results/gpu.md (ARGS=--dry-run: without a GPU)
	$(or $(wildcard $(BIN)/python),$(PYTHON)) tests/support/gpu_report.py $(ARGS)

clean:  ## Remove what the commands above made
	rm -rf build dist demo $(VENV)

# Two commands do everything on a fresh machine, .venv and build included: `make bench` and `make test`.
# Needed beforehand: Python >= 3.10, a C++17 compiler, make, git. CMake and Ninja come from PyPI.

PYTHON ?= python3
ARGS ?=

VENV := .venv
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip
SOURCES := pyproject.toml constraints.txt setup.py CMakeLists.txt $(shell find csrc -type f)
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help install test test-ops fuzz bench scaling browser docs lint format sanitize wheel clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: $(STAMP)  ## Make .venv and build gankern into it (editable; again when the C++ sources changed)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The build requirements go first and isolation is off, so that development builds use the pinned tools.
$(STAMP): $(SOURCES) | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt setuptools pybind11 cmake ninja
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

# The CUDA C++ kernels run on the CPU under AddressSanitizer and UBSan; its exceptions need libstdc++ from the start.
SANITIZED = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2

# Each process takes a gigabyte.
ON_ALL_CORES = -n auto --maxprocesses 16 --dist worksteal

# The sanitized tests, which wait for g++ and hold one process, run beside the others.
test: $(STAMP)  ## Run the tests; ARGS goes to pytest: make test ARGS='-k penalty'
	@mkdir -p build
	@$(SANITIZED) python -m pytest -m cuda_on_cpu $(ARGS) >build/sanitized.log 2>&1 & sanitized=$$!; \
	trap 'kill $$sanitized' INT TERM; \
	python -m pytest $(ON_ALL_CORES) -m 'not cuda_on_cpu' $(ARGS); others=$$?; \
	wait $$sanitized; found=$$?; cat build/sanitized.log; \
	[ $$others -eq 0 ] && { [ $$found -eq 0 ] || [ $$found -eq 5 ]; }

# torch's own requirements come with it; constraints.txt pins another release.
TORCH ?= 2.13.0
OPS_VENV = build/ops-$(notdir $(PYTHON))-torch-$(TORCH)
test-ops:  ## Run the tests of the ops under another Python or torch: make test-ops PYTHON=python3.12 TORCH=2.8.0
	[ -x $(OPS_VENV)/bin/pip ] || $(PYTHON) -m venv $(OPS_VENV)
	$(OPS_VENV)/bin/pip install --quiet torch==$(TORCH) numpy setuptools pybind11 cmake ninja \
		expecttest hypothesis pytest pytest-timeout pytest-xdist
	PATH=$(CURDIR)/$(OPS_VENV)/bin:$$PATH python setup.py --quiet build_ext --inplace
	$(OPS_VENV)/bin/python -m pytest $(ON_ALL_CORES) -m 'not cuda_on_cpu' tests/ops tests/optim $(ARGS)

# The night's run; a failure prints a program of a few lines. `python -m fuzz --seed 7` shows one.
N ?= 2000
fuzz: $(STAMP)  ## Run N random networks against stock PyTorch: make fuzz N=20000 ARGS='--seed-start 7000'
	PYTHONPATH=.:tests python -m fuzz -n $(N) $(ARGS)

bench: $(STAMP)  ## Train and time the reference GANs and the ops against stock PyTorch, into out/bench
	gankern bench --main $(ARGS)

scaling: $(STAMP)  ## Time and memory against size, tables and plots, into out/scaling
	gankern bench minibatch_discrimination.training generator_step.dcgan --sweep --sizes width=8,16,32,64 \
		--out out/scaling $(ARGS)

browser:  ## Install Chromium, in which the tests open HTML reports (needs apt-get and root; without it they are skipped)
	@command -v chromium >/dev/null || { apt-get -qq update && apt-get -qq install -y chromium; } >/dev/null 2>&1 \
		|| echo "no chromium: tests in a browser are skipped"

docs: $(STAMP)  ## Build the documentation into out/docs; a warning is an error
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict

lint: $(STAMP)  ## Check style and types
	ruff check
	ruff format --check
	clang-format --dry-run -Werror $(CXX_FILES)
	mypy

format: $(STAMP)  ## Rewrite the sources in the project's style
	ruff check --fix
	ruff format
	clang-format -i $(CXX_FILES)

sanitize: $(STAMP)  ## Run the C++ tests under AddressSanitizer and UBSan
	cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=Debug \
		-DGANKERN_BUILD_PYTHON=OFF -DGANKERN_BUILD_TESTS=ON -DGANKERN_SANITIZE=ON
	cmake --build build/sanitize
	ctest --test-dir build/sanitize --output-on-failure

# setuptools would pack stale files left in build/.
wheel: | $(VENV)/bin/python  ## Build a wheel into dist/, in isolation
	rm -rf build/lib* build/bdist*
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:  ## Remove what was built; .venv, out/ and runs/ stay
	rm -rf build dist *.egg-info gankern/_C*.so $(STAMP) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find gankern tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

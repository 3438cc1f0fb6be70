# Needs Python 3.10 or later (with venv), a C++17 compiler and make; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PINS := requirements-dev.txt
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c $(PINS)

RUN_DEPS := torch numpy PyYAML click rich safetensors
BUILD_DEPS := setuptools pybind11
DEMO_DEPS := scikit-learn matplotlib
BENCH_DEPS := matplotlib mergekit peft
TRITON := triton==3.9.0
CORE_SOURCES := $(shell find csrc -type f 2>/dev/null)

# Two workers with one thread each: the tests are many and small, and torch's own threads would only fight over the cores.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help demo experiments test test-all lint bench bench-plots bench-check readme-table aot gpu sanitize arm64 clean distclean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

demo: $(VENV)/.demo $(VENV)/.core  ## train four small networks, merge them five ways, print and draw the result
	$(PY) examples/digits_demo.py demo-output

EXPERIMENTS := e1_replay e2_connectivity e3_interference e4_language_model e5_stages
experiments: $(VENV)/.dev $(VENV)/.core  ## train what docs/experiments.md reports, five seeds (10-20 minutes); writes examples/results/
	@for e in $(EXPERIMENTS); do OMP_NUM_THREADS=1 $(PY) examples/experiments/$$e.py $(ARGS) || exit 1; done

test: $(VENV)/.dev $(VENV)/.core  ## all tests but the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.dev $(VENV)/.core  ## all tests
	$(PYTEST) $(ARGS)

lint: $(VENV)/.lint  ## ruff
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# docs/benchmarks.md says how to read what comes out. Less than everything does not replace the day's full result.
bench: $(VENV)/.bench $(VENV)/.core  ## speeds beside the machine's memory and other programs (half an hour; ARGS=--quick: 3 minutes)
	$(PY) -m benchmarks.suite $(ARGS)

bench-plots: $(VENV)/.bench  ## pictures in docs/benchmarks/ from the newest full result, or ARGS=FILE
	$(PY) -m benchmarks.suite.plots $(ARGS)

readme-table: $(VENV)/.run  ## the tables in README.md and docs/benchmarks.md from the newest full result, or ARGS=FILE
	$(PY) -m benchmarks.suite.pages $(ARGS)

bench-check: $(VENV)/.core  ## has a kernel become slower than what is committed (ratios; instruction counts with valgrind); ARGS=--update commits anew
	@status=0; $(PY) -m benchmarks.check.ratios $(ARGS) || status=1; $(PY) -m benchmarks.check.instructions $(ARGS) || status=1; exit $$status

aot: $(VENV)/.dev $(VENV)/.core  ## compile the Triton kernels for GPUs that are not there and check the machine code (minutes)
	$(PY) benchmarks/aot.py $(ARGS)

# With the Python that has torch for the GPU (and triton), not with .venv.
GPU_PYTHON ?= $(PYTHON)
gpu:  ## on a machine with a GPU: are results the CPU's bytes, and how fast; writes benchmarks/results/ (GPU_PYTHON=...)
	$(GPU_PYTHON) benchmarks/gpu.py $(ARGS)

# The runtime libraries of the sanitizers must come before Python's own allocations, hence LD_PRELOAD. Python itself leaks by design.
SANITIZED := build/sanitize
SANITIZER_LIBRARIES = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
sanitize: $(VENV)/.dev $(SANITIZED)/.built  ## the core's tests under AddressSanitizer and UndefinedBehaviorSanitizer (Linux, gcc)
	LD_PRELOAD="$(strip $(SANITIZER_LIBRARIES))" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYMERGE_NATIVE_DIR=$(CURDIR)/$(SANITIZED)/pymerge PYTHONPATH=$(CURDIR) $(PYTEST) tests/core tests/kl/test_kernels.py -m "not slow" $(ARGS)

# Needs aarch64-linux-gnu-g++ and qemu-aarch64-static (Debian: g++-aarch64-linux-gnu, qemu-user-static); on an arm64 machine `make test`
# does more.
ARM64 := build/arm64/targets_agree
arm64: $(ARM64)  ## the NEON kernels against the scalar ones under emulation
	qemu-aarch64-static $(ARM64) 200

$(ARM64): $(CORE_SOURCES) tests/core/targets_agree.cpp
	mkdir -p $(@D)
	aarch64-linux-gnu-g++ -std=c++17 -O2 -static -pthread -ffp-contract=off -Icsrc -o $@ tests/core/targets_agree.cpp \
		$(filter-out csrc/bindings%,$(wildcard csrc/*.cpp)) csrc/targets/scalar.cpp csrc/targets/neon.cpp

clean:  ## remove what was built; .venv stays
	rm -rf build dist demo-output *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks pymerge/_native*.so $(VENV)/.core
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)

# ---- what the targets need; each stamp is as new as the files it was made from -----------------------------------------------------

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pymerge needs Python 3.10 or later, but $(PYTHON) is " \
		+ sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.created $(PINS)
	$(PIP) $(RUN_DEPS) $(BUILD_DEPS)
	@touch $@

$(VENV)/.core: $(VENV)/.run pyproject.toml setup.py $(CORE_SOURCES)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.demo: $(VENV)/.run $(PINS)
	$(PIP) $(DEMO_DEPS)
	@touch $@

$(VENV)/.bench: $(VENV)/.run $(PINS)
	$(PIP) $(BENCH_DEPS)
	@touch $@

$(VENV)/.lint: $(VENV)/.created $(PINS)
	$(PIP) ruff
	@touch $@

# A torch built for GPUs insists on the Triton that it was built with; one for CPUs brings none.
$(VENV)/.dev: $(VENV)/.run $(PINS)
	$(PIP) -r $(PINS)
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(PY) -c 'import triton' 2>/dev/null || $(PIP) $(TRITON); fi
	@touch $@

$(SANITIZED)/.built: $(VENV)/.run setup.py $(CORE_SOURCES)
	PYMERGE_SANITIZE=1 $(PY) setup.py --quiet build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	@touch $@

# Each target works from a fresh clone: the virtual environment, the pinned dependencies and the
# build of the extension are prerequisites, made once and renewed when what they depend on changes.
#
#   make test                 the whole test suite
#   make fuzz CASES=1000      so many random cases from SEED=0 on, on every instruction set of this machine
#   make test-sanitize        such cases on an engine built with the sanitizers of addresses and undefined behaviour
#   make lint                 ruff and clang-format, over the whole tree
#   make bench                the benchmark report: tables, benchmarks/results/*.json, docs/*.png
#   make bench-micro          the C++ micro-benchmark of the CPU engine's kernels
#   make test-install         a wheel in environments with one extra each, or none: its commands run, or say what to install
#   make gpu-compile-report   registers, spills and instruction mix of every GPU configuration
#   make gpu-cache            every GPU kernel that python -m benchmarks.gpu needs, compiled without a GPU and packed
#   make test-newest-triton   the GPU kernels interpreted and compiled by the newest Triton, not the pinned one
#   make readme               the tables of README.md and docs/performance.md, from benchmarks/results/
#   make format               let the formatters rewrite the sources
#   make clean

# The pinned versions are for Python 3.11 and newer (the package itself runs on 3.10): PYTHON chooses another.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip --disable-pip-version-check
NEWEST := .venv-newest
INSTALL := .venv-install
# The version of torch that is there; nothing may change it.
PINS   := $(VENV)/torch-pin.txt

CPP_SOURCES   := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.inc')
BUILD_SOURCES := $(CPP_SOURCES) setup.py pyproject.toml $(shell find csrc -name CMakeLists.txt)

CASES ?= 1000
SEED  ?= 0

# Beside Python the sanitizer of addresses has to be loaded first, with what it intercepts.
SANITIZED = build/sanitize/_C.so
PRELOAD   = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)"

.PHONY: test test-sanitize fuzz test-newest-triton test-install lint format bench bench-micro gpu-compile-report gpu-cache readme clean

# Side by side, each file in one process; two threads a process, which give way while they wait.
test: $(VENV)/installed.stamp
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(RUN) -m pytest tests -n auto --maxprocesses 8 --dist loadfile

fuzz: $(VENV)/installed.stamp
	$(RUN) -m tests.fuzz --cases $(CASES) --seed $(SEED)

test-sanitize: $(VENV)/installed.stamp
	$(VENV)/bin/cmake -S csrc -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=Release -DFASTATTN_SANITIZE=ON \
		-DFASTATTN_BUILD_EMULATED=ON -DFASTATTN_OUTPUT=$(abspath $(SANITIZED)) \
		-DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) -DPython_EXECUTABLE=$(abspath $(RUN)) \
		-Dpybind11_DIR=$$($(RUN) -m pybind11 --cmakedir)
	$(VENV)/bin/cmake --build build/sanitize --target _C
	$(PRELOAD) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(RUN) -m tests.fuzz --cases 400 --extension $(SANITIZED) --progress

bench: $(VENV)/installed.stamp
	$(RUN) -m benchmarks.report run

readme: $(VENV)/installed.stamp
	$(RUN) -m benchmarks.report readme

bench-micro: $(VENV)/packages.stamp
	$(VENV)/bin/cmake -S csrc -B build/micro -G Ninja -DCMAKE_BUILD_TYPE=Release -DFASTATTN_BENCH=ON \
		-DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) -DPython_EXECUTABLE=$(abspath $(RUN))
	$(VENV)/bin/cmake --build build/micro --target bench_micro
	build/micro/bench/bench_micro

gpu-compile-report: $(VENV)/installed.stamp
	$(RUN) -m fastattn.kernels.compile_report
	$(RUN) -m fastattn.kernels.hopper.report --candidates

# GPU_PYTHON: of the same version, and with the same Triton, as on the machine with the GPU. What the cache has already is
# not compiled again.
GPU_PYTHON ?= $(RUN)

gpu-cache: $(VENV)/installed.stamp
	$(GPU_PYTHON) -m benchmarks.gpu.cache --pack build/gpu-cache.tar.xz

# An environment over the first one: what it lacks it finds there.
$(NEWEST)/base.stamp: $(VENV)/installed.stamp
	$(RUN) -m venv --system-site-packages $(NEWEST)
	$(NEWEST)/bin/python -c 'import pathlib, sys, sysconfig; \
		pathlib.Path(sysconfig.get_path("purelib"), "base.pth").write_text(f"import site; site.addsitedir({sys.argv[1]!r})\n")' \
		"$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	touch $@

test-newest-triton: $(NEWEST)/base.stamp
	$(NEWEST)/bin/python -m pip --disable-pip-version-check install --upgrade --no-deps triton
	TRITON_INTERPRET=1 PYTHONPATH=. $(NEWEST)/bin/python tests/triton_checks.py
	$(NEWEST)/bin/python -m fastattn.kernels.compile_report --check
	$(NEWEST)/bin/python -m fastattn.kernels.hopper.report --check

$(INSTALL)/base.stamp: $(VENV)/packages.stamp requirements-torch.txt
	$(RUN) -m venv --clear --without-pip $(INSTALL)/base
	$(PIP) --python $(INSTALL)/base/bin/python install -r requirements-torch.txt
	touch $@

test-install: $(INSTALL)/base.stamp
	$(RUN) -m tests.install_checks $(INSTALL)

lint: $(VENV)/packages.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_SOURCES)

format: $(VENV)/packages.stamp
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP_SOURCES)

# A python3 that has torch (a GPU image) lends it: --system-site-packages, or, where python3 is itself
# a virtual environment, a .pth file. Only where there is none is torch installed.
$(VENV)/torch.stamp: requirements-torch.txt requirements-triton.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make needs Python 3.11 or newer: make PYTHON=...")'
	if $(PYTHON) -c 'import torch' 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages $(VENV) && \
		{ $(RUN) -c 'import torch' 2>/dev/null || $(PYTHON) -c 'import pathlib, sys, torch; \
			site, = pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages"); \
			home = pathlib.Path(torch.__file__).parents[1]; \
			(site / "torch-home.pth").write_text(f"{home}\n")' $(VENV); }; \
	else \
		$(PYTHON) -m venv $(VENV) && $(PIP) install -r requirements-torch.txt; \
	fi
	$(RUN) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(PINS)
	$(RUN) -c 'import triton' 2>/dev/null || $(PIP) install -c $(PINS) -r requirements-triton.txt
	touch $@

$(VENV)/packages.stamp: $(VENV)/torch.stamp requirements.txt
	$(PIP) install -c $(PINS) -r requirements.txt
	touch $@

# FASTATTN_BUILD_EMULATED adds a software model of the bf16 dot product, so that its kernels are
# tested on machines without the instruction; it is never chosen by itself.
$(VENV)/installed.stamp: $(VENV)/packages.stamp $(BUILD_SOURCES)
	FASTATTN_BUILD_EMULATED=1 $(PIP) install -v --no-build-isolation --no-deps -e .
	$(RUN) -c 'from fastattn import _C'  # setup.py lets an installation without the engine pass; this does not
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(INSTALL) build dist fastattn.egg-info fastattn/_C*.so fastattn/_C_build_error.txt .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

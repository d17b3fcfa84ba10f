# make demo   an entmax language model continues a source file, with each way of reading its cache
# make test   lint, types, build (CUDA too where nvcc is found) and all tests that need no GPU
# Both set themselves up, in the active virtual environment or else in .venv. TORCH names the torch to install where
# there is none. Where torch has no CUDA only the tests need the CUDA library: other targets leave it out then, and
# ENTMAXKV_CUDA=1 asks for it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
RUN := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CXX_SOURCES := $(shell find csrc tests/emulation -type f)

.PHONY: demo test bench figures clean

demo: $(VENV)/entmaxkv-demo.installed
	$(RUN) examples/generate.py $(ARGS)

test: $(VENV)/entmaxkv-test.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(RUN) -m mypy
	$(RUN) -m pytest -m "not cuda"

bench: $(VENV)/entmaxkv-bench.installed
	$(RUN) bench/decode.py $(ARGS)

figures: $(VENV)/entmaxkv-bench.installed
	$(RUN) bench/report/plot.py $(ARGS)
	$(RUN) bench/report/pictures.py

$(VENV)/entmaxkv-%.installed: $(SOURCES) | $(RUN)
	$(RUN) -c "import torch" 2>/dev/null || $(RUN) -m pip install --quiet $(TORCH) numpy
	$(RUN) -m pip install --quiet "setuptools>=77" wheel ninja
	cuda=$$($(RUN) -c "import torch; print(int('$*' == 'test' or bool(torch.version.cuda)))") && \
	ENTMAXKV_CUDA=$${ENTMAXKV_CUDA:-$$cuda} $(RUN) -m pip install --no-build-isolation --editable ".[$*]"
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

.PHONY: docs
docs: $(VENV)/entmaxkv-docs.installed ## the pages of docs and the API reference, into build/docs/html; runs its examples
	$(RUN) -m sphinx -q -W --keep-going -d build/docs/doctrees -b html docs build/docs/html
	$(RUN) -m sphinx -q -W --keep-going -d build/docs/doctrees -b doctest docs build/docs/doctest

clean:
	rm -rf build entmaxkv/_C*.so entmaxkv/_cuda*.so $(VENV)/entmaxkv-*.installed

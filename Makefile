# Each target sets up what it needs in .venv from requirements.lock, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# nvcc would add minutes that no target needs: on a GPU `auto` runs the Triton kernels until a committed benchmark
# favours the CUDA ones. DMDR_CUDA=AUTO builds those too.
export DMDR_CUDA ?= OFF
# An editable install knows the package's files by name: one that is new or has moved asks for another install.
MODULES := $(shell find dmdr_fast kernels -name '*.py' -o -name '*.j2' | LC_ALL=C sort)
BUILD_INPUTS := pyproject.toml CMakeLists.txt $(shell find csrc -type f) $(VENV)/modules

.PHONY: quickstart scenes test test-all bench claims malformed torture gpu-wheels gpu-check lint docs install

# On CPUs one thread suits the digits model best (a teacher step: 35 ms, 42 with two).
quickstart: install  ## train a digits teacher, distil it, draw the report: runs/digits/report.html
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/deepspeed dmdr_fast/train.py --config configs/digits.yaml

# The last line draws the exported pipeline's images by diffusers alone, in a process of its own.
SCENES := runs/scenes
scenes: install  ## text to image on two cores: cache, cold start, RL, runs/scenes/report.html, export, the check of it
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/dmdr-train --config scenes --run_dir $(SCENES)
	rm -rf $(SCENES)/pipeline
	$(BIN)/dmdr-export $(SCENES) $(SCENES)/pipeline --dtype fp32
	$(BIN)/python -m dmdr_fast.check_export $(SCENES) $(SCENES)/pipeline --prompts scenes_eval

test: install
	$(BIN)/python -m pytest -n 3 --dist worksteal tests

test-all: install  ## what `make test` leaves out too: the rest of each product of cases, and tests of minutes
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "thorough or not thorough" tests

bench: install
	$(BIN)/python -m pytest benchmarks

TASK ?= digits
claims: install  ## put the paper's claims to the test: docs/claims.md, or with TASK=scenes docs/claims-scenes.md
	$(BIN)/python -m dmdr_fast.eval.claims --task "$(TASK)"

malformed: install  ## hundreds of malformed inputs: each is one line, or right
	$(BIN)/python -m tests.malformed

torture: install  ## 40 SIGKILLs at random moments, or those of ONLY=separate: a resumed run ends with the same bytes
	$(BIN)/python -m tests.torture --only "$(ONLY)"

# What an image with torch, Triton, CUDA, transformers and the usual scientific packages lacks; versions are the lock's.
GPU_WHEELS := gpu-wheels
GPU_PACKAGES := diffusers pydantic pydantic-core annotated-types typing-inspection hjson importlib-metadata \
  hypothesis sortedcontainers pytest pluggy iniconfig pytest-timeout pytest-xdist execnet
gpu-wheels: install  ## wheels for gpu-check on a machine without network: Python 3.12, x86-64
	rm -rf $(GPU_WHEELS)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
	  --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
	  --platform manylinux2014_x86_64 -c requirements.lock -d $(GPU_WHEELS) $(GPU_PACKAGES)
	@# DeepSpeed is published as source; without its ops compiled a wheel of it serves every Python.
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  -c requirements.lock -w $(GPU_WHEELS) deepspeed
	@size=$$(du -sm $(GPU_WHEELS) | cut -f1); echo "$(GPU_WHEELS): $$size MiB"; \
	  [ $$size -lt 64 ] || { echo "$(GPU_WHEELS): expected less than 64 MiB" >&2; exit 1; }

# On a GPU it runs in the Python of PyTorch and installs nothing there; DRY=1 needs no GPU and runs in .venv.
OUT ?= gpu-check
ifdef DRY
gpu-check: install  ## each stage in small, without a GPU
	$(BIN)/python -m benchmarks.gpu_check --dry "$(OUT)"
else
gpu-check:  ## tests, sanitizers and benchmarks of a GPU in at most 570 s, into OUT
	$(PYTHON) -m benchmarks.gpu_check "$(OUT)"
endif

lint: install  ## ruff: rules and format; mypy: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs  ## the site: build/site/index.html; a warning is an error
	$(BIN)/mkdocs build --quiet

install: $(VENV)/installed

# Touched when the list of modules differs from that of the last install.
$(VENV)/modules: FORCE
	@mkdir -p $(VENV)
	@echo '$(MODULES)' | cmp -s - $@ || echo '$(MODULES)' > $@

FORCE:

$(VENV)/locked: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "dmdr_fast needs Python 3.10 or newer; name one with: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	@# On all cores; pip compiles modules on one. A file that cannot be compiled is left as it is, as pip does.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

$(VENV)/installed: $(VENV)/locked $(BUILD_INPUTS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --no-build-isolation --no-deps --editable .
	@touch $@

# The site's tools are not in the lock: nothing else needs them.
$(VENV)/docs: $(VENV)/installed pyproject.toml
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --no-build-isolation --editable '.[docs]'
	@touch $@

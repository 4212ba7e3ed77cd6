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

.PHONY: quickstart test bench claims malformed lint install

# On CPUs one thread suits the digits model best (a teacher step: 35 ms, 42 with two).
quickstart: install  ## train a digits teacher, distil it, draw the report: runs/digits/report.html
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/deepspeed dmdr_fast/train.py --config configs/digits.yaml

test: install
	$(BIN)/python -m pytest -n 3 --dist worksteal tests

bench: install
	$(BIN)/python -m pytest benchmarks

claims: install  ## put the paper's claims to the test on digits: docs/claims.md (the page says how long it took)
	$(BIN)/python -m dmdr_fast.eval.claims

malformed: install  ## hundreds of malformed inputs: each is one line, or right
	$(BIN)/python -m tests.malformed

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

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

# `make demo` and `make test` do all the set-up on a fresh machine: they need Python 3.11 or newer and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-gpu triton-versions test-slurm lint clean

demo: $(INSTALLED)
	$(BIN)/hts run demo
	$(BIN)/hts report demo --results runs --out runs/report.html

test: lint
	$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

# What the tests above skip on a machine without a GPU.
test-gpu: $(INSTALLED)
	$(BIN)/python tests/gpu.py

# Needs root on a Debian: it installs Slurm's packages and runs a cluster of one node in a folder of its own.
test-slurm: $(INSTALLED)
	$(BIN)/pytest -m slurm tests/slurm

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compiles the kernels with every version of Triton that they should compile with; the others lie beside the environment.
TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0
triton-versions: $(INSTALLED)
	@for version in $(TRITONS); do \
		folder=$(VENV)/triton-$$version; \
		test -d $$folder || $(BIN)/python -m pip install --quiet --no-deps --target $$folder triton==$$version || exit 1; \
		echo "triton $$version"; \
		TRITON_CACHE_DIR=$$folder/cache PYTHONPATH=$$folder $(BIN)/pytest -q tests/stoicc/test_sass.py || exit 1; \
	done

# uv is an order of magnitude faster than pip and picks the torch build that fits the machine; neither is required.
$(INSTALLED): pyproject.toml
	@if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing --python "$(PYTHON)" $(VENV) && \
		uv pip install --quiet --python $(BIN)/python -e '.[eval,slurm,dev]'; \
	else \
		$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[eval,slurm,dev]'; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

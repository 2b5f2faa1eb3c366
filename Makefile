# make serve | test | check | docs | install        a bare machine needs Python 3.11 and make, nothing else
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
BIN := .venv/bin
# glibc otherwise gives every large tensor's memory back to the kernel at once, and takes and zeroes it again at the next
# step; on a CPU that can cost as much as the arithmetic.
export GLIBC_TUNABLES ?= glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296

.PHONY: install serve test check docs clean

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

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: install docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site; every warning is an error, and nothing is fetched from the network.
docs: install
	$(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache

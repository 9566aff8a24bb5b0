# make demo           train with and without class balancing on generated data, compare, show the files
# make test           the tests, on the maintained fork of MMSegmentation
# make test-fast      the tests without those that take seconds, for the loop while developing
# make test-openmmlab the tests, on upstream MMSegmentation; builds mmcv, about 10 minutes the first time
# make test-matrix    the tests on the oldest and the newest of Python, torch and both stacks; ends with a table
# make test-gpu       the tests of kernels, heads and subclasses on a CUDA device, without Triton's interpreter
# make bench-gpu      all that is measured on a CUDA device, at most 8 minutes a call; the next call goes on
# make docs           the documentation, docs/_build/html/index.html; warnings are errors
# make lint           ruff and mypy
#
# Each makes the environment that it needs by itself, once. PYTHON and TORCH choose another interpreter
# and another build of torch: make test PYTHON=python3.12 TORCH='torch==2.11.0'
# As many tests run at a time as there are cores, at most 8; WORKERS=0 runs them one by one in one process.
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= logical
PIP = -m pip install --quiet --disable-pip-version-check
PYTEST = -m pytest --numprocesses=$(WORKERS) --maxprocesses=8 --dist=worksteal

.PHONY: demo test test-fast test-openmmlab test-matrix test-gpu bench-gpu docs lint clean

demo: .venv/installed
	.venv/bin/python tools/demo.py

test: .venv/installed
	.venv/bin/python $(PYTEST)

test-fast: .venv/installed
	.venv/bin/python $(PYTEST) -m 'not slow'

test-openmmlab: .venv-openmmlab/installed
	.venv-openmmlab/bin/python $(PYTEST)

test-matrix:
	PYTEST_ADDOPTS="--numprocesses=$(WORKERS) --maxprocesses=8 --dist=worksteal $(PYTEST_ADDOPTS)" \
	    $(PYTHON) tests/matrix.py $(ROWS)

test-gpu: .venv/installed
	.venv/bin/python -c 'import torch; torch.zeros(1, device="cuda")'
	.venv/bin/python -m pytest tests/test_soft_stats.py tests/test_term_kernel.py \
	    tests/test_heads.py tests/test_subclass.py

bench-gpu: .venv/installed
	.venv/bin/python tools/bench_gpu.py

docs: .venv/installed
	.venv/bin/python -m sphinx -q -W --keep-going docs docs/_build/html

lint: .venv/installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# torch first: what depends on it would otherwise bring another build
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) $(TORCH)
	.venv/bin/python $(PIP) -e '.[onedl,experiments,test,dev,docs]'
	touch $@

# mmcv 2.1 has no wheel for recent versions of torch and needs what pip's build isolation hides from it
.venv-openmmlab/installed: pyproject.toml
	$(PYTHON) -m venv .venv-openmmlab
	.venv-openmmlab/bin/python $(PIP) $(TORCH) 'setuptools<81' wheel
	.venv-openmmlab/bin/python $(PIP) --no-build-isolation mmcv==2.1.0
	.venv-openmmlab/bin/python $(PIP) --no-build-isolation -e '.[openmmlab,test]'
	touch $@

clean:
	rm -rf .venv .venv-* demo bench-gpu docs/_build docs/api/generated

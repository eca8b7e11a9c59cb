# Python 3.11 or 3.12, gcc and make are all a machine needs; everything else goes into .venv.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,12))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
READY := $(VENV)/ready
# Three tests at a time, since some wait for timers, and by whole files: what the tests of a file share is made once.
WORKERS := 3
PYTEST = $(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
LANE ?= not slow
# No module of this folder shadows a package; output shows as it comes.
export PYTHONSAFEPATH := 1
export PYTHONUNBUFFERED := 1
# Processes, of which tests start many, find modules compiled.
unexport PYTHONDONTWRITEBYTECODE

# What the library is to others: its names, attention on one rank and over several, prices, orders and the loader.
OLDEST := tests/test_public.py tests/kernels/test_attention.py tests/parallel/cp/test_shared.py tests/parallel/cp/test_play.py \
  tests/data/read/test_batch_order.py tests/data/read/test_stateful_loader.py

.PHONY: demo test-quick test test-slow check site dist oldest format clean

demo: $(READY)  ## documents in, a model trained over a token ring, stopped, resumed, evaluated: see README.md
	$(VENV)/bin/python -m longring.launch.demo

# These hardly wait, and every worker imports all modules before its first test.
test-quick: WORKERS := 2
test-quick: $(READY)  ## what an edit needs, under 3 minutes: the tests of each module, one case of every large matrix
	$(PYTEST) -m "not slow and not full"

test: $(READY)  ## all tests but the slow ones, several processes on gloo, no GPU needed
	$(PYTEST) -m "$(LANE)"

test-slow: $(READY)  ## the slow ones: a run interrupted fifty times, the exhaustive sizes of the large matrices
	$(PYTEST) -m slow

check: $(READY)  ## lint, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

site: $(READY)  ## the documents as pages: open build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

dist: $(READY)  ## wheel and sdist in dist/, both tried in empty environments
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation --outdir dist . >/dev/null
	$(VENV)/bin/python .ci/smoke.py dist

oldest: dist  ## the wheel with the oldest versions that it allows, torch among them: a download of some 3 GB
	rm -rf build/oldest
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet --no-compile --no-cache-dir --constraint constraints-oldest.txt \
	  "$$(echo dist/*.whl)[prepare]" pytest pytest-xdist hypothesis webdataset
	build/oldest/bin/python -m pytest --numprocesses 3 --dist loadfile -m "not slow and not full" $(OLDEST)
	rm -rf build/oldest

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) runs build dist *.egg-info

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "LongRing needs Python 3.11 or 3.12 (python3.11 or python3.12 on the PATH)"; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON): torch, megatron-core, DeepSpeed and the rest of constraints.txt"
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev,docs]'
	@touch $@

# make demo   set up the environment, then run the documented commands
# make bench  time everything, beside torch-rechub (20 minutes on 2 cores; close other programs)
# make experiments   reproduce every table: hours; FLAGS=--quick takes minutes, FLAGS=--help tells what can be chosen
# make test   set up the environment, then lint, type-check and test (some 12 minutes on 2 cores)
# make torture  all trials of faults and bad input, with their counts

PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo experiments test test-slow torture bench lint clean

demo: .venv/run.stamp
	$(PY) SLmain.py --model_name=esmm
	$(PY) RLmain.py
	$(PY) SLmain.py --model_name=ple --polish=1

experiments: .venv/weighting.stamp
	$(PY) experiments.py $(FLAGS)

test: lint
	$(PY) -m pytest

test-slow: .venv/dev.stamp
	$(PY) -m pytest -m slow

torture: .venv/dev.stamp
	$(PY) -m pytest -m torture

bench: .venv/bench.stamp
	$(PY) -m bench
	$(PY) -m bench.scale

lint: .venv/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m mypy

# One environment; a stamp for each list of requirements that it holds.
.venv/run.stamp: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("make: Python 3.11 or later is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev.stamp: requirements-dev.txt requirements-weighting.txt .venv/run.stamp
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv/weighting.stamp: requirements-weighting.txt .venv/run.stamp
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-weighting.txt
	touch $@

.venv/bench.stamp: requirements-bench.txt .venv/run.stamp
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-bench.txt
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis

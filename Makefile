# make demo         set up the environment, then run the documented commands
# make test         set up the environment, then lint, check types and test, a process a core (3 minutes on 2 cores)
# make stress       the long tests: faults and corrupt files by the thousand, runs of full length (an hour)
# make cluster-test Spark makes the tables that DuckDB makes (installs pyspark, and with apt-get a JRE if java is missing)
# make experiments  reproduce every table: hours; FLAGS=--quick takes minutes, FLAGS=--help lists the options
# make bench        measure everything, beside torch-rechub (20 minutes on 2 cores; close other programs)
# make clean        remove the environment and the caches

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test stress cluster-test experiments bench lint clean

demo: .venv/run.stamp
	$(PY) SLmain.py --model_name=esmm
	$(PY) RLmain.py
	$(PY) SLmain.py --model_name=ple --polish=1

test: lint
	$(PY) -m pytest -n auto --dist worksteal

stress: .venv/test.stamp
	$(PY) -m pytest -n auto --dist worksteal -m stress

cluster-test: .venv/cluster.stamp
	command -v java >/dev/null || { apt-get update && apt-get install --yes default-jre-headless; }
	$(PY) -m pytest -m cluster

experiments: .venv/weighting.stamp
	$(PY) -m experiments $(FLAGS)

bench: .venv/bench.stamp
	$(PY) -m benchmarks
	$(PY) -m benchmarks.scaling

lint: .venv/test.stamp
	$(PY) -m ruff check .
	$(PY) -m mypy

# One environment; a stamp for each list of requirements that is installed in it.
.venv/run.stamp: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("make: Python 3.11 or later is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/test.stamp: requirements/test.txt requirements/weighting.txt requirements/tracking.txt requirements/tune.txt requirements/export.txt requirements/cluster.txt .venv/run.stamp
	$(PIP) -r requirements/test.txt
	touch $@

.venv/cluster.stamp: requirements/spark.txt .venv/test.stamp
	$(PIP) -r requirements/spark.txt
	touch $@

.venv/weighting.stamp: requirements/weighting.txt .venv/run.stamp
	$(PIP) -r requirements/weighting.txt
	touch $@

.venv/bench.stamp: requirements/bench.txt .venv/run.stamp
	$(PIP) --no-deps -r requirements/bench.txt
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis

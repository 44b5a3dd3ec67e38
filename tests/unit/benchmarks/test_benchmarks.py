"""The benchmark's measurements on a small scale, and that the README says what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ENVIRONMENT, REPOSITORY

from benchmarks.__main__ import plot, table
from benchmarks.scaling import lay_out
from benchmarks.throughput import rate
from dataset.rtrl import load_splits
from dataset.tables import SPLITS


@pytest.fixture(scope="module")
def bench_folder(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that already holds the (small) data."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "rmtl-bench").mkdir()
    os.symlink(rt_tables, folder / "rmtl-bench" / "rt")
    return folder


@pytest.mark.parametrize("work", ["matrix_rate", "train ours esmm", "evaluate_distinct ours mmoe",
                                  "evaluate_repeating ours esmm", "sessions", "memory"])
def test_every_measurement_prints_positive_figures(bench_folder: Path, work: str) -> None:
    done = subprocess.run([sys.executable, "-m", "bench.measure", *work.split()], cwd=REPOSITORY, capture_output=True,
                          text=True, check=False, env={**ENVIRONMENT, "RMTL_BENCH": str(bench_folder)})
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures
    assert all(value > 0 for value in figures.values())


def test_a_rate_leaves_the_first_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 100.0, 101.0, 101.0, 104.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert rate(lambda: None, 10, repeats=2) == 5.0


def test_the_readme_quotes_the_table_that_was_measured(tmp_path: Path) -> None:
    results = json.loads((REPOSITORY / "bench" / "results.json").read_text(encoding="utf-8"))["results"]
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for line in table(results).splitlines():
        assert line in readme
    plot(results, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_tables_laid_end_to_end_are_read_as_published_tables(rt_tables: Path, tmp_path: Path) -> None:
    rows = sum(len(pd.read_csv(rt_tables / f"{name}.csv")) for name in SPLITS)
    assert lay_out(rt_tables, tmp_path / "scaled", 2 * rows + 100) == 2 * rows + 100
    splits = load_splits(tmp_path / "scaled")
    assert len(splits.train) + len(splits.val) + len(splits.test) == 2 * rows + 100

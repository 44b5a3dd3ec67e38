"""The benchmarks on a small scale, and the published tables against results.json."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY

from benchmarks import memory, throughput
from benchmarks.__main__ import COMPARED, MODELS, main, ratios
from benchmarks.scaling import tile_tables
from dataset.rtrl import load_splits
from dataset.tables import SPLITS

DOCS = REPOSITORY / "docs" / "performance"


@pytest.fixture(scope="module")
def cache_folder(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that already contains the (small) data."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "rmtl-bench").mkdir()
    os.symlink(rt_tables, folder / "rmtl-bench" / "rt")
    return folder


@pytest.mark.parametrize("benchmark", ["peak_gemm", "train rmtl esmm", "evaluate_distinct rmtl mmoe",
                                       "evaluate_repeating rmtl esmm", "sessions", "replay_buffer"])
def test_benchmark_prints_positive_metrics(cache_folder: Path, benchmark: str, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RMTL_BENCH", str(cache_folder))
    monkeypatch.setattr(throughput, "throughput", lambda action, amount, *_: amount / throughput.time_call(action))
    monkeypatch.setattr("sys.argv", ["throughput", *benchmark.split()])
    throughput.main()
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert metrics
    assert all(value > 0 for value in metrics.values())


def test_throughput_excludes_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 100.0, 101.0, 101.0, 104.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert throughput.throughput(lambda: None, 10, repeats=2) == 5.0


def test_published_report_matches_published_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results.json").write_bytes((DOCS / "results.json").read_bytes())
    monkeypatch.setattr("sys.argv", ["benchmarks", "--report_only", f"--out={tmp_path}"])
    main()
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text == (DOCS / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    results = json.loads((DOCS / "results.json").read_text(encoding="utf-8"))["results"]
    for benchmark, title in COMPARED.items():
        for model, name in MODELS.items():
            ((_, rmtl, rechub, ratio, target),) = [row for row in cells if row[0] == f"{name} {title}"]
            assert int(rmtl.replace(",", "")) / int(rechub.replace(",", "")) == pytest.approx(
                float(ratio.split()[0]), rel=0.05)
            assert float(ratio.split()[0]) == pytest.approx(sorted(ratios(results, benchmark, model))[1], abs=0.051)
            assert float(ratio.split()[0]) >= float(target)


def test_tiled_tables_load_as_a_data_set(rt_tables: Path, tmp_path: Path) -> None:
    rows = sum(len(pd.read_csv(rt_tables / f"{name}.csv")) for name in SPLITS)
    assert tile_tables(rt_tables, tmp_path / "scaled", 2 * rows + 100) == 2 * rows + 100
    splits = load_splits(tmp_path / "scaled")
    assert len(splits.train) + len(splits.val) + len(splits.test) == 2 * rows + 100


def test_anonymous_memory_is_that_of_no_file() -> None:
    before = memory.anonymous_bytes(os.getpid())
    block = np.ones(2**23)  # 64 MiB
    assert 2**25 < memory.anonymous_bytes(os.getpid()) - before < 2**27
    assert len(block)
    assert memory.anonymous_bytes(2**30) == 0

"""Both engines make the same tables of the same raw logs, byte for byte (`make cluster-test`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import read_tree, user_error_message
from test_corrupt_files import kuairand_raw

from dataset.prepare import prepare


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", "--master local[2] --driver-memory 1g "
                       "--conf spark.sql.shuffle.partitions=3 --conf spark.driver.bindAddress=127.0.0.1 pyspark-shell")


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("source", "session_gap"), [("retailrocket", 0.0), ("kuairand", 20.0)])
def test_spark_makes_the_same_tables(raw_log: Path, tmp_path: Path, source: str, session_gap: float,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    raw = raw_log
    if source == "kuairand":
        kuairand_raw(raw := tmp_path / "raw")
    printed = []
    for engine in ("duckdb", "spark"):
        prepare(raw, tmp_path / engine, session_gap, source=source, engine=engine)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert read_tree(tmp_path / "duckdb") == read_tree(tmp_path / "spark")
    assert not [*tmp_path.glob("*.partial")]


def test_without_java_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    (tmp_path / "raw").mkdir()
    message = user_error_message(lambda: prepare(tmp_path / "raw", tmp_path / "out", engine="spark"))
    assert message.startswith("--engine=spark: ")
    assert "not installed" in message

"""The importer of KuaiRand's last impressions: a pair of small files by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import run_in_process

from dataset.kuairand import USER_FIELDS, VIDEO_FIELDS
from dataset.rtrl import load_splits

TAIL = """user_id,order,video_id,long_view,is_like,history_len,last_time_ms
2,1,12,0,0,2,150000
1,0,10,1,1,3,200000
1,2,10,1,0,3,200000
1,1,11,0,1,3,200000
2,0,12,0,0,2,150000
"""
DAYS = """user_id,video_id,time_ms,long_view,is_like
3,12,320000,0,0
1,12,300000,0,0
1,11,320000,1,0
2,10,310000,1,1
"""
SPLITS = {  # timestamp, sessionid, userid, itemid, like, long_view, long_view_time, like_time
    "train": ["80000,0,1,10,1,1,80000,80000", "140000,0,1,11,0,0,,", "200000,0,1,10,0,1,200000,",
              "90000,1,2,12,0,0,,", "150000,1,2,12,0,0,,"],
    "val": ["300000,2,1,12,0,0,,", "310000,3,2,10,1,1,310000,310000"],
    "test": ["320000,4,1,11,0,1,320000,", "320000,5,3,12,0,0,,"],
}


def write_raw(folder: Path, tail: str = TAIL) -> None:
    """The two files and, for users 1 and 2 and videos 10 and 11, their features."""
    folder.mkdir()
    (folder / "train_tail.csv").write_text(tail)
    (folder / "days_04-25_to_04-30.csv").write_text(DAYS)
    for name, key, ids, fields in (("user_features_pure", "user_id", [1, 2], USER_FIELDS),
                                   ("video_features_basic_pure", "video_id", [10, 11], VIDEO_FIELDS)):
        pd.DataFrame({key: ids, **{field: ["a", "b"] for field in fields}}).to_csv(folder / f"{name}.csv", index=False)


def import_tail(folder: Path) -> tuple[int, str]:
    """The exit code of the importer, and what it prints on stderr."""
    done = run_in_process(folder, "experiments/kuairand_tail.py", "--raw=raw", "--features=raw", "--out=krtail")
    return done.returncode, done.stderr


@pytest.fixture
def krtail(tmp_path: Path) -> Path:
    write_raw(tmp_path / "raw")
    assert import_tail(tmp_path)[0] == 0
    return tmp_path / "krtail"


@pytest.mark.parametrize("split", SPLITS)
def test_rows_by_hand(krtail: Path, split: str) -> None:
    header, *rows = (krtail / f"{split}.csv").read_text().splitlines()
    assert header == "timestamp,sessionid,userid,itemid,like,long_view,long_view_time,like_time"
    assert rows == SPLITS[split]


def test_counts_and_features_by_hand(krtail: Path) -> None:
    manifest = json.loads((krtail / "manifest.json").read_text())
    counts = dict(manifest["row_counts"])
    assert counts["rows before validation, at most 50 a user"] == 5
    assert counts["likes without a long view, not counted"] == 1
    assert counts["videos of rows that are missing from the table"] == 1
    assert manifest["boundary"] == 300_000
    assert manifest["categorical"] == [*USER_FIELDS, "video_id", *VIDEO_FIELDS]
    assert (krtail / "item_feadf.csv").read_text().splitlines()[1:] == ["10,10" + 6 * ",a", "11,11" + 6 * ",b",
                                                                        "12,12" + 6 * ","]


def test_outcomes_count_from_the_next_row(krtail: Path) -> None:
    """Of user 1, over the splits: two long views, of which the first was liked."""
    splits = load_splits(krtail)
    parts = [split.numerical[split.keys["userid"] == 1] for split in (splits.train, splits.val, splits.test)]
    features = dict(zip(splits.train.numerical_names, np.concatenate(parts).T, strict=True))
    position = np.arange(5)
    np.testing.assert_allclose(features["position"], np.log1p(position), rtol=1e-6)
    np.testing.assert_allclose(features["long_view_rate"], np.array([0, 1, 1, 2, 2]) / (position + 1), rtol=1e-6)
    np.testing.assert_allclose(features["like_rate"], np.array([0, 1, 1, 1, 1]) / (position + 1), rtol=1e-6)
    assert features["last_long_view"].tolist() == [0, 1, 0, 1, 0]
    assert features["last_like"].tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(("cell", "column", "problem"), [
    ("2,1,12,2,0,2,150000", "long_view", "'2' is not a label: 0 or 1"),
    ("2,1,12,0,0,2,soon", "last_time_ms", "'soon' is not a number"),
    ("2,2,12,0,0,2,150000", "order", "2 is not below history_len, 2"),
])
def test_an_invalid_cell_is_named(tmp_path: Path, cell: str, column: str, problem: str) -> None:
    write_raw(tmp_path / "raw", TAIL.replace("2,1,12,0,0,2,150000", cell))
    code, stderr = import_tail(tmp_path)
    assert (code, stderr) == (2, f"error: raw/train_tail.csv, line 2, column '{column}': {problem}\n")
    assert not (tmp_path / "krtail").exists()


def test_a_missing_feature_table_is_named(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw")
    (tmp_path / "raw" / "user_features_pure.csv").unlink()
    assert import_tail(tmp_path) == (2, "error: raw/user_features_*.csv: no such file: --features takes the folder of "
                                        "KuaiRand's feature tables\n")

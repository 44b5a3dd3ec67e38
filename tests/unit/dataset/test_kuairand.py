"""KuaiRand's raw layout to MDP tables, and history features of users."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, run_in_process, user_error_message

from common.fileio import sha256
from dataset.features import session_feature_names
from dataset.kuairand import RATES, USER_FIELDS, VIDEO_FIELDS
from dataset.prepare import prepare
from dataset.rtrl import load_splits
from dataset.tables import SPLITS
from dataset.vocabulary import encode_splits

SAMPLE = REPOSITORY.parent / "shared" / "data" / "kuairand-pure-sample"
ROWS, USERS, VIDEOS = 3000, 60, 40
LABELS = ("click", "long_view")


def raw_log(folder: Path, seed: int = 1) -> pd.DataFrame:
    """A small raw log in KuaiRand's layout, with duplicate rows, and users and videos that no table lists."""
    rng = np.random.default_rng(seed)
    time = np.sort(rng.integers(1_650_000_000_000, 1_650_500_000_000, ROWS))
    log = pd.DataFrame({
        "user_id": rng.integers(0, USERS, ROWS), "video_id": rng.integers(0, VIDEOS, ROWS), "date": 20220425,
        "hourmin": 0, "time_ms": time, "is_click": rng.random(ROWS) < 0.4, "is_like": np.arange(ROWS) % 7 == 0,
        "long_view": rng.random(ROWS) < 0.3,
        "play_time_ms": rng.integers(0, 60_000, ROWS), "duration_ms": 9000, "tab": rng.integers(0, 5, ROWS)})
    log = log.astype({"is_click": int, "is_like": int, "long_view": int})
    folder.mkdir(parents=True)
    raw = pd.concat([log, log.sample(60, random_state=seed).assign(play_time_ms=0)])
    raw.iloc[:2000].to_csv(folder / "log_standard_4_08_to_4_21_1k.csv", index=False)
    raw.iloc[2000:].to_csv(folder / "log_standard_4_22_to_5_08_1k_part1.csv", index=False)
    raw.head(50).assign(user_id=99).to_csv(folder / "log_random_4_22_to_5_08_1k.csv", index=False)
    (folder / "video_features_statistic_1k.csv").write_text("video_id,show_cnt\n0,7\n")
    users = pd.DataFrame({"user_id": range(USERS - 5), "follow_user_num": 3,
                          **{name: rng.integers(-124, 3, USERS - 5) for name in USER_FIELDS}}).astype(object)
    users.loc[3, "onehot_feat4"] = np.nan
    users.to_csv(folder / "user_features_1k.csv", index=False)
    videos = pd.DataFrame({"video_id": range(VIDEOS - 5),
                           **{name: rng.integers(0, 9, VIDEOS - 5) for name in VIDEO_FIELDS},
                           "video_duration": rng.integers(500, 100_000, VIDEOS - 5).astype(float)}).astype(object)
    videos.loc[2, "tag"] = "20,43"
    videos.loc[4, "video_duration"] = np.nan
    videos.loc[6, "video_duration"] = 16_400.0
    videos.to_csv(folder / "video_features_basic_1k.csv", index=False)
    return log


@pytest.fixture(scope="module")
def kr(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Path]:
    folder = tmp_path_factory.mktemp("kuairand")
    log = raw_log(folder / "raw")
    prepare(folder / "raw", folder / "dataset" / "kr", source="kuairand")
    return log, folder / "dataset" / "kr"


def test_rows_have_their_labels_and_times(kr: tuple[pd.DataFrame, Path]) -> None:
    log, folder = kr
    rows = pd.concat(pd.read_csv(folder / f"{name}.csv") for name in SPLITS)
    keys = ["timestamp", "userid", "itemid"]
    expected = log.rename(columns={"time_ms": "timestamp", "user_id": "userid", "video_id": "itemid"})
    both = rows.merge(expected, on=keys, validate="one_to_one", suffixes=("", "_raw"))
    assert len(both) == len(rows) == len(log)
    np.testing.assert_array_equal(both["click"], both["is_click"])
    np.testing.assert_array_equal(both["long_view"], both["is_click"] & both["long_view_raw"])
    np.testing.assert_array_equal(both["tab"], both["tab_raw"])
    np.testing.assert_array_equal(both["click_time"].fillna(0), both["timestamp"] * both["click"])
    np.testing.assert_array_equal(both["long_view_time"].fillna(0),
                                  (both["timestamp"] + both["play_time_ms"]) * both["long_view"])


def test_other_tasks_than_the_two(tmp_path: Path) -> None:
    """Likes are what the log says, with or without a click, and known at the end of the play time."""
    log = raw_log(tmp_path / "raw")
    prepare(tmp_path / "raw", tmp_path / "kr", source="kuairand", tasks=["like", "click", "long_view"])
    splits = load_splits(tmp_path / "kr")
    assert splits.task_names == ["like", "CTR", "CTCVR"]
    assert splits.given == [-1, -1, 1]
    assert splits.train.numerical_names[:3] == ["position", "like_rate", "click_rate"]
    rows = pd.concat(pd.read_csv(tmp_path / "kr" / f"{name}.csv") for name in SPLITS)
    assert rows["like"].sum() == log["is_like"].sum()
    liked = rows[rows["like"] == 1].merge(log, left_on=["timestamp", "userid", "itemid"],
                                          right_on=["time_ms", "user_id", "video_id"])
    np.testing.assert_array_equal(liked["like_time"], liked["timestamp"] + liked["play_time_ms"])


@pytest.mark.parametrize(("tasks", "source", "words"), [
    (["click", "likes"], "kuairand", "unknown 'likes': one of click, long_view, like"),
    (["like", "like"], "kuairand", "named twice"), (["click"], "retailrocket", "only kuairand")])
def test_wrong_tasks_are_refused(tmp_path: Path, tasks: list[str], source: str, words: str) -> None:
    message = user_error_message(lambda: prepare(tmp_path, tmp_path / "out", source=source, tasks=tasks))
    assert message.startswith("--tasks: ")
    assert words in message


def test_splits_are_cut_by_time_and_share_no_session(kr: tuple[pd.DataFrame, Path]) -> None:
    splits = [pd.read_csv(kr[1] / f"{name}.csv") for name in SPLITS]
    for before, after in pairwise(splits):
        assert before["timestamp"].max() < after["timestamp"].min()
        assert not set(before["sessionid"]) & set(after["sessionid"])
    assert [round(len(split) / ROWS, 2) for split in splits] == [0.6, 0.2, 0.2]
    for split in splits:
        assert (split.groupby("sessionid")["userid"].nunique() == 1).all()
        assert split["sessionid"].nunique() == split["userid"].nunique()


def by_row(folder: Path) -> pd.DataFrame:
    """All rows in order of time, with their numerical features."""
    splits = load_splits(folder)
    parts = []
    for name, split in zip(SPLITS, (splits.train, splits.val, splits.test), strict=True):
        table = pd.read_csv(folder / f"{name}.csv")
        index = pd.MultiIndex.from_arrays([split.session, split.timestamp])
        order = index.get_indexer(pd.MultiIndex.from_frame(table[["sessionid", "timestamp"]]))
        parts.append(table.assign(**dict(zip(split.numerical_names, split.numerical[order].T, strict=True))))
    return pd.concat(parts, ignore_index=True).sort_values("timestamp", kind="stable", ignore_index=True)


def test_features_cover_the_user_s_known_history(kr: tuple[pd.DataFrame, Path]) -> None:
    """Across sessions and splits, by the definition; a long view is known at the end of its play time."""
    rows = by_row(kr[1])
    chosen = np.random.default_rng(3).permutation(np.flatnonzero(rows["timestamp"] > rows["timestamp"].quantile(0.55)))
    num_crossing = 0
    for number in chosen[:300]:
        row = rows.iloc[number]
        past = rows.iloc[:number].query("userid == @row.userid")
        num_crossing += bool((past["sessionid"] != row["sessionid"]).any())
        known = [(past[f"{label}_time"] < row["timestamp"]).to_numpy() for label in ("click", "long_view")]
        last = past["timestamp"].iloc[-1] if len(past) else row["timestamp"]
        expected = [np.log1p(len(past)), *(outcomes.sum() / (len(past) + 1) for outcomes in known),
                    *(float(outcomes[-1]) if len(outcomes) else 0.0 for outcomes in known),
                    np.log1p((row["timestamp"] - last) / 1000) / 10]
        assert row[session_feature_names(LABELS)].tolist() == pytest.approx(expected, abs=1e-5)
    assert num_crossing > 100


@pytest.mark.parametrize("change", [{"click": 0, "click_time": np.nan, "long_view": 0, "long_view_time": np.nan},
                                    {"itemid": 1}], ids=["its own labels", "its item"])
def test_features_do_not_look_ahead(kr: tuple[pd.DataFrame, Path], tmp_path: Path, change: dict[str, Any]) -> None:
    """Changes from one moment on leave the features of the rows up to it unchanged."""
    shutil.copytree(kr[1], tmp_path / "kr")
    before = by_row(tmp_path / "kr")
    val = pd.read_csv(tmp_path / "kr" / "val.csv").sort_values("timestamp")
    moment = val["timestamp"].iloc[len(val) // 2]
    for name in ("val", "test"):
        table = pd.read_csv(tmp_path / "kr" / f"{name}.csv")
        table.loc[table["timestamp"] >= moment, list(change)] = list(change.values())
        for label in ("click_time", "long_view_time"):
            table[label] = table[label].astype("Int64")
        table.to_csv(tmp_path / "kr" / f"{name}.csv", index=False)
    manifest = json.loads((tmp_path / "kr" / "manifest.json").read_text())
    manifest["outputs"] = {name: sha256(tmp_path / "kr" / name) for name in manifest["outputs"]}
    (tmp_path / "kr" / "manifest.json").write_text(json.dumps(manifest))
    after = by_row(tmp_path / "kr")
    same = (before["timestamp"] <= moment).to_numpy()
    names = session_feature_names(LABELS)
    np.testing.assert_array_equal(before.loc[same, names], after.loc[same, names])
    if "itemid" in change:  # the rates are of the row's own item
        same = (before["timestamp"] < moment).to_numpy()
    rates = [f"{field} {what}" for field in RATES for what in ("count", "click rate", "long_view rate")]
    np.testing.assert_array_equal(before.loc[same, rates], after.loc[same, rates])
    if "click" in change:
        assert (before.loc[~same, "click_rate"] > after.loc[~same, "click_rate"]).any()


def test_a_history_key_must_be_an_id(kr: tuple[pd.DataFrame, Path], tmp_path: Path) -> None:
    shutil.copytree(kr[1], tmp_path / "kr")
    manifest = json.loads((tmp_path / "kr" / "manifest.json").read_text())
    for history, reason in (("tab", "name 'tab' is not unique"), (7, "'history' is the name of an id of the rows")):
        (tmp_path / "kr" / "manifest.json").write_text(json.dumps({**manifest, "history": history}))
        assert reason in user_error_message(lambda: load_splits(tmp_path / "kr"))


def test_users_and_videos_have_their_fields(kr: tuple[pd.DataFrame, Path]) -> None:
    manifest = json.loads((kr[1] / "manifest.json").read_text())
    splits = load_splits(kr[1])
    assert list(splits.train.fields) == manifest["categorical"]
    assert {"tab", "video_id", "video_duration", *USER_FIELDS, *VIDEO_FIELDS} == set(splits.train.fields)
    table = pd.read_csv(kr[1] / "train.csv").sort_values(["timestamp"], kind="stable")
    order = np.argsort(splits.train.timestamp, kind="stable")
    videos = pd.read_csv(kr[1] / "item_feadf.csv", dtype=str).fillna("").set_index("itemid")
    for name in ("tag", "video_duration", "video_id"):
        field = splits.train.fields[name]
        values = np.where(field.codes < 0, "", field.values[field.codes])[order]
        assert values.tolist() == videos.loc[table["itemid"].astype(str), name].tolist()
    assert videos.loc["2", "tag"] == "20,43"
    assert videos.loc[["4", "6"], "video_duration"].tolist() == ["", "16"]
    assert (videos.loc["37"].drop("video_id") == "").all(), "a video that is missing from the table"
    mapper = encode_splits(splits, 0.5)
    assert len(mapper.field_dims) == splits.train.categorical.shape[1] == len(manifest["categorical"])


def test_leaking_files_are_not_read(kr: tuple[pd.DataFrame, Path]) -> None:
    manifest = json.loads((kr[1] / "manifest.json").read_text())
    assert not [name for name in manifest["inputs"] if "random" in name or "statistic" in name]
    assert len(manifest["inputs"]) == 4
    row_counts = dict(map(tuple, manifest["row_counts"]))
    assert row_counts["rows read"] == ROWS + 60
    assert row_counts["dropped: duplicate user, video and time"] == 60
    assert row_counts["kept: rows"] == ROWS


def test_session_gap_and_minimum_session_length(tmp_path: Path) -> None:
    raw_log(tmp_path / "raw")
    prepare(tmp_path / "raw", tmp_path / "kr", session_gap=5, min_session=2, source="kuairand")
    for name in SPLITS:
        split = pd.read_csv(tmp_path / "kr" / f"{name}.csv").sort_values(["sessionid", "timestamp"])
        gaps = split.groupby("sessionid")["timestamp"].diff().dropna()
        assert gaps.max() <= 5 * 60_000
        assert split.groupby("sessionid").size().min() == 2
    train = load_splits(tmp_path / "kr").train
    assert train.user.tolist() == train.keys["userid"].tolist()
    assert len(set(train.user)) < len(set(train.session)), "a user has several sessions"


@pytest.mark.parametrize(("name", "shown"), [("log_standard", "log_standard_*.csv"), ("user_features", "user_features"),
                                            ("video_features_basic", "video_features_basic")])
def test_a_missing_file_is_named(tmp_path: Path, name: str, shown: str) -> None:
    raw_log(tmp_path / "raw")
    for path in (tmp_path / "raw").glob(f"{name}*"):
        path.unlink()
    assert shown in user_error_message(lambda: prepare(tmp_path / "raw", tmp_path / "kr", source="kuairand"))
    assert not (tmp_path / "kr").exists()


def test_an_invalid_cell_is_named(tmp_path: Path) -> None:
    raw_log(tmp_path / "raw")
    path = tmp_path / "raw" / "log_standard_4_08_to_4_21_1k.csv"
    table = pd.read_csv(path, dtype=str)
    table.loc[7, "is_click"] = "2"
    table.to_csv(path, index=False)
    text = user_error_message(lambda: prepare(tmp_path / "raw", tmp_path / "kr", source="kuairand"))
    assert str(path) in text
    assert "is_click" in text
    assert re.search(r"(line|row) (8|9)", text)


def test_values_are_normalized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw_log(tmp_path / "raw")
    path = tmp_path / "raw" / "user_features_1k.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table["onehot_feat7"] = ["1.0", "1", " 1", "1.5", "-124.0", "", "1.0.0"] + ["2"] * (len(table) - 7)
    table.to_csv(path, index=False)
    prepare(tmp_path / "raw", tmp_path / "kr", source="kuairand")
    users = pd.read_csv(tmp_path / "kr" / "user_feadf.csv", dtype=str, keep_default_na=False)
    assert list(users["onehot_feat7"][:8]) == ["1", "1", "1", "1.5", "-124", "", "1.0.0", "2"]
    row_counts = json.loads((tmp_path / "kr" / "manifest.json").read_text())["row_counts"]
    assert ["normalized values: whitespace stripped, 12 for 12.0", 3] in row_counts
    capsys.readouterr()
    load_splits(tmp_path / "kr")
    assert "repaired" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("duration", ["inf", "-5", "1e300", "long"])
def test_an_invalid_duration_is_empty_and_counted(tmp_path: Path, duration: str) -> None:
    raw_log(tmp_path / "raw")
    path = tmp_path / "raw" / "video_features_basic_1k.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[9, "video_duration"] = duration
    table.to_csv(path, index=False)
    prepare(tmp_path / "raw", tmp_path / "kr", source="kuairand")
    items = pd.read_csv(tmp_path / "kr" / "item_feadf.csv", dtype=str, keep_default_na=False).set_index("itemid")
    assert items.loc[table.loc[9, "video_id"], "video_duration"] == ""
    row_counts = dict(json.loads((tmp_path / "kr" / "manifest.json").read_text())["row_counts"])
    assert row_counts["invalid video_duration (not a number, negative or over a year): empty"] == 1


@pytest.mark.parametrize("tasks", [["click"], ["like"], ["click", "like"], ["long_view", "like"]])
def test_any_tasks_of_kuairand(tasks: list[str], tmp_path: Path) -> None:
    """Without the labels of the default tasks that are not named."""
    raw_log(tmp_path / "raw")
    prepare(tmp_path / "raw", tmp_path / "kr", source="kuairand", tasks=tasks)
    columns = pd.read_csv(tmp_path / "kr" / "train.csv").columns
    assert {"click", "long_view", "like"} & {*columns} == {*tasks}
    assert load_splits(tmp_path / "kr").train.labels.shape[1] == len(tasks)


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    assert "retailrocket, kuairand" in user_error_message(lambda: prepare(tmp_path, tmp_path / "x", source="movielens"))


def test_all_programs_run_on_kuairand(kr: tuple[pd.DataFrame, Path], tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "kr").symlink_to(kr[1])
    small = ("--dataset_name=kr", "--embed_dim=4", "--epoch=1", "--bottom_mlp_dims=16", "--tower_mlp_dims=8")
    for program, *flags in (("SLmain.py", "--model_name=esmm"),
                            ("RLmain.py", "--epoch_updates=5", "--init_episode=5", "--memory_path=pretrain/kr.npz"),
                            ("SLmain.py", "--model_name=esmm", "--polish=1")):
        result = run_in_process(tmp_path, program, *small, *flags)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "chkpt" / "SL" / "kr_esmm" / "kr_esmm_1.0.pt").exists()


def test_rates_of_user_and_tab_by_hand(kr: tuple[pd.DataFrame, Path]) -> None:
    """How often a user was shown something in the row's tab before, and the log-odds of the smoothed click rate."""
    rows = by_row(kr[1])
    for _, row in rows.sample(20, random_state=0).iterrows():
        earlier = rows[rows["timestamp"] < row["timestamp"]]
        same = earlier[(earlier["userid"] == row["userid"]) & (earlier["tab"] == row["tab"])]
        assert row["userid&tab count"] == pytest.approx(np.log1p(len(same)), rel=1e-6)
        known = [int((part["click_time"] < row["timestamp"]).sum()) for part in (same, earlier)]
        rate = (known[0] + 20 * (known[1] + 0.5) / (len(earlier) + 1)) / (len(same) + 20)
        assert row["userid&tab click rate"] == pytest.approx(np.log(rate / (1 - rate)), rel=1e-5, abs=1e-6)


@pytest.mark.skipif(not SAMPLE.exists(), reason="the real sample is absent")
def test_the_real_sample(tmp_path: Path) -> None:
    prepare(SAMPLE, tmp_path / "kr", source="kuairand")
    splits = load_splits(tmp_path / "kr")
    rows = [len(split) for split in (splits.train, splits.val, splits.test)]
    assert 90_000 < sum(rows) < 94_784
    np.testing.assert_allclose(np.array(rows) / sum(rows), [0.6, 0.2, 0.2], atol=0.001)
    assert (splits.train.labels[:, 1] <= splits.train.labels[:, 0]).all()

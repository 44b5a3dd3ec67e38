"""MDP tables to arrays: both layouts, repairs, corrupt folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import user_error_message
from test_features import ITEMS, LABELS, SESSION

from common import fileio
from common.fileio import sha256
from dataset.features import NumericalMode
from dataset.manifest import find_folder
from dataset.retailrocket import PROPERTIES
from dataset.rtrl import RetailRocketRLDataset, Splits, load_splits, read_log
from dataset.tables import SPLITS


@pytest.fixture(scope="module")
def splits(rt_tables: Path) -> Splits:
    return load_splits(rt_tables)


def by_name(splits: Splits) -> dict[str, RetailRocketRLDataset]:
    return {"train": splits.train, "val": splits.val, "test": splits.test}


def test_numerical_none_is_one_column_of_zeros(rt_tables: Path) -> None:
    for split in by_name(load_splits(rt_tables, "none")).values():
        assert split.numerical_num == 1
        assert split.numerical.dtype == np.float32
        assert not split.numerical.any()


# -------------------------------------------------------------------------------------------------------- the data set


def test_arrays_are_the_rows_of_the_tables(splits: Splits, rt_tables: Path) -> None:
    for name, split in by_name(splits).items():
        table = pd.read_csv(rt_tables / f"{name}.csv")
        assert len(split) == len(table)
        assert split.labels.dtype == np.float32
        np.testing.assert_array_equal(split.labels, table[["click", "pay"]])
        np.testing.assert_array_equal(split.session, table["sessionid"])
        np.testing.assert_array_equal(split.timestamp, table["timestamp"])


def test_fields_are_the_properties_of_the_items(splits: Splits, rt_tables: Path) -> None:
    items = pd.read_csv(rt_tables / "item_feadf.csv", dtype=str, keep_default_na=False).set_index("itemid")
    for name, split in by_name(splits).items():
        items_of_rows = pd.read_csv(rt_tables / f"{name}.csv", dtype=str)["itemid"]
        assert list(split.fields) == list(PROPERTIES)
        for field, column in split.fields.items():
            texts = ["" if code < 0 else column.values[code] for code in column.codes]
            assert texts == items.loc[items_of_rows, field].tolist()


def test_ground_truth_is_sorted_with_the_rows() -> None:
    table = SESSION.sample(frac=1, random_state=5).reset_index(drop=True)
    truth = pd.DataFrame({"p_click": table["itemid"] / 10, "p_pay": table["itemid"] / 100})
    split = RetailRocketRLDataset(table, ITEMS, ["785"], LABELS, ground_truth=truth)
    assert split.session.tolist() == [1] * 5 + [2] * 2
    assert split.oracle_probabilities is not None
    assert split.oracle_probabilities[:, 0].tolist() == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def test_ground_truth_equals_truth_csv(splits: Splits, rt_tables: Path) -> None:
    """Row for row, the probabilities are those of the same time, session and item in truth.csv."""
    keys = ["timestamp", "sessionid", "itemid"]
    truth = pd.read_csv(rt_tables / "truth.csv").rename(columns={"visitorid": "sessionid"}).set_index(keys)
    for name, split in by_name(splits).items():
        rows = pd.MultiIndex.from_frame(pd.read_csv(rt_tables / f"{name}.csv")[keys])
        assert split.oracle_probabilities is not None
        np.testing.assert_array_equal(split.oracle_probabilities, truth.loc[rows, ["p_click", "p_pay"]])


def test_session_is_user_without_history_key(splits: Splits) -> None:
    assert splits.manifest["history"] == ""
    assert splits.test.user is splits.test.session


def test_ids_require_a_mapping(rt_tables: Path) -> None:
    train = load_splits(rt_tables).train
    assert "Catemapper(0.2).fit(train).map(dataset)" in user_error_message(lambda: train.categorical)


def test_values_are_normalized() -> None:
    """Whitespace around a value, or the .0 that spreadsheets add, makes no new value."""
    items = pd.DataFrame({"itemid": [1, 2, 3, 4, 5], "785": ["12", "12.0", " 12 ", "", "n12.0"]})
    table = SESSION[:5].assign(itemid=[1, 2, 3, 4, 5])
    field = RetailRocketRLDataset(table, items, ["785"], LABELS).fields["785"]
    assert ["" if code < 0 else field.values[code] for code in field.codes] == ["12", "12", "12", "", "n12.0"]


def test_an_unknown_item_has_no_values() -> None:
    field = RetailRocketRLDataset(SESSION.assign(itemid=77), ITEMS, ["785"], LABELS).fields["785"]
    assert field.codes.tolist() == [-1] * len(SESSION)


# ------------------------------------------------------------------------------------------------ the published layout


@pytest.fixture
def published(tables: Path) -> Path:
    """The folder as the paper's authors published it: other columns, no manifest."""
    for split in SPLITS:
        table = pd.read_csv(tables / f"{split}.csv").rename(columns={"sessionid": "visitorid"})
        table["state"], table["next_state"] = "[1, 2, 3]", "[2, 3, 4]"
        columns = ["timestamp", "visitorid", "itemid", "click", "pay", "state", "next_state"]
        table[columns].to_csv(tables / f"{split}.csv", index=False)
    (tables / "manifest.json").unlink()
    (tables / "truth.csv").unlink()
    return tables


def test_the_published_layout_has_the_same_rows(published: Path, splits: Splits) -> None:
    read = load_splits(published)
    assert read.task_names == ["CTR", "CTCVR"]
    assert read.long_tailed == ["364", "776"]
    for published_split, split in zip(by_name(read).values(), by_name(splits).values(), strict=True):
        np.testing.assert_array_equal(published_split.labels, split.labels)
        np.testing.assert_array_equal(published_split.session, split.session)
        assert published_split.oracle_probabilities is None
        for name in PROPERTIES:
            np.testing.assert_array_equal(published_split.fields[name].codes, split.fields[name].codes)


def test_fingerprint_of_the_published_layout(published: Path, splits: Splits) -> None:
    fingerprint = load_splits(published).fingerprint
    assert fingerprint == load_splits(published).fingerprint != splits.fingerprint
    with open(published / "test.csv", "a") as file:
        file.write("1439399530012,4023,529,0,0,[],[]\n")
    assert load_splits(published).fingerprint != fingerprint


@pytest.mark.parametrize(("line", "where"), [
    ("1439399530012,4023,529,2,0,[],[]", "column 'click'"),
    ("1439399530012,4023,529,0,nan,[],[]", "column 'pay'"),
    ("1439399530012,somebody,529,0,0,[],[]", "column 'visitorid'"),
    ("1439399530012,4023,mug,0,0,[],[]", "column 'itemid'"),
    ("1439399530012,4023", "column 'itemid'"),
])
def test_an_invalid_cell_is_named(published: Path, line: str, where: str) -> None:
    number = len((published / "val.csv").read_text().splitlines()) + 1
    with open(published / "val.csv", "a") as file:
        file.write(line + "\n")
    message = user_error_message(lambda: load_splits(published))
    assert message.startswith(f"{published / 'val.csv'}, line {number}, {where}: ")


def test_a_missing_session_column_is_named(published: Path) -> None:
    text = (published / "train.csv").read_text().replace("visitorid", "who", 1)
    (published / "train.csv").write_text(text)
    message = user_error_message(lambda: load_splits(published))
    assert message.startswith(f"{published / 'train.csv'}, line 1: column 'sessionid' is missing")


def test_a_duplicate_item_is_named(published: Path) -> None:
    path = published / "item_feadf.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[3]]) + "\n")
    message = user_error_message(lambda: load_splits(published))
    assert message.startswith(f"{path}, line {len(lines) + 1}, column 'itemid': duplicate item ")


# ----------------------------------------------------------------------------------------------------- corrupt folders


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert user_error_message(lambda: load_splits(tmp_path / "rt")).startswith(f"{tmp_path / 'rt'}: ")


def test_missing_tables_are_named(tables: Path) -> None:
    (tables / "val.csv").unlink()
    (tables / "item_feadf.csv").unlink()
    assert user_error_message(lambda: load_splits(tables)).startswith(f"{tables}: val.csv, item_feadf.csv missing")


@pytest.mark.parametrize("name", ["train.csv", "item_feadf.csv"])
def test_a_directory_as_table_is_refused(published: Path, name: str) -> None:
    (published / name).unlink()
    (published / name).mkdir()
    assert user_error_message(lambda: load_splits(published)) == f"{published / name}: not a file"


def test_repairs_are_counted_and_printed(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tables / "manifest.json").unlink()
    (tables / "train.csv").write_text(
        "timestamp,sessionid,itemid,click,pay,click_time,pay_time\n"
        "2000,1,1,1,0,1500,\n1000,1,2,1,1,,9000\n3000,2,3,0,0,3500,\n4000,2,4,0,0,,\n")
    (tables / "item_feadf.csv").write_text("itemid," + ",".join(PROPERTIES) + "\n1,7.0, a,x,,,,\n2,7,a,x,,,,\n")
    train = load_splits(tables).train
    assert train.timestamp.tolist() == [1000, 2000, 3000, 4000]
    assert [line for line in capsys.readouterr().out.splitlines() if "val.csv" not in line] == [
        f"{tables / 'train.csv'}: repaired: 2 rows sorted by session and time",
        f"{tables / 'train.csv'}: repaired: 1 times in column 'click_time' before their row: replaced by the row's "
        "time",
        f"{tables / 'train.csv'}: repaired: 1 times in column 'click_time' missing: replaced by the row's time",
        f"{tables / 'train.csv'}: repaired: 1 times in column 'click_time' ignored because 'click' is 0",
        f"{tables / 'item_feadf.csv'}: repaired: 2 values in columns 785, 591 stripped of whitespace or a final .0"]


def set_outputs(folder: Path) -> None:
    """Make the checksums of the manifest those of the files."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["outputs"] = {name: sha256(folder / name) for name in manifest["outputs"]}
    path.write_text(json.dumps(manifest))


def test_a_session_in_two_splits_is_refused(tables: Path) -> None:
    """Even if the checksums match."""
    row = (tables / "train.csv").read_text().splitlines()[1]
    with open(tables / "test.csv", "a") as file:
        file.write(row + "\n")
    set_outputs(tables)
    message = user_error_message(lambda: load_splits(tables))
    assert f"session {row.split(',')[1]} is in train.csv too" in message


def test_ground_truth_must_match_the_tables(tables: Path) -> None:
    path = tables / "truth.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    set_outputs(tables)
    assert user_error_message(lambda: load_splits(tables)).startswith(f"{path}: ")


@pytest.mark.parametrize("numerical", ["session", "none"])
def test_loading_is_deterministic(rt_tables: Path, splits: Splits, numerical: NumericalMode) -> None:
    again = load_splits(rt_tables, numerical)
    assert again.fingerprint == splits.fingerprint
    np.testing.assert_array_equal(again.train.numerical, load_splits(rt_tables, numerical).train.numerical)


def test_a_table_larger_than_memory_is_refused(rt_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fileio, "available_memory", lambda: 2.0**20)
    assert "tables (--data=mapped needs less): about 0.0 GiB of memory are needed" in user_error_message(
        lambda: load_splits(rt_tables, data="memory"))
    assert "tables: about 0.0 GiB of memory are needed" in user_error_message(lambda: read_log(rt_tables))


def test_find_folder(rt_tables: Path, tmp_path: Path) -> None:
    parent, name = rt_tables.parent, rt_tables.name
    for path in (rt_tables, rt_tables / "train.csv", parent):
        assert find_folder(path, name) == rt_tables
    assert find_folder(tmp_path, "absent") == tmp_path / "absent"


def test_a_split_is_read_by_its_path(rt_tables: Path, splits: Splits) -> None:
    np.testing.assert_array_equal(RetailRocketRLDataset(rt_tables / "val.csv").labels, splits.val.labels)
    assert "not a split of a data set" in user_error_message(lambda: RetailRocketRLDataset(rt_tables / "items.csv"))
    assert "no such file" in user_error_message(lambda: RetailRocketRLDataset(rt_tables / "absent" / "val.csv"))

"""MDP tables to arrays: features that never look ahead, both layouts, damaged folders, batches."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import complaint
from hypothesis import given
from hypothesis import strategies as st

from common.fileio import sha256
from dataset.features import session_features
from dataset.loader import TensorLoader
from dataset.retailrocket import PROPERTIES
from dataset.rtrl import Floats, RetailRocketRLDataset, Splits, load_splits
from dataset.tables import SPLITS

LABELS = ["click", "pay"]
ITEMS = pd.DataFrame({"itemid": range(10), "785": [str(item % 3) for item in range(10)]})


@pytest.fixture(scope="module")
def splits(rt_tables: Path) -> Splits:
    return load_splits(rt_tables)


def every(splits: Splits) -> dict[str, RetailRocketRLDataset]:
    return {"train": splits.train, "val": splits.val, "test": splits.test}


def features(table: pd.DataFrame) -> Floats:
    """The numeric features of a table, by way of the data set."""
    return RetailRocketRLDataset(table, ITEMS, ["785"], LABELS).numerical


# -------------------------------------------------------------------------------------------------- the session so far

SESSION = pd.DataFrame(
    [  # Seconds: shown, then when it was clicked and paid. Item 0 is clicked late, item 1 at once, item 2 much later.
        (0, 1, 0, 1, 1, 15, 200),
        (10, 1, 1, 0, 1, 10, None),
        (30, 1, 2, 0, 1, 150, None),
        (100, 1, 3, 0, 0, None, None),
        (300, 1, 4, 0, 0, None, None),
        (1, 2, 5, 0, 0, None, None),  # another session, in between
        (4, 2, 6, 0, 0, None, None),
    ],
    columns=["timestamp", "sessionid", "itemid", "pay", "click", "click_time", "pay_time"],
).astype({"click_time": float, "pay_time": float})
SESSION[["timestamp", "click_time", "pay_time"]] *= 1000


def log_gap(seconds: float) -> float:
    return float(np.log1p(seconds) / 10)


def test_names_of_the_features() -> None:
    assert NUMERICAL == ("position", "click_rate", "pay_rate", "last_click", "last_pay", "log_gap")


def test_a_session_worked_out_by_hand() -> None:
    """An outcome counts once it has happened: item 0's purchase, 200 s in, is news to the last row only."""
    expected = [
        [0, 0, 0, 0, 0, 0],
        [np.log(2), 0, 0, 0, 0, log_gap(10)],  # at 10 s neither item 0 (15 s) nor anything else is clicked
        [np.log(3), 2 / 3, 0, 1, 0, log_gap(20)],
        [np.log(4), 2 / 4, 0, 0, 0, log_gap(70)],  # item 2, the one before, is clicked at 150 s
        [np.log(5), 3 / 5, 1 / 5, 0, 0, log_gap(200)],
        [0, 0, 0, 0, 0, 0],
        [np.log(2), 0, 0, 0, 0, log_gap(3)],
    ]
    assert features(SESSION) == pytest.approx(np.array(expected), abs=1e-6)
    assert session_features(SESSION) == pytest.approx(np.array(expected), abs=1e-6)


def test_without_times_an_outcome_counts_from_the_next_row_on() -> None:
    """The published tables do not say when a click happened."""
    got = features(SESSION.drop(columns=["click_time", "pay_time"]))
    assert got[:, 1] == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4, 3 / 5, 0, 0])
    assert got[:, 2] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 0, 0])
    assert got[:, 3].tolist() == [0, 1, 1, 1, 0, 0, 0]
    assert got[:, 4].tolist() == [0, 1, 0, 0, 0, 0, 0]


def test_features_are_those_of_the_session_whatever_stands_around_it() -> None:
    assert features(SESSION.sample(frac=1, random_state=3)) == pytest.approx(features(SESSION))
    assert features(SESSION[SESSION["sessionid"] == 1]) == pytest.approx(features(SESSION)[:5])


def test_the_first_row_of_every_session_is_all_zeros(splits: Splits) -> None:
    for split in every(splits).values():
        first = np.append(True, split.session[1:] != split.session[:-1])
        assert not split.numerical[first].any()
        assert (split.numerical[~first, 0] > 0).all(), "and of the others the position is not 0"
        assert np.isfinite(split.numerical).all()


def test_the_features_say_something(splits: Splits) -> None:
    """Every one of them takes several values on the simulated log."""
    assert (splits.train.numerical.std(axis=0) > 0.001).all()


class Story:
    """A session: per row the item, the wait since the row before, and when it is clicked and paid (None: never)."""

    def __init__(self, rows: list[tuple[int, int, int | None, int | None]]) -> None:
        self.items, waits, clicks, pays = zip(*rows, strict=True)
        self.times = np.cumsum(waits).tolist()
        self.click_times = [None if late is None else time + late
                            for time, late in zip(self.times, clicks, strict=True)]
        self.pay_times = [None if late is None or click is None else click + late
                          for click, late in zip(self.click_times, pays, strict=True)]

    def table(self, session: int = 1) -> pd.DataFrame:
        return pd.DataFrame({
            "timestamp": self.times, "sessionid": session, "itemid": self.items,
            "click": [int(time is not None) for time in self.click_times],
            "pay": [int(time is not None) for time in self.pay_times],
            "click_time": np.array(self.click_times, float), "pay_time": np.array(self.pay_times, float)})


rows_of_a_story = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 4).map(lambda wait: wait * 1000),
              st.none() | st.integers(0, 9).map(lambda late: late * 1000),
              st.none() | st.integers(0, 9).map(lambda late: late * 1000)),
    min_size=1, max_size=8)


@given(before=rows_of_a_story, after=rows_of_a_story, other=rows_of_a_story, data=st.data())
def test_the_future_does_not_reach_the_features(before: list[Any], after: list[Any], other: list[Any],
                                                data: st.DataObject) -> None:
    """Row i keeps its features, whatever becomes of later rows, of its own labels, and of outcomes from its time on."""
    story = Story(before)
    i = data.draw(st.integers(0, len(before) - 1), label="row")
    now = story.times[i]
    altered = Story(before[: i + 1] + after)

    def alter(times: list[int | None], row: int) -> None:
        """Move an outcome that is not known at row i to another moment that is not known at row i, or to never."""
        known = times[row]
        if row == i or known is None or known >= now:
            times[row] = data.draw(st.none() | st.integers(0, 9).map(lambda late: now + late * 1000))

    for row in range(i + 1):
        alter(altered.click_times, row)
        alter(altered.pay_times, row)
    one = pd.concat([story.table(), Story(other).table(session=2)])
    two = pd.concat([Story(after).table(session=2), altered.table()])

    def of_row_i(table: pd.DataFrame) -> Floats:
        data_set = RetailRocketRLDataset(table, ITEMS, ["785"], LABELS)
        return data_set.numerical[np.flatnonzero(data_set.session == 1)[i]]

    np.testing.assert_array_equal(of_row_i(one), of_row_i(two))


@given(before=rows_of_a_story, after=rows_of_a_story, data=st.data())
def test_the_future_does_not_reach_the_features_of_published_tables(before: list[Any], after: list[Any],
                                                                    data: st.DataObject) -> None:
    i = data.draw(st.integers(0, len(before) - 1), label="row")
    one = Story(before).table()[["timestamp", "sessionid", "itemid", *LABELS]]
    two = Story(before[: i + 1] + after).table()[list(one)]
    click = data.draw(st.integers(0, 1))
    two.loc[i, LABELS] = [click, click * data.draw(st.integers(0, 1))]
    np.testing.assert_array_equal(features(one)[i], features(two)[i])


def test_numerical_none_is_one_column_of_zeros(rt_tables: Path) -> None:
    for split in every(load_splits(rt_tables, "none")).values():
        assert split.numerical_num == 1
        assert split.numerical.dtype == np.float32
        assert not split.numerical.any()


# -------------------------------------------------------------------------------------------------------- the data set


def test_arrays_are_the_rows_of_the_tables(splits: Splits, rt_tables: Path) -> None:
    for name, split in every(splits).items():
        table = pd.read_csv(rt_tables / f"{name}.csv")
        assert len(split) == len(table)
        assert split.labels.dtype == np.float32
        np.testing.assert_array_equal(split.labels, table[["click", "pay"]])
        np.testing.assert_array_equal(split.session, table["sessionid"])
        np.testing.assert_array_equal(split.timestamp, table["timestamp"])


def test_fields_are_the_properties_of_the_items(splits: Splits, rt_tables: Path) -> None:
    items = pd.read_csv(rt_tables / "item_feadf.csv", dtype=str, keep_default_na=False).set_index("itemid")
    for name, split in every(splits).items():
        met = pd.read_csv(rt_tables / f"{name}.csv", dtype=str)["itemid"]
        assert list(split.fields) == list(PROPERTIES)
        for field, column in split.fields.items():
            texts = ["" if code < 0 else column.values[code] for code in column.codes]
            assert texts == items.loc[met, field].tolist()


def test_rows_are_put_in_order_and_the_truth_goes_with_them() -> None:
    table = SESSION.sample(frac=1, random_state=5).reset_index(drop=True)
    truth = pd.DataFrame({"p_click": table["itemid"] / 10, "p_pay": table["itemid"] / 100})
    split = RetailRocketRLDataset(table, ITEMS, ["785"], LABELS, truth=truth)
    assert split.session.tolist() == [1] * 5 + [2] * 2
    assert split.oracle_probabilities is not None
    assert split.oracle_probabilities[:, 0].tolist() == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def test_the_truth_stands_beside_its_row(splits: Splits, rt_tables: Path) -> None:
    """Row for row, the probabilities are those of the same time, session and item in truth.csv."""
    keys = ["timestamp", "sessionid", "itemid"]
    truth = pd.read_csv(rt_tables / "truth.csv").rename(columns={"visitorid": "sessionid"}).set_index(keys)
    for name, split in every(splits).items():
        rows = pd.MultiIndex.from_frame(pd.read_csv(rt_tables / f"{name}.csv")[keys])
        assert split.oracle_probabilities is not None
        np.testing.assert_array_equal(split.oracle_probabilities, truth.loc[rows, ["p_click", "p_pay"]])


def test_without_a_mapping_there_are_no_ids(rt_tables: Path) -> None:
    train = load_splits(rt_tables).train
    assert "Catemapper(0.2).fit(train).map(dataset)" in complaint(lambda: train.categorical)


def test_one_spelling_a_value(tmp_path: Path) -> None:
    """Blanks around a value, and the 12.0 that spreadsheets make of 12, are no other value."""
    items = pd.DataFrame({"itemid": [1, 2, 3, 4, 5], "785": ["12", "12.0", " 12 ", "", "n12.0"]})
    table = SESSION[:5].assign(itemid=[1, 2, 3, 4, 5])
    field = RetailRocketRLDataset(table, items, ["785"], LABELS).fields["785"]
    assert ["" if code < 0 else field.values[code] for code in field.codes] == ["12", "12", "12", "", "n12.0"]


def test_an_item_that_the_item_table_lacks_has_no_values() -> None:
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


def test_the_published_layout_reads_as_the_same_rows(published: Path, splits: Splits) -> None:
    read = load_splits(published)
    assert read.task_names == ["CTR", "CTCVR"]
    assert read.long_tailed == ["364", "776"]
    for one, two in zip(every(read).values(), every(splits).values(), strict=True):
        np.testing.assert_array_equal(one.labels, two.labels)
        np.testing.assert_array_equal(one.session, two.session)
        assert one.oracle_probabilities is None
        for name in PROPERTIES:
            np.testing.assert_array_equal(one.fields[name].codes, two.fields[name].codes)


def test_the_published_layout_has_a_fingerprint_of_its_own(published: Path, splits: Splits) -> None:
    first = load_splits(published).fingerprint
    assert first == load_splits(published).fingerprint != splits.fingerprint
    with open(published / "test.csv", "a") as file:
        file.write("1439399530012,4023,529,0,0,[],[]\n")
    assert load_splits(published).fingerprint != first


@pytest.mark.parametrize(("line", "where"), [
    ("1439399530012,4023,529,2,0,[],[]", "column 'click'"),
    ("1439399530012,4023,529,0,nan,[],[]", "column 'pay'"),
    ("1439399530012,somebody,529,0,0,[],[]", "column 'visitorid'"),
    ("1439399530012,4023,mug,0,0,[],[]", "column 'itemid'"),
    ("1439399530012,4023", "column 'itemid'"),
])
def test_a_bad_cell_in_a_table_is_named(published: Path, line: str, where: str) -> None:
    number = len((published / "val.csv").read_text().splitlines()) + 1
    with open(published / "val.csv", "a") as file:
        file.write(line + "\n")
    assert complaint(lambda: load_splits(published)).startswith(f"{published / 'val.csv'}, line {number}, {where}: ")


def test_a_table_without_sessions_is_refused(published: Path) -> None:
    text = (published / "train.csv").read_text().replace("visitorid", "who", 1)
    (published / "train.csv").write_text(text)
    message = complaint(lambda: load_splits(published))
    assert message.startswith(f"{published / 'train.csv'}, line 1: column 'sessionid' is missing")


def test_an_item_that_stands_there_twice_is_named_by_its_line(published: Path) -> None:
    path = published / "item_feadf.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[3]]) + "\n")
    assert complaint(lambda: load_splits(published)).startswith(f"{path}, line {len(lines) + 1}, column 'itemid': ")


# ----------------------------------------------------------------------------------------------------- damaged folders


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert complaint(lambda: load_splits(tmp_path / "rt")).startswith(f"{tmp_path / 'rt'}: ")


def test_a_half_present_folder_names_what_is_missing(tables: Path) -> None:
    (tables / "val.csv").unlink()
    (tables / "item_feadf.csv").unlink()
    assert complaint(lambda: load_splits(tables)).startswith(f"{tables}: val.csv, item_feadf.csv missing")


def test_a_file_of_the_manifest_that_is_missing_is_named(tables: Path) -> None:
    (tables / "truth.csv").unlink()
    assert complaint(lambda: load_splits(tables)).startswith(f"{tables}: truth.csv missing")


@pytest.mark.parametrize("name", ["train.csv", "val.csv", "test.csv", "item_feadf.csv", "truth.csv"])
def test_a_table_that_was_edited_is_refused(tables: Path, name: str) -> None:
    *lines, last = (tables / name).read_text().splitlines()
    (tables / name).write_text("\n".join([*lines, ("3" if last[0] != "3" else "2") + last[1:]]) + "\n")
    message = complaint(lambda: load_splits(tables))
    assert message.startswith(f"{tables / name}: ")
    assert "SHA-256" in message


def test_a_table_that_was_cut_short_is_refused(tables: Path) -> None:
    text = (tables / "train.csv").read_text()
    (tables / "train.csv").write_text(text[: len(text) // 2])
    message = complaint(lambda: load_splits(tables))
    assert message.startswith(str(tables / "train.csv"))
    assert "cut short" in message


def test_a_misspelt_column_says_more_than_that_the_file_has_changed(tables: Path) -> None:
    text = (tables / "val.csv").read_text()
    (tables / "val.csv").write_text(text.replace("click,", "clik,", 1))
    message = complaint(lambda: load_splits(tables))
    assert "column 'click' is missing" in message
    assert "clik" in message


def change_manifest(folder: Path, **changes: Any) -> Path:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize("name", ["../x.csv", "sub/x.csv", ".."])
def test_a_manifest_that_points_outside_its_folder_is_refused(tables: Path, name: str) -> None:
    (tables.parent / "x.csv").write_text("a,b\n")
    outputs = json.loads((tables / "manifest.json").read_text())["outputs"]
    path = change_manifest(tables, outputs={**outputs, name: sha256(tables.parent / "x.csv")})
    message = complaint(lambda: load_splits(tables))
    assert name in message
    assert message.startswith((str(path), str(tables)))


@pytest.mark.parametrize("changes", [{"outputs": None}, {"outputs": []}, {"categorical": "785"}, {"tasks": ["click"]},
                                     {"tasks": [{"name": "CTR"}]}, {"long_tailed": None}, {"categorical": []},
                                     {"categorical": [["785"]]}, {"context": [[]]}, {"long_tailed": ["colour"]},
                                     {"tasks": []}, {"tasks": [{"name": "CTR", "label": "click"}]},
                                     {"tasks": [{"name": "a$b", "label": "click"}, {"name": "B", "label": "pay"}]},
                                     {"tasks": [{"name": "A", "label": "click"}, {"name": "B", "label": "click"}]},
                                     {"tasks": [{"name": "A", "label": "timestamp"}, {"name": "B", "label": "pay"}]},
                                     {"categorical": ["785", "785"]}, {"format": 2}, {"simulation": None}], ids=str)
def test_a_manifest_of_another_shape_is_refused(tables: Path, changes: dict[str, Any]) -> None:
    assert str(change_manifest(tables, **changes)) in complaint(lambda: load_splits(tables))


def test_what_the_columns_mean_is_part_of_the_fingerprint(tables: Path, splits: Splits) -> None:
    """A model of clicks and purchases is not one of purchases and clicks."""
    change_manifest(tables, tasks=[{"name": "CTR", "label": "pay"}, {"name": "CTCVR", "label": "click"}])
    assert load_splits(tables).fingerprint != splits.fingerprint
    change_manifest(tables, tasks=splits.manifest["tasks"], source="another word for the same")
    assert load_splits(tables).fingerprint == splits.fingerprint


@pytest.mark.parametrize("name", ["train.csv", "item_feadf.csv"])
def test_a_folder_in_place_of_a_table_is_one_line(published: Path, name: str) -> None:
    (published / name).unlink()
    (published / name).mkdir()
    assert complaint(lambda: load_splits(published)) == f"{published / name}: not a file"


def test_repairs_of_tables_are_counted_and_shown(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tables / "manifest.json").unlink()
    (tables / "train.csv").write_text(
        "timestamp,sessionid,itemid,click,pay,click_time,pay_time\n"
        "2000,1,1,1,0,1500,\n1000,1,2,1,1,,9000\n3000,2,3,0,0,3500,\n4000,2,4,0,0,,\n")
    (tables / "item_feadf.csv").write_text("itemid," + ",".join(PROPERTIES) + "\n1,7.0, a,x,,,,\n2,7,a,x,,,,\n")
    train = load_splits(tables).train
    assert train.timestamp.tolist() == [1000, 2000, 3000, 4000]
    assert [line for line in capsys.readouterr().out.splitlines() if "val.csv" not in line] == [
        f"{tables / 'train.csv'}: repaired: 2 rows put into the order of session and time",
        f"{tables / 'train.csv'}: repaired: 1 times in column 'click_time' before their own row: taken for the row's",
        f"{tables / 'train.csv'}: repaired: 1 times in column 'click_time' missing: taken for the row's",
        f"{tables / 'train.csv'}: repaired: 1 times in column 'click_time' of what did not happen ('click' is 0): left "
        "out",
        f"{tables / 'item_feadf.csv'}: repaired: 2 values in columns 785, 591 without their blanks or the .0 of a "
        "whole number"]


@pytest.mark.parametrize("name", ["train.csv", "item_feadf.csv"])
def test_a_manifest_that_does_not_list_a_table_is_refused(tables: Path, name: str) -> None:
    outputs = json.loads((tables / "manifest.json").read_text())["outputs"]
    path = change_manifest(tables, outputs={key: value for key, value in outputs.items() if key != name})
    message = complaint(lambda: load_splits(tables))
    assert str(path) in message
    assert name in message


def test_a_field_that_the_item_table_lacks_is_named(tables: Path) -> None:
    fields = [*PROPERTIES, "colour"]
    change_manifest(tables, categorical=fields)
    assert "field 'colour' of 'categorical' is in no table" in complaint(lambda: load_splits(tables))
    change_manifest(tables, categorical=fields, tables={"item_feadf.csv": {"key": "itemid", "fields": fields}})
    message = complaint(lambda: load_splits(tables))
    assert message.startswith(f"{tables / 'item_feadf.csv'}, line 1: column 'colour' is missing")


def test_sessions_that_straddle_a_split_are_refused(tables: Path) -> None:
    """Even where the manifest agrees."""
    row = (tables / "train.csv").read_text().splitlines()[1]
    with open(tables / "test.csv", "a") as file:
        file.write(row + "\n")
    outputs = json.loads((tables / "manifest.json").read_text())["outputs"]
    change_manifest(tables, outputs={**outputs, "test.csv": sha256(tables / "test.csv")})
    message = complaint(lambda: load_splits(tables))
    assert f"session {row.split(',')[1]} is in train.csv too" in message


def test_truth_of_another_length_is_refused(tables: Path) -> None:
    path = tables / "truth.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    outputs = json.loads((tables / "manifest.json").read_text())["outputs"]
    change_manifest(tables, outputs={**outputs, "truth.csv": sha256(path)})
    assert complaint(lambda: load_splits(tables)).startswith(f"{path}: ")


@pytest.mark.parametrize("numerical", ["session", "none"])
def test_reading_twice_gives_the_same(rt_tables: Path, splits: Splits, numerical: Numerical) -> None:
    one, two = load_splits(rt_tables, numerical), load_splits(rt_tables, numerical)
    assert one.fingerprint == two.fingerprint == splits.fingerprint
    np.testing.assert_array_equal(one.train.numerical, two.train.numerical)


# ------------------------------------------------------------------------------------------------------------- batches


def numbered(rows: int) -> RetailRocketRLDataset:
    """A data set whose ids, numbers and labels all tell the number of the row."""
    table = pd.DataFrame({"timestamp": range(rows), "sessionid": 1, "itemid": 0, "click": 0, "pay": 0})
    data_set = RetailRocketRLDataset(table, ITEMS, ["785"], LABELS)
    number = np.arange(rows)
    data_set.set_ids(np.column_stack([number, number]), [rows, rows])
    data_set.numerical = np.column_stack([number, -number]).astype(np.float32)
    data_set.labels = np.column_stack([number, 2 * number]).astype(np.float32)
    return data_set


def order_of(batches: TensorLoader) -> list[int]:
    return torch.cat([ids[:, 0] for ids, _, _ in batches]).tolist()


def test_batches_in_order() -> None:
    batches = TensorLoader(numbered(23), 5)
    assert [len(ids) for ids, _, _ in batches] == [5, 5, 5, 5, 3]
    assert len(batches) == 5
    assert order_of(batches) == list(range(23))


@pytest.mark.parametrize(("rows", "size", "count"), [(20, 5, 4), (21, 5, 5), (3, 5, 1), (1, 1, 1)])
def test_number_of_batches(rows: int, size: int, count: int) -> None:
    assert len(TensorLoader(numbered(rows), size)) == len(list(TensorLoader(numbered(rows), size, seed=1))) == count


def test_a_shuffled_pass_visits_every_row_once() -> None:
    batches = TensorLoader(numbered(23), 5, seed=1)
    assert [len(ids) for ids, _, _ in batches] == [5, 5, 5, 5, 3], "the last batch holds what is left"
    assert Counter(order_of(batches)) == Counter(range(23))
    assert order_of(batches) != list(range(23))


def test_ids_numbers_and_labels_of_a_row_stay_together() -> None:
    for ids, numbers, labels in TensorLoader(numbered(23), 5, seed=1):
        row = ids[:, 0].float()
        assert torch.equal(numbers, torch.stack([row, -row], dim=1))
        assert torch.equal(labels, torch.stack([row, 2 * row], dim=1))
        assert (ids.dtype, numbers.dtype, labels.dtype) == (torch.int64, torch.float32, torch.float32)


@given(rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.sampled_from([0.0, 1.5, -2.0])), min_size=1))
def test_distinct_rows_are_what_numpy_finds(rows: list[tuple[int, int, float]]) -> None:
    data_set, table = numbered(len(rows)), np.array(rows)
    data_set.set_ids(table[:, :2].astype(np.int64), [3, 2])
    data_set.numerical = table[:, 2:].astype(np.float32)
    distinct, place = (one.numpy() for one in TensorLoader(data_set, 4).unique_rows)
    assert len(distinct) == len(np.unique(table, axis=0))
    np.testing.assert_array_equal(table[distinct][place], table)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, warm_up: int = 0) -> list[int]:
        batches = TensorLoader(numbered(50), 7, seed=seed)
        for _ in range(warm_up):
            order_of(batches)
        batches.epoch = epoch
        return order_of(batches)

    assert order(1, 3) == order(1, 3, warm_up=2)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (1, 2, 3)}) == 6


def test_a_table_larger_than_memory_is_refused(rt_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_available_memory", lambda: 2.0**20)
    assert " rows: about 0.0 GiB of memory are needed" in complaint(lambda: load_splits(rt_tables))

"""Raw RetailRocket logs to MDP tables: a log by hand, a slow reference, properties of the output, errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, read_tree, run_in_process, user_error_message
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from reference_reader import EVENT_ORDER as EVENT_TYPES
from reference_reader import EventRow, prepare_rows, read_prepared_rows

from common.csv_reader import as_relation
from common.errors import UserError
from dataset.prepare import prepare
from dataset.retailrocket import PROPERTIES
from dataset.rtrl import load_splits
from dataset.tables import SPLITS

REAL_SAMPLE = REPOSITORY.parent / "shared" / "data" / "retailrocket-mini"
EVENT_COLUMNS = ["timestamp", "visitorid", "event", "itemid", "transactionid"]
PROPERTY_COLUMNS = ["timestamp", "itemid", "property", "value"]

PropertyRow = tuple[int, int, str, str]

# ------------------------------------------------------------------------------------------------------- a log by hand

EVENTS: list[EventRow] = [
    # Visitor 1 carts item 10 and buys it long after, during validation.
    (1000, 1, "view", 10, ""), (2000, 1, "view", 11, ""), (3000, 1, "addtocart", 10, ""),
    (5000, 1, "transaction", 10, 77),
    # Visitor 2 views item 12 again; one event is a duplicate.
    (1500, 2, "view", 12, ""), (1600, 2, "view", 12, ""), (1700, 2, "view", 10, ""), (1700, 2, "view", 10, ""),
    # Visitor 3 never views a second item: no transition, no episode.
    (1800, 3, "view", 10, ""), (1900, 3, "view", 10, ""),
    # Visitor 4 carts item 13 before viewing it, and buys item 12 without a view.
    (2400, 4, "addtocart", 13, ""), (2500, 4, "view", 13, ""), (2600, 4, "transaction", 12, 78),
    # Visitor 5 opens validation at 4000; visitor 6 is the test split, and buys item 15 in two transactions at once.
    (4000, 5, "view", 11, ""), (9000, 5, "view", 14, ""),
    (6000, 6, "view", 15, ""), (6100, 6, "transaction", 15, 79), (6100, 6, "transaction", 15, 80),
    (6200, 6, "view", 12, ""),
]
ROWS = {  # timestamp, sessionid, itemid, pay, click, click_time, pay_time
    "train": ["1000,1,10,1,1,3000,5000", "2000,1,11,0,0,,",
              "1500,2,12,0,0,,", "1700,2,10,0,0,,",
              "2400,4,13,0,1,2400,", "2600,4,12,1,1,2600,2600"],
    "val": ["4000,5,11,0,0,,", "9000,5,14,0,0,,"],
    "test": ["6000,6,15,1,1,6100,6100", "6200,6,12,0,0,,"],
}
VALUES: list[PropertyRow] = [
    (1000, 10, "785", "old"), (4000, 10, "785", "at the cutoff"), (4001, 10, "785", "future"),
    (500, 11, "categoryid", "7"),
    (500, 12, "available", "1"), (3999, 12, "available", "0"), (500, 12, "888", "not used"),
    (500, 13, "591", "1293 n24.000"),
    (700, 14, "814", "b"), (700, 14, "814", "a"),
    (500, 99, "785", "no session"),
]
ITEMS = ["10,at the cutoff,,,,,,", "11,,,,,7,,", "12,,,,0,,,", "13,,1293 n24.000,,,,,", "14,,,b,,,,", "15,,,,,,,"]
ROW_COUNTS = [
    ["events read", 19], ["view", 13], ["addtocart", 2], ["transaction", 4],
    ["dropped: duplicate events", 1],
    ["dropped: in 1 sessions of fewer than 2 items", 2],
    ["merged: later events of an item in its session", 6],
    ["kept: rows, one per item of a session", 10],
    ["property rows read", 11],
    ["dropped: unused properties", 1],
    ["dropped: after the cutoff, when validation starts", 1],
    ["dropped: items without sessions", 1],
    ["dropped: replaced by a later value before the cutoff", 3],
    ["kept: values of items", 5],
    ["items with sessions", 6], ["without any known property", 1],
    ["categories in the tree (not used by the tables)", 2], ["categories of items", 1], ["of these not in the tree", 0],
]


def write_raw(folder: Path, events: Sequence[EventRow], values: Sequence[PropertyRow] = VALUES) -> Path:
    """Write a raw log in the Kaggle layout; the properties in two parts."""
    folder.mkdir()
    pd.DataFrame(events, columns=EVENT_COLUMNS).to_csv(folder / "events.csv", index=False)
    table = pd.DataFrame(values, columns=PROPERTY_COLUMNS)
    table[:5].to_csv(folder / "item_properties_part1.csv", index=False)
    table[5:].to_csv(folder / "item_properties_part2.csv", index=False)
    (folder / "category_tree.csv").write_text("categoryid,parentid\n7,8\n8,\n")
    return folder


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The log above."""
    return write_raw(tmp_path / "raw", EVENTS)


@pytest.fixture
def out(raw: Path, tmp_path: Path) -> Path:
    """Its MDP tables."""
    prepare(raw, tmp_path / "rt")
    return tmp_path / "rt"


def lines(path: Path) -> list[str]:
    """The lines below the header."""
    return path.read_text().splitlines()[1:]


def manifest_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


@pytest.mark.parametrize("split", SPLITS)
def test_rows_by_hand(out: Path, split: str) -> None:
    header = (out / f"{split}.csv").read_text().splitlines()[0]
    assert header == "timestamp,sessionid,itemid,pay,click,click_time,pay_time"
    assert lines(out / f"{split}.csv") == ROWS[split]


def test_items_by_hand(out: Path) -> None:
    header = (out / "item_feadf.csv").read_text().splitlines()[0]
    assert header == "itemid," + ",".join(PROPERTIES)
    assert lines(out / "item_feadf.csv") == ITEMS


def test_manifest_by_hand(out: Path) -> None:
    manifest = manifest_of(out)
    assert manifest["row_counts"] == ROW_COUNTS
    assert manifest["boundary"] == 4000
    assert manifest["rows"] == {"train": 6, "val": 2, "test": 2}
    assert manifest["settings"] == {"session_gap": 0.0, "min_session": 2}
    assert set(manifest["inputs"]) == {"events.csv", "item_properties_part1.csv", "item_properties_part2.csv",
                                       "category_tree.csv"}
    assert set(manifest["outputs"]) == {"train.csv", "val.csv", "test.csv", "item_feadf.csv"}


def test_min_session_1_keeps_a_single_item(raw: Path, tmp_path: Path) -> None:
    prepare(raw, tmp_path / "rt", min_session=1)
    kept = [row for split in SPLITS for row in lines(tmp_path / "rt" / f"{split}.csv")]
    assert "1800,3,10,0,0,," in kept
    assert len(kept) == 11


def test_a_gap_ends_a_session(tmp_path: Path) -> None:
    """30 minutes exactly are no gap, more are. An item viewed again in the next session is a new row."""
    minute = 60_000
    views = [(0, 10), (30, 11), (61, 10), (62, 12), (92, 13), (200, 10), (201, 11), (300, 14), (301, 15),
             (400, 12), (402, 13)]
    events: list[EventRow] = [(minutes * minute, 1, "view", item, "") for minutes, item in views]
    events += [(205 * minute, 1, "addtocart", 10, "")]
    prepare(write_raw(tmp_path / "raw", events), tmp_path / "rt", session_gap=30)
    table = pd.concat(pd.read_csv(tmp_path / "rt" / f"{split}.csv") for split in SPLITS)
    sessions = [group["itemid"].tolist() for _, group in table.groupby("sessionid")]
    assert sessions == [[10, 11], [10, 12, 13], [10, 11], [14, 15], [12, 13]]
    assert table["click"].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0], "a click belongs to its own session"


# ------------------------------------------------------------------------------------------------------- the reference


def test_reference_by_hand() -> None:
    split_rows = prepare_rows(EVENTS)
    assert split_rows is not None
    for split, rows in zip(SPLITS, split_rows, strict=True):
        assert [",".join("" if cell is None else str(cell) for cell in row) for row in rows] == ROWS[split]


def events_of(raw: Path) -> list[EventRow]:
    table = pd.read_csv(raw / "events.csv").astype({"transactionid": object})
    table["transactionid"] = table["transactionid"].where(table["transactionid"].notna(), "")
    return [tuple(row) for row in table.itertuples(index=False)]  # type: ignore[misc]


def test_simulated_log_equals_reference(raw_log: Path, rt_tables: Path) -> None:
    assert read_prepared_rows(rt_tables) == prepare_rows(events_of(raw_log))


def test_session_gaps_equal_reference(raw_log: Path, tmp_path: Path) -> None:
    prepare(raw_log, tmp_path / "rt", session_gap=60, min_session=3)
    assert read_prepared_rows(tmp_path / "rt") == prepare_rows(events_of(raw_log), session_gap=60, min_session=3)


@given(events=st.lists(st.tuples(st.integers(0, 25).map(lambda step: step * 60_000), st.integers(1, 6),
                                 st.sampled_from(EVENT_TYPES), st.integers(10, 14), st.just("")),
                       min_size=8, max_size=60),
       session_gap=st.sampled_from([0.0, 2.0, 5.0]), min_session=st.integers(1, 3))
@hypothesis_settings(max_examples=25)
def test_any_log_equals_reference(tmp_path_factory: pytest.TempPathFactory, events: list[EventRow],
                                  session_gap: float, min_session: int) -> None:
    """Logs full of ties: the same minute, the same item, the same event."""
    expected = prepare_rows(events, session_gap, min_session)
    folder = tmp_path_factory.mktemp("log")
    raw = write_raw(folder / "raw", events)
    if expected is None:
        assert "session" in user_error_message(lambda: prepare(raw, folder / "rt", session_gap, min_session))
        assume(False)
    prepare(raw, folder / "rt", session_gap, min_session)
    assert read_prepared_rows(folder / "rt") == expected


# -------------------------------------------------------------------------------------------------------- properties


def assert_row_counts_add_up(folder: Path) -> None:
    row_counts = manifest_of(folder)["row_counts"]
    starts = [number for number, (label, _) in enumerate(row_counts) if label in ("events read", "property rows read")]
    assert len(starts) == 2
    ends = [starts[1], next(number for number, (label, _) in enumerate(row_counts) if label == "items with sessions")]
    for start, end in zip(starts, ends, strict=True):
        parts = [rows for label, rows in row_counts[start + 1:end] if label.startswith(("dropped", "merged", "kept"))]
        assert row_counts[start][1] == sum(parts)
    assert sum(rows for label, rows in row_counts if label in EVENT_TYPES) == row_counts[0][1]


def test_row_counts_add_up(raw_log: Path, rt_tables: Path, out: Path) -> None:
    assert_row_counts_add_up(out)
    assert_row_counts_add_up(rt_tables)
    row_counts = dict(manifest_of(rt_tables)["row_counts"])
    assert row_counts["events read"] == len(lines(raw_log / "events.csv"))
    assert row_counts["property rows read"] == sum(len(lines(path)) for path in raw_log.glob("item_properties*.csv"))
    assert row_counts["kept: rows, one per item of a session"] == sum(map(len, read_prepared_rows(rt_tables)))


@pytest.fixture
def prepared(rt_tables: Path) -> dict[str, pd.DataFrame]:
    """The tables of the simulated log."""
    return {split: pd.read_csv(rt_tables / f"{split}.csv") for split in SPLITS}


def test_pay_implies_click_and_times_say_when(prepared: dict[str, pd.DataFrame]) -> None:
    table = pd.concat(prepared.values())
    assert table["pay"].sum() > 20
    assert (table["pay"] <= table["click"]).all()
    assert table["click_time"].notna().equals(table["click"] == 1)
    assert table["pay_time"].notna().equals(table["pay"] == 1)
    assert (table["click_time"].dropna() >= table.loc[table["click"] == 1, "timestamp"]).all()
    assert (table["pay_time"] >= table["click_time"])[table["pay"] == 1].all()


def test_no_session_straddles_a_split(prepared: dict[str, pd.DataFrame]) -> None:
    sessions = [set(prepared[split]["sessionid"]) for split in SPLITS]
    assert len(set.union(*sessions)) == sum(map(len, sessions))


def test_splits_are_consecutive_in_time(prepared: dict[str, pd.DataFrame], rt_tables: Path) -> None:
    starts = {split: prepared[split].groupby("sessionid")["timestamp"].min() for split in SPLITS}
    assert starts["train"].max() <= starts["val"].min() == manifest_of(rt_tables)["boundary"]
    assert starts["val"].max() <= starts["test"].min()


def test_splits_are_6_2_2_of_the_rows(prepared: dict[str, pd.DataFrame]) -> None:
    rows = np.array([len(prepared[split]) for split in SPLITS])
    longest = max(table.groupby("sessionid").size().max() for table in prepared.values())
    assert np.abs(np.cumsum(rows)[:2] - np.array([0.6, 0.8]) * rows.sum()).max() <= longest


def test_rows_of_a_session_are_adjacent_and_ordered(prepared: dict[str, pd.DataFrame]) -> None:
    for table in prepared.values():
        changes = int((table["sessionid"] != table["sessionid"].shift()).sum())
        assert changes == table["sessionid"].nunique()
        assert table.groupby("sessionid")["timestamp"].is_monotonic_increasing.all()
        assert not table.duplicated(["sessionid", "itemid"]).any()


def test_item_values_are_the_last_before_the_cutoff(raw_log: Path, rt_tables: Path) -> None:
    """Each cell of the item table is the last value known at the cutoff, found here with a plain loop."""
    train_end_ms = manifest_of(rt_tables)["boundary"]
    known: dict[tuple[str, str], tuple[int, str]] = {}
    for path in raw_log.glob("item_properties*.csv"):
        for line in lines(path):
            timestamp, item, name, value = line.split(",")
            if int(timestamp) <= train_end_ms:
                known[item, name] = max(known.get((item, name), (0, "")), (int(timestamp), value))
    items = [line.split(",") for line in lines(rt_tables / "item_feadf.csv")]
    assert len(items) > 100
    for item, *cells in items:
        assert cells == [known.get((item, name), (0, ""))[1] for name in PROPERTIES]


def test_every_item_of_the_rows_is_in_the_item_table(prepared: dict[str, pd.DataFrame], rt_tables: Path) -> None:
    items = pd.read_csv(rt_tables / "item_feadf.csv")["itemid"]
    assert items.is_unique
    assert set(items) == set(pd.concat(prepared.values())["itemid"])


def test_ground_truth_is_aligned_with_the_rows(prepared: dict[str, pd.DataFrame], rt_tables: Path) -> None:
    keys = ["timestamp", "sessionid", "itemid"]
    truth = pd.read_csv(rt_tables / "truth.csv").rename(columns={"visitorid": "sessionid"})
    pd.testing.assert_frame_equal(truth[keys], pd.concat(prepared.values(), ignore_index=True)[keys])


def test_ground_truth_of_a_different_log(raw: Path, tmp_path: Path, raw_log: Path) -> None:
    shutil.copy(raw_log / "truth.csv", raw)
    assert "there is no simulation.json" in user_error_message(lambda: prepare(raw, tmp_path / "rt"))
    shutil.copy(raw_log / "simulation.json", raw)
    assert f"{raw / 'truth.csv'}: " in user_error_message(lambda: prepare(raw, tmp_path / "rt"))
    assert not (tmp_path / "rt").exists()


@pytest.mark.parametrize(("column", "value"), [("p_click", "1.5"), ("p_pay", "-0.1"), ("category", "9999"),
                                                ("position", "0"), ("intent", "1e300")])
def test_ground_truth_out_of_range(raw_log: Path, tmp_path: Path, column: str, value: str) -> None:
    shutil.copytree(raw_log, tmp_path / "raw")
    table = pd.read_csv(raw_log / "truth.csv", dtype=str)
    table.loc[4, column] = value
    table.to_csv(tmp_path / "raw" / "truth.csv", index=False)
    text = user_error_message(lambda: prepare(tmp_path / "raw", tmp_path / "rt"))
    assert text.startswith(f"{tmp_path / 'raw' / 'truth.csv'}, line 6, column '{column}': ")


def test_duplicate_ground_truth_is_refused(raw_log: Path, tmp_path: Path) -> None:
    shutil.copytree(raw_log, tmp_path / "raw")
    path = tmp_path / "raw" / "truth.csv"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*rows, rows[1]]))
    message = user_error_message(lambda: prepare(tmp_path / "raw", tmp_path / "rt"))
    assert f"{path}, line {len(rows) + 1}, column" in message


@pytest.mark.parametrize("changed", [{"items": "600"}, {"items": None}, {"events": 1.5}, {"seed": -1}, {"seed": True},
                                     {"items": 10**12}], ids=str)
def test_an_invalid_simulation_config_is_refused(raw_log: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    shutil.copytree(raw_log, tmp_path / "raw")
    path = tmp_path / "raw" / "simulation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    assert user_error_message(lambda: prepare(tmp_path / "raw", tmp_path / "rt")).startswith(f"{path}: ")


def test_the_order_of_the_raw_rows_does_not_matter(raw_log: Path, rt_tables: Path, tmp_path: Path) -> None:
    shuffled = Path(shutil.copytree(raw_log, tmp_path / "shuffled"))
    rng = np.random.default_rng(0)
    for path in shuffled.glob("*.csv"):
        head, *rows = path.read_text().splitlines(keepends=True)
        path.write_text(head + "".join(rows[index] for index in rng.permutation(len(rows))))
    parts = [shuffled / f"item_properties_part{part}.csv" for part in (1, 2)]
    contents = [path.read_text() for path in parts]
    for path, content in zip(parts, reversed(contents), strict=True):
        path.write_text(content)
    prepare(shuffled, tmp_path / "rt")
    expected, tables = read_tree(rt_tables), read_tree(tmp_path / "rt")
    for name in ("train.csv", "val.csv", "test.csv", "item_feadf.csv", "truth.csv"):
        assert tables[name] == expected[name], name
    assert manifest_of(tmp_path / "rt")["outputs"] == manifest_of(rt_tables)["outputs"]


def test_the_same_log_gives_the_same_bytes(raw_log: Path, rt_tables: Path, tmp_path: Path) -> None:
    prepare(raw_log, tmp_path / "rt")
    assert read_tree(tmp_path / "rt") == read_tree(rt_tables)


def test_compressed_files_are_read(raw: Path, out: Path, tmp_path: Path) -> None:
    for path in list(raw.glob("*.csv")):
        pd.read_csv(path, dtype=str, keep_default_na=False).to_csv(f"{path}.gz", index=False)
        path.unlink()
    prepare(raw, tmp_path / "from_gz")
    tables = {name: content for name, content in read_tree(out).items() if name != "manifest.json"}
    assert {name: content for name, content in read_tree(tmp_path / "from_gz").items() if name in tables} == tables


# -------------------------------------------------------------------------------------------------------------- errors


def test_an_existing_folder_is_kept(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "rt").mkdir()
    (tmp_path / "rt" / "train.csv").write_text("mine")
    assert f"{tmp_path / 'rt'} exists already" in user_error_message(lambda: prepare(raw, tmp_path / "rt"))
    assert read_tree(tmp_path / "rt") == {"train.csv": b"mine"}


def test_a_file_as_parent_of_the_output(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset").write_text("a file")
    assert str(tmp_path / "dataset") in user_error_message(lambda: prepare(raw, tmp_path / "dataset" / "rt"))


@pytest.mark.parametrize(("file", "content", "where"), [
    ("events.csv", None, "no such file"),
    ("events.csv", "timestamp,visitorid,event,itemid,transactionid\n1,2,view\n", "line 2, column 'itemid'"),
    ("events.csv", "timestamp,visitorid,event,itemid,transactionid\n1,2,view,3,\n1,2,buy,3,\n", "line 3"),
    ("events.csv", "timestamp,visitorid,event,itemid,transactionid\n1,2,view,,\n", "line 2, column 'itemid'"),
    ("events.csv", "timestamp,visitor,event,itemid,transactionid\n1,2,view,3,\n", "is 'visitor' misspelt?"),
    ("events.csv", "timestamp,visitorid,event,itemid,transactionid\n", "no rows"),
    ("events.csv", "timestamp,visitorid,event,itemid,transactionid\n1,2,view,3,\n2,2,view,4,\n", "1 sessions (2 rows)"),
    ("events.csv", "timestamp,visitorid,event,itemid,transactionid\n1,2,view,3,\n", "no session has 2 items"),
    ("item_properties_part2.csv", "timestamp,itemid,property,value\n1,2,785,x\nsoon,2,785,x\n",
     "line 3, column 'timestamp'"),
    ("item_properties_part2.csv", "timestamp,itemid,property\n1,2,785\n", "column 'value' is missing"),
    ("category_tree.csv", "categoryid,parentid\nshoes,1\n", "line 2, column 'categoryid'"),
])
def test_an_invalid_raw_file_is_named(raw: Path, tmp_path: Path, file: str, content: str | None, where: str) -> None:
    if content is None:
        (raw / file).unlink()
    else:
        (raw / file).write_text(content)
    text = user_error_message(lambda: prepare(raw, tmp_path / "rt"))
    assert where in text
    if "session" not in where:
        assert text.startswith(str(raw / file))
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_an_unknown_event_is_named(raw: Path, tmp_path: Path) -> None:
    text = (raw / "events.csv").read_text().replace("2000,1,view", "2000,1,veiw")
    (raw / "events.csv").write_text(text)
    message = user_error_message(lambda: prepare(raw, tmp_path / "rt"))
    assert "line 3" in message
    assert "column 'event'" in message


def test_missing_properties_are_refused(raw: Path, tmp_path: Path) -> None:
    for path in raw.glob("item_properties*"):
        path.unlink()
    assert "item_properties" in user_error_message(lambda: prepare(raw, tmp_path / "rt"))


@pytest.mark.parametrize("settings", [{"session_gap": -1.0}, {"session_gap": float("nan")}, {"min_session": 0}],
                         ids=str)
def test_settings_out_of_range_are_refused(raw: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--session_gap"):
        prepare(raw, tmp_path / "rt", **settings)


# ------------------------------------------------------------------------------------------------------- the program


def test_the_program_prints_the_row_counts(raw: Path, tmp_path: Path) -> None:
    result = run_in_process(tmp_path, "dataset/prepare.py", "--raw", "raw", "--out", "dataset/rt")
    assert result.returncode == 0, result.stderr
    for label, rows in ROW_COUNTS:
        assert any(line.strip().startswith(label) and line.endswith(f"{rows:,}") for line in result.stdout.splitlines())
    assert result.stdout.endswith("wrote dataset/rt\n")
    assert lines(tmp_path / "dataset" / "rt" / "test.csv") == ROWS["test"]


def test_the_program_fails_with_one_line(tmp_path: Path) -> None:
    result = run_in_process(tmp_path, "dataset/prepare.py", "--raw", "absent", "--out", "rt")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: absent: no such folder: --raw takes the folder of the raw files\n"
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------- a sample of the log


@pytest.mark.skipif(not REAL_SAMPLE.is_dir(), reason="the sample of the real log is absent")
def test_the_real_sample(tmp_path: Path) -> None:
    prepare(REAL_SAMPLE, tmp_path / "rt")
    assert_row_counts_add_up(tmp_path / "rt")
    row_counts = dict(manifest_of(tmp_path / "rt")["row_counts"])
    assert [row_counts[label] for label in ("events read", *EVENT_TYPES)] == [9_385, 9_076, 263, 46]
    assert row_counts["property rows read"] == 3_100
    assert row_counts["kept: values of items"] > 0
    assert row_counts["categories in the tree (not used by the tables)"] == 1_669
    table = pd.read_csv(REAL_SAMPLE / "events.csv")
    assert read_prepared_rows(tmp_path / "rt") == prepare_rows([
        (row.timestamp, row.visitorid, row.event, row.itemid, "" if np.isnan(row.transactionid) else row.transactionid)
        for row in table.itertuples()])


# ------------------------------------------------------------------------------------------------- beyond the memory


def test_a_small_memory_limit_gives_the_same_tables(raw_log: Path, rt_tables: Path, tmp_path: Path) -> None:
    (tmp_path / "rmtl-killed.999999999.partial").mkdir()
    prepare(raw_log, tmp_path / "rt", memory_limit="60MB")
    assert read_tree(tmp_path / "rt") == read_tree(rt_tables)
    assert [path.name for path in tmp_path.iterdir()] == ["rt"], "no temporary folder, nor that of a killed process"
    text = user_error_message(lambda: prepare(raw_log, tmp_path / "small", memory_limit="1MB"))
    assert text.startswith("--memory_limit: 1MB bytes are not enough")
    assert "'plenty' is not a number" in user_error_message(
        lambda: prepare(raw_log, tmp_path / "small", memory_limit="plenty"))
    assert [path.name for path in tmp_path.iterdir()] == ["rt"]


def test_parquet_tables_read_as_csv_does(raw_log: Path, rt_tables: Path, tmp_path: Path) -> None:
    prepare(raw_log, tmp_path / "rt", file_format="parquet")
    assert {*manifest_of(tmp_path / "rt")["outputs"]} == {
        "train.parquet", "val.parquet", "test.parquet", "item_feadf.parquet", "truth.parquet"}
    for split, csv_split in zip(*(vars(load_splits(folder)).items() for folder in (tmp_path / "rt", rt_tables)),
                                strict=True):
        if split[0] in SPLITS:
            for name in ("labels", "numerical", "session", "timestamp", "itemid"):
                np.testing.assert_array_equal(getattr(split[1], name), getattr(csv_split[1], name))
            for name, field in split[1].fields.items():
                np.testing.assert_array_equal(field.codes, csv_split[1].fields[name].codes)
            pd.testing.assert_frame_equal(split[1].ground_truth, csv_split[1].ground_truth)
    damaged = tmp_path / "rt" / "val.parquet"
    pd.read_csv(rt_tables / "val.csv").assign(click=3).pipe(as_relation).write_parquet(str(damaged))
    assert user_error_message(lambda: load_splits(tmp_path / "rt")) == (
        f"{damaged}, row 1, column 'click': '3' is not a label: 0 or 1")

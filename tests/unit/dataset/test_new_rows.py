"""New rows with a log as their history: the features that the log's own rows have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import user_error_message

from dataset.loader import TensorLoader
from dataset.new_rows import NewRows, check_rows, with_history
from dataset.rtrl import Log, RetailRocketRLDataset, load_splits, make_datasets, read_log
from dataset.tables import SPLITS, FeatureTable
from dataset.vocabulary import Catemapper

HISTORIES = pytest.mark.parametrize("history", ["", "userid"])
LABELS = ["click", "pay"]


def small_log(history: str, rows: int = 240) -> Log:
    """A log of users with several sessions each, of ties in time and late outcomes; its rows are in order of time."""
    rng = np.random.default_rng(5)
    time = np.sort(rng.integers(0, 60, rows)) * 1000
    user, split = rng.integers(0, 9, rows), np.repeat([0, 1, 2], [rows // 2, rows // 4, rows // 4])
    click = rng.random(rows) < 0.4
    pay = click & (rng.random(rows) < 0.5)
    table = pd.DataFrame({
        "timestamp": time, "sessionid": 1000 * split + 10 * user + (time // 1000 // 10) % 2, "itemid":
        rng.integers(0, 12, rows), "userid": user, "place": rng.choice(["home", "1", ""], rows).astype(object),
        "price": np.where(rng.random(rows) < 0.2, np.nan, rng.random(rows)),
        **{name: value.astype(np.float32) for name, value in zip(LABELS, (click, pay), strict=True)},
        "click_time": np.where(click, time + 1500.0, np.nan), "pay_time": np.where(pay, time + 9000.0, np.nan)})
    tables = {name: table[split == number].reset_index(drop=True) for number, name in enumerate(SPLITS)}
    items = pd.DataFrame({"itemid": range(11), "kind": [str(item % 4) for item in range(11)]})  # item 11 is unknown
    users = pd.DataFrame({"userid": range(9), "age": [str(one % 3) for one in range(9)]})
    manifest = {
        "categorical": ["place", "kind", "age"], "context": ["place", "price"], "history": history,
        "long_tailed": [], "numbers": ["price"], "id_fields": [],
        "rates": ["kind", "place"], "tables": {"items.csv": {"key": "itemid", "fields": ["kind"]},
                                               "users.csv": {"key": "userid", "fields": ["age"]}},
        "tasks": [{"name": "CTR", "label": "click"}, {"name": "CTCVR", "label": "pay"}]}
    return Log(tables, {"items.csv": FeatureTable("itemid", items), "users.csv": FeatureTable("userid", users)},
               manifest, "")


def contents(dataset: RetailRocketRLDataset, rows: Any, window: int = 0) -> tuple[Any, Any]:
    """Ids, by a fixed vocabulary, and numbers of the rows of a data set."""
    vocabulary = Catemapper(1.0)
    vocabulary.ids = {"place": {"home": 1, "1": 2}, "kind": {"0": 1, "1": 2, "2": 3}, "age": {"0": 1, "1": 2}}
    ids, numbers, _ = TensorLoader(vocabulary.map(dataset), 99, window=window).take(torch.as_tensor(rows))
    return ids.numpy(), numbers.numpy()


def assert_same(new: NewRows, expected: RetailRocketRLDataset, rows: Any, window: int = 0) -> None:
    for found, wanted in zip(contents(new.dataset, new.positions, window), contents(expected, rows, window),
                             strict=True):
        np.testing.assert_array_equal(found, wanted)


def order_in(dataset: RetailRocketRLDataset, table: pd.DataFrame) -> Any:
    """The position in a data set of each row of its table; in a session, rows of one time keep their order."""
    position = pd.DataFrame({"timestamp": dataset.timestamp, "sessionid": dataset.session, "row": range(len(table))})
    of_table = table.reset_index().sort_values(["sessionid", "timestamp"], kind="stable")
    position = position.sort_values(["sessionid", "timestamp"], kind="stable")
    return position["row"].to_numpy()[np.argsort(of_table["index"].to_numpy())]


# ------------------------------------------------------------------------------------------------ as the log's own rows


@HISTORIES
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("labels", [True, False])
def test_logged_rows_have_their_split_features(history: str, split: str, labels: bool) -> None:
    """With or without labels, in any order: the log knows them."""
    log = small_log(history)
    table = log.tables[split]
    expected = make_datasets(log, log.tables, "rates")[split]
    given = table if labels else table.drop(columns=["click", "pay", "click_time", "pay_time"])
    new = with_history(log, check_rows(given, log), "rates")
    assert new.is_logged.all()
    assert_same(new, expected, order_in(expected, table), window=3)
    identity = ["timestamp", "sessionid", "itemid", "userid", "place"]
    shuffled = given[~given.duplicated(identity, keep=False)].sample(frac=0.5, random_state=2)
    assert_same(with_history(log, check_rows(shuffled, log), "rates"), expected,
                order_in(expected, table)[shuffled.index], window=3)


@HISTORIES
@pytest.mark.parametrize("mode", ["rates", "session", "none"])
def test_later_rows_continue_the_log(history: str, mode: Any) -> None:
    """A log that ends in the midst of sessions, and the rest as new rows: features as of the whole log."""
    log = small_log(history)
    table = log.tables["test"]
    expected = make_datasets(log, log.tables, mode)["test"]
    shorter = replace(log, tables={**log.tables, "test": table[:20]})
    new = with_history(shorter, check_rows(table[20:], log), mode)
    assert not new.is_logged.any()
    assert_same(new, expected, order_in(expected, table)[20:], window=3)


def test_rows_may_continue_any_split() -> None:
    log = small_log("")
    table = log.tables["train"].fillna({"price": 0.5})  # a missing number has the mean of all training rows
    expected = make_datasets(log, {**log.tables, "train": table}, "session")["train"]
    shorter = replace(log, tables={**log.tables, "train": table[:-8]})
    new = with_history(shorter, check_rows(table[-8:], log), "session")
    assert_same(new, expected, order_in(expected, table)[-8:])


@HISTORIES
def test_unknown_outcomes_did_not_happen(history: str) -> None:
    log = small_log(history)
    table = log.tables["test"]
    shorter = replace(log, tables={**log.tables, "test": table[:20]})
    none = table[20:].assign(click=0, pay=0, click_time=np.nan, pay_time=np.nan)
    unlabelled = table[20:].drop(columns=["click", "pay", "click_time", "pay_time"])
    new, expected = (with_history(shorter, check_rows(rows, log), "rates") for rows in (unlabelled, none))
    assert_same(new, expected.dataset, expected.positions)


def test_published_tables_may_share_sessions(rt_tables: Path, tmp_path: Path) -> None:
    """Without a manifest a session of several splits has its features inside of each."""
    for name in ("train", "val", "test"):
        table = pd.read_csv(rt_tables / f"{name}.csv").drop(columns=["click_time", "pay_time"])
        table["visitorid"] = table.pop("sessionid") % 50
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    (tmp_path / "item_feadf.csv").write_bytes((rt_tables / "item_feadf.csv").read_bytes())
    log, splits = read_log(tmp_path), load_splits(tmp_path, "session")
    for name in ("train", "test"):
        new = with_history(log, check_rows(log.tables[name], log), "session")
        split: RetailRocketRLDataset = getattr(splits, name)
        np.testing.assert_array_equal(new.dataset.numerical[new.positions],
                                      split.numerical[order_in(split, log.tables[name])])


# ---------------------------------------------------------------------------------------------------------- candidates


@HISTORIES
def test_candidates_do_not_count_for_each_other(history: str) -> None:
    """Each has the features that it has as the only new row; also those of other sessions and times."""
    log = small_log(history)
    last = log.tables["test"].iloc[[-1, -2, -7, 3]].assign(timestamp=60_000, click=1, pay=1)
    rows = pd.concat([last.assign(itemid=item, timestamp=60_000 + 500 * item) for item in range(4)], ignore_index=True)
    together = with_history(log, check_rows(rows, log), "rates", candidates=True)
    for row in range(len(rows)):
        alone = with_history(log, check_rows(rows[row:row + 1], log), "rates")
        assert not alone.is_logged.any()
        assert_same(NewRows(together.dataset, together.positions[row:row + 1], alone.is_logged), alone.dataset,
                    alone.positions, window=4)


@HISTORIES
def test_logged_candidates_have_their_split_features(history: str) -> None:
    """Where no other row of the session, or of the user, has their time: what is at or after it does not count."""
    log = small_log(history)
    table = log.tables["test"]
    single = ~table.duplicated(["userid", "timestamp"], keep=False)
    assert 10 < single.sum() < len(table)
    expected = make_datasets(log, log.tables, "rates")["test"]
    new = with_history(log, check_rows(table[single], log), "rates", candidates=True)
    assert_same(new, expected, order_in(expected, table)[single.to_numpy()])


# -------------------------------------------------------------------------------------------------------- what is wrong


ROWS = small_log("").tables["test"]


@pytest.mark.parametrize(("rows", "expected"), [
    (ROWS.drop(columns="sessionid"), "no column 'sessionid'"),
    (ROWS.drop(columns="userid"), "no column 'userid'"),
    (ROWS.drop(columns="place"), "no column 'place'"),
    (ROWS.assign(itemid=0.5), "column 'itemid' of the rows: not whole numbers"),
    (ROWS.assign(timestamp=np.nan), "column 'timestamp' of the rows: not whole numbers"),
    (ROWS.assign(userid="a"), "column 'userid' of the rows: not numbers"),
    (ROWS.assign(click=2), "column 'click' of the rows: a label is 0 or 1"),
    (ROWS.assign(price=np.inf), "column 'price' of the rows: a number is infinite"),
    (ROWS.assign(timestamp=pd.to_datetime(ROWS["timestamp"], unit="ms")), "column 'timestamp' of the rows: dates"),
    (ROWS.assign(pay_time="soon"), "column 'pay_time' of the rows: not numbers"),
])
def test_invalid_rows_are_refused(rows: pd.DataFrame, expected: str) -> None:
    assert expected in user_error_message(lambda: check_rows(rows, small_log("")))


def test_rows_are_read_as_a_file_is() -> None:
    """Numbers and missing values of context fields, and the published name of the session."""
    log = small_log("")
    given = ROWS.rename(columns={"sessionid": "visitorid"}).assign(place=[1.0, None] * (len(ROWS) // 2))
    rows = check_rows(given.astype({"itemid": float}), log)
    assert rows["place"].unique().tolist() == ["1.0", ""]
    assert rows["itemid"].dtype == rows["sessionid"].dtype == np.int64
    new = with_history(log, rows, "none")
    column = new.dataset.fields["place"]
    assert column.values[column.codes[new.positions[0]]] == "1"
    assert column.codes[new.positions[1]] == -1

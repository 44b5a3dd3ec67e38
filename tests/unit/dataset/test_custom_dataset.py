"""docs/custom-dataset.md: its importers read their samples, its commands run on the results; what is refused."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, run_in_process, user_error_message

from common.fileio import sha256
from dataset.rtrl import RetailRocketRLDataset, Splits, load_splits
from dataset.tables import FeatureTable, PreparedDataset, order_rows, write_dataset
from dataset.vocabulary import encode_splits

PAGE = (REPOSITORY / "docs" / "custom-dataset.md").read_text(encoding="utf-8")
SMALL = ("--epoch=1", "--embed_dim=4", "--bottom_mlp_dims=8", "--tower_mlp_dims=4")


class Example:
    """An importer of the page, its sample and its commands."""

    def __init__(self, heading: str) -> None:
        section = re.search(rf"^## {heading}\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)
        assert section
        self.importer, self.sample = re.findall(r"```python\n(.*?)```", section[1], re.DOTALL)
        self.commands = [line.split() for line in re.findall(r"^    python3 (.*)$", section[1], re.MULTILINE)]

    def run(self, folder: Path, shuffle: str) -> Splits:
        """Write the sample, its rows (of the file `shuffle`) in another order, and run the commands."""
        with contextlib.chdir(folder):
            exec(compile(self.sample, "the sample", "exec"), {})
            pd.read_csv(shuffle).sample(frac=1, random_state=1).to_csv(shuffle, index=False)
        (folder / self.commands[0][0]).write_text(self.importer)
        for number, (program, *flags) in enumerate(self.commands):
            if not number:
                program = str(folder / program)
            else:
                flags += [*SMALL, *(["--epoch_updates=5", "--init_episode=5"] if program == "RLmain.py" else [])]
            result = run_in_process(folder, program, *flags)
            assert result.returncode == 0, result.stderr
        again = run_in_process(folder, str(folder / self.commands[0][0]))
        name = shuffle.removesuffix(".csv")
        assert again.returncode == 2
        assert again.stderr.startswith(f"error: dataset/{name} exists already: delete it")
        return load_splits(folder / "dataset" / name)


def parts(splits: Splits) -> list[RetailRocketRLDataset]:
    return [splits.train, splits.val, splits.test]


def test_example_with_times_of_outcomes(tmp_path: Path) -> None:
    splits = Example("A log with times of outcomes").run(tmp_path, "songs.csv")
    log = pd.read_csv(tmp_path / "songs.csv").sort_values("ms", ignore_index=True)
    assert [len(part) for part in parts(splits)] == [0.6 * len(log), 0.2 * len(log), 0.2 * len(log)]
    assert set(splits.train.fields) == {"place", "genre", "label"}
    np.testing.assert_array_equal(np.sort(np.concatenate([part.timestamp for part in parts(splits)])), log["ms"])
    for part, start in zip(parts(splits), log["ms"][[0, int(0.6 * len(log)), int(0.8 * len(log))]], strict=True):
        assert part.timestamp.min() == start
        listeners = log.set_index("ms")["listener"][part.timestamp].to_numpy()
        assert len(set(zip(part.session, listeners, strict=True))) == part.session.max() - part.session.min() + 1
        assert len(set(listeners)) == len(set(part.session))
    happened = sum(part.labels.sum(axis=0) for part in parts(splits))
    assert happened.tolist() == log[["played_ms", "bought_ms"]].notna().sum().tolist()


@pytest.mark.parametrize("task_num", [1, 3])
def test_example_with_other_tasks(tmp_path: Path, task_num: int) -> None:
    """One task, with the columns of that one alone; and the three of the page."""
    example = Example("A log with times of outcomes")
    (of_page,) = re.findall(r"  ```\n  (tasks=.*?\])\n  ```", PAGE, re.DOTALL)
    tasks = of_page if task_num == 3 else 'tasks=[{"name": "play", "label": "click"}]'
    example.importer, changes = re.subn(r"tasks=\[.*\](?=\)\n)", tasks, example.importer)
    pay = re.search(r' *"pay": .*,\n', example.importer)
    assert changes == 1
    assert pay
    example.importer = example.importer.replace(pay[0], pay[0] + '"like": log["ms"] % 2,' if task_num == 3 else "")
    example.sample = example.sample.replace("20_000", "2_000")
    splits = example.run(tmp_path, "songs.csv")
    assert splits.task_names == ["play", "buy", "like"][:task_num]
    assert splits.given == {1: None, 3: [-1, 0, -1]}[task_num]
    assert len([*(tmp_path / "chkpt" / "RL" / "res_TD3BC_songs_esmm").glob("critic*.pth")]) == 2 * task_num


def test_example_of_impressions_and_labels(tmp_path: Path) -> None:
    """The history is the user's; the item is a field; prices and hours are numbers, the mean where missing."""
    splits = Example("Impressions and labels").run(tmp_path, "shown.csv")
    log = pd.read_csv(tmp_path / "shown.csv")
    assert set(splits.train.fields) == {"itemid"}
    assert splits.train.numerical_names[-2:] == ["price", "hour"]
    assert sum(map(len, parts(splits))) == len(log)
    price = log.set_index(["user", "item", "ms"])["price"]
    train_mean = price[pd.MultiIndex.from_arrays([splits.train.user, splits.train.itemid,
                                                  splits.train.timestamp])].mean()
    for part in parts(splits):
        rows = pd.MultiIndex.from_arrays([part.user, part.itemid, part.timestamp])
        np.testing.assert_allclose(part.numerical[:, -2], price[rows].fillna(train_mean), rtol=1e-6)
        np.testing.assert_array_equal(part.numerical[:, -1], part.timestamp // 3_600_000 % 24)
        field = part.fields["itemid"]
        assert field.values[field.codes].tolist() == part.itemid.astype(str).tolist()
        earlier = [int(((log["user"] == user) & (log["ms"] < ms)).sum())
                   for user, ms in zip(part.user[:50], part.timestamp[:50], strict=True)]
        np.testing.assert_allclose(np.expm1(part.numerical[:50, 0]), earlier, rtol=1e-5)


def test_example_of_events(tmp_path: Path) -> None:
    """Against a loop over the events: each belongs to the last view of the item by the user."""
    splits = Example("A log of events").run(tmp_path, "events.csv")
    events = pd.read_csv(tmp_path / "events.csv")
    kinds = {"view": 0, "click": 1, "cart": 2, "buy": 3}
    expected: dict[tuple[int, int, int], list[int]] = {}
    last: dict[tuple[int, int], int] = {}
    order = events["event"].map(kinds)
    for row in events.assign(kind=order).sort_values(["ms", "kind"]).itertuples():
        if row.kind == 0:
            last[row.user, row.item] = row.ms
            expected[row.user, row.item, row.ms] = [0, 0]
        elif (row.user, row.item) in last:
            labels = expected[row.user, row.item, last[row.user, row.item]]
            labels[0], labels[1] = 1, int(labels[1] or row.kind == 3)
    found = {key: labels for part in parts(splits) for key, labels in zip(
        zip(part.user.tolist(), part.itemid.tolist(), part.timestamp.tolist(), strict=True),
        part.labels.astype(int).tolist(), strict=True)}
    assert found == expected


# ------------------------------------------------------------------------------------------------- one small data set


def small(items: dict[str, Any] | None = None, drop: tuple[str, ...] = (), **changes: Any) -> PreparedDataset:
    """Two rows a split, of user 1 and 2, in seconds 1 to 6, with a table of items; `changes` are entries or columns."""
    rows = pd.DataFrame({"split": [0, 0, 1, 1, 2, 2], "sessionid": range(6), "timestamp": 1000 * np.arange(1, 7),
                         "itemid": [1, 2, 1, 2, 1, 3], "userid": [1, 2, 1, 2, 1, 2], "click": [1, 0, 1, 0, 1, 0],
                         "pay": [0, 0, 1, 0, 0, 0]})
    entries = {name: value for name, value in changes.items() if name in PreparedDataset.__dataclass_fields__}
    rows = rows.assign(**{name: value for name, value in changes.items() if name not in entries}).drop(columns=[*drop])
    table = pd.DataFrame({"itemid": [1, 2], "color": ["red", "blue"], **(items or {})})
    return PreparedDataset(**{
        "source": "by hand", "rows": order_rows(rows), "row_counts": [], "inputs": [],
        "feature_tables": {"item_feadf.csv": FeatureTable("itemid", table)}, "context": [], "long_tailed": [],
        "history_key": "userid", "tasks": [{"name": "CTR", "label": "click"}, {"name": "CTCVR", "label": "pay"}],
        **entries})


def written(dataset: PreparedDataset, folder: Path) -> Splits:
    write_dataset(dataset, folder / "mine", settings={})
    return load_splits(folder / "mine")


def test_history_without_a_table(tmp_path: Path) -> None:
    """The features are those of the same users with a table."""
    users = FeatureTable("userid", pd.DataFrame({"userid": [1, 2], "age": ["old", "young"]}))
    dataset = small()
    plain = written(dataset, tmp_path / "plain")
    with_table = written(replace(dataset, feature_tables={**dataset.feature_tables, "user_feadf.csv": users}),
                         tmp_path / "table")
    for one, other in zip(parts(plain), parts(with_table), strict=True):
        np.testing.assert_array_equal(one.numerical, other.numerical)
        np.testing.assert_array_equal(one.user, other.user)
    assert plain.test.numerical[0, 0] == pytest.approx(np.log1p(2)), "two earlier rows of user 1"


def test_numbers_by_hand(tmp_path: Path) -> None:
    """Of items, item 3 is missing from the table, and of rows, one cell is empty: the mean of train."""
    dataset = small({"price": [2.0, 4.0]}, age=[10, np.nan, 30, 40, 50, np.nan], context=["age"],
                    numbers=["price", "age"])
    splits = written(dataset, tmp_path)
    assert splits.manifest["categorical"] == ["color"]
    assert [part.numerical[:, -2:].tolist() for part in parts(splits)] == [
        [[2, 10], [4, 10]], [[2, 30], [4, 40]], [[2, 50], [3, 10]]]
    assert splits.train.numerical_names[-2:] == ["price", "age"]
    assert load_splits(tmp_path / "mine", "session").train.numerical_names[-2:] == ["price", "age"]
    assert load_splits(tmp_path / "mine", "none").train.numerical_names == ["zero"]


def test_numbers_missing_in_train_are_zero(tmp_path: Path) -> None:
    splits = written(small(age=[np.nan, np.nan, 30, 40, np.nan, 6], context=["age"], numbers=["age"]), tmp_path)
    assert [part.numerical[:, -1].tolist() for part in parts(splits)] == [[0, 0], [30, 40], [0, 6]]


def test_id_fields_have_ids_without_table(tmp_path: Path) -> None:
    """Every id of train is a value, whether or not the table has it; one that train has not is unknown."""
    splits = written(small(id_fields=["itemid", "userid"], rates=["itemid"]), tmp_path)
    encode_splits(splits, 0.2)
    assert list(splits.train.fields) == ["color", "itemid", "userid"]
    assert splits.train.field_dims == [3, 3, 3]
    assert splits.test.categorical[:, 1:].tolist() == [[1, 1], [0, 2]]
    assert [name for name in splits.train.numerical_names if name.startswith("itemid")] == [
        "itemid count", "itemid click rate", "itemid pay rate"]


def test_the_fingerprint_depends_on_the_numbers(tmp_path: Path) -> None:
    dataset = small(age=range(6), context=["age"], numbers=["age"])
    fingerprint = written(dataset, tmp_path).fingerprint
    manifest = json.loads((tmp_path / "mine" / "manifest.json").read_text())
    changed = {**manifest, "numbers": [], "categorical": ["color"]}
    (tmp_path / "mine" / "manifest.json").write_text(json.dumps(changed))
    assert load_splits(tmp_path / "mine").fingerprint != fingerprint


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "label 2": ({"click": [1, 0, 2, 0, 1, 0]}, "val.csv, line 2, column 'click': '2' is not a label"),
    "label in words": ({"pay": ["no"] * 6}, "train.csv, line 2, column 'pay': 'no' is not a number"),
    "id missing": ({"itemid": [1, np.nan, 1, 1, 1, 1]}, "train.csv, line 3, column 'itemid': is empty"),
    "id in words": ({"userid": list("abcdef")}, "train.csv, line 2, column 'userid': 'a' is not a number"),
    "time with a fraction": ({"click_time": [1000.5] * 6}, "column 'click_time': '1000.5' is not a whole number"),
    "number infinite": ({"items": {"price": [1.0, np.inf]}, "numbers": ["price"]},
                        "item_feadf.csv, line 3, column 'price': 'inf' is not a finite number"),
    "number too large": ({"age": [1e39] * 6, "context": ["age"], "numbers": ["age"]},
                         "train.csv, line 2, column 'age': '1e+39' is too large for a number"),
    "number in words": ({"age": ["old"] * 6, "context": ["age"], "numbers": ["age"]}, "'old' is not a number"),
    "key twice": ({"items": {"itemid": [1, 1]}}, "item_feadf.csv, line 3, column 'itemid': duplicate item 1"),
    "name twice": ({"items": {"click": ["a", "b"]}, "context": ["click"]}, "name 'click' is not unique"),
    "unknown number": ({"numbers": ["price"]}, "'numbers' contains unknown field 'price'"),
    "unknown rate": ({"rates": ["colour"]}, "'rates' contains unknown field 'colour'"),
    "task of no name": ({"tasks": [{"name": "", "label": "click"}, {"name": "B", "label": "pay"}]}, "'tasks' is"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_readers_refuse_is_not_written(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    """And the message names the place as if the folder were there."""
    dataset = small(**changes)
    text = user_error_message(lambda: write_dataset(dataset, tmp_path / "mine", settings={}))
    assert text.startswith(f"not written: {tmp_path / 'mine'}")
    assert reason in text
    assert not [*tmp_path.iterdir()]


def test_missing_or_misspelt_columns_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert user_error_message(lambda: small(clik_time=1)).startswith(
        "rows: column 'clik_time' is the time of no label (click, pay): is it misspelt?")
    assert "rows: column 'userid' is missing" in user_error_message(lambda: small(drop=("userid",)))
    assert "is 'clik' misspelt?" in user_error_message(lambda: small(drop=("click",), clik=1))
    assert not capsys.readouterr().out
    small(note="x", more="y")
    assert capsys.readouterr().out == "rows: not used, since no entry of the manifest names them: note, more\n"


@pytest.mark.parametrize(("column", "value", "reason"), [
    ("timestamp", pd.date_range("2024-01-01", periods=6), "'timestamp' is not of whole numbers (datetime64"),
    ("sessionid", list("abcdef"), "'sessionid' is not of whole numbers"),
    ("split", [0, 0, 1, 1, 2, np.nan], "'split' is not of whole numbers (float64): 0: train, 1: val, 2: test")])
def test_order_of_rows_needs_whole_numbers(column: str, value: Any, reason: str) -> None:
    assert reason in user_error_message(lambda: small(**{column: value}))


# --------------------------------------------------------------------------------------------------- tables by hand


def edit(folder: Path, name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Change a table of a folder, and its checksum in the manifest."""
    table = change(pd.read_csv(folder / name, dtype=str, keep_default_na=False))
    table.to_csv(folder / name, index=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["outputs"][name] = sha256(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_tables_without_times_of_outcomes(tmp_path: Path) -> None:
    """The features are those of outcomes that are known with their rows, since no two rows are of the same time."""
    splits = written(small(), tmp_path)
    for name in ("train.csv", "val.csv", "test.csv"):
        edit(tmp_path / "mine", name, lambda table: table.drop(columns=["click_time", "pay_time"]))
    for one, other in zip(parts(splits), parts(load_splits(tmp_path / "mine")), strict=True):
        np.testing.assert_array_equal(one.numerical, other.numerical)


def test_times_must_be_in_all_splits(tmp_path: Path) -> None:
    written(small(), tmp_path)
    edit(tmp_path / "mine", "val.csv", lambda table: table.drop(columns=["pay_time"]))
    assert "val.csv: column 'pay_time' is in it or in train.csv, not in both" in user_error_message(
        lambda: load_splits(tmp_path / "mine"))


def test_misspelt_time_of_an_outcome_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(small(), tmp_path)
    edit(tmp_path / "mine", "test.csv", lambda table: table.assign(note="x"))
    load_splits(tmp_path / "mine")
    assert "test.csv, line 1: not used, since no entry of the manifest names them: note" in capsys.readouterr().out
    edit(tmp_path / "mine", "train.csv", lambda table: table.rename(columns={"click_time": "clik_time"}))
    assert "train.csv, line 1: column 'clik_time' is the time of no label" in user_error_message(
        lambda: load_splits(tmp_path / "mine"))


def test_ties_in_time_are_deterministic(tmp_path: Path) -> None:
    """Two rows of a user at the same time: neither's outcome is known to the other, and both orders sort alike."""
    rows = pd.DataFrame({"split": [0, 0, 0, 1, 2], "sessionid": [1, 1, 1, 2, 3], "timestamp": [5, 5, 9, 20, 30],
                         "itemid": [2, 1, 1, 1, 1], "click": [1, 1, 0, 0, 0], "pay": 0})
    found = []
    for number, order in enumerate(([0, 1, 2, 3, 4], [4, 1, 3, 0, 2])):
        given = rows.iloc[order].sort_values(["timestamp", "itemid"])
        dataset = replace(small(), rows=order_rows(given), history_key="", rates=["color"])
        found.append(written(dataset, tmp_path / str(number)).train)
    np.testing.assert_array_equal(found[0].numerical, found[1].numerical)
    assert found[0].itemid.tolist() == [1, 2, 1]
    names = found[0].numerical_names
    assert found[0].numerical[:2, names.index("last_click")].tolist() == [0, 0]
    np.testing.assert_allclose(found[0].numerical[:, names.index("click_rate")], [0, 0, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(np.expm1(found[0].numerical[:, names.index("color count")]), [0, 0, 1], atol=1e-6)


# ------------------------------------------------------------------------------------------------- what a task implies


def test_contradictions_of_given_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a log with a purchase without a click; where `given` is left out, the row is printed instead."""
    def write(name: str, **given: str) -> Path:
        tasks = [{"name": "CTR", "label": "click"}, {"name": "CTCVR", "label": "pay", **given}]
        write_dataset(small(pay=[0, 1, 1, 0, 0, 0], tasks=tasks), tmp_path / name, {})
        return tmp_path / name

    words = "line 3, column 'pay': 1, but 'click', which it implies, is 0 (1 such rows)"
    message = user_error_message(lambda: write("refused", given="CTR"))
    assert message == f"not written: {tmp_path / 'refused' / 'train.csv'}, {words}"
    load_splits(write("independent", given=""))
    assert words not in capsys.readouterr().out
    load_splits(write("by default"))
    assert f"{tmp_path / 'by default' / 'train.csv'}, {words}\n" in capsys.readouterr().out

"""manifest.json: what is refused, and what the fingerprint depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import user_error_message

from common.fileio import sha256
from dataset.retailrocket import PROPERTIES
from dataset.rtrl import Splits, load_splits
from dataset.tables import SPLITS

TASK = {"name": "CTR", "label": "click"}


@pytest.fixture(scope="module")
def splits(rt_tables: Path) -> Splits:
    return load_splits(rt_tables)


def change_manifest(folder: Path, **changes: Any) -> Path:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize("changes", [{"outputs": None}, {"outputs": []}, {"categorical": "785"}, {"tasks": ["click"]},
                                     {"tasks": [{"name": "CTR"}]}, {"long_tailed": None}, {"categorical": []},
                                     {"categorical": [["785"]]}, {"context": [[]]}, {"long_tailed": ["colour"]},
                                     {"tasks": []}, {"tasks": [TASK] * 2},
                                     {"tasks": [{"name": f"t{number}", "label": f"l{number}"} for number in range(17)]},
                                     {"tasks": [TASK, {"name": "B", "label": "pay", "given": "pay"}]},
                                     {"tasks": [{**TASK, "given": "B"}, {"name": "B", "label": "pay", "given": ""}]},
                                     {"tasks": [TASK, {"name": "B", "label": "pay"}, {"name": "C", "label": "like"}]},
                                     {"tasks": [{"name": "a$b", "label": "click"}, {"name": "B", "label": "pay"}]},
                                     {"tasks": [{"name": "A", "label": "click"}, {"name": "B", "label": "click"}]},
                                     {"tasks": [{"name": "A", "label": "timestamp"}, {"name": "B", "label": "pay"}]},
                                     {"categorical": ["785", "785"]}, {"format": 2}, {"simulation": None}], ids=str)
def test_an_invalid_manifest_is_refused(tables: Path, changes: dict[str, Any]) -> None:
    assert str(change_manifest(tables, **changes)) in user_error_message(lambda: load_splits(tables))


@pytest.mark.parametrize("name", ["../x.csv", "sub/x.csv", ".."])
def test_a_file_outside_the_directory_is_refused(tables: Path, name: str) -> None:
    (tables.parent / "x.csv").write_text("a,b\n")
    outputs = json.loads((tables / "manifest.json").read_text())["outputs"]
    path = change_manifest(tables, outputs={**outputs, name: sha256(tables.parent / "x.csv")})
    message = user_error_message(lambda: load_splits(tables))
    assert message == f"{path}: '{name}' of 'outputs' is not a file name: must be a file in the manifest's directory"


@pytest.mark.parametrize("name", ["train.csv", "item_feadf.csv"])
def test_outputs_must_contain_every_table(tables: Path, name: str) -> None:
    outputs = json.loads((tables / "manifest.json").read_text())["outputs"]
    path = change_manifest(tables, outputs={key: value for key, value in outputs.items() if key != name})
    message = user_error_message(lambda: load_splits(tables))
    assert str(path) in message
    assert name in message


def test_an_unknown_field_is_named(tables: Path) -> None:
    fields = [*PROPERTIES, "colour"]
    change_manifest(tables, categorical=fields)
    assert "'categorical' contains unknown field 'colour'" in user_error_message(lambda: load_splits(tables))
    change_manifest(tables, categorical=fields, tables={"item_feadf.csv": {"key": "itemid", "fields": fields}})
    message = user_error_message(lambda: load_splits(tables))
    assert message.startswith(f"{tables / 'item_feadf.csv'}, line 1: column 'colour' is missing")


def test_a_missing_file_is_named(tables: Path) -> None:
    (tables / "truth.csv").unlink()
    assert user_error_message(lambda: load_splits(tables)).startswith(f"{tables}: truth.csv missing")


@pytest.mark.parametrize("name", ["train.csv", "val.csv", "test.csv", "item_feadf.csv", "truth.csv"])
def test_an_edited_table_is_refused(tables: Path, name: str) -> None:
    *lines, last = (tables / name).read_text().splitlines()
    (tables / name).write_text("\n".join([*lines, ("3" if last[0] != "3" else "2") + last[1:]]) + "\n")
    message = user_error_message(lambda: load_splits(tables))
    assert message.startswith(f"{tables / name}: ")
    assert "SHA-256" in message


def test_a_truncated_table_is_refused(tables: Path) -> None:
    text = (tables / "train.csv").read_text()
    (tables / "train.csv").write_text(text[: len(text) // 2])
    message = user_error_message(lambda: load_splits(tables))
    assert message.startswith(str(tables / "train.csv"))
    assert "cut short" in message


def test_a_misspelt_column_is_named(tables: Path) -> None:
    text = (tables / "val.csv").read_text()
    (tables / "val.csv").write_text(text.replace("click,", "clik,", 1))
    message = user_error_message(lambda: load_splits(tables))
    assert "column 'click' is missing" in message
    assert "clik" in message


def test_the_fingerprint_depends_on_the_schema(tables: Path, splits: Splits) -> None:
    """A model of clicks and purchases is none of purchases and clicks."""
    change_manifest(tables, tasks=[{"name": "CTR", "label": "pay"}, {"name": "CTCVR", "label": "click"}])
    assert load_splits(tables).fingerprint != splits.fingerprint
    change_manifest(tables, tasks=splits.manifest["tasks"], source="renamed")
    assert load_splits(tables).fingerprint == splits.fingerprint


@pytest.mark.parametrize(("changes", "reason"), [
    ({"categorical": [*PROPERTIES, "785"]}, "name '785' is not unique"),
    ({"long_tailed": ["colour"]}, "'long_tailed' contains unknown field 'colour'"),
    ({"history": 7}, "'history' is the name of an id of the rows, not 7"),
    ({"numbers": ["785"]}, "name '785' is not unique"), ({"numbers": "785"}, "'numbers' is a list of fields"),
    ({"numbers": ["price"]}, "'numbers' contains unknown field 'price'"),
    ({"id_fields": ["itemid"]}, "'id_fields' contains unknown field 'itemid': it is not in 'categorical'"),
    ({"outputs": None}, "'outputs' is missing or of the wrong type")], ids=[
        "duplicate", "unknown", "history", "number and category", "numbers", "number", "id", "type"])
def test_errors_name_the_entry(tables: Path, changes: dict[str, Any], reason: str) -> None:
    path = change_manifest(tables, **changes)
    assert user_error_message(lambda: load_splits(tables)).startswith(f"{path}: {reason}")


@pytest.mark.parametrize(("tasks", "expected"), [
    ([TASK], None), ([TASK, {"name": "B", "label": "pay"}], None),
    ([TASK, {"name": "B", "label": "pay", "given": ""}], [-1, -1]),
    ([TASK, {"name": "B", "label": "pay", "given": "CTR"}], [-1, 0]),
    ([TASK, {"name": "B", "label": "pay", "given": "CTR"}, {"name": "C", "label": "available", "given": "B"}],
     [-1, 0, 1])], ids=str)
def test_tasks_and_what_they_are_given(tables: Path, tasks: list[dict[str, str]], expected: list[int] | None) -> None:
    for name in SPLITS:  # a third label: nothing is available
        path = tables / f"{name}.csv"
        unused = {"click_time", "pay_time"} - {f"{task['label']}_time" for task in tasks}
        pd.read_csv(path).assign(available=0).drop(columns=unused).to_csv(path, index=False)
    fields = [field for field in PROPERTIES if field != "available"]
    outputs = json.loads((tables / "manifest.json").read_text())["outputs"]
    del outputs["truth.csv"]
    items = tables / "item_feadf.csv"
    pd.read_csv(items, dtype=str)[["itemid", *fields]].to_csv(items, index=False)
    change_manifest(tables, tasks=tasks, categorical=fields, outputs={name: sha256(tables / name) for name in outputs},
                    tables={"item_feadf.csv": {"key": "itemid", "fields": fields}})
    splits = load_splits(tables)
    assert splits.given == expected == splits.val.metadata["given"]
    assert splits.task_names == [task["name"] for task in tasks]
    assert splits.train.labels.shape == (len(splits.train), len(tasks))
    assert splits.train.numerical_num == 2 + 2 * len(tasks)


def test_first_tasks_keep_all_features(rt_tables: Path, splits: Splits) -> None:
    one = load_splits(rt_tables, task_num=1)
    assert one.task_names == one.train.metadata["tasks"] == ["CTR"]
    assert one.test.labels.tolist() == splits.test.labels[:, :1].tolist()
    assert one.test.numerical.tolist() == splits.test.numerical.tolist()
    assert one.fingerprint == splits.fingerprint
    message = user_error_message(lambda: load_splits(rt_tables, task_num=3))
    assert message == f"--task_num: 3, but {rt_tables} has 2: CTR, CTCVR"

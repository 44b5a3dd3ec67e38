"""docs/custom-dataset.md: its importer reads its sample, and its commands run on the result."""

from __future__ import annotations

import contextlib
import io
import re
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, run_in_process, user_error_message

from dataset.rtrl import load_splits
from dataset.tables import FeatureTable, PreparedDataset, order_rows, write_dataset

NUM_ROWS = 20_000  # of the page's sample
SMALL = ("--epoch=1", "--embed_dim=4", "--bottom_mlp_dims=8", "--tower_mlp_dims=4")


PAGE = (REPOSITORY / "docs" / "custom-dataset.md").read_text(encoding="utf-8")
IMPORTER, SAMPLE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def follow_page(folder: Path, importer: str, num_rows: int) -> pd.DataFrame:
    """Do what the page says; return the log."""
    commands = re.findall(r"^    python3 (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 4
    (folder / "songs.py").write_text(importer)
    with contextlib.chdir(folder):
        exec(compile(SAMPLE.replace("20_000", str(num_rows)), "the sample", "exec"), {})
        log = pd.read_csv("songs.csv")
        log.sample(frac=1, random_state=1).to_csv("songs.csv", index=False)  # the order of the file does not matter
    for command in commands:
        program, *flags = command.split()
        if program == "songs.py":
            program = str(folder / program)
        else:
            flags += [*SMALL, *(["--epoch_updates=5", "--init_episode=5"] if program == "RLmain.py" else [])]
        result = run_in_process(folder, program, *flags)
        assert result.returncode == 0, result.stderr
    return log


@pytest.mark.parametrize("task_num", [1, 3])
def test_the_page_with_other_tasks(tmp_path: Path, task_num: int) -> None:
    of_page = textwrap.dedent(re.findall(r"  ```\n(  tasks=.*?)  ```", PAGE, re.DOTALL)[0])
    tasks = of_page if task_num == 3 else 'tasks=[{"name": "play", "label": "click"}]'
    importer, changes = re.subn(r"tasks=\[.*\](?=\)\n)", lambda _: tasks.strip(), IMPORTER)
    assert changes == 1
    importer = importer.replace('"pay_time": log["bought_ms"],', '"pay_time": log["bought_ms"], "like": log["ms"] % 2,')
    follow_page(tmp_path, importer, 2000)
    splits = load_splits(tmp_path / "dataset" / "songs")
    assert splits.task_names == ["play", "buy", "like"][:task_num]
    assert splits.given == {1: None, 3: [-1, 0, -1]}[task_num]
    agent = tmp_path / "chkpt" / "RL" / "res_TD3BC_songs_esmm"
    assert len([*agent.glob("critic*.pth")]) == 2 * task_num


def test_tasks_that_contradict_given_are_refused(tmp_path: Path) -> None:
    rows = pd.DataFrame({"split": [0, 1, 2], "sessionid": [0, 1, 2], "timestamp": [0, 1, 2], "itemid": 1,
                         "click": [1, 0, 0], "like": [1, 1, 0]})
    items = {"item_feadf.csv": FeatureTable("itemid", pd.DataFrame({"itemid": [1], "genre": ["a"]}))}

    def write(name: str, given: dict[str, str]) -> Path:
        tasks = [{"name": "CTR", "label": "click"}, {"name": "like", "label": "like", **given}]
        write_dataset(PreparedDataset("log", order_rows(rows), [], [], items, [], [], tasks), tmp_path / name, {})
        return tmp_path / name

    message = user_error_message(lambda: write("a", {"given": "CTR"}))
    assert message == f"{tmp_path / 'a'}: 1 rows where 'like' is 1 and 'click', which it implies, is 0"
    load_splits(write("independent", {"given": ""}))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        load_splits(write("by default", {}))
    assert printed.getvalue().strip().endswith("val.csv: 1 rows where 'like' is 1 and 'click', which it implies, is 0")


def test_the_page_on_custom_data_sets(tmp_path: Path) -> None:
    log = follow_page(tmp_path, IMPORTER, NUM_ROWS)
    splits = load_splits(tmp_path / "dataset" / "songs")
    parts = [splits.train, splits.val, splits.test]
    assert [len(part) for part in parts] == [0.6 * NUM_ROWS, 0.2 * NUM_ROWS, 0.2 * NUM_ROWS]
    assert set(splits.train.fields) == {"place", "genre", "label"}
    np.testing.assert_array_equal(np.sort(np.concatenate([part.timestamp for part in parts])), log["ms"])
    for part, start in zip(parts, log["ms"][[0, int(0.6 * NUM_ROWS), int(0.8 * NUM_ROWS)]], strict=True):
        assert part.timestamp.min() == start
        listeners = log.set_index("ms")["listener"][part.timestamp].to_numpy()
        assert len(set(zip(part.session, listeners, strict=True))) == part.session.max() - part.session.min() + 1
        assert len(set(listeners)) == len(set(part.session))
    happened = sum(part.labels.sum(axis=0) for part in parts)
    assert happened.tolist() == log[["played_ms", "bought_ms"]].notna().sum().tolist()

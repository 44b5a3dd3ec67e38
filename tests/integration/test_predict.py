"""predict.py and `load_model(path).predict`: the scores of rows are the predictions of the model."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, read_tree, run_in_process, user_error_message
from torch.utils.data import DataLoader

import SLmain
from common.checkpoint import load_tensors, save_tensors
from common.fileio import sha256
from dataset.loader import TensorLoader
from dataset.rtrl import load_splits
from slmodels.model_file import load_model
from train.run import slpred

TINY: dict[str, Any] = {"embed_dim": 4, "bottom_mlp_dims": (8,), "tower_mlp_dims": (4,), "device": "cpu", "epoch": 1}
PLAIN, GRU = Path("pretrain/rt_esmm.pt"), Path("pretrain/rt_esmm_gru.pt")
MODELS = pytest.mark.parametrize("path", [PLAIN, GRU], ids=["plain", "gru"])
TASKS = ["CTR", "CTCVR"]
TEST = Path("dataset/rt/test.csv")


@pytest.fixture(scope="module")
def trained(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with two models, one of which reads the session. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(rt_tables, folder / "dataset" / "rt")
    with contextlib.chdir(folder):
        SLmain.main(**TINY)
        SLmain.main(**TINY, encoder="gru", window=4)
    return folder


@pytest.fixture
def here(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process in that folder; nothing that was there changes."""
    monkeypatch.chdir(trained)
    before = read_tree(trained)
    yield trained
    assert {name: content for name, content in read_tree(trained).items() if name in before} == before


def predictions(path: Path) -> Any:
    """Of the test split (n, T), in the order of its file, by the documented functions."""
    model, split = load_model(path), load_splits(Path("dataset/rt")).test
    model.catemapper.map(split)
    loader = TensorLoader(split, 512, window=model.window) if model.window else DataLoader(split, 512)
    return np.column_stack(slpred(model, loader, 2, "cpu"))


def predict(*flags: str, folder: Path = Path()) -> str:
    result = run_in_process(folder, "predict.py", *flags, "--device=cpu")
    assert result.returncode == 0, result.stderr
    return result.stdout


def error_of(*flags: str) -> str:
    result = run_in_process(Path(), "predict.py", *flags)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


# ---------------------------------------------------------------------------------------------------------- the program


@MODELS
@pytest.mark.parametrize("flags", [["--split=test"], [f"--rows={TEST}"], [f"--rows={TEST}", "--candidates"]],
                         ids=["split", "rows", "candidates"])
def test_scores_of_test_rows_are_predictions(path: Path, flags: list[str], here: Path, tmp_path: Path) -> None:
    """Candidates, too: what was shown next was one. Rows have their ids, in the order of the file."""
    printed = predict(f"--model={path}", *flags, f"--out={tmp_path / 'scores.csv'}")
    scores, rows = pd.read_csv(tmp_path / "scores.csv"), pd.read_csv(TEST)
    assert list(scores) == ["timestamp", "sessionid", "itemid", *TASKS]
    pd.testing.assert_frame_equal(scores[["timestamp", "sessionid", "itemid"]],
                                  rows[["timestamp", "sessionid", "itemid"]])
    single = ~rows.duplicated(["sessionid", "timestamp"], keep=False) if "--candidates" in flags else slice(None)
    np.testing.assert_allclose(scores[TASKS][single], predictions(path)[single], rtol=0, atol=1e-6)
    assert printed.startswith(f"{len(rows):,} rows")
    assert printed.endswith(f"saved {tmp_path / 'scores.csv'}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]


@MODELS
def test_labels_and_order_do_not_matter(path: Path, here: Path, tmp_path: Path) -> None:
    """Of rows that the log has: it knows their outcomes."""
    rows = pd.read_csv(TEST)[["itemid", "sessionid", "timestamp"]].sample(frac=0.7, random_state=1)
    rows.to_csv(tmp_path / "new.csv", index=False)
    predict(f"--model={path}", f"--rows={tmp_path / 'new.csv'}", f"--out={tmp_path / 'scores.csv'}")
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert scores["itemid"].tolist() == rows["itemid"].tolist()
    np.testing.assert_allclose(scores[TASKS], predictions(path)[rows.index], rtol=0, atol=1e-6)


def test_unknown_values_and_items_are_counted(here: Path, tmp_path: Path) -> None:
    rows = pd.read_csv(TEST)[:40][["timestamp", "sessionid", "itemid"]]
    rows["timestamp"] += 10**9
    rows.loc[:2, "itemid"] = 10**6
    rows.to_csv(tmp_path / "new.csv", index=False)
    lines = predict(f"--model={PLAIN}", f"--rows={tmp_path / 'new.csv'}", f"--out={tmp_path / 'o.csv'}").splitlines()
    assert lines[0] == "40 rows, 40 of them not in the log of dataset/rt"
    assert lines[1] == "no column click, pay: outcomes of new rows count as not having happened"
    assert lines[2] == "itemid: 3 rows have one that is not in item_feadf.csv: its fields count as missing"
    items = pd.read_csv("dataset/rt/item_feadf.csv", dtype=str, keep_default_na=False).set_index("itemid")
    known = load_model(PLAIN).catemapper.ids
    for field, ids in known.items():
        values = [value for value in items.loc[rows["itemid"][3:].astype(str), field] if value and value not in ids]
        line = (f"{field}: {len(values)} rows have one of {len(set(values))} values that the model does not know "
                "(unseen or rare in training)")
        assert (line in lines) == bool(values)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_export_writes_the_model(suffix: str, here: Path, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    assert predict(f"--model={PLAIN}", f"--export={path}") == f"saved {path}\n"
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_size > 1000


def test_a_missing_column_names_file_and_column(here: Path, tmp_path: Path) -> None:
    pd.read_csv(TEST).drop(columns="sessionid").to_csv(tmp_path / "new.csv", index=False)
    for path in (PLAIN, GRU):
        message = error_of(f"--model={path}", f"--rows={tmp_path / 'new.csv'}")
        assert "new.csv, line 1: column 'sessionid' is missing" in message


@pytest.mark.parametrize(("flags", "expected"), [
    ([], "--model: the file of a model is needed"),
    (["--model=no.pt", "--split=test"], "no.pt: no such file"),
    ([f"--model={PLAIN}"], "give one of --rows=NEW.csv, --split=test and --export=model.onnx"),
    ([f"--model={PLAIN}", "--split=test", "--export=m.pt2"], "one of --rows=NEW.csv"),
    ([f"--model={PLAIN}", "--export=m.h5"], "m.h5: unknown format '.h5'"),
    ([f"--model={PLAIN}", "--rows=no.csv"], "no.csv: no such file"),
    ([f"--model={PLAIN}", "--split=test", "--dataset_name=other"], "dataset/other: no such data set"),
    ([f"--model={PLAIN}", "--split=tset"], "did you mean test"),
    ([f"--model={PLAIN}", "--split=test", "--out=dataset"], "dataset: cannot write: path is a directory"),
])
def test_mistakes_are_one_line(flags: list[str], expected: str, here: Path) -> None:
    assert expected in error_of(*flags)


# ------------------------------------------------------------------------------------------------------- from a program


@MODELS
def test_predict_of_a_loaded_model(path: Path, here: Path) -> None:
    """A table in any order; the result has its index."""
    rows = pd.read_csv(TEST).sample(frac=1, random_state=3)
    scores = load_model(path).predict(rows)
    assert list(scores) == TASKS
    assert scores.index.equals(rows.index)
    np.testing.assert_allclose(scores, predictions(path)[rows.index], rtol=0, atol=1e-6)
    model = load_model(path)
    with torch.no_grad():
        by_hand = model(*model.encode(rows))  # type: ignore[operator]
    np.testing.assert_allclose(scores, by_hand, rtol=0, atol=1e-6)
    for dataset in ("dataset/rt", "dataset", TEST):
        again = load_model(path, dataset=dataset).predict(rows[:9])
        np.testing.assert_allclose(again, scores[:9], rtol=0, atol=1e-6)
    assert load_model(path).predict(rows[:0]).shape == (0, 2)


def test_another_data_set_of_equal_columns(here: Path, tmp_path: Path) -> None:
    """A log that has grown since the training: its fingerprint differs, its columns do not."""
    folder = Path(shutil.copytree("dataset/rt", tmp_path / "grown"))
    rows = pd.read_csv(TEST)
    rows[:-30].to_csv(folder / "test.csv", index=False)
    truth = pd.read_csv(folder / "truth.csv")
    truth[:-30].to_csv(folder / "truth.csv", index=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["outputs"] |= {name: sha256(folder / name) for name in ("test.csv", "truth.csv")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    scores = load_model(PLAIN, dataset=folder).predict(rows[-30:])
    np.testing.assert_allclose(scores, predictions(PLAIN)[-30:], rtol=0, atol=1e-6)
    assert "grown is not the data that the model was trained on" in scores.attrs["notes"][1]


@pytest.mark.parametrize(("change", "expected"), [
    ({"tasks": ["CTR", "like"]}, "the model has the tasks CTR, like, but"),
    ({"features": "0" * 16}, "its features are computed in another way than this version does"),
    ({"data": "0" * 16, "numerical_names": ["a", "b"]}, "the model has the numerical features a, b, but"),
    ({"catemapper": None}, "has no vocabulary"),
    ({"dataset_name": ""}, "does not say which data set it was trained on"),
    ({"format": 2}, "of an earlier version"),
])
def test_models_of_other_data_are_refused(change: dict[str, Any], expected: str, here: Path, tmp_path: Path) -> None:
    save_tensors(tmp_path / "model.pt", {**load_tensors(PLAIN, ""), **change})
    assert expected in user_error_message(lambda: load_model(tmp_path / "model.pt").predict(pd.read_csv(TEST)))


def test_a_field_missing_from_the_data(here: Path, tmp_path: Path) -> None:
    saved = load_tensors(PLAIN, "")
    saved["catemapper"]["ids"] = {"brand" if name == "785" else name: values
                                  for name, values in saved["catemapper"]["ids"].items()}
    save_tensors(tmp_path / "model.pt", saved)
    message = user_error_message(lambda: load_model(tmp_path / "model.pt").predict(pd.read_csv(TEST)))
    assert "the model has the field 'brand', but" in message


def test_the_page_on_serving(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/serving.md: its commands and programs run, in a copy of the folder."""
    page = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    folder = Path(shutil.copytree(here, tmp_path / "copy"))
    monkeypatch.chdir(folder)
    pd.read_csv(TEST)[["timestamp", "sessionid", "itemid"]].to_csv("new.csv", index=False)
    commands = re.findall(r"^    python3 predict.py (.*)$", page, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        predict(*shlex.split(command), folder=folder)
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    numbers = load_model(PLAIN).metadata["numerical_num"]
    namespace: dict[str, Any] = {}
    exec(compile(code.replace("torch.zeros(5, 6)", f"torch.zeros(5, {numbers})"), "the page", "exec"), namespace)
    assert sorted(namespace["ranked"]["CTR"], reverse=True) == namespace["ranked"]["CTR"].tolist()
    np.testing.assert_allclose(namespace["predictions"], namespace["model"].predict(namespace["shown"]), atol=1e-6)
    assert json.loads(namespace["description"])["metadata"]["tasks"] == TASKS


def test_ranking_is_independent_of_the_order(here: Path) -> None:
    last = pd.read_csv(TEST).iloc[-1]
    items = pd.read_csv("dataset/rt/item_feadf.csv")["itemid"][:20]
    candidates = pd.DataFrame({"timestamp": last["timestamp"] + 60_000, "sessionid": last["sessionid"],
                               "itemid": items}).astype("int64")
    model = load_model(GRU)
    scores = model.predict(candidates, candidates=True)
    backwards = model.predict(candidates[::-1], candidates=True)
    pd.testing.assert_frame_equal(backwards[::-1], scores, rtol=0, atol=1e-6)
    assert scores["CTR"].nunique() > 10

"""What the trackers wrote, read back: by their own readers, and of wandb's offline file by its format."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_in_process, user_error_message
from matplotlib.image import imsave

from common.csv_reader import read_csv_rows
from common.run_dir import RunDirectory
from train.Arguments import SLArguments
from train.tracking import BACKENDS, TensorBoard, Trackers

ROWS = [{"split": "val", "epoch": 0, "loss": float("nan"), "auc_CTR": 0.5},
        {"split": "val", "epoch": 1, "loss": 0.25, "auc_CTR": 0.625},
        {"split": "val", "epoch": 2, "loss": 0.125, "auc_CTR": 0.75}]
TEST_ROW = {"split": "test", "epoch": 1, "auc_CTR": 0.6875}
EPOCHS = {"loss": {1: 0.25, 2: 0.125}, "auc_CTR": {0: 0.5, 1: 0.625, 2: 0.75}}
TEST = {"test/epoch": 1.0, "test/auc_CTR": 0.6875}
Read = tuple[dict[str, dict[int, float]], dict[str, float], dict[str, Any], list[str]]


def read_tensorboard(run_dir: RunDirectory) -> Read:
    """Scalars by epoch, those of the test split, settings and plots. A value that stands there twice is an error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (run_dir.path / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    scalars = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    (settings,) = events.Tensors("settings/text_summary")
    return (*split_test(scalars), json.loads(settings.tensor_proto.string_val[0]), events.Tags()["images"])


def read_mlflow(run_dir: RunDirectory) -> Read:
    from mlflow import MlflowClient

    client = MlflowClient((run_dir.folder.parent / "mlruns").as_uri())
    (experiment,) = [one for one in client.search_experiments() if one.name == "rmtl"]
    (run,) = client.search_runs([experiment.experiment_id])
    scalars = {name: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
               for name in run.data.metrics}
    return (*split_test(scalars), run.data.params, [Path(one.path).stem for one in client.list_artifacts(
        run.info.run_id)])


def split_test(scalars: dict[str, list[tuple[int, float]]]) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    assert all(len(dict(points)) == len(points) for points in scalars.values()), "logged twice"
    test = {name: value for name, points in scalars.items() if name.startswith("test/") for _, value in points}
    return {name: dict(points) for name, points in scalars.items() if name not in test}, test


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of wandb's file: LevelDB's log format, a header of 7 bytes, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def read_wandb(run_dir: RunDirectory) -> Read:
    scalars: dict[str, list[tuple[int, float]]] = {}
    summary: dict[str, Any] = {}
    config: dict[str, Any] = {}
    ids = set()
    for path in sorted(run_dir.path.glob("wandb/offline-run-*/*.wandb")):
        for _ in range(100):  # its service closes the file a moment after `finish`
            records = list(wandb_records(path))
            if records and records[-1].HasField("exit"):
                break
            time.sleep(0.1)
        for record in records:
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name in items.keys() - {"_step", "_timestamp", "_runtime"}:
                scalars.setdefault(name, []).append((items["_step"], items[name]))
            summary |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.summary.update}
    assert len(ids) == 1, "one run, whatever the number of files"
    images = [name for name, value in summary.items() if isinstance(value, dict) and value["_type"] == "image-file"]
    assert sorted(path.name.split("_")[0] for path in run_dir.path.glob("wandb/offline-run-*/files/media/images/*")
                  ) == sorted(images)
    return (*split_test({name: sorted(points) for name, points in scalars.items()} | {
        name: [(2, value)] for name, value in summary.items() if name.startswith("test/")}), config, images)


READERS: dict[str, Callable[[RunDirectory], Read]] = {
    "tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own trackers are left alone."""
    for variable in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("name", BACKENDS)
def test_tracker_has_rows_settings_and_plots(name: str, tmp_path: Path) -> None:
    """A run that is stopped after epoch 1 and resumed is one run, with every value once."""
    pytest.importorskip(BACKENDS[name][1])
    run_dir = RunDirectory(tmp_path / "with a blank" / "rt_esmm", "rt_esmm_0.0")
    run_dir.path.mkdir(parents=True)
    stopped, resumed = Trackers(name), Trackers(name)
    stopped.start(run_dir, {"embed_dim": 8, "model_name": "esmm", "bottom_mlp_dims": [16, 8]})
    for row in ROWS[:2]:
        stopped.log_row(row)
    if name == "wandb":
        stopped.trackers[name].close()  # as at the end of its process
    resumed.start(run_dir, {"embed_dim": 8, "model_name": "esmm", "bottom_mlp_dims": [16, 8]})
    for row in [*ROWS, TEST_ROW]:
        resumed.log_row(row)
    imsave(run_dir.curves, np.zeros((4, 6, 4)))
    resumed.finish()
    epochs, test, settings, plots = READERS[name](run_dir)
    assert epochs == EPOCHS
    assert test == TEST
    assert str(settings["embed_dim"]) == "8"
    assert str(settings["bottom_mlp_dims"]) == "[16, 8]"
    assert plots == ["curves"]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])  # wandb writes once a second
def test_rows_survive_a_crash(name: str, tmp_path: Path) -> None:
    """Without any end: the files have an epoch as soon as it is logged."""
    pytest.importorskip(BACKENDS[name][1])
    run_dir = RunDirectory(tmp_path / "run", "run")
    trackers = Trackers(name)
    trackers.start(run_dir, {})
    trackers.log_row(ROWS[1])
    assert READERS[name](run_dir)[0] == {"loss": {1: 0.25}, "auc_CTR": {1: 0.625}}
    trackers.finish()


def test_tracked_programs_give_the_same_metrics(tables: Path, tmp_path: Path) -> None:
    """Both programs, stopped and resumed: the tracker has the rows of metrics.csv, which --track does not change."""
    pytest.importorskip("tensorboard")
    sizes = ("--embed_dim=8", "--bottom_mlp_dims=16", "--tower_mlp_dims=8", "--batch_size=256")
    rl = ("RLmain.py", *sizes, "--epoch_updates=5", "--init_episode=50", "--epoch=2", "--converge_tolerance=0")
    for program, folder, untracked in ((("SLmain.py", *sizes), "SL/rt_esmm", "SL_plain/rt_esmm"),
                                       (rl, "RL/res_TD3BC_esmm", "RL_plain/res_TD3BC_esmm")):
        kind = folder.split("/")[0]
        for flags in ((f"--save_dir=chkpt/{kind}_plain", "--epoch=2"), ("--track=tensorboard", "--epoch=1"),
                      ("--track=tensorboard", "--epoch=2", "--resume")):
            ended = run_in_process(tmp_path, *program, *flags)
            assert ended.returncode == 0, ended.stderr
        metrics = read_csv_rows(tmp_path / "chkpt" / folder / "metrics.csv")
        assert metrics == read_csv_rows(tmp_path / "chkpt" / untracked / "metrics.csv")
        epochs, test, settings, plots = read_tensorboard(RunDirectory(tmp_path / "chkpt" / folder, ""))
        expected = [row for row in metrics if row.get("split") != "test"]
        assert [int(row["epoch"]) for row in expected] == [1, 2]
        for name in expected[0].keys() - {"split", "epoch"}:
            assert list(epochs[name].values()) == pytest.approx([float(row[name]) for row in expected], rel=1e-6)
        assert settings["embed_dim"] == 8
        assert plots == ["curves"]
        assert {"test/epoch"} < test.keys()


def test_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    text = user_error_message(lambda: Trackers("wandb"))
    assert "pip install -r requirements/tracking.txt" in text


def test_unknown_tracker_is_refused() -> None:
    text = user_error_message(lambda: SLArguments(track="mlflow,tensorbord"))
    assert "unknown 'tensorbord'" in text
    assert "did you mean tensorboard?" in text


def test_failing_tracker_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise OSError("the server\nis gone")

    run_dir = RunDirectory(tmp_path / "run", "run")
    trackers = Trackers("tensorboard")
    trackers.start(run_dir, {})
    monkeypatch.setattr(TensorBoard, "log_metrics", fail)
    for row in ROWS:
        trackers.log_row(row)
    trackers.finish()
    assert capsys.readouterr().out.splitlines() == [
        "--track: tensorboard failed, and is left out from here on: the server is gone"]


def test_no_tracker_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for _, package, _ in BACKENDS.values():
        monkeypatch.setitem(sys.modules, package, None)
    assert Trackers("").names == []

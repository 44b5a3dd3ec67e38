"""`SLmain.py` as a user runs it: what it prints and writes, what it refuses, and how it resumes."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import SMALL, read_tree, run, run_in_process, user_error_message

from common.checkpoint import load_tensors
from dataset.prepare import prepare
from dataset.simulate import SimulationConfig, simulate
from SLmain import main
from slmodels import MODELS
from train.metrics import Metrics

TINY: dict[str, Any] = {"embed_dim": 8, "bottom_mlp_dims": (32, 16), "tower_mlp_dims": (8,), "epoch": 2,
                        "batch_size": 512, "device": "cpu"}
FLAGS = ["--embed_dim=8", "--bottom_mlp_dims=32,16", "--tower_mlp_dims=8", "--epoch=2", "--batch_size=512",
         "--device=cpu"]
RUN_DIR = "chkpt/SL/rt_esmm"
MODEL_FILES = (f"{RUN_DIR}/rt_esmm_0.0.pt", "pretrain/rt_esmm.pt")


@pytest.fixture
def workdir(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with data in dataset/rt, and this process in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv: validation epoch by epoch, then test."""
    return list(csv.DictReader((folder / RUN_DIR / "metrics.csv").read_text().splitlines()))


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_tensors(path, "")["weights"])


def assert_same_run(one: Path, two: Path) -> None:
    """The same metrics to the last digit, and the same weights in both model files."""
    assert read_metrics(one) == read_metrics(two)
    for name in MODEL_FILES:
        torch.testing.assert_close(load_weights(one / name), load_weights(two / name), rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------- a complete run

Run = tuple[Path, "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def baseline_run(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in a process of its own, and its directory. Read only."""
    folder = tmp_path_factory.mktemp("baseline")
    shutil.copytree(rt_tables, folder / "dataset" / "rt")
    return folder, run(folder, "SLmain.py", "--model_name=esmm", *FLAGS)


@pytest.fixture
def baseline_dir(baseline_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the directory of that run, and this process in it."""
    shutil.copytree(baseline_run[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_prints_the_documented_lines_only(baseline_run: Run) -> None:
    """No warning of a library, no progress bar outside of a terminal."""
    done = baseline_run[1]
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("test: "))
    assert "task 0 = CTR, task 1 = CTCVR" in lines[at - 1], "a legend names the tasks"
    assert re.fullmatch(r"test: best auc: [01]\.\d{10,}", lines[at])
    assert re.fullmatch(r"task 0, AUC [01]\.\d{10,}, Log-loss \d+\.\d{10,}", lines[at + 1])
    assert re.fullmatch(r"task 1, AUC [01]\.\d{10,}, Log-loss \d+\.\d{10,}", lines[at + 2])
    oracle = re.findall(r"task (\d), best possible AUC (0\.\d{4})", done.stdout)
    assert [task for task, _ in oracle] == ["0", "1"], "on simulated data"
    assert all(0.6 < float(auc) < 1 for _, auc in oracle)


def test_writes_model_run_files_and_baseline(baseline_run: Run, rt_tables: Path) -> None:
    """The baseline is the best model; the data set stays as it is."""
    folder = baseline_run[0]
    written = {name for name in read_tree(folder) if not name.startswith("dataset")}
    files = {"rt_esmm_0.0.pt", "checkpoint.pt", "config.json", "metrics.csv", "curves.png", "catemapper.json"}
    assert written == {f"{RUN_DIR}/{name}" for name in files} | {"pretrain/rt_esmm.pt"}
    assert (folder / RUN_DIR / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    torch.testing.assert_close(*(load_weights(folder / name) for name in MODEL_FILES), rtol=0, atol=0)
    assert read_tree(folder / "dataset/rt") == read_tree(rt_tables)
    assert os.listdir(folder / "dataset") == ["rt"]


def test_config_has_command_settings_and_manifest(baseline_run: Run) -> None:
    folder = baseline_run[0]
    config = json.loads((folder / RUN_DIR / "config.json").read_text())
    assert config["command"].startswith("python3 ")
    assert config["command"].endswith("SLmain.py --model_name=esmm " + " ".join(FLAGS))
    assert config["data"] == json.loads((folder / "dataset/rt/manifest.json").read_text())
    assert config["settings"]["embed_dim"] == 8
    assert config["settings"]["seed"] == 2022


def test_metrics_csv_has_the_printed_metrics(baseline_run: Run) -> None:
    folder, done = baseline_run
    rows = read_metrics(folder)
    assert [(row["split"], row["epoch"]) for row in rows[:-1]] == [("val", "1"), ("val", "2")]
    best = max(rows[:-1], key=lambda row: float(row["auc_CTR"]) + float(row["auc_CTCVR"]))
    score = (float(best["auc_CTR"]) + float(best["auc_CTCVR"])) / 2
    assert (rows[-1]["split"], rows[-1]["epoch"]) == ("test", best["epoch"])
    assert f"\ntest: best auc: {score}\n" in done.stdout
    for task, name in enumerate(("CTR", "CTCVR")):
        auc, logloss = (float(rows[-1][f"{metric}_{name}"]) for metric in ("auc", "logloss"))
        assert f"\ntask {task}, AUC {auc}, Log-loss {logloss}\n" in done.stdout


def test_same_seed_gives_the_same_run(baseline_run: Run, workdir: Path) -> None:
    """From the command line or in a program; another seed gives another run."""
    metrics = main(model_name="esmm", **TINY)
    assert_same_run(baseline_run[0], workdir)
    assert [type(task) for task in metrics] == [Metrics, Metrics]
    main(**TINY, seed=1)
    assert read_metrics(workdir) != read_metrics(baseline_run[0])


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_by_its_name(workdir: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    metrics = main(model_name=name, **{**TINY, "epoch": 1, "expert_num": 2})
    assert len(metrics) == 2
    assert all(0 < task.auc < 1 and 0 < task.logloss < 5 for task in metrics)
    assert f"task 1, AUC {metrics[1].auc}, Log-loss {metrics[1].logloss}\n" in capsys.readouterr().out
    assert (workdir / f"chkpt/SL/rt_{name}/rt_{name}_0.0.pt").exists()
    assert (workdir / f"pretrain/rt_{name}.pt").exists()


def test_one_task_without_numeric_features(workdir: Path) -> None:
    """`numerical="none"`: the published single zero instead of the session so far."""
    assert len(main(task_num=1, numerical="none", **TINY)) == 1
    assert load_weights(workdir / "pretrain/rt_esmm.pt")["input.numerical.weight"].shape[1] == 1


def test_training_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clicks are predicted far better than by chance, by some five standard errors, and the training loss falls."""
    monkeypatch.chdir(tmp_path)
    simulate(Path("raw"), SimulationConfig(events=60_000, items=1_500, property_rows=30_000, seed=5))
    prepare(Path("raw"), Path("dataset/rt"))
    metrics = main(embed_dim=16, bottom_mlp_dims=(64, 32), tower_mlp_dims=(16,), epoch=4, batch_size=256, device="cpu",
                   learning_rate=2e-3)
    assert metrics[0].auc > 0.6
    rows = read_metrics(tmp_path)
    assert float(rows[3]["loss"]) < float(rows[0]["loss"])


def test_best_epoch_is_kept(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that continues past its best epoch ends as one that stops there: same weights, same test metrics."""
    scores = iter([0.5, 0.6, 0.7, 0.6, 0.6, 0.5, 0.6, 0.7])  # the third epoch is the best
    monkeypatch.setattr("train.supervised.validation_score", lambda _metrics: next(scores))
    main(**{**TINY, "patience": 9, "epoch": 5})
    weights, metrics = load_weights(workdir / MODEL_FILES[0]), read_metrics(workdir)
    main(**{**TINY, "patience": 9, "epoch": 3})
    assert metrics[-1] == read_metrics(workdir)[-1]
    for name in MODEL_FILES:
        torch.testing.assert_close(load_weights(workdir / name), weights, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------ resuming


def test_resumed_run_equals_the_uninterrupted_one(workdir: Path, baseline_run: Run) -> None:
    """A run of one epoch, resumed to the two of `baseline_run`; then resumed once more, which changes nothing."""
    main(**{**TINY, "epoch": 1})
    resumed = run_in_process(workdir, "SLmain.py", *FLAGS, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after epoch 1\n" in resumed.stdout
    assert_same_run(workdir, baseline_run[0])
    main(**TINY, resume=True)
    assert_same_run(workdir, baseline_run[0])


def test_resuming_an_early_stop_trains_no_further(workdir: Path) -> None:
    main(**{**TINY, "epoch": 30}, patience=1, learning_rate=0.0)
    rows = read_metrics(workdir)
    assert len(rows) == 3, "two epochs, of which the second brought nothing, and the test"
    main(**{**TINY, "epoch": 30}, patience=1, learning_rate=0.0, resume=True)
    assert read_metrics(workdir) == rows


def test_resume_without_checkpoint_starts_anew(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(**{**TINY, "epoch": 1}, resume=True)
    assert "nothing to resume" in capsys.readouterr().out
    assert (workdir / "pretrain/rt_esmm.pt").exists()


def test_resuming_with_other_settings_is_refused(baseline_dir: Path) -> None:
    before = read_tree(baseline_dir)
    for name, value in {"batch_size": 256, "learning_rate": 0.01, "seed": 1, "embed_dim": 4, "numerical": "none",
                        "dropout": 0.5}.items():
        text = user_error_message(lambda name=name, value=value: main(**{**TINY, name: value}, resume=True))
        assert f"--{name}=" in text
        assert str(value) in text
        assert read_tree(baseline_dir) == before


def test_resuming_on_other_data_is_refused(baseline_dir: Path, raw_log: Path) -> None:
    shutil.rmtree("dataset/rt")
    prepare(raw_log, Path("dataset/rt"), min_session=3)
    before = read_tree(baseline_dir)
    assert "other data" in user_error_message(lambda: main(**TINY, resume=True))
    assert read_tree(baseline_dir) == before


def test_new_run_keeps_the_earlier_checkpoint(baseline_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = (baseline_dir / RUN_DIR / "checkpoint.pt").read_bytes()
    main(**TINY, seed=1)
    assert f"{RUN_DIR}: existing run moved to *.previous.*" in capsys.readouterr().out
    assert (baseline_dir / RUN_DIR / "checkpoint.previous.pt").read_bytes() == checkpoint


# ----------------------------------------------------------------------------------------------------- what is refused


def refused(folder: Path, *flags: str) -> str:
    """Run the program, which has to end with exit code 2 and one line; nothing new may have been written."""
    before = read_tree(folder)
    done = run_in_process(folder, "SLmain.py", *flags)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert read_tree(folder) == before
    return done.stderr


def test_unknown_names_and_numbers_are_refused(tmp_path: Path) -> None:
    """With the values that are allowed, and a suggestion."""
    text = refused(tmp_path, "--model_name=esm")
    assert "'esm'" in text
    assert ", ".join(MODELS) in text
    assert "did you mean esmm?" in text
    assert "--embed_dims=8 (did you mean --embed_dim? --help" in refused(tmp_path, "--embed_dims=8")
    assert "--nothing (--help" in refused(tmp_path, "--nothing")
    assert "--epoch: 0 is not 1 or more" in refused(tmp_path, "--epoch=0")
    assert "--dropout: 1.0 is not between 0 and 0.99" in refused(tmp_path, "--dropout=1")
    assert "--device" in refused(tmp_path, "--device=toaster")


def test_run_from_its_own_config_is_the_same(baseline_dir: Path, baseline_run: Run) -> None:
    """The earlier run is kept as `*.previous.*`; flags win."""
    ended = run_in_process(baseline_dir, "SLmain.py", f"--config={RUN_DIR}/config.json")
    assert ended.returncode == 0, ended.stderr
    assert (baseline_dir / RUN_DIR / "metrics.previous.csv").exists()
    assert_same_run(baseline_dir, baseline_run[0])
    settings = json.loads((baseline_dir / RUN_DIR / "config.json").read_text())["settings"]
    assert settings == json.loads((baseline_run[0] / RUN_DIR / "config.json").read_text())["settings"]
    text = run_in_process(baseline_dir, "RLmain.py", f"--config={RUN_DIR}/config.json").stderr
    assert text.startswith(f"error: {RUN_DIR}/config.json: python3 ")
    assert "SLmain.py" in text


def test_calibrator_weight_is_for_aitm_only(workdir: Path) -> None:
    text = user_error_message(lambda: main(**TINY, calibrator_weight=0.6))
    assert "calibrator_weight" in text
    assert "aitm" in text


def test_bad_label_is_refused_in_one_line(tables: Path, tmp_path: Path) -> None:
    (tables / "manifest.json").unlink()
    lines = (tables / "train.csv").read_text().splitlines()
    lines[4] = re.sub(r"^(\d+,\d+,\d+),\d,\d", r"\1,nan,0", lines[4])
    (tables / "train.csv").write_text("\n".join(lines) + "\n")
    text = refused(tmp_path, *FLAGS)
    assert text.startswith("error: dataset/rt/train.csv, line 5, column 'pay': 'nan' is not a label")


def test_missing_tables_are_named(workdir: Path) -> None:
    for name in ("train.csv", "val.csv", "test.csv", "item_feadf.csv"):
        (workdir / "dataset/rt" / name).rename(workdir / "kept")
        assert refused(workdir, *FLAGS).startswith(f"error: dataset/rt: {name} missing")
        (workdir / "kept").rename(workdir / "dataset/rt" / name)
    assert refused(workdir, "--dataset_name=mine").startswith("error: dataset/mine: ")
    assert os.listdir("dataset") == ["rt"], "only rt is simulated"


def test_unwritable_output_is_refused_before_training(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("chkpt", "pretrain", RUN_DIR):
        (workdir / path).parent.mkdir(parents=True, exist_ok=True)
        (workdir / path).write_text("a file, not a folder")
        text = user_error_message(lambda: main(**TINY))
        assert text.startswith(path)
        assert "cannot write" in text
        (workdir / path).unlink()
    assert "epoch 1" not in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [256, 100_000], ids=["in the epoch", "in its last step"])
def test_diverging_loss_ends_in_one_line(workdir: Path, batch_size: int) -> None:
    text = user_error_message(lambda: main(**{**TINY, "batch_size": batch_size}, learning_rate=1e30))
    assert "--learning_rate" in text
    assert not (workdir / "pretrain/rt_esmm.pt").exists()


# -------------------------------------------------------------------------------------------------- one class, no data


def rewrite(path: Path, **columns: object) -> None:
    """Set whole columns of a table; without its manifest the folder is read as the published tables."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.assign(**columns).to_csv(path, index=False)
    (path.parent / "manifest.json").unlink(missing_ok=True)


def test_auc_of_one_class_is_nan(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(workdir / "dataset/rt/test.csv", pay=0, pay_time="")
    metrics = main(**TINY)
    assert math.isnan(metrics[1].auc)
    assert 0 < metrics[1].logloss < 5
    assert 0 < metrics[0].auc < 1
    text = capsys.readouterr().out
    assert re.search(r"^task 1, AUC nan, Log-loss \d\.\d{10,}$", text, flags=re.M)
    assert "task 1: AUC is nan, because every label of the test split is 0\n" in text


def test_best_epoch_needs_no_auc_of_every_task(workdir: Path) -> None:
    """Where validation has one class, the other task decides; where both tasks have one class, logloss does."""
    rewrite(workdir / "dataset/rt/val.csv", pay=0, pay_time="")
    main(**TINY)
    *epochs, test = read_metrics(workdir)
    assert [row["auc_CTCVR"] for row in epochs] == ["nan", "nan"]
    assert test["epoch"] == max(epochs, key=lambda row: float(row["auc_CTR"]))["epoch"]
    rewrite(workdir / "dataset/rt/val.csv", click=0, click_time="")
    main(**TINY)
    *epochs, test = read_metrics(workdir)
    best = min(epochs, key=lambda row: float(row["logloss_CTR"]) + float(row["logloss_CTCVR"]))
    assert test["epoch"] == best["epoch"]


def test_without_data_a_log_is_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rt_tables: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """An empty folder counts as absent, one with a file of the user's does not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.run.SimulationConfig", lambda: SMALL)
    Path("dataset/rt").mkdir(parents=True)
    Path("dataset/rt/notes.txt").write_text("mine")
    assert "missing" in refused(tmp_path, *FLAGS)
    Path("dataset/rt/notes.txt").unlink()
    main(**TINY)
    text = capsys.readouterr().out
    assert "dataset/rt is not there: simulating a shopping log" in text
    assert "python3 -m dataset.prepare --raw DIR --out dataset/rt" in text
    assert read_tree(tmp_path / "dataset/rt") == read_tree(rt_tables)
    main(**TINY)
    assert "simulating" not in capsys.readouterr().out, "the second run finds the data of the first"


@pytest.mark.stress
def test_documented_command_approaches_the_best_auc(tmp_path: Path) -> None:
    """Default settings on the default simulated log: most of the way from 0.5 to the best possible AUC."""
    done = run(tmp_path, "SLmain.py", "--model_name=esmm")
    assert done.returncode == 0, done.stderr
    assert "simulating a shopping log" in done.stdout
    fractions = re.findall(r"task \d, best possible AUC .* the model is (\d+)% of the way", done.stdout)
    assert int(fractions[0]) >= 90
    assert int(fractions[1]) >= 80

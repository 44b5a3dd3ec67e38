"""`SLmain.py` as a user runs it: what it prints and writes, what it refuses, and how a run that was killed goes on."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, SMALL, command, complaint, run, snapshot

from common.checkpoint import load_tensors
from dataset.prepare import prepare
from dataset.simulate import SimulationConfig, simulate
from SLmain import main
from slmodels import MODELS
from train.metrics import Metrics

TINY: dict[str, Any] = {"embed_dim": 8, "epoch": 2, "batch_size": 512}  # of main(...)
FLAGS = [f"--{name}={value}" for name, value in TINY.items()]  # the same on the command line


@pytest.fixture
def here(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data in dataset/rt, and this process in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metrics_of(folder: Path, model: str = "esmm") -> bytes:
    return (folder / "chkpt" / "SL" / f"rt_{model}" / "metrics.csv").read_bytes()


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_tensors(path, "")["weights"])


def assert_same_run(one: Path, two: Path, model: str = "esmm") -> None:
    """The same metrics to the last digit, and the same weights, in both places where they lie."""
    assert metrics_of(one, model) == metrics_of(two, model)
    for name in (f"chkpt/SL/rt_{model}/rt_{model}_0.0.pt", f"pretrain/rt_{model}.pt"):
        of_one, of_two = weights_of(one / name), weights_of(two / name)
        assert of_one.keys() == of_two.keys()
        assert all(torch.equal(of_one[key], of_two[key]) for key in of_one)


def working_folder(path: Path, rt_tables: Path) -> Path:
    shutil.copytree(rt_tables, path / "dataset" / "rt")
    return path


# ----------------------------------------------------------------------------------------------------- a run by a user


@pytest.fixture(scope="module")
def done(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run from the command line in a folder of its own. Read only."""
    folder = working_folder(tmp_path_factory.mktemp("user"), rt_tables)
    return folder, run(folder, "SLmain.py", "--model_name=esmm", *FLAGS)


Done = tuple[Path, "subprocess.CompletedProcess[str]"]


@pytest.fixture
def ran(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder of that run, and this process in it."""
    shutil.copytree(done[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_prints_the_documented_lines(done: Done) -> None:
    finished = done[1]
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("test: "))
    assert "task 0 = CTR, task 1 = CTCVR" in lines[at - 1], "a legend names the tasks"
    assert re.fullmatch(r"test: best auc: [01]\.\d{10,}", lines[at])
    assert re.fullmatch(r"task 0, AUC [01]\.\d{10,}, Log-loss \d+\.\d{10,}", lines[at + 1])
    assert re.fullmatch(r"task 1, AUC [01]\.\d{10,}, Log-loss \d+\.\d{10,}", lines[at + 2])


def test_on_simulated_data_it_prints_the_best_possible_auc(done: Done) -> None:
    found = re.findall(r"task (\d), best possible AUC (0\.\d{4})", done[1].stdout)
    assert [task for task, _ in found] == ["0", "1"]
    assert all(0.6 < float(auc) < 1 for _, auc in found)


def test_a_run_that_goes_well_complains_about_nothing(done: Done) -> None:
    """No warning of a library, no progress bar where nobody looks."""
    assert done[1].stderr == ""


def test_it_writes_the_model_the_books_and_the_baseline(done: Done) -> None:
    folder = done[0]
    written = {name for name in snapshot(folder) if not name.startswith("dataset")}
    books = {"rt_esmm_0.0.pt", "state.pt", "config.json", "metrics.csv", "curves.png", "catemapper.json"}
    assert written == {f"chkpt/SL/rt_esmm/{name}" for name in books} | {"pretrain/rt_esmm.pt"}
    assert (folder / "chkpt/SL/rt_esmm/curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_config_has_the_command_and_the_manifest_of_the_data(done: Done) -> None:
    folder = done[0]
    config = json.loads((folder / "chkpt/SL/rt_esmm/config.json").read_text())
    assert config["command"].startswith("python3 ")
    assert config["command"].endswith("SLmain.py --model_name=esmm " + " ".join(FLAGS))
    assert config["data"] == json.loads((folder / "dataset/rt/manifest.json").read_text())
    assert config["settings"]["embed_dim"] == 8
    assert config["settings"]["seed"] == 2022


def test_the_metrics_are_those_printed(done: Done) -> None:
    folder, finished = done
    rows = list(csv.DictReader(metrics_of(folder).decode().splitlines()))
    assert [(row["split"], row["epoch"]) for row in rows[:-1]] == [("val", "1"), ("val", "2")]
    best = max(rows[:-1], key=lambda row: float(row["auc_CTR"]) + float(row["auc_CTCVR"]))
    score = (float(best["auc_CTR"]) + float(best["auc_CTCVR"])) / 2
    assert (rows[-1]["split"], rows[-1]["epoch"]) == ("test", best["epoch"])
    assert f"\ntest: best auc: {score}\n" in finished.stdout
    for task, name in enumerate(("CTR", "CTCVR")):
        auc, logloss = (float(rows[-1][f"{figure}_{name}"]) for figure in ("auc", "logloss"))
        assert f"\ntask {task}, AUC {auc}, Log-loss {logloss}\n" in finished.stdout


def test_the_baseline_is_the_best_model(done: Done) -> None:
    one, two = (weights_of(done[0] / name) for name in ("pretrain/rt_esmm.pt", "chkpt/SL/rt_esmm/rt_esmm_0.0.pt"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_data_of_a_user_stay_as_they_are(done: Done, rt_tables: Path) -> None:
    assert snapshot(done[0] / "dataset" / "rt") == snapshot(rt_tables)
    assert os.listdir(done[0] / "dataset") == ["rt"]


def test_the_same_seed_gives_the_same_run(done: Done, here: Path) -> None:
    """From the command line or in a program: the same metrics to the last digit, the same weights."""
    metrics = main(model_name="esmm", **TINY)
    assert_same_run(done[0], here)
    assert [type(one) for one in metrics] == [Metrics, Metrics]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs_by_its_name(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    metrics = main(model_name=name, **{**TINY, "epoch": 1, "expert_num": 2})
    assert len(metrics) == 2
    assert all(0 < one.auc < 1 and 0 < one.logloss < 5 for one in metrics)
    assert f"task 1, AUC {metrics[1].auc}, Log-loss {metrics[1].logloss}\n" in capsys.readouterr().out
    assert (here / "chkpt" / "SL" / f"rt_{name}" / f"rt_{name}_0.0.pt").exists()
    assert (here / "pretrain" / f"rt_{name}.pt").exists()


def test_one_task_alone(here: Path) -> None:
    assert len(main(task_num=1, **TINY)) == 1


def test_the_published_single_zero_instead_of_the_session_so_far(here: Path) -> None:
    main(numerical="none", **TINY)
    assert weights_of(here / "pretrain/rt_esmm.pt")["input.numerical.weight"].shape[1] == 1


def test_training_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clicks are predicted far better than by chance, by some five standard errors, and the training loss falls."""
    monkeypatch.chdir(tmp_path)
    simulate(Path("raw"), SimulationConfig(events=60_000, items=1_500, property_rows=30_000, seed=5))
    prepare(Path("raw"), Path("dataset/rt"))
    metrics = main(embed_dim=16, epoch=4, batch_size=512)
    assert metrics[0].auc > 0.6
    rows = list(csv.DictReader(metrics_of(tmp_path).decode().splitlines()))
    assert float(rows[3]["loss"]) < float(rows[0]["loss"])


# --------------------------------------------------------------------------------------------- the same seed, resuming


def test_another_seed_gives_another_run(done: Done, here: Path) -> None:
    main(**TINY, seed=1)
    assert metrics_of(here) != metrics_of(done[0])


@pytest.mark.parametrize("model", ["esmm", "ple"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path: Path, rt_tables: Path, model: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL after an epoch or within one; then --resume. Dropout, the order of the rows, Adam: all of it goes on."""
    whole, killed = (working_folder(tmp_path / name, rt_tables) for name in ("whole", "killed"))
    settings = {"model_name": model, "embed_dim": 8, "expert_num": 2, "epoch": 5, "patience": 5, "batch_size": 256}
    state = killed / "chkpt" / "SL" / f"rt_{model}" / "state.pt"

    process = subprocess.Popen(command("SLmain.py", *(f"--{name}={value}" for name, value in settings.items())),
                               cwd=killed, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not state.exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert 1 <= load_tensors(state, "")["epoch"] < 5
    assert not (killed / "pretrain" / f"rt_{model}.pt").exists()

    monkeypatch.chdir(killed)
    main(**settings, resume=True)
    monkeypatch.chdir(whole)
    main(**settings)
    assert_same_run(whole, killed, model)


def test_the_resume_flag(here: Path, done: Done) -> None:
    """A run of one epoch, continued from the command line to the two of `done`."""
    main(**{**TINY, "epoch": 1})
    resumed = run(here, "SLmain.py", *FLAGS, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after epoch 1\n" in resumed.stdout
    assert_same_run(here, done[0])


def test_a_finished_run_goes_on_with_more_epochs(ran: Path, rt_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = {**TINY, "epoch": 4}
    main(**longer, resume=True)
    monkeypatch.chdir(working_folder(ran / "at_once", rt_tables))
    main(**longer)
    assert_same_run(ran, ran / "at_once")


def test_resuming_a_finished_run_changes_nothing(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, model = metrics_of(ran), weights_of(ran / "pretrain/rt_esmm.pt")
    main(**TINY, resume=True)
    assert "resuming after epoch 2" in capsys.readouterr().out
    assert metrics_of(ran) == before
    assert all(torch.equal(value, model[key]) for key, value in weights_of(ran / "pretrain/rt_esmm.pt").items())


def test_resuming_an_early_stop_stays_stopped(here: Path) -> None:
    main(**{**TINY, "epoch": 30}, patience=1, learning_rate=0.0)
    before = metrics_of(here)
    assert len(before.splitlines()) == 4, "a header, two epochs of which the second brought nothing, and the test"
    main(**{**TINY, "epoch": 30}, patience=1, learning_rate=0.0, resume=True)
    assert metrics_of(here) == before


def test_the_model_that_is_kept_is_that_of_the_best_epoch(here: Path, rt_tables: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that went on past its best epoch ends as one that stopped there: same weights, same test metrics."""
    scores = iter([0.5, 0.6, 0.7, 0.6, 0.6, 0.5, 0.6, 0.7])  # the third epoch is the best
    monkeypatch.setattr("train.run.validation_score", lambda _metrics: next(scores))
    main(**{**TINY, "patience": 9, "epoch": 5})
    monkeypatch.chdir(working_folder(here / "stopped", rt_tables))
    main(**{**TINY, "patience": 9, "epoch": 3})
    assert metrics_of(here).splitlines()[-1] == metrics_of(here / "stopped").splitlines()[-1]
    for name in ("chkpt/SL/rt_esmm/rt_esmm_0.0.pt", "pretrain/rt_esmm.pt"):
        one, two = weights_of(here / name), weights_of(here / "stopped" / name)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_resume_without_a_state_starts_from_the_first_epoch(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(**TINY, resume=True)
    assert "nothing to resume" in capsys.readouterr().out
    assert (here / "pretrain/rt_esmm.pt").exists()


@pytest.mark.parametrize(("name", "value"), [("batch_size", 256), ("learning_rate", 0.01), ("seed", 1),
                                             ("embed_dim", 4), ("numerical", "none"), ("dropout", 0.5)])
def test_resuming_with_another_setting_is_refused_and_changes_nothing(ran: Path, name: str, value: object) -> None:
    before = snapshot(ran)
    text = complaint(lambda: main(**{**TINY, name: value}, resume=True))
    assert f"--{name}=" in text
    assert str(value) in text
    assert snapshot(ran) == before


def test_resuming_on_other_data_is_refused_and_changes_nothing(ran: Path, raw_log: Path) -> None:
    shutil.rmtree("dataset/rt")
    prepare(raw_log, Path("dataset/rt"), min_session=3)
    before = snapshot(ran)
    assert "other data" in complaint(lambda: main(**TINY, resume=True))
    assert snapshot(ran) == before


def test_a_state_that_was_cut_short_is_refused(ran: Path) -> None:
    state = ran / "chkpt/SL/rt_esmm/state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    assert "chkpt/SL/rt_esmm/state.pt: " in complaint(lambda: main(**TINY, resume=True))


def test_a_new_run_sets_the_state_of_the_old_one_aside(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = (ran / "chkpt/SL/rt_esmm/state.pt").read_bytes()
    main(**TINY, seed=1)
    assert "chkpt/SL/rt_esmm: an earlier run is set aside, as *.previous.*" in capsys.readouterr().out
    assert (ran / "chkpt/SL/rt_esmm/state.previous.pt").read_bytes() == old


# ----------------------------------------------------------------------------------------------------- what is refused


def refused(folder: Path, *flags: str) -> str:
    """Run the program, which has to end with exit code 2 and one line; nothing new may have been written."""
    before = snapshot(folder)
    finished = run(folder, "SLmain.py", *flags)
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.startswith("error: ")
    assert finished.stderr.count("\n") == 1
    assert snapshot(folder) == before
    return finished.stderr


def test_an_unknown_model_is_refused_with_the_list(tmp_path: Path) -> None:
    text = refused(tmp_path, "--model_name=esm")
    assert "'esm'" in text
    assert ", ".join(MODELS) in text
    assert "did you mean esmm?" in text


def test_a_mistyped_flag_or_number_is_told_with_what_is_allowed(tmp_path: Path) -> None:
    assert "--embed_dims=8 (did you mean --embed_dim? --help" in refused(tmp_path, "--embed_dims=8")
    assert "--nothing (--help" in refused(tmp_path, "--nothing")
    assert "--epoch: 0 is not 1 or more" in refused(tmp_path, "--epoch=0")
    assert "--dropout: 1.0 is not between 0 and 0.99" in refused(tmp_path, "--dropout=1")


def test_a_bad_label_is_refused_as_a_user_sees_it(tables: Path, tmp_path: Path) -> None:
    (tables / "manifest.json").unlink()
    lines = (tables / "train.csv").read_text().splitlines()
    lines[4] = re.sub(r"^(\d+,\d+,\d+),\d,\d", r"\1,nan,0", lines[4])
    (tables / "train.csv").write_text("\n".join(lines) + "\n")
    text = refused(tmp_path, *FLAGS)
    assert text == "error: dataset/rt/train.csv, line 5, column 'pay': 'nan' is not a label: 0 or 1\n"


def refused_here(folder: Path, **settings: Any) -> str:
    """The same inside this process."""
    before = snapshot(folder)
    text = complaint(lambda: main(**{**TINY, **settings}))
    assert snapshot(folder) == before
    return text


@pytest.mark.parametrize("missing", ["train.csv", "val.csv", "test.csv", "item_feadf.csv"])
def test_a_half_present_folder_names_what_is_missing(here: Path, missing: str) -> None:
    (here / "dataset/rt" / missing).unlink()
    assert refused_here(here).startswith(f"dataset/rt: {missing} missing")


def test_a_table_that_was_cut_short_is_refused(here: Path) -> None:
    (here / "dataset/rt/manifest.json").unlink()
    path = here / "dataset/rt/test.csv"
    text = path.read_text()
    path.write_text(text[:len(text) // 2].rsplit(",", 3)[0])
    assert re.match(r"dataset/rt/test.csv, line \d+, column '\w+': the row ends", refused_here(here))


def test_an_empty_table_is_refused(here: Path) -> None:
    (here / "dataset/rt/manifest.json").unlink()
    path = here / "dataset/rt/val.csv"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert refused_here(here).startswith("dataset/rt/val.csv: no rows")


def test_a_data_set_of_another_name_is_not_simulated(here: Path) -> None:
    assert refused_here(here, dataset_name="mine").startswith("dataset/mine: ")
    assert os.listdir("dataset") == ["rt"]


@pytest.mark.parametrize("blocked", ["chkpt", "pretrain", "chkpt/SL/rt_esmm"])
def test_a_place_that_cannot_be_written_is_refused_before_training(here: Path, capsys: pytest.CaptureFixture[str],
                                                                   blocked: str) -> None:
    (here / blocked).parent.mkdir(parents=True, exist_ok=True)
    (here / blocked).write_text("a file, not a folder")
    text = complaint(lambda: main(**TINY))
    assert text.startswith(blocked)
    assert "cannot write" in text
    assert "epoch 1" not in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [256, 100_000], ids=["in the epoch", "in its last step"])
def test_a_loss_that_is_no_number_ends_in_one_line(here: Path, batch_size: int) -> None:
    text = complaint(lambda: main(**{**TINY, "batch_size": batch_size}, learning_rate=1e30))
    assert "--learning_rate" in text
    assert not (here / "pretrain/rt_esmm.pt").exists()


@pytest.mark.parametrize(("settings", "word"), [({"device": "toaster"}, "--device"), ({"epoch": 0}, "--epoch"),
                                                ({"calibrator": 0.6}, "--calibrator")], ids=str)
def test_a_setting_that_cannot_be_is_refused(here: Path, settings: dict[str, Any], word: str) -> None:
    before = {name: content for name, content in snapshot(here).items() if not name.startswith("chkpt")}
    assert word in complaint(lambda: main(**{**TINY, **settings}))
    assert {name: content for name, content in snapshot(here).items() if not name.startswith("chkpt")} == before


# -------------------------------------------------------------------------------------------------- one class, no data


def rewrite(path: Path, **columns: object) -> None:
    """Set whole columns of a table; without its manifest the folder is read as the published tables."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.assign(**columns).to_csv(path, index=False)
    (path.parent / "manifest.json").unlink(missing_ok=True)


def test_a_test_split_of_one_class_has_auc_nan_with_the_reason(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(here / "dataset/rt/test.csv", pay=0, pay_time="")
    metrics = main(**TINY)
    assert math.isnan(metrics[1].auc)
    assert 0 < metrics[1].logloss < 5
    assert 0 < metrics[0].auc < 1
    text = capsys.readouterr().out
    assert re.search(r"^task 1, AUC nan, Log-loss \d\.\d{10,}$", text, flags=re.M)
    assert "task 1: AUC is nan, because every label of the test split is 0\n" in text


def test_a_validation_split_of_one_class_is_judged_by_the_other_task(here: Path) -> None:
    rewrite(here / "dataset/rt/val.csv", pay=0, pay_time="")
    main(**TINY)
    rows = list(csv.DictReader(metrics_of(here).decode().splitlines()))
    assert [row["auc_CTCVR"] for row in rows[:-1]] == ["nan", "nan"]
    best = max(rows[:-1], key=lambda row: float(row["auc_CTR"]))
    assert rows[-1]["epoch"] == best["epoch"]


def test_without_any_auc_the_logloss_is_watched(here: Path) -> None:
    rewrite(here / "dataset/rt/val.csv", click=0, pay=0, click_time="", pay_time="")
    main(**TINY)
    rows = list(csv.DictReader(metrics_of(here).decode().splitlines()))
    best = min(rows[:-1], key=lambda row: float(row["logloss_CTR"]) + float(row["logloss_CTCVR"]))
    assert rows[-1]["epoch"] == best["epoch"]


def test_without_data_a_log_is_simulated_with_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str], rt_tables: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.run.Size", lambda: SMALL)
    main(**TINY)
    text = capsys.readouterr().out
    assert "dataset/rt is not there: simulating a shopping log" in text
    assert "python3 -m dataset.prepare --raw DIR --out dataset/rt" in text
    assert snapshot(tmp_path / "dataset/rt") == snapshot(rt_tables)
    main(**TINY)
    assert "simulating" not in capsys.readouterr().out, "the second run finds the data of the first"


def test_an_empty_folder_counts_as_absent_and_one_with_a_file_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                       rt_tables: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.run.Size", lambda: SMALL)
    Path("dataset/rt").mkdir(parents=True)
    Path("dataset/rt/notes.txt").write_text("mine")
    assert "missing" in refused_here(tmp_path)
    Path("dataset/rt/notes.txt").unlink()
    main(**TINY)
    assert snapshot(tmp_path / "dataset/rt") == snapshot(rt_tables)


@pytest.mark.slow
def test_the_documented_command_with_nothing_downloaded(tmp_path: Path) -> None:
    """Default settings on the default simulated log: most of the way from 0.5 to the best possible AUC."""
    finished = run(tmp_path, "SLmain.py", "--model_name=esmm")
    assert finished.returncode == 0, finished.stderr
    assert "simulating a shopping log" in finished.stdout
    ways = re.findall(r"task \d, best possible AUC .* the model is (\d+)% of the way", finished.stdout)
    assert int(ways[0]) >= 90
    assert int(ways[1]) >= 80

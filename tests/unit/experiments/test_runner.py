"""Scheduling, resuming and reproducing the runs."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from conftest import ENVIRONMENT, command, user_error_message
from conftest import run as run_program

from common.errors import UserError
from experiments.__main__ import cli
from experiments.conditions import QUICK_DATASETS, ExperimentArguments, ExperimentRun, Key, conditions
from experiments.runner import _make_executor, _pending, _reusable_rows, execute, run_experiments
from experiments.statistics import read_results
from train.Arguments import parse, to_command_line

Row = dict[str, str]
SMALL = ["--tables=main", "--models=esmm", "--name_filter=RMTL", "--seeds=2", "--embed_dim=4", "--epoch=1",
         "--critic_epoch=1", "--critic_updates=3", "--critic_batch=64", "--out=results"]
NAMES = ["baseline", "critics", "RMTL", "constant"]


def small_settings(*flags: str) -> ExperimentArguments:
    return parse(ExperimentArguments, "", [*SMALL, *flags])


def all_runs(settings: ExperimentArguments) -> dict[Key, ExperimentRun]:
    runs = [ExperimentRun("rt", condition, seed) for condition in conditions(settings) for seed in settings.all_seeds]
    return {run.key: run for run in runs}


def run_cli(folder: Path, *flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["experiments", *SMALL, "--workers=1", *flags])
        cli()


def without_times(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# ------------------------------------------------------------------------------------------ scheduling, no training


class FakeExecutor(Executor):
    """Return made-up rows, or raise the given error for runs of `failing`; record the order."""

    def __init__(self, failing: str = "", error: BaseException | None = None) -> None:
        self.failing, self.error, self.keys = failing, error, list[Key]()

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        (run, settings), future = arguments, Future[Any]()
        self.keys.append(run.key)
        if run.condition.name == self.failing:
            future.set_exception(self.error)
        else:
            future.set_result({
                "dataset": run.dataset, "tasks": "CTR", "table": run.condition.table, "model": run.condition.model,
                "condition": run.condition.name, "control": "", "critics": "", "seed": str(run.seed), "epoch": "1",
                "epochs": "1", "fingerprint": "f", "machine": "m", "seconds": "1.0",
                "command": to_command_line(run.condition.program, run.settings(settings))})
        return future


def run_fake(executor: FakeExecutor, folder: Path, rt_tables: Path, *flags: str) -> tuple[str, list[Row]]:
    settings = small_settings(f"--dataset_path={rt_tables.parent}", f"--out={folder}", "--workers=3", *flags)
    path = folder / "results.csv"
    return run_experiments(settings, path, executor), read_results(path) if path.exists() else []


def test_given_executor_runs_dependencies_first(rt_tables: Path, tmp_path: Path) -> None:
    executor = FakeExecutor()
    message, rows = run_fake(executor, tmp_path, rt_tables)
    assert message == ""
    assert [(row["condition"], row["seed"]) for row in rows] == [(name, seed) for name in NAMES for seed in "12"]
    order = [(name, seed) for _, _, name, seed in executor.keys]
    for seed in (1, 2):
        assert order.index(("baseline", seed)) < order.index(("critics", seed)) < order.index(("RMTL", seed))


def test_rows_of_other_selections_stay(rt_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.runner.get_dataset", lambda *_: SimpleNamespace(fingerprint="f"))
    run_fake(FakeExecutor(), tmp_path, rt_tables, "--name_filter=baseline")
    executor = FakeExecutor()
    _, rows = run_fake(executor, tmp_path, rt_tables, "--tables=weighting", "--name_filter=uncertainty")
    assert {condition for _, _, condition, _ in executor.keys} == {"uncertainty"}
    assert {row["condition"] for row in rows} == {"baseline", "uncertainty"}
    _, rows = run_fake(FakeExecutor(), tmp_path, rt_tables, "--name_filter=baseline", "--models=mmoe", "--first_seed=5")
    assert [(row["model"], row["seed"]) for row in rows] == [
        *(("mmoe", seed) for seed in "56"), *(("esmm", seed) for seed in "1212")]
    _, rows = run_fake(FakeExecutor(), tmp_path, rt_tables, "--name_filter=baseline", "--models=mmoe", "--first_seed=6")
    assert [(row["model"], row["seed"]) for row in rows] == [
        *(("mmoe", seed) for seed in "675"), *(("esmm", seed) for seed in "1212")]
    _, rows = run_fake(FakeExecutor(), tmp_path, rt_tables, "--name_filter=baseline", "--epoch=2")
    assert len(rows) == 2
    assert {row["condition"] for row in read_results(tmp_path / "results.previous.csv")} == {"baseline", "uncertainty"}


@pytest.mark.parametrize("present", ["kr", "rt"])
def test_quick_simulates_only_what_is_needed(present: str, rt_tables: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither another data set nor an rt that is there makes it simulate."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.runner.simulate", lambda *_: pytest.fail("simulated"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / present).symlink_to(rt_tables)
    settings = small_settings("--quick", "--dataset_path=data", f"--datasets={present}")
    assert run_experiments(settings, Path("results.csv"), FakeExecutor()) == ""
    assert not Path("chkpt").exists()


def test_quick_log_is_apart(rt_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.runner.simulate", lambda folder, _: folder.mkdir(parents=True))
    monkeypatch.setattr("experiments.runner.prepare", lambda _, folder: shutil.copytree(rt_tables, folder))
    executor = FakeExecutor()
    assert run_experiments(small_settings("--quick"), Path("results.csv"), executor) == ""
    assert {f"--dataset_path={QUICK_DATASETS}" in row["command"] for row in read_results(Path("results.csv"))} == {True}
    assert not Path("dataset").exists()


def test_failed_run_skips_only_its_dependents(rt_tables: Path, tmp_path: Path) -> None:
    message, rows = run_fake(FakeExecutor("critics", UserError("diverged")), tmp_path, rt_tables)
    assert message.startswith("4 of 8 runs failed, the first: rt esmm critics 1: diverged")
    assert {row["condition"] for row in rows} == {"baseline", "constant"}


def test_dead_worker_gives_one_line() -> None:
    def run() -> None:
        with _make_executor(2):
            raise BrokenProcessPool

    assert "worker process died" in user_error_message(run)


def test_worker_exits_when_parent_is_killed(tmp_path: Path) -> None:
    code = ("import time\nfrom experiments.runner import _make_executor\n"
            "with _make_executor(2) as pool:\n    pool.submit(print, 'started', flush=True).result()\n"
            "    pool.submit(time.sleep, 600).result()")
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)
    assert parent.stdout
    assert parent.stdout.readline() == b"started\n"
    parent.kill()
    parent.communicate(timeout=60)  # returns once no worker has the pipe open


# -------------------------------------------------------------------------------------------------------- trained runs


class Finished(NamedTuple):
    """A small experiment that was stopped and resumed."""

    folder: Path
    stderr: str  # of the stopped process
    stopped_rows: list[Row]


@pytest.fixture(scope="module")
def finished(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two workers, SIGTERM after three runs, then one worker to the end. Read only."""
    folder = tmp_path_factory.mktemp("experiments")
    shutil.copytree(rt_tables, folder / "dataset" / "rt")
    path = folder / "results" / "results.csv"
    process = subprocess.Popen(command("experiments", *SMALL, "--workers=2"), cwd=folder, env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (path.exists() and path.read_text().count("\n") > 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate()[1]
    stopped_rows = read_results(path)
    run_cli(folder)
    return Finished(folder, stderr, stopped_rows)


def test_stopped_experiment_ends_in_one_line(finished: Finished) -> None:
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
    assert shlex.join(["experiments", *SMALL]) in finished.stderr
    assert 3 <= len(finished.stopped_rows) < 8


def test_resumed_experiment_repeats_no_run(finished: Finished) -> None:
    rows = read_results(finished.folder / "results" / "results.csv")
    assert [(row["condition"], row["seed"]) for row in rows] == [(name, seed) for name in NAMES for seed in "12"]
    seconds = {(row["condition"], row["seed"]): row["seconds"] for row in rows}
    assert all(seconds[row["condition"], row["seed"]] == row["seconds"] for row in finished.stopped_rows)


def test_finished_runs_keep_dependencies_and_reports(finished: Finished) -> None:
    assert (finished.folder / "results" / "report.md").exists()
    files = [path for path in (finished.folder / "results" / "runs").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".csv", ".json", ".png", ".pt", ".pth", ".txt"}
    assert not [path for path in files if path.name in ("checkpoint.pt", "memory.npz")]


def test_results_do_not_depend_on_workers(finished: Finished, rt_tables: Path, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline, which two workers trained, again in this process."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "rt").symlink_to(rt_tables)
    monkeypatch.chdir(tmp_path)
    row = execute(all_runs(small_settings())["rt", "esmm", "baseline", 2], small_settings())
    (expected,) = [row for row in finished.stopped_rows if (row["condition"], row["seed"]) == ("baseline", "2")]
    assert without_times([row]) == without_times([{name: value for name, value in expected.items() if value}
                                                  | {name: "" for name in row if not row[name]}])


def test_command_of_a_row_reproduces_it(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    (row,) = [row for row in read_results(tmp_path / "results" / "results.csv")
              if (row["condition"], row["seed"]) == ("RMTL", "1")]
    process = run_program(tmp_path, *shlex.split(row["command"])[1:])
    assert process.returncode == 0, process.stderr
    for task, name in enumerate(("CTR", "CTCVR")):
        auc, logloss = (float(row[f"{metric}_{name}"]) for metric in ("auc", "logloss"))
        assert f"task {task}, AUC {auc}, Log-loss {logloss}" in process.stdout


def test_rows_of_other_settings_are_discarded(finished: Finished, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(finished.folder)
    path = Path("results/results.csv")
    fingerprints = {"rt": read_results(path)[0]["fingerprint"]}

    def count_reusable(fingerprints: dict[str, str], *flags: str) -> int:
        settings = small_settings(*flags)
        return len(_reusable_rows(path, settings, all_runs(settings), fingerprints))

    assert count_reusable(fingerprints) == count_reusable(fingerprints, "--tables=main,ablation") == 8
    assert capsys.readouterr().out == ""
    assert count_reusable(fingerprints, "--epoch=2") == 0, "critics depend on the baseline"
    assert count_reusable(fingerprints, "--critic_updates=7") == 4, "baseline and constant do not depend on critics"
    assert "discarding 4 of 8 rows" in capsys.readouterr().out
    assert count_reusable({"rt": "other"}) == 0


def test_deleted_dependency_runs_again(finished: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(finished.folder / "results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    settings = small_settings("--tables=ablation", "--name_filter=")
    runs = {key: run for key, run in all_runs(settings).items() if run.seed == 1}
    reusable = {key for key in runs if key[2] not in ("label", "critic")}
    assert [key[2] for key in _pending(runs, reusable, settings)] == ["label", "critic"]
    for path in (tmp_path / "results" / "runs" / "rt_esmm_critics_1").rglob("*.pth"):
        path.unlink()
    assert [key[2] for key in _pending(runs, reusable, settings)] == ["critics", "label", "critic"]


def test_diverged_run_is_reported_without_traceback(rt_tables: Path, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "rt").symlink_to(rt_tables)
    with pytest.raises(SystemExit, match="2"):
        run_cli(tmp_path, "--learning_rate=1e30")
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: 8 of 8 runs failed")

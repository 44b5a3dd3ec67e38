"""Tuning: the search space, the trials of a study, and the command that repeats the best one."""

from __future__ import annotations

import importlib.metadata
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENT, REPOSITORY, command, user_error_message

import SLmain
from common.csv_reader import read_csv_rows
from common.errors import UserError
from common.fileio import write_json
from experiments import tune
from experiments.tune import SPACE, Range, TuneArguments, main
from slmodels import MODELS
from train.Arguments import SLArguments, parse
from train.run import get_dataset
from train.supervised import Training

SMALL = ["--space=learning_rate,dropout", "--epoch=2", "--embed_dim=4", "--bottom_mlp_dims=8", "--tower_mlp_dims=4",
         "--device=cpu"]


def small_settings(*flags: str) -> TuneArguments:
    return parse(TuneArguments, "", [*SMALL, *flags])


def read_trials(settings: TuneArguments) -> list[dict[str, str]]:
    return read_csv_rows(settings.folder / "trials.csv")


def read_states(settings: TuneArguments) -> list[str]:
    return [row["state"] for row in read_trials(settings)]


@pytest.fixture
def workdir(rt_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process in a folder with the data set."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "rt").symlink_to(rt_tables)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fake_fit(workdir: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, int], float]], None]:
    """Replace training: an epoch of a trial has the score that a function of (trial, epoch) gives."""

    def install(score: Callable[[int, int], float]) -> None:
        def fit(training: Training, epochs: int) -> None:
            training.epoch = epochs
            value = score(int(training.run_dir.path.parent.name), epochs)
            training.should_continue = training.stopper.is_continuable(training.model, value, epochs)

        monkeypatch.setattr(tune, "fit", fit)

    return install


# -------------------------------------------------------------------------------------------------------- search space


def test_space_has_valid_values_and_defaults() -> None:
    for name, values in SPACE.items():
        default = getattr(SLArguments(), name)
        for value in values[:2] if isinstance(values, Range) else values:
            assert getattr(SLArguments(**{name: value}), name) == value
        assert values.low <= default <= values.high if isinstance(values, Range) else default in values


@pytest.mark.parametrize("name", MODELS)
def test_experts_are_searched_where_there_are(name: str) -> None:
    assert ("expert_num" in TuneArguments(model_name=name).searched) == (name in ("omoe", "mmoe", "ple", "metaheac"))


def test_given_flags_are_not_searched() -> None:
    """Even a value that equals the default."""
    settings = parse(TuneArguments, "", ["--dropout=0.2", "--batch_size=100"])
    assert settings.searched.keys() == SPACE.keys() - {"dropout", "batch_size", "expert_num"}
    assert small_settings().searched.keys() == {"learning_rate", "dropout"}


@pytest.mark.parametrize("flags", [["--space=lr"], ["--space=expert_num"], ["--polish=1"],
                                   ["--trials=0"]])
def test_mistakes_give_one_line(flags: list[str]) -> None:
    assert flags[0].split("=")[0] in user_error_message(lambda: parse(TuneArguments, "", flags))


def test_missing_optuna_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install -r requirements/tune.txt" in user_error_message(lambda: main(small_settings()))


def test_requirement_is_the_tested_version() -> None:
    lines = (REPOSITORY / "requirements" / "tune.txt").read_text(encoding="utf-8").splitlines()
    assert f"optuna=={importlib.metadata.version('optuna')}" in lines


# -------------------------------------------------------------------------------------------------------------- trials


def test_printed_command_repeats_best_trial(workdir: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Its best validation score, by SLmain, is the value; no trial leaves weights."""
    settings = small_settings("--trials=2")
    main(settings)
    values = [float(row["value"]) for row in read_trials(settings)]
    assert not [*settings.folder.rglob("*.pt")]
    python, program, *flags = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert (python, program) == ("python3", "SLmain.py")
    chosen = parse(SLArguments, "", flags)
    SLmain.main(**vars(chosen))
    *epochs, _ = read_csv_rows(chosen.run_dir.metrics)
    assert max(values) == max((float(row["auc_CTR"]) + float(row["auc_CTCVR"])) / 2 for row in epochs)


def test_first_trial_has_given_settings(fake_fit: Callable[[Any], None], tmp_path: Path) -> None:
    """Of flags or of a file; what the space lacks is sampled from it."""
    fake_fit(lambda trial, epoch: 0.5)
    settings = small_settings("--trials=1", "--dropout=0.3")
    assert main(settings) == settings.with_values({})
    (row,) = read_trials(settings)
    assert (float(row["learning_rate"]), float(row["dropout"]), row["epochs"]) == (1e-3, 0.3, "2")
    write_json(tmp_path / "run.json", {**settings.with_values({}).plain(), "dropout": 0.4, "learning_rate": 1.0})
    chosen = main(small_settings(f"--config={tmp_path / 'run.json'}", "--trials=1", "--out=other"))
    assert chosen.dropout == 0.4
    assert 1e-4 <= chosen.learning_rate <= 1e-2
    assert "--space" in user_error_message(lambda: parse(TuneArguments, "", [f"--config={tmp_path / 'run.json'}"]))


def test_trials_are_not_tracked(fake_fit: Callable[[Any], None], capsys: pytest.CaptureFixture[str]) -> None:
    fake_fit(lambda trial, epoch: 0.5)
    main(small_settings("--trials=1", "--track=tensorboard"))
    assert "--track=tensorboard" in capsys.readouterr().out.splitlines()[-1]
    assert not [path for path in Path().rglob("*") if "events" in path.name]


def test_test_split_is_never_read(workdir: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one the study is the same, and no log has a figure of it."""
    class Forbidden:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"test.{name}")

    forbidden: Any = Forbidden()
    monkeypatch.setattr(tune, "get_dataset", lambda *given: replace(get_dataset(*given), test=forbidden))
    settings = small_settings("--trials=1")
    main(settings)
    assert "test" not in (settings.folder / "trials" / "0" / "log.txt").read_text()


def test_resumed_study_equals_the_uninterrupted(fake_fit: Callable[[Any], None]) -> None:
    def settings_of(values: list[dict[str, str]]) -> list[tuple[str, str, str]]:
        return [(row["learning_rate"], row["dropout"], row["value"]) for row in values]

    fake_fit(lambda trial, epoch: trial / 100 + epoch / 1000)
    main(small_settings("--trials=3"))
    stopped = read_trials(small_settings())
    main(small_settings("--trials=6"))
    main(small_settings("--trials=4"))  # enough already
    resumed = read_trials(small_settings())
    assert resumed[:3] == stopped
    shutil.rmtree(small_settings().folder)
    main(small_settings("--trials=6"))
    assert settings_of(read_trials(small_settings())) == settings_of(resumed)
    assert len(set(settings_of(resumed))) == 6


def test_interrupted_trial_does_not_count(fake_fit: Callable[[Any], None]) -> None:
    def interrupt(trial: int, epoch: int) -> float:
        raise KeyboardInterrupt

    fake_fit(interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(small_settings("--trials=2"))
    fake_fit(lambda trial, epoch: 0.5)
    main(small_settings("--trials=2"))
    assert read_states(small_settings()) == ["interrupted", "complete", "complete"]


def test_failed_trial_is_recorded(fake_fit: Callable[[Any], None]) -> None:
    def fail(trial: int, epoch: int) -> float:
        if trial != 1:
            raise (UserError("training diverged"), MemoryError())[trial // 2]
        return 0.5

    fake_fit(fail)
    assert "first error: training diverged" in user_error_message(lambda: main(small_settings("--trials=1")))
    main(small_settings("--trials=3"))
    assert read_states(small_settings()) == ["failed", "complete", "failed"]
    assert [row["error"] for row in read_trials(small_settings())] == ["training diverged", "", "out of memory"]


def test_bad_trial_is_pruned(fake_fit: Callable[[Any], None]) -> None:
    """Below the median after its third epoch: not before, and not among the first five."""
    fake_fit(lambda trial, epoch: epoch / 10 - (trial in (2, 5)))
    settings = small_settings("--trials=7", "--epoch=4")
    main(settings)
    assert read_states(settings) == ["complete"] * 5 + ["pruned", "complete"]
    assert [row["epochs"] for row in read_trials(settings)] == ["4"] * 5 + ["3", "4"]


def test_study_of_other_settings_is_refused(fake_fit: Callable[[Any], None]) -> None:
    fake_fit(lambda trial, epoch: 0.5)
    main(small_settings("--trials=1"))
    for flags, what in ((["--epoch=3"], "--epoch=2"), (["--space=dropout"], "--space"), (["--seed=1"], "--seed=2022")):
        assert what in user_error_message(lambda flags=flags: main(small_settings(*flags)))
    (small_settings().folder / "study.journal").write_text("no journal\n")
    assert "not the journal of a study" in user_error_message(lambda: main(small_settings()))


def test_two_processes_share_a_study(workdir: None, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    """Together exactly so many trials, of different settings: one while that of the other runs."""
    processes: list[subprocess.Popen[str]] = []
    lines: list[str] = []
    fit = tune.fit

    def start_other_and_fit(training: Training, epochs: int) -> None:
        if not processes:
            processes.append(subprocess.Popen(command("experiments.tune", *SMALL, "--trials=6"), env=ENVIRONMENT,
                                              text=True, stdout=subprocess.PIPE))
            assert processes[0].stdout
            lines.append(processes[0].stdout.readline())
        fit(training, epochs)

    monkeypatch.setattr(tune, "fit", start_other_and_fit)
    main(small_settings("--trials=6"))
    lines += [*processes[0].communicate(timeout=300)[0].splitlines(), *capsys.readouterr().out.splitlines()]
    assert processes[0].returncode == 0
    assert lines[0].startswith("trial 1,"), "trial 0 runs"
    assert sorted(line.split(",")[0] for line in lines if line.startswith("trial ")) == [
        f"trial {number}" for number in range(6)]
    rows = read_trials(small_settings())
    assert len({(row["learning_rate"], row["dropout"]) for row in rows}) == 6
    assert {row["state"] for row in rows} <= {"complete", "pruned"}

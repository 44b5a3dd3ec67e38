"""The grid of experiments: what is compared with what, how it is judged, and that a grid that was stopped goes on."""

from __future__ import annotations

import csv
import math
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ENVIRONMENT, REPOSITORY, command, complaint, run
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from common.csv_reader import write_csv
from experiments.conditions import TABLES, GridArguments, Run, _needs, arms
from experiments.report import MARKS, difference, holm, put_into_readme, read_results, write_report
from experiments.runner import _finished, _left
from train.Arguments import RLArguments, SLArguments, parse, to_command_line

Row = dict[str, str]


# ------------------------------------------------------------------------------------------------------------- the grid


def test_every_arm_has_what_it_needs_and_every_result_a_control() -> None:
    found = arms(GridArguments())
    names = [(arm.model, arm.name) for arm in found]
    assert max(Counter(names).values()) == 1
    assert {arm.table for arm in found} == set(TABLES)
    for arm in found:
        assert set(_needs(arm)) <= set(names)
        assert not arm.control or (arm.model, arm.control) in names
        if arm.changes.get("polish_method") in ("shuffled", "full", None) and "polish_lambda" in arm.changes:
            assert arm.critics
            assert arm.control, "a weighted run is measured against one with weights of 1"


@pytest.mark.parametrize("table", TABLES)
def test_a_table_alone_brings_what_it_is_measured_against(table: str) -> None:
    found = arms(GridArguments(tables=table))
    names = {(arm.model, arm.name) for arm in found}
    assert {arm.table for arm in found} <= {table, "main"}
    for arm in found:
        assert set(_needs(arm)) <= names
        assert not arm.control or (arm.model, arm.control) in names


def test_a_control_differs_in_its_weights_alone() -> None:
    """Same data, seed, start, rate and budget."""
    grid = GridArguments()
    by_name = {(arm.model, arm.name): arm for arm in arms(grid)}
    for arm in by_name.values():
        if arm.control.startswith("constant") and arm.program == "SLmain.py":
            mine, other = (vars(Run("rt", one, 3).settings(grid)) for one in (arm, by_name[arm.model, arm.control]))
            differ = {name for name, value in mine.items() if other[name] != value}
            assert differ <= {"polish_method", "polish_lambda", "polish_normalize", "critic_dir", "critic_model",
                              "critic_encoder", "save_dir"}, arm.name


@given(polish=st.floats(0, 5), seed=st.integers(0, 99), name=st.sampled_from(["rt", "my data", "it's"]),
       resume=st.booleans(), gamma=st.floats(0, 1), ips=st.booleans())
def test_a_command_says_what_the_settings_are(polish: float, seed: int, name: str, resume: bool, gamma: float,
                                              ips: bool) -> None:
    for settings in (SLArguments(polish_lambda=polish, seed=seed, dataset_name=name, resume=resume),
                     RLArguments(gamma=gamma, ips=ips, dataset_name=name, seed=seed)):
        program, *flags = shlex.split(to_command_line("x.py", settings))[1:]
        assert program == "x.py"
        assert parse(type(settings), "", flags) == settings


@pytest.mark.parametrize(("settings", "told"), [({"models": "esmm,bert"}, "unknown 'bert'"),
                                                ({"tables": "mian"}, "unknown 'mian'"),
                                                ({"gammas": "0,x"}, "--gammas: '0,x'"), ({"seeds": 1}, "--seeds")])
def test_what_is_not_there_is_refused(settings: dict[str, Any], told: str) -> None:
    assert told in complaint(lambda: GridArguments(**settings))


def test_a_run_by_its_name_brings_what_it_needs_and_is_measured_against() -> None:
    names = {(arm.model, arm.name) for arm in arms(GridArguments(only="actor through", gammas="0"))}
    assert names == {("esmm", "baseline"), ("esmm", "constant"), ("esmm", "actor through the critics"),
                     ("esmm", "actor through the critics, gamma 0")}
    assert list(GridArguments(first_seed=6).all_seeds) == [6, 7, 8, 9, 10]
    assert "--only" in complaint(lambda: GridArguments(only="nothing of the kind"))


def test_quick_keeps_what_was_asked_for() -> None:
    assert (GridArguments(quick=True).seeds, GridArguments(quick=True, seeds=4).seeds) == (3, 4)


# ------------------------------------------------------------------------------------------------------- the judgement


@given(st.lists(st.tuples(st.floats(0.5, 0.9), st.floats(0.5, 0.9)), min_size=2, max_size=12))
def test_a_difference_is_students_for_pairs(pairs: list[tuple[float, float]]) -> None:
    ours, control = map(list, zip(*pairs, strict=True))
    found = difference(ours, control)
    assume(np.std(np.subtract(ours, control)) > 1e-9)  # where scipy warns of rounding
    expected = stats.ttest_rel(ours, control)
    low, high = expected.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, low, high), rel=1e-6, abs=1e-12)
    assert found.low <= found.mean <= found.high


def test_a_difference_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t_0.975 of two degrees of freedom 4.3027."""
    found = difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.30265 / 3**0.5, abs=1e-4)
    assert difference([0.7] * 3, [0.7] * 3).p == 1
    assert math.isnan(difference([0.7], [0.6]).p)


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.2: times 4, 3, 2, 1, never falling."""
    assert holm([0.03, 0.01, 0.2, 0.02]) == pytest.approx([0.06, 0.04, 0.2, 0.06])


def made_up(gain: float, noise: float) -> list[Row]:
    """Results of one model in which RMTL is better than its control by `gain`, give or take `noise`."""
    rng = np.random.default_rng(5)
    rows = []
    for seed in range(1, 6):
        start = 0.72 + 0.005 * rng.standard_normal()
        for arm, control, better in (("baseline", "", 0.0), ("constant", "baseline", 0.002),
                                     ("shuffled", "constant", 0.002), ("RMTL", "constant", 0.002 + gain)):
            weighted = arm in ("RMTL", "shuffled")
            row = {"dataset": "made", "tasks": "CTR CTCVR", "table": "main", "model": "esmm", "arm": arm,
                   "control": control, "critics": "esmm critics" if weighted else "", "seed": str(seed),
                   "epoch": "1", "epochs": "1",
                   "seconds": "1.0", "command": "c",
                   "fingerprint": "f", "machine": "m"}
            for task in ("CTR", "CTCVR"):
                row |= {f"auc_{task}": str(start + better + noise * rng.standard_normal()), f"logloss_{task}": "0.5",
                        f"session_logloss_{task}": "0.5", f"curve_auc_{task}": "0.70 0.71",
                        f"deciles_weight_{task}": "1 2 3" if weighted else "",
                        f"deciles_loss_{task}": "0.2 0.3 0.4" if weighted else "",
                        **{f"weight_{name}_{task}": "0.9" if weighted else "" for name in ("q05", "q50", "q95", "ess")}}
            rows.append(row)
        rows.append({**rows[-1], "arm": "critics", "control": "", "critics": "", **{
            f"val_{name}_{task}": "0.25" for task in ("CTR", "CTCVR") for name in ("rank_correlation", "zero_fraction")}})
    return rows


@pytest.mark.parametrize(("gain", "told"), [(0.003, "RMTL beats its control on esmm CTR"),
                                            (-0.003, "RMTL falls behind its control on esmm CTR"),
                                            (0.0, "is not told apart from its control in any of 2 comparisons")])
def test_the_report_says_what_the_figures_support(tmp_path: Path, gain: float, told: str) -> None:
    write_report(made_up(gain, 0.0003), tmp_path, "python3 experiments.py")
    text = (tmp_path / "report.md").read_text()
    assert told in text
    (line,) = [one for one in text.splitlines() if one.startswith("| esmm | RMTL | constant |")]
    shown, low, high = map(float, re.findall(r"[+-]\d\.\d\d", line)[:3])
    assert low <= shown <= high
    assert shown == pytest.approx(1000 * gain, abs=0.5)
    for picture in re.findall(r"\((.*?\.png)\)", text):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_results_go_between_the_marks_of_a_readme(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n\n{MARKS[0]}\nold\n{MARKS[1]}\n\nafter\n")
    put_into_readme(path, made_up(0.003, 0.0003), Path("docs/results"), "python3 experiments.py")
    text = path.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "RMTL beats its control" in text
    path.write_text("no marks")
    assert "are missing" in complaint(lambda: put_into_readme(path, made_up(0.0, 0.1), Path("x"), "c"))
    assert path.read_text() == "no marks"


def test_what_the_readme_says_is_what_the_results_say(tmp_path: Path) -> None:
    """README and report are those that results.csv gives."""
    published = REPOSITORY / "docs" / "results"
    rows = read_results(published / "results.csv")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    ours = readme.split(MARKS[0])[1].split(MARKS[1])[0]
    (asked,) = re.findall(r"^    (python3 experiments.py .*)$", ours, re.MULTILINE)
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    put_into_readme(tmp_path / "README.md", rows, Path("docs/results"), asked)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == readme
    write_report(rows, tmp_path, asked)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == (published / "report.md").read_text(encoding="utf-8")


def test_a_report_of_runs_that_are_not_all_there(tmp_path: Path) -> None:
    """As while a grid goes on: models whose comparison is not complete wait."""
    rows = made_up(0.003, 0.0003)
    for count in (1, 3, 7, len(rows)):
        write_report(rows[:count], tmp_path, "python3 experiments.py")
        complete = {"RMTL", "shuffled", "constant", "baseline"} <= {row["arm"] for row in rows[:count]}
        assert ("RMTL all there" in (tmp_path / "report.md").read_text()) != complete


@pytest.mark.parametrize(("old", "new", "told"), [
    (",seed,", ",sead,", "column 'seed' is missing"), ("esmm", "es,mm", "cells, but the header has"),
    (",0.5,", ",half,", "'half' is not a number"), (",1.0,", ",,", "'' is not a number"), ("esmm", '"esmm', "as CSV")])
def test_damaged_results_are_told_in_one_line(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "results.csv"
    write_csv(path, made_up(0.0, 0.1))
    assert len(read_results(path)) == 25
    path.write_text(path.read_text().replace(old, new, 1))
    text = complaint(lambda: read_results(path))
    assert told in text
    assert str(path) in text


# ------------------------------------------------------------------------------------------------------------ the runs

SMALL = ["--tables=main", "--models=esmm", "--seeds=2", "--embed_dim=4", "--epoch=1", "--critic_epoch=1",
         "--critic_updates=3", "--critic_batch=64", "--out=results"]
TIMES = ("seconds",)


def shop(folder: Path, rt_tables: Path) -> Path:
    shutil.copytree(rt_tables, folder / "dataset" / "rt")
    return folder


def results(folder: Path) -> list[Row]:
    """The rows of results.csv but for times."""
    with open(folder / "results" / "results.csv", encoding="utf-8", newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def done(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small grid, run by a user. Read only."""
    folder = shop(tmp_path_factory.mktemp("grid"), rt_tables)
    finished = run(folder, "experiments.py", *SMALL, "--workers=2")
    assert finished.returncode == 0, finished.stderr
    assert "results/report.md" in finished.stdout or "report.md" in finished.stdout
    return folder


def test_a_row_a_run_and_the_report_beside_it(done: Path) -> None:
    rows = results(done)
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (arm.name, seed) for arm in arms(settings_of()) for seed in "12"]
    assert len({row["fingerprint"] for row in rows}) == 1
    assert (done / "results" / "report.md").exists()
    left = {path.suffix for path in (done / "results" / "runs").rglob("*") if path.is_file()}
    assert left == {".csv", ".json", ".png", ".pt", ".pth", ".txt"}
    assert not list((done / "results").rglob("state.pt")), "what only a run that goes on needs is gone"


def test_the_command_of_a_row_gives_its_figures(done: Path, rt_tables: Path, tmp_path: Path) -> None:
    """As a reader of the report would check it, baseline and critics first."""
    folder = shop(tmp_path, rt_tables)
    rows = {row["arm"]: row for row in results(done) if row["seed"] == "2"}
    for arm in ("baseline", "critics", "RMTL"):
        program, *flags = shlex.split(rows[arm]["command"])[1:]
        finished = run(folder, program, *flags)
        assert finished.returncode == 0, finished.stderr
        if arm != "critics":
            for task, name in enumerate(("CTR", "CTCVR")):
                auc, logloss = (float(rows[arm][f"{figure}_{name}"]) for figure in ("auc", "logloss"))
                assert f"task {task}, AUC {auc}, Log-loss {logloss}" in finished.stdout


def test_a_grid_that_was_stopped_goes_on_and_repeats_nothing(done: Path, rt_tables: Path, tmp_path: Path) -> None:
    folder = shop(tmp_path, rt_tables)
    path = folder / "results" / "results.csv"
    process = subprocess.Popen(command("experiments.py", *SMALL, "--workers=2"), cwd=folder, env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (path.exists() and len(results(folder)) >= 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert said.startswith("stopped: ")
    assert said.count("\n") == 1, said
    before = path.read_text().splitlines()
    assert 3 < len(before) < len(results(done)) + 1
    finished = run(folder, "experiments.py", *SMALL, "--workers=1")
    assert finished.returncode == 0, finished.stderr
    assert results(folder) == results(done), "nor does it matter how many runs went side by side"
    with open(path, encoding="utf-8", newline="") as file:
        times = {(row["arm"], row["seed"]): row["seconds"] for row in csv.DictReader(file)}
    for row in csv.DictReader(before):
        assert times[row["arm"], row["seed"]] == row["seconds"], "a finished run was run again"


def settings_of(*flags: str) -> GridArguments:
    return parse(GridArguments, "", [*SMALL, *flags])


def test_rows_of_other_settings_or_data_go(done: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(done)
    path = Path("results/results.csv")
    rows = read_results(path)
    prints = {"rt": rows[0]["fingerprint"]}

    def kept(settings: GridArguments, prints: dict[str, str]) -> int:
        runs = {run.key: run for arm in arms(settings) for seed in (1, 2) for run in [Run("rt", arm, seed)]}
        return len(_finished(path, settings, runs, prints))

    assert kept(settings_of(), prints) == kept(settings_of("--tables=main,ablation"), prints) == len(rows) == 10
    assert capsys.readouterr().out == ""
    assert kept(settings_of("--epoch=2"), prints) == 0, "critics have epochs of their own, but start from the baseline"
    assert kept(settings_of("--critic_updates=7"), prints) == 4, "baselines and weights of 1 ask no critics"
    assert "6 of 10 rows are of other settings or data" in capsys.readouterr().out
    assert kept(settings_of(), {"rt": "other"}) == 0


def test_what_a_run_needs_is_made_again_where_it_is_gone(done: Path, monkeypatch: pytest.MonkeyPatch,
                                                         tmp_path: Path) -> None:
    shutil.copytree(done / "results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    settings = settings_of("--tables=ablation")
    runs = {run.key: run for arm in arms(settings) for run in [Run("rt", arm, 1)]}
    finished = {key for key in runs if key[2] not in ("label", "critic")}
    assert [key[2] for key in _left(runs, finished, settings)] == ["label", "critic"]
    for path in (tmp_path / "results" / "runs" / "rt_esmm_critics_1").rglob("*.pth"):
        path.unlink()
    assert [key[2] for key in _left(runs, finished, settings)] == ["critics", "label", "critic"]


def test_the_report_can_be_written_again(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "results", tmp_path / "results")
    text = (tmp_path / "results" / "report.md").read_text()
    shutil.rmtree(tmp_path / "results" / "runs")
    (tmp_path / "results" / "report.md").unlink()
    assert run(tmp_path, "experiments.py", *SMALL, "--report").returncode == 0
    assert (tmp_path / "results" / "report.md").read_text() == text


def test_a_run_that_fails_is_told_and_the_others_go_on(rt_tables: Path, tmp_path: Path) -> None:
    folder = shop(tmp_path, rt_tables)
    finished = run(folder, "experiments.py", *SMALL, "--learning_rate=1e30", "--workers=1")
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr
    assert finished.stderr.splitlines()[-1].startswith("error: ")
    assert "runs failed" in finished.stderr

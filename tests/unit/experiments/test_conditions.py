"""Conditions, their dependencies and controls, and the settings of their runs."""

from __future__ import annotations

import pickle
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import user_error_message
from hypothesis import given
from hypothesis import strategies as st

from experiments.conditions import QUICK_DATASETS, TABLES, ExperimentArguments, ExperimentRun, conditions
from train.Arguments import RLArguments, SLArguments, parse, to_command_line


def test_every_table_has_unique_conditions() -> None:
    every = conditions(ExperimentArguments())
    assert set(Counter((condition.model, condition.name) for condition in every).values()) == {1}
    assert {condition.table for condition in every} == set(TABLES)


@pytest.mark.parametrize("table", ["", *TABLES])
def test_selection_contains_dependencies_and_controls(table: str) -> None:
    selected = conditions(ExperimentArguments(tables=table))
    names = {(condition.model, condition.name) for condition in selected}
    assert not table or {condition.table for condition in selected} <= {table, "main"}
    for condition in selected:
        assert set(condition.dependencies) <= names
        assert not condition.control or (condition.model, condition.control) in names
        assert not condition.critics or condition.control, "a weighted run is compared with constant weights"


def test_control_differs_only_in_weights() -> None:
    """Data, seed, initial weights, learning rate and budget are the same."""
    experiment = ExperimentArguments()
    by_name = {(condition.model, condition.name): condition for condition in conditions(experiment)}
    for condition in by_name.values():
        if condition.control.startswith("constant") and condition.program == "SLmain.py":
            treated, control = (vars(ExperimentRun("rt", each, 3).settings(experiment))
                                for each in (condition, by_name[condition.model, condition.control]))
            assert {name for name in treated if treated[name] != control[name]} <= {
                "polish_method", "polish_lambda", "polish_normalize", "critic_dir", "critic_model", "critic_encoder",
                "save_dir"}, condition.name


@given(polish=st.floats(0, 5), seed=st.integers(0, 99), name=st.sampled_from(["rt", "my data", "it's"]),
       resume=st.booleans(), gamma=st.floats(0, 1), ips=st.booleans())
def test_command_line_round_trip(polish: float, seed: int, name: str, resume: bool, gamma: float, ips: bool) -> None:
    for settings in (SLArguments(polish_lambda=polish, seed=seed, dataset_name=name, resume=resume),
                     RLArguments(gamma=gamma, ips=ips, dataset_name=name, seed=seed)):
        program, *flags = shlex.split(to_command_line("x.py", settings))[1:]
        assert program == "x.py"
        assert parse(type(settings), "", flags) == settings


@pytest.mark.parametrize(("settings", "message"), [
    ({"models": "esmm,bert"}, "unknown 'bert'"), ({"tables": "mian"}, "unknown 'mian'"),
    ({"gammas": "0,x"}, "--gammas: '0,x'"), ({"seeds": 1}, "--seeds"), ({"name_filter": "no such"}, "--name_filter")])
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    assert message in user_error_message(lambda: ExperimentArguments(**settings))


def test_name_filter_selects_with_dependencies() -> None:
    selected = conditions(ExperimentArguments(name_filter="actor through", gammas="0"))
    assert {condition.name for condition in selected} == {
        "baseline", "constant", "actor through the critics", "actor through the critics, gamma 0"}


def test_seeds_start_at_first_seed() -> None:
    assert list(ExperimentArguments(first_seed=6).all_seeds) == [6, 7, 8, 9, 10]


def test_quick_keeps_what_was_given() -> None:
    """Also a value that equals the default, and in the command of the report."""
    assert ExperimentArguments(quick=True).seeds == 3
    flags = ["--quick", "--seeds=5", "--models=esmm,mmoe,ple", "--epoch=3"]
    settings = parse(ExperimentArguments, "", flags)
    assert (settings.seeds, settings.models, settings.epoch, settings.embed_dim) == (5, "esmm,mmoe,ple", 3, 16)
    command = to_command_line("x", replace(settings, workers=0))
    assert command == "python3 x --models=esmm,mmoe,ple --seeds=5 --quick"
    assert parse(ExperimentArguments, "", shlex.split(command)[2:]) == settings
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_quick_reads_data_sets_of_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an rt that is missing has a directory of its own, where no other command looks for it."""
    monkeypatch.chdir(tmp_path)

    def paths(*flags: str) -> list[str]:
        settings = parse(ExperimentArguments, "", ["--datasets=rt,kr", *flags])
        baseline = conditions(settings)[0]
        return [ExperimentRun(name, baseline, 1).settings(settings).dataset_path for name in ("rt", "kr")]

    assert paths("--quick") == [QUICK_DATASETS, "dataset"]
    assert paths() == ["dataset", "dataset"]
    assert paths("--quick", "--dataset_path=mine") == [QUICK_DATASETS, "mine"]
    (tmp_path / "dataset" / "rt").mkdir(parents=True)
    assert paths("--quick") == [QUICK_DATASETS, "dataset"], "an empty folder is no data set"
    (tmp_path / "dataset" / "rt" / "train.csv").touch()
    assert paths("--quick") == ["dataset", "dataset"]
    assert not ExperimentArguments(quick=True, datasets="kr", dataset_path="none").simulates_rt

"""Data sets of one and five tasks through the three commands, as a user runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_in_process

from common.csv_reader import read_csv_rows
from common.run_dir import network_names
from dataset.tables import CountRow, FeatureTable, PreparedDataset, number_sessions, order_rows, write_dataset
from experiments.conditions import Condition, ExperimentArguments, ExperimentRun
from experiments.report import write_report
from experiments.runner import execute

SIZES = ("--embed_dim=4", "--bottom_mlp_dims=8,8", "--tower_mlp_dims=4", "--expert_num=2", "--device=cpu", "--epoch=2")
RL = ("--epoch_updates=3", "--init_episode=5", "--batch_size=32", "--memory_size=2000")
TASKS = [{"name": "CTR", "label": "click", "given": ""}, {"name": "CTCVR", "label": "pay", "given": "CTR"},
         {"name": "like", "label": "like", "given": ""}, {"name": "share", "label": "share", "given": "like"},
         {"name": "report", "label": "report", "given": ""}]


def write_log(folder: Path, task_num: int) -> None:
    """A log of 400 rows. Nobody reports after the training split: the AUC of that task is nan."""
    rng, n = np.random.default_rng(0), 400
    split = np.repeat([0, 1, 2], [240, 80, 80])
    labels = {name: rng.random(n) < rate for name, rate in
              {"click": 0.4, "pay": 0.4, "like": 0.3, "share": 0.5, "report": 0.2}.items()}
    labels["pay"] &= labels["click"]
    labels["share"] &= labels["like"]
    labels["report"] &= split == 0
    time, user = 1000 * np.arange(n), rng.integers(0, 40, n)
    rows = order_rows(pd.DataFrame({
        "split": split, "sessionid": number_sessions(user, time, split), "timestamp": time,
        "itemid": rng.integers(0, 20, n), **{name: values.astype(int) for name, values in labels.items()}}))
    items = FeatureTable("itemid", pd.DataFrame({"itemid": range(20), "genre": [f"g{item % 4}" for item in range(20)]}))
    write_dataset(PreparedDataset("tiny", rows, [CountRow("rows", n)], [], {"item_feadf.csv": items}, [], [],
                                  TASKS[:task_num], rates=["genre"]), folder, {})


def succeed(folder: Path, program: str, *flags: str) -> str:
    done = run_in_process(folder, program, "--dataset_name=tiny", *SIZES, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("task_num", [1, 5])
def test_the_three_commands_take_any_tasks(tmp_path: Path, task_num: int) -> None:
    write_log(tmp_path / "dataset" / "tiny", task_num)
    names = [task["name"] for task in TASKS[:task_num]]
    for program, *flags in (("SLmain.py", "--model_name=esmm"), ("RLmain.py", *RL), ("SLmain.py", "--polish=1")):
        printed = succeed(tmp_path, program, *flags)
        assert "task 0, AUC 0." in printed
        assert f"task {task_num - 1}, AUC " in printed
        assert f"task {task_num}" not in printed
    agent = tmp_path / "chkpt/RL/res_TD3BC_tiny_esmm"
    assert {path.stem for path in agent.glob("*.pth")} == set(network_names(task_num))
    (last,) = read_csv_rows(agent / "metrics.csv")[-1:]
    assert float(last["critic_loss"]) == pytest.approx(sum(float(last[f"closs{k + 1}"]) for k in range(task_num)))
    run = tmp_path / "chkpt/SL/tiny_esmm/tiny_esmm_1.0"
    *epochs, test = read_csv_rows(run / "metrics.csv")
    assert [name[4:] for name in test if name.startswith("auc_")] == names
    assert {row.get("auc_report") for row in (*epochs, test)} == {"nan" if task_num == 5 else None}
    assert [name[7:] for name in read_csv_rows(run / "weights.csv")[0] if name.startswith("weight_")] == names
    saved = torch.load(tmp_path / "pretrain/tiny_esmm.pt", weights_only=True)
    assert saved["task_num"] == task_num
    assert saved["numerical_num"] == (2 + 2 * task_num) + (1 + task_num)
    assert saved["given"] == [-1, 0, -1, 2, -1][:task_num]


def test_task_num_takes_the_first_tasks(tmp_path: Path) -> None:
    write_log(tmp_path / "dataset" / "tiny", 5)
    for program, *flags in (("SLmain.py", "--model_name=aitm"), ("RLmain.py", "--actor_name=aitm", *RL),
                            ("SLmain.py", "--model_name=aitm", "--polish=1")):
        printed = succeed(tmp_path, program, "--task_num=3", *flags)
        assert "task 2, AUC 0." in printed
        assert "task 3" not in printed
    for program, model in (("SLmain.py", "--model_name=aitm"), ("RLmain.py", "--actor_name=aitm")):
        refused = run_in_process(tmp_path, program, "--dataset_name=tiny", "--task_num=6", model, *SIZES)
        assert refused.stderr == "error: --task_num: 6, but dataset/tiny has 5: CTR, CTCVR, like, share, report\n"


def test_tables_of_the_experiments_take_five_tasks(tmp_path: Path) -> None:
    write_log(tmp_path / "dataset" / "tiny", 5)
    experiment = ExperimentArguments(datasets="tiny", models="mmoe", dataset_path=str(tmp_path / "dataset"), epoch=1,
                                     embed_dim=4, expert_num=2, critic_updates=3, critic_epoch=1,
                                     out=str(tmp_path / "out"))
    small: dict[str, Any] = {"bottom_mlp_dims": (8,), "tower_mlp_dims": (4,)}
    polish, critics = {**small, "polish_lambda": 1.0}, ("mmoe", "critics")
    constant, shuffled = ({**polish, "polish_method": method} for method in ("constant", "shuffled"))
    chosen = [Condition("main", "mmoe", "baseline", small),
              Condition("main", "mmoe", "critics", {**small, "memory_size": 1000}, program="RLmain.py"),
              Condition("main", "mmoe", "RMTL", polish, "constant", critics=critics),
              Condition("main", "mmoe", "constant", constant, "baseline"),
              Condition("main", "mmoe", "shuffled", shuffled, "constant", critics=critics)]
    rows = [execute(ExperimentRun("tiny", condition, 1), experiment) for condition in chosen]
    rows += [{**row, "seed": "2"} for row in rows]
    assert {"val_rank_correlation_report", "auc_report"} <= rows[1].keys()
    write_report(rows, tmp_path / "report", "the command")
    report = (tmp_path / "report" / "report.md").read_text()
    assert "**RMTL shows no significant difference from its control** (5 comparisons" in report
    assert "All 95 % intervals are between +" in report or "All 95 % intervals are between -" in report
    assert "report: effective sample size" in report

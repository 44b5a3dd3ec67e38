"""`RLmain.py` as a user runs it: the documented order of commands, what it refuses, and the other agents."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import read_tree, run_in_process

from common.run_dir import network_names
from env import compute_reward

SIZES = ("--embed_dim=8", "--bottom_mlp_dims=32,16", "--tower_mlp_dims=8", "--expert_num=2", "--device=cpu")
SL = (*SIZES, "--epoch=1")
RL = (*SIZES, "--epoch_updates=5", "--init_episode=200", "--batch_size=64")
AGENT_DIR = "chkpt/RL/res_TD3BC_esmm"


def succeed(folder: Path, program: str, *flags: str) -> str:
    """Run a program that is expected to succeed; return what it prints."""
    done = run_in_process(folder, program, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def refused(folder: Path, program: str, *flags: str) -> str:
    """Run a program that is expected to refuse in one line; return that line."""
    done = run_in_process(folder, program, *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


class Pipeline(NamedTuple):
    """A working directory after the documented commands, and what the second and the third of them printed."""

    folder: Path
    critics: str
    polish: str


@pytest.fixture(scope="module")
def pipeline(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Read only."""
    folder = tmp_path_factory.mktemp("pipeline")
    shutil.copytree(rt_tables, folder / "dataset" / "rt")
    succeed(folder, "SLmain.py", "--model_name=esmm", *SL)
    return Pipeline(folder, succeed(folder, "RLmain.py", "--epoch=2", *RL),
                    succeed(folder, "SLmain.py", "--model_name=ple", "--polish=1", *SL))


@pytest.fixture
def pipeline_dir(pipeline: Pipeline, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(pipeline.folder, tmp_path / "copy"))


def same_weights(one: Path, other: Path) -> bool:
    a, b = (torch.load(path, weights_only=True)["weights"] for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_documented_commands_run_in_order(pipeline: Pipeline) -> None:
    agent_dir = pipeline.folder / AGENT_DIR
    for name in network_names(2):
        assert (agent_dir / f"{name}.pth").exists()
    assert {"config.json", "metrics.csv", "curves.png", "checkpoint.pt"} <= {path.name for path in agent_dir.iterdir()}
    assert (pipeline.folder / "pretrain/memory.npz").exists()
    assert same_weights(agent_dir / "actor.pth", pipeline.folder / "pretrain/rt_esmm.pt")
    assert "held-out TD error" in pipeline.critics
    assert "zero outputs" in pipeline.critics
    assert re.search(r"(converged in|stopped after) epoch \d+", pipeline.critics)
    assert re.search(r"test: actor, task 1, AUC 0\.\d{10,}, Log-loss \d\.\d{10,}", pipeline.critics)

    assert "critics of esmm weight the loss of ple" in pipeline.polish
    assert "this run: full" in pipeline.polish
    assert "its last epoch" in pipeline.polish
    models = pipeline.folder / "chkpt/SL/rt_ple"
    assert (models / "rt_ple_1.0.pt").exists()
    assert not same_weights(models / "rt_ple_1.0_last.pt", pipeline.folder / "pretrain/rt_ple.pt")


def test_only_documented_files_are_written(pipeline: Pipeline) -> None:
    written = {name for name in read_tree(pipeline.folder) if not name.startswith("dataset")}
    assert not [name for name in written if name.endswith((".partial", ".lock"))]
    assert {Path(name).parts[0] for name in written} == {"chkpt", "pretrain"}


def test_missing_baseline_names_the_command(tables: Path) -> None:
    text = refused(tables.parent.parent, "RLmain.py", "--actor_name=aitm", "--epoch=1", *RL)
    assert "python3 SLmain.py --model_name=aitm" in text


def test_unknown_actor_is_refused_with_the_list(tmp_path: Path) -> None:
    text = refused(tmp_path, "RLmain.py", "--actor_name=bert")
    assert "bert" in text
    assert "singletask, sharedbottom, esmm, omoe, mmoe, ple, aitm, metaheac" in text


def test_replay_buffer_of_another_reward_is_refused(pipeline_dir: Path) -> None:
    """Until it is filled again."""
    text = refused(pipeline_dir, "RLmain.py", "--reward_type=norm", "--epoch=1", *RL)
    assert "memory.npz" in text
    assert "bce" in text
    assert "norm" in text
    assert "--refill" in text
    printed = succeed(pipeline_dir, "RLmain.py", "--reward_type=norm", "--epoch=1", "--refill", *RL)
    assert "filled with" in printed


def test_baseline_of_other_sizes_is_refused(pipeline: Pipeline) -> None:
    text = refused(pipeline.folder, "RLmain.py", "--epoch=1", *RL[1:], "--embed_dim=16")
    assert "embed_dim is 8, not 16" in text
    assert "python3 SLmain.py --model_name=esmm --expert_num=2 --embed_dim=16" in text


def test_uniform_sessions_are_relative_to_the_log(pipeline_dir: Path) -> None:
    """By default at most half of the log's sessions, so at most a third of the buffer's; the flag gives any number."""
    flags = [flag for flag in RL if not flag.startswith("--init_episode")]
    pattern = r"([\d,]+) sessions of uniform actions, and all ([\d,]+) of"
    found = re.search(pattern, succeed(pipeline_dir, "RLmain.py", *flags, "--epoch=1", "--refill"))
    assert found
    uniform, sessions = (int(number.replace(",", "")) for number in found.groups())
    assert uniform == sessions // 2 > 0
    found = re.search(pattern, succeed(pipeline_dir, "RLmain.py", *flags, "--epoch=1", "--refill", "--init_episode=0"))
    assert found
    assert found[1] == "0"


def test_actor_that_would_not_train_is_refused(pipeline: Pipeline) -> None:
    before = read_tree(pipeline.folder)
    text = refused(pipeline.folder, "RLmain.py", "--agent=ddpg", "--epoch=3", *RL)
    assert "3 epochs of 5 updates are 15, and it begins after 10,000" in text
    assert "--init_training_step" in text
    assert read_tree(pipeline.folder) == before


def test_action_normalizer_stores_rewarded_actions(pipeline_dir: Path) -> None:
    """The agent acts in [-1, 1]; the predictions that are rewarded and stored are in [0, 1]."""
    memory = pipeline_dir / "pretrain/normalized.npz"
    succeed(pipeline_dir, "RLmain.py", "--action_normalizer", f"--memory_path={memory}", "--epoch=1", *RL)
    with np.load(memory, allow_pickle=False) as stored:
        assert 0 <= stored["action"].min() < 0.1
        assert 0.9 < stored["action"].max() <= 1
        np.testing.assert_allclose(stored["reward"], compute_reward(stored["action"], stored["label"], "bce"),
                                   rtol=1e-5)


@pytest.mark.stress
def test_q_ranks_half_as_well_as_the_truth(pipeline_dir: Path) -> None:
    """The true expected return, which the simulator computes, is what an ideal critic would predict."""
    succeed(pipeline_dir, "SLmain.py", "--model_name=esmm", *SL[:-1], "--epoch=10", "--learning_rate=0.003")
    printed = succeed(pipeline_dir, "RLmain.py", *SIZES, "--init_episode=1000", "--refill", "--epoch=3",
                      "--epoch_updates=50", "--batch_size=256")
    found = re.findall(r"rank correlation of Q with the return (-?\d\.\d+) "
                       r"\(ideal predictions and their true expected return: (-?\d\.\d+)\)", printed)
    assert len(found) == 2, printed
    for reached, possible in found:
        assert float(possible) > 0, printed
        assert float(reached) >= 0.5 * float(possible), printed

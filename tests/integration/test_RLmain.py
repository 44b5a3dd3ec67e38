"""RLmain.py as a user runs it: the documented order, its refusals, stopping and resuming."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, command, run, snapshot

from env import compute_reward

SL = ("--embed_dim=8", "--expert_num=2", "--epoch=1", "--device=cpu")
RL = ("--embed_dim=8", "--expert_num=2", "--device=cpu", "--epoch_updates=5", "--init_episode=200", "--batch_size=64")


def succeed(cwd: Path, script: str, *flags: str) -> str:
    """Run a program that is expected to end well; return what it said."""
    done = run(cwd, script, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refuse(cwd: Path, script: str, *flags: str) -> str:
    """Run a program that is expected to refuse in one line; return that line."""
    done = run(cwd, script, *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def documented(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A working folder after the first two documented commands, and what they said. Read only."""
    folder = tmp_path_factory.mktemp("documented")
    shutil.copytree(rt_tables, folder / "dataset" / "rt")
    return (folder, succeed(folder, "SLmain.py", "--model_name=esmm", *SL),
            succeed(folder, "RLmain.py", "--epoch=2", *RL))


@pytest.fixture
def shop(documented: tuple[Path, str, str], tmp_path: Path) -> Path:
    """A copy of it, to go on in."""
    return Path(shutil.copytree(documented[0], tmp_path / "shop"))


NETWORKS = ("pretrain_actor", "actor", "actor_target", "critic1", "critic2", "critic1_target", "critic2_target")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(path, weights_only=True)["weights"])


def equal(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_documented_commands_run_in_order(shop: Path, documented: tuple[Path, str, str]) -> None:
    folder = shop / "chkpt/RL/res_TD3BC_esmm"
    for name in NETWORKS:
        assert (folder / f"{name}.pth").exists()
    assert {"config.json", "metrics.csv", "curves.png", "state.pt"} <= {path.name for path in folder.iterdir()}
    assert (shop / "pretrain/memory.npz").exists()
    assert equal(folder / "actor.pth", shop / "pretrain/rt_esmm.pt")
    said = documented[2]
    assert "held-out TD error" in said
    assert "zero outputs" in said
    assert re.search(r"(converged in|stopped after) epoch \d+", said)
    assert re.search(r"test: actor, task 1, AUC 0\.\d{10,}, Log-loss \d\.\d{10,}", said)

    said = succeed(shop, "SLmain.py", "--model_name=ple", "--polish=1", *SL)
    assert "critics of esmm weight the loss of ple" in said
    assert "this run: full" in said
    assert (shop / "chkpt/SL/rt_ple/rt_ple_1.0.pt").exists()
    assert "its last epoch" in said
    assert not equal(shop / "chkpt/SL/rt_ple/rt_ple_1.0_last.pt", shop / "pretrain/rt_ple.pt")


def test_nothing_is_left_behind_but_documented_files(documented: tuple[Path, str, str]) -> None:
    written = {name for name in snapshot(documented[0]) if not name.startswith("dataset")}
    assert not [name for name in written if name.endswith(".partial")]
    assert {Path(name).parts[0] for name in written} == {"chkpt", "pretrain"}


def test_without_a_baseline_it_names_the_command(tables: Path) -> None:
    text = refuse(tables.parent.parent, "RLmain.py", "--actor_name=aitm", "--epoch=1", *RL)
    assert "python3 SLmain.py --model_name=aitm" in text


def test_an_unknown_actor_is_refused_with_the_list(tmp_path: Path) -> None:
    text = refuse(tmp_path, "RLmain.py", "--actor_name=bert")
    assert "bert" in text
    assert "singletask, sharedbottom, esmm, omoe, mmoe, ple, aitm, metaheac" in text


def test_a_memory_of_another_reward_type_is_refused_until_a_refill(shop: Path) -> None:
    text = refuse(shop, "RLmain.py", "--reward_type=norm", "--epoch=1", *RL)
    assert "memory.npz" in text
    assert "another reward type (bce, not norm)" in text
    assert "--refill" in text
    said = succeed(shop, "RLmain.py", "--reward_type=norm", "--epoch=1", "--refill", *RL)
    assert "filled with" in said


def test_a_baseline_of_other_sizes_is_refused(shop: Path) -> None:
    text = refuse(shop, "RLmain.py", "--epoch=1", *RL[1:], "--embed_dim=16")
    assert "embed_dim is 8, not 16" in text
    assert "python3 SLmain.py --model_name=esmm --expert_num=2 --embed_dim=16" in text


def test_an_actor_that_would_not_train_is_refused(shop: Path) -> None:
    text = refuse(shop, "RLmain.py", "--agent=ddpg", "--epoch=3", *RL)
    assert "3 epochs of 5 updates are 15, and it begins after 10,000" in text


def test_agents_in_a_normalised_environment_store_what_was_rewarded(shop: Path) -> None:
    """The agent acts in [-1, 1]; the predictions that are rewarded and stored are in [0, 1]."""
    memory = shop / "pretrain/normalized.npz"
    succeed(shop, "RLmain.py", "--action_normalizer", f"--memory_path={memory}", "--epoch=1", *RL)
    with np.load(memory, allow_pickle=False) as stored:
        assert stored["action"].min() < 0.1
        assert 0.9 < stored["action"].max() <= 1
        np.testing.assert_allclose(stored["reward"], compute_reward(stored["action"], stored["label"], "bce"), rtol=1e-5)


def test_ddpg_trains_its_actor(shop: Path) -> None:
    said = succeed(shop, "RLmain.py", "--agent=ddpg", "--init_training_step=2", "--epoch=1", *RL)
    assert "test: actor, task 0" in said
    folder = shop / "chkpt/RL/res_DDPG_esmm"
    assert equal(folder / "pretrain_actor.pth", shop / "pretrain/rt_esmm.pt")
    assert not equal(folder / "actor.pth", folder / "pretrain_actor.pth")


def test_a_run_killed_and_resumed_ends_as_the_undisturbed_one(shop: Path, tmp_path: Path) -> None:
    flags = ("RLmain.py", "--epoch=4", "--converge_tolerance=0", *RL)
    other = Path(shutil.copytree(shop, tmp_path / "other"))
    succeed(other, *flags)
    folder = shop / "chkpt/RL/res_TD3BC_esmm"
    shutil.rmtree(folder)
    process = subprocess.Popen(command(*flags), cwd=shop, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=ENVIRONMENT)
    while not (folder / "state.pt").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "killed before it ended"
    assert not (folder / "critic1.pth").exists()
    said = succeed(shop, *flags, "--resume")
    assert "resuming after epoch" in said
    undisturbed = other / "chkpt/RL/res_TD3BC_esmm"
    assert (folder / "metrics.csv").read_bytes() == (undisturbed / "metrics.csv").read_bytes()
    for name in NETWORKS:
        assert equal(folder / f"{name}.pth", undisturbed / f"{name}.pth"), name


@pytest.mark.slow
def test_q_ranks_at_least_half_as_well_as_the_truth(shop: Path) -> None:
    """The true expected return, known to the simulator, is what an ideal critic would answer."""
    succeed(shop, "SLmain.py", "--model_name=esmm", *SL[:2], "--epoch=10", "--learning_rate=0.003", "--device=cpu")
    said = succeed(shop, "RLmain.py", *RL[:3], "--init_episode=1000", "--refill", "--epoch=3", "--epoch_updates=50",
                   "--batch_size=256")
    found = re.findall(r"rank correlation of Q with the return (-?\d\.\d+) "
                       r"\(ideal predictions and their true expected return: (-?\d\.\d+)\)",
                       said)
    assert len(found) == 2, said
    for reached, possible in found:
        assert float(possible) > 0, said
        assert float(reached) >= 0.5 * float(possible), said

"""Several processes on the same batches end where one process ends, up to rounding."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY, run

from layers.ops import relu_dropout

SIZES = ("--embed_dim=16", "--expert_num=4", "--epoch=2")
TRAIN = ("SLmain.py", "--model_name=ple", "--batch_size=333", *SIZES)
CRITICS = ("RLmain.py", "--actor_name=ple", "--batch_size=101", "--epoch_updates=4", "--init_episode=50", *SIZES)
RUNS = {
    "chkpt/SL/rt_ple/metrics.csv": TRAIN,
    "chkpt/RL/res_TD3BC_ple/metrics.csv": CRITICS,
    "chkpt/RL/res_DDPG_ple/metrics.csv": (*CRITICS, "--agent=ddpg", "--init_training_step=2"),
    "chkpt/SL/rt_ple/rt_ple_1.0_shuffled/metrics.csv": (*TRAIN, "--polish=1", "--polish_method=shuffled"),
    "chkpt/SL/rt_ple_gru/metrics.csv": (*TRAIN, "--encoder=gru"),
    "chkpt/RL/res_TD3BC_ple_critic_gru/metrics.csv": (*CRITICS, "--critic_encoder=gru", "--memory_path=windows.npz"),
}


@pytest.fixture(scope="module")
def finished(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    """A folder in which one process has run all of RUNS, and one in which two have; and what they printed.

    Each run of the two starts from the baseline and the critics of the one.
    """
    folders = [tmp_path_factory.mktemp(f"processes{count}") for count in (1, 2)]
    printed = ["", ""]
    for folder in folders:
        shutil.copytree(rt_tables, folder / "dataset" / "rt")
    for program, *flags in RUNS.values():
        for number, done in enumerate((run(folders[0], program, *flags), together(folders[1], program, *flags))):
            assert done.returncode == 0, done.stderr
            printed[number] += done.stdout
        for path in ("pretrain/rt_ple.pt", *(f"chkpt/RL/res_TD3BC_ple/critic{task}.pth" for task in (1, 2))):
            if (folders[0] / path).exists():
                shutil.copy(folders[0] / path, folders[1] / path)
    return list(zip(folders, printed, strict=True))


def together(cwd: Path, program: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                           str(REPOSITORY / program), *flags], cwd=cwd, env=ENVIRONMENT, capture_output=True,
                          text=True, check=False, timeout=120)


@pytest.mark.parametrize("path", RUNS)
def test_two_processes_reach_the_metrics_of_one(finished: list[tuple[Path, str]], path: str) -> None:
    tables = []
    for folder, _ in finished:
        with open(folder / path, encoding="utf-8", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    one, two = tables
    assert len(one) == len(two) >= 2
    for mine, theirs in zip(one, two, strict=True):
        for name, value in mine.items():
            if name == "split" or not value:
                assert theirs[name] == value
            else:  # Sums in another order, and few steps: learning doubles such differences again and again. The ranks
                # of a critic that is almost constant hang on its last digits.
                tolerance = 2e-3 if name.startswith("rank_correlation") else 1e-4
                np.testing.assert_allclose(float(theirs[name]), float(value), rtol=tolerance, atol=1e-6, err_msg=name)


def test_one_of_the_processes_speaks_and_writes(finished: list[tuple[Path, str]]) -> None:
    lines = [len(printed.splitlines()) for _, printed in finished]
    assert lines[0] == lines[1] > 20
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder, _ in finished]
    assert names[0] == names[1], "no partial files of those who do not write"


def test_a_users_mistake_is_told_once(tmp_path: Path) -> None:
    done = together(tmp_path, "SLmain.py", "--dataset_name=nowhere")
    assert done.returncode != 0
    assert done.stderr.count("error: dataset/nowhere: no such data set") == 1


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("width", [64, 7])  # 7: shares begin inside a random word
def test_shares_make_up_the_batch_and_its_random_numbers(size: int, width: int,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    x, number = torch.rand(50, width), torch.arange(50)
    monkeypatch.setattr(kernels, "first_row", 0)
    torch.manual_seed(3)
    whole = relu_dropout(x, 0.4, True)
    monkeypatch.setattr(world, "SIZE", size)
    numbers, dropped, parts = [], [], []
    for rank in range(size):
        monkeypatch.setattr(world, "RANK", rank)
        (mine, rows), part = world.share([x, number])
        torch.manual_seed(3)
        dropped.append(relu_dropout(mine, 0.4, True))
        numbers.append(rows)
        parts.append(part)
    assert torch.equal(torch.cat(numbers), number)
    assert torch.equal(torch.cat(dropped), whole)
    assert sum(parts) == pytest.approx(1)


def test_a_batch_smaller_than_the_company_is_everybodys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "SIZE", 4)
    (x,), part = world.share([torch.ones(3)])
    assert len(x) == 3
    assert part == 0.25


def test_alone_everything_is_the_identity() -> None:
    assert "RANK" not in os.environ
    x = torch.rand(5, 2)
    assert torch.equal(world.total(x), x)
    assert torch.equal(world.gather([x[:2], x[2:]]), x)
    (mine,), part = world.share([x])
    assert torch.equal(mine, x)
    assert part == 1

"""Two processes on the same batches compute what one process computes, up to rounding."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY, run_in_process

from common import distributed
from layers.ops import relu_dropout

SIZES = ("--embed_dim=8", "--bottom_mlp_dims=32,16", "--tower_mlp_dims=8", "--expert_num=4", "--epoch=2",
         "--device=cpu")
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
SHARED = ["pretrain/rt_ple.pt", *(f"chkpt/RL/res_TD3BC_ple/critic{task}.pth" for task in (1, 2))]

DRIVER = """
import json, runpy, shutil, sys
from pathlib import Path
from common import distributed
commands, shared, reference = *map(json.loads, sys.argv[1:3]), Path(sys.argv[3])
for program, *flags in commands:
    sys.argv = [program, *flags]
    runpy.run_path(program, run_name="__main__")
    distributed.barrier()
    for path in shared:
        if distributed.is_main_process() and Path(path).exists():
            shutil.copy(reference / path, path)
    distributed.barrier()
"""


@pytest.fixture(scope="module")
def runs(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    """A directory in which one process has run all of RUNS, and one in which two have; and what they printed.

    Each run of the two starts from the baseline and the critics of the one.
    """
    folders = [tmp_path_factory.mktemp(f"processes{count}") for count in (1, 2)]
    for folder in folders:
        shutil.copytree(rt_tables, folder / "dataset" / "rt")
    printed = ""
    for program, *flags in RUNS.values():
        done = run_in_process(folders[0], program, *flags)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    driver = tmp_path_factory.mktemp("driver") / "driver.py"
    driver.write_text(DRIVER)
    done = torchrun(folders[1], driver, json.dumps([(str(REPOSITORY / program), *flags)
                                                    for program, *flags in RUNS.values()]),
                    json.dumps(SHARED), str(folders[0]))
    assert done.returncode == 0, done.stderr
    return [(folders[0], printed), (folders[1], done.stdout)]


def torchrun(cwd: Path, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                           str(program), *arguments], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True,
                          check=False, timeout=300)


def read_metrics(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_two_processes_compute_the_metrics_of_one(runs: list[tuple[Path, str]]) -> None:
    for path in RUNS:
        one, two = (read_metrics(folder / path) for folder, _ in runs)
        assert len(one) == len(two) >= 2, path
        for expected, row in zip(one, two, strict=True):
            for name, value in expected.items():
                if name == "split" or not value:
                    assert row[name] == value
                else:  # Sums in another order, and few steps: learning doubles such differences again and again. The
                    # ranks of a critic that is almost constant depend on its last digits.
                    tolerance = 2e-3 if name.startswith("rank_correlation") else 1e-4
                    np.testing.assert_allclose(float(row[name]), float(value), rtol=tolerance, atol=1e-6,
                                               err_msg=f"{path}: {name}")


def test_only_the_main_process_prints_and_writes(runs: list[tuple[Path, str]]) -> None:
    lines = [len(printed.splitlines()) for _, printed in runs]
    assert lines[0] == lines[1] > 20
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder, _ in runs]
    assert names[0] == names[1], "no partial files of the other process"


def test_a_user_error_is_printed_once(tmp_path: Path) -> None:
    done = torchrun(tmp_path, REPOSITORY / "SLmain.py", "--dataset_name=nowhere")
    assert done.returncode != 0
    assert done.stderr.count("error: dataset/nowhere: no such data set") == 1


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("width", [64, 7])  # 7: shards begin inside a random word
def test_shards_make_up_batch_and_dropout(size: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, number = torch.rand(50, width), torch.arange(50)
    monkeypatch.setattr(distributed, "_first_row", 0)
    torch.manual_seed(3)
    whole = relu_dropout(x, 0.4, True)
    monkeypatch.setattr(distributed, "_world_size", size)
    numbers, dropped, fractions = [], [], []
    for rank in range(size):
        monkeypatch.setattr(distributed, "_rank", rank)
        (own, rows), fraction = distributed.shard([x, number])
        torch.manual_seed(3)
        dropped.append(relu_dropout(own, 0.4, True))
        numbers.append(rows)
        fractions.append(fraction)
    assert torch.equal(torch.cat(numbers), number)
    assert torch.equal(torch.cat(dropped), whole)
    assert sum(fractions) == pytest.approx(1)


def test_every_process_computes_a_tiny_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_world_size", 4)
    (x,), fraction = distributed.shard([torch.ones(3)])
    assert len(x) == 3
    assert fraction == 0.25


def test_in_a_single_process_everything_is_the_identity() -> None:
    assert "RANK" not in os.environ
    x = torch.rand(5, 2)
    assert torch.equal(distributed.all_reduce_sum(x), x)
    assert torch.equal(distributed.all_gather_rows([x[:2], x[2:]]), x)
    (own,), fraction = distributed.shard([x])
    assert torch.equal(own, x)
    assert fraction == 1

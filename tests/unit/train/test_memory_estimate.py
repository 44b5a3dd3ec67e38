"""What a run needs of memory is told before it takes any, and the estimate is near what it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, read_tree, run, user_error_message

import RLmain
import SLmain
from common import fileio
from dataset.simulate import SimulationConfig, simulate
from slmodels import build
from train.Arguments import RLArguments
from train.memory_estimate import UNIT_BYTES, network_size

DIMS = [100, 50, 7]


def test_network_size_allocates_nothing() -> None:
    def make() -> torch.nn.Module:
        return build("esmm", DIMS, 6, 16, [32, 8], [4], 2, 4, 0.2)

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    size = network_size(make, DIMS, 16)
    assert torch.equal(torch.rand(3), expected), "no random number is drawn"
    assert size.parameters == sum(one.numel() for one in make().parameters())
    assert size.activations_per_row == 16 + 32 + 8 + 2 * (4 + 1)  # the numbers' block, the bottom, both towers
    assert (size.first, size.fields, size.embed_dim, size.table) == (32, 3, 16, 157)
    assert size.step(1000) > 1000 * size.activations_per_row * UNIT_BYTES


PEAK = """
import resource, sys, torch
from slmodels import build
from common.device import pick_device
from train.memory_estimate import PARAMETER_BYTES, UNIT_BYTES, UNIT_BYTES_SECOND_ORDER, network_size
from train.supervised import bce_loss
from train.utils import EarlyStopper
pick_device("cpu")
torch.set_num_threads(1)
name, batch, embed_dim, rows = sys.argv[1], *map(int, sys.argv[2:])
dims = [rows // 7] * 7

def train(batch, dims, build):
    model = build()
    optimizer, stopper = torch.optim.Adam(model.parameters(), fused=True), EarlyStopper(3)
    for epoch in range(2):
        ids = torch.stack([torch.randint(one, (batch,)) for one in dims], 1)
        losses = model.losses((ids, torch.randn(batch, 6), (torch.rand(batch, 2) < 0.1).float()), bce_loss)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        stopper.is_continuable(model, float(epoch), epoch)

train(8, [2] * 7, lambda: build(name, [2] * 7, 6, 2, [8], [8], 2, 2, 0.2))
resident = int(open("/proc/self/statm").read().split()[1]) * 4096
make = lambda: build(name, dims, 6, embed_dim, [512, 256], [128, 64], 2, 8, 0.2)
train(batch, dims, make)
size = network_size(make, dims, embed_dim)
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident
unit = UNIT_BYTES_SECOND_ORDER if name == "metaheac" else UNIT_BYTES
print((size.parameters * PARAMETER_BYTES + size.step(batch, unit)) / used)
"""


@pytest.mark.stress
@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc")
@pytest.mark.parametrize("arguments", ["esmm 65536 128 5000", "esmm 2048 128 400000", "ple 16384 128 5000",
                                       "mmoe 16384 128 5000", "metaheac 16384 64 5000", "aitm 32768 64 5000"])
def test_the_estimate_is_near_what_training_takes(arguments: str) -> None:
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments.split()], env=ENVIRONMENT, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 2, "of what was used"


PEAK_OF_AN_AGENT = """
import json, resource, sys
import RLmain
from train import memory_estimate
from train.Arguments import RLArguments

needed, resident = [], []

def require_free_memory(size, what, free=None):
    needed.append(size)
    resident.append(int(open("/proc/self/statm").read().split()[1]) * 4096)

memory_estimate.require_free_memory = require_free_memory
for _ in ("a memory that is filled", "one that is read"):
    RLmain.main(RLArguments(embed_dim=32, device="cpu", epoch=1, epoch_updates=2, **json.loads(sys.argv[1])))
print(needed[0] / (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident[0]))
"""


@pytest.mark.stress
@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc")
@pytest.mark.parametrize("settings", ['{"batch_size": 16384, "memory_size": 50000}',
                                      '{"critic_encoder": "gru", "window": 50, "memory_size": 20000}'])
def test_the_estimate_is_near_what_an_agent_takes(tables: Path, settings: str) -> None:
    folder = tables.parent.parent
    made = run(folder, "SLmain.py", "--embed_dim=32", "--epoch=1", "--device=cpu")
    assert made.returncode == 0, made.stderr
    done = subprocess.run([sys.executable, "-c", PEAK_OF_AN_AGENT, settings], cwd=folder, env=ENVIRONMENT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout.split()[-1]) < 2, "of what was used"


@pytest.fixture
def four_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 4 GiB of memory free."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(f"MemAvailable:  {4 * 2**20} kB\n")
    monkeypatch.setattr(fileio, "PROC", tmp_path / "proc")
    monkeypatch.setattr(fileio, "CGROUP", tmp_path / "proc")


@pytest.mark.usefixtures("four_gib")
def test_run_larger_than_memory_is_refused(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = read_tree(tmp_path)
    text = user_error_message(lambda: SLmain.main(embed_dim=65536, expert_num=64, model_name="ple", device="cpu"))
    assert text.startswith("ple of ")
    assert "GiB of memory are needed, 4.0 GiB are free" in text
    assert read_tree(tmp_path) == before
    SLmain.main(embed_dim=8, epoch=1, device="cpu")
    before = read_tree(tmp_path)
    text = user_error_message(lambda: RLmain.main(RLArguments(embed_dim=8, memory_size=10**8, device="cpu")))
    assert text.startswith("a replay buffer of 100,000,000 transitions of 132 bytes")
    assert "about 24.8 GiB of memory are needed" in text
    settings = RLArguments(embed_dim=8, critic_encoder="gru", window=100, device="cpu")
    text = user_error_message(lambda: RLmain.main(settings))
    assert "transitions of 10428 bytes" in text, "a state is a window of 100"
    assert read_tree(tmp_path) == before


@pytest.mark.usefixtures("four_gib")
def test_raw_logs_are_refused_by_their_size(tmp_path: Path) -> None:
    text = user_error_message(lambda: simulate(tmp_path / "raw", SimulationConfig(events=100_000_000)))
    assert text.startswith("a simulated log of 100,000,000 events")

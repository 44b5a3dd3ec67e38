"""What several tests share: a small simulated log, its tables, and ways to run the programs as a user does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

from common.errors import UserError
from dataset.prepare import prepare
from dataset.simulate import SimulationConfig, simulate

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = SimulationConfig(events=12_000, items=600, property_rows=10_000, seed=7)

# The models here are tiny: a second thread costs more than it brings, above all on a machine that is shared.
torch.set_num_threads(1)

# The same examples every time: a test that fails today fails tomorrow.
hypothesis.settings.register_profile("rmtl", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("rmtl")


COUNTS: list[str] = []  # what trials in great number have come to; printed below the results


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for text in COUNTS:
        terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def raw_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated raw log of some 12,000 events. Read only."""
    folder = tmp_path_factory.mktemp("simulated") / "raw"
    simulate(folder, SMALL)
    return folder


@pytest.fixture(scope="session")
def rt_tables(raw_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The MDP tables of `raw_log`, some 4,500 rows. Read only."""
    folder = tmp_path_factory.mktemp("prepared") / "rt"
    prepare(raw_log, folder)
    return folder


@pytest.fixture
def tables(rt_tables: Path, tmp_path: Path) -> Path:
    """A copy of the MDP tables in `tmp_path`/dataset/rt, for a test to run on or to damage."""
    return Path(shutil.copytree(rt_tables, tmp_path / "dataset" / "rt"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same random weights, alone or among others."""
    torch.manual_seed(0)


def command(program: str, *flags: str) -> list[str]:
    """The command line of a script (`SLmain.py`) or a module (`dataset.prepare`) of the repository."""
    return [sys.executable, *([str(REPOSITORY / program)] if program.endswith(".py") else ["-m", program]), *flags]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run(cwd: Path, program: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as a user does, in the folder `cwd`."""
    return subprocess.run(command(program, *flags), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True,
                          check=False, timeout=300)


def snapshot(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def complaint(action: Callable[[], object]) -> str:
    """The text of the UserError that `action` raises: it has to be one line."""
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert text.strip(), "an error says what is wrong"
    assert "\n" not in text, "an error is one line"
    return text

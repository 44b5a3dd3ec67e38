"""What several tests share: a small simulated log, its tables, and ways to run the programs as a user does."""

from __future__ import annotations

import os

# One thread a process, set before torch is imported: the models here are tiny, and pytest runs a process a core.
os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import io
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import hypothesis
import pytest
import torch
from filelock import FileLock
from matplotlib.figure import Figure

from common.errors import UserError
from dataset.prepare import prepare
from dataset.simulate import SimulationConfig, simulate

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = SimulationConfig(events=12_000, items=600, property_rows=10_000, seed=7)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}

torch.set_num_threads(1)

# The same examples every time: a test that fails today fails tomorrow.
hypothesis.settings.register_profile("rmtl", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("rmtl")


# --------------------------------------------------------------------------------------------- lines below the results

SUMMARY_LINES: list[str] = []  # counts of tests that try many cases


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist: the main process prints
        session.config.workeroutput["summary_lines"] = SUMMARY_LINES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    SUMMARY_LINES.extend(getattr(node, "workeroutput", {}).get("summary_lines", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for text in sorted(SUMMARY_LINES):
        terminalreporter.write_line(text)


# ------------------------------------------------------------------------------------------------------------ fixtures


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, once for all processes of a test run. Read only."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not folder.exists():
            unfinished = root / f"{name}.unfinished"
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def raw_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated raw log of some 12,000 events. Read only."""
    return make_once(tmp_path_factory, "raw", lambda folder: simulate(folder, SMALL))


@pytest.fixture(scope="session")
def rt_tables(raw_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The MDP tables of `raw_log`, some 4,500 rows. Read only."""
    return make_once(tmp_path_factory, "rt", lambda folder: prepare(raw_log, folder))


@pytest.fixture
def tables(rt_tables: Path, tmp_path: Path) -> Path:
    """A copy of the MDP tables in `tmp_path`/dataset/rt, for a test to run on or to damage."""
    return Path(shutil.copytree(rt_tables, tmp_path / "dataset" / "rt"))


@pytest.fixture(scope="session", autouse=True)
def _empty_figures() -> Iterator[None]:
    """Pictures are written without their content: drawing takes most of a small run. Programs in processes of their own
    draw all of it."""
    savefig = Figure.savefig

    def save_empty(figure: Figure, *args: Any, **options: Any) -> None:
        for axis in figure.axes:
            axis.remove()
        figure.set_layout_engine("none")
        savefig(figure, *args, **{**options, "dpi": 10})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_empty)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same random weights, alone or among others."""
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------------------------- the programs


def command(program: str, *flags: str) -> list[str]:
    """The command line of a script (`SLmain.py`) or a module (`dataset.prepare`) of the repository."""
    return [sys.executable, *([str(REPOSITORY / program)] if program.endswith(".py") else ["-m", program]), *flags]


def run(cwd: Path, program: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end in a process of its own, in the folder `cwd`."""
    return subprocess.run(command(program, *flags), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True,
                          check=False, timeout=300)


def run_in_process(cwd: Path, program: str, *flags: str,
                   stderr: TextIO | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script (`SLmain.py`) in this process, which saves the seconds that importing torch takes."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, handlers = sys.argv, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [str(REPOSITORY / program), *flags]
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(stderr or err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        command_run, sys.argv = sys.argv, argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(command_run, code, out.getvalue(), err.getvalue())


# -------------------------------------------------------------------------------------------------- what tests look at


def read_tree(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def user_error_message(action: Callable[[], object]) -> str:
    """The text of the UserError that `action` raises: it has to be one line."""
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert text.strip(), "an error has a text"
    assert "\n" not in text, "an error is one line"
    return text



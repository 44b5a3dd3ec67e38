"""Programs answer before they import torch, and choose how threads wait beside other work."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, REPOSITORY

from common import startup
from common.startup import choose_threads, cpu_quota, other_load, usable_processors

PROGRAMS = ("SLmain.py", "RLmain.py", "predict.py", "env.py", "dataset.prepare", "dataset.simulate", "experiments",
            "experiments.tune", "experiments.boosting", "experiments.controls")
RUN = """
import runpy, sys
sys.argv[:] = sys.argv[1:]
try:
    (runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module)(sys.argv[0], run_name="__main__")
finally:
    print("slow imports:", [name for name in ("torch", "sklearn", "matplotlib") if name in sys.modules])
"""


def answer(folder: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, output and error of a program, which must not import what is slow."""
    program = str(REPOSITORY / words[0]) if words[0].endswith(".py") else words[0]
    done = subprocess.run([sys.executable, "-c", RUN, program, *words[1:]], cwd=folder, env=ENVIRONMENT, text=True,
                          capture_output=True, check=False)
    assert done.stdout.endswith("slow imports: []\n"), done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_fast(program: str, tmp_path: Path) -> None:
    code, output, _ = answer(tmp_path, program, "--help")
    assert code == 0
    assert "usage:" in output


@pytest.mark.parametrize(("words", "expected"), [
    (["SLmain.py", "--model_nam=ple"], "did you mean --model_name"),
    (["SLmain.py", "--model_name=esm"], "unknown 'esm': one of singletask"),
    (["SLmain.py", "--dataset_name=kr"], "no such data set"),
    (["SLmain.py", "--polish=1"], "no critics there"),
    (["RLmain.py"], "no such baseline"),
    (["RLmain.py", "--agent=td3bc", "--epoch=1"], "its actor would not train"),
    (["predict.py", "--rows=new.csv"], "--model: the file of a model is needed"),
    (["predict.py", "--rows=new.csv", "--model=absent.pt"], "absent.pt: no such file"),
    (["experiments", "--tables=mai"], "unknown 'mai'"),
    (["experiments", "--datasets=kr"], "no such data set"),
    (["experiments.tune", "--model_name=esm"], "unknown 'esm': one of singletask"),
])
def test_mistakes_are_told_fast(words: list[str], expected: str, tmp_path: Path) -> None:
    code, _, error = answer(tmp_path, *words)
    assert (code, len(error.splitlines())) == (2, 1), error
    assert expected in error
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of four processors without other work and without a quota."""
    monkeypatch.setattr(startup, "usable_processors", lambda: range(4))
    monkeypatch.setattr(startup, "other_load", lambda _: 0.1)
    monkeypatch.setattr(startup, "cpu_quota", lambda: 4.0)


@pytest.mark.usefixtures("idle")
def test_threads_beside_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    assert (choose_threads(environment), environment) == ("", {})
    monkeypatch.setattr(startup, "other_load", lambda _: 1.0)
    assert "other processes use 1.0 of 4 processors" in choose_threads(environment)
    assert environment == {"OMP_WAIT_POLICY": "passive"}, "results depend on how many threads there are, not on this"
    for given in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "5"}, {"OMP_NUM_THREADS": "1"}):
        environment = dict(given)
        assert (choose_threads(environment), environment) == ("", given)


@pytest.mark.usefixtures("idle")
def test_threads_of_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "cpu_quota", lambda: 2.5)
    environment: dict[str, str] = {}
    assert choose_threads(environment) == "2 threads, as the control group has a quota of 2.5 processors"
    assert environment == {"OMP_NUM_THREADS": "2"}
    environment = {"OMP_NUM_THREADS": "3"}
    assert (choose_threads(environment), environment) == ("", {"OMP_NUM_THREADS": "3"})


@pytest.mark.parametrize(("own", "files", "expected"), [
    ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),
    ("0::/a\n", {"cpu.max": "50000 100000"}, 0.5),
    ("0::/a\n", {"a/cpu.max": "not a number"}, float("inf")),
    ("3:cpu,cpuacct:/job\n1:memory:/\n", {"cpu/job/cpu.cfs_quota_us": "300000", "cpu/job/cpu.cfs_period_us": "100000"},
     3.0),
    ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
])
def test_cpu_quota(own: str, files: dict[str, str], expected: float, tmp_path: Path,
                   monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self").write_text(own)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    monkeypatch.setattr(startup, "OWN_CGROUPS", tmp_path / "self")
    monkeypatch.setattr(startup, "CGROUPS", tmp_path / "groups")
    assert cpu_quota() == expected


def test_load_is_that_of_other_processes_on_these_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a second another process works 0.7 s on processor 1, and this one 0.2 s on processor 0."""
    stat, own, now = tmp_path / "stat", [0.0, 0.2], [10.0, 11.0]
    texts = ["cpu 0 0\ncpu0 100 0 0 500 9 0 0 0 0 0\ncpu1 100 50 0 500 9 0 0 0 0 0\ncpu2 0 0 0 0 0 0 0 0 0 0\n",
             "cpu 0 0\ncpu0 115 0 5 580 9 0 0 0 0 0\ncpu1 120 100 0 530 9 0 0 0 0 0\ncpu2 99 0 0 0 0 0 0 0 0 0\n"]
    monkeypatch.setattr(startup, "STAT", stat)
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    monkeypatch.setattr(startup, "_own_seconds", lambda: own.pop(0))
    monkeypatch.setattr(time, "monotonic", lambda: now.pop(0))
    stat.write_text(texts[0])
    monkeypatch.setattr(time, "sleep", lambda _: stat.write_text(texts[1]))
    assert other_load([0, 1]) == pytest.approx(0.7)


def test_usable_processors_are_those_of_taskset() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no processor affinity here")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        assert usable_processors() == [max(before)]
    finally:
        os.sched_setaffinity(0, before)

"""Faults: programs that are killed or interrupted, full and read-only disks, two runs at once, and determinism."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import crash_trials
import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY, SUMMARY_LINES, command, make_once, read_tree, user_error_message

import RLmain
import SLmain
from common import errors
from common.errors import UserError
from common.fileio import check_writable, exclusive_lock
from dataset.prepare import prepare
from dataset.simulate import SimulationConfig, simulate
from train.Arguments import RLArguments

SIZES: dict[str, Any] = {"embed_dim": 8, "bottom_mlp_dims": (32, 16), "tower_mlp_dims": (8,), "device": "cpu"}
SL: dict[str, Any] = {**SIZES, "epoch": 2, "batch_size": 512}
RL: dict[str, Any] = {**SIZES, "epoch": 2, "epoch_updates": 5, "init_episode": 50, "batch_size": 64}


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
            for name, value in settings.items()]


PROGRAMS: dict[str, Callable[[], object]] = {
    "prepare": lambda: prepare(Path("raw"), Path("dataset/new")),
    "simulate": lambda: simulate(Path("raw-new"), SimulationConfig(events=2_000, items=100, property_rows=2_000)),
    "SLmain": lambda: SLmain.main(**SL),
    "RLmain": lambda: RLmain.main(RLArguments(**RL, refill=True)),
    "polish": lambda: SLmain.main(**SL, polish_lambda=1.0),
}
NEW = {"prepare": "dataset/new", "simulate": "raw-new"}  # directories that these two do not overwrite
SL_DIR, RL_DIR, POLISH_DIR = "chkpt/SL/rt_esmm", "chkpt/RL/res_TD3BC_esmm", "chkpt/SL/rt_esmm/rt_esmm_1.0"


@pytest.fixture(scope="session")
def pipeline_run(raw_log: Path, rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory after all PROGRAMS. Read only."""
    def make(folder: Path) -> None:
        shutil.copytree(rt_tables, folder / "dataset" / "rt")
        shutil.copytree(raw_log, folder / "raw")
        with contextlib.chdir(folder):
            for program in PROGRAMS.values():
                program()
    return make_once(tmp_path_factory, "faults", make)


@pytest.fixture
def pipeline_dir(pipeline_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that directory, and this process in it."""
    folder = Path(shutil.copytree(pipeline_run, tmp_path / "copy"))
    for name in NEW.values():
        shutil.rmtree(folder / name)
    monkeypatch.chdir(folder)
    return folder


# ---------------------------------------------------------------------------------------------- killed and interrupted


@pytest.mark.stress
def test_programs_killed_at_random_moments() -> None:
    """50 trials of each program, resumed: they end as the undisturbed run (`crash_trials`)."""
    done = subprocess.run([sys.executable, str(REPOSITORY / "tests/robustness/crash_trials.py"), "--trials=50"],
                          env=ENVIRONMENT, capture_output=True, text=True, check=False)
    SUMMARY_LINES.extend(done.stdout.splitlines())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("50 of 50 ended like the undisturbed run") == 6


def start(program: str, settings: dict[str, Any], run_dir: str) -> int:
    """Fork a run, wait for its first checkpoint, and return its process id."""
    process = crash_trials.start(shlex.join([program, *flags(settings)]), Path.cwd())
    while not Path(run_dir, "checkpoint.pt").exists():
        time.sleep(0.002)
    return process


@pytest.mark.parametrize(("program", "settings", "run_dir"), [
    ("SLmain.py", {**SL, "model_name": "ple", "expert_num": 2, "epoch": 5, "patience": 5}, "chkpt/SL/rt_ple"),
    ("RLmain.py", {**RL, "epoch": 5, "converge_tolerance": 0}, RL_DIR)], ids=["SLmain", "RLmain"])
def test_killed_run_resumes_to_the_same_result(pipeline_dir: Path, tmp_path: Path, program: str,
                                               settings: dict[str, Any], run_dir: str) -> None:
    """SIGKILL after the first checkpoint, then --resume: dropout, order of rows and Adam continue."""
    shutil.rmtree(run_dir, ignore_errors=True)
    uninterrupted = Path(shutil.copytree(pipeline_dir, tmp_path / "uninterrupted"))
    typed = shlex.join([program, *flags(settings)])
    crash_trials.succeed(typed, uninterrupted)
    process = start(program, settings, run_dir)
    os.kill(process, signal.SIGKILL)
    assert crash_trials.end(process) == -signal.SIGKILL, "it ended before it was killed"
    assert not Path(run_dir, "metrics.csv").exists()
    crash_trials.succeed(f"{typed} --resume", pipeline_dir)
    expected, result = read_tree(uninterrupted), read_tree(pipeline_dir)
    names = [name for name in expected if name.endswith((".pt", ".pth", "metrics.csv")) and "checkpoint" not in name]
    assert f"{run_dir}/metrics.csv" in names
    assert [name for name in names if result.get(name) != expected[name]] == []


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_program_prints_how_to_resume(pipeline_dir: Path, sent: signal.Signals, code: int) -> None:
    settings = {**SL, "epoch": 1000, "patience": 1000, "save_dir": "chkpt/a b"}
    process = start("SLmain.py", settings, "chkpt/a b/rt_esmm")
    os.kill(process, sent)
    assert crash_trials.end(process) == code
    typed = shlex.join(["SLmain.py", *flags(settings)])
    assert crash_trials.stderr_of(pipeline_dir) == f"interrupted; resume with: python3 {typed} --resume\n"
    assert not [name for name in read_tree(pipeline_dir) if name.endswith((".partial", ".lock"))]


def restore_sigint() -> None:
    """Background processes of a shell (`&`) ignore Ctrl-C, and so do their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("program", ["SLmain.py", "RLmain.py", "experiments"])
def test_ctrl_c_while_importing_prints_no_traceback(tmp_path: Path, program: str) -> None:
    for name in ("dataset/rt/train.csv", "pretrain/rt_esmm.pt"):  # without them RLmain ends before it imports torch
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    before = read_tree(tmp_path)
    with subprocess.Popen(command(program), env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, preexec_fn=restore_sigint) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None, process.stderr
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "")
    assert process.returncode == -signal.SIGINT
    assert read_tree(tmp_path) == before


def test_program_without_resume_is_run_again(capsys: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(errors, "_resumable_run_started", True)
    monkeypatch.setattr(errors, "command_line", lambda: "python3 -m dataset.prepare --raw raw --out new")
    with pytest.raises(SystemExit) as stopped:
        errors.cli_entry_point(main)()
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted; resume with: python3 -m dataset.prepare --raw raw --out new\n"


def test_library_error_by_interruption_is_an_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    """As torch raises when it is interrupted in the middle of a checkpoint."""
    def main() -> None:
        try:
            raise errors.Terminated
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    with pytest.raises(SystemExit) as stopped:
        errors.cli_entry_point(main)()
    assert stopped.value.code == 143
    assert capsys.readouterr().err.startswith("interrupted; ")


def test_temporary_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    """And those of living ones are not."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"rt.{dead.pid}.partial").mkdir()
    (tmp_path / f"rt.{dead.pid}.partial" / "train.csv").write_text("half")
    (tmp_path / f"checkpoint.pt.{dead.pid}.partial").write_text("half")
    kept = {f"checkpoint.pt.{os.getppid()}.partial", "mine.partial", "mine.csv.partial"}
    for name in kept:
        (tmp_path / name).write_text("x")
    check_writable(tmp_path)
    assert set(os.listdir(tmp_path)) == kept


def test_new_run_mixes_no_files_with_the_old(pipeline_dir: Path) -> None:
    """Stopped in its first epoch: no metrics that are not of its config.json, no model, no checkpoint."""
    before = read_tree(pipeline_dir / SL_DIR)
    assert "NaN" in user_error_message(lambda: SLmain.main(**{**SL, "learning_rate": 1e30}))
    after = read_tree(pipeline_dir / SL_DIR)
    assert json.loads(after["config.json"])["settings"]["learning_rate"] == 1e30
    assert set(after) - {"config.json"} == {
        name if name.startswith("rt_esmm_1.0") else re.sub(r"(\.\w+)$", r".previous\1", name) for name in before}
    for name in ("metrics.csv", "checkpoint.pt", "rt_esmm_0.0.pt", "config.json"):
        assert after[re.sub(r"(\.\w+)$", r".previous\1", name)] == before[name]


def test_critics_of_two_runs_are_refused(pipeline_dir: Path) -> None:
    """As a run leaves them that is killed between writing the one and the other."""
    other = pipeline_dir / "other"
    RLmain.main(RLArguments(**{**RL, "critic_lr": 0.002}, save_dir=str(other)))
    shutil.copy(other / "res_TD3BC_esmm" / "critic1.pth", f"{RL_DIR}/critic1.pth")
    text = user_error_message(PROGRAMS["polish"])
    assert "critic2.pth: its agent is" in text
    assert "python3 RLmain.py --actor_name=esmm" in text


@pytest.mark.parametrize("origin", ["baseline", "critics"])
def test_polish_resumes_from_the_same_origin_only(pipeline_dir: Path, origin: str) -> None:
    if origin == "baseline":
        SLmain.main(**{**SL, "learning_rate": 0.002})
    else:
        RLmain.main(RLArguments(**{**RL, "critic_lr": 0.002}))
    before = read_tree(pipeline_dir)
    text = user_error_message(lambda: SLmain.main(**SL, polish_lambda=1.0, resume=True))
    assert f"different {origin}" in text
    assert read_tree(pipeline_dir) == before


# ---------------------------------------------------------------------------------------------------------------- disk


@pytest.fixture
def small_disk(pipeline_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of `pipeline_run` on a small disk of its own, and this process in it."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True,
                      check=False).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        folder = Path(shutil.copytree(pipeline_run, place / "copy"))
        for name in NEW.values():
            shutil.rmtree(folder / name)
        monkeypatch.chdir(folder)
        yield folder
    finally:
        monkeypatch.undo()
        subprocess.run(["umount", "-l", str(place)], check=True)


def leave_free(folder: Path, pages: int) -> None:
    """Leave so many pages of 4 KiB free on the disk of a folder."""
    used = sum(-(-os.path.getsize(path) // 4096) if path.is_file() else 0 for path in folder.rglob("*"))
    subprocess.run(["mount", "-o", f"remount,size={(used + pages) * 4096}", str(folder.parent)], check=True)


def result_pages(name: str, pipeline_run: Path) -> int:
    """How many pages the results of a program take, about."""
    roots = {"prepare": "dataset/new", "simulate": "raw-new", "SLmain": "chkpt/SL/rt_esmm", "RLmain": "chkpt/RL",
             "polish": "chkpt/SL/rt_esmm/rt_esmm_1.0"}
    return sum(-(-path.stat().st_size // 4096) for path in (pipeline_run / roots[name]).rglob("*") if path.is_file())


@pytest.mark.stress
@pytest.mark.parametrize("name", PROGRAMS)
def test_full_disk_is_one_line_and_loses_nothing(small_disk: Path, pipeline_run: Path, name: str) -> None:
    """With no room at all, with a little more, ...: each time it is another file that does not fit."""
    trials = 25
    messages, ended = [], 0
    for pages in np.linspace(0, result_pages(name, pipeline_run), trials, endpoint=False).astype(int):
        before = read_tree(small_disk)
        leave_free(small_disk, int(pages))
        try:
            PROGRAMS[name]()
            ended += 1
        except UserError as error:
            messages.append(str(error))
        after = read_tree(small_disk)
        assert not [path for path in after if path.endswith((".partial", ".lock"))]
        for path, content in before.items():
            aside = re.sub(r"(\.\w+)$", r".previous\1", path)
            assert path.startswith("pretrain") or content in (after.get(path), after.get(aside)) or ended, path
        subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk.parent)], check=True)
        shutil.rmtree(small_disk)
        shutil.copytree(pipeline_run, small_disk)
        for new in NEW.values():
            shutil.rmtree(small_disk / new)
        os.chdir(small_disk)
    assert len(messages) >= trials // 2
    for text in messages:
        assert "\n" not in text
        assert re.search(r": cannot write: No space left on device$", text), text
    SUMMARY_LINES.append(f"full disk: {name} {len(messages)} of {len(messages)} refusals in one line, with all earlier "
                         "files intact")


@pytest.mark.parametrize("name", PROGRAMS)
def test_read_only_disk_is_one_line(small_disk: Path, name: str) -> None:
    before = read_tree(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk.parent)], check=True)
    assert re.search(r": cannot write: Read-only file system$", user_error_message(PROGRAMS[name]))
    assert read_tree(small_disk) == before


RUN_FILES = ("checkpoint.pt", "config.json", "metrics.csv", "curves.png")
IN_THE_WAY = {
    "SLmain": [*(f"{SL_DIR}/{name}" for name in (*RUN_FILES, "catemapper.json", "rt_esmm_0.0.pt")),
               "pretrain/rt_esmm.pt", "chkpt/SL/.rt_esmm.lock"],
    "RLmain": [*(f"{RL_DIR}/{name}" for name in (*RUN_FILES, "actor.pth", "critic2_target.pth")),
               "pretrain/memory.npz"],
    "polish": [*(f"{POLISH_DIR}/{name}" for name in (*RUN_FILES, "weights.png")), "chkpt/SL/rt_esmm/rt_esmm_1.0.pt"],
    "prepare": ["dataset/.new.lock"],
}


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_directory_in_place_of_a_file_is_refused(pipeline_dir: Path, pipeline_run: Path, name: str) -> None:
    """Before the run, with everything as it was."""
    for path in map(Path, IN_THE_WAY[name]):
        path.unlink(missing_ok=True)
        (path / "inside").mkdir(parents=True)
        (path / "inside" / "mine.txt").write_text("mine")
        before = read_tree(pipeline_dir)
        text = user_error_message(PROGRAMS[name])
        assert re.match(rf"(/.*/)?{re.escape(str(path))}: cannot write: ", text), text
        assert read_tree(pipeline_dir) == before
        shutil.rmtree(path)
        if (pipeline_run / path).exists():
            shutil.copy(pipeline_run / path, path)


@pytest.mark.stress
def test_full_disk_under_stdout_is_one_line(small_disk: Path) -> None:
    leave_free(small_disk, 0)
    with open(small_disk / "log", "wb") as log:
        done = subprocess.run(command("env.py"), env=ENVIRONMENT, stdout=log, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr.decode() == "error: the output: No space left on device\n"


# --------------------------------------------------------------------------------------------------------- two at once


def test_second_run_into_a_directory_is_refused(pipeline_dir: Path) -> None:
    Path(SL_DIR, "checkpoint.pt").unlink()
    first = start("SLmain.py", {**SL, "epoch": 1000, "patience": 1000}, SL_DIR)
    try:
        text = user_error_message(PROGRAMS["SLmain"])
        assert re.fullmatch(rf"chkpt/SL/rt_esmm: locked by process {first} \(started \d{{4}}-\d\d-\d\d "
                            r"\d\d:\d\d:\d\d: python3 SLmain.py .*\): .*", text), text
        text = user_error_message(lambda: SLmain.main(**SL, save_dir="elsewhere"))
        assert text.startswith(f"pretrain/rt_esmm.pt: locked by process {first} ")
    finally:
        os.kill(first, signal.SIGKILL)
        crash_trials.end(first)
    assert Path("chkpt/SL/.rt_esmm.lock").exists(), "left by the dead process"
    SLmain.main(**SL)
    assert not Path("chkpt/SL/.rt_esmm.lock").exists()


@pytest.mark.parametrize(("name", "place"), [("prepare", "dataset/new"), ("simulate", "raw-new"),
                                             ("RLmain", "chkpt/RL/res_TD3BC_esmm"), ("RLmain", "pretrain/memory.npz"),
                                             ("polish", "chkpt/SL/rt_esmm/rt_esmm_1.0")])
def test_every_program_locks_its_output(pipeline_dir: Path, name: str, place: str) -> None:
    before = read_tree(pipeline_dir)
    with exclusive_lock(Path(place)):
        assert user_error_message(PROGRAMS[name]).startswith(f"{place}: locked by process {os.getpid()} (started ")
    if place != "pretrain/memory.npz":  # which is filled when the run has begun
        assert read_tree(pipeline_dir) == before


def test_lock_of_a_dead_process_is_ignored(tmp_path: Path) -> None:
    (tmp_path / ".run.lock").write_text(json.dumps({"pid": os.getppid(), "started": "then", "command": "x"}))
    with exclusive_lock(tmp_path / "run"):
        assert json.loads((tmp_path / ".run.lock").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


HOLD = """
import sys, time
from pathlib import Path
from common.errors import UserError
from common.fileio import exclusive_lock
got = 0
end = time.time() + 1.5
while time.time() < end:
    try:
        with exclusive_lock(Path(sys.argv[1])):
            mark = Path(sys.argv[1] + ".alone")
            mark.mkdir()   # fails where somebody else is inside
            mark.rmdir()
            got += 1
    except UserError as error:
        assert "locked by" in str(error), error
print(got)
"""


def test_lock_is_held_by_one_process(tmp_path: Path) -> None:
    """Of four that take and release it as fast as they can."""
    processes = [subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    printed = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, printed
    assert sum(int(out) for out, _ in printed) > 50


# --------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.stress
def test_same_seed_gives_the_same_bytes(rt_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics, weights and replay buffer of all three commands, with layers wide enough for two threads to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one, two = (run_pipeline(tmp_path / name, rt_tables, monkeypatch) for name in ("one", "two"))
    finally:
        torch.set_num_threads(threads)
    assert len(one) >= 14
    assert [name for name in one if one[name] != two[name]] == []


def run_pipeline(folder: Path, rt_tables: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    shutil.copytree(rt_tables, folder / "dataset" / "rt")
    monkeypatch.chdir(folder)
    sizes: dict[str, Any] = {"embed_dim": 64, "bottom_mlp_dims": (128, 64), "tower_mlp_dims": (32,), "device": "cpu"}
    SLmain.main(**sizes, epoch=1)
    RLmain.main(RLArguments(**sizes, epoch=1, epoch_updates=10, init_episode=200))
    SLmain.main(**sizes, epoch=1, polish_lambda=1.0)
    return {name: content for name, content in read_tree(folder).items()
            if name.endswith((".pt", ".pth", ".npz", "metrics.csv"))}

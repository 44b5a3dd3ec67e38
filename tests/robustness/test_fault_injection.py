"""A bad day, on purpose: programs killed, disks full, folders in the way, two runs at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COUNTS, ENVIRONMENT, REPOSITORY, command, complaint, run, snapshot

import RLmain
import SLmain
from common.fileio import check_writable, exclusive_lock
from dataset.prepare import prepare
from dataset.simulate import SimulationConfig, simulate
from train.Arguments import RLArguments

SL: dict[str, Any] = {"embed_dim": 8, "epoch": 2, "batch_size": 512, "device": "cpu"}
RL: dict[str, Any] = {"embed_dim": 8, "epoch": 2, "epoch_updates": 5, "init_episode": 50, "batch_size": 64,
                      "device": "cpu"}


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def finished(raw_log: Path, rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder after the three documented commands. Read only."""
    folder = tmp_path_factory.mktemp("finished") / "shop"
    shutil.copytree(rt_tables, folder / "dataset" / "rt")
    shutil.copytree(raw_log, folder / "raw")
    here = Path.cwd()
    os.chdir(folder)
    try:
        for name in PROGRAMS:
            PROGRAMS[name]()
    finally:
        os.chdir(here)
    return folder


PROGRAMS: dict[str, Callable[[], object]] = {
    "prepare": lambda: prepare(Path("raw"), Path("dataset/new")),
    "simulate": lambda: simulate(Path("raw-new"), SimulationConfig(events=2_000, items=100, property_rows=2_000)),
    "SLmain": lambda: SLmain.main(**SL),
    "RLmain": lambda: RLmain.main(RLArguments(**RL, refill=True)),
    "polish": lambda: SLmain.main(**SL, polish_lambda=1.0),
}
NEW = {"prepare": "dataset/new", "simulate": "raw-new"}  # what these two refuse to overwrite


@pytest.fixture
def shop(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, and this process in it."""
    folder = Path(shutil.copytree(finished, tmp_path / "shop"))
    for name in NEW.values():
        shutil.rmtree(folder / name)
    monkeypatch.chdir(folder)
    return folder


# -------------------------------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize("count", [3, pytest.param(50, marks=pytest.mark.torture)])
def test_programs_killed_at_random_moments_end_as_if_they_had_not_been(count: int) -> None:
    """`tests/crash_trials.py`, which says how."""
    done = subprocess.run([sys.executable, str(REPOSITORY / "tests" / "crash_trials.py"), f"--trials={count}"],
                          env=ENVIRONMENT, capture_output=True, text=True, check=False)
    COUNTS.extend(done.stdout.splitlines())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"{count} of {count} ended like the undisturbed run") == 5


def heed_ctrl_c() -> None:
    """A program that a script starts behind its back (`&`) ignores Ctrl-C, and so do all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_program_that_is_stopped_says_in_one_line_how_to_go_on(shop: Path, sent: signal.Signals, code: int) -> None:
    typed = ["--model_name=esmm", *flags({**SL, "epoch": 1000}), "--patience=1000", "--save_dir=chkpt/a b"]
    with subprocess.Popen(command("SLmain.py", *typed), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, preexec_fn=heed_ctrl_c) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("epoch 2"):
            assert process.poll() is None, process.stderr
        process.send_signal(sent)
        said = process.communicate()[1]
    assert process.returncode == code
    found = re.fullmatch(r"interrupted; resume with: python3 (\S*SLmain.py .*)\n", said)
    assert found, said
    quoted = " ".join(typed[:-1])
    assert found[1].endswith(f"{quoted} '--save_dir=chkpt/a b' --resume")
    assert not [name for name in snapshot(shop) if name.endswith((".partial", ".lock"))]


@pytest.mark.parametrize("program", ["SLmain.py", "RLmain.py", "experiments.py"])
def test_ctrl_c_while_torch_is_imported_is_no_traceback(tmp_path: Path, program: str) -> None:
    with subprocess.Popen(command(program), env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None, process.stderr
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "")
    assert process.returncode == -signal.SIGINT
    assert not list(tmp_path.iterdir())


def test_a_program_without_resume_is_to_be_run_again(capsys: pytest.CaptureFixture[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "books_begun", True)
    monkeypatch.setattr(files, "command_line", lambda: "python3 -m dataset.prepare --raw raw --out new")
    with pytest.raises(SystemExit) as stopped:
        files.cli_entry_point(main)()
    assert stopped.value.code == 130
    assert capsys.readouterr().err.endswith("interrupted; resume with: python3 -m dataset.prepare --raw raw --out new\n")


def test_an_interruption_that_a_library_turns_into_an_error_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    """As torch does where it is stopped in the middle of a checkpoint."""
    def main() -> None:
        try:
            raise files.Terminated
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    with pytest.raises(SystemExit) as stopped:
        files.cli_entry_point(main)()
    assert stopped.value.code == 143
    assert capsys.readouterr().err.startswith("interrupted; ")


def test_what_the_dead_had_begun_is_removed_and_what_the_living_write_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"rt.{dead.pid}.partial").mkdir()
    (tmp_path / f"rt.{dead.pid}.partial" / "train.csv").write_text("half")
    (tmp_path / f"state.pt.{dead.pid}.partial").write_text("half")
    kept = {f"state.pt.{os.getppid()}.partial", "mine.partial", "mine.csv.partial"}
    for name in kept:
        (tmp_path / name).write_text("x")
    check_writable(tmp_path)
    assert set(os.listdir(tmp_path)) == kept


def test_a_run_that_starts_anew_leaves_nothing_of_the_old_one_in_its_books(shop: Path) -> None:
    """Stopped in its first epoch: no metrics that are not of its config.json, no model, no state."""
    before = snapshot(shop / "chkpt/SL/rt_esmm")
    assert "NaN" in complaint(lambda: SLmain.main(**{**SL, "learning_rate": 1e30}))
    after = snapshot(shop / "chkpt/SL/rt_esmm")
    assert json.loads(after["config.json"])["settings"]["learning_rate"] == 1e30
    assert set(after) - {"config.json"} == {
        name if name.startswith("rt_esmm_1.0") else re.sub(r"(\.\w+)$", r".previous\1", name) for name in before}
    for name in ("metrics.csv", "state.pt", "rt_esmm_0.0.pt", "config.json"):
        assert after[re.sub(r"(\.\w+)$", r".previous\1", name)] == before[name]


def test_critics_of_two_runs_are_told_apart(shop: Path) -> None:
    """As a run leaves them that is killed between writing the one and the other."""
    other = shop / "other"
    RLmain.main(RLArguments(**{**RL, "critic_lr": 0.002}, save_dir=str(other)))
    shutil.copy(other / "res_TD3BC_esmm" / "critic1.pth", "chkpt/RL/res_TD3BC_esmm/critic1.pth")
    text = complaint(PROGRAMS["polish"])
    assert "critic2.pth: its agent is" in text
    assert "python3 RLmain.py --actor_name=esmm" in text


@pytest.mark.parametrize("what", ["baseline", "critics"])
def test_a_polish_run_does_not_go_on_from_another_origin(shop: Path, what: str) -> None:
    if what == "baseline":
        SLmain.main(**{**SL, "learning_rate": 0.002})
    else:
        RLmain.main(RLArguments(**{**RL, "critic_lr": 0.002}))
    before = snapshot(shop)
    told = {"baseline": "another baseline", "critics": "other critics"}[what]
    assert told in complaint(lambda: SLmain.main(**SL, polish_lambda=1.0, resume=True))
    assert snapshot(shop) == before


# ---------------------------------------------------------------------------------------------------------------- disk


@pytest.fixture
def disk(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The finished folder on a disk of its own that is full to the last page, and this process in it."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True,
                      check=False).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        folder = Path(shutil.copytree(finished, place / "shop"))
        for name in NEW.values():
            shutil.rmtree(folder / name)
        monkeypatch.chdir(folder)
        yield folder
    finally:
        monkeypatch.undo()
        subprocess.run(["umount", "-l", str(place)], check=True)


def room(folder: Path, pages: int) -> None:
    """Leave so many pages of 4 KiB free on the disk of a folder."""
    used = sum(-(-os.path.getsize(path) // 4096) if path.is_file() else 0 for path in folder.rglob("*"))
    subprocess.run(["mount", "-o", f"remount,size={(used + pages) * 4096}", str(folder.parent)], check=True)


def written(name: str, finished: Path) -> int:
    """How many pages the results of a program take, about."""
    roots = {"prepare": "dataset/new", "simulate": "raw-new", "SLmain": "chkpt/SL/rt_esmm", "RLmain": "chkpt/RL",
             "polish": "chkpt/SL/rt_esmm/rt_esmm_1.0"}
    return sum(-(-path.stat().st_size // 4096) for path in (finished / roots[name]).rglob("*") if path.is_file())


@pytest.mark.parametrize("trials", [3, pytest.param(25, marks=pytest.mark.torture)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_full_disk_is_one_line_and_spares_what_was_there(disk: Path, finished: Path, name: str, trials: int) -> None:
    """With no room at all, with a little more, ...: each time it is another file that does not fit."""
    told, ended = [], 0
    for pages in np.linspace(0, written(name, finished), trials, endpoint=False).astype(int):
        before = snapshot(disk)
        room(disk, int(pages))
        try:
            PROGRAMS[name]()
            ended += 1
        except files.UserError as error:
            told.append(str(error))
        after = snapshot(disk)
        assert not [path for path in after if path.endswith((".partial", ".lock"))]
        for path, content in before.items():
            aside = re.sub(r"(\.\w+)$", r".previous\1", path)
            assert path.startswith("pretrain") or content in (after.get(path), after.get(aside)) or ended, path
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk.parent)], check=True)
        shutil.rmtree(disk)
        shutil.copytree(finished, disk)
        for new in NEW.values():
            shutil.rmtree(disk / new)
        os.chdir(disk)
    assert len(told) >= trials // 2
    for text in told:
        assert "\n" not in text
        assert re.search(r": cannot write: No space left on device$", text), text
    COUNTS.append(f"full disk: {name} {len(told)} of {len(told)} refusals in one line, with what was there intact")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_folder_that_is_read_only_is_one_line(disk: Path, name: str) -> None:
    before = snapshot(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk.parent)], check=True)
    assert re.search(r": cannot write: Read-only file system$", complaint(PROGRAMS[name]))
    assert snapshot(disk) == before


BOOKS = ("state.pt", "config.json", "metrics.csv", "curves.png")
IN_THE_WAY = [
    *(("SLmain", f"chkpt/SL/rt_esmm/{name}") for name in (*BOOKS, "catemapper.json", "rt_esmm_0.0.pt")),
    ("SLmain", "pretrain/rt_esmm.pt"),
    *(("RLmain", f"chkpt/RL/res_TD3BC_esmm/{name}") for name in (*BOOKS, "actor.pth", "critic2_target.pth")),
    ("RLmain", "pretrain/memory.npz"),
    *(("polish", f"chkpt/SL/rt_esmm/rt_esmm_1.0/{name}") for name in (*BOOKS, "weights.png")),
    ("polish", "chkpt/SL/rt_esmm/rt_esmm_1.0.pt"),
    ("prepare", "dataset/.new.lock"), ("SLmain", "chkpt/SL/.rt_esmm.lock"),
]


@pytest.mark.parametrize(("name", "path"), IN_THE_WAY)
def test_a_folder_in_the_way_of_a_file_is_found_before_the_run(shop: Path, name: str, path: str) -> None:
    Path(path).unlink(missing_ok=True)
    (Path(path) / "inside").mkdir(parents=True)
    (Path(path) / "inside" / "mine.txt").write_text("mine")
    before = snapshot(shop)
    text = complaint(PROGRAMS[name])
    assert text.startswith(f"{path}: cannot write: "), text
    assert snapshot(shop) == before


def test_a_full_disk_under_the_output_is_one_line(disk: Path) -> None:
    room(disk, 0)
    with open(disk / "log", "wb") as log:
        done = subprocess.run(command("env.py"), env=ENVIRONMENT, stdout=log, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr.decode() == "error: the output: No space left on device\n"


# --------------------------------------------------------------------------------------------------------- two at once


def test_the_second_run_into_a_folder_is_refused_and_told_of_the_first(shop: Path) -> None:
    first = subprocess.Popen(command("SLmain.py", *flags({**SL, "epoch": 1000}), "--patience=1000"), env=ENVIRONMENT,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert first.stdout is not None
        while not first.stdout.readline().startswith("epoch 1"):
            assert first.poll() is None
        second = run(shop, "SLmain.py", *flags(SL))
        assert second.returncode == 2
        assert re.fullmatch(rf"error: chkpt/SL/rt_esmm: locked by process {first.pid} \(started \d{{4}}-\d\d-\d\d "
                            r"\d\d:\d\d:\d\d: python3 .*SLmain.py .*\): .*\n", second.stderr), second.stderr
        other = complaint(lambda: SLmain.main(**SL, save_dir="elsewhere"))
        assert other.startswith(f"pretrain/rt_esmm.pt: locked by process {first.pid} ")
    finally:
        first.kill()
        first.communicate()
    assert Path("chkpt/SL/.rt_esmm.lock").exists(), "left by the dead process"
    SLmain.main(**SL)
    assert not Path("chkpt/SL/.rt_esmm.lock").exists()


@pytest.mark.parametrize(("name", "place"), [("prepare", "dataset/new"), ("simulate", "raw-new"),
                                             ("RLmain", "chkpt/RL/res_TD3BC_esmm"), ("RLmain", "pretrain/memory.npz"),
                                             ("polish", "chkpt/SL/rt_esmm/rt_esmm_1.0")])
def test_every_program_is_alone_where_it_writes(shop: Path, name: str, place: str) -> None:
    before = snapshot(shop)
    with exclusive_lock(Path(place)):
        assert complaint(PROGRAMS[name]).startswith(f"{place}: locked by process {os.getpid()} (started ")
    if place != "pretrain/memory.npz":  # which is filled when the run has begun
        assert snapshot(shop) == before


def test_a_lock_of_a_dead_process_whose_id_is_in_use_again_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / ".books.lock").write_text(json.dumps({"pid": os.getppid(), "started": "then", "command": "x"}))
    with exclusive_lock(tmp_path / "books"):
        assert json.loads((tmp_path / ".books.lock").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


HOLD = """
import sys, time
from pathlib import Path
from common.errors import UserError
from common.fileio import exclusive_lock
got = 0
end = time.time() + 3
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


def test_of_many_that_take_and_leave_a_lock_never_two_have_it(tmp_path: Path) -> None:
    takers = [subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "books")], env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [one.communicate(timeout=60) for one in takers]
    assert [one.returncode for one in takers] == [0] * 4, said
    assert sum(int(out) for out, _ in said) > 100


# --------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_bytes_with_so_many_threads(rt_tables: Path, tmp_path: Path, threads: int,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics, weights and memory of all three commands, with layers wide enough for two threads to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        one, two = (_documented(tmp_path / name, rt_tables, monkeypatch) for name in ("one", "two"))
    finally:
        torch.set_num_threads(before)
    assert len(one) >= 14
    assert [name for name in one if one[name] != two[name]] == []


def _documented(folder: Path, rt_tables: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    shutil.copytree(rt_tables, folder / "dataset" / "rt")
    monkeypatch.chdir(folder)
    sizes = {"embed_dim": 64, "device": "cpu"}
    SLmain.main(**sizes, epoch=2)
    RLmain.main(RLArguments(**sizes, epoch=2, epoch_updates=10, init_episode=200))
    SLmain.main(**sizes, epoch=2, polish_lambda=1.0)
    return {name: content for name, content in snapshot(folder).items()
            if name.endswith((".pt", ".pth", ".npz", "metrics.csv"))}

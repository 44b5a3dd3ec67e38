"""Programs killed at random moments, continued, and compared with an undisturbed run.

    python3 tests/robustness/crash_trials.py --trials=50 simulate prepare SLmain mapped RLmain polish experiments

A process that has imported everything forks each run, so that a trial costs the run alone; signals, exit codes and
files are real. Trial by trial SIGKILL and SIGTERM take turns, at a moment that is uniform over the undisturbed run;
every other folder already holds a finished run of other settings. What is left is checked file by file, then the run
is continued, with `--resume` or from the start: after SIGTERM with the very command that its last line names.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY))

import matplotlib.font_manager  # noqa: E402, F401 -- slow to import: once here, not in every run
import numpy as np  # noqa: E402
import torch  # noqa: E402

import RLmain  # noqa: E402
import SLmain  # noqa: E402
from common.checkpoint import load_tensors  # noqa: E402
from dataset import prepare, simulate  # noqa: E402
from dataset.rtrl import load_splits  # noqa: E402
from experiments import __main__ as experiments  # noqa: E402

MAINS = {"dataset.prepare": prepare, "dataset.simulate": simulate, "SLmain.py": SLmain, "RLmain.py": RLmain,
         "experiments": experiments}
SIZES = ("--embed_dim=8", "--device=cpu")


@dataclass(frozen=True)
class Program:
    """A program that is killed.

    Attributes:
        command: as typed behind `python3`.
        dependencies: the commands before it, in its folder.
        results: files, by glob, that have to be those of the undisturbed run, byte for byte.
        other: a flag that makes another run of it, into the same folder; "" where none may lie there.
        run_dir: where its config.json is; "" where it has none.
    """

    command: str
    dependencies: tuple[str, ...]
    results: tuple[str, ...]
    other: str = ""
    run_dir: str = ""


SIMULATE = "dataset.simulate --out raw --events 12000 --items 600 --property_rows 10000 --seed 7"
PREPARE = "dataset.prepare --raw raw --out dataset/rt"
SL = f"SLmain.py --model_name=esmm --epoch=4 --batch_size=256 {' '.join(SIZES)}"
RL = ("RLmain.py --epoch=4 --epoch_updates=20 --init_episode=200 --batch_size=64 --converge_tolerance=0 "
      "--memory_size=2000 "  # fewer than the log has: a sample of sessions
      + " ".join(SIZES))
POLISH = f"{SL} --polish=1"
EXPERIMENTS = ("experiments --tables=main --models=esmm --seeds=2 --workers=1 --out=results --embed_dim=8 --epoch=2 "
        "--critic_epoch=2 --critic_updates=5 --critic_batch=64")
SL_DIR, RL_DIR, POLISH_DIR = "chkpt/SL/rt_esmm", "chkpt/RL/res_TD3BC_esmm", "chkpt/SL/rt_esmm/rt_esmm_1.0"

PROGRAMS = {
    "simulate": Program(SIMULATE, (), ("raw/*",)),
    "prepare": Program(PREPARE, (SIMULATE,), ("dataset/rt/*",)),
    "SLmain": Program(SL, (SIMULATE, PREPARE),
                      (f"{SL_DIR}/metrics.csv", f"{SL_DIR}/rt_esmm_0.0.pt", f"{SL_DIR}/catemapper.json",
                       "pretrain/rt_esmm.pt"), "--learning_rate=0.002", SL_DIR),
    "mapped": Program(f"{SL} --data=mapped", (SIMULATE, PREPARE),
                      (f"{SL_DIR}/metrics.csv", f"{SL_DIR}/rt_esmm_0.0.pt", "dataset/rt/arrays-*/*"),
                      "--learning_rate=0.002", SL_DIR),
    "RLmain": Program(RL, (SIMULATE, PREPARE, SL), (f"{RL_DIR}/metrics.csv", f"{RL_DIR}/*.pth",
                                                    "pretrain/memory.npz"), "--critic_lr=0.002", RL_DIR),
    "polish": Program(POLISH, (SIMULATE, PREPARE, SL, RL),
                      (f"{POLISH_DIR}/metrics.csv", f"{SL_DIR}/rt_esmm_1.0.pt"), "--learning_rate=0.002",
                      POLISH_DIR),
    "experiments": Program(EXPERIMENTS, (SIMULATE, PREPARE), ("results/results.csv",), "--learning_rate=0.002"),
}


def start(command: str, folder: Path) -> int:
    """Begin a run in `folder`, in a process of its own; it prints to `stdout` and `stderr` beside the folder."""
    sys.stdout.flush()
    streams = [open(folder.parent / f"{folder.name}.{name}", "wb") for name in ("stdout", "stderr")]  # noqa: SIM115
    pid = os.fork()
    if pid:
        for file in streams:
            file.close()
        return pid
    code = 1
    simulate.EVENTS_PER_BLOCK = simulate.PROPERTY_ROWS_PER_BLOCK = 4_000  # so that the log has several blocks
    try:
        os.chdir(folder)
        for number, file in enumerate(streams, start=1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        sys.argv = shlex.split(command)
        sys.modules["__main__"].__spec__ = None  # as where a script is run: its name is sys.argv[0]
        MAINS[sys.argv[0]].cli()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(pid: int) -> int:
    """Wait for a run; its exit code, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stderr_of(folder: Path) -> str:
    return (folder.parent / f"{folder.name}.stderr").read_text()


def succeed(command: str, folder: Path) -> None:
    code = end(start(command, folder))
    if code:
        raise SystemExit(f"{command}: exit code {code}: {stderr_of(folder)}")


def results(program: Program, folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): without_times(path) if path.name == "results.csv" else path.read_bytes()
            for pattern in program.results for path in sorted(folder.glob(pattern))}


def without_times(path: Path) -> bytes:
    """The bytes of a results.csv without the seconds that each run took."""
    with open(path, encoding="utf-8", newline="") as file:
        return json.dumps([{**row, "seconds": ""} for row in csv.DictReader(file)]).encode()


def find_broken_files(folder: Path, dead: int) -> str:
    """The first file that is neither complete nor marked as unfinished by the process that died; "" for none."""
    for path in (one for one in folder.rglob("*") if one.is_file()):
        relative = path.relative_to(folder)
        if any(part.endswith(".partial") for part in relative.parts):
            if f".{dead}.partial" not in str(relative):
                return f"{relative}: of another process"
            continue
        try:
            if path.suffix in (".pt", ".pth"):
                load_tensors(path, "")
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as file:
                    assert all(len(file[name]) for name in file.files)
            elif path.suffix == ".csv":
                assert path.read_bytes().endswith(b"\n")
            elif path.suffix == ".png":
                assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
        except Exception as error:
            return f"{relative}: {error!r}"
    if (folder / "dataset/rt").exists():
        load_splits(folder / "dataset/rt")
    return ""


def find_mixed_outputs(program: Program, folder: Path, old: dict[str, bytes], new: dict[str, bytes]) -> str:
    """The first file of a run directory that belongs to another run than its config.json; "" for none."""
    config = folder / program.run_dir / "config.json"
    if not program.run_dir or not config.exists():
        return ""
    name, value = program.other.lstrip("-").split("=")
    is_old = str(json.loads(config.read_text())["settings"][name]) == value
    metrics = f"{program.run_dir}/metrics.csv"
    if (folder / metrics).exists() and (folder / metrics).read_bytes() != (old if is_old else new)[metrics]:
        return f"{metrics} is not of its config.json"
    for path in (one for one in program.results if one.endswith(".pt") and not one.startswith("pretrain")):
        if (folder / path).exists() and ((folder / path).read_bytes() == old[path]) != is_old:
            return f"{path} is not of its config.json"
    return ""


class Trials:
    """A program, the folders that it starts from, with and without an earlier run, and undisturbed results."""

    def __init__(self, name: str, folder: Path, seed: int, fresh: Path) -> None:
        self.program, self.folder = PROGRAMS[name], folder
        self.rng = np.random.default_rng([seed, sum(name.encode())])
        self.fresh, self.used = fresh, folder / "used"
        folder.mkdir()
        whole = Path(shutil.copytree(self.fresh, folder / "whole"))
        begin = time.perf_counter()
        succeed(self.program.command, whole)
        self.seconds = time.perf_counter() - begin
        self.new, self.old = results(self.program, whole), {}
        assert len(self.new) >= len(self.program.results), self.new.keys()
        if self.program.other:
            shutil.copytree(self.fresh, self.used)
            succeed(f"{self.program.command} {self.program.other}", self.used)
            self.old = results(self.program, self.used)
            assert self.old.keys() == self.new.keys()
            assert all(self.old[path] != self.new[path] for path in self.old if not path.endswith(SAME))

    def trial(self, number: int) -> str | None:
        """One trial: the problem, "" if there is none; None if the run ended before its signal."""
        sent = (signal.SIGKILL, signal.SIGTERM)[number % 2]
        template = self.used if self.program.other and self.rng.random() < 0.5 else self.fresh
        resume = self.rng.random() < 0.5 and bool(self.program.run_dir)
        moment = self.rng.uniform(0, self.seconds)
        folder = Path(shutil.copytree(template, self.folder / f"trial{number}"))
        pid = start(self.program.command, folder)
        time.sleep(moment)
        os.kill(pid, sent)
        code, line = end(pid), stderr_of(folder)
        if code == 0:
            shutil.rmtree(folder)
            return None
        problem = self._find_problem(folder, pid, code, line, self.program.command + " --resume" * resume)
        if not problem:
            shutil.rmtree(folder)
        return problem and (f"trial {number}: {sent.name} after {moment:.3f} s of {self.seconds:.3f} s, "
                            f"{template.name} folder, resume {resume}: {problem}")

    def _find_problem(self, folder: Path, pid: int, code: int, line: str, command: str) -> str:
        if code == 143:
            found = re.fullmatch(r"interrupted; resume with: python3 (.+)\n", line)
            if not found:
                return f"it printed {line!r}"
            command = found[1]
        elif line or code not in (-signal.SIGKILL, -signal.SIGTERM):  # SIGTERM before the program's first line
            return f"exit code {code}: {line!r}"
        problem = find_broken_files(folder, pid) or find_mixed_outputs(self.program, folder, self.old, self.new)
        if problem:
            return problem
        again = end(start(command, folder))
        if again == 2 and "checkpoint has" in stderr_of(folder) and code < 0:  # it had not begun: the old state
            again = end(start(self.program.command, folder))
        if again == 2 and "exists already" in stderr_of(folder):  # it had finished, but for saying so
            again = 0
        if again:
            return f"{command}: exit code {again}: {stderr_of(folder)}"
        got = results(self.program, folder)
        wrong = [path for path in self.new if got.get(path) != self.new[path]]
        left = [str(path.relative_to(folder)) for path in folder.rglob("*")
                if path.suffix in (".partial", ".lock") or path.name == ".writable"]
        return (f"{wrong} differ from the undisturbed run after {command}" if wrong
                else f"left behind: {left}" if left else "")


SAME = (".npy", "arrays.json", "catemapper.json", "pretrain_actor.pth", "memory.npz", "actor.pth",
        "actor_target.pth")  # of any settings


def trials(names: Sequence[str], count: int, seed: int) -> list[str]:
    """Make so many trials of each program and print the counts; return the problems."""
    torch.set_num_threads(1)
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="crash_trials-") as place:
        for name in names:
            begin = time.perf_counter()
            tried = Trials(name, Path(place) / name, seed, prepared(PROGRAMS[name].dependencies, Path(place)))
            drawn, done, bad = 0, 0, []
            while done < count:
                problem = tried.trial(done)
                drawn += 1
                if problem is None and drawn > 5 * count:
                    raise SystemExit(f"{name}: it ends before its signals")
                done += problem is not None
                bad += [f"{name}, {problem}"] if problem else []
            print(f"killed: {name} {count - len(bad)} of {count} ended like the undisturbed run (SIGKILL "
                  f"{-(-count // 2)}, SIGTERM {count // 2}, at moments within {tried.seconds:.2f} s; "
                  f"{time.perf_counter() - begin:.0f} s)", flush=True)
            problems += bad
    return problems


def prepared(commands: Sequence[str], place: Path) -> Path:
    """A folder in which these commands have run, one after the other; each is run once for all programs."""
    folder = place / f"after{len(commands)}"
    if not folder.exists():
        if commands:
            shutil.copytree(prepared(commands[:-1], place), folder)
            succeed(commands[-1], folder)
        else:
            folder.mkdir()
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", default=list(PROGRAMS), metavar="PROGRAM", help=", ".join(PROGRAMS))
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=2022)
    arguments = parser.parse_args()
    found = trials(arguments.programs, arguments.trials, arguments.seed)
    print("\n".join(found), file=sys.stderr)
    sys.exit(bool(found))

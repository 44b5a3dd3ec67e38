"""The runs of the grid: each is a program of its own, with one thread, as many side by side as there are cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import RLmain
import SLmain
from common.csv_reader import read_csv_rows
from common.errors import UserError
from common.fileio import read_json
from dataset.prepare import prepare
from dataset.simulate import SimulationConfig, simulate
from experiments.conditions import GridArguments, Key, Run, arms
from experiments.report import read_results, write_results
from train.Arguments import RLArguments, SLArguments, to_command_line
from train.run import get_dataset

KEPT = ("metrics.csv", "test.csv", "config.json", "curves.png", "weights.png", "weights.csv",
        "log.txt")  # of a finished run
Row = dict[str, str]


def perform(run: Run, grid: GridArguments, machine: str) -> Row:
    """Run it to its end, in this process; return its row. Raises UserError as the program does."""
    started, folder, settings = time.time(), run.folder(grid), run.settings(grid)
    if _saved_settings(folder) != settings.plain():
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log), \
            contextlib.redirect_stderr(log):
        going = replace(settings, resume=True)
        if isinstance(going, RLArguments):
            RLmain.main(going)
        else:
            SLmain.main(**asdict(going))
    config, rows = read_json(_only(folder, "config.json")), read_csv_rows(_only(folder, "metrics.csv"))
    if isinstance(settings, RLArguments):  # its figures count the tasks, those of SLmain.py name them
        rows += read_csv_rows(_only(folder, "test.csv"))
        names = {f"_{number}": f"_{task['name']}" for number, task in enumerate(config["data"]["tasks"])}
        rows = [{name[:-2] + names.get(name[-2:], name[-2:]): value for name, value in row.items()} for row in rows]
    figures = _figures(rows, read_csv_rows(found) if (found := next(folder.rglob("weights.csv"), None)) else [])
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in KEPT and not _is_needed(path, run, settings):
            path.unlink()
    arm = run.arm
    tasks = " ".join(task["name"] for task in config["data"]["tasks"])
    return {"dataset": run.dataset, "tasks": tasks, "table": arm.table, "model": arm.model, "arm": arm.name,
            "control": arm.control, "critics": " ".join(arm.critics or ()), "seed": str(run.seed), **figures,
            "fingerprint": str(config["data_fingerprint"]), "machine": machine,
            "seconds": f"{time.time() - started:.1f}", "command": to_command_line(arm.program, settings)}


def _saved_settings(folder: Path) -> dict[str, Any]:
    """Those of the run that was begun in this folder, but for what --resume changes; {} where there is none."""
    found = next(folder.rglob("config.json"), None)
    with contextlib.suppress(UserError):
        return {**read_json(found)["settings"], "resume": False} if found else {}
    return {}


def _only(folder: Path, name: str) -> Path:
    (path,) = folder.rglob(name)
    return path


def _is_needed(path: Path, run: Run, settings: SLArguments | RLArguments) -> bool:
    """Whether later runs read this file: a baseline, or critics."""
    if isinstance(settings, RLArguments):
        return path.name in ("critic1.pth", "critic2.pth") and settings.agent == "bc"
    return run.arm.name == "baseline" and path == settings.baseline(run.arm.model)


def _figures(rows: list[Row], weights: list[Row]) -> Row:
    """What a row of results says of a run: its test figures, and what its validation said on the way."""
    *epochs, test = rows
    figures = {name: value for name, value in test.items() if value and name not in ("split", "epoch", "loss")}
    names = [name for name, value in epochs[-1].items()
             if value and name.startswith(("auc_", "rank_correlation_", "td_error_", "zero_share_"))]
    best = next((row for row in epochs if row["epoch"] == test["epoch"]), epochs[-1])
    figures |= {"epoch": test["epoch"], "epochs": epochs[-1]["epoch"]} | {f"val_{name}": best[name] for name in names}
    figures |= {f"curve_{name}": " ".join(f"{float(row[name]):.5f}" for row in epochs) for name in names
                if name.startswith("auc_")}
    figures |= {name: value for name, value in epochs[-1].items() if value and name.startswith("weight_")}
    for name in weights[0] if weights else ():
        figures[f"deciles_{name}"] = " ".join(f"{float(row[name]):.5g}" for row in weights)
    return figures


def run_grid(settings: GridArguments, path: Path) -> str:
    """Run all that is not in the results yet; return what to say of runs that failed, "" where none did."""
    runs = {run.key: run for dataset in settings.datasets.split(",") for arm in arms(settings)
            for seed in settings.all_seeds for run in [Run(dataset, arm, seed)]}
    if settings.quick:
        _small_log(Path(settings.dataset_path))
    prints = {name: get_dataset(name, settings.dataset_path).fingerprint for name in settings.datasets.split(",")}
    rows = _finished(path, settings, runs, prints)
    left = _left(runs, set(rows), settings)
    failed: dict[Key, str] = {}
    going: dict[Future[Row], Key] = {}
    workers, device = min(settings.workers or os.cpu_count() or 1, max(1, len(left))), machine()
    pool = _pool(workers)
    with tqdm(total=len(runs), initial=len(runs) - len(left), desc="experiments", unit="run", disable=None) as bar:
        try:
            while left or going:
                for key in [key for key in left if any(need in failed for need in runs[key].needs)]:
                    failed[key] = "what it starts from failed"
                    left.remove(key)
                ready = [key for key in left if not set(runs[key].needs) & {*left, *going.values()}]
                for key in ready[: workers - len(going)]:
                    left.remove(key)
                    going[pool.submit(perform, runs[key], settings, device)] = key
                for done in wait(going, return_when=FIRST_COMPLETED).done:
                    key = going.pop(done)
                    name = " ".join(map(str, key))
                    try:
                        rows[key] = done.result()
                    except UserError as error:
                        failed[key] = str(error)
                        bar.write(f"failed: {name}: {error}")
                    else:
                        write_results(path, [rows[one] for one in runs if one in rows])
                        bar.write(f"{len(rows):>{len(str(len(runs)))}} of {len(runs)}: {name}, "
                                  f"{rows[key]['seconds']} s")
                    bar.update()
        except BrokenProcessPool as error:
            raise UserError("a run was killed from outside (out of memory?): the same command goes on, with fewer "
                            "--workers if need be") from error
        except BaseException:  # Ctrl-C, above all: nobody waits for what is going on
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    if not failed:
        return ""
    key, why = next(iter(failed.items()))
    return (f"{len(failed)} of {len(runs)} runs failed, the first: {' '.join(map(str, key))}: {why}; the same command "
            "tries them again")


def _small_log(path: Path) -> None:
    """Simulate and prepare a third of the usual log as `rt`, where there is none."""
    if not (path / "rt").exists():
        if not (path / "simulated").exists():
            simulate(path / "simulated", SimulationConfig(events=100_000, items=8_000, property_rows=80_000))
        prepare(path / "simulated", path / "rt")


def _left(runs: Mapping[Key, Run], finished: set[Key], settings: GridArguments) -> list[Key]:
    """What is not finished, and what this starts from or asks, where its weights are no longer there; in order."""
    left: set[Key] = set()
    ahead = [key for key in runs if key not in finished]
    while ahead:
        key = ahead.pop()
        left.add(key)
        ahead += [need for need in runs[key].needs
                  if need not in left and not any(runs[need].folder(settings).rglob("*.pt*"))]
    return [key for key in runs if key in left]


def _finished(path: Path, settings: GridArguments, runs: Mapping[Key, Run],
              prints: Mapping[str, str]) -> dict[Key, Row]:
    """The rows of results that are there: those of this grid, on these data, by the very commands that it would run, of
    what they start from and ask as well."""
    rows = read_results(path) if path.exists() else []
    same = {}
    for row in rows:
        key = row["dataset"], row["model"], row["arm"], int(row["seed"])
        if key in runs and row["fingerprint"] == prints[row["dataset"]] and row["command"] == to_command_line(
                runs[key].arm.program, runs[key].settings(settings)):
            same[key] = {name: value for name, value in row.items() if value}

    def stands(key: Key) -> bool:
        return key in same and all(map(stands, runs[key].needs))

    found = {key: row for key, row in same.items() if stands(key)}
    if len(found) < len(rows):
        print(f"{path}: {len(rows) - len(found)} of {len(rows)} rows are of other settings or data: they go")
    return found


class _Here(Executor):
    """Runs at once, in this process."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args, **options))
        except UserError as error:
            done.set_exception(error)
        return done


def _pool(workers: int) -> Executor:
    if workers > 1:
        return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker, (os.getpid(),))
    torch.set_num_threads(1)
    return _Here()


def _begin_worker(parent: int) -> None:
    """One thread a run, so that results depend on nothing else; Ctrl-C is the parent's; without it, end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which a worker that is stopped would leave behind

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def machine() -> str:
    """What figures may depend on besides the seed."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{model}, 1 thread a run, torch {torch.__version__}, Python {platform.python_version()}"

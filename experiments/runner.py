"""Run the experiments: each run is a program with one thread, on this machine or on a Dask cluster."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import platform
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import RLmain
import SLmain
from common.csv_reader import read_csv_rows
from common.errors import UserError
from common.fileio import exclusive_lock, read_json
from dataset.manifest import find_folder
from dataset.prepare import prepare
from dataset.simulate import SimulationConfig, simulate
from experiments import boosting, controls
from experiments.arguments import BoostingArguments, ControlArguments
from experiments.cluster import DaskExecutor
from experiments.conditions import ExperimentArguments, ExperimentRun, Key, conditions
from experiments.statistics import read_results, write_results
from slmodels import MODELS
from train.Arguments import RLArguments, Settings, SLArguments, to_command_line
from train.run import get_dataset

LOCK_SECONDS = 120  # how long a run waits for the end of a process that does it, too: its runner was just killed
KEEP_FILES = ("metrics.csv", "test.csv", "config.json", "curves.png", "weights.png", "weights.csv", "log.txt")
Row = dict[str, str]


def run_experiments(settings: ExperimentArguments, path: Path, executor: Executor | None = None) -> str:
    """Run all conditions that results.csv at `path` lacks. Return a message about failed runs, "" for none.

    Rows of the same settings stay in results.csv, also of tables, models and seeds that are not asked for.

    Args:
        executor: where runs execute, at most `--workers` at a time; default: a pool of processes, or this process for
            one worker.
    """
    datasets = settings.datasets.split(",")
    runs = _all_runs(settings)
    every = runs | _same_settings(settings, read_results(path) if path.exists() else [])
    if settings.simulates_rt:
        _make_quick_dataset(Path(settings.dataset_path_of("rt")))
    fingerprints = {name: get_dataset(name, settings.dataset_path_of(name)).fingerprint for name in datasets}
    rows = _reusable_rows(path, settings, every, fingerprints)
    pending = _pending(runs, rows, settings)
    if isinstance(executor, DaskExecutor):
        executor.check_workers(settings.folder, [find_folder(Path(settings.dataset_path_of(name)), name)
                                                 for name in datasets])
    most = len(pending) if executor else os.cpu_count() or 1  # a cluster has its own queue, and workers come and go
    workers = max(1, min(settings.workers or most, len(pending)))
    graph = TopologicalSorter({key: [dependency for dependency in runs[key].dependencies if dependency in pending]
                               for key in pending})
    graph.prepare()
    ready: list[Key] = []
    running: dict[Future[Row], Key] = {}
    failed: dict[Key, str] = {}
    bar = tqdm(total=len(runs), initial=len(runs) - len(pending), desc="experiments", unit="run", disable=None)
    with bar, contextlib.nullcontext(executor) if executor else _make_executor(workers) as pool:
        while graph.is_active():
            ready = sorted([*ready, *graph.get_ready()], key=pending.index)
            while ready and len(running) < workers:
                key = ready.pop(0)
                if failed.keys() & set(runs[key].dependencies):
                    failed[key] = "a dependency failed"
                    graph.done(key)
                else:
                    running[pool.submit(execute, runs[key], settings)] = key
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                graph.done(key)
                name = " ".join(map(str, key))
                try:
                    rows[key] = future.result()
                except UserError as error:
                    failed[key] = str(error)
                    bar.write(f"failed: {name}: {error}")
                else:
                    write_results(path, [rows[key] for key in every if key in rows])
                    finished = len(rows.keys() & runs.keys())
                    bar.write(f"{finished:>{len(str(len(runs)))}} of {len(runs)}: {name}, {rows[key]['seconds']} s")
                bar.update()
    if not failed:
        return ""
    key = next(key for key in runs if key in failed)
    return (f"{len(failed)} of {len(runs)} runs failed, the first: {' '.join(map(str, key))}: {failed[key]}; the same "
            "command runs them again")


def _all_runs(settings: ExperimentArguments) -> dict[Key, ExperimentRun]:
    """The selected conditions on every data set with every seed, in order."""
    runs = itertools.product(settings.datasets.split(","), conditions(settings), settings.all_seeds)
    return {run.key: run for run in itertools.starmap(ExperimentRun, runs)}


def _same_settings(settings: ExperimentArguments, rows: Sequence[Row]) -> dict[Key, ExperimentRun]:
    """The runs of these settings in all tables, of the models and seeds of these rows as well. Some tables are of the
    first model: here each model is."""
    models = dict.fromkeys([*settings.models.split(","), *(row["model"] for row in rows if row["model"] in MODELS)])
    seeds = [*settings.all_seeds, *(int(row["seed"]) for row in rows)]
    runs: dict[Key, ExperimentRun] = {}
    for first in models:
        runs |= _all_runs(replace(settings, tables="", name_filter="", models=",".join(dict.fromkeys([first, *models])),
                                  first_seed=min(seeds), seeds=max(seeds) - min(seeds) + 1))
    return runs


def execute(run: ExperimentRun, experiment: ExperimentArguments) -> Row:
    """Run to completion in this process; return the row of results.csv. Raises UserError as the program does."""
    torch.set_num_threads(1)  # results must not depend on how many runs are parallel
    folder = run.folder(experiment)
    with exclusive_lock(folder, wait=LOCK_SECONDS):
        return _execute_alone(run, experiment, folder)


def _execute_alone(run: ExperimentRun, experiment: ExperimentArguments, folder: Path) -> Row:
    started, settings = time.time(), run.settings(experiment)
    run_dir = settings.run_dir
    if _saved_settings(run_dir.config) != settings.plain():
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log), \
            contextlib.redirect_stderr(log):
        if isinstance(settings, BoostingArguments):
            boosting.main(settings)
        elif isinstance(settings, RLArguments):
            RLmain.main(replace(settings, resume=True))
        elif isinstance(settings, ControlArguments):
            controls.main(replace(settings, resume=True))
        else:
            SLmain.main(**asdict(replace(settings, resume=True)))
    config, history = read_json(run_dir.config), read_csv_rows(run_dir.metrics)
    tasks = [task["name"] for task in config["data"]["tasks"]]
    if isinstance(settings, RLArguments):  # its metrics have the task's number in place of the name
        history += read_csv_rows(run_dir.test_metrics)
        history = [{re.sub(r"(?<=_)\d+$", lambda number: tasks[int(number[0])], name): value
                    for name, value in row.items()} for row in history]
    deciles = run_dir.weight_deciles
    metrics = _collect_metrics(history, read_csv_rows(deciles) if deciles.exists() else [])
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in KEEP_FILES and not _is_dependency(path, run, settings):
            path.unlink()
    condition = run.condition
    return {"dataset": run.dataset, "tasks": " ".join(tasks), "table": condition.table, "model": condition.model,
            "condition": condition.name, "control": condition.control, "critics": " ".join(condition.critics or ()),
            "seed": str(run.seed), **metrics, "fingerprint": str(config["data_fingerprint"]),
            "machine": hardware_info(), "seconds": f"{time.time() - started:.1f}",
            "command": to_command_line(condition.program, settings)}


def _saved_settings(config: Path) -> dict[str, Any]:
    """The settings of the run with this config.json, without --resume; {} if there is none."""
    with contextlib.suppress(UserError):
        return {**read_json(config)["settings"], "resume": False} if config.exists() else {}
    return {}


def _is_dependency(path: Path, run: ExperimentRun, settings: Settings) -> bool:
    """Whether later runs load this file: a baseline, or critics."""
    if isinstance(settings, RLArguments):
        return re.fullmatch(r"critic\d+\.pth", path.name) is not None and settings.agent == "bc"
    return (isinstance(settings, SLArguments) and run.condition.name == "baseline"
            and path == settings.baseline(run.condition.model))


def _collect_metrics(history: list[Row], deciles: list[Row]) -> Row:
    """The metrics of a row of results.csv: test split, validation at the best epoch, and learning curves."""
    *epochs, test = history
    metrics = {name: value for name, value in test.items() if value and name not in ("split", "epoch", "loss")}
    names = [name for name, value in epochs[-1].items()
             if value and name.startswith(("auc_", "rank_correlation_", "td_error_", "zero_fraction_"))]
    best = next((row for row in epochs if row["epoch"] == test["epoch"]), epochs[-1])
    metrics |= {"epoch": test["epoch"], "epochs": epochs[-1]["epoch"]} | {f"val_{name}": best[name] for name in names}
    metrics |= {f"curve_{name}": " ".join(f"{float(row[name]):.5f}" for row in epochs) for name in names
                if name.startswith("auc_")}
    metrics |= {name: value for name, value in epochs[-1].items() if value and name.startswith("weight_")}
    for name in deciles[0] if deciles else ():
        metrics[f"deciles_{name}"] = " ".join(f"{float(row[name]):.5g}" for row in deciles)
    return metrics


def _make_quick_dataset(path: Path) -> None:
    """Simulate and prepare a third of the default log as `rt`, unless it exists."""
    if not (path / "rt").exists():
        print(f"no data set rt: a small log is simulated in {path}")
        if not (path / "simulated").exists():
            simulate(path / "simulated", SimulationConfig(events=100_000, items=8_000, property_rows=80_000))
        prepare(path / "simulated", path / "rt")


def _pending(runs: Mapping[Key, ExperimentRun], finished: Collection[Key], settings: ExperimentArguments) -> list[Key]:
    """Unfinished runs, and their dependencies whose weights were deleted, in order."""
    pending: set[Key] = set()
    stack = [key for key in runs if key not in finished]
    while stack:
        key = stack.pop()
        pending.add(key)
        stack += [dependency for dependency in runs[key].dependencies if dependency not in pending
                  and not any(runs[dependency].folder(settings).rglob("*.pt*"))]
    return [key for key in runs if key in pending]


def _reusable_rows(path: Path, settings: ExperimentArguments, runs: Mapping[Key, ExperimentRun],
                   fingerprints: Mapping[str, str]) -> dict[Key, Row]:
    """The rows of results.csv with the same data and command as a run, whose dependencies are reusable as well."""
    rows = read_results(path) if path.exists() else []
    same = {}
    for row in rows:
        key = row["dataset"], row["model"], row["condition"], int(row["seed"])
        if key in runs and row["fingerprint"] == fingerprints[row["dataset"]] and row["command"] == to_command_line(
                runs[key].condition.program, runs[key].settings(settings)):
            same[key] = {name: value for name, value in row.items() if value}

    def is_reusable(key: Key) -> bool:
        return key in same and all(map(is_reusable, runs[key].dependencies))

    reusable = {key: row for key, row in same.items() if is_reusable(key)}
    if len(reusable) < len(rows):
        previous = path.with_name("results.previous.csv")
        shutil.copy(path, previous)
        print(f"{path}: discarding {len(rows) - len(reusable)} of {len(rows)} rows with different settings or data; "
              f"they stay in {previous}")
    return reusable


class SerialExecutor(Executor):
    """Execute in this process, at once."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **options))
        except UserError as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def _make_executor(workers: int) -> Iterator[Executor]:
    """Worker processes, which are terminated on an interruption; for one worker this process."""
    if workers == 1:
        yield SerialExecutor()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _init_worker) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise UserError("a worker process died (out of memory?): the same command resumes; use fewer --workers if "
                            "it happens again") from error
        except BaseException:  # above all Ctrl-C and SIGTERM
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _init_worker() -> None:
    """Leave Ctrl-C to the parent process, and exit when it dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # not the default semaphore, which a terminated worker would leak

    def exit_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def hardware_info() -> str:
    """Processor and versions that results may depend on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{model}, 1 thread a run, torch {torch.__version__}, Python {platform.python_version()}"

"""Reproduce every table of the paper with our models, each result beside its control: results.csv, report.md and plots.

    python3 experiments.py --quick        # every table, small models, 3 seeds: minutes
    python3 experiments.py                # full size: hours
    python3 experiments.py --datasets=kr --embed_dim=64 --feature_map_rate=0.8 --learning_rate=0.0003
    python3 experiments.py --report       # the report again, from the runs that are there

A run of the grid is a run of `SLmain.py` or `RLmain.py` with one thread, in a folder of its own; as many go side by
side as there are cores. A finished run is a row of results.csv, which names its command; stopped at any point, the same
command goes on from there. Everything else is written from results.csv (`train.report`).
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import RLmain
import SLmain
from dataset.files import UserError, check_writable, exit_on_user_error, read_json
from slmodels import MODELS
from train.Arguments import Arguments, RLArguments, SLArguments, command_of, parse, setting
from train.checkpoint import read_rows, write_rows
from train.report import put_into_readme, write_report
from train.run import get_dataset
from train.weighting import WEIGHTINGS

LAMBDAS, GAMMAS, TAUS = (0.1, 0.3, 3.0, 10.0), (0.0, 0.99), (0.05, 1.0)  # beside the defaults 1, 0.9 and 0.2
TABLES = ("main", "ablation", "session", "tried", "weighting", "transfer", "lambda", "gamma", "tau")
KEPT = ("metrics.csv", "config.json", "curves.png", "weights.png", "weights.csv", "log.txt")  # of a finished run
Row = dict[str, str]
Key = tuple[str, str, str, int]  # data set, model, arm, seed


@dataclass(kw_only=True)
class GridArguments(Arguments):
    """Which part of the grid is run, and how large."""

    datasets: str = setting("rt", "data sets, with commas between them")
    models: str = setting("esmm,mmoe,ple", "models, with commas; the first one is studied in detail")
    seeds: int = setting(5, "seeds 1, 2, ...: each is a baseline, critics and all that follows", low=2, high=1000)
    tables: str = setting("", "only these tables, with commas (default all)")
    quick: bool = setting(False, "small: two models, 3 seeds, narrow embeddings, few epochs")
    workers: int = setting(0, "runs side by side; 0: as many as there are cores", low=0, high=4096)
    out: str = setting("", "where results go (default chkpt/experiments, with --quick chkpt/experiments_quick)")
    report: bool = setting(False, "run nothing: write the report from the results.csv that is there")
    publish: str = setting("", "copy report, plots and results.csv into this folder, and their summary into README.md")
    dataset_path: str = setting("dataset", "the folder of data sets")
    embed_dim: int = setting(128, "D of all models and critics", low=1, high=65536)
    expert_num: int = setting(8, "E of mmoe, ple, ...", low=2, high=4096)
    feature_map_rate: float = setting(0.2, "as in SLmain.py", low=0, high=1)
    learning_rate: float = setting(1e-3, "of all supervised runs", low=0)
    epoch: int = setting(50, "epochs of a supervised run at the most", low=1)
    critic_batch: int = setting(2048, "transitions an update of the critics", low=1)
    critic_updates: int = setting(50, "updates an epoch of the critics", low=1)
    critic_epoch: int = setting(30, "epochs of the critics at the most", low=1)

    def __post_init__(self) -> None:
        if self.quick:
            small = {"models": "esmm,mmoe", "seeds": 3, "embed_dim": 16, "epoch": 3, "critic_epoch": 3}
            for one in fields(self):  # what was asked for stays
                if one.name in small and getattr(self, one.name) == one.default:
                    setattr(self, one.name, small[one.name])
        super().__post_init__()
        for what, names, known in (("models", self.models, MODELS), ("tables", self.tables, TABLES)):
            for name in filter(None, names.split(",")):
                if name not in known:
                    raise UserError(f"--{what}: unknown '{name}': one of {', '.join(known)}")

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path(self.out or ("chkpt/experiments_quick" if self.quick else "chkpt/experiments"))


# ------------------------------------------------------------------------------------------------------------- the grid


@dataclass(frozen=True)
class Arm:
    """What is done with one model: a row of a table.

    Attributes:
        changes: settings that differ from the defaults of the program.
        critics: model and arm whose critics weight the loss.
        control: the arm of the same model that the result is measured against.
    """

    table: str
    model: str
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    control: str = ""
    program: str = "SLmain.py"
    critics: tuple[str, str] | None = None

    @property
    def starts_from_baseline(self) -> bool:
        return self.program == "RLmain.py" or "polish_lambda" in self.changes


def arms(settings: GridArguments) -> list[Arm]:
    """All arms, in the order of the tables."""
    models = settings.models.split(",")
    studied = models[0]
    found = [arm for model in models for arm in (
        Arm("main", model, "baseline"),
        _critics("main", model, "critics", {}),
        _polish("main", model, "RMTL"),
        Arm("main", model, "constant", {"polish_lambda": 1.0, "polish_method": "constant"}, "baseline"),
        _polish("main", model, "shuffled", polish_method="shuffled"))]
    found += [_polish("ablation", studied, method, polish_method=method) for method in ("label", "critic")]
    found += [Arm("session", studied, ", ".join(f"{key} {value}" for key, value in sees.items()), sees, "baseline")
              for sees in ({"numerical": "none"}, {"encoder": "gru"}, {"encoder": "attention"},
                              {"numerical": "none", "encoder": "gru"}, {"numerical": "none", "encoder": "attention"})]
    found += tried(studied, settings)
    found += [Arm("weighting", studied, name, {"weighting": name}, "baseline") for name in WEIGHTINGS[1:]]
    found += [_polish("transfer", model, f"critics of {other}", critics=(other, "critics"))
              for model, other in itertools.permutations(models, 2)]
    found += [_polish("lambda", studied, f"lambda {value:g}", polish_lambda=value) for value in LAMBDAS]
    for name, values in (("gamma", GAMMAS), ("tau", TAUS)):
        for value in values:
            found += [_critics(name, studied, f"critics, {name} {value:g}", {name: value}),
                      _polish(name, studied, f"{name} {value:g}", critics=(studied, f"critics, {name} {value:g}"))]
    asked = set(filter(None, settings.tables.split(","))) or set(TABLES)
    return _with_what_they_need(found, asked)


def tried(model: str, settings: GridArguments) -> list[Arm]:
    """Ways to make more of the critics than the paper's weights do."""
    contrast: dict[str, Any] = {"polish_lambda": 0.5, "polish_normalise": True}
    critics = "critics that see the session"
    return [
        _polish("tried", model, "mean 1", polish_normalise=True),
        _polish("tried", model, "inverse, mean 1", polish_method="inverse", polish_normalise=True),
        _polish("tried", model, "contrast", polish_method="contrast", **contrast),
        _polish("tried", model, "contrast, shuffled", polish_method="contrast_shuffled", **contrast),
        Arm("tried", model, "constant, the baseline's rate",
            {"polish_lambda": 1.0, "polish_method": "constant", "polish_rate": 1.0}, "baseline"),
        _polish("tried", model, "the baseline's rate", control="constant, the baseline's rate", polish_rate=1.0),
        *(_polish("tried", model, f"from scratch, {name}", control="baseline", polish_start="scratch", **changes)
          for name, changes in (("mean 1", {"polish_normalise": True}),
                                ("contrast", {"polish_method": "contrast", **contrast}),
                                ("contrast, shuffled", {"polish_method": "contrast_shuffled", **contrast}))),
        _critics("tried", model, critics, {"critic_encoder": "gru"}),
        _polish("tried", model, f"with {critics}", critics=(model, critics), critic_encoder="gru"),
        _critics("tried", model, "actor through the critics",
                 {"agent": "ddpg", "init_training_step": settings.critic_updates, "actor_update_freq": 1,
                  "actor_lr": settings.learning_rate * SLArguments().polish_rate}, "constant"),
    ]


def _polish(table: str, model: str, name: str, critics: tuple[str, str] | None = None, control: str = "constant",
            **changes: Any) -> Arm:
    return Arm(table, model, name, {"polish_lambda": 1.0, **changes}, control, critics=critics or (model, "critics"))


def _critics(table: str, model: str, name: str, changes: Mapping[str, Any], control: str = "") -> Arm:
    return Arm(table, model, name, changes, control, "RLmain.py")


def _with_what_they_need(found: Sequence[Arm], tables: set[str]) -> list[Arm]:
    """The arms of the tables asked for, the main comparison of their models, and what else these start from, ask or
    are measured against."""
    by_name = {(arm.model, arm.name): arm for arm in found}
    wanted: set[tuple[str, str]] = set()
    ahead = [arm for arm in found if arm.table in tables]
    while ahead:
        arm = ahead.pop()
        if (arm.model, arm.name) not in wanted:
            wanted.add((arm.model, arm.name))
            ahead += [by_name[need] for need in _needs(arm)]
            ahead += [by_name[arm.model, arm.control]] if arm.control else []
            ahead += [one for one in found if one.table == "main" and one.model == arm.model]
    return [arm for key, arm in by_name.items() if key in wanted]


def _needs(arm: Arm) -> list[tuple[str, str]]:
    return [*([(arm.model, "baseline")] if arm.starts_from_baseline else []), *([arm.critics] if arm.critics else [])]


@dataclass(frozen=True)
class Run:
    """An arm on one data set with one seed."""

    dataset: str
    arm: Arm
    seed: int

    @property
    def key(self) -> Key:
        return self.dataset, self.arm.model, self.arm.name, self.seed

    @property
    def needs(self) -> list[Key]:
        return [(self.dataset, model, name, self.seed) for model, name in _needs(self.arm)]

    def folder(self, settings: GridArguments, other: tuple[str, str] | None = None) -> Path:
        """Where it writes; or another arm with the same data set and seed."""
        model, name = other or (self.arm.model, self.arm.name)
        name = name.replace(", ", "_").replace(" ", "_").replace("'", "")
        return settings.folder / "runs" / f"{self.dataset}_{model}_{name}_{self.seed}"

    def settings(self, grid: GridArguments) -> SLArguments | RLArguments:
        """The settings of the program that it runs."""
        mine, arm = self.folder(grid), self.arm
        start = self.folder(grid, (arm.model, "baseline")) if arm.starts_from_baseline else mine
        shared: dict[str, Any] = {
            "dataset_name": self.dataset, "dataset_path": grid.dataset_path, "seed": self.seed, "save_dir": str(mine),
            "pretrain_path": str(start), "embed_dim": grid.embed_dim,
            "expert_num": grid.expert_num, "feature_map_rate": grid.feature_map_rate}
        if arm.program == "RLmain.py":
            return RLArguments(**shared, **{
                "actor_name": arm.model, "memory_path": str(mine / "memory.npz"), "batch_size": grid.critic_batch,
                "epoch_updates": grid.critic_updates, "epoch": grid.critic_epoch, **arm.changes})
        if arm.critics:
            shared |= {"critic_dir": str(self.folder(grid, arm.critics)), "critic_from": arm.critics[0]}
        return SLArguments(**shared, **{"model_name": arm.model, "learning_rate": grid.learning_rate,
                                        "epoch": grid.epoch, **arm.changes})


# ------------------------------------------------------------------------------------------------------------- the runs


def perform(run: Run, grid: GridArguments, machine: str) -> Row:
    """Run it to its end, in this process; return its row. Raises UserError as the program does."""
    started, folder, settings = time.time(), run.folder(grid), run.settings(grid)
    if _saved_settings(folder) != asdict(settings):
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log), \
            contextlib.redirect_stderr(log):
        going = replace(settings, resume=True)
        if isinstance(going, RLArguments):
            RLmain.main(going)
        else:
            SLmain.main(**asdict(going))
    config, rows = read_json(_only(folder, "config.json")), read_rows(_only(folder, "metrics.csv"))
    if isinstance(settings, RLArguments):  # its figures count the tasks, those of SLmain.py name them
        names = {f"_{number}": f"_{task['name']}" for number, task in enumerate(config["data"]["tasks"])}
        rows = [{name[:-2] + names.get(name[-2:], name[-2:]): value for name, value in row.items()} for row in rows]
    figures = _figures(rows, read_rows(found) if (found := next(folder.rglob("weights.csv"), None)) else [])
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in KEPT and not _is_needed(path, run, settings):
            path.unlink()
    arm = run.arm
    return {"dataset": run.dataset, "table": arm.table, "model": arm.model, "arm": arm.name, "control": arm.control,
            "critics": " ".join(arm.critics or ()), "seed": str(run.seed), **figures,
            "fingerprint": str(config["data_fingerprint"]), "machine": machine,
            "seconds": f"{time.time() - started:.1f}", "command": command_of(arm.program, settings)}


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
    epochs = [row for row in epochs if row.get("epoch")]
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


def run_grid(settings: GridArguments, path: Path) -> None:
    """Run all that is not in the results yet. Raises UserError, at the end, where runs failed."""
    runs = {run.key: run for dataset in settings.datasets.split(",") for arm in arms(settings)
            for seed in range(1, settings.seeds + 1) for run in [Run(dataset, arm, seed)]}
    prints = {name: get_dataset(name, settings.dataset_path).fingerprint for name in settings.datasets.split(",")}
    rows = _finished(path, settings, runs, prints)
    left = _left(runs, set(rows), settings)
    failed: dict[Key, str] = {}
    workers, device = min(settings.workers or os.cpu_count() or 1, max(1, len(left))), machine()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker, (os.getpid(),))
    with tqdm(total=len(runs), initial=len(runs) - len(left), desc="experiments", unit="run", disable=None) as bar:
        try:
            going: dict[Future[Row], Key] = {}
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
                    try:
                        rows[key] = done.result()
                    except UserError as error:
                        failed[key] = str(error)
                        bar.write(f"failed: {' '.join(map(str, key))}: {error}")
                    write_rows(path, [rows[one] for one in runs if one in rows])
                    bar.update()
                    bar.set_postfix_str(" ".join(map(str, key)), refresh=False)
        except BrokenProcessPool as error:
            raise UserError("a run was killed from outside (out of memory?): the same command goes on, with fewer "
                            "--workers if need be") from error
        finally:
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(cancel_futures=True)
    if failed:
        key, why = next(iter(failed.items()))
        raise UserError(f"{len(failed)} of {len(runs)} runs failed, the first: {' '.join(map(str, key))}: {why}; the "
                        "same command tries them again")


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
    """The rows of results that are there: those of this grid, on these data, by the very commands it would run."""
    rows = read_rows(path) if path.exists() else []
    found = {}
    for row in rows:
        key = row["dataset"], row["model"], row["arm"], int(row["seed"])
        if key in runs and row["fingerprint"] == prints[row["dataset"]] and row["command"] == command_of(
                runs[key].arm.program, runs[key].settings(settings)):
            found[key] = {name: value for name, value in row.items() if value}
    if len(found) < len(rows):
        print(f"{path}: {len(rows) - len(found)} of {len(rows)} rows are of other settings or data: they go")
    return found


def _begin_worker(parent: int) -> None:
    """One thread a run, so that results depend on nothing else; Ctrl-C is the parent's; without it, end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

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


@exit_on_user_error
def _command() -> None:
    settings = parse(GridArguments, __doc__ or "")
    path = settings.folder / "results.csv"
    if not settings.report:
        check_writable(settings.folder)
        run_grid(settings, path)
    if not path.exists():
        raise UserError(f"{path}: no results yet: run this command without --report")
    asked = command_of("experiments.py", replace(settings, report=False, publish="", out=""))
    rows = read_rows(path)
    for folder in filter(None, (str(settings.folder), settings.publish)):
        write_report(rows, Path(folder), asked)
    if settings.publish:
        write_rows(Path(settings.publish) / "results.csv", rows)
        put_into_readme(Path("README.md"), rows, Path(settings.publish), asked)
    print(f"written to {settings.folder}: results.csv, report.md and plots")


if __name__ == "__main__":
    _command()

"""What is compared with what: every run of every table, with the settings that the programs take."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from common.errors import UserError
from slmodels import MODELS
from train.Arguments import RLArguments, Settings, SLArguments, option
from train.task_weighting import WEIGHTINGS

TABLES = ("main", "ablation", "session", "tried", "weighting", "transfer", "lambda", "gamma", "tau")
Key = tuple[str, str, str, int]  # data set, model, arm, seed


@dataclass(kw_only=True)
class GridArguments(Settings):
    """Which part of the grid is run, and how large."""

    datasets: str = option("rt", "data sets, with commas between them")
    models: str = option("esmm,mmoe,ple", "models, with commas; the first one is studied in detail")
    seeds: int = option(5, "how many seeds: each is a baseline, critics and all that follows", low=2, high=1000)
    first_seed: int = option(1, "the first of the seeds, which count up", low=0, high=2**30)
    tables: str = option("", "only these tables, with commas (default all)")
    only: str = option("", "only runs whose name holds this text, and what they need")
    lambdas: str = option("0.1,0.3,3,10", "values of lambda beside 1")
    gammas: str = option("0,0.99", "values of gamma beside 0.9; each needs critics of its own")
    taus: str = option("0.05,1", "values of tau beside 0.2; each needs critics of its own")
    quick: bool = option(False, "small: two models, 3 seeds, narrow embeddings, few epochs, and for rt a smaller "
                          "simulated log")
    workers: int = option(0, "runs side by side; 0: as many as there are cores", low=0, high=4096)
    out: str = option("", "where results go (default chkpt/experiments, with --quick chkpt/experiments_quick)")
    report: bool = option(False, "run nothing: write the report from the results.csv that is there")
    publish: str = option("", "copy report, plots and results.csv into this folder, and their summary into README.md")
    dataset_path: str = option("dataset", "the folder of data sets")
    embed_dim: int = option(128, "D of all models and critics", low=1, high=65536)
    expert_num: int = option(8, "E of mmoe, ple, ...", low=2, high=4096)
    feature_map_rate: float = option(0.2, "as in SLmain.py", low=0, high=1)
    learning_rate: float = option(1e-3, "of all supervised runs", low=0)
    epoch: int = option(50, "epochs of a supervised run at the most", low=1)
    critic_batch: int = option(2048, "transitions an update of the critics", low=1)
    critic_updates: int = option(50, "updates an epoch of the critics", low=1)
    critic_epoch: int = option(30, "epochs of the critics at the most", low=1)

    def __post_init__(self) -> None:
        if self.quick:
            small = {"models": "esmm,mmoe", "gammas": "0.5", "taus": "1", "seeds": 3, "embed_dim": 16, "epoch": 3,
                     "critic_epoch": 3, "dataset_path": "chkpt/experiments_quick/dataset"}
            for one in fields(self):  # what was asked for stays
                if one.name in small and getattr(self, one.name) == one.default:
                    setattr(self, one.name, small[one.name])
        super().__post_init__()
        for what, names, known in (("models", self.models, MODELS), ("tables", self.tables, TABLES)):
            for name in filter(None, names.split(",")):
                if name not in known:
                    raise UserError(f"--{what}: unknown '{name}': one of {', '.join(known)}")
        for name in ("lambdas", "gammas", "taus"):
            self.values(name)
        if not arms(self):
            raise UserError(f"--only: no run of these tables has '{self.only}' in its name")

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def values(self, name: str) -> list[float]:
        """The numbers of `lambdas`, `gammas` or `taus`. Raises UserError."""
        text = getattr(self, name)
        try:
            return [float(one) for one in text.split(",") if one]
        except ValueError:
            raise UserError(f"--{name}: '{text}': numbers, with commas between them") from None

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path(self.out or ("chkpt/experiments_quick" if self.quick else "chkpt/experiments"))


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
    found += [_polish("lambda", studied, f"lambda {value:g}", polish_lambda=value)
              for value in settings.values("lambdas")]
    for name in ("gamma", "tau"):
        for value in settings.values(f"{name}s"):
            found += [_critics(name, studied, f"critics, {name} {value:g}", {name: value}),
                      _polish(name, studied, f"{name} {value:g}", critics=(studied, f"critics, {name} {value:g}"))]
    found += [_actor("gamma", studied, settings, f", gamma {value:g}", gamma=value)
              for value in settings.values("gammas")]
    asked = set(filter(None, settings.tables.split(","))) or set(TABLES)
    return _with_what_they_need(found, [arm for arm in found if arm.table in asked and settings.only in arm.name])


def tried(model: str, settings: GridArguments) -> list[Arm]:
    """Ways to make more of the critics than the paper's weights do."""
    contrast: dict[str, Any] = {"polish_lambda": 0.5, "polish_normalize": True}
    critics = "critics that see the session"
    return [
        _polish("tried", model, "mean 1", polish_normalize=True),
        _polish("tried", model, "inverse, mean 1", polish_method="inverse", polish_normalize=True),
        _polish("tried", model, "contrast", polish_method="contrast", **contrast),
        _polish("tried", model, "contrast, shuffled", polish_method="contrast_shuffled", **contrast),
        Arm("tried", model, "constant, the baseline's rate",
            {"polish_lambda": 1.0, "polish_method": "constant", "polish_lr_ratio": 1.0}, "baseline"),
        _polish("tried", model, "the baseline's rate", control="constant, the baseline's rate", polish_lr_ratio=1.0),
        *(_polish("tried", model, f"from scratch, {name}", control="baseline", polish_init="scratch", **changes)
          for name, changes in (("mean 1", {"polish_normalize": True}),
                                ("contrast", {"polish_method": "contrast", **contrast}),
                                ("contrast, shuffled", {"polish_method": "contrast_shuffled", **contrast}))),
        _critics("tried", model, critics, {"critic_encoder": "gru"}),
        _polish("tried", model, f"with {critics}", critics=(model, critics), critic_encoder="gru"),
        _actor("tried", model, settings),
    ]


def _polish(table: str, model: str, name: str, critics: tuple[str, str] | None = None, control: str = "constant",
            **changes: Any) -> Arm:
    return Arm(table, model, name, {"polish_lambda": 1.0, **changes}, control, critics=critics or (model, "critics"))


def _critics(table: str, model: str, name: str, changes: Mapping[str, Any], control: str = "") -> Arm:
    return Arm(table, model, name, changes, control, "RLmain.py")


def _actor(table: str, model: str, settings: GridArguments, more: str = "", **changes: Any) -> Arm:
    """The model itself, trained to raise Q at the rate of a polish run once its critics have learned for an epoch."""
    return _critics(table, model, f"actor through the critics{more}",
                    {"agent": "td3bc", "init_training_step": settings.critic_updates, "actor_update_freq": 1,
                     "actor_lr": settings.learning_rate * SLArguments().polish_lr_ratio, **changes}, "constant")


def _with_what_they_need(found: Sequence[Arm], asked: Sequence[Arm]) -> list[Arm]:
    """The arms asked for, and those that they start from, ask or are measured against, in the order of all."""
    by_name = {(arm.model, arm.name): arm for arm in found}
    wanted: set[tuple[str, str]] = set()
    ahead = list(asked)
    while ahead:
        arm = ahead.pop()
        if (arm.model, arm.name) not in wanted:
            wanted.add((arm.model, arm.name))
            ahead += [by_name[need] for need in _needs(arm)]
            ahead += [by_name[arm.model, arm.control]] if arm.control else []
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
            shared |= {"critic_dir": str(self.folder(grid, arm.critics)), "critic_model": arm.critics[0]}
        return SLArguments(**shared, **{"model_name": arm.model, "learning_rate": grid.learning_rate,
                                        "epoch": grid.epoch, **arm.changes})

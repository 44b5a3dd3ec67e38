"""What is compared with what: the conditions of every table, and the settings of each run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from common.errors import UserError
from dataset.manifest import find_dataset, find_folder
from experiments.arguments import CONTROLS, BoostingArguments, ControlArguments
from slmodels import MODELS
from train.Arguments import WEIGHTINGS, RLArguments, Settings, SLArguments, option

TABLES = ("main", "ablation", "session", "exploratory", "controls", "weighting", "transfer", "lambda", "gamma", "tau")
BOOSTING, CONTROL = "-m experiments.boosting", "-m experiments.controls"
QUICK = {"models": "esmm,mmoe", "gammas": "0.5", "taus": "1", "seeds": 3, "embed_dim": 16, "epoch": 3,
         "critic_epoch": 3}
QUICK_DATASETS = "chkpt/experiments_quick/dataset"
Key = tuple[str, str, str, int]  # data set, model, condition, seed


@dataclass(kw_only=True)
class ExperimentArguments(Settings):
    """Which experiments run, and the size of their models. Raises UserError."""

    datasets: str = option("rt", "comma-separated data sets")
    models: str = option("esmm,mmoe,ple", "comma-separated models; all tables but main, controls and transfer use the "
                         "first")
    seeds: int = option(5, "number of seeds; every seed has its own baseline, critics and fine-tuning runs", low=2,
                        high=1000)
    first_seed: int = option(1, "first seed; the others are consecutive", low=0, high=2**30)
    tables: str = option("", f"comma-separated tables to run (default all): {', '.join(TABLES)}")
    name_filter: str = option("", "run only conditions whose name contains this text, and their dependencies")
    lambdas: str = option("0.1,0.3,3,10", "values of lambda besides 1")
    gammas: str = option("0,0.99", "values of gamma besides 0.9; each trains its own critics")
    taus: str = option("0.05,1", "values of tau besides 0.2; each trains its own critics")
    quick: bool = option(False, "small version: two models, 3 seeds, narrow embeddings, few epochs, and for rt a "
                         "smaller simulated log where there is none")
    workers: int = option(0, "parallel runs; 0: the number of cores, or of the cluster's workers", low=0, high=4096)
    scheduler: str = option("", "run on the workers of the Dask scheduler at this address, such as tcp://host:8786 "
                            "(needs requirements/cluster.txt; docs/scale.md)")
    out: str = option("", "output directory (default chkpt/experiments, with --quick chkpt/experiments_quick)")
    report_only: bool = option(False, "run nothing: write report.md and plots from the results.csv in --out")
    publish_to: str = option("", "also write report.md, plots and results.csv to this directory")
    dataset_path: str = option("dataset", "directory of the data sets")
    embed_dim: int = option(128, "D, embedding size of all models and critics", low=1, high=65536)
    expert_num: int = option(8, "E, experts of omoe, mmoe, ple and metaheac", low=2, high=4096)
    feature_map_rate: float = option(0.2, "as in SLmain.py", low=0, high=1)
    learning_rate: float = option(1e-3, "learning rate of all supervised runs", low=0)
    batch_size: int = option(2048, "batch size of all supervised runs", low=1)
    dropout: float = option(0.2, "dropout of all models and critics", low=0, high=0.99)
    embed_dropout: float = option(0.0, "dropout of the embeddings of all models", low=0, high=0.99)
    epoch: int = option(50, "maximum epochs of a supervised run", low=1)
    critic_batch: int = option(2048, "batch size of a critic update", low=1)
    critic_updates: int = option(50, "critic updates per epoch", low=1)
    critic_epoch: int = option(30, "maximum epochs of the critics", low=1)

    def __post_init__(self) -> None:
        for setting in fields(self):
            if setting.name not in self.given:
                setattr(self, setting.name, self.default_of(setting))
        super().__post_init__()
        for flag, names, known in (("models", self.models, MODELS), ("tables", self.tables, TABLES)):
            for name in filter(None, names.split(",")):
                if name not in known:
                    raise UserError(f"--{flag}: unknown '{name}': one of {', '.join(known)}")
        for flag in ("lambdas", "gammas", "taus"):
            self.values(flag)
        if not conditions(self):
            raise UserError(f"--name_filter: no condition of these tables has '{self.name_filter}' in its name")

        own_rt = find_folder(Path(self.dataset_path), "rt")
        self.simulates_rt = (self.quick and "rt" in self.datasets.split(",")  # found once, for all runs
                             and not (own_rt.is_dir() and any(own_rt.iterdir())))

    def check_files(self) -> None:
        for name in self.datasets.split(","):
            if name != "rt" and not self.report_only:
                find_dataset(Path(self.dataset_path), name)

    def default_of(self, setting: Field[Any]) -> Any:
        """With --quick a small value for some settings."""
        return QUICK.get(setting.name, setting.default) if self.quick else setting.default

    def dataset_path_of(self, dataset: str) -> str:
        """The directory of a data set: --dataset_path; with --quick, for an `rt` that is not there, one of its own."""
        return QUICK_DATASETS if dataset == "rt" and self.simulates_rt else self.dataset_path

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def values(self, name: str) -> list[float]:
        """The numbers of `lambdas`, `gammas` or `taus`. Raises UserError."""
        text = getattr(self, name)
        try:
            return [float(value) for value in text.split(",") if value]
        except ValueError:
            raise UserError(f"--{name}: '{text}' is not a comma-separated list of numbers") from None

    @property
    def folder(self) -> Path:
        """The output directory."""
        return Path(self.out or ("chkpt/experiments_quick" if self.quick else "chkpt/experiments"))


@dataclass(frozen=True)
class Condition:
    """One treatment of one model: a row of a table.

    Attributes:
        overrides: settings that differ from the defaults of the program.
        control: the condition of the same model that the result is compared with.
        critics: model and condition whose critics weight the loss.
    """

    table: str
    model: str
    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    control: str = ""
    program: str = "SLmain.py"
    critics: tuple[str, str] | None = None

    @property
    def starts_from_baseline(self) -> bool:
        return self.program in ("RLmain.py", CONTROL) or "polish_lambda" in self.overrides

    @property
    def dependencies(self) -> list[tuple[str, str]]:
        """Model and condition of the runs whose weights this one loads."""
        baseline = [(self.model, "baseline")] if self.starts_from_baseline else []
        return baseline + ([self.critics] if self.critics else [])


def conditions(settings: ExperimentArguments) -> list[Condition]:
    """The selected conditions with their dependencies and controls, in the order of the tables."""
    models = settings.models.split(",")
    main_model = models[0]
    every = [condition for model in models for condition in (
        Condition("main", model, "baseline"),
        _critics("main", model, "critics"),
        _polish("main", model, "RMTL"),
        Condition("main", model, "constant", {"polish_lambda": 1.0, "polish_method": "constant"}, "baseline"),
        _polish("main", model, "shuffled", polish_method="shuffled"))]
    every.append(Condition("main", "scikit-learn", "boosting", program=BOOSTING))
    every += [_polish("ablation", main_model, method, polish_method=method) for method in ("label", "critic")]
    every += [Condition("session", main_model, ", ".join(f"{key} {value}" for key, value in inputs.items()), inputs,
                        "baseline")
              for inputs in ({"numerical": "session"}, {"numerical": "none"}, {"encoder": "gru"},
                             {"encoder": "attention"}, {"numerical": "none", "encoder": "gru"},
                             {"numerical": "none", "encoder": "attention"})]
    every += exploratory_conditions(main_model, settings)
    every += [Condition("controls", model, name, {"control": name}, "constant", CONTROL)
              for model in models for name in CONTROLS]
    every += [Condition("weighting", main_model, name, {"weighting": name}, "baseline") for name in WEIGHTINGS[1:]]
    every += [_polish("transfer", model, f"critics of {other}", critics=(other, "critics"))
              for model, other in itertools.permutations(models, 2)]
    every += [_polish("lambda", main_model, f"lambda {value:g}", polish_lambda=value)
              for value in settings.values("lambdas")]
    for name in ("gamma", "tau"):
        for value in settings.values(f"{name}s"):
            critics = f"critics, {name} {value:g}"
            every += [_critics(name, main_model, critics, "", **{name: value}),
                      _polish(name, main_model, f"{name} {value:g}", critics=(main_model, critics))]
    every += [_actor("gamma", main_model, settings, f", gamma {value:g}", gamma=value)
              for value in settings.values("gammas")]
    tables = set(filter(None, settings.tables.split(","))) or set(TABLES)
    return _with_dependencies(every, [condition for condition in every if condition.table in tables
                                      and settings.name_filter in condition.name])


def exploratory_conditions(model: str, settings: ExperimentArguments) -> list[Condition]:
    """Uses of the critics beyond the paper's weights."""
    contrast: dict[str, Any] = {"polish_lambda": 0.5, "polish_normalize": True}
    table, critics = "exploratory", "critics that see the session"
    return [
        _polish(table, model, "mean 1", polish_normalize=True),
        _polish(table, model, "inverse, mean 1", polish_method="inverse", polish_normalize=True),
        _polish(table, model, "contrast", polish_method="contrast", **contrast),
        _polish(table, model, "contrast, shuffled", polish_method="contrast_shuffled", **contrast),
        Condition(table, model, "constant, the baseline's rate",
                  {"polish_lambda": 1.0, "polish_method": "constant", "polish_lr_ratio": 1.0}, "baseline"),
        _polish(table, model, "the baseline's rate", control="constant, the baseline's rate", polish_lr_ratio=1.0),
        *(_polish(table, model, f"from scratch, {name}", control="baseline", polish_init="scratch", **overrides)
          for name, overrides in (("mean 1", {"polish_normalize": True}),
                                  ("contrast", {"polish_method": "contrast", **contrast}),
                                  ("contrast, shuffled", {"polish_method": "contrast_shuffled", **contrast}))),
        _critics(table, model, critics, critic_encoder="gru"),
        _polish(table, model, f"with {critics}", critics=(model, critics), critic_encoder="gru"),
        _actor(table, model, settings),
    ]


def _polish(table: str, model: str, name: str, critics: tuple[str, str] | None = None, control: str = "constant",
            **overrides: Any) -> Condition:
    return Condition(table, model, name, {"polish_lambda": 1.0, **overrides}, control,
                     critics=critics or (model, "critics"))


def _critics(table: str, model: str, name: str, control: str = "", **overrides: Any) -> Condition:
    return Condition(table, model, name, overrides, control, "RLmain.py")


def _actor(table: str, model: str, settings: ExperimentArguments, suffix: str = "", **overrides: Any) -> Condition:
    """The model itself, trained to raise Q at the learning rate of a polish run, after one epoch of its critics."""
    return _critics(table, model, f"actor through the critics{suffix}", "constant", agent="td3bc",
                    init_training_step=settings.critic_updates, actor_update_freq=1,
                    actor_lr=settings.learning_rate * SLArguments().polish_lr_ratio, **overrides)


def _with_dependencies(every: Sequence[Condition], selected: Sequence[Condition]) -> list[Condition]:
    """The selected conditions, their dependencies and controls, in the order of `every`."""
    by_name = {(condition.model, condition.name): condition for condition in every}
    kept: set[tuple[str, str]] = set()
    stack = [(condition.model, condition.name) for condition in selected]
    while stack:
        key = stack.pop()
        if key not in kept:
            kept.add(key)
            condition = by_name[key]
            stack += condition.dependencies + ([(condition.model, condition.control)] if condition.control else [])
    return [condition for key, condition in by_name.items() if key in kept]


@dataclass(frozen=True)
class ExperimentRun:
    """A condition on one data set with one seed."""

    dataset: str
    condition: Condition
    seed: int

    @property
    def key(self) -> Key:
        return self.dataset, self.condition.model, self.condition.name, self.seed

    @property
    def dependencies(self) -> list[Key]:
        return [(self.dataset, model, name, self.seed) for model, name in self.condition.dependencies]

    def folder(self, experiment: ExperimentArguments, other: tuple[str, str] | None = None) -> Path:
        """The output directory of the run, or of another model and condition with the same data set and seed."""
        model, name = other or (self.condition.model, self.condition.name)
        name = name.replace(", ", "_").replace(" ", "_").replace("'", "")
        return experiment.folder / "runs" / f"{self.dataset}_{model}_{name}_{self.seed}"

    def settings(self, experiment: ExperimentArguments) -> SLArguments | RLArguments | BoostingArguments:
        """The settings of its program."""
        condition, folder = self.condition, self.folder(experiment)
        dataset_path = experiment.dataset_path_of(self.dataset)
        if condition.program == BOOSTING:
            return BoostingArguments(dataset_name=self.dataset, dataset_path=dataset_path, seed=self.seed,
                                     save_dir=str(folder))
        pretrain = self.folder(experiment, (condition.model, "baseline")) if condition.starts_from_baseline else folder
        shared: dict[str, Any] = {
            "dataset_name": self.dataset, "dataset_path": dataset_path, "seed": self.seed,
            "save_dir": str(folder), "pretrain_path": str(pretrain), "embed_dim": experiment.embed_dim,
            "expert_num": experiment.expert_num, "feature_map_rate": experiment.feature_map_rate,
            "embed_dropout": experiment.embed_dropout}
        if condition.program == "RLmain.py":
            return RLArguments(**shared, **{
                "actor_name": condition.model, "memory_path": str(folder / "memory.npz"),
                "batch_size": experiment.critic_batch, "drop_out": experiment.dropout,
                "epoch_updates": experiment.critic_updates, "epoch": experiment.critic_epoch, **condition.overrides})
        if condition.critics:
            shared |= {"critic_dir": str(self.folder(experiment, condition.critics)),
                       "critic_model": condition.critics[0]}
        kind = ControlArguments if condition.program == CONTROL else SLArguments
        return kind(**shared, **{name: getattr(experiment, name)
                                 for name in ("learning_rate", "batch_size", "dropout", "epoch")},
                    **{"model_name": condition.model, **condition.overrides})

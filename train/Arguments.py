"""Settings: one dataclass a program, one field a flag; the help text stands beside its default.

`parse(SLArguments, ...)` makes the command line of the fields; programs built on these mains make the dataclass itself.
Nothing here imports torch: a program reads its command line first.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

import numpy as np

from common.errors import UserError, command_line, truncate
from common.fileio import is_safe_filename, read_json
from common.run_dir import (
    AGENT_DIR_NAMES,
    RunDirectory,
    agent_dir,
    baseline_path,
    critic_names,
    model_stem,
    network_path,
)
from dataset.manifest import MAX_TASKS, find_dataset
from slmodels import BOTTOM_MLP_DIMS, ENCODERS, MODELS, TOWER_MLP_DIMS
from train.critic_weights import CRITIC_WEIGHTS, POLISH_METHODS
from train.tracking import BACKENDS

WEIGHTINGS = ("equal", "uncertainty", "upgrad", "pcgrad", "cagrad", "mgda")  # of train.task_weighting
Parsed = TypeVar("Parsed", bound="Settings")


def option(default: Any, help: str, *, flag: str = "", choices: Sequence[str] = (), low: float = -math.inf,
            high: float = math.inf, name: bool = False, several: bool = False) -> Any:
    """A field with its help, its allowed values (choices, `several` with commas; or low to high, both allowed) and its
    flag; a `name` becomes part of the names of files."""
    return field(default=default, metadata={"help": help, "flag": flag, "choices": tuple(choices), "low": low,
                                            "high": high, "name": name, "several": several})


class _Given:
    """Stores which settings the caller gave: a value that equals the default may be given, too."""

    __slots__ = ("given",)  # not in `vars`, which are the settings
    given: frozenset[str]

    def __new__(cls, **values: Any) -> Self:
        settings = super().__new__(cls)
        settings.given = frozenset(values)
        return settings


@dataclass(kw_only=True)
class Settings(_Given):
    """The settings of a program. Checks every setting's range. Raises UserError."""

    def default_of(self, setting: Field[Any]) -> Any:
        """The value of a setting that is not given; it may depend on other settings."""
        return setting.default

    def __post_init__(self) -> None:
        for setting in fields(self):
            setattr(self, setting.name, _of_type(setting, getattr(self, setting.name)))
            validate(setting, getattr(self, setting.name))
            if isinstance(setting.default, tuple):
                setattr(self, setting.name, tuple(getattr(self, setting.name)))

    def check_files(self) -> None:
        """Raise UserError where files that the program starts from are missing."""

    def plain(self) -> dict[str, Any]:
        """All settings, as files hold them: a list for a tuple."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(kw_only=True)
class Arguments(Settings):
    """What both programs take: parameters of the model, of the training, and of data and files.

    An object of it, or of a child, can be handed to `RLmain.create_sub_agent`.
    """

    # the model
    task_num: int = option(0, "T, the first tasks of the data set that are trained; 0: all of them", low=0,
                           high=MAX_TASKS)
    expert_num: int = option(8, "E, the experts of omoe, mmoe, ple and metaheac", low=2, high=4096)
    embed_dim: int = option(128, "D, size of an embedding", low=1, high=65536)
    bottom_mlp_dims: tuple[int, ...] = option(BOTTOM_MLP_DIMS, "widths of the shared layers, with commas", low=1,
                                              high=65536)
    tower_mlp_dims: tuple[int, ...] = option(TOWER_MLP_DIMS, "widths of each task's layers, with commas", low=1,
                                             high=65536)
    encoder: str = option("none", "what a model reads of the session besides: none, or the impressions so far, through "
                          "a recurrent unit or attention; its files then carry the encoder's name", choices=ENCODERS)
    critic_encoder: str = option("same", "what the critics read of it: the same as the model, or another encoder",
                                 choices=["same", *ENCODERS])
    window: int = option(10, "impressions that an encoder reads at most, the current one included", low=1,
                         high=1000)

    # the training
    embed_dropout: float = option(0.0, "dropout probability of the numbers of an embedding of the model", low=0,
                                  high=0.99)
    epoch: int = option(50, "epochs at most", low=1)
    batch_size: int = option(512, "rows a step", low=1)
    device: str = option("auto", "where to compute: cpu, cuda, cuda:1, mps; auto takes the best there is")
    precision: str = option(
        "float32", "of matrix products: float32; tf32 and bf16 are faster on processors that have them, and coarser: "
        "factors are rounded to 10 or 7 bits, sums are not", choices=["float32", "tf32", "bf16"])
    seed: int = option(2022, "same seed, same machine: same results", low=0, high=2**31 - 1)
    resume: bool = option(False, "continue a stopped run of the same settings")
    track: str = option("", "also write metrics, settings and plots to these trackers, with commas (needs "
                        "requirements/tracking.txt)", choices=["", *BACKENDS], several=True)

    # data and files
    dataset_name: str = option("rt", "the data set: a folder of MDP tables in --dataset_path", name=True)
    dataset_path: str = option("dataset", "the folder of data sets")
    data: str = option("auto", "where the data are: memory; mapped, in memory-mapped files, which are made beside the "
                       "tables once; auto, mapped where the tables need more than half of the free memory. The results "
                       "are the same", choices=["auto", "memory", "mapped"])
    feature_map_rate: float = option(
        0.2, "long-tailed fields keep their most frequent values up to this fraction of the rows; others share an id",
        low=0, high=1)
    numerical: str = option("rates", "numerical features: rates, the session so far and counts and rates so far of the "
                            "values of fields; session, without the latter; none, the published single zero",
                            choices=["rates", "session", "none"])
    pretrain_path: str = option("pretrain", "the folder of baselines")
    save_dir: str = option("chkpt", "where runs write")

    @property
    def resolved_critic_encoder(self) -> str:
        """The critics' encoder."""
        return self.encoder if self.critic_encoder == "same" else self.critic_encoder

    @property
    def state_context(self) -> int:
        """Impressions of a state; 0: the current one, without a window: neither model nor critics read more."""
        return 0 if self.encoder == self.resolved_critic_encoder == "none" else self.window

    def check_files(self) -> None:
        find_dataset(Path(self.dataset_path), self.dataset_name)

    def critic_stem(self, actor_name: str) -> str:
        """The name of an actor's critics in file names: the actor's, and their encoder if it is not the actor's."""
        return model_stem(actor_name, self.encoder) + (
            "" if self.resolved_critic_encoder == self.encoder else f"_critic_{self.resolved_critic_encoder}")

    def baseline(self, model_name: str) -> Path:
        """The file of a model's baseline on this data set."""
        return baseline_path(self.pretrain_path, self.dataset_name, model_name, self.encoder)

    def metadata(self, model_name: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata of a model of these settings, on data of `RetailRocketRLDataset.metadata`."""
        from slmodels.model_file import model_metadata

        return model_metadata(data, model_name, len(data["tasks"]), self.embed_dim, self.expert_num,
                              self.bottom_mlp_dims, self.tower_mlp_dims, self.encoder, self.window)

    def suggest_command(self, program: str, name: str, value: str) -> str:
        """The command that creates what is missing, `python3 <program> --<name>=<value>`, with the same sizes, data and
        states."""
        same = [setting for setting in fields(Arguments)
                if setting.name not in ("data", "device", "precision", "seed", "resume", "track", "epoch", "batch_size",
                                        "save_dir")]
        words = [f"python3 {program} --{name}={value}", *_flags(self, same)]
        stem = f"{self.dataset_name}_{self.critic_stem(value)}".removeprefix("rt_")
        if program == "RLmain.py" and stem != "esmm":  # the default replay buffer is that of another actor
            words.append(f"--memory_path=pretrain/memory_{stem}.npz")
        return " ".join(words)


@dataclass(kw_only=True)
class SLArguments(Arguments):
    """Supervised training: `SLmain.py`."""

    model_name: str = option("esmm", "the multi-task model", choices=list(MODELS))
    epoch: int = option(50, "epochs at most; training stops earlier when validation AUC no longer rises", low=1)
    patience: int = option(3, "epochs without a better validation AUC after which training stops", low=1)
    learning_rate: float = option(1e-3, "learning rate of Adam", low=0)
    batch_size: int = option(2048, "B, rows a step", low=1)
    weight_decay: float = option(1e-6, "L2 penalty of Adam", low=0)
    dropout: float = option(0.2, "dropout probability of hidden units of the model", low=0, high=0.99)
    calibrator_weight: float = option(0.0, "aitm: weight of its behavioural-expectation calibrator (the paper: 0.6)",
                                      low=0)
    weighting: str = option("equal", "weights of the tasks' losses; all but equal and uncertainty need "
                            "requirements/weighting.txt", choices=WEIGHTINGS)
    shard_embeddings: bool = option(False, "of several processes (torchrun) each holds some of the rows of the "
                                    "embeddings, for tables that are too large for one")
    save_dir: str = option("chkpt/SL", "where runs write")
    polish_lambda: float = option(
        0.0, "lambda > 0: fine-tune the baseline with the critics' weights w = 1 - lambda Q", flag="--polish", low=0)
    polish_method: str = option(
        "full", "weights of the polish run: "
        + "; ".join(f"{name} {method.formula}" for name, method in CRITIC_WEIGHTS.items())
        + "; or a control: constant 1; shuffled and NAME_shuffled those of full and NAME on the wrong samples",
        choices=POLISH_METHODS)
    polish_normalize: bool = option(False, "divide the weights of a polish run by their mean over the batch")
    polish_init: str = option("baseline", "what a polish run trains: the baseline, or a model from scratch",
                               choices=["baseline", "scratch"])
    polish_lr_ratio: float = option(0.1, "of a polish run that starts from the baseline: its learning rate as a "
                                    "fraction of --learning_rate", low=0, high=100)
    critic_model: str = option("", "the model whose critics weight the loss (default its own, else any others)",
                               choices=["", *MODELS])
    critic_dir: str = option("chkpt/RL", "where RLmain.py writes critics")

    @property
    def is_finetuning(self) -> bool:
        """Whether this is a polish run that continues from the baseline."""
        return self.polish_lambda > 0 and self.polish_init == "baseline"

    @property
    def run_dir(self) -> RunDirectory:
        """`<save_dir>/<dataset>_<model>/`, with `<dataset>_<model>_<lambda>.pt`; a polish run has a folder of its name
        in it. Its name contains task weighting, encoders and method."""
        stem = f"{self.dataset_name}_{model_stem(self.model_name, self.encoder)}"
        if self.weighting != "equal":
            stem += f"_{self.weighting}"
        folder, name = Path(self.save_dir) / stem, f"{stem}_{self.polish_lambda}"
        if not self.polish_lambda:
            return RunDirectory(folder, name)
        name += f"_{self.polish_method}" * (self.polish_method != "full")
        name += "_normalized" * self.polish_normalize + "_scratch" * (self.polish_init == "scratch")
        if self.polish_method != "constant" and self.resolved_critic_encoder != self.encoder:
            name += f"_critic_{self.resolved_critic_encoder}"
        return RunDirectory(folder, name, folder / name)

    @property
    def critic_candidates(self) -> dict[str, Path]:
        """The models whose critics may weight the loss, in order of preference, and the directories of their agents."""
        names = [self.critic_model] if self.critic_model else [self.model_name, "esmm", *MODELS]
        return {name: agent_dir(self.critic_dir, self.dataset_name, "bc", self.critic_stem(name)) for name in names}

    def find_critics(self) -> tuple[str, Path]:
        """The model whose critics weight the loss, and the directory of their agent. Raises UserError where there are
        none."""
        for model_name, directory in self.critic_candidates.items():
            if all(network_path(directory, critic).exists() for critic in critic_names(self.task_num or 1)):
                return model_name, directory
        raise UserError(f"{next(iter(self.critic_candidates.values()))}: no critics there: train them first: "
                        + self.suggest_command("RLmain.py", "actor_name", self.critic_model or "esmm"))

    def check_files(self) -> None:
        super().check_files()
        if self.polish_lambda and self.polish_method != "constant":
            self.find_critics()

    @property
    def trained_with(self) -> dict[str, Any]:
        """The settings that a baseline's weights depend on."""
        names = ("epoch", "patience", "learning_rate", "batch_size", "weight_decay", "dropout", "embed_dropout",
                 "calibrator_weight", "feature_map_rate", "precision", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(kw_only=True)
class RLArguments(Arguments):
    """Offline RL: `RLmain.py`. Names and defaults of the agent as documented."""

    actor_name: str = option("esmm", "the model whose predictions are the actions", choices=list(MODELS))
    agent: str = option("bc", "bc: critics alone, to convergence, as TD3+BC learns them; td3bc: the actor "
                        "through them too; ddpg: plain DDPG; multiweight: ddpg with --ips weights for each task",
                        choices=list(AGENT_DIR_NAMES))
    reward_type: str = option("bce", "bce: minus the cross-entropy; norm: -|a - y|", choices=["bce", "norm"])
    epoch: int = option(100, "epochs at most; training stops earlier when the critics have converged", low=1)
    epoch_updates: int = option(200, "updates an epoch", low=1)
    init_episode: int = option(-1, "sessions of uniform actions in the replay buffer, so that critics see all of "
                               "[0, 1]; -1: 10,000, but at most half of the log's sessions", low=-1)
    converge_tolerance: float = option(0.05, "converged: the critic loss changes by less than this fraction ...", low=0)
    converge_trials: int = option(3, "... for so many epochs in a row", low=1)
    gamma: float = option(0.9, "discount of the next impression's reward", low=0, high=1)
    batch_size: int = option(512, "transitions an update", low=1)
    memory_size: int = option(500_000, "transitions in the replay buffer; random sessions of a larger log", low=1)
    memory_path: str = option("pretrain/memory.npz", "the file of the replay buffer")
    refill: bool = option(False, "fill a new replay buffer, even if there is one")
    ou_noise_theta: float = option(0.0, "mean of the exploration noise")
    ou_noise_gamma: float = option(0.4, "variance of the exploration noise", low=0)
    actor_reg: float = option(0.0, "weight of the behavior-cloning penalty towards the pretrained actor", low=0)
    tau: float = option(0.2, "Polyak averaging coefficient of the targets", low=0, high=1)
    soft_update_freq: int = option(2, "updates between two moves of the targets", low=1)
    actor_update_freq: int = option(2, "updates between two of the actor (all but bc)", low=1)
    init_training_step: int = option(10_000, "updates before the actor trains (all but bc)", low=0)
    ips: bool = option(False, "weight samples by the inverse frequency of their labels: ddpg one weight a sample, "
                       "multiweight and bc one a task")
    drop_out: float = option(0.2, "dropout probability of hidden units of actor and critics", low=0, high=0.99)
    actor_lr: float = option(1e-3, "learning rate of the actor's Adam", low=0)
    critic_lr: float = option(1e-3, "learning rate of the critics' Adam", low=0)
    action_normalizer: bool = option(False, "wrap the environments so that they take actions in [-1, 1] (train.utils."
                                     "ActionNormalizer); what is rewarded and stored are the same predictions")
    save_dir: str = option("chkpt/RL", "where agents are saved")

    def check_files(self) -> None:
        updates = self.epoch * self.epoch_updates
        if self.agent != "bc" and updates <= self.init_training_step:
            raise UserError(f"--agent={self.agent}: its actor would not train: {self.epoch} epochs of "
                            f"{self.epoch_updates} updates are {updates:,}, and it begins after "
                            f"{self.init_training_step:,}: raise --epoch, or lower --init_training_step")
        baseline = self.baseline(self.actor_name)
        if not baseline.exists():
            raise UserError(f"{baseline}: no such baseline: train it first: "
                            + self.suggest_command("SLmain.py", "model_name", self.actor_name))
        super().check_files()

    @property
    def run_dir(self) -> RunDirectory:
        """The directory of the agent."""
        return RunDirectory.of_agent(agent_dir(self.save_dir, self.dataset_name, self.agent,
                                               self.critic_stem(self.actor_name)))


def validate(setting: Field[Any], value: Any) -> None:
    """Raise UserError, naming the flag, where a value is not among those allowed."""
    flag, choices, low, high = (setting.metadata[key] for key in ("flag", "choices", "low", "high"))
    flag = flag or f"--{setting.name}"
    if setting.metadata["name"] and not is_safe_filename(value):
        raise UserError(f"{flag}: '{value}' is not the name of a folder: no slashes; --dataset_path is its parent")
    for given in str(value).split(",") if setting.metadata["several"] else [value]:
        if choices and given not in choices:
            meant = difflib.get_close_matches(str(given), choices, 1)
            raise UserError(f"{flag}: unknown '{given}': one of {', '.join(filter(None, choices))}"
                            + (f" (did you mean {meant[0]}?)" if meant else ""))
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{flag}: {value} is not a finite number")
    if isinstance(setting.default, tuple) and (not isinstance(value, tuple | list) or not value
                                           or not all(type(width) is int for width in value)):
        raise UserError(f"{flag}: {value} is not a list of widths, such as 512,256")
    if any(isinstance(number, int | float) and not low <= number <= high
           for number in (value if isinstance(value, tuple | list) else [value])):
        allowed = f"{low:g} or more" if high == math.inf else f"between {low:g} and {high:g}"
        raise UserError(f"{flag}: {value} is not {allowed}")


def _of_type(setting: Field[Any], value: Any) -> Any:
    """A value as the type of the field's default: of numpy's numbers Python's, of a path or a device its text. Raises
    UserError, naming the flag, where it is of another type."""
    flag, kind = setting.metadata["flag"] or f"--{setting.name}", type(setting.default)
    if isinstance(value, np.generic):
        value = value.item()
    if kind is str and (isinstance(value, Path) or type(value).__module__ == "torch"):  # a device
        return str(value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is not tuple and type(value) is not kind:
        raise UserError(f"{flag}: {value!r} is of type {type(value).__name__}, not {kind.__name__}")
    return value


# What flags are called in other libraries or in the other program; the first that a program has is suggested.
ALIASES = {
    "model": ("model_name", "actor_name"), "model_name": ("actor_name",), "actor_name": ("model_name",),
    "lr": ("learning_rate", "critic_lr"), "learning_rate": ("critic_lr",), "l2": ("weight_decay",),
    "l2_reg": ("weight_decay",), "gpu": ("device=cuda",), "cuda": ("device=cuda",), "use_gpu": ("device=cuda",),
    "cpu": ("device=cpu",), "bs": ("batch_size",), "epochs": ("epoch",), "num_epochs": ("epoch",),
    "n_epochs": ("epoch",), "max_epochs": ("epoch",), "dim": ("embed_dim",), "emb_dim": ("embed_dim",),
    "embedding_dim": ("embed_dim",), "embedding_size": ("embed_dim",),
    "dataset": ("dataset_name",), "data_path": ("dataset_path",), "data_dir": ("dataset_path",),
    "num_experts": ("expert_num",), "n_experts": ("expert_num",), "num_tasks": ("task_num",), "n_tasks": ("task_num",),
    "lambda": ("polish",), "discount": ("gamma",), "buffer_size": ("memory_size",), "output": ("save_dir", "out"),
    "output_dir": ("save_dir", "out"), "random_seed": ("seed",), "resume_from": ("resume",), "tracker": ("track",),
    "logger": ("track",),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        found = re.match(r"unrecognized arguments: --([\w-]+)", message)
        meant = self._meant(found[1].replace("-", "_")) if found else ""
        raise UserError(f"{message} ({f'did you mean {meant}? ' if meant else ''}--help explains every flag)")

    def _meant(self, name: str) -> str:
        """The flag that was probably meant: another library's name for it, a close spelling, or the one flag that
        begins so; "" where there is none."""
        flags = [flag for setting in self._actions for flag in setting.option_strings]
        aliases = [f"--{alias}" for alias in ALIASES.get(name, ()) if f"--{alias.split('=')[0]}" in flags]
        begin = [flag for flag in flags if flag.startswith(f"--{name}")]
        return next(iter([*aliases, *difflib.get_close_matches(f"--{name}", flags, 1, 0.8), *begin * (len(begin) == 1)]
                         ), "")


def to_command_line(program: str, settings: Settings) -> str:
    """The command line that `parse` reads these settings from."""
    return " ".join(["python3", program, *_flags(settings, fields(settings))])


def _flags(settings: Settings, among: Sequence[Field[Any]]) -> list[str]:
    """The flags of those fields whose values are not the defaults."""
    words = []
    for setting in among:
        value = getattr(settings, setting.name)
        if value != settings.default_of(setting):
            flag = setting.metadata["flag"] or f"--{setting.name}"
            words.append(flag if value is True else f"{flag}={shlex.quote(_text(value))}")
    return words


def _text(value: Any) -> str:
    """A value as it is typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of widths, such as 512,256") from None


def read_settings(kind: type[Settings], path: Path) -> dict[str, Any]:
    """The settings in a file: in the config.json of a run, or a JSON object of settings alone. Whether that run was
    resumed is left out. Raises UserError, naming the file, for what is no setting of this program or not allowed."""
    config = read_json(path)
    given, known = config.get("settings", config), {setting.name: setting for setting in fields(kind)}
    if not isinstance(given, dict):
        raise UserError(f"{path}: 'settings' is not a JSON object")
    for name in given:
        if name not in known:
            meant = difflib.get_close_matches(name, known, 1, 0.8)
            raise UserError(f"{path}: {command_line([])} has no setting '{truncate(name)}'"
                            + (f" (did you mean {meant[0]}?)" if meant else "")
                            + (f"; the file is of: {truncate(config['command'], 200)}" if "command" in config else ""))
        try:
            validate(known[name], _of_type(known[name], given[name]))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return {name: value for name, value in given.items() if name != "resume"}


def parse(kind: type[Parsed], description: str, arguments: Sequence[str] | None = None) -> Parsed:
    """Read the command line into settings; those of the file `--config` are the defaults. Raises UserError for an
    unknown flag or a value that is not allowed."""
    parser = _Parser(prog=command_line([]), description=description, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS,  # only what is given is passed on
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="", metavar="FILE", help="take settings from this file, the config.json of "
                        "a run or a JSON object of settings; flags win, and --no-NAME turns a switch of it off")
    for setting in fields(kind):
        assert setting.default is not MISSING
        default = f" (default {_text(setting.default)})" if setting.default != "" else ""
        help_text = setting.metadata["help"].replace("%", "%%") + default
        if setting.metadata["choices"]:
            help_text += "; one of " + ", ".join(filter(None, setting.metadata["choices"]))
        flags = [setting.metadata["flag"]] if setting.metadata["flag"] else []
        if isinstance(setting.default, bool):
            parser.add_argument(*flags, f"--{setting.name}", dest=setting.name, action="store_true",
                                help=setting.metadata["help"])
            parser.add_argument(f"--no-{setting.name}", dest=setting.name, action="store_false",
                                help=argparse.SUPPRESS)
        else:
            parser.add_argument(*flags, f"--{setting.name}", dest=setting.name,
                                type=_widths if isinstance(setting.default, tuple) else type(setting.default),
                                metavar=setting.name.split("_")[-1].upper(), help=help_text)
    config = parser.parse_args(arguments).config
    if config:
        parser.set_defaults(**read_settings(kind, Path(config)))
    values = vars(parser.parse_args(arguments))
    del values["config"]
    return kind(**values)

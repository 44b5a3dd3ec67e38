"""The settings of the programs of this package that are runs of an experiment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.run_dir import RunDirectory, model_stem
from dataset.manifest import find_dataset
from train.Arguments import Settings, SLArguments, option

CONTROLS = ("auxiliary", "average", "ensemble")


@dataclass(kw_only=True)
class BoostingArguments(Settings):
    """The settings of a run. Raises UserError."""

    dataset_name: str = option("rt", "the data set: a folder of MDP tables in --dataset_path", name=True)
    dataset_path: str = option("dataset", "the folder of data sets")
    feature_map_rate: float = option(1.0, "as in SLmain.py; 1: every id, there is no embedding that it makes larger",
                                     low=0, high=1)
    numerical: str = option("rates", "as in SLmain.py", choices=["rates", "session", "none"])
    folds: int = option(5, "parts of the training sessions: a row's target means are those of the other parts", low=2)
    smoothing: float = option(20.0, "rows of the mean of all that a target mean is pulled towards", low=0)
    seed: int = option(2022, "of the folds", low=0, high=2**31 - 1)
    save_dir: str = option("chkpt/boosting", "where the run writes")

    def check_files(self) -> None:
        find_dataset(Path(self.dataset_path), self.dataset_name)

    @property
    def run_dir(self) -> RunDirectory:
        """`<save_dir>/<dataset>_boosting/`."""
        name = f"{self.dataset_name}_boosting"
        return RunDirectory(Path(self.save_dir) / name, name)


@dataclass(kw_only=True)
class ControlArguments(SLArguments):
    """Those of `SLmain.py --polish=1 --polish_method=constant`, and which control. Raises UserError."""

    control: str = option("auxiliary", "the control", choices=CONTROLS)
    auxiliary_weight: float = option(1.0, "auxiliary: weight of the auxiliary loss", low=0)
    weighting: str = option("equal", "weights of the tasks' losses: equal", choices=["equal"])
    polish_lambda: float = option(1.0, "1: a control fine-tunes the baseline", flag="--polish", low=1, high=1)
    polish_method: str = option("constant", "weights of the samples: constant", choices=["constant"])
    polish_init: str = option("baseline", "what is fine-tuned: the baseline", choices=["baseline"])
    save_dir: str = option("chkpt/controls", "where runs write")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.control == "auxiliary" and self.encoder != "none":
            raise UserError("--encoder: --control=auxiliary takes none: its head reads the current impression alone")

    @property
    def run_dir(self) -> RunDirectory:
        """`<save_dir>/<dataset>_<model>_<control>/`."""
        name = f"{self.dataset_name}_{model_stem(self.model_name, self.encoder)}_{self.control}"
        return RunDirectory(Path(self.save_dir) / name, name)

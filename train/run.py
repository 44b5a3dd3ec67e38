"""The doorway of the documented functions: `get_dataset` and `get_model` are here, the loops can be imported from here.

Supervised training is in `train.supervised`, offline RL in `train.offline_rl`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from torch import nn

from common import distributed
from common.errors import UserError
from dataset.features import NumericalMode
from dataset.manifest import find_dataset
from dataset.prepare import prepare
from dataset.rtrl import DataMode, Splits, load_splits
from dataset.simulate import SimulationConfig, simulate
from slmodels import build
from slmodels.model_file import BOTTOM_MLP_DIMS, TOWER_MLP_DIMS, load_model
from train.offline_rl import one_iter_offline, plot_loss, test, train_and_test_offline
from train.supervised import slpred, sltest, sltrain

__all__ = ["get_dataset", "get_model", "load_model", "one_iter_offline", "plot_loss", "slpred", "sltest", "sltrain",
           "test", "train_and_test_offline"]


def get_dataset(name: str, path: str | Path, numerical: str = "rates", task_num: int = 0,
                data: str = "auto") -> Splits:
    """Read the MDP tables of a data set; where `rt` is absent it is simulated first.

    path: the folder above that of the data set, which has its `name`; or that folder itself, or its train.csv.
    task_num: how many of its tasks, the first ones; 0: all.
    data: memory, mapped or auto, see `dataset.rtrl.load_splits`.

    Raises UserError where the folder is incomplete, a file in it is wrong, or it has fewer tasks; and where `rt` is
    absent, but there are tables of somebody's in the place where it would be simulated.
    """
    folder, is_there = find_dataset(Path(path), name)
    if not is_there:
        raw = folder.parent / "simulated"
        print(f"{folder} is not there: simulating a shopping log into {raw} and preparing it.\n"
              f"For your own RetailRocket files: python3 -m dataset.prepare --raw DIR --out {folder}\n")
        if not raw.exists():
            simulate(raw, SimulationConfig())
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()
        prepare(raw, folder)
    return load_splits(folder, cast(NumericalMode, numerical), task_num, cast(DataMode, data))


def get_model(name: str, categorical_field_dims: Sequence[int], numerical_num: int, task_num: int, expert_num: int,
              embed_dim: int, dropout: float = 0.2, calibrator_weight: float = 0.0, encoder: str = "none",
              window: int = 10, bottom_mlp_dims: Sequence[int] = BOTTOM_MLP_DIMS,
              tower_mlp_dims: Sequence[int] = TOWER_MLP_DIMS, given: Sequence[int] | None = None) -> nn.Module:
    """Build a model of `slmodels`. Raises UserError, with the list, for an unknown name.

    calibrator_weight: of AITM's behavioural-expectation calibrator; no other model has one.
    encoder, window: what it reads of the session (`layers.sequence`), or none.
    given: of esmm and aitm, the task that each task is given (`layers.ESMM`; `Splits.given`).
    """
    try:
        model = build(name, [int(dim) for dim in categorical_field_dims], numerical_num, embed_dim, bottom_mlp_dims,
                      tower_mlp_dims, task_num, expert_num, dropout, encoder, window, calibrator_weight, given)
    except ValueError as error:
        raise UserError(str(error)) from error
    if distributed.world_size() > 1 and not getattr(model, "data_parallel", True):
        raise UserError(f"{name} trains in one process: its inner step takes half of the whole batch")
    return model

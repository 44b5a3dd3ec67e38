"""Small data sets and agents that several tests make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agents import DDPG_ESMM, DDPG_ESMM_BC
from dataset.rtrl import RetailRocketRLDataset
from env import MTEnv, RewardType
from slmodels import build
from slmodels.model_file import model_metadata, save_model
from train.offline_rl import collect_transitions

Floats = NDArray[np.float32]
REWARDS: tuple[RewardType, ...] = ("bce", "norm")


def handmade(lengths: Sequence[int], labels: Sequence[Sequence[int]] | None = None,
             ids: Sequence[Sequence[int]] | None = None, field_dims: Sequence[int] = (3, 4)) -> RetailRocketRLDataset:
    """Sessions of these lengths; row i has the numbers (i, -i) and, unless given, ids that count up. Labels are those
    of click, pay, and of further tasks if they are given."""
    rows = np.arange(sum(lengths))
    labels = labels or [[row % 2, 0] for row in rows]
    names = ["click", "pay", "like"][: len(labels[0])]
    table = pd.DataFrame({
        "timestamp": 1000 * rows, "sessionid": np.repeat(10 * (np.arange(len(lengths)) + 1), lengths), "itemid": 1,
        **dict(zip(names, np.transpose(labels), strict=True))})
    dataset = RetailRocketRLDataset(table, pd.DataFrame({"itemid": [1], "785": ["a"]}), ["785"], names)
    dataset.numerical = np.column_stack([rows, -rows]).astype(np.float32)
    dataset.set_ids(np.array(ids if ids is not None else [[row % dim for dim in field_dims] for row in rows]),
                    list(field_dims))
    return dataset


SIZES: dict[str, Any] = {"embed_dim": 8, "bottom_mlp_dims": (16, 8), "tower_mlp_dims": (8, 4), "expert_num": 2}


def make_agent(folder: Path, dataset: RetailRocketRLDataset, cls: type[DDPG_ESMM] = DDPG_ESMM_BC,
               actor_name: str = "esmm", reward_type: RewardType = "bce", **hyparams: Any) -> DDPG_ESMM:
    """An agent of tiny networks, with a baseline of random weights."""
    sizes = {**SIZES, **{name: value for name, value in hyparams.items() if name in SIZES}}
    task_num = dataset.labels.shape[1]
    actor = build(actor_name, dataset.field_dims, dataset.numerical_num, sizes["embed_dim"], sizes["bottom_mlp_dims"],
                  sizes["tower_mlp_dims"], task_num, sizes["expert_num"], 0.2)
    save_model(folder / f"rt_{actor_name}.pt", actor, model_metadata(dataset.metadata, actor_name, task_num, **sizes))
    return cls(MTEnv(dataset, reward_type), actor_name, pretrain_path=folder,
               **{"memory_size": 1000, "batch_size": 16, **hyparams})


def uniform(agent: DDPG_ESMM, seed: int = 0, low: float = 0.0, high: float = 1.0) -> DDPG_ESMM:
    """Fill the memory with one pass of uniform actions."""
    rng = np.random.default_rng(seed)
    collect_transitions(agent, lambda state: rng.uniform(low, high, (len(state), agent.task_num)).astype(np.float32))
    return agent


def weights(network: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in network.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

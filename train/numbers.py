"""Numbers that are none, or cannot be: found, named by task, batch and tensor, and told in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from dataset.rtrl import NUMERICAL, RetailRocketRLDataset

LEAK = 0.99  # an AUC that clicks and purchases never have
LOOKED_AT = 100_000  # rows of a split, evenly spread, in which single features are tried


class FirstBad:
    """Remembers the first step at which a loss was no finite number, and which one; the device is asked when told.

    Args:
        device: where they are. A CPU is asked at every step, any other at steps that are multiples of `interval`.
    """

    def __init__(self, device: torch.device | str, interval: int) -> None:
        self.first = torch.zeros(1, dtype=torch.int64, device=device)  # (losses,), once they are known
        self.interval = 1 if torch.device(device).type == "cpu" else interval

    def see(self, step: int, losses: Tensor, last: bool = False) -> tuple[int, int] | None:
        """Take the losses (T,) or () of a step, from 1; return which is the first that is no number, and its step."""
        new = (self.first == 0) & ~torch.isfinite(losses.detach().reshape(-1))
        self.first = torch.where(new, step, self.first)
        if not last and step % self.interval:
            return None
        steps = self.first.cpu().numpy()
        if not steps.any():
            return None
        which = int(np.where(steps > 0, steps, np.iinfo(np.int64).max).argmin())
        return which, int(steps[which])


def bad_tensor(networks: Mapping[str, nn.Module]) -> str:
    """The name of the first parameter or buffer that has a NaN or an infinity: `critic1.first.weight`; "" for none."""
    named = [(f"{name}.{key}".lstrip("."), tensor) for name, network in networks.items()
             for key, tensor in network.state_dict().items() if tensor.is_floating_point()]
    finite = torch.stack([torch.isfinite(tensor).all() for _, tensor in named]).tolist()
    return next((name for (name, _), good in zip(named, finite, strict=True) if not good), "")


def bad_column(columns: NDArray[np.floating]) -> int | None:
    """The first of the columns (n, T) that has a NaN or an infinity."""
    bad = ~np.isfinite(columns).all(axis=0)
    return int(bad.argmax()) if bad.any() else None


def worst_return(worst_reward: float, gamma: float, longest: float) -> float:
    """No policy's discounted return is further from 0: |r| (1 + gamma + gamma^2 + ...), over the longest session."""
    steps = longest + 1.0  # one more, for the reward in front of a target that is itself at the bound
    return abs(worst_reward) * (min(1.0 / (1.0 - gamma), steps) if gamma < 1 else steps)


def leaking_features(split: RetailRocketRLDataset, split_name: str, task_names: Iterable[str]) -> list[str]:
    """Warn of each numeric feature that alone tells a label of a split."""
    step = -(-len(split) // LOOKED_AT)
    names = NUMERICAL if split.numerical_num == len(NUMERICAL) else [str(n) for n in range(split.numerical_num)]
    found = []
    for task, task_name in enumerate(task_names):
        label = split.labels[::step, task]
        if not 0 < label.sum() < len(label):
            continue
        for number, name in enumerate(names):
            auc = float(roc_auc_score(label, split.numerical[::step, number]))
            if max(auc, 1 - auc) > LEAK:
                found.append(f"warning: {task_name}: the feature '{name}' alone has AUC {auc:.4f} on the {split_name} "
                             "split: does it know the label?")
    return found


def leaking_scores(aucs: Sequence[float], split_name: str, task_names: Sequence[str]) -> list[str]:
    """Warn of each task that a model predicts better on a split than anybody can."""
    return [f"warning: {name}: AUC {auc:.4f} on the {split_name} split is above {LEAK}: does a feature know the label?"
            for name, auc in zip(task_names, aucs, strict=False) if auc > LEAK]

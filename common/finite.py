"""NaN and infinity in losses, parameters and predictions: found and named by task, step and tensor."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common import distributed


class NonFiniteMonitor:
    """Finds the first step at which a loss was NaN or infinite, and which loss it was.

    Args:
        device: of the losses. A CPU is checked at every step, a GPU, which would have to be waited for, at multiples of
            `interval`.
    """

    def __init__(self, device: torch.device | str, interval: int) -> None:
        self.first = torch.zeros(1, dtype=torch.int64, device=device)  # (losses,), once they are known
        self.interval = 1 if torch.device(device).type == "cpu" else interval

    def update(self, step: int, losses: Tensor, last: bool = False) -> tuple[int, int] | None:
        """Take the losses (T,) or () of a step, from 1; return the index of the first non-finite one and its step."""
        new = (self.first == 0) & ~torch.isfinite(losses.detach().reshape(-1))
        self.first = torch.where(new, step, self.first)
        if not last and step % self.interval:
            return None
        steps = self.first.cpu().numpy()
        if not steps.any():
            return None
        which = int(np.where(steps > 0, steps, np.iinfo(np.int64).max).argmin())
        return which, int(steps[which])


def first_nonfinite_tensor(networks: Mapping[str, nn.Module]) -> str:
    """The name of the first parameter or buffer with a NaN or an infinity: `critic1.first.weight`; "" for none. Of
    a sharded one this process's rows are looked at."""
    named = [(f"{name}.{key}".lstrip("."), tensor) for name, network in networks.items()
             for key, tensor in network.state_dict().items() if tensor.is_floating_point()]
    finite = torch.stack([torch.isfinite(distributed.local_tensor(tensor)).all() for _, tensor in named]).tolist()
    return next((name for (name, _), good in zip(named, finite, strict=True) if not good), "")


def first_nonfinite_column(columns: NDArray[np.floating]) -> int | None:
    """The first of the columns (n, T) that has a NaN or an infinity."""
    bad = ~np.isfinite(columns).all(axis=0)
    return int(bad.argmax()) if bad.any() else None

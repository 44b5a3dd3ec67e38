"""Task weighting, `--weighting`: how the tasks' losses become one gradient. Baselines to the critics' weights.

- equal: the gradient of the mean loss.
- uncertainty: sum_k exp(-s_k) L_k + s_k / 2, divided by T, with s_k = log sigma_k^2 learned along (Kendall et al., CVPR
  2018, equation (10), for classification).
- upgrad, pcgrad, cagrad, mgda: the tasks' gradients themselves are combined, by torchjd (optional:
  `pip install -r requirements/weighting.txt`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common import distributed
from common.checkpoint import load_optimizer_state
from common.errors import UserError


class TaskWeighting:
    """Equal weights; the parent of the others."""

    def backward(self, losses: Tensor, model: nn.Module) -> None:
        """Give every parameter of the model the gradient to follow, from the tasks' losses (T,)."""
        losses.mean().backward()

    def step(self) -> None:
        """Update the parameters of the weighting itself."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""


class Uncertainty(TaskWeighting):
    """Each task's loss over its learned variance."""

    def __init__(self, task_num: int, learning_rate: float, device: torch.device | str) -> None:
        self.log_variance = torch.zeros(task_num, device=device, requires_grad=True)  # s (T,)
        self.optimizer = torch.optim.Adam([self.log_variance], lr=learning_rate)

    def backward(self, losses: Tensor, model: nn.Module) -> None:
        self.optimizer.zero_grad()
        (torch.exp(-self.log_variance) * losses + self.log_variance / 2).mean().backward()

    def step(self) -> None:
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"log_variance": self.log_variance.detach(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.log_variance.copy_(state["log_variance"])
        load_optimizer_state(self.optimizer, state["optimizer"])


class GradientBalancing(TaskWeighting):
    """The Jacobian of the losses, one row a task, aggregated into one gradient."""

    def __init__(self, aggregator: Any) -> None:
        from torchjd import autojac

        self.autojac, self.aggregator = autojac, aggregator

    def backward(self, losses: Tensor, model: nn.Module) -> None:
        self.autojac.backward(list(losses), parallel_chunk_size=1)  # the functions of layers.ops have no vmap
        params = [one for one in model.parameters() if getattr(one, "jac", None) is not None]
        self.autojac.jac_to_grad(params, self.aggregator)


def make_task_weighting(name: str, task_num: int, learning_rate: float, device: torch.device | str) -> TaskWeighting:
    """Make one of `WEIGHTINGS`. Raises UserError where a package is missing, naming the command that installs it."""
    if name == "equal":
        return TaskWeighting()
    if distributed.world_size() > 1:
        raise UserError(f"--weighting: '{name}' trains in one process")
    if name == "uncertainty":
        return Uncertainty(task_num, learning_rate, device)
    try:
        from torchjd import aggregation

        aggregators: dict[str, Callable[[], Any]] = {
            "upgrad": aggregation.UPGrad, "pcgrad": aggregation.PCGrad, "mgda": aggregation.MGDA,
            "cagrad": lambda: aggregation.CAGrad(c=0.5)}  # c as in the paper's experiments
        return GradientBalancing(aggregators[name]())
    except ImportError as error:
        raise UserError(f"--weighting: '{name}' needs torchjd and its solvers: pip install -r "
                        "requirements/weighting.txt") from error

"""Tools of the loops: stopping rules and the action normalizer.

The documented `Catemapper`, `RlLossPolisher` and `get_optim_param` can be imported from here, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common import distributed
from common.checkpoint import get_optim_param
from common.fileio import atomic_file
from dataset.vocabulary import Catemapper
from train.polish import RlLossPolisher

__all__ = ["ActionNormalizer", "Catemapper", "ConvergeStopper", "EarlyStopper", "RlLossPolisher", "get_optim_param",
           "load_attributes"]


class EarlyStopper:
    """Stop when the validation score has not risen for `num_trials` epochs in a row; keep the best weights.

    The best score starts below every score, so that the first one offered, be it a warm start's own, is the one to
    beat.

    Args:
        save_path: where the best `state_dict` is written as well, for `torch.load(path, weights_only=True)`.
    """

    def __init__(self, num_trials: int, save_path: str | Path | None = None) -> None:
        self.num_trials, self.trial_counter = num_trials, 0
        self.save_path = "" if save_path is None else str(save_path)
        self.best_accuracy, self.best_epoch = -np.inf, -1
        self.best_state: dict[str, Tensor] = {}
        self.epoch = 0  # that of the last score

    def is_continuable(self, model: nn.Module, accuracy: float, epoch: int | None = None) -> bool:
        """Take the score of an epoch (default: the next one, from 1); return whether to go on."""
        self.epoch = self.epoch + 1 if epoch is None else epoch
        if accuracy > self.best_accuracy:
            self.best_accuracy, self.best_epoch, self.trial_counter = float(accuracy), self.epoch, 0
            self.best_state = {name: (tensor if distributed.is_sharded(tensor) else tensor.cpu()).detach().clone()
                               for name, tensor in model.state_dict().items()}
            if self.save_path:
                with atomic_file(Path(self.save_path)) as partial, open(partial, "wb") as file:
                    torch.save(self.best_state, file)
        else:
            self.trial_counter += 1
        return self.trial_counter < self.num_trials

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_attributes(self, state)


class ConvergeStopper:
    """Converged: the loss has changed by less than `eps` for `num_trials` epochs in a row. Then training stops.

    Args:
        save_path: a folder: the agent that has converged is saved there.
        eps: the change, absolute.
        tolerance: the change relative to the loss before, instead of `eps`.
    """

    def __init__(self, save_path: str | Path | None = None, num_trials: int = 2, eps: float = 3e-3, *,
                 tolerance: float | None = None) -> None:
        self.save_path = "" if save_path is None else str(save_path)
        self.num_trials, self.relative = num_trials, tolerance is not None
        self.tolerance = eps if tolerance is None else tolerance
        self.trial_counter, self.last, self.change = 0, float("inf"), float("inf")

    def is_continuable(self, agent: Any, loss: Any = None) -> bool:
        """Take the loss of an epoch, alone or after the agent whose it is; return whether to go on.

        loss: a number, or several (one a critic), of which the mean counts.
        """
        value = float(np.mean(np.asarray(agent if loss is None else loss, np.float64)))
        scale = max(abs(self.last), 1e-12) if self.relative else 1.0
        self.change = abs(value - self.last) / scale if np.isfinite(self.last) else float("inf")
        self.trial_counter = self.trial_counter + 1 if self.change < self.tolerance else 0
        self.last = value
        if self.trial_counter < self.num_trials:
            return True
        if self.save_path and loss is not None:
            agent.save_or_load_agent(self.save_path, if_save=True)
        return False


def load_attributes(stopper: EarlyStopper | ConvergeStopper, state: Mapping[str, Any]) -> None:
    """Give a stopper its attributes back. Raises ValueError where they are others, or of other types."""
    def kind(value: Any) -> type:
        return float if isinstance(value, float) else type(value)  # numpy's floats are floats

    own = vars(stopper)
    if {name: kind(value) for name, value in own.items()} != {name: kind(value) for name, value in state.items()}:
        raise ValueError("not the state of a stopper")
    own.update(state)


class ActionNormalizer(gym.wrappers.RescaleAction[Any, Any, Any]):
    """An environment for agents that act in [-1, 1]: action a becomes 0.5 a + 0.5, once.

    The environment reports the action that it rewarded in `info["action"]`; that one belongs into a replay buffer.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env, np.float32(-1), np.float32(1))

    def reverse_action(self, action: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """The action in [-1, 1] that becomes `action` of the environment within."""
        low, high = self.env.action_space.low, self.env.action_space.high  # type: ignore[attr-defined]
        return 2.0 * (action - low) / (high - low) - 1.0

"""Tools of the loops: stoppers, the normaliser of actions, seeds and devices.

`Catemapper`, `RlLossPolisher` and `get_optim_param`, which are documented here, can be had from here too.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dataset.files import UserError, atomic_file
from dataset.vocabulary import Catemapper
from train import world
from train.checkpoint import get_optim_param
from train.polish import RlLossPolisher

__all__ = ["ActionNormalizer", "Catemapper", "ConvergeStopper", "EarlyStopper", "RlLossPolisher", "get_optim_param",
           "pick_device", "restore", "set_seed"]


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
            self.best_state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            if self.save_path:
                with atomic_file(Path(self.save_path)) as partial, open(partial, "wb") as file:
                    torch.save(self.best_state, file)
        else:
            self.trial_counter += 1
        return self.trial_counter < self.num_trials

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


class ConvergeStopper:
    """Converged: the loss has changed by less than `eps` for `num_trials` epochs in a row. Then training stops.

    Args:
        save_path: a folder: the agent that has converged is saved there.
        eps: the change, absolute.
        tolerance: the change as a share of the loss before, instead of `eps`.
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


def restore(stopper: EarlyStopper | ConvergeStopper, state: Mapping[str, Any]) -> None:
    """Give a stopper its attributes back. Raises ValueError where they are others, or of other types."""
    def kind(value: Any) -> type:
        return float if isinstance(value, float) else type(value)  # numpy's floats are floats

    own = vars(stopper)
    if {name: kind(value) for name, value in own.items()} != {name: kind(value) for name, value in state.items()}:
        raise ValueError("not the state of a stopper")
    own.update(state)


class ActionNormalizer(gym.wrappers.RescaleAction[Any, Any, Any]):
    """An environment for agents that act in [-1, 1]: action a becomes 0.5 a + 0.5, once.

    The environment reports the action that it rewarded in `info["action"]`; that one belongs into a replay memory.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env, np.float32(-1), np.float32(1))

    def reverse_action(self, action: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """The action in [-1, 1] that becomes `action` of the environment within."""
        low, high = self.env.action_space.low, self.env.action_space.high  # type: ignore[attr-defined]
        return 2.0 * (action - low) / (high - low) - 1.0


def set_seed(seed: int, *more: int) -> None:
    """Seed python, numpy and torch with a function of the numbers given, such as (seed, epoch)."""
    mixed = int(np.random.SeedSequence([seed, *more]).generate_state(1, np.uint64)[0])
    random.seed(mixed)
    np.random.seed(mixed % 2**32)  # noqa: NPY002 -- for code of others that draws from the global one
    torch.manual_seed(mixed % 2**63)


def pick_device(name: str, precision: str = "float32") -> torch.device:
    """Give the device of that name; `auto` is the best there is. Raises UserError where it cannot be used.

    precision: of matrix products from now on (`tf32`, `bf16`: rounded factors, sums in float32).
    """
    torch.set_float32_matmul_precision({"float32": "highest", "tf32": "high", "bf16": "medium"}[precision])
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: '{name}' cannot be used here: {reason} (try --device=cpu)") from error
    if device.type == "cpu":
        _keep_freed_memory()
    return world.join(device)


def _keep_freed_memory() -> None:
    """Ask glibc to reuse large freed blocks at once instead of returning them to the system.

    Training frees and allocates the same activations every step; fetching their pages anew each time costs up to half
    of it. Other C libraries have no such switch, and are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_threshold, 2**30)

"""Critics learned offline, in the manner of TD3+BC (Fujimoto & Gu, NeurIPS 2021): what RMTL weights its loss with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.DDPG_ESMM import Tensors
from agents.DDPG_ESMM_multiweight import DDPG_ESMM_multiweight
from agents.ReplayBuffer import Transition
from train import world

RECORD_FREQ = 50  # updates between two looks at the actor's losses, which train nothing here
ROWS = 4096  # next states that the actor is asked about at once


class DDPG_ESMM_BC(DDPG_ESMM_multiweight):
    """The actor stays the pretrained one; `update` trains only the critics, and records the actor's losses.

    As in TD3+BC the numbers of the present impression are normalised with mean and standard deviation over the memory.
    The critics carry both numbers with them, so that whoever asks them later normalises alike; ids are left alone.
    """

    def __init__(self, *args: Any, **hyparams: Any) -> None:
        super().__init__(*args, **hyparams)
        self.recorded = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        self.next_predictions, self.seen = torch.empty(0, self.task_num), 0  # (memory.size, T), memory.stored

    def prepare(self) -> None:
        """Take from the memory, now that it is filled, what no update changes: mean and standard deviation of the
        numbers, into all critics, and the actor's predictions in every next state."""
        states = np.array_split(self.memory.data["next_state"][: self.memory.size], -(-self.memory.size // ROWS))
        self.next_predictions = torch.cat([self.actor_target(*self.split(torch.from_numpy(part).to(self.device)))
                                           for part in states])
        self.seen = self.memory.stored
        numerical_num = self.env.sessions.numerical_num  # of the present impression: a state's last columns
        numbers = torch.from_numpy(self.memory.data["state"][: self.memory.size, -numerical_num:])
        for critic, target, _ in self.critics():
            for one in (critic, target):
                one.mean[:numerical_num] = numbers.mean(dim=0)
                one.std[:numerical_num] = numbers.std(dim=0) + 1e-3

    def process_batch(self, transition: Transition) -> Tensors:
        """As the parent; about a batch of the memory that `prepare` saw the actor need not be asked again."""
        batch = super().process_batch(transition)
        if "index" in transition and self.seen == self.memory.stored:
            batch["next_prediction"] = self.next_predictions[torch.from_numpy(transition["index"])]
        return batch

    def _target_soft_update(self, tau: float) -> None:
        """The actor does not move, so only the critics' targets follow."""
        self._follow([(critic, target) for critic, target, _ in self.critics()], tau)

    def update(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One update of both critics. Returns their losses, and the actor's two losses as last recorded."""
        transition, part = self.sample()
        closses = self._update_critics(transition, part)
        if self.updates % RECORD_FREQ == 1:
            with torch.no_grad():
                aloss, aloss_reg = world.total(part * torch.stack(self._actor_losses(transition, part)))
                self.recorded = aloss, aloss_reg
        if self.updates % self.soft_update_freq == 0:
            self._target_soft_update(self.tau)
        return closses[0], closses[-1], *self.recorded

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "recorded": [float(one) for one in self.recorded]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        aloss, aloss_reg = (torch.tensor(one, device=self.device) for one in state["recorded"])
        self.recorded = aloss, aloss_reg

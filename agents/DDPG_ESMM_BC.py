"""Critics learned offline, in the manner of TD3+BC (Fujimoto & Gu, NeurIPS 2021): what RMTL weights its loss with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.DDPG_ESMM import Tensors
from agents.DDPG_ESMM_multiweight import DDPG_ESMM_multiweight
from agents.ReplayBuffer import Transition
from common import distributed
from layers import Critic, standardize

LOG_INTERVAL = 50  # updates between two evaluations of the actor's losses, which are not trained on
INFERENCE_BATCH = 4096  # next states in one forward pass
TARGET_SMOOTHING_SIGMA, TARGET_SMOOTHING_CLIP = 0.01, 0.03  # TD3: 0.2, 0.5 on [-1, 1]


class DDPG_ESMM_BC(DDPG_ESMM_multiweight):
    """The actor stays the pretrained one; `update` trains only the critics, and evaluates the actor's losses.

    Three changes make plain DDPG that of TD3+BC: `process_batch` normalizes the numbers of the present impression with
    mean and standard deviation over the memory, `get_closs` smooths the target policy and takes the smaller of two
    targets, `get_aloss` divides Q by its mean size. Mean and deviation are buffers of the critics, so that
    every later use normalizes the same way; ids are not normalized.
    """

    trains_actor = False
    last_actor_losses: tuple[Tensor, Tensor] | None = None  # the actor's losses
    next_predictions: Tensor | None = None  # (memory.size, T) in every next state
    cached_version = 0  # memory.total_added when `fit_normalizer_and_cache` last looked

    def fit_normalizer_and_cache(self) -> None:
        """Take from the replay buffer what no update changes: mean and standard deviation of the numbers, for all
        critics, and the actor's predictions in every next state."""
        chunks = np.array_split(self.memory.data["next_state"][: self.memory.size],
                                -(-self.memory.size // INFERENCE_BATCH))
        with torch.no_grad():
            self.next_predictions = torch.cat([
                self.actor_target(*self.split_state(torch.from_numpy(chunk).to(self.device))) for chunk in chunks])
        self.cached_version = self.memory.total_added
        # The numbers of the present impression are a state's last columns.
        numbers = torch.from_numpy(self.memory.data["state"][: self.memory.size, -self.states.numerical_num:])
        for critic, target, _ in self.critics():
            for network in (critic, target):
                standardize(network, numbers)

    def process_batch(self, transition: Transition) -> Tensors:
        """As the parent, for critics that normalize: their mean and deviation are taken from the memory at the first
        batch, and again when it has grown by a tenth. The cached predictions in the next states serve for
        batches of the replay buffer as it was then."""
        if self.memory.size and (not self.cached_version or self.memory.total_added >= 1.1 * self.cached_version):
            self.fit_normalizer_and_cache()
        batch = super().process_batch(transition)
        batch["noise"] = distributed.from_main(torch.randn_like(batch["reward"]))  # of the target policy
        is_cached = self.cached_version == self.memory.total_added
        if "index" in transition and is_cached and self.next_predictions is not None:
            batch["next_prediction"] = self.next_predictions[torch.from_numpy(transition["index"])]
        return batch

    def get_closs(self, critic_id: int, critic: Critic, critic_target: Critic, transition: Tensors) -> Tensor:
        """The mean squared TD error of one critic, times the sample weight: a scalar. The target is TD3's."""
        return self._td_error(critic_id, critic, transition,
                              self.td3_target(critic_id, critic, critic_target, transition))

    @torch.no_grad()
    def td3_target(self, critic_id: int, critic: Critic, critic_target: Critic, transition: Tensors) -> Tensor:
        """r + gamma (1 - done) min(Q_target(s', a'), Q(s', a')), (B,); a' = actor_target(s') + clipped noise."""
        state = transition["next_categorical_x"], transition["next_numerical_x"]
        action = self.next_prediction(transition)[:, critic_id:critic_id + 1]
        noise = transition["noise"][:, critic_id:critic_id + 1] * TARGET_SMOOTHING_SIGMA
        action = (action + noise.clamp(-TARGET_SMOOTHING_CLIP, TARGET_SMOOTHING_CLIP)).clamp(0.0, 1.0)
        was_training = critic.training
        next_q = torch.minimum(critic_target(*state, action), critic.eval()(*state, action))
        critic.train(was_training)
        return self._discounted(critic_id, transition, next_q)

    def get_aloss(self, transition: Tensors) -> tuple[Tensor, Tensor]:
        """As the parent, but the first is -lambda mean(Q_1 + ... + Q_T), lambda = 1 / mean|Q(s, a)| over the batch's
        own actions (TD3+BC, equation (5)), of several processes the whole batch's."""
        aloss, aloss_reg = super().get_aloss(transition)
        with torch.no_grad():
            state = transition["categorical_x"], transition["numerical_x"]
            size = self._q_values(state, transition["action"]).abs().mean()
            scale = 1.0 / distributed.batch_mean(size, len(transition["action"]))[0].clamp(min=1e-6)
        return scale * aloss, aloss_reg

    def _target_soft_update(self, tau: float) -> None:
        """The actor is not trained, so only the critics' targets move."""
        self._soft_update_critics(tau)

    def update(self) -> tuple[Tensor, ...]:
        """One update of all critics. Returns their losses, and the actor's two losses when last evaluated."""
        transition = self.sample_shard()
        closses = self._update_critics(transition)
        if self.updates % LOG_INTERVAL == 1:
            with torch.no_grad():
                losses = self._actor_losses(transition)
            aloss, aloss_reg = distributed.batch_mean(losses, len(transition["action"]))[0]
            self.last_actor_losses = aloss, aloss_reg
        assert self.last_actor_losses is not None
        if self.updates % self.soft_update_freq == 0:
            self._target_soft_update(self.tau)
        return *closses, *self.last_actor_losses

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "last_actor_losses": [float(one) for one in self.last_actor_losses or ()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        aloss, aloss_reg = (torch.tensor(one, device=self.device) for one in state["last_actor_losses"] or (0.0, 0.0))
        self.last_actor_losses = aloss, aloss_reg

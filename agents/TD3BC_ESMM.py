"""TD3+BC whole (Fujimoto & Gu, NeurIPS 2021): the critics of DDPG_ESMM_BC, and an actor that trains through them."""

from __future__ import annotations

from agents.DDPG_ESMM import DDPG_ESMM, Tensors
from agents.DDPG_ESMM_BC import DDPG_ESMM_BC
from agents.ReplayBuffer import Transition


class TD3BC_ESMM(DDPG_ESMM_BC):
    """The losses of `DDPG_ESMM_BC`, the updates of `DDPG_ESMM`: after `init_training_step` the actor trains too, every
    `actor_update_freq` updates, and its target is updated."""

    trains_actor = True
    update = DDPG_ESMM.update
    _target_soft_update = DDPG_ESMM._target_soft_update

    def process_batch(self, transition: Transition) -> Tensors:
        """As the parent, without the cached predictions: the actor changes."""
        batch = super().process_batch(transition)
        batch.pop("next_prediction", None)
        return batch

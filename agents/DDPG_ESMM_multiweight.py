"""DDPG_ESMM with a weight for every sample and task in the critics' losses."""

from __future__ import annotations

import torch

from agents.DDPG_ESMM import DDPG_ESMM, Tensors
from agents.ReplayBuffer import Transition


class DDPG_ESMM_multiweight(DDPG_ESMM):
    """With `ips`, sample i of task k weighs 1 / (2 P(y_k = y_ik)), P the shares of the labels in the memory.

    Inverse propensities: clicks and purchases, a few per cent of the samples, count in total as much as the rest; the
    weights have mean 1. Without `ips` every weight is 1.
    """

    def process_batch(self, transition: Transition) -> Tensors:
        """As the parent; "weight" (B, T) holds the sample weights."""
        batch = super().process_batch(transition)
        if self.ips:
            positive = torch.from_numpy(self.memory.data["label"][: self.memory.size].mean(axis=0)).to(self.device)
            share = torch.where(batch["label"] > 0, positive, 1 - positive)  # (B, T)
            batch["weight"] = 1.0 / (2.0 * share)
        return batch

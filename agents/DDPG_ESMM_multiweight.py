"""DDPG_ESMM with a weight for every sample and task in the critics' losses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from agents.DDPG_ESMM import DDPG_ESMM


class DDPG_ESMM_multiweight(DDPG_ESMM):
    """With `ips`, sample i of task k weighs 1 / (2 P(y_k = y_ik)), P the shares of the labels in the memory.

    Inverse propensities: clicks and purchases, a few per cent of the samples, count in total as much as the rest; the
    weights have mean 1. Without `ips` every weight is 1.
    """

    def sample_weights(self, label: Tensor) -> Tensor:
        """One weight for every sample and task, (B, T)."""
        counts = self.label_counts()
        kinds = np.arange(len(counts))[:, None] >> np.arange(self.task_num) & 1  # (2^T, T) labels of each combination
        positive = torch.from_numpy(counts @ kinds / counts.sum()).to(label)
        share = torch.where(label > 0, positive, 1 - positive)  # (B, T)
        return 1.0 / (2.0 * share)

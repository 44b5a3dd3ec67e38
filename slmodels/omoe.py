"""OMoE: one-gate mixture of experts, the baseline of the MMoE paper (Ma et al., KDD 2018, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layers.base import MultiTaskModel
from layers.layers import Experts, FeatureEmbedding, Gate, MultiLayerPerceptron, gated_sums


class OMoE(MultiTaskModel):
    """p_t = sigmoid(tower_t(sum_e g_e(x) f_e(x))): one gate for all tasks. Arguments as `slmodels.mmoe.MMoE`."""

    def __init__(self, categorical_field_dims: Sequence[int], numerical_num: int, embed_dim: int,
                 bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], task_num: int, expert_num: int,
                 dropout: float) -> None:
        super().__init__()
        self.input = FeatureEmbedding(categorical_field_dims, numerical_num, embed_dim)
        self.experts = Experts(expert_num, self.input.output_dim, bottom_mlp_dims, dropout)
        self.gate = Gate(self.input.output_dim, expert_num)
        self.towers = nn.ModuleList(MultiLayerPerceptron(bottom_mlp_dims[-1], tower_mlp_dims, dropout)
                                    for _ in range(task_num))

    def batch_forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        x = self.input(categorical_x, numerical_x)
        (h,) = gated_sums([self.gate(x)], self.experts(x))  # (B, H)
        return torch.sigmoid(torch.cat([tower(h) for tower in self.towers], dim=1))

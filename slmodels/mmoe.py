"""MMoE: multi-gate mixture of experts (Ma et al., KDD 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layers.base import MultiTaskModel
from layers.layers import Experts, FeatureEmbedding, Gate, MultiLayerPerceptron, gated_sums


class MMoE(MultiTaskModel):
    """p_t = sigmoid(tower_t(sum_e g_te(x) f_e(x))): the paper's equations (6) and (7).

    Arguments as `layers.ESMM`, and expert_num: E.
    """

    def __init__(self, categorical_field_dims: Sequence[int], numerical_num: int, embed_dim: int,
                 bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], task_num: int, expert_num: int,
                 dropout: float) -> None:
        super().__init__()
        self.input = FeatureEmbedding(categorical_field_dims, numerical_num, embed_dim)
        self.experts = Experts(expert_num, self.input.output_dim, bottom_mlp_dims, dropout)
        self.gates = nn.ModuleList(Gate(self.input.output_dim, expert_num) for _ in range(task_num))
        self.towers = nn.ModuleList(MultiLayerPerceptron(bottom_mlp_dims[-1], tower_mlp_dims, dropout)
                                    for _ in range(task_num))

    def batch_forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        x = self.input(categorical_x, numerical_x)
        experts = self.experts(x)  # (B, E, H)
        mixed = gated_sums([gate(x) for gate in self.gates], experts)
        scores = [tower(h) for tower, h in zip(self.towers, mixed, strict=True)]
        return torch.sigmoid(torch.cat(scores, dim=1))

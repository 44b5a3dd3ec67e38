"""Shared bottom (Caruana, Machine Learning 1997): one representation, T towers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layers.base import MultiTaskModel
from layers.layers import FeatureEmbedding, MultiLayerPerceptron


class SharedBottom(MultiTaskModel):
    """p_t = sigmoid(tower_t(bottom(x))). Arguments as `layers.ESMM`."""

    def __init__(self, categorical_field_dims: Sequence[int], numerical_num: int, embed_dim: int,
                 bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], task_num: int, dropout: float) -> None:
        super().__init__()
        self.input = FeatureEmbedding(categorical_field_dims, numerical_num, embed_dim)
        self.bottom = MultiLayerPerceptron(self.input.output_dim, bottom_mlp_dims, dropout, output_layer=False)
        self.towers = nn.ModuleList(MultiLayerPerceptron(bottom_mlp_dims[-1], tower_mlp_dims, dropout)
                                    for _ in range(task_num))

    def batch_forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        h = self.bottom(self.input(categorical_x, numerical_x))  # (B, H)
        return torch.sigmoid(torch.cat([tower(h) for tower in self.towers], dim=1))

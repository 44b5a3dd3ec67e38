"""ESMM, the actor: entire-space multi-task model (Ma et al., SIGIR 2018), with a shared bottom as documented."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layers.base import MultiTaskModel
from layers.layers import FeatureEmbedding, MultiLayerPerceptron


class ESMM(MultiTaskModel):
    """One shared bottom, T towers; p(CTR) = sigmoid(tower_0), p(task t) = p(CTR) sigmoid(tower_t).

    The second product is the paper's equation (1), pCTCVR = pCTR x pCVR: the conversion rate is learned over the
    entire space of impressions, and CTCVR never exceeds CTR.

    Args:
        categorical_field_dims: number of ids of each of the F fields.
        numerical_num: N, the numeric features.
        embed_dim: D, size of an embedding.
        bottom_mlp_dims, tower_mlp_dims: widths of the hidden layers.
        task_num: T; task 0 is CTR.
        dropout: dropout probability of hidden units.
    """

    def __init__(self, categorical_field_dims: Sequence[int], numerical_num: int, embed_dim: int,
                 bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], task_num: int,
                 dropout: float = 0.2) -> None:
        super().__init__()
        self.input = FeatureEmbedding(categorical_field_dims, numerical_num, embed_dim)
        self.bottom = MultiLayerPerceptron(self.input.output_dim, bottom_mlp_dims, dropout, output_layer=False)
        self.towers = nn.ModuleList(MultiLayerPerceptron(bottom_mlp_dims[-1], tower_mlp_dims, dropout)
                                    for _ in range(task_num))

    def batch_forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        h = self.bottom(self.input(categorical_x, numerical_x))  # (B, H)
        p_ctr, *p_conversions = [torch.sigmoid(tower(h)) for tower in self.towers]  # (B, 1) each
        return torch.cat([p_ctr, *(p_ctr * p for p in p_conversions)], dim=1)

"""Single-task learning: T networks that share nothing, the yardstick for what sharing brings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layers.base import MultiTaskModel
from layers.layers import FeatureEmbedding, MultiLayerPerceptron


class SingleTask(MultiTaskModel):
    """p_t = sigmoid(MLP_t(x)), each task with an embedding of its own. Arguments as `layers.ESMM`."""

    def __init__(self, categorical_field_dims: Sequence[int], numerical_num: int, embed_dim: int,
                 bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], task_num: int, dropout: float) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(FeatureEmbedding(categorical_field_dims, numerical_num, embed_dim)
                                    for _ in range(task_num))
        input_dim = (len(categorical_field_dims) + 1) * embed_dim
        self.networks = nn.ModuleList(MultiLayerPerceptron(input_dim, [*bottom_mlp_dims, *tower_mlp_dims], dropout)
                                      for _ in range(task_num))

    def batch_forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        scores = [network(own_input(categorical_x, numerical_x))
                  for own_input, network in zip(self.inputs, self.networks, strict=True)]
        return torch.sigmoid(torch.cat(scores, dim=1))

    def input_layer(self, task: int) -> FeatureEmbedding:
        layer = self.inputs[task]
        assert isinstance(layer, FeatureEmbedding)
        return layer

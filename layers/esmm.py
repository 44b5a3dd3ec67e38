"""ESMM, the actor: entire-space multi-task model (Ma et al., SIGIR 2018), with a shared bottom as documented."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layers.base import MultiTaskModel, check_given
from layers.layers import FeatureEmbedding, MultiLayerPerceptron


class ESMM(MultiTaskModel):
    """One shared bottom, T towers; p_t = p_given(t) sigmoid(tower_t), or sigmoid(tower_t) of a task that is given none.

    The product is the paper's equation (1), pCTCVR = pCTR x pCVR: the conversion rate is learned over the entire space
    of impressions, and CTCVR never exceeds CTR.

    Args:
        categorical_field_dims: number of ids of each of the F fields.
        numerical_num: N, the numeric features.
        embed_dim: D, size of an embedding.
        bottom_mlp_dims, tower_mlp_dims: widths of the hidden layers.
        task_num: T.
        dropout: dropout probability of hidden units.
        given: of each task the number of the earlier one that it implies and is conditional on, -1 for none (T,);
            default: all but the first are given the first, CTR.
    """

    def __init__(self, categorical_field_dims: Sequence[int], numerical_num: int, embed_dim: int,
                 bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], task_num: int,
                 dropout: float = 0.2, given: Sequence[int] | None = None) -> None:
        super().__init__()
        self.given = check_given([-1, *[0] * (task_num - 1)] if given is None else given, task_num)
        self.input = FeatureEmbedding(categorical_field_dims, numerical_num, embed_dim)
        self.bottom = MultiLayerPerceptron(self.input.output_dim, bottom_mlp_dims, dropout, output_layer=False)
        self.towers = nn.ModuleList(MultiLayerPerceptron(bottom_mlp_dims[-1], tower_mlp_dims, dropout)
                                    for _ in range(task_num))

    def batch_forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        h = self.bottom(self.input(categorical_x, numerical_x))  # (B, H)
        predictions: list[Tensor] = []  # (B, 1) each
        for tower, given in zip(self.towers, self.given, strict=True):
            p = torch.sigmoid(tower(h))
            predictions.append(p if given < 0 else predictions[given] * p)
        return torch.cat(predictions, dim=1)

"""The critics: Q(s, a), the expected discounted reward of prediction a in state s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from layers.layers import FeatureEmbedding, MultiLayerPerceptron, linear
from layers.ops import relu_dropout


class Critic(nn.Module):
    """Fields, numbers and the action, each embedded, through a bottom and a tower to one number.

    The action is one more block of D inputs to the first layer: W concat(s, B a + c) = W_s s + (W_a B) a + W_a c, and
    a is one number.

    Args:
        categorical_field_dims: number of ids of each of the F fields.
        numerical_num: N, the numeric features.
        embed_dim, bottom_mlp_dims, tower_mlp_dims: as the actor's, so that critics can start from its embedding.
        dropout: dropout probability of hidden units.
    """

    window = 0  # impressions of the session that the critic reads; 0: the current one alone

    def __init__(self, categorical_field_dims: Sequence[int], numerical_num: int, embed_dim: int,
                 bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], dropout: float = 0.2) -> None:
        super().__init__()
        self.input = FeatureEmbedding(categorical_field_dims, numerical_num, embed_dim)
        self.action = nn.Linear(1, embed_dim)
        self.first = nn.Linear(self.input.output_dim + embed_dim, bottom_mlp_dims[0])
        self.dropout = dropout
        self.bottom = MultiLayerPerceptron(bottom_mlp_dims[0], bottom_mlp_dims[1:], dropout, output_layer=False)
        self.tower = MultiLayerPerceptron(bottom_mlp_dims[-1], tower_mlp_dims, dropout)

    def pre_activation(self, categorical_x: Tensor, numerical_x: Tensor, action: Tensor) -> Tensor:
        """The last pre-activation (B,)."""
        w_state, w_action = self.first.weight.split([self.input.output_dim, self.action.out_features], dim=1)
        bias = self.first.bias + w_action @ self.action.bias
        h = linear(self.input(categorical_x, numerical_x), w_state, bias)
        h = h + action * (w_action @ self.action.weight).T  # (B, H)
        h = relu_dropout(h, self.dropout, self.training)
        if len(self.bottom.hidden):
            h = self.bottom(h)
        return self.tower(h).squeeze(1)

    def forward(self, categorical_x: Tensor, numerical_x: Tensor, action: Tensor) -> Tensor:
        """Take ids (B, F), numbers (B, N) and one action each, (B,) or (B, 1); return Q (B,).

        One sample, (F,) and (N,), gives a tensor of length 1. Raises ValueError for actions of another shape.
        """
        if categorical_x.ndim == 1:
            categorical_x, numerical_x, action = categorical_x[None], numerical_x[None], action.reshape(1, -1)
        rows = len(categorical_x)
        if tuple(action.shape) not in ((rows,), (rows, 1)):
            raise ValueError(f"action: shape {tuple(action.shape)}, but one action for each of {rows} rows is needed: "
                             f"({rows},) or ({rows}, 1)")
        return self.q(self.pre_activation(categorical_x, numerical_x, action.reshape(rows, 1)))

    def q(self, pre_activation: Tensor) -> Tensor:
        """Q (B,) of the last pre-activation (B,)."""
        return pre_activation


class NegReLU(torch.autograd.Function):
    """-ReLU(z), with the gradient of the projection onto Q <= 0 (Rosen 1960).

    Where z < 0, and so Q = 0, a gradient towards a lower Q passes as if Q were -z, and increases z; a gradient towards
    Q > 0 does not.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return -F.relu(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (z,), (grad_q,) = ctx.saved_tensors, gradients
        return torch.where((z > 0) | (grad_q > 0), -grad_q, 0)


class CriticNeg(Critic):
    """A critic of rewards that are never positive: Q = -ReLU(z) <= 0.

    With the ReLU's own gradient a critic whose pre-activations are all negative would stay at Q = 0: collapsed. Here
    targets below 0 lead it back. The last bias starts at 1; `zero_fraction` measures how much is 0.
    """

    def __init__(self, categorical_field_dims: Sequence[int], numerical_num: int, embed_dim: int,
                 bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], dropout: float = 0.2) -> None:
        super().__init__(categorical_field_dims, numerical_num, embed_dim, bottom_mlp_dims, tower_mlp_dims, dropout)
        assert self.tower.output is not None
        nn.init.ones_(self.tower.output.bias)

    def reset_head(self) -> None:
        """Draw the layers above the embeddings anew, the last bias on the positive side of the ReLU."""
        assert self.tower.output is not None
        for layer in (self.first, *self.bottom.hidden, *self.tower.hidden, self.tower.output):
            assert isinstance(layer, nn.Linear)
            layer.reset_parameters()
        nn.init.ones_(self.tower.output.bias)

    def q(self, pre_activation: Tensor) -> Tensor:
        """Q = -ReLU(z) <= 0, (B,)."""
        return NegReLU.apply(pre_activation)


def zero_fraction(q: Tensor) -> float:
    """The fraction of a batch of Q (B,) that is exactly 0; 1: a collapsed critic."""
    return float((q == 0).float().mean())

"""MetaHeac: meta hybrid experts and critics (Zhu et al., KDD 2021), with its meta-training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from layers.base import Batch, Criterion, MultiTaskModel, Weights, task_losses
from layers.layers import FeatureEmbedding

CRITIC_NUM = 5  # K, as the paper's code
INNER_LR = 2e-4  # of the one gradient step on the support set


class MetaHeac(MultiTaskModel):
    """p_t = sum_k g_tk sigmoid(critic_k(sum_e h_te expert_e(x))).

    Both gates, h_t over experts and g_t over critics, are softmaxes of one linear layer each on [v_t, mean_f e_f(x)]: a
    task's embedding joined with the mean of the field embeddings (the paper's equations (4) to (7)). The critics'
    predictions are summed under a gate that sums to 1, where the published code takes their mean, which caps every
    prediction at 1 / K.

    Arguments as `layers.ESMM`, and expert_num: E. Layers are torch's own, so that `torch.func` can differentiate twice.
    """

    encodable = False  # the inner step is differentiated twice, which the encoders are not
    data_parallel = False  # the inner step takes half of the whole batch

    def __init__(self, categorical_field_dims: Sequence[int], numerical_num: int, embed_dim: int,
                 bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], task_num: int, expert_num: int,
                 dropout: float) -> None:
        super().__init__()
        self.input = FeatureEmbedding(categorical_field_dims, numerical_num, embed_dim)
        self.tasks = nn.Embedding(task_num, embed_dim)
        self.experts = nn.ModuleList(_perceptron([self.input.output_dim, *bottom_mlp_dims], dropout)
                                     for _ in range(expert_num))
        self.critics = nn.ModuleList(
            _perceptron([bottom_mlp_dims[-1], *tower_mlp_dims], dropout).append(nn.Linear(tower_mlp_dims[-1], 1))
            for _ in range(CRITIC_NUM))
        self.expert_gate = nn.Linear(2 * embed_dim, expert_num)
        self.critic_gate = nn.Linear(2 * embed_dim, CRITIC_NUM)

    def batch_forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        x = self.input(categorical_x, numerical_x).materialize()  # (B, (F + 1) D)
        mean = x.unflatten(1, (-1, self.tasks.embedding_dim)).mean(dim=1)  # (B, D)
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)  # (B, E, H)
        predictions = []
        for task in self.tasks.weight:  # (D,)
            gate_input = torch.cat([task.expand_as(mean), mean], dim=1)  # (B, 2 D)
            h = torch.einsum("be,beh->bh", F.softmax(self.expert_gate(gate_input), dim=1), experts)
            scores = torch.cat([critic(h) for critic in self.critics], dim=1)  # (B, K)
            predictions.append((F.softmax(self.critic_gate(gate_input), dim=1) * torch.sigmoid(scores)).sum(dim=1))
        return torch.stack(predictions, dim=1)

    def losses(self, batch: Batch, criterion: Criterion, weights: Weights | None = None) -> Tensor:
        """The tasks' mean losses (T,) on the second half of the batch, after an inner step on the first half (of an odd
        number of rows the middle one is in both): the paper's equation (9)."""
        categorical_x, numerical_x, labels = batch
        half, of_batch = -(-len(labels) // 2), None if weights is None else weights()

        def part_losses(predictions: Tensor, rows: slice) -> Tensor:
            return task_losses(predictions, labels[rows], criterion,
                               None if of_batch is None else lambda: of_batch[rows])

        predictions = self.forward_adapted((categorical_x[:half], numerical_x[:half]),
                                           lambda support: part_losses(support, slice(half)).mean(),
                                           (categorical_x[-half:], numerical_x[-half:]))
        return part_losses(predictions, slice(-half, None))

    def forward_adapted(self, support: tuple[Tensor, Tensor], support_loss: Callable[[Tensor], Tensor],
                        query: tuple[Tensor, Tensor]) -> Tensor:
        """Predict the query rows (ids, numbers) with theta' = theta - INNER_LR grad_theta L_support(theta).

        support_loss: predictions of the support rows (B, T) to their mean loss. A loss on the predictions returned here
        trains theta itself, through the inner step.
        """
        parameters = dict(self.named_parameters())
        inner = grad(lambda theta: support_loss(functional_call(self, theta, support)))(parameters)
        adapted_params = {name: value - INNER_LR * inner[name] for name, value in parameters.items()}
        return functional_call(self, adapted_params, query)


def _perceptron(dims: Sequence[int], dropout: float) -> nn.Sequential:
    return nn.Sequential(*(layer for i, o in pairwise(dims)
                           for layer in (nn.Linear(i, o), nn.ReLU(), nn.Dropout(dropout))))

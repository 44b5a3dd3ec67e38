"""AITM: adaptive information transfer (Xi et al., KDD 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layers.base import Batch, Criterion, MultiTaskModel, Weights, check_given, task_losses
from layers.layers import FeatureEmbedding, MultiLayerPerceptron


class AITM(MultiTaskModel):
    """Each task's tower receives the representation of the task that it is given, weighted by attention.

    q_t = bottom_t(x), z_t = q_t of a task that is given none, and with p = transfer_t(z_given(t)) else: z_t = sum_u w_u
    V(u) over u in {p, q_t}, w = softmax(<K(u), Q(u)> / sqrt(H)): the paper's equations (6) to (8). Arguments as
    `layers.ESMM`, but by default each task is given the one before it, and calibrator_weight: weight of the
    behavioural-expectation calibrator in the loss (the paper's alpha; 0: without it).
    """

    def __init__(self, categorical_field_dims: Sequence[int], numerical_num: int, embed_dim: int,
                 bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], task_num: int, dropout: float,
                 calibrator_weight: float = 0.0, given: Sequence[int] | None = None) -> None:
        super().__init__()
        self.given = check_given(range(-1, task_num - 1) if given is None else given, task_num)
        self.given_tasks = [task for task, given_task in enumerate(self.given) if given_task >= 0]
        hidden = bottom_mlp_dims[-1]
        self.calibrator_weight = calibrator_weight
        self.input = FeatureEmbedding(categorical_field_dims, numerical_num, embed_dim)
        self.bottoms = nn.ModuleList(
            MultiLayerPerceptron(self.input.output_dim, bottom_mlp_dims, dropout, output_layer=False)
            for _ in range(task_num))
        self.transfers = nn.ModuleList(MultiLayerPerceptron(hidden, [hidden], dropout, output_layer=False)
                                       for _ in self.given_tasks)
        self.queries, self.keys, self.values = (
            nn.ModuleList(nn.Linear(hidden, hidden) for _ in self.given_tasks) for _ in range(3))
        self.towers = nn.ModuleList(MultiLayerPerceptron(hidden, tower_mlp_dims, dropout) for _ in range(task_num))

    def batch_forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        x = self.input(categorical_x, numerical_x)
        states = [bottom(x) for bottom in self.bottoms]  # (B, H) each
        for task, transfer, query, key, value in zip(self.given_tasks, self.transfers, self.queries, self.keys,
                                                     self.values, strict=True):
            pair = torch.stack([transfer(states[self.given[task]]), states[task]], dim=1)  # (B, 2, H)
            score = (query(pair) * key(pair)).sum(dim=2, keepdim=True) / pair.shape[2] ** 0.5
            states[task] = (torch.softmax(score, dim=1) * value(pair)).sum(dim=1)
        scores = [tower(state) for tower, state in zip(self.towers, states, strict=True)]
        return torch.sigmoid(torch.cat(scores, dim=1))

    def losses(self, batch: Batch, criterion: Criterion, weights: Weights | None = None) -> Tensor:
        """As the parent, plus the calibration loss."""
        categorical_x, numerical_x, labels = batch
        predictions = self(categorical_x, numerical_x)
        return task_losses(predictions, labels, criterion, weights) + self.calibration_loss(predictions)

    def calibration_loss(self, predictions: Tensor) -> Tensor:
        """The calibrator, equation (10): alpha mean_i sum_t max(p_t - p_given(t), 0), predictions (B, T) -> ().

        A later step of the same path cannot be likelier than the step before it.
        """
        before = [self.given[task] for task in self.given_tasks]
        excess = predictions[:, self.given_tasks] - predictions[:, before]
        return self.calibrator_weight * excess.clamp(min=0).sum(dim=1).mean()

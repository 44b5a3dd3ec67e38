"""PLE: progressive layered extraction (Tang et al., RecSys 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from layers.base import MultiTaskModel
from layers.layers import Experts, FeatureEmbedding, Gate, LayerInput, MultiLayerPerceptron, gated_sums


class Extraction(nn.Module):
    """One level: each task mixes its own experts and the shared ones; the shared path mixes all of them.

    With x_t the task's input and x_s the shared one, S_t its experts' outputs stacked on those of the shared experts:
    task: h_t = softmax(W_t x_t) S_t(x_t, x_s); shared: h_s = softmax(W_s x_s) S(x_1, ..., x_T, x_s), the paper's
    equations (4) to (6). Each expert is evaluated once, on the input of its own path. The last level has no use for a
    shared output, hence no shared gate.
    """

    def __init__(self, input_dim: int, output_dim: int, task_num: int, specific_num: int, shared_num: int,
                 dropout: float, last: bool) -> None:
        super().__init__()
        self.specific = nn.ModuleList(Experts(specific_num, input_dim, [output_dim], dropout) for _ in range(task_num))
        self.shared = Experts(shared_num, input_dim, [output_dim], dropout)
        self.task_gates = nn.ModuleList(Gate(input_dim, specific_num + shared_num) for _ in range(task_num))
        self.shared_gate = None if last else Gate(input_dim, task_num * specific_num + shared_num)

    def forward(self, tasks: Sequence[LayerInput], shared: LayerInput) -> tuple[list[Tensor], Tensor | None]:
        """Take T inputs and the shared one, each (B, input_dim); return as many outputs (B, output_dim)."""
        task_banks = [experts(x) for experts, x in zip(self.specific, tasks, strict=True)]  # (B, E, H) each
        shared_bank = self.shared(shared)  # (B, E', H)
        sizes = [bank.shape[1] for bank in task_banks]
        gates = [gate(x).split([size, shared_bank.shape[1]], dim=1)
                 for gate, x, size in zip(self.task_gates, tasks, sizes, strict=True)]
        shared_gates = ([] if self.shared_gate is None else
                        self.shared_gate(shared).split([*sizes, shared_bank.shape[1]], dim=1))
        # Every bank is read once, for all gates over it.
        task_sums = [gated_sums([gate, *shared_gates[t:t + 1]], bank)
                     for t, ((gate, _), bank) in enumerate(zip(gates, task_banks, strict=True))]
        shared_sums = gated_sums([*(gate for _, gate in gates), *shared_gates[-1:]], shared_bank)
        outputs = [own[0] + from_shared for own, from_shared in zip(task_sums, shared_sums, strict=False)]
        if not shared_gates:
            return outputs, None
        return outputs, sum((own[1] for own in task_sums), shared_sums[-1])


class PLE(MultiTaskModel):
    """A level of `Extraction` for each width of `bottom_mlp_dims`, then a tower for each task.

    Arguments as `layers.ESMM`, and expert_num: half of them shared, half of them each task's own, at every level.
    """

    def __init__(self, categorical_field_dims: Sequence[int], numerical_num: int, embed_dim: int,
                 bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], task_num: int, expert_num: int,
                 dropout: float) -> None:
        super().__init__()
        if expert_num < 2:
            raise ValueError("PLE needs expert_num of 2 or more: half of them shared, half of them each task's own")
        self.input = FeatureEmbedding(categorical_field_dims, numerical_num, embed_dim)
        dims = [self.input.output_dim, *bottom_mlp_dims]
        specific_num, shared_num = expert_num // 2, expert_num - expert_num // 2
        self.levels = nn.ModuleList(
            Extraction(i, o, task_num, specific_num, shared_num, dropout, last=level == len(bottom_mlp_dims) - 1)
            for level, (i, o) in enumerate(pairwise(dims)))
        self.towers = nn.ModuleList(MultiLayerPerceptron(bottom_mlp_dims[-1], tower_mlp_dims, dropout)
                                    for _ in range(task_num))

    def batch_forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        shared: LayerInput = self.input(categorical_x, numerical_x)
        tasks: list[LayerInput] = [shared] * len(self.towers)
        for level in self.levels:
            tasks, shared = level(tasks, shared)
        scores = [tower(h) for tower, h in zip(self.towers, tasks, strict=True)]
        return torch.sigmoid(torch.cat(scores, dim=1))

"""Estimates of the memory of a run, before it starts: `common.fileio.require_free_memory` refuses what does not fit.

The constants were measured, as the most memory of a process that trains: the estimates are 0.95 to 1.4 times what
models took, over batches of 2,048 to 65,536 rows, embeddings of 64 and 128 and tables of 5,000 to 400,000 rows, and
1.0 to 1.4 times what agents took, with full replay buffers of 20,000 to 110,000 transitions
(`tests/unit/train/test_memory_estimate.py`, in `make stress`). The data are not included:
`dataset.rtrl.load_splits` estimates them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from common.fileio import require_free_memory

START_BYTES = 80 * 2**20  # bytes that torch itself takes with its first step
PARAMETER_BYTES = 26  # weight, gradient, two moments of Adam, the best epoch's copy and its successor, 2 to spare
COPY_BYTES, TRAINED_BYTES = 4, 16  # of an agent's networks: a weight; and with a gradient and two moments
UNIT_BYTES = 4 * 4  # of a row and hidden unit: before and after the ReLU, and the gradients of both
UNIT_BYTES_SECOND_ORDER = 4 * 7  # of metaheac, which differentiates its inner step, too
UNIT_BYTES_INFERENCE = 4 * 2  # without gradients
CONCATENATED_BYTES = 4 * 3  # of a row and input of a first layer, where the embeddings are written side by side
PRODUCT_BYTES = 4 * 2  # of an entry of the tables' product with a first layer's weights: itself and its gradient
INFERENCE_BATCH = 16_384  # states, in `train.offline_rl.rollout`
TRANSITION_COPIES = 2  # the saved buffer and the one that it is copied to
ROLLOUT_BYTES = 64 * 260  # of a validation row: its 64 rollouts in `dataset.simulate.expected_return`


class NetworkSize(NamedTuple):
    """The sizes that the memory of a network depends on."""

    parameters: int
    activations_per_row: int  # outputs of all layers, for one row
    first: int  # outputs of the widest first layer
    fields: int  # F
    embed_dim: int  # D
    table: int  # rows of the embeddings, all fields

    def step(self, batch: int, unit: int = UNIT_BYTES) -> int:
        """Bytes of the activations of a training step; `LazyConcat.linear` takes the cheaper of its two ways."""
        first = (batch * (self.fields + 1) * self.embed_dim * CONCATENATED_BYTES if self.table > batch * self.fields
                 else self.table * self.first * PRODUCT_BYTES)
        return batch * self.activations_per_row * unit + first


def network_size(build: Callable[[], nn.Module], field_dims: Sequence[int], embed_dim: int) -> NetworkSize:
    """The sizes of a network, without allocating it: on torch's device `meta`."""
    with torch.device("meta"):
        network = build()
    fields, table = len(field_dims), sum(field_dims)
    layers = [p.shape for p in network.parameters() if p.ndim > 1 and tuple(p.shape) != (table, embed_dim)]
    return NetworkSize(sum(p.numel() for p in network.parameters()),
                       sum(shape.numel() // shape[-1] for shape in layers),
                       max((shape[0] for shape in layers if shape[-1] == (fields + 1) * embed_dim), default=0),
                       fields, embed_dim, table)


def check_training(model: NetworkSize, name: str, batch: int, device: torch.device) -> None:
    """Raise UserError, with the figures, where supervised training of a model would not fit."""
    unit = UNIT_BYTES_SECOND_ORDER if name == "metaheac" else UNIT_BYTES
    require_free_memory(START_BYTES + model.parameters * PARAMETER_BYTES + model.step(batch, unit),
                        f"{name} of {model.parameters:,} parameters, {batch:,} rows a step", _free_gpu_memory(device))


def check_agent(actor: NetworkSize, critic: NetworkSize, task_num: int, batch: int, memory_size: int,
                transition_bytes: int, val_rows: int, device: torch.device) -> None:
    """Raise UserError, with the figures, where an agent and its replay buffer would not fit.

    Args:
        actor: there are three of it, of which one is trained.
        critic: there are two of it a task, of which one is trained.
        memory_size, transition_bytes: of the replay buffer, which stays on the host.
        val_rows: rows whose true return is found by simulation; 0 where the truth is unknown.
    """
    replay_buffer = memory_size * transition_bytes * TRANSITION_COPIES
    networks = (START_BYTES + actor.parameters * (2 * COPY_BYTES + TRAINED_BYTES)
                + critic.parameters * task_num * (COPY_BYTES + TRAINED_BYTES)
                + max(actor.step(batch) + critic.step(batch),
                      INFERENCE_BATCH * actor.activations_per_row * UNIT_BYTES_INFERENCE))
    on_host = networks if device.type == "cpu" else 0
    require_free_memory(replay_buffer + max(on_host, val_rows * ROLLOUT_BYTES),
                        f"a replay buffer of {memory_size:,} transitions of {transition_bytes} bytes, and the agent")
    require_free_memory(networks, "the agent's networks", _free_gpu_memory(device))


def _free_gpu_memory(device: torch.device) -> float | None:
    """Bytes free on a GPU; None, which leaves it to the system, elsewhere."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None

"""Embedding tables that several processes share, `--shard_embeddings`: each holds some of the rows, as DTensor."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from common import distributed
from common.errors import UserError
from layers.layers import EmbeddingLayer


class ShardedEmbedding(nn.Embedding):
    """The lookup of `RowwiseParallel`: it gives the ids of all processes, and adds up and hands out what each one finds
    in its rows of the table. DTensor's own lookup has the same result, but a gradient of the whole table in every
    process."""

    def forward(self, input: Tensor) -> Tensor:
        """The ids of all processes, a DTensor, to embeddings that are still to be added up, a DTensor."""
        table = cast(DTensor, self.weight)
        own = table.to_local()  # (V / processes, D)
        ids = cast(DTensor, input).to_local() - distributed.rank() * -(-len(table) // distributed.world_size())
        inside = (ids >= 0) & (ids < len(own))
        found = F.embedding(ids.where(inside, 0), own) * inside.unsqueeze(-1)
        return DTensor.from_local(found, table.device_mesh, [Partial()], run_check=False)


def shard_embeddings(model: nn.Module) -> None:
    """Leave this process its rows of every table of a model's fields. Raises UserError for a table that is too small.

    All processes look up at the same time, as often as each other.
    """
    for layer in model.modules():
        if not isinstance(layer, EmbeddingLayer):
            continue
        weight, processes = layer.embedding.weight, distributed.world_size()
        if len(weight) < processes**2:  # a process might have no row at all
            raise UserError(f"--shard_embeddings: {processes} processes do not share a table of {len(weight)} rows: "
                            "leave the switch out")
        embedding = ShardedEmbedding(len(weight), weight.shape[1], _weight=weight.detach())
        mesh = init_device_mesh(weight.device.type, (processes,))
        parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)))
        layer.embedding, layer.sharded = embedding, True


def parameter_groups(model: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """A model's parameters for an optimizer, the sharded ones apart: it does not update both kinds in one pass."""
    groups: list[list[nn.Parameter]] = [[], []]
    for parameter in model.parameters():
        groups[distributed.is_sharded(parameter)].append(parameter)
    return [{"params": group} for group in groups]

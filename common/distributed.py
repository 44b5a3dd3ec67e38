"""Data-parallel training: several processes on the same batches, as `torchrun --nproc_per_node=2 SLmain.py ...` starts.

Each process reads and computes its own rows of a batch, and torch's `DistributedDataParallel` sums the gradients, so
that the step is the one that a single process would make: sum_r (n_r / n) grad mean_r = grad mean. The main process
writes and prints; the others wait for it. In a single process everything here is the identity.

torch is imported where it is needed: programs without it start faster.
"""

from __future__ import annotations

import datetime
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Network = TypeVar("Network", bound="nn.Module")


class _NonTTY(io.TextIOWrapper):
    def isatty(self) -> bool:
        return False


def _group() -> Any:
    """`torch.distributed`, once this process is connected to others; else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def world_size() -> int:
    """How many processes are connected; 1 before `init_distributed`."""
    dist = _group()
    return dist.get_world_size() if dist else 1


def rank() -> int:
    """The number of this process, from 0."""
    dist = _group()
    return dist.get_rank() if dist else 0


def is_main_process() -> bool:
    """Whether this process writes and prints; before `init_distributed` every process does."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes have come here."""
    if dist := _group():
        dist.barrier()


def init_distributed(device: torch.device) -> torch.device:
    """Connect to the other processes, if there are any; return this one's device, a GPU each where they are GPUs."""
    several = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() and int(os.environ["WORLD_SIZE"]) > 1
    if not several or _group():  # torchrun sets all three
        return device
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
    if rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it may wait inside C, and writes nothing
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 -- to the end of the process
        sys.stderr = _NonTTY(sys.stderr.buffer, line_buffering=True)
    return device


def data_parallel(module: Network) -> Network:
    """A module whose backward pass sums the gradients of all processes; those of sharded parameters are sums already.
    """
    if world_size() == 1:
        return module
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    sharded = [name for name, parameter in module.named_parameters() if is_sharded(parameter)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sharded)
    parallel = DistributedDataParallel(module, forward_sync_buffers=False, static_graph=True)
    parallel.register_comm_hook(None, lambda _, bucket: (  # the sum; torch's default is the mean
        dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])))
    return cast(Network, parallel)


def is_sharded(value: object) -> bool:
    """Whether this is a DTensor, of which each process has its rows."""
    return hasattr(value, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor as a whole; of a sharded one all processes have to gather it."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's rows of a sharded tensor; any other as it is."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def rows_of(rank: int, world_size: int, rows: int) -> slice:
    """The rows of one of several processes, of a batch of so many; of fewer rows than processes all, for everyone."""
    if rows < world_size:
        return slice(0, rows)
    return slice(rank * rows // world_size, (rank + 1) * rows // world_size)


def shard(batch: Sequence[Tensor]) -> list[Tensor]:
    """This process's rows of a batch, every tensor (B, ...)."""
    own = rows_of(rank(), world_size(), len(batch[0]))
    return [tensor[own] for tensor in batch]


def equal_part(x: Tensor) -> Tensor:
    """This process's rows of x, as many as every other process has: the last of them may have the last row again."""
    import torch

    count = -(-len(x) // world_size())
    return x[(torch.arange(count, device=x.device) + rank() * count).clamp(max=len(x) - 1)]


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over the processes."""
    if dist := _group():
        x = x.clone()
        dist.all_reduce(x)
    return x


def batch_mean(x: Tensor, rows: int) -> tuple[Tensor, Tensor | float, Tensor | int]:
    """Of means x (T,) or () over this process's rows of a batch: those over the whole batch, detached; which fraction
    of the batch its rows are; and how many rows the batch has."""
    x = x.detach()
    if world_size() == 1:
        return x, 1.0, rows
    import torch

    sums = all_reduce_sum(torch.cat([x.flatten() * rows, x.new_tensor([rows])]))
    return (sums[:-1] / sums[-1]).view_as(x), rows / sums[-1], sums[-1]


def from_main(x: Tensor) -> Tensor:
    """The main process's x, of the same shape here: random numbers that all processes have to agree on."""
    if dist := _group():
        dist.broadcast(x, 0)
    return x


def _row_counts(x: Tensor) -> list[int]:
    """How many rows x has, process by process."""
    import torch
    import torch.distributed as dist

    counts = [torch.zeros((), dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor(len(x), device=x.device))
    return [int(count) for count in counts]


def _pad(x: Tensor, rows: int) -> Tensor:
    import torch

    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def pad_to_longest(x: Tensor) -> Tensor:
    """x (n_r, ...) with rows of zeros at the end, up to as many rows as in the process that has the most."""
    return _pad(x, max(_row_counts(x)))


def all_gather_rows(x: Tensor) -> Tensor:
    """The rows of all processes, (n_r, ...) each, one process after the other."""
    if world_size() == 1:
        return x
    import torch
    import torch.distributed as dist

    counts = _row_counts(x)
    padded = _pad(x, max(counts))
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])

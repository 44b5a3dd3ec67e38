"""Data-parallel training: several processes on the same batches, as `torchrun --nproc_per_node=2 SLmain.py ...` starts.

All processes draw the same batch; each computes its shard of the rows and the gradients are summed, so that the step is
the one that a single process would make: sum_r (n_r / n) grad mean_r = grad mean. Random numbers are those of the whole
batch, too. The main process writes and prints; the others wait for it.

In a single process everything here is the identity. torch is imported where it is needed: programs without it start
faster.
"""

from __future__ import annotations

import datetime
import io
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_rank, _world_size = 0, 1
if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():  # as torchrun sets them, all three
    _rank, _world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
_initialized = False
_first_row = 0


class _NonTTY(io.TextIOWrapper):
    def isatty(self) -> bool:
        return False


def world_size() -> int:
    """How many processes there are."""
    return _world_size


def is_main_process() -> bool:
    """Whether this process writes and prints; before `init_distributed` every process does."""
    return not _initialized or _rank == 0


def barrier() -> None:
    """Wait until all processes have come here."""
    if _initialized:
        import torch.distributed as dist

        dist.barrier()


def init_distributed(device: torch.device) -> torch.device:
    """Connect to the other processes, if there are any; return this one's device, a GPU each where they are GPUs."""
    global _initialized
    if _world_size == 1 or _initialized:
        return device
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
    _initialized = True
    if _rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it may wait inside C, and writes nothing
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 -- to the end of the process
        sys.stderr = _NonTTY(sys.stderr.buffer, line_buffering=True)
    return device


def shard(batch: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """This process's rows of a batch, every tensor (B, ...), and which fraction of the batch they are.

    A batch with fewer rows than there are processes is computed by all of them, for an equal fraction each.
    """
    global _first_row
    rows = len(batch[0])
    if rows < _world_size:
        _first_row = 0
        return list(batch), 1.0 / _world_size
    begin, end = _rank * rows // _world_size, (_rank + 1) * rows // _world_size
    _first_row = begin
    return [tensor[begin:end] for tensor in batch], (end - begin) / rows


def first_row() -> int:
    """The row of the whole batch at which this process's latest shard begins: dropout draws from there on."""
    return _first_row


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over the processes."""
    if _world_size > 1:
        import torch.distributed as dist

        x = x.clone()
        dist.all_reduce(x)
    return x


def all_reduce_gradients(module: nn.Module) -> None:
    """Sum the gradients of all processes, in one message."""
    if _world_size == 1:
        return
    import torch
    import torch.distributed as dist

    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def all_gather_rows(chunks: Iterable[Tensor]) -> Tensor:
    """The rows of all processes, (n_r, ...) each, one process after the other."""
    import torch

    own = torch.cat(list(chunks))
    if _world_size == 1:
        return own
    import torch.distributed as dist

    counts = [torch.zeros((), dtype=torch.int64, device=own.device) for _ in range(_world_size)]
    dist.all_gather(counts, torch.tensor(len(own), device=own.device))
    max_rows = int(max(counts))
    padded = torch.cat([own, own.new_zeros(max_rows - len(own), *own.shape[1:])])
    gathered = [torch.empty_like(padded) for _ in range(_world_size)]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:int(count)] for rows, count in zip(gathered, counts, strict=True)])

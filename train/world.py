"""Several processes on the same batches: data-parallel training, as `torchrun --nproc_per_node=2 SLmain.py ...` asks.

All processes draw the same batch; each takes its share of the rows and the gradients are summed, so that the step is
the one that a single process would make: sum_r (n_r / n) grad mean_r = grad mean. Random numbers are those of the
whole batch, too. One process, the leader, writes and prints; the others wait for it (`dataset.files.company`).

Alone, everything here is the identity.
"""

from __future__ import annotations

import datetime
import io
import os
import signal
import sys
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataset import files
from layers import kernels

RANK, SIZE = 0, 1
if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():  # as torchrun sets them, all three
    RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class _NoTerminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return False


class _Company(files.Company):
    leads = RANK == 0

    def wait(self) -> None:
        dist.barrier()


def join(device: torch.device) -> torch.device:
    """Meet the other processes, if there are any; return this one's device, a GPU each where they are GPUs."""
    if SIZE == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
    files.company = _Company()
    if RANK:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it may wait inside C, and keeps no books
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 -- to the end of the process
        sys.stderr = _NoTerminal(sys.stderr.buffer, line_buffering=True)
    return device


def share(batch: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """This process's rows of a batch, every tensor (B, ...), and which share of the batch they are.

    A batch with fewer rows than there are processes is worked on by all of them, for an equal share each.
    """
    rows = len(batch[0])
    if rows < SIZE:
        kernels.first_row = 0
        return list(batch), 1.0 / SIZE
    begin, end = RANK * rows // SIZE, (RANK + 1) * rows // SIZE
    kernels.first_row = begin
    return [tensor[begin:end] for tensor in batch], (end - begin) / rows


def total(x: Tensor) -> Tensor:
    """The sum of x over the processes."""
    if SIZE > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def sum_gradients(module: nn.Module) -> None:
    """Add up the gradients of all processes, in one message."""
    if SIZE == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([one.flatten() for one in gradients])
    dist.all_reduce(flat)
    for one, summed in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
        one.copy_(summed.view_as(one))


def gather(parts: Iterable[Tensor]) -> Tensor:
    """What all processes have, (n_r, ...) each, one after the other."""
    mine = torch.cat(list(parts))
    if SIZE == 1:
        return mine
    counts = [torch.zeros((), dtype=torch.int64, device=mine.device) for _ in range(SIZE)]
    dist.all_gather(counts, torch.tensor(len(mine), device=mine.device))
    most = int(max(counts))
    padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
    everyone = [torch.empty_like(padded) for _ in range(SIZE)]
    dist.all_gather(everyone, padded)
    return torch.cat([one[:int(count)] for one, count in zip(everyone, counts, strict=True)])

"""Device, precision and seeds."""

from __future__ import annotations

import ctypes
import random
import sys

import numpy as np
import torch

from common import distributed
from common.errors import UserError


def set_seed(seed: int, *more: int, own: bool = False) -> None:
    """Seed python, numpy and torch with a function of the numbers given, such as (seed, epoch).

    own: of several processes each draws numbers of its own, such as dropout masks; the main one those of a single one.
    """
    more += (distributed.rank(),) * (own and not distributed.is_main_process())
    mixed = int(np.random.SeedSequence([seed, *more]).generate_state(1, np.uint64)[0])
    random.seed(mixed)
    np.random.seed(mixed % 2**32)  # noqa: NPY002 -- for code of others that draws from the global one
    torch.manual_seed(mixed % 2**63)


def pick_device(name: str, precision: str = "float32") -> torch.device:
    """Give the device of that name; `auto` is the best there is. Raises UserError where it cannot be used.

    precision: of matrix products from now on (`tf32`, `bf16`: rounded factors, sums in float32).
    """
    torch.set_float32_matmul_precision({"float32": "highest", "tf32": "high", "bf16": "medium"}[precision])
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: '{name}' cannot be used here: {reason} (try --device=cpu)") from error
    if device.type == "cpu":
        _tune_malloc()
    return distributed.init_distributed(device)


def _tune_malloc() -> None:
    """Ask glibc to reuse large freed blocks at once instead of returning them to the system.

    Training frees and allocates the same activations every step; fetching their pages anew each time costs up to half
    of it. Other C libraries have no such switch, and are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_threshold, 2**30)

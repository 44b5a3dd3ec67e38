"""The resident loader: a mapped data set on a device, cut into batches by index."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dataset.rtrl import RetailRocketRLDataset
from dataset.sessions import window_rows

Batch = tuple[Tensor, Tensor, Tensor]  # ids (B, F), numbers (B, N), labels (B, T)


class TensorLoader:
    """A data set on a device, cut into batches by index; iterates over (ids, numbers, labels).

    With a window W, ids (B, W, F) and numbers (B, W, N) are those of the last W rows of the session so far, the row
    itself last; places before the session's start have ids of -1 and numbers of 0. Labels are the row's own.

    Args:
        dataset: a mapped data set, n rows.
        batch_size: B; the last batch holds what is left.
        device: where the tensors live, all of them, from now on.
        seed: None: in order. A number: every pass in an order of its own, a function of (seed, `epoch`) alone.
        window: W; 0: rows by themselves, ids (B, F) and numbers (B, N).
    """

    def __init__(self, dataset: RetailRocketRLDataset, batch_size: int, device: torch.device | str = "cpu",
                 seed: int | None = None, window: int = 0) -> None:
        self.tensors: Batch = (torch.from_numpy(dataset.categorical).to(device),
                               torch.from_numpy(dataset.numerical).to(device),
                               torch.from_numpy(dataset.labels).to(device))
        self.session = dataset.session
        self.batch_size, self.seed, self.epoch, self.window = batch_size, seed, 0, window
        self.row_start = torch.from_numpy(dataset.sessions.row_start).to(device)  # (n,)

    def __len__(self) -> int:
        return -(-len(self.session) // self.batch_size)

    def take(self, rows: Tensor) -> Batch:
        """The batch of the rows (B,)."""
        ids, numbers, labels = self.tensors
        if not self.window:
            return ids[rows], numbers[rows], labels[rows]
        index, padding = window_rows(rows, self.row_start, self.window)  # (B, W)
        padding = padding.unsqueeze(2)
        return ids[index].masked_fill(padding, -1), numbers[index].masked_fill(padding, 0), labels[rows]

    @functools.cached_property
    def unique_rows(self) -> tuple[Tensor, Tensor]:
        """Rows (d,) no two of which have the same features, and for each row (n,) the place of its equal among them.
        Of windows all features have to be the same.

        The prediction of a model in eval mode is the same for equal rows: x = unique_x[inverse].
        """
        ids, numbers, _ = self.tensors
        inverse = np.zeros(len(ids), np.int64)
        for column in (*ids.cpu().numpy().T, *numbers.cpu().numpy().view(np.int32).T):
            codes, values = pd.factorize(column)
            inverse = pd.factorize(inverse * len(values) + codes)[0]
        row_id, start, rows = inverse + 1, self.row_start.cpu().numpy(), np.arange(len(ids))
        for back in range(1, self.window):
            earlier = np.where(rows - back >= start, row_id[np.maximum(rows - back, 0)], 0)  # 0: padding
            inverse = pd.factorize(inverse * (len(ids) + 1) + earlier)[0]
        first = np.unique(inverse, return_index=True)[1]
        return torch.from_numpy(first).to(ids.device), torch.from_numpy(inverse).to(ids.device)

    def __iter__(self) -> Iterator[Batch]:
        ids, numbers, labels = self.tensors
        if self.seed is None and not self.window:
            yield from zip(ids.split(self.batch_size), numbers.split(self.batch_size), labels.split(self.batch_size),
                           strict=True)
            return
        order = (np.arange(len(ids)) if self.seed is None
                 else np.random.default_rng([self.seed, self.epoch]).permutation(len(ids)))
        for index in torch.from_numpy(order).to(ids.device).split(self.batch_size):
            yield self.take(index)

"""Batches: a mapped data set as tensors on a device, cut by index."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.distributed import rows_of
from dataset.rtrl import RetailRocketRLDataset
from dataset.sessions import window_rows

Batch = tuple[Tensor, Tensor, Tensor]  # ids (B, F), numerical (B, N), labels (B, T)


class TensorLoader:
    """Iterates over batches (ids, numerical, labels) of a data set whose tensors are on one device.

    With a window W, ids (B, W, F) and numerical (B, W, N) are those of the last W rows of the session up to and
    including the row; positions before the session's start have ids -1 and numerical features 0. Labels (B, T) are
    the row's own.

    Args:
        dataset: a mapped data set, n rows.
        batch_size: B; the last batch may be smaller.
        device: the device of all tensors.
        seed: None: in order. A number: each pass is shuffled, a function of (seed, `epoch`) only.
        window: W; 0: no window, ids (B, F) and numerical (B, N).
        rank, world_size: give of each batch only the rows of one of several processes (`distributed.rows_of`).
    """

    def __init__(self, dataset: RetailRocketRLDataset, batch_size: int, device: torch.device | str = "cpu",
                 seed: int | None = None, window: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.tensors: Batch = (torch.from_numpy(dataset.categorical).to(device),
                               torch.from_numpy(dataset.numerical).to(device),
                               torch.from_numpy(dataset.labels).to(device))
        self.session, self.user = dataset.session, dataset.user
        self.batch_size, self.seed, self.epoch, self.window = batch_size, seed, 0, window
        self.rank, self.world_size = rank, world_size
        self.row_start = torch.from_numpy(dataset.sessions.row_start).to(device)  # (n,)

    def add_labels(self, columns: NDArray[np.float32]) -> None:
        """Join further columns (n, K), such as targets or weights, to the labels of the batches."""
        ids, numbers, labels = self.tensors
        self.tensors = ids, numbers, torch.cat([labels, torch.from_numpy(columns).to(labels.device)], dim=1)

    def __len__(self) -> int:
        return -(-len(self.session) // self.batch_size)

    def take(self, rows: Tensor) -> Batch:
        """The batch of the rows (B,)."""
        ids, numerical, labels = self.tensors
        if not self.window:
            return ids[rows], numerical[rows], labels[rows]
        index, padding = window_rows(rows, self.row_start, self.window)  # (B, W)
        padding = padding.unsqueeze(2)
        return ids[index].masked_fill(padding, -1), numerical[index].masked_fill(padding, 0), labels[rows]

    @functools.cached_property
    def unique_rows(self) -> tuple[Tensor, Tensor]:
        """One row (d,) of each distinct set of features (of the whole window), and the inverse (n,): the position of
        each row's features among them.

        A model in eval mode predicts the same for equal features: x = unique_x[inverse].
        """
        ids, numerical, _ = self.tensors
        inverse = np.zeros(len(ids), np.int64)
        for column in (*ids.cpu().numpy().T, *numerical.cpu().numpy().view(np.int32).T):
            codes, values = pd.factorize(column)
            inverse = pd.factorize(inverse * len(values) + codes)[0]
        row_id, start, rows = inverse + 1, self.row_start.cpu().numpy(), np.arange(len(ids))
        for offset in range(1, self.window):
            earlier = np.where(rows - offset >= start, row_id[np.maximum(rows - offset, 0)], 0)  # 0: padding
            inverse = pd.factorize(inverse * (len(ids) + 1) + earlier)[0]
        unique = np.unique(inverse, return_index=True)[1]
        return torch.from_numpy(unique).to(ids.device), torch.from_numpy(inverse).to(ids.device)

    def __iter__(self) -> Iterator[Batch]:
        if self.seed is None and not self.window and self.world_size == 1:
            yield from zip(*(tensor.split(self.batch_size) for tensor in self.tensors), strict=True)
            return
        rows = len(self.session)
        order = (np.arange(rows) if self.seed is None
                 else np.random.default_rng([self.seed, self.epoch]).permutation(rows))
        for index in torch.from_numpy(order).to(self.row_start.device).split(self.batch_size):
            yield self.take(index[rows_of(self.rank, self.world_size, len(index))])

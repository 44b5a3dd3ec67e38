"""Batches: a mapped data set, in tensors on a device or in memory-mapped files, cut by index."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.distributed import rows_of
from dataset.arrays import MappedIds, prefetch
from dataset.rtrl import RetailRocketRLDataset
from dataset.sessions import window_rows

Batch = tuple[Tensor, Tensor, Tensor]  # ids (B, F), numerical (B, N), labels (B, T)

PERMUTED_ROWS = 2**22  # of a larger data set rows are shuffled part by part, and equal rows are not looked for
BLOCK_ROWS = 2**13  # neighbours, which are read together
BLOCKS_AT_ONCE = 2**7  # of which the rows are shuffled


class TensorLoader:
    """Iterates over batches (ids, numerical, labels) of a data set, on one device.

    The tensors of all rows are on the device; those of memory-mapped arrays are read batch by batch. The batches are
    the same.

    With a window W, ids (B, W, F) and numerical (B, W, N) are those of the last W rows of the session up to and
    including the row; positions before the session's start have ids -1 and numerical features 0. Labels (B, T) are
    the row's own.

    Args:
        dataset: a mapped data set, n rows.
        batch_size: B; the last batch may be smaller.
        device: the device of all tensors.
        seed: None: in order. A number: each pass is shuffled, a function of (seed, `epoch`) only. Of more than
            `PERMUTED_ROWS` rows the blocks of neighbours are shuffled, and then the rows of `BLOCKS_AT_ONCE` of them.
        window: W; 0: no window, ids (B, F) and numerical (B, N).
        rank, world_size: give of each batch only the rows of one of several processes (`distributed.rows_of`).
    """

    def __init__(self, dataset: RetailRocketRLDataset, batch_size: int, device: torch.device | str = "cpu",
                 seed: int | None = None, window: int = 0, rank: int = 0, world_size: int = 1) -> None:
        ids, self.device = dataset.categorical, torch.device(device)
        is_mapped = isinstance(ids, MappedIds)
        where = torch.device("cpu") if is_mapped else self.device  # of mapped arrays, tensors are views of the files
        self.files = (ids.codes, dataset.numerical, dataset.labels) if isinstance(ids, MappedIds) else ()
        self.ids = ids if isinstance(ids, MappedIds) else torch.from_numpy(ids).to(where)
        self.numerical, self.labels = (torch.from_numpy(array).to(where) for array in (dataset.numerical,
                                                                                       dataset.labels))
        self.row_start = torch.from_numpy(dataset.sessions.row_start).to(where)  # (n,)
        self.session, self.user = dataset.session, dataset.user
        self.batch_size, self.seed, self.epoch, self.window = batch_size, seed, 0, window
        self.rank, self.world_size = rank, world_size

    @property
    def tensors(self) -> Batch:
        """All rows at once, without windows: ids (n, F), numerical (n, N), labels (n, T)."""
        ids = torch.from_numpy(self.ids[:]) if isinstance(self.ids, MappedIds) else self.ids
        return ids.to(self.device), self.numerical.to(self.device), self.labels.to(self.device)

    def add_labels(self, columns: NDArray[np.float32]) -> None:
        """Join further columns (n, K), such as targets or weights, to the labels of the batches."""
        self.labels = torch.cat([self.labels, torch.from_numpy(columns).to(self.labels.device)], dim=1)

    def __len__(self) -> int:
        return -(-len(self.session) // self.batch_size)

    def take(self, rows: Tensor) -> Batch:
        """The batch of the rows (B,)."""
        rows = rows.to(self.row_start.device)
        index, padding = window_rows(rows, self.row_start, self.window) if self.window else (rows, None)
        ids = (torch.from_numpy(self.ids[index.numpy()]) if isinstance(self.ids, MappedIds) else
               self.ids[index])
        numerical, labels = self.numerical[index], self.labels[rows]
        if padding is not None:
            padding = padding.unsqueeze(2)
            ids, numerical = ids.masked_fill(padding, -1), numerical.masked_fill(padding, 0)
        return ids.to(self.device), numerical.to(self.device), labels.to(self.device)

    @property
    def is_large(self) -> bool:
        """Whether there are more rows than are shuffled at once, or compared."""
        return len(self.session) > PERMUTED_ROWS

    @functools.cached_property
    def unique_rows(self) -> tuple[Tensor, Tensor]:
        """One row (d,) of each distinct set of features (of the whole window), and the inverse (n,): the position of
        each row's features among them.

        A model in eval mode predicts the same for equal features: x = unique_x[inverse].
        """
        ids, numerical, _ = (tensor.cpu().numpy() for tensor in self.tensors)
        inverse = np.zeros(len(ids), np.int64)
        for column in (*ids.T, *numerical.view(np.int32).T):
            codes, values = pd.factorize(column)
            inverse = pd.factorize(inverse * len(values) + codes)[0]
        row_id, start, rows = inverse + 1, self.row_start.cpu().numpy(), np.arange(len(ids))
        for offset in range(1, self.window):
            earlier = np.where(rows - offset >= start, row_id[np.maximum(rows - offset, 0)], 0)  # 0: padding
            inverse = pd.factorize(inverse * (len(ids) + 1) + earlier)[0]
        unique = np.unique(inverse, return_index=True)[1]
        device = self.row_start.device
        return torch.from_numpy(unique).to(device), torch.from_numpy(inverse).to(device)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self.batch_rows():
            yield self.take(rows)

    def batch_rows(self) -> Iterator[Tensor]:
        """The rows of each batch of a pass, those of this process."""
        rest = np.zeros(0, np.int64)
        for rows in self._order():
            rest = np.concatenate([rest, rows]) if len(rest) else rows
            full = len(rest) // self.batch_size * self.batch_size
            for batch in torch.from_numpy(rest[:full]).to(self.row_start.device).split(self.batch_size):
                if len(batch):
                    yield self._own(batch)
            rest = rest[full:]
        if len(rest):
            yield self._own(torch.from_numpy(rest))

    def _own(self, rows: Tensor) -> Tensor:
        """This process's rows of a batch."""
        return rows[rows_of(self.rank, self.world_size, len(rows))]

    def _order(self) -> Iterator[NDArray[np.int64]]:
        """All rows in the order of this pass, in parts."""
        rows = len(self.session)
        if self.seed is None:
            for start in range(0, rows, BLOCK_ROWS * BLOCKS_AT_ONCE):
                yield np.arange(start, min(start + BLOCK_ROWS * BLOCKS_AT_ONCE, rows))
            return
        rng = np.random.default_rng([self.seed, self.epoch])
        if not self.is_large:
            yield rng.permutation(rows)
            return
        starts = rng.permutation(np.arange(0, rows, BLOCK_ROWS))
        for number in range(0, len(starts), BLOCKS_AT_ONCE):
            for start in starts[number:number + 2 * BLOCKS_AT_ONCE]:  # these and the next ones
                for array in self.files:
                    prefetch(array, start, min(start + BLOCK_ROWS, rows))
            blocks = [np.arange(start, min(start + BLOCK_ROWS, rows))
                      for start in starts[number:number + BLOCKS_AT_ONCE]]
            yield rng.permutation(np.concatenate(blocks))

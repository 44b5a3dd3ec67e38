"""Batches: in order or shuffled, with and without windows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_features import ITEMS, LABELS

from dataset import loader
from dataset.loader import TensorLoader
from dataset.rtrl import RetailRocketRLDataset


def numbered(rows: int) -> RetailRocketRLDataset:
    """A data set whose ids, numerical features and labels all contain the row number."""
    table = pd.DataFrame({"timestamp": range(rows), "sessionid": 1, "itemid": 0, "click": 0, "pay": 0})
    data_set = RetailRocketRLDataset(table, ITEMS, ["785"], LABELS)
    number = np.arange(rows)
    data_set.set_ids(np.column_stack([number, number]), [rows, rows])
    data_set.numerical = np.column_stack([number, -number]).astype(np.float32)
    data_set.labels = np.column_stack([number, 2 * number]).astype(np.float32)
    return data_set


def order_of(batches: TensorLoader) -> list[int]:
    return torch.cat([ids[:, 0] for ids, _, _ in batches]).tolist()


def test_batches_in_order() -> None:
    batches = TensorLoader(numbered(23), 5)
    assert [len(ids) for ids, _, _ in batches] == [5, 5, 5, 5, 3]
    assert len(batches) == 5
    assert order_of(batches) == list(range(23))


@pytest.mark.parametrize(("rows", "size", "count"), [(20, 5, 4), (21, 5, 5), (3, 5, 1), (1, 1, 1)])
def test_len_is_the_number_of_batches(rows: int, size: int, count: int) -> None:
    assert len(TensorLoader(numbered(rows), size)) == len(list(TensorLoader(numbered(rows), size, seed=1))) == count


def test_a_shuffled_pass_contains_every_row_once() -> None:
    batches = TensorLoader(numbered(23), 5, seed=1)
    assert [len(ids) for ids, _, _ in batches] == [5, 5, 5, 5, 3], "the last batch is smaller"
    assert Counter(order_of(batches)) == Counter(range(23))
    assert order_of(batches) != list(range(23))


def test_shuffling_keeps_rows_together() -> None:
    for ids, numerical, labels in TensorLoader(numbered(23), 5, seed=1):
        row = ids[:, 0].float()
        assert torch.equal(numerical, torch.stack([row, -row], dim=1))
        assert torch.equal(labels, torch.stack([row, 2 * row], dim=1))
        assert (ids.dtype, numerical.dtype, labels.dtype) == (torch.int64, torch.float32, torch.float32)


@given(rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.sampled_from([0.0, 1.5, -2.0])), min_size=1))
def test_unique_rows_are_those_of_numpy(rows: list[tuple[int, int, float]]) -> None:
    data_set, table = numbered(len(rows)), np.array(rows)
    data_set.set_ids(table[:, :2].astype(np.int64), [3, 2])
    data_set.numerical = table[:, 2:].astype(np.float32)
    unique, inverse = (tensor.numpy() for tensor in TensorLoader(data_set, 4).unique_rows)
    assert len(unique) == len(np.unique(table, axis=0))
    np.testing.assert_array_equal(table[unique][inverse], table)


def test_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, warm_up: int = 0) -> list[int]:
        batches = TensorLoader(numbered(50), 7, seed=seed)
        for _ in range(warm_up):
            order_of(batches)
        batches.epoch = epoch
        return order_of(batches)

    assert order(1, 3) == order(1, 3, warm_up=2)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (1, 2, 3)}) == 6


def test_windows_are_padded_at_the_session_start() -> None:
    data_set = numbered(5)
    data_set.session = np.array([1, 1, 1, 2, 2])
    ids, numerical, labels = TensorLoader(data_set, 5, window=2).take(torch.tensor([0, 2, 3]))
    assert ids[:, :, 0].tolist() == [[-1, 0], [1, 2], [-1, 3]]
    assert numerical[:, :, 1].tolist() == [[0, 0], [-1, -2], [0, -3]]
    assert labels[:, 1].tolist() == [0, 4, 6]


@pytest.mark.parametrize("window", [2, 9])
def test_unique_windows(window: int) -> None:
    """Equal rows differ if their earlier rows do; a window may be longer than the data set."""
    data_set = numbered(6)
    data_set.session = np.array([1, 1, 2, 2, 3, 3])
    data_set.set_ids(np.array([[1, 0], [2, 0], [1, 0], [2, 0], [2, 0], [2, 0]]), [3, 1])
    data_set.numerical = np.zeros((6, 1), np.float32)
    unique, inverse = TensorLoader(data_set, 4, window=window).unique_rows
    assert inverse.tolist() == [0, 1, 0, 1, 2, 3]
    assert unique.tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize(("rows", "processes"), [(23, 2), (23, 3), (21, 4)])
def test_each_process_reads_its_rows_of_every_batch(rows: int, processes: int) -> None:
    """One after the other they have the batch; one with fewer rows than processes all of them have."""
    whole = list(TensorLoader(numbered(rows), 5, seed=1))
    shares = [list(TensorLoader(numbered(rows), 5, seed=1, rank=rank, world_size=processes))
              for rank in range(processes)]
    for number, batch in enumerate(whole):
        for part, own in enumerate(batch):
            given = [share[number][part] for share in shares]
            if len(own) < processes:
                assert all(torch.equal(own, other) for other in given)
            else:
                assert torch.equal(torch.cat(given), own)
                assert max(map(len, given)) - min(map(len, given)) <= 1


def test_a_large_data_set_is_shuffled_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row once; a batch has neighbours of several blocks; the order depends on seed and epoch."""
    for name, value in (("PERMUTED_ROWS", 100), ("BLOCK_ROWS", 16), ("BLOCKS_AT_ONCE", 4)):
        monkeypatch.setattr(loader, name, value)

    def order(seed: int, epoch: int) -> list[int]:
        batches = TensorLoader(numbered(1000), 7, seed=seed)
        batches.epoch = epoch
        return order_of(batches)

    assert sorted(order(1, 1)) == list(range(1000))
    assert order(1, 1) == order(1, 1)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (1, 2)}) == 4
    assert len({row // 16 for row in order(1, 1)[:64]}) == 4

"""Where sessions start and end, and windows of their rows, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataset.sessions import SessionIndex, window_rows

SESSION = np.array([7, 7, 7, 3, 9, 9])  # rows 0-2, 3, 4-5


def test_session_index() -> None:
    index = SessionIndex(SESSION)
    assert index.starts.tolist() == [0, 3, 4]
    assert index.ends.tolist() == [2, 3, 5]
    assert index.row_start.tolist() == [0, 0, 0, 3, 4, 4]
    assert index.lengths.tolist() == [3, 1, 2]
    assert index.max_length == 3
    assert index.mean(np.array([1.0, 2.0, 6.0, 5.0, 0.0, 1.0])).tolist() == [3.0, 5.0, 0.5]


def test_a_single_row_is_a_session() -> None:
    index = SessionIndex(np.array([5]))
    assert (index.starts.tolist(), index.ends.tolist(), index.row_start.tolist()) == ([0], [0], [0])


@pytest.mark.parametrize("as_rows", [np.array, torch.tensor], ids=["arrays", "tensors"])
@pytest.mark.parametrize(("width", "windows", "padding"), [
    (1, [[2], [0], [3], [5]], [[0], [0], [0], [0]]),
    (3, [[0, 1, 2], [0, 0, 0], [1, 2, 3], [3, 4, 5]], [[0, 0, 0], [1, 1, 0], [1, 1, 0], [1, 0, 0]]),
    (9, [[0] * 6 + [0, 1, 2], [0] * 9, [0] * 6 + [1, 2, 3], [0] * 4 + [1, 2, 3, 4, 5]],
     [[1] * 6 + [0] * 3, [1] * 8 + [0], [1] * 8 + [0], [1] * 7 + [0] * 2])])
def test_window_rows(as_rows: type, width: int, windows: list[list[int]], padding: list[list[int]]) -> None:
    """The row itself is last; a window longer than its session, or than all rows, is padded at the front."""
    index, is_padding = window_rows(as_rows([2, 0, 3, 5]), as_rows(SessionIndex(SESSION).row_start), width)
    assert type(index) is type(as_rows([0]))
    assert index.tolist() == windows
    assert is_padding.tolist() == [[bool(flag) for flag in row] for row in padding]

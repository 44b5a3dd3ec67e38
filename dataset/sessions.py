"""Where sessions start and end: the index that environment, loader, features and metrics share."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = TypeVar("Rows", NDArray[np.int64], Tensor)


class SessionIndex:
    """The sessions of n rows; the rows of a session are adjacent.

    Args:
        session: the session id of each row, (n,).

    Attributes:
        starts, ends: (S,) first and last row of each session.
        row_start: (n,) the first row of each row's session.
    """

    def __init__(self, session: NDArray[np.int64]) -> None:
        self.starts = np.flatnonzero(np.append(True, session[1:] != session[:-1]))
        self.ends = np.append(self.starts[1:], len(session)) - 1
        self.row_start = np.repeat(self.starts, self.lengths)

    @classmethod
    def of(cls, starts: NDArray[np.int64], ends: NDArray[np.int64], row_start: NDArray[np.int64]) -> SessionIndex:
        """The index of these attributes, such as mapped ones."""
        index = cls.__new__(cls)
        index.starts, index.ends, index.row_start = starts, ends, row_start
        return index

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of rows of each session, (S,)."""
        return self.ends - self.starts + 1

    @property
    def max_length(self) -> int:
        """The number of rows of the longest session."""
        return int(self.lengths.max())

    def mean(self, values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """The mean of values (n,) in each session, (S,)."""
        sums: NDArray[np.floating[Any]] = np.add.reduceat(values, self.starts)
        return sums / self.lengths


def window_rows(rows: Rows, row_start: Rows, width: int) -> tuple[Rows, Any]:
    """The last `width` rows of the session up to each of `rows` (B,), which is the last; arrays or tensors.

    Returns:
        The row numbers (B, width), and the mask of padding (B, width): positions before the session's start.
    """
    offsets: Any = (np.arange(width - 1, -1, -1) if isinstance(rows, np.ndarray)
                    else torch.arange(width - 1, -1, -1, device=rows.device))
    index = rows[:, None] - offsets
    return index.clip(min=0), index < row_start[rows][:, None]

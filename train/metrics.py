"""Metrics: AUC, logloss, session logloss and group AUC; warnings of label leakage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pandas.util import hash_array
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from common.csv_reader import cell_location, read_table
from common.errors import UserError, truncate
from dataset.rtrl import RetailRocketRLDataset
from dataset.sessions import SessionIndex

BLOCK_ROWS = 2**21  # of a larger split, metrics are summed over blocks
PROB_EPS = 1e-7  # predictions are clipped to [PROB_EPS, 1 - PROB_EPS] in the logloss


class Metrics(NamedTuple):
    """One task's metrics on one split."""

    auc: float  # nan where the split has one class only
    logloss: float
    session_logloss: float  # s-Logloss: mean over sessions of the mean logloss inside the session
    session_gauc: float  # s-GAUC: `group_auc` of the sessions
    user_gauc: float  # u-GAUC: of the users


def compute_metrics(predictions: Sequence[NDArray[np.floating[Any]]], labels: NDArray[np.float32],
                    session: NDArray[np.int64], user: NDArray[np.int64]) -> list[Metrics]:
    """The metrics of each task: its predictions (n,) against its column of the labels (n, T); `task_metrics`."""
    return [task_metrics(values, labels[:, task], session, user) for task, values in enumerate(predictions)]


def task_metrics(predictions: NDArray[np.floating[Any]], labels: NDArray[np.float32],
                 session: NDArray[np.int64], user: NDArray[np.int64]) -> Metrics:
    """Compare one task's predictions (n,) with labels (n,) of sessions (n,), whose rows are neighbours, and users (n,).

    Beyond `BLOCK_ROWS` rows the sums are over blocks, so that hardly any memory is needed besides these arrays.
    """
    loss = session_loss = 0.0
    sessions, session_auc = 0, GroupAUC()
    for rows in session_blocks(session):
        p = np.clip(predictions[rows].astype(np.float64), PROB_EPS, 1 - PROB_EPS)
        losses = -np.where(labels[rows] > 0, np.log(p), np.log1p(-p))
        index = SessionIndex(session[rows])
        session_auc.add(predictions[rows], labels[rows], session[rows])
        loss, session_loss = loss + losses.sum(), session_loss + index.mean(losses).sum()
        sessions += len(index.starts)
    if user is not session:
        user_auc = GroupAUC()
        for part in user_parts(user):
            user_auc.add(predictions[part], labels[part], user[part])
    return Metrics(auc_of(predictions, labels), float(loss / len(labels)), float(session_loss / sessions),
                   session_auc.mean, session_auc.mean if user is session else user_auc.mean)


def session_blocks(session: NDArray[np.int64]) -> Iterator[slice]:
    """All rows in blocks of about `BLOCK_ROWS` that end with a session."""
    start = 0
    while start < len(session):
        stop = min(start + BLOCK_ROWS, len(session))
        while stop < len(session) and session[stop] == session[stop - 1]:
            stop += 1
        yield slice(start, stop)
        start = stop


def user_parts(user: NDArray[np.int64]) -> Iterator[Any]:
    """All rows in parts of about `BLOCK_ROWS` that have all rows of their users."""
    parts = -(-len(user) // BLOCK_ROWS)
    if parts <= 1:
        yield slice(None)
        return
    for part in range(parts):
        yield np.concatenate([start + np.flatnonzero(hash_array(user[start:start + BLOCK_ROWS]) % parts == part)
                              for start in range(0, len(user), BLOCK_ROWS)])


def auc_of(predictions: NDArray[np.floating[Any]], labels: NDArray[np.float32]) -> float:
    """The AUC of predictions (n,), nan where labels (n,) are of one class. Beyond `BLOCK_ROWS` rows it is counted: the
    rarer class is sorted, the rows of the other look up their place in it block by block."""
    positives = int(labels.sum(dtype=np.float64))
    if not 0 < positives < len(labels):
        return float("nan")
    if len(labels) <= BLOCK_ROWS:
        return float(roc_auc_score(labels, predictions))
    rare_is_positive = 2 * positives < len(labels)
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, len(labels), BLOCK_ROWS)]
    rare = np.sort(np.concatenate([predictions[rows][(labels[rows] > 0) == rare_is_positive] for rows in blocks]))
    below = 0  # twice the rare predictions below each other one; a tie counts 1
    for rows in blocks:
        other = predictions[rows][(labels[rows] > 0) != rare_is_positive]
        below += int((np.searchsorted(rare, other, "left") + np.searchsorted(rare, other, "right")).sum())
    share = below / (2 * len(rare) * (len(labels) - len(rare)))
    return 1 - share if rare_is_positive else share


def group_auc(predictions: NDArray[np.floating[Any]], labels: NDArray[np.float32], group: NDArray[np.int64]) -> float:
    """Group AUC (Zhou et al., KDD 2018): sum_g n_g AUC_g / sum_g n_g over the groups that have both classes; (n,) each.

    n_g is the number of rows of group g, AUC_g the fraction of its pairs of a positive and a negative row in which the
    positive one has the higher prediction; a tie counts 1/2. nan where no group has both classes.
    """
    total = GroupAUC()
    total.add(predictions, labels, group)
    return total.mean


class GroupAUC:
    """The sums of `group_auc` over parts of the rows, each with all rows of its groups."""

    def __init__(self) -> None:
        self.won, self.rows = 0.0, 0

    def add(self, predictions: NDArray[np.floating[Any]], labels: NDArray[np.float32],
            group: NDArray[np.int64]) -> None:
        """Add the groups of rows (n,)."""
        won, lengths = _won_pairs(predictions, labels, group)
        self.won, self.rows = self.won + float(np.multiply(won, lengths).sum()), self.rows + int(lengths.sum())

    @property
    def mean(self) -> float:
        """The group AUC; nan where no group has both classes."""
        return self.won / self.rows if self.rows else float("nan")


def _won_pairs(predictions: NDArray[np.floating[Any]], labels: NDArray[np.float32],
               group: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The AUC of each group that has both classes, and its number of rows."""
    order = np.lexsort((predictions, group))
    p, g, y = predictions[order], group[order], labels[order] > 0
    groups = SessionIndex(g)
    ties = SessionIndex(np.cumsum(np.append(True, (g[1:] != g[:-1]) | (p[1:] != p[:-1]))))
    negatives = np.append(0, np.cumsum(~y))  # (n + 1,) those before each row
    below = np.repeat((negatives[ties.starts] + negatives[ties.ends + 1]) / 2, ties.lengths)
    won = np.add.reduceat(np.where(y, below - negatives[groups.row_start], 0), groups.starts)
    positive = np.add.reduceat(y.astype(np.int64), groups.starts)
    pairs = positive * (groups.lengths - positive)
    mixed = pairs > 0
    return won[mixed] / pairs[mixed], groups.lengths[mixed]


LEAKAGE_AUC = 0.99  # an AUC that clicks and purchases never have
LEAKAGE_SAMPLE = 100_000  # rows of a split, evenly spread, in which single features are tried


def feature_leakage_warnings(split: RetailRocketRLDataset, split_name: str, task_names: Iterable[str]) -> list[str]:
    """A warning for each numerical feature that alone predicts a label of a split."""
    step = -(-len(split) // LEAKAGE_SAMPLE)
    ranks = rankdata(split.numerical[::step], axis=0)  # (n, N), of which each task's AUCs are sums
    found = []
    for task, task_name in enumerate(task_names):
        label = split.labels[::step, task].astype(np.float64)
        positive, negative = label.sum(), (1 - label).sum()
        if not positive or not negative:
            continue
        aucs = (label @ ranks - positive * (positive + 1) / 2) / (positive * negative)  # (N,), of Mann and Whitney
        for name, auc in zip(split.numerical_names, aucs.tolist(), strict=True):
            if max(auc, 1 - auc) > LEAKAGE_AUC:
                found.append(f"warning: {task_name}: the feature '{name}' alone has AUC {auc:.4f} on the {split_name} "
                             "split: possible label leakage")
    return found


def auc_leakage_warnings(aucs: Sequence[float], split_name: str, task_names: Sequence[str]) -> list[str]:
    """A warning for each task with an implausible AUC."""
    return [f"warning: {name}: AUC {auc:.4f} on the {split_name} split is above {LEAKAGE_AUC}: possible label leakage"
            for name, auc in zip(task_names, aucs, strict=False) if auc > LEAKAGE_AUC]


def read_test_metrics(path: Path, task_names: Sequence[str]) -> list[Metrics]:
    """The test metrics of each task in a metrics.csv; none where the run has not come so far.

    Raises UserError naming line and column where a metric is none, or is out of range.
    """
    columns = {f"{metric}_{task}": metric for task in task_names for metric in Metrics._fields}
    table = read_table(path, {"split": "text", **dict.fromkeys(columns, "optional_text")})
    rows = [number for number, split in enumerate(table["split"]) if split == "test"]
    if not rows:
        return []
    if len(rows) > 1:
        raise UserError(f"{cell_location(path, rows[1], 'split')}: a second row of test metrics")
    for column, metric in columns.items():
        cell = table[column][rows[0]]
        if not _is_valid_metric(cell, metric):
            raise UserError(f"{cell_location(path, rows[0], column)}: '{truncate(cell)}' is no "
                            f"{metric.replace('_', ' ')}")
    row = table.loc[rows[0]]
    return [Metrics(*(float(row[f"{metric}_{task}"]) for metric in Metrics._fields)) for task in task_names]


def _is_valid_metric(cell: str, metric: str) -> bool:
    """Whether a cell is an AUC from 0 to 1, or a logloss from 0 to that of a prediction as wrong as can be."""
    is_auc = metric.endswith("auc")
    if is_auc and cell == "nan":  # all labels of the split, or of each group, are the same
        return True
    try:
        value = float(cell) if cell.isascii() and "_" not in cell else -1.0
    except ValueError:
        return False
    return 0 <= value <= (1.0 if is_auc else -math.log(PROB_EPS) + 1e-3)

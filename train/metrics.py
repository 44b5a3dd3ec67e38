"""What a model is judged by: AUC, logloss and session logloss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score


class Metrics(NamedTuple):
    """One task's figures on one split."""

    auc: float  # nan where the split has one class only
    logloss: float
    session_logloss: float  # s-Logloss: mean over sessions of the mean logloss inside the session


def compute_metrics(predictions: Sequence[NDArray[np.floating[Any]]], labels: NDArray[np.float32],
                    session: NDArray[np.int64]) -> list[Metrics]:
    """The metrics of each task: its predictions (n,) against its column of the labels (n, T); `measure`."""
    return [measure(values, labels[:, task], session) for task, values in enumerate(predictions)]


def measure(predictions: NDArray[np.floating[Any]], labels: NDArray[np.float32], session: NDArray[np.int64]) -> Metrics:
    """Compare one task's predictions (n,) with labels (n,); rows of a session are neighbours."""
    p = np.clip(predictions.astype(np.float64), 1e-7, 1 - 1e-7)
    losses = -np.where(labels > 0, np.log(p), np.log1p(-p))
    starts = np.flatnonzero(np.append(True, session[1:] != session[:-1]))
    by_session = np.add.reduceat(losses, starts) / np.diff(np.append(starts, len(session)))
    auc = roc_auc_score(labels, predictions) if 0 < labels.sum() < len(labels) else float("nan")
    return Metrics(float(auc), float(losses.mean()), float(by_session.mean()))

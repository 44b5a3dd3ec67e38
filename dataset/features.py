"""Session features: numbers that are known when a row is shown, from earlier rows of the session or of the user."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dataset.sessions import SessionIndex

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
NumericalMode = Literal["session", "none"]
NUMERICAL_FEATURES = ("position", "click_rate", "pay_rate", "last_click", "last_pay", "log_gap")


def session_features(table: pd.DataFrame, labels: Sequence[str] = ("click", "pay")) -> Floats:
    """Numbers known when a row is shown, from earlier rows of its session alone; (n, 6) float32, see `NUMERICAL_FEATURES`.

    With t the row's place in its session, from 0, and c, p the clicks and purchases among its earlier rows so far:
    log(1 + t), c / (t + 1), p / (t + 1), whether the row before was clicked, was paid, and log(1 + seconds since the
    row before) / 10. Where the table has click_time and pay_time, an outcome counts only once it has happened: a
    purchase at the session's end says nothing to the rows before it. Without them (the published tables) it counts
    from the next row on. `table` is in session order; `labels` are its columns of clicks and purchases, or of whatever
    the two tasks are.
    """
    time, rows = table["timestamp"].to_numpy(), np.arange(len(table))
    start = SessionIndex(table["sessionid"].to_numpy()).row_start
    place = (rows - start).astype(np.float64)
    gap = np.where(place == 0, 0.0, np.diff(time, prepend=time[:1]) / 1000.0)

    columns = [np.log1p(place)]
    lasts = []
    for label in labels:
        known, last = _observed_outcomes(table, label, start, rows)
        columns.append(known / (place + 1.0))
        lasts.append(last)
    return np.column_stack([*columns, *lasts, np.log1p(gap) / 10.0]).astype(np.float32)


def user_history_features(tables: Mapping[str, pd.DataFrame], key: str, labels: Sequence[str]) -> dict[str, Floats]:
    """`session_features` of all that has the same `key`, a user, across the borders of sessions and splits.

    The splits follow each other in time, so that a test row may know what the user did in training: it was known when
    the row was shown. Takes the tables by split, in order; gives each one's numbers (n, 6), row by row.
    """
    rows = pd.concat(tables.values(), ignore_index=True).assign(sessionid=lambda whole: whole[key])
    order = np.lexsort((np.arange(len(rows)), rows["timestamp"], rows["sessionid"]))
    numbers = np.empty((len(rows), len(NUMERICAL_FEATURES)), np.float32)
    numbers[order] = session_features(rows.iloc[order].reset_index(drop=True), labels)
    ends = np.cumsum([len(table) for table in tables.values()])
    return dict(zip(tables, np.split(numbers, ends[:-1]), strict=True))


def features_version() -> str:
    """A digest of what `session_features` and `user_history_features` make of a small log: another one, other features.

    It is part of what models, critics and replay buffers say of themselves, so that none is used with numbers that
    mean something else. Values are rounded to five decimals, which machines agree in.
    """
    rows = np.arange(24)
    log = pd.DataFrame({"timestamp": 7_000 * rows + 900 * rows**2, "sessionid": rows // 5, "user": rows // 10,
                        "click": np.isin(rows % 7, (0, 2, 3)).astype(float), "pay": (rows % 7 == 2).astype(float)})
    times = {f"{label}_time": (log["timestamp"] + delay).where(log[label] > 0)
             for label, delay in (("click", 9_000.0), ("pay", 60_000.0))}
    looks = (session_features(log), session_features(log.assign(**times)),
             user_history_features({"train": log.assign(**times)}, "user", ("click", "pay"))["train"])
    return hashlib.sha256(np.round(np.stack(looks).astype(np.float64), 5).tobytes()).hexdigest()[:16]


def _observed_outcomes(table: pd.DataFrame, label: str, start: Ids, rows: Ids) -> tuple[NDArray[Any], NDArray[Any]]:
    """How many outcomes of earlier rows are known at each row, and whether the row before has a known one."""
    happened = table[label].to_numpy() > 0
    follows = start < rows
    if f"{label}_time" not in table:
        before = np.concatenate([[0], np.cumsum(happened)])[:-1]
        return before - before[start], np.append(False, happened[:-1]) & follows
    time = table["timestamp"].to_numpy()
    # Outcomes by (session, time); those of rows before a given row and earlier than its time are known to it. An
    # outcome is never earlier than its own row, so "earlier than row t" already means "of a row before t" (or a tie).
    when = np.maximum(table[f"{label}_time"].fillna(0).to_numpy(np.int64), time)
    order = np.lexsort((when[happened], start[happened]))
    keys = start[happened][order], when[happened][order]
    known = _count_smaller_keys(keys, start, time) - _count_smaller_keys(keys, start, np.zeros_like(time))
    last = np.append(False, happened[:-1] & (when[:-1] < time[1:])) & follows
    return known, last


def _count_smaller_keys(keys: tuple[Ids, Ids], session: Ids, time: Ids) -> Ids:
    """For each (session, time) the number of `keys`, sorted pairs, that are smaller."""
    both = np.concatenate([session, keys[0]]), np.concatenate([time, keys[1]])
    is_key = np.append(np.zeros(len(session), bool), np.ones(len(keys[0]), bool))
    order = np.lexsort((is_key, both[1], both[0]))  # at a tie the row comes first: the outcome is not known yet
    counts = np.empty(len(order), np.int64)
    counts[order] = np.cumsum(is_key[order])
    return counts[: len(session)]

"""Session features: numbers of a row that are computed from earlier rows of its session, or of its user.

Item features come from the raw logs: see the importers, `retailrocket` and `kuairand`.
"""

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
NumericalMode = Literal["rates", "session", "none"]
RATE_STRENGTH = 20.0  # rows that the rate of all rows counts for in that of a value


def session_feature_names(labels: Sequence[str] = ("click", "pay")) -> list[str]:
    """The names of the columns of `session_features`, 2 + 2T of T labels."""
    return ["position", *(f"{label}_rate" for label in labels), *(f"last_{label}" for label in labels), "log_gap"]


def session_features(table: pd.DataFrame, labels: Sequence[str] = ("click", "pay")) -> Floats:
    """The features that are known when a row is shown, from earlier rows of its session; (n, 2 + 2T)
    float32, see `session_feature_names`.

    With t the row's position in its session, from 0, and c_k the known outcomes of task k in its earlier rows: log(1 +
    t); c_k / (t + 1) of each task; of each task whether the previous row had the outcome; log(1 + seconds since the
    previous row) / 10. If the table has `<label>_time`, such as pay_time, an outcome counts from that time on: a
    purchase at the end of the session does not count in the rows before it. Otherwise (the published tables) it counts
    from the next row on. `table` is in session order; `labels` are the columns of the tasks.
    """
    time, rows = table["timestamp"].to_numpy(), np.arange(len(table))
    start = SessionIndex(table["sessionid"].to_numpy()).row_start
    position = (rows - start).astype(np.float64)
    gap = np.where(position == 0, 0.0, np.diff(time, prepend=time[:1]) / 1000.0)
    counts, last = zip(*(_observed_outcomes(table, label, start) for label in labels), strict=True)
    rates = [count / (position + 1.0) for count in counts]
    return np.column_stack([np.log1p(position), *rates, *last, np.log1p(gap) / 10.0]).astype(np.float32)


def user_history_features(tables: Mapping[str, pd.DataFrame], key: str, labels: Sequence[str]) -> dict[str, Floats]:
    """`session_features` over all rows with the same `key`, such as a user, across sessions and splits.

    The splits are consecutive in time, so a test row may use what the user did in training: it was known when the row
    was shown. Takes the tables by split, in order; returns the features (n, 2 + 2T) of each.
    """
    rows = pd.concat(tables.values(), ignore_index=True).assign(sessionid=lambda table: table[key])
    order = np.lexsort((np.arange(len(rows)), rows["timestamp"], rows["sessionid"]))
    features = np.empty((len(rows), len(session_feature_names(labels))), np.float32)
    features[order] = session_features(rows.iloc[order].reset_index(drop=True), labels)
    ends = np.cumsum([len(table) for table in tables.values()])
    return dict(zip(tables, np.split(features, ends[:-1]), strict=True))


def running_rates(rows: pd.DataFrame, groups: Mapping[str, Ids], labels: Sequence[str],
                  counted: NDArray[np.bool_] | None = None) -> pd.DataFrame:
    """How often the values of a row's fields were shown so far, and with which outcomes: G (1 + T) columns, float32.

    For each field, with m the earlier rows of the same value and c_k their outcomes of task k that are known when the
    row is shown: log(1 + m), and the log-odds of the smoothed rate (c_k + A r_k) / (m + A), A = RATE_STRENGTH, where
    r_k is the rate of all rows so far. These are the ordered target statistics of Prokhorenkova et al. (NeurIPS 2018),
    in order of time: a row's own outcome is never in them.

    Args:
        rows: of all splits; columns timestamp, the labels and, where known, `<label>_time`.
        groups: field to the number of each row's value (n,), -1 for a missing one.
        counted: (n,) whether a row counts in those of others; default: all of them do.
    """
    counted = np.ones(len(rows), bool) if counted is None else counted
    moments, moment = np.unique(rows["timestamp"].to_numpy(), return_inverse=True)
    everything = np.zeros(len(rows), np.int64)
    happened = [(rows[label].to_numpy() > 0) & counted for label in labels]
    known_from = [np.searchsorted(moments, _outcome_time(rows, label)[has_outcome], side="right")
                  for label, has_outcome in zip(labels, happened, strict=True)]

    def counts(group: Ids) -> tuple[Ids, list[Ids]]:
        return _count_known(group, moment, group[counted], moment[counted] + 1), [
            _count_known(group, moment, group[has_outcome], known)
            for has_outcome, known in zip(happened, known_from, strict=True)]

    priors = rate_priors(*counts(everything))
    columns = [column for codes in groups.values() for column in smoothed_rates(*counts(codes + 1), priors)]
    names = rate_names([*groups], labels)
    return pd.DataFrame(dict(zip(names, columns, strict=True)), index=rows.index, dtype=np.float32)


def rate_names(fields: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The names of the columns of `running_rates`."""
    return [f"{field} {what}" for field in fields for what in ("count", *(f"{label} rate" for label in labels))]


def rate_priors(shown: Ids, known: Sequence[Ids]) -> list[NDArray[np.float64]]:
    """The rate of each task in all rows so far, (n,) each, of the counts so far of all rows."""
    return [(count + 0.5) / (shown + 1.0) for count in known]


def smoothed_rates(shown: Ids, known: Sequence[Ids], priors: Sequence[NDArray[np.float64]]) -> list[NDArray[Any]]:
    """The columns of one field of `running_rates`, of its values' rows and outcomes so far, (n,) each."""
    columns = [np.log1p(shown)]
    for count, prior in zip(known, priors, strict=True):
        rate = (count + RATE_STRENGTH * prior) / (shown + RATE_STRENGTH)
        columns.append(np.log(rate / (1.0 - rate)))
    return columns


class RunningCounts:
    """The counts so far of `running_rates` of one field, block by block in order of time.

    Args:
        totals: (1 + T, K) int64, zeros: of each value its rows, and its outcomes of each task, in the blocks so far.
    """

    def __init__(self, totals: Ids) -> None:
        self.totals = totals

    def add(self, group: Ids, moment: Ids, outcomes: Sequence[tuple[Ids, Ids]]) -> tuple[Ids, list[Ids]]:
        """Rows and outcomes before each row of a block (n,): of its value, and known at its time.

        Args:
            group, moment: the numbers of the rows' values and times, (n,) each.
            outcomes: of each task the outcomes that became known up to the block's last time: the numbers of their
                values, and of the first moment at which each is known.
        """
        events = [(group, moment + 1), *outcomes]
        counts = [total[group] + _count_known(group, moment, *event)
                  for total, event in zip(self.totals, events, strict=True)]
        for total, (values, _) in zip(self.totals, events, strict=True):
            found, number = np.unique(values, return_counts=True)
            total[found] += number
        return counts[0], counts[1:]


def features_version() -> str:
    """A digest of the features of a small log: it changes if their definition changes.

    Models, critics and replay buffers store it and are refused with features of a different version. Values are
    rounded to five decimals, so that all machines agree.
    """
    rows = np.arange(24)
    log = pd.DataFrame({"timestamp": 7_000 * rows + 900 * rows**2, "sessionid": rows // 5, "user": rows // 10,
                        "click": np.isin(rows % 7, (0, 2, 3)).astype(float), "pay": (rows % 7 == 2).astype(float)})
    timed_log = log.assign(**{f"{label}_time": (log["timestamp"] + delay).where(log[label] > 0)
                              for label, delay in (("click", 9_000.0), ("pay", 60_000.0))})
    features = (session_features(log), session_features(timed_log),
                user_history_features({"train": timed_log}, "user", ("click", "pay"))["train"],
                running_rates(timed_log, {"item": rows % 4 - 1}, ("click", "pay")).to_numpy())
    return hashlib.sha256(np.round(np.hstack(features).astype(np.float64), 5).tobytes()).hexdigest()[:16]


def _observed_outcomes(table: pd.DataFrame, label: str, start: Ids) -> tuple[NDArray[Any], NDArray[Any]]:
    """The number of known outcomes of earlier rows, and whether the previous row has one; (n,) each."""
    happened = table[label].to_numpy() > 0
    has_previous = start < np.arange(len(table))
    if f"{label}_time" not in table:
        count = np.concatenate([[0], np.cumsum(happened)])[:-1]
        return count - count[start], np.append(False, happened[:-1]) & has_previous
    time = table["timestamp"].to_numpy()
    # An outcome is never earlier than its own row, so "earlier than row t" implies "of a row before t" (or a tie).
    outcome_time = _outcome_time(table, label)
    moments, moment = np.unique(time, return_inverse=True)
    known_from = np.searchsorted(moments, outcome_time[happened], side="right")  # the first moment after an outcome
    count = _count_known(start, moment, start[happened], known_from)
    last = np.append(False, happened[:-1] & (outcome_time[:-1] < time[1:])) & has_previous
    return count, last


def _outcome_time(table: pd.DataFrame, label: str) -> Ids:
    """When the outcome of each row is known, (n,) ms: at the row's own time where the table does not say."""
    time = table["timestamp"].to_numpy()
    if f"{label}_time" not in table:
        return time
    return np.maximum(table[f"{label}_time"].fillna(0).to_numpy(np.int64), time)


def _count_known(group: Ids, moment: Ids, event_group: Ids, known_from: Ids) -> Ids:
    """For each row (n,) the number of events of its group that are known at its moment; groups and the moments of the
    rows are numbered from 0, `known_from` is the moment from which on an event is known."""
    width = int(moment.max(initial=0)) + 2
    events = np.sort(event_group * width + known_from)
    return (np.searchsorted(events, group * width + moment, side="right")
            - np.searchsorted(events, group * width, side="left"))

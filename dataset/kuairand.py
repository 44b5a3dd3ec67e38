"""Raw KuaiRand logs (Gao et al., CIKM 2022): Pure, 1K and 27K share one layout. Step by step:

1. All `log_standard_*.csv` are read. `log_random_*` and the monthly statistics are not: the former come from a
   different policy, the latter contain counts of the future.
2. Of rows with the same user, video and time the one with the longest play time is kept.
3. Rows are ordered by time and cut 6:2:2 by number into train, val and test; rows of the same time stay together.
4. A session is a user's rows inside one split; `--session_gap` also cuts after so many minutes without a row. Sessions
   with fewer than `--min_session` rows (default 1) are dropped.
5. click = is_click; long_view = is_click and long_view. A click is known immediately, a long view at the end of the
   play time: click_time and long_view_time are these times (empty: never), so that features of later rows use only
   outcomes that were known. `--tasks` names others: like, follow, comment, forward, hate and profile_enter are is_like,
   is_follow and so on, each known at the end of the play time.
6. The session features look back over all earlier rows of the user, those of earlier splits included: they are known
   when a row is shown.
7. Users and videos have a table each, of fields that later rows do not change; counts are read as their published
   ranges. Values are normalized: 12 for 12.0. A user or video that is missing from its table has empty cells. Times
   are Unix time in ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from common.csv_reader import ColumnType, concat_rows, normalize_category, read_table
from common.errors import UserError
from dataset.tables import (
    CountRow,
    FeatureTable,
    PreparedDataset,
    find_csv,
    number_sessions,
    order_rows,
    read_with_progress,
    require_memory_for,
)

LOG_SCHEMA: dict[str, ColumnType] = {"user_id": "id", "video_id": "id", "time_ms": "id", "is_click": "label",
                                     "long_view": "label", "play_time_ms": "id", "tab": "optional_text"}
USER_FIELDS = ("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author",
               "follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range",
               *(f"onehot_feat{number}" for number in range(18)))
VIDEO_FIELDS = ("author_id", "video_type", "upload_type", "music_id", "music_type", "tag")
DURATION = "video_duration"  # ms; read into buckets, powers of two
LONG_TAILED = ("video_id", "author_id", "music_id")
RATES = (*LONG_TAILED, "tag", "tab", "userid&tab")  # whose counts and rates so far are features, chosen on validation
TASK_NAMES = {"click": "CTR", "long_view": "CTCVR",
              **{label: label for label in ("like", "follow", "comment", "forward", "hate", "profile_enter")}}
TASKS = ("click", "long_view")
MIN_SESSION_ROWS = 1
LOG_MEMORY_FACTOR = 8.0  # bytes of memory per byte of CSV: 7.3 and 7.7 were measured, for 600,000 and 200,000 rows


def load_raw(raw_dir: Path, session_gap: float, min_session: int, labels: Sequence[str] = TASKS) -> PreparedDataset:
    """Read the folder `raw_dir` of log_standard_*.csv, user_features_*.csv and video_features_basic_*.csv (may be .gz).

    labels: of the tasks, keys of `TASK_NAMES`. Raises UserError for another one; if a file is missing; or if a cell is
    invalid (file, line and column are named).
    """
    tasks = make_tasks(labels)
    logs, users, videos = (find_csv(raw_dir, pattern, "KuaiRand's folder `data`")
                           for pattern in ("log_standard_*", "user_features_*", "video_features_basic_*"))
    require_memory_for(dict.fromkeys([*logs, *users, *videos], LOG_MEMORY_FACTOR))
    others = [label for label in labels if label not in TASKS]
    schema: dict[str, ColumnType] = {**LOG_SCHEMA, **{f"is_{label}": "label" for label in others}}
    log = concat_rows(logs[0], (chunk for path in logs for chunk in read_with_progress(path, schema)))
    rows, row_counts = _build_rows(log, session_gap, min_session, labels)
    user_table, user_counts = read_features(users, "user_id", "userid", USER_FIELDS, rows, "users")
    video_table, video_counts = read_features(videos, "video_id", "itemid", (*VIDEO_FIELDS, DURATION), rows, "videos")
    video_table[DURATION], num_invalid = _log2_bucket(video_table[DURATION])
    video_counts.append(CountRow(f"invalid {DURATION} (not a number, negative or over a year): empty", num_invalid))
    video_table.insert(1, "video_id", video_table["itemid"].astype(str))  # the video itself is a field as well
    return PreparedDataset(
        source="KuaiRand", rows=rows, row_counts=[*row_counts, *user_counts, *video_counts],
        inputs=[*logs, *users, *videos],
        feature_tables={"user_feadf.csv": FeatureTable("userid", user_table),
                        "item_feadf.csv": FeatureTable("itemid", video_table)},
        context=["tab"], history_key="userid", long_tailed=list(LONG_TAILED), rates=RATES, tasks=tasks)


def make_tasks(labels: Sequence[str]) -> list[dict[str, str]]:
    """The tasks of a manifest: a long view is given the click, where that is a task before it; all others are given
    none. Raises UserError for a label that is unknown or named twice."""
    for label in labels:
        if label not in TASK_NAMES:
            raise UserError(f"--tasks: unknown '{label}': one of {', '.join(TASK_NAMES)}")
    if len(set(labels)) < len(labels):
        raise UserError(f"--tasks: a task is named twice: {','.join(labels)}")
    tasks = [{"name": TASK_NAMES[label], "label": label} for label in labels]
    if tuple(labels) != TASKS:
        for number, task in enumerate(tasks):
            follows_click = task["label"] == "long_view" and "click" in labels[:number]
            task["given"] = TASK_NAMES["click"] if follows_click else ""
    return tasks


def _build_rows(log: pd.DataFrame, session_gap: float, min_session: int,
                labels: Sequence[str]) -> tuple[pd.DataFrame, list[CountRow]]:
    """Steps 2 to 5: the MDP rows, with these labels, and the row counts."""
    others = [label for label in labels if label not in TASKS]
    order = np.lexsort((*(-log[f"is_{label}"] for label in others), log["tab"], -log["is_click"], -log["long_view"],
                        -log["play_time_ms"], log["video_id"], log["user_id"], log["time_ms"]))
    log = log.iloc[order].reset_index(drop=True)
    is_duplicate = log.duplicated(["time_ms", "user_id", "video_id"]).to_numpy()
    unique = log[~is_duplicate].reset_index(drop=True)
    time, user, play_time = (unique[name].to_numpy() for name in ("time_ms", "user_id", "play_time_ms"))

    ends = [int(np.searchsorted(time, time[min(int(fraction * len(unique)), len(unique) - 1)]))
            for fraction in (0.6, 0.8)]
    split = np.searchsorted(np.array(ends), np.arange(len(unique)), side="right")
    session = number_sessions(user, time, split, session_gap)
    click = unique["is_click"].to_numpy() > 0
    is_long = unique["long_view"].to_numpy() > 0
    long_view = click & is_long
    candidates = pd.DataFrame({
        "split": split, "sessionid": session, "timestamp": time, "userid": user, "itemid": unique["video_id"],
        "tab": unique["tab"]})
    outcomes = {"click": click, "long_view": long_view, **{label: unique[f"is_{label}"].to_numpy() for label in others}}
    for label in labels:
        candidates[label] = outcomes[label].astype(np.int8)
        candidates[f"{label}_time"] = time if label == "click" else time + play_time
    is_kept = np.bincount(session)[session] >= min_session
    rows = order_rows(candidates[is_kept])
    row_counts = [
        CountRow("rows read", len(log), 0),
        CountRow("dropped: duplicate user, video and time", int(is_duplicate.sum())),
        CountRow(f"dropped: in sessions of fewer than {min_session} rows", int((~is_kept).sum())),
        CountRow("kept: rows", len(rows)),
        CountRow("long views without a click, counted as neither", int((~click & is_long).sum()), 2),
    ]
    return rows, row_counts


def read_features(paths: Sequence[Path], raw_key: str, key: str, fields: Sequence[str], rows: pd.DataFrame,
                  description: str) -> tuple[pd.DataFrame, list[CountRow]]:
    """Step 7: the `fields` of the users, or videos, in column `key` of the MDP rows; and the row counts.

    `raw_key` is the key's name in the files `paths`. Raises UserError if a cell is invalid.
    """
    ids = np.unique(rows[key])
    schema: dict[str, ColumnType] = {raw_key: "id", **dict.fromkeys(fields, "optional_text")}
    raw_table = pd.concat([read_table(path, schema) for path in paths], ignore_index=True)
    is_duplicate = raw_table[raw_key].duplicated()
    known = raw_table[~is_duplicate].set_index(raw_key)
    table = known.reindex(index=ids, columns=list(fields)).astype(object).fillna("")
    normalized = table.apply(_normalize_column)
    is_known = np.isin(ids, known.index)
    row_counts = [
        CountRow(f"{description} in the table", len(raw_table), 0),
        CountRow("dropped: duplicate", int(is_duplicate.sum())),
        CountRow(f"dropped: {description} without rows", int((~known.index.isin(ids)).sum())),
        CountRow("kept", int(is_known.sum())),
        CountRow(f"{description} of rows that are missing from the table", int((~is_known).sum())),
        CountRow("normalized values: whitespace stripped, 12 for 12.0", int((normalized != table).to_numpy().sum())),
    ]
    return normalized.rename_axis(key).reset_index(), row_counts


def _normalize_column(column: pd.Series) -> pd.Series:
    codes, values = pd.factorize(column)
    return pd.Series(np.array([normalize_category(value) for value in values], object)[codes], index=column.index)


def _log2_bucket(milliseconds: pd.Series) -> tuple[pd.Series, int]:
    """Durations as the largest power of two in their seconds: "16" for 16 to 31 s. Not a number, negative, or longer
    than a year: "". Also returns the number of invalid durations, missing ones aside."""
    seconds = pd.to_numeric(milliseconds, errors="coerce").to_numpy(np.float64) / 1000.0
    is_valid = (seconds >= 0) & (seconds <= 366 * 24 * 3600)
    power = np.exp2(np.floor(np.log2(np.maximum(np.where(is_valid, seconds, 0.0), 1.0))))
    buckets = pd.Series(np.where(is_valid, np.char.mod("%d", power), ""), index=milliseconds.index, dtype=object)
    return buckets, int((~is_valid & (milliseconds != "").to_numpy()).sum())

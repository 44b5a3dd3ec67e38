"""Raw KuaiRand logs (Gao et al., CIKM 2022): Pure, 1K and 27K share one layout. Step by step:

1. All `log_standard_*.csv` are read, in parts or whole; `log_random_*` and the monthly statistics are not: the former
   is another policy's log, the latter count the future.
2. Of rows with the same user, video and time one is kept, the one that saw most of the video.
3. Rows are ordered by time and cut 6:2:2 by number into train, val and test; rows of the same time stay together.
4. A session is a user's rows inside one split, or is cut where `--session_gap` minutes pass without a row. Sessions
   with fewer than `--min_session` rows (default 1) are dropped.
5. click = is_click; long_view = is_click and long_view. A click is known at once, a long view when the watching ended:
   click_time and long_view_time say when (empty: never), so that features of later rows leave out what was not known.
6. The numbers that tell the session so far look back over all earlier rows of the user, those of earlier splits
   included: when a row is shown, they are known.
7. Users and videos have a table each, of fields that do not change with what follows; fields that count are left to
   their ranges. A value has one spelling: 12 for 12.0. Rows whose user or video is not in its table keep empty cells.
   Times are Unix time in ms.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.csv_reader import ColumnType, normalize_category, read_table
from common.errors import UserError
from dataset.tables import NO_EVENT_MS, CountRow, FeatureTable, PreparedDataset, read_with_progress, require_memory_for

LOG_SCHEMA: dict[str, ColumnType] = {"user_id": "id", "video_id": "id", "time_ms": "id", "is_click": "label",
                              "long_view": "label", "play_time_ms": "id", "tab": "optional_text"}
USER_FIELDS = ("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author",
               "follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range",
               *(f"onehot_feat{number}" for number in range(18)))
VIDEO_FIELDS = ("author_id", "video_type", "upload_type", "music_id", "music_type", "tag")
DURATION = "video_duration"  # ms; becomes a field of powers of two
LONG_TAILED = ("video_id", "author_id", "music_id")
TASKS = ({"name": "CTR", "label": "click"}, {"name": "CTCVR", "label": "long_view"})
MIN_SESSION_ROWS = 1
LOG_BYTES = 8.0  # of memory a byte of CSV: 7.3 and 7.7 were measured, of 600,000 and 200,000 rows


def load_raw(raw: Path, session_gap: float, min_session: int) -> PreparedDataset:
    """Read the folder `raw` of log_standard_*.csv, user_features_*.csv and video_features_basic_*.csv (may be .gz).

    Raises UserError where a file is missing or a cell is bad (named by file, line and column).
    """
    logs, users, videos = (_find(raw, stem) for stem in ("log_standard", "user_features", "video_features_basic"))
    require_memory_for(dict.fromkeys([*logs, *users, *videos], LOG_BYTES))
    table, split_offsets, row_counts = _rows(_read_log(logs), session_gap, min_session)
    user_table, user_account = _load_feature_table(users, "user_id", "userid", USER_FIELDS, np.unique(table["userid"]), "users")
    video_table, video_account = _load_feature_table(videos, "video_id", "itemid", (*VIDEO_FIELDS, DURATION),
                                       np.unique(table["itemid"]), "videos")
    video_table[DURATION], unknown = _log2_bucket(video_table[DURATION])
    video_account.append(CountRow(f"{DURATION} that is no number of 0 or more: left empty", unknown))
    video_table.insert(1, "video_id", video_table["itemid"].astype(str))  # the video itself is a field as well
    return PreparedDataset(
        source="KuaiRand", rows=table, split_offsets=split_offsets, train_end_ms=int(table["timestamp"].iloc[split_offsets[1]:split_offsets[2]].min()),
        row_counts=[*row_counts, *user_account, *video_account], inputs=[*logs, *users, *videos],
        feature_tables={"user_feadf.csv": FeatureTable("userid", user_table), "item_feadf.csv": FeatureTable("itemid", video_table)},
        context=["tab"], history_key="userid", long_tailed=list(LONG_TAILED), tasks=list(TASKS))


def _find(raw: Path, stem: str) -> list[Path]:
    """The files `<stem>_*.csv`, in order of their names."""
    found = sorted(path for path in raw.glob(f"{stem}_*") if path.name.endswith((".csv", ".csv.gz")))
    if not found:
        raise UserError(f"{raw / stem}_*.csv: no such file: --raw takes KuaiRand's folder `data`")
    return found


def _read_log(paths: list[Path]) -> pd.DataFrame:
    log = pd.concat([chunk for path in paths for chunk in read_with_progress(path, LOG_SCHEMA)], ignore_index=True)
    if log.empty:
        raise UserError(f"{paths[0]}: no rows below the header: is it the right file?")
    return log


def _rows(log: pd.DataFrame, session_gap: float, min_session: int) -> tuple[pd.DataFrame, list[int], list[CountRow]]:
    """Steps 2 to 5: the MDP rows by split, session start, session, time; the cuts; and the account."""
    keys = ["time_ms", "user_id", "video_id"]
    order = np.lexsort((log["tab"], -log["is_click"], -log["long_view"], -log["play_time_ms"], log["video_id"],
                        log["user_id"], log["time_ms"]))
    ordered = log.iloc[order].reset_index(drop=True)
    repeated = ordered.duplicated(keys).to_numpy()
    rows = ordered[~repeated].reset_index(drop=True)
    time, user = rows["time_ms"].to_numpy(), rows["user_id"].to_numpy()

    ends = [int(np.searchsorted(time, time[min(int(share * len(rows)), len(rows) - 1)])) for share in (0.6, 0.8)]
    split = np.searchsorted(np.array(ends), np.arange(len(rows)), side="right")
    by_user = np.lexsort((np.arange(len(rows)), user, split))
    opens = np.ones(len(rows), bool)
    opens[1:] = (split[by_user][1:] != split[by_user][:-1]) | (user[by_user][1:] != user[by_user][:-1])
    if session_gap:
        opens[1:] |= np.diff(time[by_user]) > session_gap * 60_000
    session = np.empty(len(rows), np.int64)
    session[by_user] = np.cumsum(opens) - 1  # (n,) a running number

    click = rows["is_click"].to_numpy() > 0
    long_view = click & (rows["long_view"].to_numpy() > 0)
    table = pd.DataFrame({
        "timestamp": time, "sessionid": session, "userid": user, "itemid": rows["video_id"], "tab": rows["tab"],
        "click": click.astype(np.int8), "long_view": long_view.astype(np.int8),
        "click_time": np.where(click, time, NO_EVENT_MS),
        "long_view_time": np.where(long_view, time + rows["play_time_ms"].to_numpy(), NO_EVENT_MS),
        "session_index": session, "split": split})
    kept = np.bincount(session)[session] >= min_session
    start = np.full(session.max() + 1, NO_EVENT_MS)
    np.minimum.at(start, session, time)
    final = np.lexsort((np.arange(len(rows)), session, start[session], split))
    table = table.iloc[final[kept[final]]].reset_index(drop=True)
    split_offsets = [0, *np.searchsorted(table["split"], [1, 2]).tolist(), len(table)]
    if not split_offsets[0] < split_offsets[1] < split_offsets[2] < split_offsets[3]:
        raise UserError(f"the {len(table):,} rows that are left cannot be cut 6:2:2 into train, val and test: more of "
                        "the log is needed")
    row_counts = [
        CountRow("rows read", len(log), 0),
        CountRow("dropped: same user, video and time as another", int(repeated.sum())),
        CountRow(f"dropped: in sessions of fewer than {min_session} rows", int((~kept).sum())),
        CountRow("kept: rows", len(table)),
        CountRow("long views without a click, which count as neither",
             int((~click & (rows["long_view"].to_numpy() > 0)).sum()), 2),
    ]
    return table, split_offsets, row_counts


def _load_feature_table(paths: list[Path], key: str, name: str, fields: tuple[str, ...], met: NDArray[np.int64],
          what: str) -> tuple[pd.DataFrame, list[CountRow]]:
    """Step 7: the fields of those who are met in the rows; and the account."""
    whole = pd.concat([read_table(path, {key: "id", **dict.fromkeys(fields, "optional_text")}) for path in paths],
                      ignore_index=True)
    twice = whole[key].duplicated()
    known = whole[~twice].set_index(key)
    table = known.reindex(index=met, columns=list(fields)).astype(object).fillna("")
    spelled = table.apply(_normalize_column)
    row_counts = [
        CountRow(f"{what} in the table", len(whole), 0),
        CountRow("dropped: listed before", int(twice.sum())),
        CountRow(f"dropped: {what} of no row", int((~known.index.isin(met)).sum())),
        CountRow("kept", int(np.isin(met, known.index).sum())),
        CountRow(f"{what} of rows that the table does not list", int((~np.isin(met, known.index)).sum())),
        CountRow("values written without blanks around them, or as 12 for 12.0", int((spelled != table).to_numpy().sum())),
    ]
    return spelled.rename_axis(name).reset_index(), row_counts


def _normalize_column(column: pd.Series) -> pd.Series:
    codes, values = pd.factorize(column)
    return pd.Series(np.array([normalize_category(value) for value in values], object)[codes], index=column.index)


def _log2_bucket(milliseconds: pd.Series) -> tuple[pd.Series, int]:
    """Durations as the largest power of two in their seconds: "16" for 16 to 31 s; what is no number, or below 0, or
    longer than a year, becomes empty. And how many of these said something."""
    seconds = pd.to_numeric(milliseconds, errors="coerce").to_numpy(np.float64) / 1000.0
    known = (seconds >= 0) & (seconds <= 366 * 24 * 3600)
    power = np.exp2(np.floor(np.log2(np.maximum(np.where(known, seconds, 0.0), 1.0))))
    texts = pd.Series(np.where(known, np.char.mod("%d", power), ""), index=milliseconds.index, dtype=object)
    return texts, int((~known & (milliseconds != "").to_numpy()).sum())

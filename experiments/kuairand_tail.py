"""KuaiRand-Pure with a longer train split: the last 50 impressions of each user before 2022-04-25.

    python3 -m experiments.kuairand_tail --raw DIR --features DIR --out dataset/krtail

`--raw` is a folder of two files (`.csv` or `.csv.gz`):

* `train_tail`: user_id, order (the number of the impression among the user's, from 0), video_id, long_view, is_like,
  history_len (how many impressions of the user there are), last_time_ms (the time of the last of them)
* `days_04-25_to_04-30`: user_id, video_id, time_ms, long_view, is_like

`--features` is a folder with KuaiRand's `user_features_*` and `video_features_basic_*`. The rules:

1. train is `train_tail`. It has the order of the impressions but not their times. They are set one minute apart, back
   from the user's last time. These times are an invention: `log_gap`, the time since the row before, has no meaning
   in train, and sessions must not be cut by time.
2. val and test are the days, cut into halves by time; rows of the same time stay together.
3. A session is a user's rows inside a split. The session features look back over all earlier rows of the user.
4. The tasks are long_view, and long_view and is_like. There are no times of outcomes: they count from the user's next
   row on.
5. Users and videos have the fields of `dataset.kuairand`, except for the duration of the video.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from common.csv_reader import ColumnType, cell_location, read_table
from common.errors import UserError, cli_entry_point
from dataset.kuairand import LONG_TAILED, USER_FIELDS, VIDEO_FIELDS, read_features
from dataset.tables import (
    MINUTE_MS,
    CountRow,
    FeatureTable,
    PreparedDataset,
    find_csv,
    number_sessions,
    order_rows,
    print_row_counts,
    require_new_folder,
    write_dataset,
)

ROW_SCHEMA: dict[str, ColumnType] = {"user_id": "id", "video_id": "id", "long_view": "label", "is_like": "label"}
TAIL_SCHEMA: dict[str, ColumnType] = {**ROW_SCHEMA, "order": "id", "history_len": "id", "last_time_ms": "id"}
DAYS_SCHEMA: dict[str, ColumnType] = {**ROW_SCHEMA, "time_ms": "id"}


def load_tail(raw_dir: Path, feature_dir: Path) -> PreparedDataset:
    """Read the two files of `raw_dir` and the feature tables of `feature_dir`.

    Raises UserError if a file is missing or a cell is invalid (file, line and column are named).
    """
    tail_file, days_file = (find_csv(raw_dir, name, "train_tail and days_04-25_to_04-30")[0]
                            for name in ("train_tail", "days_04-25_to_04-30"))
    users, videos = (find_csv(feature_dir, pattern, "KuaiRand's feature tables", "--features")
                     for pattern in ("user_features_*", "video_features_basic_*"))
    tail, days = _read_tail(tail_file), read_table(days_file, DAYS_SCHEMA)
    middle = np.sort(days["time_ms"])[len(days) // 2]
    log = pd.concat([tail.assign(split=0), days.assign(split=np.where(days["time_ms"] < middle, 1, 2))],
                    ignore_index=True)
    is_long, is_like = log["long_view"] > 0, log["is_like"] > 0
    rows = order_rows(pd.DataFrame({
        "split": log["split"], "sessionid": number_sessions(log["user_id"], log["time_ms"], log["split"]),
        "timestamp": log["time_ms"], "userid": log["user_id"], "itemid": log["video_id"],
        "long_view": is_long.astype(np.int8), "like": (is_long & is_like).astype(np.int8)}))
    user_table, user_counts = read_features(users, "user_id", "userid", USER_FIELDS, rows, "users")
    video_table, video_counts = read_features(videos, "video_id", "itemid", VIDEO_FIELDS, rows, "videos")
    video_table.insert(1, "video_id", video_table["itemid"].astype(str))  # the video itself is a field as well
    row_counts = [
        CountRow("rows before validation, at most 50 a user", len(tail), 0),
        CountRow("rows of the days", len(days), 0),
        CountRow("likes without a long view, not counted", int((~is_long & is_like).sum())),
    ]
    return PreparedDataset(
        source="KuaiRand, the last rows of each user before validation", rows=rows,
        row_counts=[*row_counts, *user_counts, *video_counts], inputs=[tail_file, days_file, *users, *videos],
        feature_tables={"user_feadf.csv": FeatureTable("userid", user_table),
                        "item_feadf.csv": FeatureTable("itemid", video_table)},
        context=[], history_key="userid", long_tailed=list(LONG_TAILED), rates=(*LONG_TAILED, "tag"),
        tasks=[{"name": "CTR", "label": "long_view"}, {"name": "CTCVR", "label": "like"}])


def _read_tail(path: Path) -> pd.DataFrame:
    """Rule 1: the rows with their invented `time_ms`."""
    tail = read_table(path, TAIL_SCHEMA)
    is_invalid = (tail["order"] >= tail["history_len"]).to_numpy()
    if is_invalid.any():
        row = int(is_invalid.argmax())
        raise UserError(f"{cell_location(path, row, 'order')}: {tail['order'][row]} is not below history_len, "
                        f"{tail['history_len'][row]}")
    rows_later = tail["history_len"] - 1 - tail["order"]  # impressions of the user after this one
    return tail.assign(time_ms=tail["last_time_ms"] - rows_later * MINUTE_MS)


@cli_entry_point
def cli() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m experiments.kuairand_tail",
                                     description="Turn the last impressions of KuaiRand's users, and six days, into "
                                                 "MDP tables.")
    parser.add_argument("--raw", type=Path, required=True, help="folder of train_tail and days_04-25_to_04-30")
    parser.add_argument("--features", type=Path, required=True, help="folder of KuaiRand's feature tables")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, for example dataset/krtail")
    args = parser.parse_args()
    require_new_folder(args.out)
    dataset = load_tail(args.raw, args.features)
    print_row_counts(dataset)
    write_dataset(dataset, args.out, settings={})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli()

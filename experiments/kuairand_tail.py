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

from common.csv_reader import ColumnType, cell_location
from common.duck import connect
from common.errors import UserError, cli_entry_point
from dataset.engine import MINUTE_MS, Engine
from dataset.kuairand import LONG_TAILED, make_users, make_videos
from dataset.tables import (
    CountRow,
    FeatureTable,
    PreparedDataset,
    find_csv,
    print_row_counts,
    require_new_folder,
    write_dataset,
)

ROW_SCHEMA: dict[str, ColumnType] = {"user_id": "id", "video_id": "id", "long_view": "label", "is_like": "label"}
TAIL_SCHEMA: dict[str, ColumnType] = {**ROW_SCHEMA, "order": "id", "history_len": "id", "last_time_ms": "id"}
DAYS_SCHEMA: dict[str, ColumnType] = {**ROW_SCHEMA, "time_ms": "id"}


def load_tail(engine: Engine, raw_dir: Path, feature_dir: Path) -> PreparedDataset:
    """Read the two files of `raw_dir` and the feature tables of `feature_dir`.

    Raises UserError if a file is missing or a cell is invalid (file, line and column are named).
    """
    tail_file, days_file = (find_csv(raw_dir, name, "train_tail and days_04-25_to_04-30")[0]
                            for name in ("train_tail", "days_04-25_to_04-30"))
    users, videos = (find_csv(feature_dir, pattern, "KuaiRand's feature tables", "--features")
                     for pattern in ("user_features_*", "video_features_basic_*"))
    tail_rows = engine.read("tail", [tail_file], TAIL_SCHEMA)
    row, order, length = engine.query(
        'SELECT row, "order", history_len FROM tail WHERE "order" >= history_len ORDER BY row LIMIT 1')
    if row is not None:
        raise UserError(f"{cell_location(tail_file, row, 'order')}: {order} is not below history_len, {length}")
    days_rows = engine.read("days", [days_file], DAYS_SCHEMA)
    (middle,) = engine.query(f"SELECT time_ms FROM days ORDER BY time_ms LIMIT 1 OFFSET {days_rows // 2}")
    # Rules 1 and 2. Rows of one time keep the order of the files.
    engine.step("impressions", f"""
        SELECT user_id, video_id, long_view, is_like,
               last_time_ms - (history_len - 1 - "order") * {MINUTE_MS} AS time_ms, 0 AS split, row FROM tail
        UNION ALL SELECT user_id, video_id, long_view, is_like, time_ms,
                         CASE WHEN time_ms < {middle} THEN 1 ELSE 2 END AS split, row FROM days""")
    engine.cut_sessions("session_impressions", "impressions", "split, user_id", "time_ms", 0)  # rule 3
    # Rule 4.
    engine.step("rows", """
        SELECT log.split, log.sessionid, time_ms AS timestamp, user_id AS userid, video_id AS itemid,
               CAST(long_view AS INTEGER) AS long_view, CAST(long_view * is_like AS INTEGER) AS "like"
        FROM session_impressions AS log
        JOIN (SELECT sessionid, min(time_ms) AS start FROM session_impressions GROUP BY sessionid) AS sessions
        ON log.sessionid = sessions.sessionid
        ORDER BY log.split, sessions.start, log.sessionid, time_ms, log.row""")
    (unseen_likes,) = engine.query("SELECT count(*) FROM session_impressions WHERE is_like = 1 AND long_view = 0")
    row_counts = [
        CountRow("rows before validation, at most 50 a user", tail_rows, 0),
        CountRow("rows of the days", days_rows, 0),
        CountRow("likes without a long view, not counted", unseen_likes),
        *make_users(engine, users),
        *make_videos(engine, videos, has_duration=False),  # rule 5
    ]
    return PreparedDataset(
        source="KuaiRand, the last rows of each user before validation", rows=engine.result("rows"),
        row_counts=row_counts, inputs=[tail_file, days_file, *users, *videos],
        feature_tables={"user_feadf.csv": FeatureTable("userid", engine.result("users")),
                        "item_feadf.csv": FeatureTable("itemid", engine.result("videos"))},
        context=[], history_key="userid", long_tailed=list(LONG_TAILED), rates=(*LONG_TAILED, "tag"),
        tasks=[{"name": "CTR", "label": "long_view"}, {"name": "CTCVR", "label": "like"}])


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
    with connect(folder=args.out.parent) as con:
        dataset = load_tail(Engine(con), args.raw, args.features)
        print_row_counts(dataset)
        write_dataset(dataset, args.out, settings={})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli()

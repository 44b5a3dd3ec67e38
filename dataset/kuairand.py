"""Raw KuaiRand logs (Gao et al., CIKM 2022): Pure, 1K and 27K share one layout.

The rules are the numbered comments above the SQL steps; each step makes one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.csv_reader import ColumnType, literal, quoted
from common.errors import UserError
from dataset.engine import Engine
from dataset.tables import CountRow, FeatureTable, PreparedDataset, find_csv, require_splits

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
# `str.strip` and `str.isdigit` of `normalize_category`, in SQL
SPACES = literal("".join(char for char in map(chr, range(0x3001)) if char.isspace()))
WHOLE_NUMBER = r"'^-*\p{Nd}+[.]0$'"
NUMBER = "'^[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?$'"
MAX_DURATION_MS = 366 * 24 * 3600 * 1000


def load_raw(engine: Engine, raw_dir: Path, session_gap: float, min_session: int,
             labels: Sequence[str] = TASKS) -> PreparedDataset:
    """Read the folder `raw_dir` of log_standard_*.csv, user_features_*.csv and video_features_basic_*.csv (may be .gz).

    labels: of the tasks, keys of `TASK_NAMES`. Raises UserError for another one; if a file is missing; or if a cell is
    invalid (file, line and column are named).
    """
    tasks = make_tasks(labels)
    # 1. All `log_standard_*.csv` are read. `log_random_*` and the monthly statistics are not: the former come from a
    # different policy, the latter contain counts of the future.
    logs, users, videos = (find_csv(raw_dir, pattern, "KuaiRand's folder `data`")
                           for pattern in ("log_standard_*", "user_features_*", "video_features_basic_*"))
    row_counts = _make_rows(engine, logs, session_gap, min_session, labels)
    row_counts += make_users(engine, users)
    row_counts += make_videos(engine, videos, has_duration=True)
    return PreparedDataset(
        source="KuaiRand", rows=engine.result("rows"), row_counts=row_counts,
        inputs=[*logs, *users, *videos],
        feature_tables={"user_feadf.csv": FeatureTable("userid", engine.result("users")),
                        "item_feadf.csv": FeatureTable("itemid", engine.result("videos"))},
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


def _make_rows(engine: Engine, logs: Sequence[Path], session_gap: float, min_session: int,
               labels: Sequence[str]) -> list[CountRow]:
    """Steps 2 to 5: the table `rows`, with these labels; and the row counts."""
    others = [f"is_{label}" for label in labels if label not in TASKS]
    schema: dict[str, ColumnType] = {**LOG_SCHEMA, **dict.fromkeys(others, "label")}
    rows_read = engine.read("log", logs, schema)
    # 2. Of rows with the same user, video and time the one with the longest play time is kept.
    ties = ["play_time_ms DESC", "long_view DESC", "is_click DESC", "tab", *(f"{name} DESC" for name in others[::-1])]
    engine.step("impressions", f"""
        SELECT {", ".join(schema)}
        FROM (SELECT *, row_number() OVER (PARTITION BY time_ms, user_id, video_id ORDER BY {", ".join(ties)}) AS number
              FROM log) AS numbered
        WHERE number = 1""")
    # 3. Rows are ordered by time and cut 6:2:2 by number into train, val and test; rows of the same time stay together.
    (unique,) = engine.query("SELECT count(*) FROM impressions")
    val, test = (engine.query("SELECT time_ms FROM impressions ORDER BY time_ms LIMIT 1 OFFSET "
                              f"{min(int(fraction * unique), unique - 1)}")[0] for fraction in (0.6, 0.8))
    engine.step("split_impressions", f"""
        SELECT *, CASE WHEN time_ms >= {test} THEN 2 WHEN time_ms >= {val} THEN 1 ELSE 0 END AS split
        FROM impressions""", drop=["impressions"])
    # 4. A session is a user's rows inside one split; `--session_gap` also cuts after so many minutes without a row.
    # Sessions with fewer than `--min_session` rows (default 1) are dropped.
    engine.cut_sessions("session_impressions", "split_impressions", "split, user_id", "time_ms", session_gap)
    engine.step("sessions", f"""
        SELECT sessionid, split, min(time_ms) AS start, count(*) AS num_rows
        FROM session_impressions GROUP BY sessionid, split HAVING count(*) >= {min_session}""")
    sessions, kept, found = engine.count_sessions("sessions")
    require_splits(sessions, kept, found)
    (unclicked,) = engine.query("SELECT count(*) FROM session_impressions WHERE long_view = 1 AND is_click = 0")
    # 5. click = is_click; long_view = is_click and long_view. A click is known immediately, a long view at the end of
    # the play time: click_time and long_view_time are these times (empty: never), so that features of later rows use
    # only outcomes that were known. `--tasks` names others: like, follow, comment, forward, hate and profile_enter are
    # is_like, is_follow and so on, each known at the end of the play time. Rows are in order of split, session start,
    # session, time and video.
    values = {"click": "is_click", "long_view": "is_click * long_view"}
    outcomes = ", ".join(
        f"CAST({values.get(label, f'is_{label}')} AS INTEGER) AS {quoted(label)}, "
        f"time_ms{' + play_time_ms' * (label != 'click')} AS {quoted(f'{label}_time')}" for label in labels)
    engine.step("rows", f"""
        SELECT sessions.split, sessions.sessionid, time_ms AS timestamp, user_id AS userid, video_id AS itemid, tab,
               {outcomes}
        FROM session_impressions AS log JOIN sessions ON log.sessionid = sessions.sessionid
        ORDER BY sessions.split, sessions.start, sessions.sessionid, time_ms, video_id""", drop=["session_impressions"])
    return [
        CountRow("rows read", rows_read, 0),
        CountRow("dropped: duplicate user, video and time", rows_read - unique),
        CountRow(f"dropped: in sessions of fewer than {min_session} rows", unique - kept),
        CountRow("kept: rows", kept),
        CountRow("long views without a click, counted as neither", unclicked, 2),
    ]


# 6. The session features look back over all earlier rows of the user, those of earlier splits included: they are known
# when a row is shown.


def make_users(engine: Engine, paths: Sequence[Path]) -> list[CountRow]:
    """Step 7 for users: the table `users`."""
    row_counts = _make_features(engine, paths, "user_id", "userid", USER_FIELDS, "users")
    engine.step("users", f"SELECT userid, {', '.join(USER_FIELDS)} FROM normal_users ORDER BY userid")
    return row_counts


def make_videos(engine: Engine, paths: Sequence[Path], has_duration: bool) -> list[CountRow]:
    """Steps 7 and 8 for videos: the table `videos`. The video itself is a field as well."""
    fields = ["itemid", "CAST(itemid AS VARCHAR) AS video_id", *VIDEO_FIELDS]
    raw_fields = [*VIDEO_FIELDS, *[DURATION] * has_duration]
    row_counts = _make_features(engine, paths, "video_id", "itemid", raw_fields, "videos")
    if has_duration:
        # 8. The duration is the largest power of two in its seconds: "16" for 16 to 31 s, "1" for less; "" for what is
        # not a number, negative, or longer than a year.
        ms = f"CAST(CASE WHEN regexp_matches({DURATION}, {NUMBER}) THEN {DURATION} ELSE '-1' END AS DOUBLE)"
        is_valid = f"{ms} BETWEEN 0 AND {MAX_DURATION_MS}"
        seconds = f"CAST(floor(greatest({ms}, 1000) / 1000) AS BIGINT)"
        power = f"CAST(pow(2, length(bin({seconds})) - 1) AS BIGINT)"
        fields.append(f"CASE WHEN {is_valid} THEN CAST({power} AS VARCHAR) ELSE '' END AS {DURATION}")
        row_counts.append(CountRow(f"invalid {DURATION} (not a number, negative or over a year): empty", *engine.query(
            f"SELECT count(*) FROM normal_videos WHERE NOT {is_valid} AND {DURATION} <> ''")))
    engine.step("videos", f"SELECT {', '.join(fields)} FROM normal_videos ORDER BY itemid")
    return row_counts


def _make_features(engine: Engine, paths: Sequence[Path], raw_key: str, key: str, fields: Sequence[str],
                   name: str) -> list[CountRow]:
    """The table `normal_<name>`: the `fields` of the users, or videos, in column `key` of `rows`; and the row counts.

    `raw_key` is the key's name in the files `paths`. Raises UserError if a cell is invalid.
    """
    listed = engine.read(f"raw_{name}", paths, {raw_key: "id", **dict.fromkeys(fields, "optional_text")})
    # 7. Users and videos have a table each, of fields that later rows do not change; counts are read as their published
    # ranges. The first of several listings counts. Values are normalized: 12 for 12.0. A user or video that is missing
    # from its table has empty cells. Times are Unix time in ms.
    engine.step(f"first_{name}", f"""
        SELECT {raw_key}, {", ".join(fields)}
        FROM (SELECT *, row_number() OVER (PARTITION BY {raw_key} ORDER BY file, row) AS listing
              FROM raw_{name}) AS numbered
        WHERE listing = 1""")
    trimmed = ", ".join(f"trim(coalesce({field}, ''), {SPACES}) AS {field}, {field} AS raw_{field}" for field in fields)
    engine.step(f"trimmed_{name}", f"""
        SELECT known.{key}, listed.{raw_key} AS listed_id, {trimmed}
        FROM (SELECT DISTINCT {key} FROM rows) AS known
        LEFT JOIN first_{name} AS listed ON known.{key} = listed.{raw_key}""")
    normal = ", ".join(f"CASE WHEN regexp_matches({field}, {WHOLE_NUMBER}) THEN left({field}, length({field}) - 2) "
                       f"ELSE {field} END AS {field}, raw_{field}" for field in fields)
    engine.step(f"normal_{name}", f"SELECT {key}, listed_id, {normal} FROM trimmed_{name}", drop=[f"trimmed_{name}"])
    changed = " + ".join(f"CASE WHEN {field} <> raw_{field} THEN 1 ELSE 0 END" for field in fields)
    (distinct,) = engine.query(f"SELECT count(*) FROM first_{name}")
    known, found, normalized = engine.query(f"SELECT count(*), count(listed_id), sum({changed}) FROM normal_{name}")
    return [
        CountRow(f"{name} in the table", listed, 0),
        CountRow("dropped: duplicate", listed - distinct),
        CountRow(f"dropped: {name} without rows", distinct - found),
        CountRow("kept", found),
        CountRow(f"{name} of rows that are missing from the table", known - found),
        CountRow("normalized values: whitespace stripped, 12 for 12.0", int(normalized)),
    ]

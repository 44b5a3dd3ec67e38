"""Raw RetailRocket logs: the files of the Kaggle dataset `retailrocket/ecommerce-dataset`.

The rules are the numbered comments above the SQL steps of `load_raw`; each step makes one table.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from common.csv_reader import ColumnType, cell_location, quoted
from common.errors import UserError
from common.fileio import read_json
from dataset.engine import Engine
from dataset.manifest import DEFAULTS
from dataset.simulate import GROUND_TRUTH_SCHEMA, config_from_manifest, scan_ground_truth
from dataset.tables import CountRow, FeatureTable, PreparedDataset, find_csv, require_splits, validation_start

EVENTS = ("view", "addtocart", "transaction")
PROPERTIES = ("785", "591", "814", "available", "categoryid", "364", "776")
LONG_TAILED = ("364", "776")
TASKS = ({"name": "CTR", "label": "click"}, {"name": "CTCVR", "label": "pay"})
EVENT_SCHEMA: dict[str, ColumnType] = {"timestamp": "id", "visitorid": "id", "event": "text", "itemid": "id",
                                       "transactionid": "optional_id"}
PROPERTY_SCHEMA: dict[str, ColumnType] = {"timestamp": "id", "itemid": "id", "property": "text",
                                          "value": "optional_text"}
PAPER_MANIFEST: dict[str, Any] = {
    **DEFAULTS,
    "source": "RetailRocket, tables as published by the paper's authors",
    "categorical": list(PROPERTIES),
    "tables": {"item_feadf.csv": {"key": "itemid", "fields": list(PROPERTIES)}},
    "long_tailed": list(LONG_TAILED),
    "tasks": list(TASKS),
}
MIN_SESSION_ROWS = 2


def load_raw(engine: Engine, raw_dir: Path, session_gap: float, min_session: int) -> PreparedDataset:
    """Read the folder `raw_dir` of events.csv, item_properties*.csv and, optionally, category_tree.csv (each may be
    .gz).

    Raises UserError if a file is missing or a cell is invalid (file, line and column are named).
    """
    event_file = find_csv(raw_dir, "events", "the Kaggle files")[0]
    property_files = find_csv(raw_dir, "item_properties*", "the Kaggle files (part1 and part2)")
    tree_files = [path for path in raw_dir.glob("category_tree.csv*") if path.suffix in (".csv", ".gz")][:1]
    config_file, truth_file = raw_dir / "simulation.json", raw_dir / "truth.csv"
    simulation = read_json(config_file) if os.path.lexists(config_file) else None
    if simulation is None and truth_file.exists():
        raise UserError(f"{truth_file}: ground truth of a simulated log, but there is no simulation.json: remove the "
                        "file")
    config = config_from_manifest(simulation, config_file) if simulation is not None else None

    row_counts = _make_sessions(engine, event_file, session_gap, min_session)
    truth = [name for name in GROUND_TRUTH_SCHEMA if name not in ("timestamp", "visitorid", "itemid")]
    if has_truth := config is not None and truth_file.exists() and not session_gap:
        engine.view("truth", scan_ground_truth(engine.con, truth_file, config))
    # 5b. Rows are in order of split, session start, session and time; of rows at the same time that of the earlier
    # event comes first, then that of the smaller item.
    engine.step("rows", f"""
        SELECT sessions.split, items.timestamp, items.sessionid, items.itemid,
               CASE WHEN pay_time IS NULL THEN 0 ELSE 1 END AS pay,
               CASE WHEN click_time IS NULL THEN 0 ELSE 1 END AS click,
               {", ".join(["click_time", "pay_time", *truth * has_truth])}
        FROM session_items AS items JOIN split_sessions AS sessions ON items.sessionid = sessions.sessionid
        {'''LEFT JOIN truth ON items.timestamp = truth.timestamp AND items.sessionid = truth.visitorid
                           AND items.itemid = truth.itemid''' * has_truth}
        ORDER BY sessions.split, sessions.start, items.sessionid, items.timestamp, items.first_kind, items.itemid""",
                drop=["session_items"])
    if has_truth:
        _require_ground_truth(engine, truth_file)
    row_counts += _make_items(engine, property_files)
    if tree_files:  # checked and counted; the tables do not contain it
        categories = "SELECT DISTINCT categoryid FROM items WHERE categoryid <> ''"
        row_counts += [
            CountRow("categories in the tree (not used by the tables)",
                     engine.read("tree", tree_files, {"categoryid": "id", "parentid": "optional_id"}), 0),
            CountRow("categories of items", *engine.query(f"SELECT count(*) FROM ({categories}) AS used")),
            CountRow("of these not in the tree", *engine.query(
                f"SELECT count(*) FROM ({categories}) AS used "
                "WHERE categoryid NOT IN (SELECT CAST(categoryid AS VARCHAR) FROM tree)")),
        ]
    rows = engine.result("rows")
    return PreparedDataset(
        source="RetailRocket, simulated" if config else "RetailRocket",
        rows=rows.project("split, timestamp, sessionid, itemid, pay, click, click_time, pay_time"),
        row_counts=row_counts, inputs=[event_file, *property_files, *tree_files],
        feature_tables={"item_feadf.csv": FeatureTable("itemid", engine.result("items"))}, context=[],
        long_tailed=list(LONG_TAILED), tasks=list(TASKS), simulation=simulation,
        ground_truth=rows.project(", ".join(["timestamp", "sessionid", "itemid", *truth])) if has_truth else None)


def _make_sessions(engine: Engine, path: Path, session_gap: float, min_session: int) -> list[CountRow]:
    """Steps 1 to 5: the tables `session_items` and `split_sessions`; and the row counts of the events."""
    events_read = engine.read("events", [path], EVENT_SCHEMA)
    kinds = [f"coalesce(sum(CASE WHEN event = '{event}' THEN 1 END), 0)" for event in EVENTS]
    *by_kind, unknown = engine.query(
        f"SELECT {', '.join(kinds)}, min(CASE WHEN event NOT IN {EVENTS} THEN row END) FROM events")
    if unknown is not None:
        raise UserError(f"{cell_location(path, unknown, 'event')}: unknown event: one of {', '.join(EVENTS)}; is this "
                        "the RetailRocket layout?")
    # 1. Duplicate events, equal in every cell, are dropped.
    engine.step("distinct_events", """
        SELECT DISTINCT visitorid, timestamp, itemid, coalesce(transactionid, -1) AS transactionid,
               CASE event WHEN 'view' THEN 0 WHEN 'addtocart' THEN 1 ELSE 2 END AS kind
        FROM events""")
    (distinct_events,) = engine.query("SELECT count(*) FROM distinct_events")
    # 2. A session is a visitor; `--session_gap` instead cuts after so many minutes without an event.
    if session_gap:
        engine.cut_sessions("session_events", "distinct_events", "visitorid", "timestamp", session_gap)
    else:
        engine.step("session_events", "SELECT *, visitorid AS sessionid FROM distinct_events", drop=["distinct_events"])
    # 3. One row is one item of one session, at the item's first event there. click = the item was carted or bought in
    # that session, then or later; pay = it was bought; so pay implies click. click_time and pay_time are the times of
    # these events (empty: never), so that features of later rows use only outcomes that were known.
    engine.step("session_items", """
        SELECT sessionid, itemid, min(timestamp) AS timestamp, count(*) AS events,
               min(CASE WHEN kind >= 1 THEN timestamp END) AS click_time,
               min(CASE WHEN kind = 2 THEN timestamp END) AS pay_time,
               CASE WHEN min(CASE WHEN kind = 0 THEN timestamp END) = min(timestamp) THEN 0
                    WHEN min(CASE WHEN kind = 1 THEN timestamp END) = min(timestamp) THEN 1 ELSE 2 END AS first_kind
        FROM session_events GROUP BY sessionid, itemid""", drop=["session_events"])
    # 4. Sessions with fewer than `--min_session` rows (default 2: an episode needs a transition) are dropped.
    engine.step("sessions", """
        SELECT sessionid, min(timestamp) AS start, count(*) AS num_rows, sum(events) AS events
        FROM session_items GROUP BY sessionid""")
    dropped = engine.query(f"SELECT count(*), coalesce(sum(events), 0) FROM sessions WHERE num_rows < {min_session}")
    # 5. Sessions are ordered by the time of their first row, and cut 6:2:2 by number of rows into train, val and test.
    # No session is in two splits.
    engine.step("ordered_sessions", f"""
        SELECT *, sum(num_rows) OVER (ORDER BY start, sessionid ROWS UNBOUNDED PRECEDING) - num_rows AS first_row
        FROM sessions WHERE num_rows >= {min_session}""")
    rows, events = engine.query("SELECT sum(num_rows), sum(events) FROM ordered_sessions")
    if not rows:
        raise UserError(f"no session has {min_session} items or more: nothing to learn from (see --min_session)")
    cuts = [f"coalesce(min(CASE WHEN first_row >= CAST('{share * int(rows)!r}' AS DOUBLE) THEN first_row END), "
            "max(first_row))" for share in (0.6, 0.8)]
    val, test = engine.query(f"SELECT {', '.join(cuts)} FROM ordered_sessions")
    engine.step("split_sessions", f"""
        SELECT sessionid, start, num_rows,
               CASE WHEN first_row >= {test} THEN 2 WHEN first_row >= {val} THEN 1 ELSE 0 END AS split
        FROM ordered_sessions""", drop=["sessions", "ordered_sessions"])
    require_splits(*engine.count_sessions("split_sessions"))
    return [
        CountRow("events read", events_read, 0),
        *[CountRow(name, int(count), 2) for name, count in zip(EVENTS, by_kind, strict=True)],
        CountRow("dropped: duplicate events", events_read - distinct_events),
        CountRow(f"dropped: in {dropped[0]:,} sessions of fewer than {min_session} items", int(dropped[1])),
        CountRow("merged: later events of an item in its session", int(events - rows)),
        CountRow("kept: rows, one per item of a session", int(rows)),
    ]


def _require_ground_truth(engine: Engine, path: Path) -> None:
    """Raise UserError unless the simulator's probabilities of each row are in the file once."""
    row, item, visitor = engine.query(
        "SELECT max(row) AS last, itemid, visitorid FROM truth GROUP BY timestamp, visitorid, itemid "
        "HAVING count(*) > 1 ORDER BY last LIMIT 1")
    if row is not None:
        raise UserError(f"{cell_location(path, row, 'itemid')}: duplicate row of item {item} for visitor {visitor} at "
                        "that time: remove the file")
    item, visitor = engine.query("SELECT itemid, sessionid FROM rows WHERE p_click IS NULL LIMIT 1")
    if item is not None:
        raise UserError(f"{path}: no row for item {item} of visitor {visitor}: the file belongs to a different log; "
                        "remove it")


def _make_items(engine: Engine, paths: list[Path]) -> list[CountRow]:
    """Step 6: the table `items`; and the row counts of the properties."""
    rows_read = engine.read("properties", paths, PROPERTY_SCHEMA, may_be_empty=True)
    boundary = validation_start(engine.result("rows"))
    # 6. The item table contains, for each item of the rows, the last value of each property known when the first
    # validation session starts. Later values are dropped: they would leak the future. An item without a value has an
    # empty cell. Of two values at the same time the larger text is kept: one result, whatever the order of the files.
    engine.step("used_properties", f"""
        SELECT itemid, property, timestamp, value FROM properties WHERE property IN {PROPERTIES}""")
    used, late = engine.query(
        f"SELECT count(*), coalesce(sum(CASE WHEN timestamp > {boundary} THEN 1 END), 0) FROM used_properties")
    engine.step("property_values", f"""
        SELECT itemid, property, timestamp, value FROM used_properties
        WHERE timestamp <= {boundary} AND itemid IN (SELECT itemid FROM rows)""", drop=["used_properties"])
    (values,) = engine.query("SELECT count(*) FROM property_values")
    engine.step("last_values", """
        SELECT itemid, property, value
        FROM (SELECT *, row_number() OVER (PARTITION BY itemid, property ORDER BY timestamp DESC, value DESC) AS number
              FROM property_values) AS numbered
        WHERE number = 1""", drop=["property_values"])
    (last,) = engine.query("SELECT count(*) FROM last_values")
    fields = ", ".join(f"coalesce(max(CASE WHEN property = '{name}' THEN value END), '') AS {quoted(name)}"
                       for name in PROPERTIES)
    engine.step("items", f"""
        SELECT known.itemid, {fields}
        FROM (SELECT DISTINCT itemid FROM rows) AS known LEFT JOIN last_values ON known.itemid = last_values.itemid
        GROUP BY known.itemid ORDER BY known.itemid""", drop=["last_values"])
    is_empty = " AND ".join(f"{quoted(name)} = ''" for name in PROPERTIES)
    items, empty = engine.query(f"SELECT count(*), coalesce(sum(CASE WHEN {is_empty} THEN 1 END), 0) FROM items")
    return [
        CountRow("property rows read", rows_read, 0),
        CountRow("dropped: unused properties", rows_read - used),
        CountRow("dropped: after the cutoff, when validation starts", int(late)),
        CountRow("dropped: items without sessions", used - int(late) - values),
        CountRow("dropped: replaced by a later value before the cutoff", values - last),
        CountRow("kept: values of items", last),
        CountRow("items with sessions", items, 0),
        CountRow("without any known property", int(empty)),
    ]

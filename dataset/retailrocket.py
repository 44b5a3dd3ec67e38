"""Raw RetailRocket logs: the files of the Kaggle dataset `retailrocket/ecommerce-dataset`, step by step.

1. Duplicate events, equal in every cell, are dropped.
2. A session is a visitor; `--session_gap` instead cuts after so many minutes without an event.
3. One row is one item of one session, at the item's first event there. click = the item was carted or bought in that
   session, then or later; pay = it was bought; so pay implies click. click_time and pay_time are the times of these
   events (empty: never), so that features of later rows use only outcomes that were known.
4. Sessions with fewer than `--min_session` rows (default 2: an episode needs a transition) are dropped.
5. Sessions are ordered by the time of their first row, and cut 6:2:2 by number of rows into train, val and test. No
   session is in two splits.
6. The item table contains, for each item of the rows, the last value of each property known when the first validation
   session starts. Later values are dropped: they would leak the future. An item without a value has an empty cell.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.csv_reader import ColumnType, cell_location, concat_rows, read_table
from common.errors import UserError
from common.fileio import read_json
from dataset.manifest import DEFAULTS
from dataset.simulate import SimulationConfig, config_from_manifest, read_ground_truth
from dataset.tables import (
    CountRow,
    FeatureTable,
    PreparedDataset,
    find_csv,
    number_sessions,
    order_rows,
    read_with_progress,
    require_memory_for,
    validation_start,
)

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
NO_EVENT_MS = np.iinfo(np.int64).max
# Bytes of memory per byte of CSV, measured; the properties are read in chunks.
EVENT_MEMORY_FACTOR, PROPERTY_MEMORY_FACTOR = 8.0, 1.0


def load_raw(raw_dir: Path, session_gap: float, min_session: int) -> PreparedDataset:
    """Read the folder `raw_dir` of events.csv, item_properties*.csv and, optionally, category_tree.csv (each may be
    .gz).

    Raises UserError if a file is missing or a cell is invalid (file, line and column are named).
    """
    event_file = find_csv(raw_dir, "events", "the Kaggle files")[0]
    property_files = find_csv(raw_dir, "item_properties*", "the Kaggle files (part1 and part2)")
    tree_file = next((path for path in raw_dir.glob("category_tree.csv*") if path.suffix in (".csv", ".gz")), None)

    require_memory_for({event_file: EVENT_MEMORY_FACTOR, **dict.fromkeys(property_files, PROPERTY_MEMORY_FACTOR)})
    rows, row_counts = _build_rows(_read_events(event_file), session_gap, min_session)
    items, item_counts = _item_features(property_files, np.unique(rows["itemid"]), validation_start(rows))
    row_counts += item_counts
    if tree_file is not None:  # checked and counted; the tables do not contain it
        tree = read_table(tree_file, {"categoryid": "id", "parentid": "optional_id"})
        categories = {value for value in items["categoryid"] if value}
        row_counts += [
            CountRow("categories in the tree (not used by the tables)", len(tree), 0),
            CountRow("categories of items", len(categories)),
            CountRow("of these not in the tree", len(categories - set(tree["categoryid"].astype(str)))),
        ]
    config_file, truth_file = raw_dir / "simulation.json", raw_dir / "truth.csv"
    simulation = read_json(config_file) if os.path.lexists(config_file) else None
    config = config_from_manifest(simulation, config_file) if simulation is not None else None
    if config is None and truth_file.exists():
        raise UserError(f"{truth_file}: ground truth of a simulated log, but there is no simulation.json: remove the "
                        "file")
    has_ground_truth = truth_file.exists() and not session_gap
    return PreparedDataset(
        source="RetailRocket, simulated" if config else "RetailRocket",
        rows=rows, row_counts=row_counts,
        inputs=[event_file, *property_files, *([tree_file] if tree_file else [])],
        feature_tables={"item_feadf.csv": FeatureTable("itemid", items)}, context=[],
        long_tailed=list(LONG_TAILED), tasks=list(TASKS), simulation=simulation,
        ground_truth=_align_ground_truth(truth_file, rows, config) if config and has_ground_truth else None)


def _read_events(path: Path) -> pd.DataFrame:
    chunks: list[pd.DataFrame] = []
    for chunk in read_with_progress(path, EVENT_SCHEMA):
        chunk["event"] = pd.Index(EVENTS).get_indexer(pd.Index(chunk["event"])).astype(np.int8)
        unknown = chunk["event"].to_numpy() < 0
        if unknown.any():
            row = sum(map(len, chunks)) + int(unknown.argmax())
            raise UserError(f"{cell_location(path, row, 'event')}: unknown event: one of {', '.join(EVENTS)}; is this "
                            "the RetailRocket layout?")
        chunks.append(chunk)
    return concat_rows(path, chunks)


def _build_rows(events: pd.DataFrame, session_gap: float, min_session: int) -> tuple[pd.DataFrame, list[CountRow]]:
    """Steps 1 to 5: the MDP rows, and the row counts of the events."""
    # One order, whatever the order of the file: visitor, time, event type (a view before its cart), item.
    order = np.lexsort((events["transactionid"], events["itemid"], events["event"], events["timestamp"],
                        events["visitorid"]))
    time, visitor, event_type, item = (events[name].to_numpy()[order]
                                       for name in ("timestamp", "visitorid", "event", "itemid"))
    transaction = events["transactionid"].fillna(-1).to_numpy()[order]
    is_duplicate = np.ones(len(order), bool)
    is_duplicate[0] = False
    for column in (time, visitor, event_type, item, transaction):
        is_duplicate[1:] &= column[1:] == column[:-1]
    time, visitor, event_type, item = (column[~is_duplicate] for column in (time, visitor, event_type, item))

    session = number_sessions(visitor, time, gap_minutes=session_gap)  # (E,)

    # One row per (session, item): its first event gives the row, the others its labels.
    by_item = np.lexsort((np.arange(len(time)), item, session))
    is_group_start = np.ones(len(time), bool)
    is_group_start[1:] = (session[by_item][1:] != session[by_item][:-1]) | (item[by_item][1:] != item[by_item][:-1])
    group_starts = np.flatnonzero(is_group_start)
    first_event = by_item[group_starts]
    cart_time = np.where(event_type >= 1, time, NO_EVENT_MS)[by_item]
    purchase_time = np.where(event_type == 2, time, NO_EVENT_MS)[by_item]
    candidates = pd.DataFrame({
        "timestamp": time[first_event],
        "sessionid": session[first_event] if session_gap else visitor[first_event],
        "itemid": item[first_event],
        "click_time": np.minimum.reduceat(cart_time, group_starts),
        "pay_time": np.minimum.reduceat(purchase_time, group_starts),
        "events": np.diff(np.append(group_starts, len(time))),
        "event": first_event,
    })
    candidates["click"] = (candidates["click_time"] != NO_EVENT_MS).astype(np.int8)
    candidates["pay"] = (candidates["pay_time"] != NO_EVENT_MS).astype(np.int8)

    is_kept = np.bincount(session[first_event])[session[first_event]] >= min_session
    dropped = candidates[~is_kept]
    rows = candidates[is_kept].sort_values("event")  # of rows at the same time that of the earlier event comes first
    if rows.empty:
        raise UserError(f"no session has {min_session} items or more: nothing to learn from (see --min_session)")
    rows = order_rows(rows.assign(split=_split_by_time(rows)))
    row_counts = [
        CountRow("events read", len(order), 0),
        *[CountRow(name, int((events["event"] == code).sum()), 2) for code, name in enumerate(EVENTS)],
        CountRow("dropped: duplicate events", int(is_duplicate.sum())),
        CountRow(f"dropped: in {dropped['sessionid'].nunique():,} sessions of fewer than {min_session} items",
                 int(dropped["events"].sum())),
        CountRow("merged: later events of an item in its session", int(rows["events"].sum()) - len(rows)),
        CountRow("kept: rows, one per item of a session", len(rows)),
    ]
    return rows.drop(columns=["events", "event"]), row_counts


def _split_by_time(rows: pd.DataFrame) -> NDArray[np.int64]:
    """Step 5: the split of each of n rows, (n,): sessions in order of their start, cut 6:2:2 by number of rows."""
    sessions = rows.groupby("sessionid")["timestamp"].agg(["min", "size"]).sort_values("min", kind="stable")
    first_rows = (sessions["size"].cumsum() - sessions["size"]).to_numpy()  # the rows before each session
    cuts = [first_rows[min(int(np.searchsorted(first_rows, fraction * len(rows))), len(first_rows) - 1)]
            for fraction in (0.6, 0.8)]
    split = np.searchsorted(cuts, first_rows, side="right")
    return split[sessions.index.get_indexer(pd.Index(rows["sessionid"]))]


def _item_features(paths: Iterable[Path], item_ids: NDArray[np.int64],
                   train_end_ms: int) -> tuple[pd.DataFrame, list[CountRow]]:
    """Step 6: the last value of each property of the items, known at `train_end_ms`; and the row counts."""
    rows_read = unused_properties = after_cutoff = unknown_items = 0
    chunks: list[pd.DataFrame] = []
    for path in paths:
        for chunk in read_with_progress(path, PROPERTY_SCHEMA):
            is_used = chunk["property"].isin(PROPERTIES).to_numpy()
            is_past = chunk["timestamp"].to_numpy() <= train_end_ms
            is_known = np.isin(chunk["itemid"].to_numpy(), item_ids)
            chunks.append(chunk[is_used & is_past & is_known])
            # A dropped row is counted once, for the first rule that drops it.
            rows_read += len(chunk)
            unused_properties += int((~is_used).sum())
            after_cutoff += int((is_used & ~is_past).sum())
            unknown_items += int((is_used & is_past & ~is_known).sum())
    values = pd.concat(chunks, ignore_index=True)
    # Of two values at the same time the larger text is kept: one result, whatever the order of the files.
    values = values.sort_values(["itemid", "property", "timestamp", "value"], kind="stable")
    last = values.drop_duplicates(["itemid", "property"], keep="last")
    wide = last.pivot(index="itemid", columns="property", values="value")
    items = wide.reindex(index=item_ids, columns=list(PROPERTIES)).astype(object).fillna("")
    row_counts = [
        CountRow("property rows read", rows_read, 0),
        CountRow("dropped: unused properties", unused_properties),
        CountRow("dropped: after the cutoff, when validation starts", after_cutoff),
        CountRow("dropped: items without sessions", unknown_items),
        CountRow("dropped: replaced by a later value before the cutoff", len(values) - len(last)),
        CountRow("kept: values of items", len(last)),
        CountRow("items with sessions", len(items), 0),
        CountRow("without any known property", int((items == "").all(axis=1).sum())),
    ]
    return items.rename_axis("itemid").rename_axis(columns=None).reset_index(), row_counts


def _align_ground_truth(path: Path, rows: pd.DataFrame, config: SimulationConfig) -> pd.DataFrame:
    """The simulator's probabilities of the kept rows, in the order of the tables (train, val, test)."""
    ground_truth = read_ground_truth(path, config).rename(columns={"visitorid": "sessionid"})
    keys = ["timestamp", "sessionid", "itemid"]
    duplicates = ground_truth.duplicated(keys).to_numpy()
    if duplicates.any():
        row = int(duplicates.argmax())
        raise UserError(f"{cell_location(path, row, 'itemid')}: duplicate row of item {ground_truth['itemid'][row]} "
                        f"for visitor {ground_truth['sessionid'][row]} at that time: remove the file")
    aligned = rows[keys].merge(ground_truth, on=keys, how="left", validate="one_to_one")
    if aligned["p_click"].isna().any():
        row = int(aligned["p_click"].isna().to_numpy().argmax())
        raise UserError(f"{path}: no row for item {rows['itemid'][row]} of visitor {rows['sessionid'][row]}: the file "
                        "belongs to a different log; remove it")
    return aligned

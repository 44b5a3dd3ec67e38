"""Raw RetailRocket logs: the files of the Kaggle dataset `retailrocket/ecommerce-dataset`, step by step.

1. Events that repeat another one cell for cell are dropped.
2. A session is a visitor, or is cut where `--session_gap` minutes pass without an event.
3. One row is one item of one session, at the item's first event there. click = the item was carted or bought in that
   session, then or later; pay = it was bought; so pay implies click. click_time and pay_time say when (empty: never),
   so that features of later rows can leave out what was not known yet.
4. Sessions with fewer than `--min_session` rows (default 2: an episode needs a transition) are dropped.
5. Sessions are ordered by the time of their first row, and cut 6:2:2 by number of rows into train, val and test. No
   session straddles a cut.
6. The item table holds, for each item met, the last value of each property known when the first validation session
   starts. Later values are dropped: nothing of the future leaks. An item without a value has an empty cell.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.csv_reader import ColumnType, read_table
from common.errors import UserError
from common.fileio import read_json
from dataset.simulate import SimulationConfig, config_from_manifest, read_truth
from dataset.tables import (
    NO_EVENT_MS,
    CountRow,
    FeatureTable,
    PreparedDataset,
    find_csv,
    read_with_progress,
    require_memory_for,
)

EVENTS = ("view", "addtocart", "transaction")
PROPERTIES = ("785", "591", "814", "available", "categoryid", "364", "776")
LONG_TAILED = ("364", "776")
TASKS = ({"name": "CTR", "label": "click"}, {"name": "CTCVR", "label": "pay"})
EVENT_SCHEMA: dict[str, ColumnType] = {"timestamp": "id", "visitorid": "id", "event": "text", "itemid": "id",
                                "transactionid": "optional_id"}
PROPERTY_SCHEMA: dict[str, ColumnType] = {"timestamp": "id", "itemid": "id", "property": "text", "value": "optional_text"}
MIN_SESSION_ROWS = 2
EVENT_BYTES, PROPERTY_BYTES = 8.0, 1.0  # of memory a byte of CSV, measured; properties are read piece by piece


def load_raw(raw: Path, session_gap: float, min_session: int) -> PreparedDataset:
    """Read the folder `raw` of events.csv, item_properties*.csv and, if there, category_tree.csv (each may be .gz).

    Raises UserError where a file is missing or a cell is bad (named by file, line and column).
    """
    event_file = find_csv(raw, "events", "the Kaggle files")
    property_files = sorted(path for path in raw.iterdir() if path.name.startswith("item_properties")
                            and path.name.endswith((".csv", ".csv.gz")))
    if not property_files:
        raise UserError(f"{raw}: no item_properties*.csv: Kaggle has item_properties_part1.csv and _part2.csv")
    tree_file = next((path for path in raw.glob("category_tree.csv*") if path.suffix in (".csv", ".gz")), None)

    require_memory_for({event_file: EVENT_BYTES, **dict.fromkeys(property_files, PROPERTY_BYTES)})
    table, row_counts = _build_rows(_read_events(event_file), session_gap, min_session)
    split_offsets, train_end_ms = _split_by_time(table)
    items, item_account = _item_features(property_files, np.unique(table["itemid"]), train_end_ms)
    row_counts += item_account
    if tree_file is not None:
        row_counts += _tree_account(tree_file, items)
    settings, truth_file = raw / "simulation.json", raw / "truth.csv"
    simulation = read_json(settings) if os.path.lexists(settings) else None
    size = config_from_manifest(simulation, settings) if simulation is not None else None
    if size is None and truth_file.exists():
        raise UserError(f"{truth_file}: truth of a simulated log, but there is no simulation.json: remove the file")
    return PreparedDataset(
        source="RetailRocket, simulated" if size else "RetailRocket",
        rows=table, split_offsets=split_offsets, train_end_ms=train_end_ms, row_counts=row_counts,
        inputs=[event_file, *property_files, *([tree_file] if tree_file else [])],
        feature_tables={"item_feadf.csv": FeatureTable("itemid", items)}, context=[], long_tailed=list(LONG_TAILED),
        tasks=list(TASKS), simulation=simulation,
        ground_truth=_align_ground_truth(truth_file, table, size) if size and truth_file.exists() and not session_gap else None)


def _read_events(path: Path) -> pd.DataFrame:
    chunks: list[pd.DataFrame] = []
    for chunk in read_with_progress(path, EVENT_SCHEMA):
        chunk["event"] = pd.Index(EVENTS).get_indexer(pd.Index(chunk["event"])).astype(np.int8)
        bad = chunk["event"].to_numpy() < 0
        if bad.any():
            line = sum(map(len, chunks)) + int(bad.argmax()) + 2
            raise UserError(f"{path}, row {line - 1} (about line {line}), column 'event': not one of "
                            f"{', '.join(EVENTS)}: is this the RetailRocket layout?")
        chunks.append(chunk)
    events = pd.concat(chunks, ignore_index=True)
    if events.empty:
        raise UserError(f"{path}: no rows below the header: is it the right file?")
    return events


def _build_rows(events: pd.DataFrame, session_gap: float, min_session: int) -> tuple[pd.DataFrame, list[CountRow]]:
    """Steps 1 to 4: the MDP rows in order of session start, session, time; and the account of the events."""
    # One order for any order of the file: visitor, time, kind (a view before its cart), item.
    order = np.lexsort((events["transactionid"], events["itemid"], events["event"], events["timestamp"],
                        events["visitorid"]))
    time, visitor, kind, item = (events[name].to_numpy()[order]
                                 for name in ("timestamp", "visitorid", "event", "itemid"))
    transaction = events["transactionid"].fillna(-1).to_numpy()[order]
    same = np.ones(len(order), bool)
    same[0] = False
    for column in (time, visitor, kind, item, transaction):
        same[1:] &= column[1:] == column[:-1]
    time, visitor, kind, item = (column[~same] for column in (time, visitor, kind, item))

    starts = np.ones(len(time), bool)
    starts[1:] = visitor[1:] != visitor[:-1]
    if session_gap:
        starts[1:] |= np.diff(time) > session_gap * 60_000
    session = np.cumsum(starts) - 1  # (E,) a running number

    # One row a (session, item): the first event in time gives the row, the others its labels.
    by_item = np.lexsort((np.arange(len(time)), item, session))
    first = np.ones(len(time), bool)
    first[1:] = (session[by_item][1:] != session[by_item][:-1]) | (item[by_item][1:] != item[by_item][:-1])
    group_starts = np.flatnonzero(first)
    first_event = by_item[group_starts]
    cart_time = np.where(kind >= 1, time, NO_EVENT_MS)[by_item]
    purchase_time = np.where(kind == 2, time, NO_EVENT_MS)[by_item]
    rows = pd.DataFrame({
        "timestamp": time[first_event],
        "sessionid": session[first_event] if session_gap else visitor[first_event],
        "itemid": item[first_event],
        "click_time": np.minimum.reduceat(cart_time, group_starts),
        "pay_time": np.minimum.reduceat(purchase_time, group_starts),
        "events": np.diff(np.append(group_starts, len(time))),
        "session_index": session[first_event],
        "event": first_event,  # keeps ties in order
    })
    rows["click"] = (rows["click_time"] != NO_EVENT_MS).astype(np.int8)
    rows["pay"] = (rows["pay_time"] != NO_EVENT_MS).astype(np.int8)

    lengths = np.bincount(rows["session_index"])
    kept = lengths[rows["session_index"]] >= min_session
    table = rows[kept].copy()
    if table.empty:
        raise UserError(f"no session has {min_session} items or more: nothing to learn from (see --min_session)")
    first_time = np.full(len(lengths), NO_EVENT_MS)
    np.minimum.at(first_time, table["session_index"], table["timestamp"])
    table["start"] = first_time[table["session_index"]]
    table = table.iloc[np.lexsort((table["event"], table["timestamp"], table["session_index"], table["start"]))]
    merged = int(table["events"].sum()) - len(table)
    short = rows.loc[~kept]
    row_counts = [
        CountRow("events read", len(order), 0),
        *[CountRow(name, int((events["event"] == code).sum()), 2) for code, name in enumerate(EVENTS)],
        CountRow("dropped: the same in every cell as another", int(same.sum())),
        CountRow(f"dropped: in the {short['session_index'].nunique():,} sessions of fewer than {min_session} items",
             int(short["events"].sum())),
        CountRow("merged: later events of an item already met in the session", merged),
        CountRow("kept: rows, one an item of a session", len(table)),
    ]
    return table.reset_index(drop=True), row_counts


def _split_by_time(table: pd.DataFrame) -> tuple[list[int], int]:
    """Step 5: the row numbers of the cuts (0, a, b, rows), and the time at which validation starts."""
    starts = np.flatnonzero(np.append(True, np.diff(table["session_index"]) != 0))  # first row of each session
    split_offsets = [0, *(int(starts[min(int(np.searchsorted(starts, share * len(table))), len(starts) - 1)])
                 for share in (0.6, 0.8)), len(table)]
    if not split_offsets[0] < split_offsets[1] < split_offsets[2] < split_offsets[3]:
        raise UserError(f"the {len(starts)} sessions that are left ({len(table)} rows) cannot be cut 6:2:2 into train, "
                        "val and test: more of the log is needed")
    return split_offsets, int(table["timestamp"].iloc[split_offsets[1]])


def _item_features(paths: Iterable[Path], met: NDArray[np.int64], train_end_ms: int) -> tuple[pd.DataFrame, list[CountRow]]:
    """Step 6: the last value of each property of the items `met`, known at `boundary`; and the account of the rows."""
    read = other = late = unknown_items = 0
    found: list[pd.DataFrame] = []
    for path in paths:
        for chunk in read_with_progress(path, PROPERTY_SCHEMA):
            used = chunk["property"].isin(PROPERTIES).to_numpy()
            known = chunk["timestamp"].to_numpy() <= train_end_ms
            ours = np.isin(chunk["itemid"].to_numpy(), met)
            found.append(chunk[used & known & ours])
            # Each dropped row is counted once, by the first rule that drops it.
            read += len(chunk)
            other += int((~used).sum())
            late += int((used & ~known).sum())
            unknown_items += int((used & known & ~ours).sum())
    values = pd.concat(found, ignore_index=True)
    # Of two values at the same time the larger text wins: one result for any order of the files.
    values = values.sort_values(["itemid", "property", "timestamp", "value"], kind="stable")
    last = values.drop_duplicates(["itemid", "property"], keep="last")
    wide = last.pivot(index="itemid", columns="property", values="value")
    items = wide.reindex(index=met, columns=list(PROPERTIES)).astype(object).fillna("")
    items_without_properties = int((items == "").all(axis=1).sum())
    row_counts = [
        CountRow("property rows read", read, 0),
        CountRow("dropped: of properties that are not used", other),
        CountRow("dropped: written after the train/val boundary", late),
        CountRow("dropped: of items that no kept session meets", unknown_items),
        CountRow("dropped: replaced by a later value before the boundary", len(values) - len(last)),
        CountRow("kept: values of items", len(last)),
        CountRow("items met", len(items), 0),
        CountRow("without any known property", items_without_properties),
    ]
    return items.rename_axis("itemid").rename_axis(columns=None).reset_index(), row_counts


def _tree_account(path: Path, items: pd.DataFrame) -> list[CountRow]:
    """The category tree is checked and counted; the tables do not use it."""
    tree = read_table(path, {"categoryid": "id", "parentid": "optional_id"})
    known = set(tree["categoryid"].astype(str))
    used = {value for value in items["categoryid"] if value}
    return [
        CountRow("categories in the tree (not used by the tables)", len(tree), 0),
        CountRow("categories of items", len(used)),
        CountRow("of these not in the tree", len(used - known)),
    ]


def _align_ground_truth(path: Path, table: pd.DataFrame, size: SimulationConfig) -> pd.DataFrame:
    """The simulator's probabilities of the kept rows, in the order of the tables (train, val, test)."""
    truth = read_truth(path, size).rename(columns={"visitorid": "sessionid"})
    keys = ["timestamp", "sessionid", "itemid"]
    twice = truth.duplicated(keys).to_numpy()
    if twice.any():
        row = int(twice.argmax())
        raise UserError(f"{path}, row {row + 1} (about line {row + 2}), column 'itemid': {truth['itemid'][row]} stands "
                        f"there twice for visitor {truth['sessionid'][row]} at that time: remove the file")
    aligned = table[keys].merge(truth, on=keys, how="left", validate="one_to_one")
    if aligned["p_click"].isna().any():
        row = int(aligned["p_click"].isna().to_numpy().argmax())
        raise UserError(f"{path}: has no row for item {table['itemid'][row]} of visitor {table['sessionid'][row]}: "
                        "it belongs to another log; remove it")
    return aligned

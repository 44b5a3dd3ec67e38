"""A slow, independent reference of `dataset.retailrocket`, to compare MDP tables with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

EVENTS = ("view", "addtocart", "transaction")
SPLITS = ("train", "val", "test")
EventRow = tuple[int, int, str, int, Any]  # timestamp, visitorid, event, itemid, transactionid


class Row(NamedTuple):
    """A row of the MDP tables."""

    timestamp: int
    sessionid: int
    itemid: int
    pay: int
    click: int
    click_time: int | None
    pay_time: int | None


def reference_rows(events: Sequence[EventRow], session_gap: float = 0.0,
                   min_session: int = 2) -> list[list[Row]] | None:
    """Steps 1 to 5 of `dataset.retailrocket` with plain loops; None if three splits cannot be cut."""
    ordered = sorted(set(events), key=lambda e: (e[1], e[0], EVENTS.index(e[2]), e[3], e[4] or -1))
    sessions: list[list[EventRow]] = []
    for event in ordered:
        last = sessions[-1][-1] if sessions else None
        if last is None or last[1] != event[1] or (session_gap and event[0] - last[0] > session_gap * 60_000):
            sessions.append([])
        sessions[-1].append(event)

    kept: list[list[Row]] = []
    for number, session in enumerate(sessions):
        rows = []
        for item in dict.fromkeys(event[3] for event in session):
            own = [event for event in session if event[3] == item]
            clicks = [event[0] for event in own if event[2] != "view"]
            purchases = [event[0] for event in own if event[2] == "transaction"]
            rows.append(Row(own[0][0], number if session_gap else own[0][1], item, int(bool(purchases)),
                            int(bool(clicks)), min(clicks, default=None), min(purchases, default=None)))
        if len(rows) >= min_session:
            kept.append(rows)
    kept.sort(key=lambda rows: rows[0].timestamp)  # stable: ties by visitor

    total = sum(map(len, kept))
    split_offsets = []
    for tenths in (6, 8):  # the first session that starts at or after the fraction of the rows, else the last one
        before = [sum(map(len, kept[:n])) for n in range(len(kept))]
        split_offsets.append(next((n for n, rows in enumerate(before) if 10 * rows >= tenths * total), len(kept) - 1))
    parts = [kept[: split_offsets[0]], kept[split_offsets[0]: split_offsets[1]], kept[split_offsets[1]:]]
    return [[row for rows in part for row in rows] for part in parts] if kept and all(parts) else None


def read_rows(folder: Path) -> list[list[Row]]:
    """The rows of train.csv, val.csv and test.csv."""
    return [[Row(*(int(cell) if cell else None for cell in line.split(",")))  # type: ignore[arg-type]
             for line in (folder / f"{split}.csv").read_text().splitlines()[1:]] for split in SPLITS]


def assert_row_counts_add_up(folder: Path) -> None:
    row_counts = json.loads((folder / "manifest.json").read_text())["row_counts"]
    starts = [number for number, (label, _) in enumerate(row_counts) if label in ("events read", "property rows read")]
    assert len(starts) == 2
    ends = [starts[1], next(number for number, (label, _) in enumerate(row_counts) if label == "items with sessions")]
    for start, end in zip(starts, ends, strict=True):
        parts = [rows for label, rows in row_counts[start + 1:end] if label.startswith(("dropped", "merged", "kept"))]
        assert row_counts[start][1] == sum(parts)
    assert sum(rows for label, rows in row_counts if label in EVENTS) == row_counts[0][1]

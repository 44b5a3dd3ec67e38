"""A plain, slow reader of CSV files, to compare the fast reader with; independent of pandas, numpy and the code."""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
END = "\x01 the end \x01"


class ReferenceTable(NamedTuple):
    """A table as read, or what is wrong with it."""

    rows: list[dict[str, Any]]  # without problems all of them; None for an optional number that is missing
    problems: list[tuple[int, str]]  # line (0: the whole file) and column of each bad cell, in order
    blank_lines: int = 0
    na_cells: int = 0  # optional ids that are blank, or NULL in words


def unreadable(line: int = 0, column: str = "") -> ReferenceTable:
    return ReferenceTable([], [(line, column)])


def read(content: bytes, gzipped: bool, kinds: Mapping[str, str], optional: Sequence[str] = (),
         empty: bool = False) -> ReferenceTable:
    """Read a CSV file of columns of these types (`common.csv_reader.ColumnType`); `empty`: a header is enough."""
    if gzipped:
        try:
            content = gzip.decompress(content)
        except Exception:
            return unreadable()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return unreadable()
    # A row of its own behind the last one: a quote that never ends swallows it.
    raw: list[str] = []
    lines = csv.reader(raw.append(one) or one for one in io.StringIO(
        text + ("" if text.endswith(("\n", "\r")) else "\n") + END + "\n", newline=""))
    header = next(lines)
    if header == [END] or not any(header):
        return unreadable()
    if len(set(header)) < len(header) or any("\0" in name for name in header):
        return unreadable(1)
    if [name for name in kinds if name not in header and name not in optional]:
        return unreadable(1)
    rows: list[dict[str, Any]] = []
    problems: list[tuple[int, str]] = []
    blank_lines = na_cells = 0
    start, cells = lines.line_num + 1, header
    for cells in lines:
        line, start = start, lines.line_num + 1
        if cells == [END]:
            break
        if not cells or (len(cells) == 1 and '"' not in raw[-1] and not cells[0].strip(" \t")):
            blank_lines += 1
            continue
        if len(cells) != len(header):
            problems.append((line, header[min(len(cells), len(header) - 1)]))
            continue
        row = {}
        for name, cell in zip(header, cells, strict=True):
            if "\0" in cell:
                problems.append((line, name))
            elif name in kinds:
                good, row[name] = value_of(cell, kinds[name])
                if not good:
                    problems.append((line, name))
                na_cells += kinds[name] == "optional_id" and row[name] is None and cell != ""
        rows.append(row)
    else:
        problems.append((start, ""))  # END was swallowed
    if not rows and not problems and not empty:
        return unreadable()
    return ReferenceTable([] if problems else rows, problems, blank_lines, na_cells)


def value_of(cell: str, kind: str) -> tuple[bool, Any]:
    """Whether a cell is of its kind, and its value."""
    if kind == "optional_text":
        return True, cell
    if kind == "text":
        return cell != "", cell
    cell = cell.strip(" \t\v\f")
    if kind == "optional_id" and cell in ("", "NULL", "null", "NA", "NaN", "nan"):
        return True, None
    if not NUMBER.fullmatch(cell):
        return False, None
    exact = Decimal(cell)
    if kind == "label":
        return float(cell) in (0.0, 1.0), abs(float(cell))
    if kind == "number":
        return math.isfinite(float(cell)), float(cell)
    if abs(exact) >= 2**53 or float(cell) != math.floor(float(cell)):
        return False, None
    return True, int(float(cell))


def session_features(rows: list[dict[str, Any]], labels: Sequence[str]) -> list[list[float]]:
    """The six numbers of each row of one session, in order of time."""
    features = []
    for t, row in enumerate(rows):
        now, before = row["timestamp"], rows[:t]
        numbers = [math.log(1 + t)]
        lasts = []
        for label in labels:
            if f"{label}_time" in row:
                known = [one[label] == 1 and max(one[f"{label}_time"] or 0, one["timestamp"]) < now for one in before]
            else:
                known = [one[label] == 1 for one in before]
            numbers.append(sum(known) / (t + 1))
            lasts.append(float(bool(known) and known[-1]))
        gap = (now - rows[t - 1]["timestamp"]) / 1000 if t else 0.0
        features.append([*numbers, *lasts, math.log(1 + gap) / 10])
    return features


def normalize_category(text: str) -> str:
    """A categorical value without the blanks around it, or the .0 of a whole number."""
    text = text.strip()
    return text[:-2] if text.endswith(".0") and text[:-2].lstrip("-").isdigit() else text


# -------------------------------------------------------------------------------------- RetailRocket events to MDP rows

EventRow = tuple[int, int, str, int, Any]  # timestamp, visitorid, event, itemid, transactionid
EVENT_ORDER = ("view", "addtocart", "transaction")


class PreparedRow(NamedTuple):
    """A row of the MDP tables."""

    timestamp: int
    sessionid: int
    itemid: int
    pay: int
    click: int
    click_time: int | None
    pay_time: int | None


def prepare_rows(events: Sequence[EventRow], session_gap: float = 0.0,
                 min_session: int = 2) -> list[list[PreparedRow]] | None:
    """The rows of train, val and test that `dataset.prepare` makes of these events; None if there are too few."""
    ordered = sorted(set(events), key=lambda e: (e[1], e[0], EVENT_ORDER.index(e[2]), e[3], e[4] or -1))
    sessions: list[list[EventRow]] = []
    for event in ordered:
        last = sessions[-1][-1] if sessions else None
        if last is None or last[1] != event[1] or (session_gap and event[0] - last[0] > session_gap * 60_000):
            sessions.append([])
        sessions[-1].append(event)

    kept: list[list[PreparedRow]] = []
    for number, session in enumerate(sessions):
        rows = []
        for item in dict.fromkeys(event[3] for event in session):
            own = [event for event in session if event[3] == item]
            clicks = [event[0] for event in own if event[2] != "view"]
            buys = [event[0] for event in own if event[2] == "transaction"]
            rows.append(PreparedRow(own[0][0], number if session_gap else own[0][1], item, int(bool(buys)),
                                    int(bool(clicks)), min(clicks, default=None), min(buys, default=None)))
        if len(rows) >= min_session:
            kept.append(rows)
    kept.sort(key=lambda rows: rows[0].timestamp)  # stable: ties by visitor

    total = sum(map(len, kept))
    split_offsets = []
    for tenths in (6, 8):  # the first session that begins at or after the share of the rows, else the last one
        before = [sum(map(len, kept[:n])) for n in range(len(kept))]
        split_offsets.append(next((n for n, rows in enumerate(before) if 10 * rows >= tenths * total), len(kept) - 1))
    parts = [kept[: split_offsets[0]], kept[split_offsets[0]: split_offsets[1]], kept[split_offsets[1]:]]
    return [[row for rows in part for row in rows] for part in parts] if kept and all(parts) else None


def read_prepared_rows(folder: Path) -> list[list[PreparedRow]]:
    """The rows of train, val and test as they are on disk."""
    return [[PreparedRow(*(int(cell) if cell else None for cell in line.split(",")))  # type: ignore[arg-type]
             for line in (folder / f"{split}.csv").read_text().splitlines()[1:]]
            for split in ("train", "val", "test")]

"""The files read once more, as reference_reader and slowly as can be: what a fast reader says must agree with this.

Nothing here knows pandas, numpy or the readers of `dataset.files`.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
END = "\x01 the end \x01"


class Plain(NamedTuple):
    """A table as read, or what is wrong with it."""

    rows: list[dict[str, Any]]  # without problems all of them; None for an optional number that is missing
    problems: list[tuple[int, str]]  # line (0: the whole file) and column of each bad cell, in order
    blank_lines: int = 0
    words: int = 0  # optional ids that are blank, or NULL in words


def whole(line: int = 0, column: str = "") -> Plain:
    return Plain([], [(line, column)])


def read(content: bytes, gzipped: bool, kinds: Mapping[str, str], optional: Sequence[str] = (),
         empty: bool = False) -> Plain:
    """Read a CSV file of columns of the given kinds (those of `dataset.files`); it may be `empty` but for its header.
    """
    if gzipped:
        try:
            content = gzip.decompress(content)
        except Exception:
            return whole()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return whole()
    # A row of its own behind the last one: a quote that never ends swallows it.
    raw: list[str] = []
    lines = csv.reader(raw.append(one) or one for one in io.StringIO(
        text + ("" if text.endswith(("\n", "\r")) else "\n") + END + "\n", newline=""))
    header = next(lines)
    if header == [END] or not any(header):
        return whole()
    if len(set(header)) < len(header) or any("\0" in name for name in header):
        return whole(1)
    if [name for name in kinds if name not in header and name not in optional]:
        return whole(1)
    rows: list[dict[str, Any]] = []
    problems: list[tuple[int, str]] = []
    blank_lines = words = 0
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
                words += kinds[name] == "optional_id" and row[name] is None and cell != ""
        rows.append(row)
    else:
        problems.append((start, ""))  # END was swallowed
    if not rows and not problems and not empty:
        return whole()
    return Plain([] if problems else rows, problems, blank_lines, words)


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


def spelling(text: str) -> str:
    """A categorical value without the blanks around it, or the .0 of a whole number."""
    text = text.strip()
    return text[:-2] if text.endswith(".0") and text[:-2].lstrip("-").isdigit() else text

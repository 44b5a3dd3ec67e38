"""CSV files, every cell checked: a bad cell is named by file, line and column; repairs are counted and printed."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import itertools
import re
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from common.errors import UserError, truncate
from common.fileio import require_regular_file, write_text

csv.field_size_limit(2**31 - 1)  # a cell may be long; the default of 128 KiB would hide the error behind it


ColumnType = Literal["id", "optional_id", "label", "number", "text", "optional_text"]
CellError = tuple[int, str, str]  # line, column, what is wrong
WHITESPACE = " \t\v\f"  # around a number, as pandas leaves them out
NA_VALUES = ("NULL", "null", "NA", "NaN", "nan")  # an optional id that is not there, in words
BOOLEAN_STRINGS = ("True", "TRUE", "true", "False", "FALSE", "false")  # pandas would read a column of them as 1 and 0
MAX_EXACT_INT = 2**53  # the largest integer up to which a float64, hence "1.44E+12", is exact


def log_repairs(path: Path, count: int, what: str) -> None:
    """Say what was put right in a file while it was read: nothing is repaired in silence."""
    if count:
        print(f"{path}: repaired: {count:,} {what}")


def normalize_category(value: str) -> str:
    """A category without blanks around it, and 12 for the 12.0 that spreadsheets make of it."""
    value = value.strip()
    return value[:-2] if value.endswith(".0") and value[:-2].lstrip("-").isdigit() else value


def count_lines(path: Path) -> int:
    """How many lines a file has, without reading it whole."""
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def read_table(path: Path, columns: Mapping[str, ColumnType], optional: Sequence[str] = ()) -> pd.DataFrame:
    """Read a CSV file (plain or .gz) whole; see `read_chunks`. Raises UserError where it has no rows."""
    table = pd.concat(list(read_chunks(path, columns, optional, chunk_rows=None)), ignore_index=True)
    if table.empty:
        raise UserError(f"{path}: no rows below the header: is it the right file?")
    return table


def read_chunks(
    path: Path, columns: Mapping[str, ColumnType], optional: Sequence[str] = (), chunk_rows: int | None = 2_000_000
) -> Iterator[pd.DataFrame]:
    """Yield the named columns of a CSV file in tables of `chunk_rows` rows, every cell checked.

    ColumnTypes: `id` a whole number below 2^53 (`12`, `12.0`, `1.44E+12`), int64; `optional_id` the same or empty, float64;
    `label` 0 or 1, float32; `number` finite, float64; `text` not empty; `optional_text` empty becomes "".
    Columns in `optional` may be absent from the file. Other columns of the file are not read.

    Repairs, counted and shown: blank lines are left out; `optional_id` takes NULL, NA, nan and blanks for empty.
    Raises UserError naming file, line and column for whatever does not fit.
    """
    header = _read_header(path)
    missing = [name for name in columns if name not in header and name not in optional]
    if missing:
        near = difflib.get_close_matches(missing[0], [name for name in header if name not in columns], n=1)
        hint = f"; is '{near[0]}' misspelt?" if near else ""
        there = ", ".join(header)
        raise UserError(f"{path}, line 1: column '{missing[0]}' is missing (there are: "
                        f"{there if len(there) <= 400 else there[:397] + '...'}){hint}")
    schema = {name: kind for name, kind in columns.items() if name in header}
    numbers = [name for name, kind in schema.items() if kind in ("id", "label", "number")]
    texts = [name for name in schema if name not in numbers]
    options: dict[str, Any] = {
        # Every column is parsed, also those nobody asked for: a row with too many cells must not shift unnoticed.
        "dtype": {name: "float64" if name in numbers else object if name in texts else "category" for name in header},
        "na_values": {name: ["", *NA_VALUES, *BOOLEAN_STRINGS] for name in numbers},
        "keep_default_na": False,
        "index_col": False,
        "encoding": "utf-8-sig",
    }
    rows = words = 0
    try:
        if _first_row_width(path) > len(header):  # the empty ones of these would be cut off in silence
            raise _locate_error(path, header, schema)
        with pd.read_csv(path, chunksize=chunk_rows or sys.maxsize, **options) as reader:
            while (chunk := _next_chunk(reader)) is not None:
                rows += len(chunk)
                checked = _cast_columns(chunk, schema)
                if checked is None:
                    raise _locate_error(path, header, schema)
                words += sum(int((checked[name].isna() & (chunk[name] != "")).sum())
                             for name, kind in schema.items() if kind == "optional_id")
                yield checked
        blank_lines = _count_blank_lines(path, rows, len(header))
        if blank_lines is None:
            raise _locate_error(path, header, schema)
    except UserError:
        raise
    except (ValueError, OverflowError, OSError, EOFError, zlib.error, csv.Error, pd.errors.ParserWarning) as error:
        raise _locate_error(path, header, schema, error) from error
    log_repairs(path, blank_lines, "blank lines left out")
    log_repairs(path, words, "cells taken for empty that say NULL, NA or nan, or are blank")


def _next_chunk(reader: Any) -> pd.DataFrame | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # the first row is longer than the header
        return next(reader, None)


def _count_blank_lines(path: Path, rows: int, cells: int) -> int | None:
    """Look at the bytes once more: how many lines are blank; None where a row ends early, which pandas fills up in
    silence, or a byte is NUL. Longer rows were refused, so commas tell."""
    commas = lines = 0
    quoted, last = False, b"\n"
    with _open_maybe_gzip(path, "rb") as file:
        while block := file.read(1 << 24):
            if b"\0" in block:
                return None
            quoted = quoted or b'"' in block
            commas += block.count(b",")
            lines += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
            lines -= last == b"\r" and block[:1] == b"\n"
            last = block[-1:]
    if not quoted:
        return lines + (last not in b"\r\n") - (rows + 1) if commas == (rows + 1) * (cells - 1) else None
    blank = 0
    with _open_maybe_gzip(path, "rt") as file:  # commas inside quotes: count cells instead
        for _, row in _iter_rows(file):
            if not row:
                blank += 1
            elif len(row) != cells:
                return None
    return blank


def _iter_rows(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The line on which each row begins, and its cells; none where the line is blank, which pandas leaves out."""
    raw = ""

    def lines() -> Iterator[str]:
        nonlocal raw
        for raw in file:  # noqa: UP028 -- what the row was made of is looked at below
            yield raw

    reader, end = csv.reader(lines()), 0
    for row in reader:
        line, end = end + 1, reader.line_num
        yield line, row if len(row) != 1 or '"' in raw or row[0].strip(" \t") else []


def _open_maybe_gzip(path: Path, mode: Literal["rb", "rt"]) -> Any:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, mode) if mode == "rb" else opener(path, mode, encoding="utf-8-sig", newline="")


def _read_header(path: Path) -> list[str]:
    require_regular_file(path)
    try:
        with _open_maybe_gzip(path, "rt") as file:
            header = next(csv.reader(file), [])
    except UnicodeDecodeError:
        raise _encoding_error(path) from None
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not any(header):
        raise UserError(f"{path}: the file is empty: a CSV header is expected in line 1")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise UserError(f"{path}, line 1: column '{_printable(twice[0])}' stands there {header.count(twice[0])} times")
    if any("\0" in name for name in header):
        raise UserError(f"{path}, line 1: NUL bytes: damaged, or not UTF-8 text: save it as UTF-8 CSV")
    return header


def _first_row_width(path: Path) -> int:
    """The number of cells of the first row, which pandas takes for the width of all."""
    with _open_maybe_gzip(path, "rt") as file:
        return next((len(row) for _, row in itertools.islice(_iter_rows(file), 1, None) if row), 0)


def _encoding_error(path: Path) -> UserError:
    """Say where the first byte is that is not UTF-8."""
    header: list[str] = []
    with _open_maybe_gzip(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            return UserError(f"{path}: not UTF-8 text but gzip: name it {path.name}.gz, or unpack it")
        file.seek(0)
        for number, line in enumerate(file, start=1):
            try:
                header = header or next(csv.reader([line.decode("utf-8-sig")]), [])
                line.decode()
            except UnicodeDecodeError as bad:
                before = next(csv.reader([line[: bad.start].decode()]), [""])
                column = f", column '{header[len(before) - 1]:.40}'" if 0 < len(before) <= len(header) else ""
                return UserError(f"{path}, line {number}{column}: not UTF-8 text ({bad.reason}): save it as UTF-8 CSV")
    return UserError(f"{path}: not UTF-8 text: save it as UTF-8 CSV")


def _cast_columns(chunk: pd.DataFrame, schema: Mapping[str, ColumnType]) -> pd.DataFrame | None:
    """Give each column its final type; None where a cell does not fit its kind."""
    done: dict[str, Any] = {}
    for name, kind in schema.items():
        if kind == "optional_id":
            codes, cells = pd.factorize(chunk[name].to_numpy())
            if any(_cell_error(cell, kind) for cell in cells):
                return None
            done[name] = np.array([np.nan if _is_na(cell) else float(cell) for cell in cells])[codes]
            continue
        values = chunk[name].to_numpy()
        if kind in ("text", "optional_text"):
            if kind == "text" and (values == "").any():
                return None
            done[name] = values
            continue
        if not np.isfinite(values).all():
            return None
        if kind == "id":
            if (values != np.floor(values)).any() or (np.abs(values) >= MAX_EXACT_INT).any():
                return None
            done[name] = values.astype(np.int64)
        elif kind == "label":
            if not np.isin(values, (0.0, 1.0)).all():
                return None
            done[name] = values.astype(np.float32)
        else:
            done[name] = values
    return pd.DataFrame(done, index=chunk.index)


def _locate_error(path: Path, header: list[str], schema: Mapping[str, ColumnType], error: Exception | None = None) -> UserError:
    """Read the file again, slowly, to say which line and column is wrong."""
    try:
        line, column, what = _first_invalid_cell(path, header, schema)
    except UnicodeDecodeError:
        return _encoding_error(path)
    except (OSError, EOFError, zlib.error, csv.Error) as bad:
        return UserError(f"{path}: damaged or cut short: {getattr(bad, 'strerror', None) or bad}")
    if what:
        return UserError(f"{path}, line {line}, column '{_printable(column)}': {what}")
    if "EOF inside string" in str(error):
        return UserError(f"{path}, line {line}, column '{_printable(column)}': cannot be read as CSV: a quote that is "
                         "opened there never ends")
    return UserError(f"{path}, line {line}: cannot be read as CSV: {error}")


def _first_invalid_cell(path: Path, header: list[str], schema: Mapping[str, ColumnType]) -> CellError:
    """The line on which the first bad row begins, the column, and what is wrong; "" where nothing is, of the last."""
    line, row = 1, header
    with _open_maybe_gzip(path, "rt") as file:
        rows = _iter_rows(file)
        next(rows)
        for line, row in rows:
            if not row:
                continue
            if len(row) > len(header):
                return line, header[-1], f"{len(row)} cells, but the header has {len(header)}"
            if len(row) < len(header):
                what = f"the row ends after {len(row)} of {len(header)} cells: is the file cut short?"
                return line, header[len(row)], what
            for name, cell in zip(header, row, strict=True):
                what = "holds NUL bytes: the file is damaged" if "\0" in cell else _cell_error(cell, schema.get(name))
                if what:
                    return line, name, what
    return line, header[max(0, len(row) - 1)], ""


def _cell_error(cell: str, kind: ColumnType | None) -> str:
    """Say what keeps one cell from being of its kind; "" where nothing does."""
    if kind in (None, "optional_text") or (kind == "optional_id" and _is_na(cell)):
        return ""
    if kind == "text":
        return "" if cell else "is empty"
    cell = cell.strip(WHITESPACE)
    if not cell:
        return "is empty: give a number" if kind != "label" else "is empty: a label is 0 or 1"
    try:
        # Python would also read 1_0 and digits of other scripts, which pandas does not.
        value = float(cell) if cell.isascii() and "_" not in cell else float("not a number")
    except ValueError:
        return f"'{_printable(cell)}' is not a number"
    if kind == "label":
        return "" if value in (0.0, 1.0) else f"'{_printable(cell)}' is not a label: 0 or 1"
    if not np.isfinite(value):
        return f"'{_printable(cell)}' is not a finite number"
    if kind in ("id", "optional_id"):
        if value != np.floor(value):
            return f"'{_printable(cell)}' is not a whole number"
        if abs(value) >= MAX_EXACT_INT:
            return f"'{_printable(cell)}' is too large for an id (2^53 and more)"
    return ""


def _is_na(cell: str) -> bool:
    return cell.strip(WHITESPACE) in ("", *NA_VALUES)


def _printable(cell: str) -> str:
    return truncate(re.sub(r"[^\x20-\x7e]", "?", cell), 40)



def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file; its columns are those of all rows, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_csv_rows(path: Path, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """Read what `write_csv` wrote, at least these columns, cells as they stand. Raises UserError."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file, strict=True)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {getattr(error, 'strerror', None) or error}") from error
    lost = [name for name in columns if name not in header]
    if lost:
        raise UserError(f"{path}, line 1: column '{lost[0]}' is missing")
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise UserError(f"{path}, line {number}: {len(line)} cells, but the header has {len(header)}: is the file "
                            "cut short?")
    return [dict(zip(header, line, strict=True)) for line in lines]

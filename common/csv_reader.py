"""CSV files: each cell is checked; errors name file, line and column, repairs are counted and printed."""

from __future__ import annotations

import contextlib
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

import duckdb
import numpy as np
import pandas as pd

from common.errors import UserError, truncate
from common.fileio import require_regular_file, write_text

csv.field_size_limit(2**31 - 1)  # a cell may exceed the default of 128 KiB

ColumnType = Literal["id", "optional_id", "label", "number", "optional_number", "text", "optional_text"]
InvalidCell = tuple[int, str, str]  # line, column, problem
WHITESPACE = " \t\v\f"  # ignored around a number, as by pandas
NA_VALUES = ("NULL", "null", "NA", "NaN", "nan")  # an optional id or number that is missing
BOOLEAN_STRINGS = ("True", "TRUE", "true", "False", "FALSE", "false")  # pandas reads a column of them as 1 and 0
MAX_FLOAT32 = float(np.finfo(np.float32).max)
OPTIONAL_NUMBERS = ("optional_id", "optional_number")
MAX_EXACT_INT = 2**53  # the largest integer up to which a float64, hence "1.44E+12", is exact


def log_repairs(path: Path, count: int, repair: str) -> None:
    """Print how many cells or rows were repaired while a file was read."""
    if count:
        print(f"{path}: repaired: {count:,} {repair}")


def cell_location(path: Path, row: int, column: str) -> str:
    """The location of a cell of a table that `read_table` read, as messages name it; `row` counts from 0.

    The file is read again: blank lines and cells of several lines shift the line.
    """
    with _open_maybe_gzip(path, "rt") as file:
        lines = (line for line, cells in itertools.islice(_iter_rows(file), 1, None) if cells)
        return f"{path}, line {next(itertools.islice(lines, row, None))}, column '{column}'"


def normalize_category(value: str) -> str:
    """Strip whitespace around a category, and the ".0" that spreadsheets add to whole numbers."""
    value = value.strip()
    return value[:-2] if value.endswith(".0") and value[:-2].lstrip("-").isdigit() else value


def count_lines(path: Path) -> int:
    """The number of lines of a file, read in blocks."""
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def read_table(path: Path, columns: Mapping[str, ColumnType], optional: Sequence[str] = ()) -> pd.DataFrame:
    """Read a whole CSV file (plain or .gz); see `read_chunks`. Raises UserError if it has no rows."""
    return concat_rows(path, read_chunks(path, columns, optional, chunk_rows=None))


def concat_rows(path: Path, chunks: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """The rows of all chunks of `path`. Raises UserError if there are none."""
    table = pd.concat(list(chunks), ignore_index=True)
    if table.empty:
        raise UserError(f"{path}: no rows below the header: is it the right file?")
    return table


def read_chunks(
    path: Path, columns: Mapping[str, ColumnType], optional: Sequence[str] = (), chunk_rows: int | None = 2_000_000
) -> Iterator[pd.DataFrame]:
    """Yield the given columns of a CSV file in tables of `chunk_rows` rows.

    Column types: `id` a whole number below 2^53 (`12`, `12.0`, `1.44E+12`), int64; `optional_id` the same or empty,
    float64; `label` 0 or 1, float32; `number` finite, float64; `optional_number` empty, or finite and in the range of
    float32, float64; `text` not empty; `optional_text` text, may be empty.
    Columns in `optional` may be missing from the file. Further columns of the file are ignored.

    Repairs, counted and printed: blank lines are skipped; NULL, NA, nan and blank cells of an `optional_id` or
    `optional_number` are empty.
    Raises UserError naming file, line and column of an invalid cell.
    """
    header = read_header(path)
    require_columns(f"{path}, line 1", header, columns, optional)
    schema = {name: column_type for name, column_type in columns.items() if name in header}
    numeric = [name for name, column_type in schema.items() if column_type in ("id", "label", "number")]
    texts = [name for name in schema if name not in numeric]
    options: dict[str, Any] = {
        # The ignored columns are parsed too: a row with too many cells would otherwise shift unnoticed.
        "dtype": {name: "float64" if name in numeric else object if name in texts else "category" for name in header},
        "na_values": {name: ["", *NA_VALUES, *BOOLEAN_STRINGS] for name in numeric},
        "keep_default_na": False,
        "index_col": False,
        "encoding": "utf-8-sig",
    }
    rows = na_cells = 0
    try:
        if _first_row_width(path) > len(header):  # pandas would drop extra empty cells silently
            raise _locate_error(path, header, schema)
        with pd.read_csv(path, chunksize=chunk_rows or sys.maxsize, **options) as reader:
            while (chunk := _next_chunk(reader)) is not None:
                rows += len(chunk)
                checked = _cast_columns(chunk, schema)
                if checked is None:
                    raise _locate_error(path, header, schema)
                na_cells += sum(int((checked[name].isna() & (chunk[name] != "")).sum())
                                for name, column_type in schema.items() if column_type in OPTIONAL_NUMBERS)
                yield checked
        blank_lines = _count_blank_lines(path, rows, len(header))
        if blank_lines is None:
            raise _locate_error(path, header, schema)
    except UserError:
        raise
    except (ValueError, OverflowError, OSError, EOFError, zlib.error, csv.Error, pd.errors.ParserWarning) as error:
        raise _locate_error(path, header, schema, error) from error
    log_repairs(path, blank_lines, "blank lines skipped")
    log_repairs(path, na_cells, "NULL, NA, nan or blank cells read as empty")


def require_columns(where: str, header: Sequence[str], columns: Iterable[str], optional: Sequence[str] = ()) -> None:
    """Raise UserError, beginning with `where`, if one of `columns` is not in a header, unless it is optional."""
    columns = list(columns)
    missing = [name for name in columns if name not in header and name not in optional]
    if not missing:
        return
    if not set(columns) & set(header) and any(map(_is_number, header)):
        raise UserError(f"{where}: a row, not a header ({truncate(','.join(header))}): write the names of the columns "
                        f"into a line above it: {','.join(columns)}")
    suggestion = difflib.get_close_matches(missing[0], [name for name in header if name not in columns], n=1)
    hint = f"; is '{suggestion[0]}' misspelt?" if suggestion else ""
    raise UserError(f"{where}: column '{missing[0]}' is missing (available: {truncate(', '.join(header), 400)}){hint}")


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(np.isfinite(float(text)))
    return False


def _next_chunk(reader: Any) -> pd.DataFrame | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # the first row is longer than the header
        return next(reader, None)


def _count_blank_lines(path: Path, rows: int, cells: int) -> int | None:
    """The number of blank lines, from a second pass over the bytes; None if there is a NUL byte, or a row too short,
    which pandas pads silently. Longer rows were refused before, so the number of commas is enough."""
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
    with _open_maybe_gzip(path, "rt") as file:  # quoted cells may contain commas: count cells instead
        for _, row in _iter_rows(file):
            if not row:
                blank += 1
            elif len(row) != cells:
                return None
    return blank


def _iter_rows(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The first line of each row, and its cells; no cells if the line is blank, which pandas skips."""
    raw = ""

    def lines() -> Iterator[str]:
        nonlocal raw
        for raw in file:  # noqa: UP028 -- the last line is used below
            yield raw

    reader, end = csv.reader(lines()), 0
    for row in reader:
        line, end = end + 1, reader.line_num
        yield line, row if len(row) != 1 or '"' in raw or row[0].strip(" \t") else []


def _open_maybe_gzip(path: Path, mode: Literal["rb", "rt"]) -> Any:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, mode) if mode == "rb" else opener(path, mode, encoding="utf-8-sig", newline="")


def read_header(path: Path) -> list[str]:
    """The names of the columns of a CSV file. Raises UserError if it has none, or one twice."""
    require_regular_file(path)
    try:
        with _open_maybe_gzip(path, "rt") as file:
            header = next(csv.reader(file), [])
    except UnicodeDecodeError:
        raise _encoding_error(path) from None
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{path}: cannot read: {getattr(error, 'strerror', None) or error}") from None
    if not any(header):
        raise UserError(f"{path}: the file is empty: expected a CSV header in line 1")
    duplicates = [name for name in header if header.count(name) > 1]
    if duplicates:
        raise UserError(f"{path}, line 1: duplicate column '{_printable(duplicates[0])}': rename or remove one"
                        + "; or is this a row, not a header?" * _is_number(duplicates[0]))
    if any("\0" in name for name in header):
        raise UserError(f"{path}, line 1: NUL bytes: corrupt, or not UTF-8 text: save it as UTF-8 CSV")
    return header


def _first_row_width(path: Path) -> int:
    """The number of cells of the first row; pandas expects the same of every row."""
    with _open_maybe_gzip(path, "rt") as file:
        return next((len(row) for _, row in itertools.islice(_iter_rows(file), 1, None) if row), 0)


def _encoding_error(path: Path) -> UserError:
    """The error for the first byte that is not UTF-8, with its line and column."""
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
                cells = next(csv.reader([line[: bad.start].decode()]), [""])
                column = f", column '{header[len(cells) - 1]:.40}'" if 0 < len(cells) <= len(header) else ""
                return UserError(f"{path}, line {number}{column}: not UTF-8 text ({bad.reason}): save it as UTF-8 CSV")
    return UserError(f"{path}: not UTF-8 text: save it as UTF-8 CSV")


def _cast_columns(chunk: pd.DataFrame, schema: Mapping[str, ColumnType]) -> pd.DataFrame | None:
    """Cast each column to its type; None if a cell is invalid."""
    columns: dict[str, Any] = {}
    for name, column_type in schema.items():
        if column_type in OPTIONAL_NUMBERS:
            codes, cells = pd.factorize(chunk[name].to_numpy())
            if any(_cell_error(cell, column_type) for cell in cells):
                return None
            columns[name] = np.array([np.nan if _is_na(cell) else float(cell) for cell in cells])[codes]
            continue
        values = chunk[name].to_numpy()
        if column_type in ("text", "optional_text"):
            if column_type == "text" and (values == "").any():
                return None
            columns[name] = values
            continue
        if not np.isfinite(values).all():
            return None
        if column_type == "id":
            if (values != np.floor(values)).any() or (np.abs(values) >= MAX_EXACT_INT).any():
                return None
            columns[name] = values.astype(np.int64)
        elif column_type == "label":
            if not np.isin(values, (0.0, 1.0)).all():
                return None
            columns[name] = values.astype(np.float32)
        else:
            columns[name] = values
    return pd.DataFrame(columns, index=chunk.index)


def _locate_error(path: Path, header: list[str], schema: Mapping[str, ColumnType],
                  error: Exception | None = None) -> UserError:
    """Read the file again, slowly, to find the line and column of an error."""
    try:
        line, column, problem = _first_invalid_cell(path, header, schema)
    except UnicodeDecodeError:
        return _encoding_error(path)
    except (OSError, EOFError, zlib.error, csv.Error) as read_error:
        return UserError(f"{path}: corrupt or cut short: {getattr(read_error, 'strerror', None) or read_error}")
    if not problem and "EOF inside string" in str(error):
        problem = "unterminated quote: is the file cut short?"
    if problem:
        return UserError(f"{path}, line {line}, column '{_printable(column)}': {problem}")
    return UserError(f"{path}, line {line}: cannot read as CSV: {error}")


def _first_invalid_cell(path: Path, header: list[str], schema: Mapping[str, ColumnType]) -> InvalidCell:
    """Line, column and problem of the first invalid row; of the last row, with problem "", if all are valid."""
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
                return line, header[len(row)], f"only {len(row)} of {len(header)} cells: is the file cut short?"
            for name, cell in zip(header, row, strict=True):
                problem = "NUL bytes: the file is corrupt" if "\0" in cell else _cell_error(cell, schema.get(name))
                if problem:
                    return line, name, problem
    return line, header[max(0, len(row) - 1)], ""


def _cell_error(cell: str, column_type: ColumnType | None) -> str:
    """Why a cell is invalid for its column type; "" if it is valid."""
    if column_type in (None, "optional_text") or (column_type in OPTIONAL_NUMBERS and _is_na(cell)):
        return ""
    if column_type == "text":
        return "" if cell else "is empty"
    cell = cell.strip(WHITESPACE)
    if not cell:
        return "is empty: give a number" if column_type != "label" else "is empty: a label is 0 or 1"
    try:
        # Python accepts 1_0 and digits of other scripts, pandas does not.
        value = float(cell) if cell.isascii() and "_" not in cell else float("not a number")
    except ValueError:
        return f"'{_printable(cell)}' is not a number"
    if column_type == "label":
        return "" if value in (0.0, 1.0) else f"'{_printable(cell)}' is not a label: 0 or 1"
    if not np.isfinite(value):
        return f"'{_printable(cell)}' is not a finite number"
    if column_type in ("id", "optional_id"):
        if value != np.floor(value):
            return f"'{_printable(cell)}' is not a whole number"
        if abs(value) >= MAX_EXACT_INT:
            return f"'{_printable(cell)}' is too large for an id (2^53 and more)"
    if column_type == "optional_number" and abs(value) > MAX_FLOAT32:
        return f"'{_printable(cell)}' is too large for a number (3.4e38 and more)"
    return ""


def _is_na(cell: str) -> bool:
    return cell.strip(WHITESPACE) in ("", *NA_VALUES)


def _printable(cell: str) -> str:
    return truncate(re.sub(r"[^\x20-\x7e]", "?", cell), 40)


def scan(con: duckdb.DuckDBPyConnection, path: Path, columns: Mapping[str, ColumnType],
         optional: Sequence[str] = ()) -> duckdb.DuckDBPyRelation:
    """Rows of a CSV file in file order, the given columns, cast, and a column `row` from 0."""
    rows = con.read_csv(str(path), header=True, all_varchar=True, delimiter=",", quotechar='"', escapechar='"')
    require_columns(f"{path}, line 1", rows.columns, columns, optional)
    types = {"id": "DOUBLE::BIGINT", "label": "FLOAT", "optional_text": "VARCHAR", "text": "VARCHAR"}
    quoted = {name: '"' + name.replace('"', '""') + '"' for name in columns if name in rows.columns}
    return rows.project(", ".join([
        "row_number() OVER () - 1 AS row",
        *(f"TRY_CAST({cell} AS DOUBLE) AS {cell}" if columns[name] in (*OPTIONAL_NUMBERS, "number") else
          f"{cell}::{types[columns[name]]} AS {cell}" for name, cell in quoted.items())]))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file; its columns are those of all rows, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_csv_rows(path: Path, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a file of `write_csv` as text cells. Raises UserError if one of `columns` is missing."""
    schema: dict[str, ColumnType] = dict.fromkeys([*columns, *read_header(path)], "optional_text")
    chunks = read_chunks(path, schema, chunk_rows=None)
    return [row for chunk in chunks for row in chunk.to_dict("records")]

"""Tables in CSV and Parquet files: each cell is checked; errors name file, line and column, repairs are counted and
printed.

DuckDB reads and checks a file. Where it finds anything unusual, Python's `csv` reads the file once more, row by row: it
names the first invalid cell, or reads what DuckDB does not, such as blanks around quotes.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import difflib
import functools
import glob
import gzip
import io
import itertools
import re
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import duckdb
import numpy as np
import pandas as pd

from common.errors import UserError, truncate
from common.fileio import require_regular_file, write_text

if TYPE_CHECKING:  # DuckDB takes a tenth of a second to import
    from duckdb import DuckDBPyConnection, DuckDBPyRelation

csv.field_size_limit(2**31 - 1)  # a cell may exceed the default of 128 KiB

ColumnType = Literal["id", "optional_id", "label", "number", "optional_number", "text", "optional_text"]
SQL_TYPES = {"id": "BIGINT", "optional_id": "DOUBLE", "label": "FLOAT", "number": "DOUBLE", "optional_number": "DOUBLE",
             "text": "VARCHAR", "optional_text": "VARCHAR"}
WHITESPACE = " \t\v\f"  # ignored around a number
NA_VALUES = ("NULL", "null", "NA", "NaN", "nan")  # an optional id or number that is missing
MAX_FLOAT32 = float(np.finfo(np.float32).max)
OPTIONAL_NUMBERS = ("optional_id", "optional_number")
MAX_EXACT_INT = 2**53  # the largest integer up to which a float64, hence "1.44E+12", is exact
ROWS_AT_ONCE = 100_000

# What a text cell is worth; NULL if it is invalid. Casts alone are not strict: BIGINT takes 12.7, 0x1f and 1_0.
CELL_MACROS = rf"""
CREATE OR REPLACE TEMP MACRO is_na(cell) AS trim(cell, '{WHITESPACE}') IN ('', {str(NA_VALUES)[1:-1]});
CREATE OR REPLACE TEMP MACRO as_number(cell) AS CASE
    WHEN regexp_full_match(trim(cell, '{WHITESPACE}'), '[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?')
    AND isfinite(TRY_CAST(trim(cell, '{WHITESPACE}') AS DOUBLE)) THEN TRY_CAST(trim(cell, '{WHITESPACE}') AS DOUBLE) END;
CREATE OR REPLACE TEMP MACRO as_id(cell) AS CASE
    WHEN CAST(TRY_CAST(cell AS BIGINT) AS VARCHAR) = cell
    AND TRY_CAST(cell AS BIGINT) BETWEEN {1 - MAX_EXACT_INT} AND {MAX_EXACT_INT - 1} THEN TRY_CAST(cell AS BIGINT)
    WHEN as_number(cell) = floor(as_number(cell)) AND abs(as_number(cell)) < {MAX_EXACT_INT}
    THEN CAST(as_number(cell) AS BIGINT) END;
"""
CELL_VALUES = {
    "id": "as_id({0})",
    "optional_id": "CAST(as_id({0}) AS DOUBLE)",
    "label": "CASE WHEN {0} IN ('0', '1') THEN CAST({0} AS FLOAT) "
             "WHEN as_number({0}) IN (0, 1) THEN CAST(as_number({0}) AS FLOAT) END",
    "number": "as_number({0})",
    "optional_number": f"CASE WHEN abs(as_number({{0}})) <= {MAX_FLOAT32!r} THEN as_number({{0}}) END",
    "text": "nullif({0}, '')",
    "optional_text": "{0}",
}


class Row(NamedTuple):
    """A row of a file: the line where it begins (of Parquet: its number), and its cells as text; none if the line is
    blank. `is_open`: the file ends inside a quote."""

    line: int
    cells: list[str]
    is_open: bool = False


def log_repairs(path: Path, count: int, repair: str) -> None:
    """Print how many cells or rows were repaired while a file was read."""
    if count:
        print(f"{path}: repaired: {count:,} {repair}")


def cell_location(path: Path, row: int, column: str) -> str:
    """The location of a cell of a table that `scan` read, as messages name it; `row` counts from 0.

    The file is read again: blank lines and cells of several lines shift the line.
    """
    rows = (found for found in _iter_rows(path) if found.cells)
    return _location(path, next(itertools.islice(rows, row, None)).line, column)


def _location(path: Path, line: int, column: str) -> str:
    return f"{path}, {'row' if is_parquet(path) else 'line'} {line}, column '{_printable(column)}'"


def normalize_category(value: str) -> str:
    """Strip whitespace around a category, and the ".0" that spreadsheets add to whole numbers."""
    value = value.strip()
    return value[:-2] if value.endswith(".0") and value[:-2].lstrip("-").isdigit() else value


def count_rows(path: Path) -> int:
    """The number of lines of a CSV file, or of rows of a Parquet file."""
    if is_parquet(path):
        return int(_connection().cursor().read_parquet(str(path)).count("*").fetchall()[0][0])
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def read_table(path: Path, columns: Mapping[str, ColumnType], optional: Sequence[str] = ()) -> pd.DataFrame:
    """Read a whole file into memory; see `scan`. An id is int64, a label float32, another number float64, NaN where it
    is missing. Raises UserError if there are no rows."""
    table = _read_table(path, columns, optional)
    if table.empty:
        raise UserError(f"{path}: no rows below the header: is it the right file?")
    return table


def _read_table(path: Path, columns: Mapping[str, ColumnType], optional: Sequence[str] = ()) -> pd.DataFrame:
    with _connection().cursor() as con:
        return to_frame(scan(con, path, columns, optional))


def to_frame(relation: DuckDBPyRelation) -> pd.DataFrame:
    """The rows of a relation of `scan` in memory, without `row`; text is of dtype object."""
    table: pd.DataFrame = relation.project("* EXCLUDE (row)").df()
    return table.astype({name: object for name in table.columns if table[name].dtype == "str"})


def as_relation(table: pd.DataFrame | DuckDBPyRelation) -> DuckDBPyRelation:
    """A table of SQL; of a table in memory one that refers to it."""
    return _connection().cursor().from_df(table) if isinstance(table, pd.DataFrame) else table


@functools.cache
def _connection() -> DuckDBPyConnection:
    """The connection of tables that are read into memory; opening one takes longer than reading a small file."""

    return duckdb.connect(":memory:", config={"threads": 1})  # no threads of its own, so that a process may fork


def scan(con: DuckDBPyConnection, path: Path, columns: Mapping[str, ColumnType],
         optional: Sequence[str] = ()) -> DuckDBPyRelation:
    """The given columns of a CSV (plain or .gz) or Parquet file, checked; and `row`, BIGINT, from 0, in file order.

    The relation reads the file again when it is used. Column types: `id` a whole number below 2^53 (`12`, `12.0`,
    `1.44E+12`), BIGINT; `optional_id` the same or empty, DOUBLE; `label` 0 or 1, FLOAT; `number` finite, DOUBLE;
    `optional_number` empty, or finite and in the range of float32, DOUBLE; `text` not empty, VARCHAR; `optional_text`
    text, may be empty. Columns in `optional` may be missing from the file. Its further columns are ignored.

    Repairs, counted and printed: blank lines are skipped; NULL, NA, nan and blank cells of an `optional_id` or
    `optional_number` are empty.
    Raises UserError naming file, line and column of an invalid cell.
    """

    header = read_header(path)
    require_columns(f"{path}, line 1", header, columns, optional)
    schema = {name: column_type for name, column_type in columns.items() if name in header}
    con.execute(CELL_MACROS)
    cells = {name: f"coalesce(c{header.index(name)}, '')" for name in schema}
    source = _text_cells(path, header)
    values = ", ".join(f"{CELL_VALUES[column_type].format(cells[name])} AS {quoted(name)}"
                       for name, column_type in schema.items())
    blank_lines: int | None = None
    na_cells = 0
    with contextlib.suppress(duckdb.InvalidInputException, duckdb.IOException, duckdb.ConversionException):
        blank_lines, na_cells = _check(con, path, source, cells, schema, len(header))
    if blank_lines is None:
        relation, blank_lines, na_cells = _read_row_by_row(con, path, header, schema)
    else:
        relation = con.sql(f"SELECT {values}, row_number() OVER () - 1 AS row FROM {source}")
    log_repairs(path, blank_lines, "blank lines skipped")
    log_repairs(path, na_cells, "NULL, NA, nan or blank cells read as empty")
    return relation


def quoted(name: str) -> str:
    """A name as an identifier of SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(value: Any) -> str:
    """A text or path as a literal of SQL."""
    return "'" + str(value).replace("'", "''") + "'"


def _text_cells(path: Path, header: Sequence[str]) -> str:
    """SQL for the cells of a file as text, columns c0, c1, ..., all of which are in the header."""
    file = literal(glob.escape(str(path.absolute())))
    if is_parquet(path):
        cells = ", ".join(f"CAST({quoted(name)} AS VARCHAR) AS c{i}" for i, name in enumerate(header))
        return f"(SELECT {cells} FROM read_parquet({file}, hive_partitioning = false))"
    names = ", ".join(f"c{i}: 'VARCHAR'" for i in range(len(header)))
    compression = "gzip" if path.suffix == ".gz" else "none"
    return (f"read_csv({file}, columns = {{{names}}}, header = true, delim = ',', quote = '\"', escape = '\"', "
            f"auto_detect = false, hive_partitioning = false, compression = '{compression}')")


def _check(con: DuckDBPyConnection, path: Path, source: str, cells: Mapping[str, str],
           schema: Mapping[str, ColumnType], width: int) -> tuple[int | None, int]:
    """The number of blank lines, None if DuckDB does not read this file as it is, and of NA cells.

    DuckDB drops blank lines, blanks around quotes and an empty cell too many without a word, and takes NUL bytes: lines
    and commas are counted in the bytes of the file, too.
    """
    facts = None if is_parquet(path) else _count_bytes(path)
    if facts is not None and (facts.is_unusual or width == 1):
        return None, 0
    optional = [cells[name] for name, column_type in schema.items() if column_type in OPTIONAL_NUMBERS]
    invalid = [f"{CELL_VALUES[column_type].format(cells[name])} IS NULL"
               + f" AND NOT is_na({cells[name]})" * (column_type in OPTIONAL_NUMBERS)
               for name, column_type in schema.items() if column_type != "optional_text"]
    everything = " || ".join(f"coalesce(c{i}, '')" for i in range(width)) if facts and facts.is_quoted else "''"
    inside = ", ".join(f"coalesce(sum(length({everything}) - length(replace({everything}, {character}, ''))), 0)"
                       for character in ("','", "chr(10)"))
    rows, bad, na, commas, lines = con.execute(
        f"SELECT count(*), count(*) FILTER ({' OR '.join(invalid) or 'false'}), "
        f"{' + '.join(f'count(*) FILTER (is_na({cell}) AND {cell} <> {chr(39) * 2})' for cell in optional) or '0'}, "
        f"{inside} FROM {source}").fetchall()[0]
    if facts is None:
        return None if bad else 0, na
    is_read = not bad and facts.commas == (rows + 1) * (width - 1) + commas
    return facts.lines - (rows + 1) - lines if is_read else None, na


class ByteCounts(NamedTuple):
    """What the bytes of a CSV file contain; `is_unusual`: what DuckDB reads in another way than Python's `csv`."""

    commas: int
    lines: int
    is_quoted: bool
    is_unusual: bool


def _count_bytes(path: Path) -> ByteCounts:
    """Read a file once. Raises UserError if it is corrupt, or not UTF-8 text."""
    commas = lines = returns = 0
    is_quoted = is_unusual = False
    decoder = codecs.getincrementaldecoder("utf-8")()
    last = b"\n"
    try:
        with _open_maybe_gzip(path, "rb") as file:
            while block := file.read(1 << 20):
                array = np.frombuffer(block, np.uint8)
                commas += int(np.count_nonzero(array == ord(",")))
                lines += int(np.count_nonzero(array == ord("\n")))
                if not block.isascii() or decoder.getstate()[0]:
                    decoder.decode(block)
                pairs = last + block  # with the two bytes on both sides of the cut
                returns += pairs.count(b"\r\n")
                is_quoted |= b'"' in block
                is_unusual |= b"\0" in block or (b"\r" in pairs and re.search(rb"\r(?!\n|\Z)", pairs) is not None) or (
                    b'"' in pairs and re.search(rb'[ \t]"|"[ \t]', pairs) is not None)
                last = block[-1:]
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise _encoding_error(path) from None
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error
    is_unusual |= last == b"\r" or returns not in (0, lines)
    return ByteCounts(commas, lines + (last != b"\n"), is_quoted, is_unusual)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: corrupt or cut short: {getattr(error, 'strerror', None) or error}")


def _read_row_by_row(con: DuckDBPyConnection, path: Path, header: Sequence[str],
                     schema: Mapping[str, ColumnType]) -> tuple[DuckDBPyRelation, int, int]:
    """The rows of a file as a temporary table, and the numbers of its blank lines and NA cells.

    Raises UserError naming the first invalid cell.
    """
    table = f"rows_{secrets.token_hex(8)}"
    columns = ", ".join(f"{quoted(name)} {SQL_TYPES[column_type]}" for name, column_type in schema.items())
    con.execute(f"CREATE TEMP TABLE {table} ({columns}, row BIGINT)")
    counts = {"blank": 0, "na": 0}

    def checked() -> Iterator[list[Any]]:
        for row in _iter_rows(path):
            counts["blank"] += not row.cells
            if row.cells:
                _require_width(path, header, row)
                cells = dict(zip(header, row.cells, strict=True))
                for name, cell in cells.items():
                    if problem := "NUL bytes: the file is corrupt" * ("\0" in cell) or _cell_error(cell, schema.get(name)):
                        raise UserError(f"{_location(path, row.line, name)}: {problem}")
                if row.is_open:
                    raise UserError(f"{_location(path, row.line, header[-1])}: unterminated quote: is the file cut short?")
                counts["na"] += sum(_is_na(cells[name]) and cells[name] != "" for name, column_type in schema.items()
                                    if column_type in OPTIONAL_NUMBERS)
                yield [_cell_value(cells[name], column_type) for name, column_type in schema.items()]

    try:
        rows = checked()
        while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
            frame = pd.DataFrame(chunk, columns=pd.Index(schema))
            con.register("chunk_of_rows", frame)
            con.execute(f"INSERT INTO {table} SELECT *, (SELECT count(*) FROM {table}) + row_number() OVER () - 1 "
                        "FROM chunk_of_rows")
            con.unregister("chunk_of_rows")
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise _unreadable(path, error) from error
    return con.table(table), counts["blank"], counts["na"]


def _cell_value(cell: str, column_type: ColumnType) -> Any:
    """The value of a valid cell."""
    if column_type in ("text", "optional_text"):
        return cell
    if column_type in OPTIONAL_NUMBERS and _is_na(cell):
        return None
    return int(float(cell)) if column_type == "id" else float(cell)


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


def _iter_rows(path: Path) -> Iterator[Row]:
    """The rows of a file below its header, one by one."""
    if is_parquet(path):
        with _connection().cursor() as con:
            cells = con.execute(f"SELECT COLUMNS(c -> coalesce(c, '')) FROM {_text_cells(path, read_header(path))}")
            while chunk := cells.fetchmany(ROWS_AT_ONCE):
                yield from (Row(row, list(cells)) for row, cells in enumerate(chunk, start=1))
        return
    with _open_maybe_gzip(path, "rt") as file:
        raw, is_end = "", False

        def lines() -> Iterator[str]:
            nonlocal raw, is_end
            for raw in file:  # noqa: UP028 -- the last line is used below
                yield raw
            is_end = True

        reader, end = csv.reader(lines()), 0
        for cells in reader:
            line, end = end + 1, reader.line_num
            if line > 1:
                is_blank = len(cells) == 1 and '"' not in raw and not cells[0].strip(" \t")
                yield Row(line, [] if is_blank else cells, is_end)


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


def _require_width(path: Path, header: Sequence[str], row: Row) -> None:
    if len(row.cells) > len(header):
        raise UserError(f"{_location(path, row.line, header[-1])}: {len(row.cells)} cells, but the header has "
                        f"{len(header)}")
    if len(row.cells) < len(header):
        raise UserError(f"{_location(path, row.line, header[len(row.cells)])}: only {len(row.cells)} of {len(header)} "
                        "cells: is the file cut short?")


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
    return _read_table(path, dict.fromkeys([*columns, *read_header(path)], "optional_text")).to_dict("records")
